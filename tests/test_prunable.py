"""What is pruned by default, from the words of names, and exactly, from the program."""

import jax.numpy as jnp
import pytest

from optax_cadence import pruning

KERNELS = """
  kernel w weight 0/w query patch_embed/proj/kernel patch_embed/kernel embed_kernel normal_head/kernel
  debias/kernel norm/mlp/w cls_head/w cls/kernel lora_b mlp/layers/0/weight global_pool/w enormous/w
  in/w tokenizer/w baseline/w blockscale/w mlp/~/linear_0/w
""".split()  # noqa: SIM905
OTHERS = """
  b b1 b_ih bias biases attn/bias qkv_bias rel_bias/w blocks/ln_1/scale ln_f ln_f/w bn1/w norm/0/w
  LayerNorm_0/w BatchNorm/w RMSNorm_3/w layernorm/weight prenorm/weight q_norm/weight gn/w scale
  norm_scale kernel_scale gamma beta pos_emb pos_embed posemb pos wte wpe wte/w tok_embeddings/weight
  embed/w embed/embedding token_embedder/w cls cls_token mask_token registers layer_norm/offset
""".split()  # noqa: SIM905


def test_the_words_of_a_name_decide_and_not_letters_within_them():
  matrix = jnp.ones((12, 64))
  assert [path for path in KERNELS if not pruning.prunable(path, matrix)] == []
  assert [path for path in OTHERS if pruning.prunable(path, matrix)] == []


@pytest.mark.parametrize("x", [jnp.ones(3), jnp.ones((3, 3), jnp.int32), jnp.ones(())])
def test_vectors_and_integers_are_not_pruned(x):
  assert not pruning.prunable("kernel", x)
