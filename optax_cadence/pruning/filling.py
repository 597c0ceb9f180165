"""What a shock leaves behind: zeros, fresh weights, or what is left of the old ones."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths
from optax_cadence import _window
from optax_cadence.pruning import criterion as criteria
from optax_cadence.pruning import masking


@dataclasses.dataclass(frozen=True, eq=False)
class Fill:
  r"""What a shock makes of a weight :math:`θ`: :math:`λθ + σ` times a freshly initialized one.

  Attributes:
    keep: λ, how much of the weight stays.
    fresh: σ, how much of a fresh weight is added.
    initializer: What draws fresh weights, `(key, shape, dtype) -> array` as in
      `jax.nn.initializers`; or a tree prefix of the parameters of these. By default they are drawn
      from a normal distribution, cut off at two standard deviations, with the mean and the standard
      deviation that the leaf has when the state is made. So a bias of zeros becomes zero again.
    key: An integer seed or a PRNG key. It is kept in the state, and every micro-step and leaf gets
      a key of its own, derived from it.

  References:
    Ash and Adams 2019, `On Warm-Starting Neural Network Training
    <https://arxiv.org/abs/1910.08475>`_

  >>> from optax_cadence import pruning
  >>> pruning.Fill(keep=0.4, fresh=0.1).keep
  0.4
  """

  keep: float
  fresh: float
  initializer: Any = None
  key: Any = 0

  def __post_init__(self) -> None:
    for name in ("keep", "fresh"):
      value = getattr(self, name)
      if not isinstance(value, int | float) or isinstance(value, bool) or not np.isfinite(value):
        raise ValueError(f"fill: expected a finite number as {name}, found {value!r}")


NAMED = {"zero": Fill(0.0, 0.0), "init": Fill(0.0, 1.0), "shrink": Fill(0.5, 0.5)}


class FillState(NamedTuple):
  """What is needed to draw fresh weights.

  Attributes:
    key: Data of the PRNG key.
    mean: Of each leaf that may be filled, its mean when the state was made: float32 scalars in
      dicts of dicts by the names in its path. Empty where an initializer is given.
    deviation: Its standard deviation, likewise.
  """

  key: jax.Array
  mean: Any
  deviation: Any


def as_fill(fill: Any) -> Fill:
  """The fill that the user gave: as such, or by its name."""
  if isinstance(fill, Fill):
    return fill
  if isinstance(fill, str) and fill in NAMED:
    return NAMED[fill]
  expected = ", ".join(map(repr, NAMED))
  raise ValueError(f"fill: expected {expected} or a pruning.Fill, found {fill!r}")


def init(fill: Fill, leaves: masking.Leaves) -> Any:
  """The state of a fill: a `FillState`, or nothing where no weight is drawn."""
  if fill.fresh == 0:
    return ()
  initializers_of(fill, leaves)  # an error now, and not when a shock is due
  mean, deviation = {}, {}
  if fill.initializer is None:
    for path, x in leaves.items():
      numbers = x.astype(jnp.float32) if x.size else jnp.zeros(1, jnp.float32)
      mean[path], deviation[path] = numbers.mean(), numbers.std()
  return FillState(
    jax.random.key_data(criteria.as_key(fill.key)), _paths.nested(mean), _paths.nested(deviation)
  )


def stand_in(fill: Fill) -> Any:
  """The state of a fill for `tree_map_params`, none of whose fields is a tree of parameters."""
  if fill.fresh == 0:
    return ()
  statistics = jnp.int32(0) if fill.initializer is None else {}
  return FillState(jnp.int32(0), statistics, statistics)


def weights(fill: Fill, state: Any, step: jax.Array, leaves: masking.Arrays) -> masking.Leaves:
  """What a shock at this micro-step would make of each leaf, in the leaf's dtype.

  Args:
    fill: What it leaves behind.
    state: What `init` made for it.
    step: Number of the micro-step.
    leaves: The leaves as they are before the update.
  """
  if fill.fresh == 0 and fill.keep == 0:
    return {path: jnp.zeros_like(x) for path, x in leaves.items()}
  if fill.fresh == 0:
    return {path: jnp.asarray(fill.keep, x.dtype) * x for path, x in leaves.items()}
  key = key_at(fill, state, step)
  mean, deviation = _paths.by_path(state.mean), _paths.by_path(state.deviation)
  initializers, new = initializers_of(fill, leaves), {}
  for i, (path, x) in enumerate(leaves.items()):
    key_of_leaf, wide = jax.random.fold_in(key, i), _window.wider(x.dtype, jnp.float32)
    if fill.initializer is None:
      # Cut off at two, a normal distribution has this standard deviation.
      drawn = jax.random.truncated_normal(key_of_leaf, -2, 2, x.shape, wide) / 0.87962566
      drawn = mean[path].astype(wide) + deviation[path].astype(wide) * drawn
    else:
      drawn = initializers[path](key_of_leaf, x.shape, x.dtype).astype(wide)
      if drawn.shape != x.shape:
        raise ValueError(
          f"initializer of {_paths.join(path)!r}: expected shape {x.shape}, found {drawn.shape}"
        )
    old = jnp.asarray(fill.keep, wide) * x.astype(wide)
    new[path] = (old + jnp.asarray(fill.fresh, wide) * drawn).astype(x.dtype)
  return new


def key_at(fill: Fill, state: FillState, step: jax.Array) -> jax.Array:
  """The key of a micro-step."""
  key = jax.random.wrap_key_data(state.key, impl=jax.random.key_impl(criteria.as_key(fill.key)))
  return jax.random.fold_in(key, step)


def as_wide(update: jax.Array, param: jax.Array) -> jax.Array:
  """The update in a dtype that holds `-param` exactly, so that the parameter can become zero."""
  return update.astype(_window.wider(update.dtype, param.dtype))


def initializers_of(fill: Fill, leaves: masking.Arrays) -> dict[_paths.Path, Any]:
  """The initializer of each leaf, by path; empty where weights are drawn from a normal."""
  if fill.initializer is None:
    return {}
  prefixes = _paths.by_path(fill.initializer, is_leaf=callable)
  found = {}
  for path in leaves:
    prefix = _paths.prefix_of(path, prefixes)
    initializer = "none" if prefix is None else prefixes[prefix]
    if not callable(initializer):
      raise ValueError(
        f"initializer of {_paths.join(path)!r}: expected a function (key, shape, dtype) -> array,"
        f" found {initializer!r}"
      )
    found[path] = initializer
  return found
