"""What makes a weight worth keeping: a score for every entry, the higher the worthier."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Score = Callable[[jax.Array, Any, Any], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Criterion:
  """How weights are scored.

  Attributes:
    name: What errors call it.
    score: `score(param, grad_or_memory, key) -> scores` of the parameter's shape.
    reads_grads: Whether it needs gradients, and so an `inner` optimizer to see them before.
    remembers: Whether it sums `-grad * param` over the micro-steps and scores that sum.
    cheap: Whether scores are computed entry by entry and at no cost, so that they are better
      computed again in every pass than stored.
    key: PRNG key; folded with the micro-step and the position of the leaf.
  """

  name: str
  score: Score
  reads_grads: bool = False
  remembers: bool = False
  cheap: bool = False
  key: Any = None


def random(key: Any) -> Criterion:
  """Random scores; `key` is an integer seed or a PRNG key.

  >>> from optax_cadence import pruning
  >>> pruning.random(0).name
  'random'
  """
  made = jax.random.key(key) if isinstance(key, int) else key
  return Criterion("random", lambda p, g, k: jax.random.bits(k, p.shape, jnp.uint32), key=made)


def movement() -> Criterion:
  r"""The way that weights moved: :math:`-\sum_t g_t w_t` (Sanh et al. 2020, arXiv:2005.07683).

  >>> from optax_cadence import pruning
  >>> pruning.movement().remembers
  True
  """
  return Criterion("movement", lambda p, m, k: m, reads_grads=True, remembers=True, cheap=True)


MAGNITUDE = Criterion("magnitude", lambda p, g, k: jnp.abs(p), cheap=True)
SALIENCY = Criterion(
  "saliency", lambda p, g, k: jnp.abs(p * g.astype(p.dtype)), reads_grads=True, cheap=True
)
GRADIENT = Criterion("gradient", lambda p, g, k: jnp.abs(g), reads_grads=True, cheap=True)
_NAMED = {"magnitude": MAGNITUDE, "saliency": SALIENCY}


def as_criterion(criterion: Any) -> Criterion:
  """The criterion that a name or a function `(param, grad) -> scores` stands for."""
  if isinstance(criterion, Criterion):
    return criterion
  if isinstance(criterion, str) and criterion in _NAMED:
    return _NAMED[criterion]
  if callable(criterion):
    name = getattr(criterion, "__name__", "criterion")
    return Criterion(name, lambda p, g, k: jnp.asarray(criterion(p, g)))
  raise ValueError(
    f"criterion: expected 'magnitude', 'saliency', a pruning criterion or a function"
    f" (param, grad) -> scores, found {criterion!r}"
  )
