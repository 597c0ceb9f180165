"""Which leaves are pruned where nothing else is said: a guess from the words of their names.

`kernels` reads the exact answer from the program.
"""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np

# A leaf is not pruned if its own name or that of its module has such a word, or one that ends so,
# as layernorm and tok_posemb do.
_MODULES = frozenset("bias biases bn gn ln rms wpe wte".split())  # noqa: SIM905
_ENDINGS = (
  "norm",
  "norms",
  "emb",
  "embs",
  "embed",
  "embeds",
  "embedder",
  "embedding",
  "embeddings",
)
# Nor if its own name has one of these; a module may well be called cls_head.
_LEAVES = frozenset(
  """
  beta class cls gain gamma offset pos position positional positions register registers scale
  scales token tokens
  """.split()  # noqa: SIM905
)


def prunable(path: str, param: Any) -> bool:
  """The default of `where`: matrices and kernels, but no bias, norm, embedding or token.

  It goes by words, of which a name may have several (`ln_1`, `LayerNorm_0`): those of the
  leaf's own name and those of the module that it is in. What is called a kernel is one, wherever
  it is: `patch_embed/kernel`. Names are a convention: `pruning.kernels` reads what a leaf is used
  for from the program.

  Args:
    path: The `/`-joined path.
    param: The leaf.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import pruning
  >>> [pruning.prunable(path, jnp.ones((12, 64))) for path in ("blocks/ln_1/scale", "debias/w")]
  [False, True]
  """
  if np.ndim(param) < 2 or not jnp.issubdtype(param.dtype, jnp.inexact):
    return False
  # Modules in a list have numbers, which say nothing.
  named = [words for words in map(_words, path.split("/")) if words]
  if not named:
    return True
  *modules, leaf = named
  if leaf[-1] == "kernel":
    return True
  # A letter is a bias on its own or at the front (b, b_ih), not in lora_b; nor where modules are
  # called by letters too (a/b).
  letters = modules and all(len("".join(words)) == 1 for words in named)
  if (leaf[0] == "b" and not letters) or _LEAVES.intersection(leaf):
    return False
  return not any(map(_is_other_module, leaf + (modules[-1] if modules else [])))


def _is_other_module(word: str) -> bool:
  """Whether a word names a norm, a bias or an embedding."""
  return word in _MODULES or word.endswith(_ENDINGS)


def _words(name: str) -> list[str]:
  """The words of a name, in lower case: `RMSNorm_0` and `rms_norm0` are rms and norm."""
  words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
  return [word.lower() for word in words]
