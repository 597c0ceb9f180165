"""What makes a weight worth keeping: a score for every weight. The lowest are pruned.

To add a criterion, write a `Criterion`, here or in your own code; nothing else has to know it.
With a name in `NAMED`, it can be given as a string. A function of a parameter and its gradient,
which is None where `prune` has no `inner`, is enough for most:

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

What it remembers of every micro-step (`remembers`), or is given with `update` (`reads`), takes the
place of the gradient. The criterion of Wanda (arXiv:2306.11695), with norms of activations by hand:

>>> wanda = pruning.Criterion(
...   "wanda", lambda param, norms, key: jnp.abs(param) * norms[:, None], reads="norms"
... )
>>> tx = oc.prune(0.5, every=1, criterion=wanda)
>>> norms = {"kernel": jnp.array([1.0, 9.0])}
>>> updates, _ = tx.update(params, tx.init(params), params, norms=norms)
>>> print(params["kernel"] + updates["kernel"] == 0)
[[ True  True]
 [False False]]
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_cadence import _checks
from optax_cadence import _paths
from optax_cadence import _window

Score = Callable[[jax.Array, Any, Any], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Criterion:
  """How weights are scored.

  Attributes:
    name: What errors call it.
    score: `score(param, grad, key) -> scores`, of the parameter's shape: real numbers, of which
      the lowest are pruned. The second argument is the gradient, None where `prune` has no inner
      optimizer; or what `remembers` or `reads` puts in its place. The last is None unless the
      criterion has a key. A leaf that holds a stack of layers is scored a layer at a time.
    reads_grads: Whether it needs gradients, and so `prune` an inner optimizer to see them before.
    remembers: A function `(memory, param, grad) -> memory`, called at every micro-step, whose
      result is scored; all are arrays of the parameter's shape, in float32 or wider, the memory
      real. It is zero to begin with. An entry that would not be finite stays as it was. True is for
      the sum of `-grad * param`. It needs gradients.
    cheap: Whether the scores are computed entry by entry and cost so little that every pass over
      them computes them again instead of storing them.
    key: PRNG key. Every micro-step and leaf gets a key of its own, derived from it.
    reads: Name of an extra argument of `update`, a tree that has something for each pruned leaf at
      the path of the leaf; that is scored.

  Raises:
    ValueError: If it both remembers and reads.
  """

  name: str
  score: Score
  reads_grads: bool = False
  remembers: Any = False
  cheap: bool = False
  key: Any = None
  reads: str | None = None

  def __post_init__(self) -> None:
    if self.remembers and self.reads is not None:
      raise ValueError(
        f"criterion {self.name}: expected remembers or reads, found both, which take the place of"
        " the gradient"
      )

  @property
  def needs_grads(self) -> bool:
    """Whether it cannot do without gradients."""
    return self.reads_grads or bool(self.remembers)

  def remember(self, memory: jax.Array, param: jax.Array, grad: jax.Array) -> jax.Array:
    """The memory after one more micro-step; an entry that would not be finite stays as it was."""
    wide = _window.wider(memory.dtype, param.dtype)  # complex, where the parameter is
    param, grad = param.astype(wide), grad.astype(wide)
    if callable(self.remembers):
      new = jnp.asarray(self.remembers(memory, param, grad))
    else:
      new = memory - (grad * param).real
    if new.shape != memory.shape or jnp.iscomplexobj(new):
      raise ValueError(
        f"criterion {self.name}: remembers must return a real array of shape {memory.shape}, found"
        f" {new.shape}, {new.dtype}"
      )
    new = new.astype(memory.dtype)
    return jnp.where(jnp.isfinite(new), new, memory)


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
  return Criterion(
    "random",
    lambda param, grad, key: jax.random.bits(key, param.shape, jnp.uint32),
    key=as_key(key),
  )


def as_key(key: Any) -> jax.Array:
  """The PRNG key that a seed, the data of a key or a key stands for."""
  seed = _checks.whole(key)
  if seed is not None:
    return jax.random.key(seed)
  if not hasattr(key, "dtype"):
    raise ValueError(f"key: expected a seed or a PRNG key, found {_checks.shown(key)}")
  return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def movement() -> Criterion:
  r"""How far weights moved away from zero: :math:`-\sum_t g_t w_t`.

  Of complex weights the real part, which is the change of the loss in first order.

  References:
    Sanh et al. 2020, `Movement Pruning <https://arxiv.org/abs/2005.07683>`_

  >>> from optax_cadence import pruning
  >>> pruning.movement().remembers
  True
  """
  return Criterion(
    "movement", lambda param, memory, key: memory, reads_grads=True, remembers=True, cheap=True
  )


def given(
  criterion: Criterion, params: Mapping[_paths.Path, Any], extra_args: Mapping[str, Any]
) -> dict[_paths.Path, jax.Array]:
  """What the extra argument that a criterion reads has for each pruned leaf, by path.

  Raises:
    ValueError: If it is missing, or has nothing for a leaf.
  """
  name = criterion.reads
  if name is None:
    return {}
  if name not in extra_args:
    raise ValueError(
      f"criterion {criterion.name}: reads the extra argument {name!r}: expected"
      f" update(grads, state, params, {name}=...), found"
      f" {', '.join(map(repr, extra_args)) or 'no extra argument'}"
    )
  found = _paths.by_path(extra_args[name])
  missing = [path for path in params if path not in found]
  if missing:
    raise ValueError(
      f"{name}: expected something for {_paths.listed(missing)}, which criterion {criterion.name}"
      f" scores, found {_paths.listed(found)}"
    )
  return {path: jnp.asarray(found[path]) for path in params}


def check_needs_no_gradient(criterion: Criterion, param: Any, inner: Any) -> None:
  """Raises `ValueError` if a criterion reads gradients, although it does not say so.

  Args:
    criterion: One that has to score leaves without their gradients.
    param: A leaf.
    inner: The inner optimizer of `prune`; None if there is none.
  """
  if criterion.reads is not None:
    return

  try:
    jax.eval_shape(lambda x: criterion.score(x, None, criterion.key), param)
  except (AttributeError, TypeError, ValueError) as error:  # what None gives where arrays belong
    # With a gradient it has to work; where it does not, this raises the criterion's own error.
    jax.eval_shape(lambda x: criterion.score(x, x, criterion.key), param)
    if inner is not None:
      raise ValueError(
        f"criterion {criterion.name}: reads the gradient, which is not there yet when the state is"
        " made with masks: expected a Criterion with reads_grads=True, found reads_grads=False"
      ) from error
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
    return Criterion(name, lambda param, grad, key: criterion(param, grad))
  raise ValueError(
    f"criterion: expected {', '.join(map(repr, NAMED))}, a pruning criterion or a function"
    f" (param, grad) -> scores, found {criterion!r}"
  )
