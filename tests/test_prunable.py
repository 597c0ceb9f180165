"""What is pruned by default, from the words of names, and exactly, from the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from optax_cadence import pruning

KERNELS = """
  kernel w weight 0/w query patch_embed/proj/kernel patch_embed/kernel embed_kernel
  normal_head/kernel debias/kernel norm/mlp/w cls_head/w cls/kernel lora_b a/b mlp/layers/0/weight
  global_pool/w enormous/w in/w tokenizer/w baseline/w blockscale/w mlp/~/linear_0/w
""".split()  # noqa: SIM905
OTHERS = """
  b b1 b_ih bias biases attn/bias qkv_bias rel_bias/w blocks/ln_1/scale ln_f ln_f/w bn1/w norm/0/w
  LayerNorm_0/w BatchNorm/w RMSNorm_3/w layernorm/weight prenorm/weight q_norm/weight gn/w scale
  norm_scale kernel_scale gamma beta pos_emb pos_embed posemb pos wte wpe wte/w
  tok_embeddings/weight embed/w embed/embedding token_embedder/w cls cls_token mask_token
  registers layer_norm/offset
""".split()  # noqa: SIM905


def test_the_words_of_a_name_decide_and_not_letters_within_them():
  matrix = jnp.ones((12, 64))
  assert [path for path in KERNELS if not pruning.prunable(path, matrix)] == []
  assert [path for path in OTHERS if pruning.prunable(path, matrix)] == []


@pytest.mark.parametrize("x", [jnp.ones(3), jnp.ones((3, 3), jnp.int32), jnp.ones(())])
def test_vectors_and_integers_are_not_pruned(x):
  assert not pruning.prunable("kernel", x)


def read(fn, params, *args):
  """Contraction, output and whether it is stacked, for each kernel."""
  return {path: tuple(kernel) for path, kernel in pruning.kernels(fn, params, *args).items()}


X = jnp.ones((5, 8))


def test_attention_norms_embeddings_and_convolutions_of_flax():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, ids):
      embed = nn.Embed(11, 8, name="table")
      x = embed(ids) + self.param("position", nn.initializers.ones, (1, 6, 8))
      x = nn.LayerNorm()(x)
      x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x, x)
      x = nn.Conv(4, (3,), name="conv")(x)
      x = nn.Conv(4, (3,), feature_group_count=4, name="depthwise")(nn.relu(x))
      return nn.Dense(3, name="dense")(nn.remat(nn.GroupNorm)(num_groups=2)(x))

  ids = jnp.ones((2, 6), jnp.int32)
  params = jax.eval_shape(Model().init, jax.random.key(0), ids)["params"]
  found = read(lambda p, ids: Model().apply({"params": p}, ids), params, ids)
  projection = ((0,), (1, 2), False)
  assert found == {
    **{f"attention/{name}/kernel": projection for name in ("query", "key", "value")},
    "attention/out/kernel": ((0, 1), (2,), False),
    "conv/kernel": ((1,), (2,), False),
    "depthwise/kernel": ((1,), (2,), False),
    "dense/kernel": ((0,), (1,), False),
  }


def test_layers_that_are_stacked_are_seen_however_they_are_run():
  params = {"scan": jnp.ones((3, 8, 8)), "batched": jnp.ones((3, 8, 4)), "scale": jnp.ones((3, 8))}
  params |= {"cut": jnp.ones((3, 8, 8)), "picked": jnp.ones((3, 8, 8)), "plain": jnp.ones((8, 8))}

  def fn(p, x):
    x, _ = jax.lax.scan(lambda x, w: (x @ w[0] * w[1][None], None), x, (p["scan"], p["scale"]))
    for i in range(3):
      x = x @ p["cut"][i]
    x = jax.lax.fori_loop(0, 3, lambda i, x: x @ p["picked"][i] @ p["plain"], x)
    return jax.vmap(jnp.matmul)(jnp.stack([x, x, x]), p["batched"])

  stacked, plain = ((1,), (2,), True), ((0,), (1,), False)
  expected = dict.fromkeys(["scan", "batched", "cut", "picked"], stacked) | {"plain": plain}
  found = pruning.kernels(fn, params, X)
  assert {path: tuple(kernel) for path, kernel in found.items()} == expected
  assert found.stacked("scan", None) and not found.stacked("plain", None)
  assert found("plain", None) and not found("scale", None)


def test_experts_behind_a_router_are_stacked():
  params = {"experts": jnp.ones((2, 8, 4))}
  fn = lambda p, x, sizes: jax.lax.ragged_dot(x, p["experts"], sizes)
  assert read(fn, params, X, jnp.array([3, 2])) == {"experts": ((1,), (2,), True)}


def test_a_weight_is_followed_through_what_is_made_of_weights_alone():
  mask = np.tri(8, 8, dtype=np.float32)
  params = {"w": jnp.ones((8, 8)), "gain": jnp.ones((1, 8)), "rows": jnp.ones((8, 1))}
  params |= {"a": jnp.ones((8, 2)), "b": jnp.ones((2, 8)), "flat": jnp.ones((8, 2, 4))}

  def fn(p, x):
    w = jnp.where(mask > 0, p["w"].astype(jnp.float32), 0.0) * mask
    w = p["gain"] * p["rows"] * w / jnp.sqrt(jnp.sum(w**2, 0, keepdims=True))
    flat = p["flat"].reshape(8, 8).T[::-1]
    return jnp.concatenate([w + p["a"] @ p["b"], flat.T], axis=1)

  everywhere = read(lambda p, x: x @ fn(p, x), params, X)
  assert everywhere == {
    "w": ((0,), (1,), False),
    "a": ((1,), (0,), False),
    "b": ((0,), (1,), False),
    "flat": ((0,), (1, 2), False),
  }
  alone = read(lambda p, x: x @ (p["a"] @ p["b"]), {k: params[k] for k in "ab"}, X)
  assert alone == {"a": ((0,), (1,), False), "b": ((0,), (1,), False)}


def test_what_only_scales_or_is_looked_up_is_no_kernel():
  params = {"w": jnp.ones((8, 8)), "scale": jnp.ones(8), "table": jnp.ones((9, 8))}
  params |= {"tied": jnp.ones((9, 8)), "unused": jnp.ones((8, 8))}

  def fn(p, x, ids):
    h = x * p["scale"] + p["table"][ids] + p["tied"][ids]
    return h @ p["w"] @ p["tied"].T

  with jax.numpy_rank_promotion("allow"):
    for x in (X, X[:1]):
      found = read(fn, params, x, jnp.arange(len(x)))
      assert found == {"w": ((0,), (1,), False), "tied": ((1,), (0,), False)}


def test_contraction_axes_are_a_tree_like_the_parameters():
  params = {"w": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
  fn = lambda p, x: x @ p["w"]["kernel"] + p["w"]["bias"][None]
  assert pruning.contraction_axes(fn, params, X) == {"w": {"kernel": (0,), "bias": ()}}
