"""What makes a weight worth keeping: a score for every weight. The lowest are pruned.

To add a criterion, write a `Criterion`, here or in your own code; nothing else has to know it.
Under a name in `NAMED`, it can be given as a string. A function of a parameter and its gradient
is enough for most:

>>> import jax.numpy as jnp, optax_cadence as oc
>>> from optax_cadence import pruning
>>> params = {"kernel": jnp.array([[1.0, -3.0], [2.0, 0.5]])}
>>> def after_one_step(criterion):
...   tx = oc.prune(0.5, every=1, criterion=criterion)
...   updates, _ = tx.update(params, tx.init(params), params)
...   return params["kernel"] + updates["kernel"]
>>> print(after_one_step(lambda param, grad: param) == 0)
[[False  True]
 [False  True]]

A `Criterion` says more: here, that scores are cheap to compute.

>>> small = pruning.Criterion("small", lambda param, grad, key: -jnp.abs(param), cheap=True)
>>> print(after_one_step(small) == 0)
[[False  True]
 [ True False]]
"""

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
    score: `score(param, grad, key) -> scores`, of the parameter's shape. The second argument is
      None where `prune` has no inner optimizer, and the sum described under `remembers` if that
      is set. The last is None unless the criterion has a key.
    reads_grads: Whether it needs gradients, and so `prune` an inner optimizer to see them before.
    remembers: Whether it sums `-grad * param` over the micro-steps and scores that sum.
    cheap: Whether the scores are computed entry by entry and cost so little that every pass over
      them computes them again instead of storing them.
    key: PRNG key. Every micro-step and leaf gets a key of its own, derived from it.
  """

  name: str
  score: Score
  reads_grads: bool = False
  remembers: bool = False
  cheap: bool = False
  key: Any = None


MAGNITUDE = Criterion("magnitude", lambda param, grad, key: jnp.abs(param), cheap=True)
SALIENCY = Criterion(
  "saliency",
  lambda param, grad, key: jnp.abs(param * grad.astype(param.dtype)),
  reads_grads=True,
  cheap=True,
)
# For regrowth: what a pruned weight would gain. The scores of kept weights are not read.
GRADIENT = Criterion(
  "gradient", lambda param, grad, key: jnp.abs(grad), reads_grads=True, cheap=True
)

NAMED = {"magnitude": MAGNITUDE, "saliency": SALIENCY}


def random(key: Any) -> Criterion:
  """Random scores; `key` is an integer seed or a PRNG key.

  >>> from optax_cadence import pruning
  >>> pruning.random(0).name
  'random'
  """
  key = jax.random.key(key) if isinstance(key, int) else key
  return Criterion(
    "random", lambda param, grad, key: jax.random.bits(key, param.shape, jnp.uint32), key=key
  )


def movement() -> Criterion:
  r"""How far weights moved away from zero: :math:`-\sum_t g_t w_t`.

  References:
    Sanh et al. 2020, `Movement Pruning <https://arxiv.org/abs/2005.07683>`_

  >>> from optax_cadence import pruning
  >>> pruning.movement().remembers
  True
  """
  return Criterion(
    "movement", lambda param, memory, key: memory, reads_grads=True, remembers=True, cheap=True
  )


def check_needs_no_gradient(criterion: Criterion, param: Any) -> None:
  """Raises `ValueError` if a criterion reads gradients although it does not say so.

  Args:
    criterion: Of a `prune` to which no gradients come.
    param: A leaf that it has to score.
  """

  def traced(grad: Any) -> None:
    jax.eval_shape(lambda x: criterion.score(x, x if grad else None, criterion.key), param)

  try:
    traced(grad=False)
  except Exception as error:
    try:
      traced(grad=True)
    except Exception:
      return  # With a gradient it fails too, and for a reason of its own.
    raise ValueError(
      f"criterion {criterion.name}: reads the gradient, which does not reach the end of a chain:"
      " expected prune(..., inner=optimizer), found inner=None"
    ) from error


def as_criterion(criterion: Any) -> Criterion:
  """The criterion that the user gave: as such, by its name or as a function `(param, grad)`."""
  if isinstance(criterion, Criterion):
    return criterion
  if isinstance(criterion, str) and criterion in NAMED:
    return NAMED[criterion]
  if callable(criterion):
    name = getattr(criterion, "__name__", "criterion")
    return Criterion(name, lambda param, grad, key: jnp.asarray(criterion(param, grad)))
  raise ValueError(
    f"criterion: expected {', '.join(map(repr, NAMED))}, a pruning criterion or a function"
    f" (param, grad) -> scores, found {criterion!r}"
  )
