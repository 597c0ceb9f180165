"""The policies: until certain, and as settled.

Both read the numbers of `statistics`; what a policy is, is in `schedules.policy`.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _checks
from optax_cadence import _paths
from optax_cadence.confidence import statistics
from optax_cadence.confidence.statistics import Statistics
from optax_cadence.schedules.policy import Policy


class UntilCertain(Policy):
  """See `until_certain`."""

  def __init__(self, snr: Any, min_period: int, max_period: int) -> None:
    super().__init__(min_period, max_period)
    self.snr = _checked("snr", snr, lambda x: x > 0, "a number above 0")

  def due(self, window: Statistics, state: Any) -> jax.Array:
    del state
    signal = window.signal()
    return (signal > 0) & (signal >= self.snr * window.noise_of_mean())

  def __str__(self) -> str:
    return f"until_certain({self.snr}, {self.min_period}-{self.max_period})"


def until_certain(snr: Any, min_period: int, max_period: int) -> UntilCertain:
  r"""Due as soon as the mean of the window is known well enough.

  That is, as soon as the estimate of :math:`n |G|^2 / \operatorname{tr} \Sigma`, the squared
  signal-to-noise ratio of the mean of n gradients, is at least `snr`; which theory expects at n =
  `snr` times the noise scale, in micro-batches. Two gradients are the least from which noise can be
  told. Without noise a region is due at once; with zero or NaN gradients, after `max_period`.

  Args:
    snr: The squared ratio, above 0; may be traced, so that `jax.vmap` sweeps it.
    min_period: Micro-steps that a window has at least.
    max_period: Micro-steps that a window has at most.

  Returns:
    A policy, which is a cadence. The same object in several places decides once for all.

  Raises:
    ValueError: If `snr` is not above 0, or `min_period` is above `max_period`.

  References:
    McCandlish et al. 2018, An empirical model of large-batch training, arXiv:1812.06162.

  >>> import optax_cadence as oc
  >>> print(oc.until_certain(1.0, 2, 64))
  until_certain(1.0, 2-64)
  """
  return UntilCertain(snr, min_period, max_period)


class SettledState(NamedTuple):
  """What `as_settled` remembers.

  Attributes:
    period: Length of the window: int32 scalar.
    size: Decaying sum of the relative sizes of updates: float32 scalar.
    weight: Decaying sum of ones: float32 scalar.
    peak: Largest smoothed size so far: float32 scalar.
  """

  period: jax.Array
  size: jax.Array
  weight: jax.Array
  peak: jax.Array


class AsSettled(Policy):
  """See `as_settled`."""

  reads_gradients = False
  reads_updates = True

  def __init__(self, min_period: int, max_period: int, decay: Any) -> None:
    super().__init__(min_period, max_period)
    self.decay = fraction("decay", decay)

  def init(self) -> SettledState:
    return SettledState(jnp.int32(self.min_period), *(jnp.float32(0) for _ in range(3)))

  def earliest(self, state: SettledState) -> jax.Array:
    return state.period

  def due(self, window: Statistics, state: Any) -> bool:
    del window, state
    return True

  def fired(self, window: Statistics, state: SettledState) -> SettledState:
    found = window.relative_update()
    usable = jnp.isfinite(found) & (window.length > 0).any()
    old, new = (state.size, state.weight), (found, jnp.float32(1))
    size, weight = statistics.decayed(old, new, usable, self.decay)
    mean = size / jnp.where(weight > 0, weight, 1)
    peak = jnp.maximum(state.peak, mean)
    left = jnp.where(peak > 0, mean / jnp.where(peak > 0, peak, 1), 1)
    low, high = jnp.log(float(self.min_period)), jnp.log(float(self.max_period))
    period = jnp.rint(jnp.exp(left * low + (1 - left) * high)).astype(jnp.int32)
    return SettledState(period, size, weight, peak)

  def __str__(self) -> str:
    return f"as_settled({self.min_period}-{self.max_period})"


def as_settled(min_period: int, max_period: int, *, decay: float = 0.8) -> AsSettled:
  r"""The more settled a region, the slower: its period follows the decay of its updates.

  Let r be the relative size of the update, :math:`\lVert \Delta\theta \rVert / \lVert \theta
  \rVert` smoothed over windows, as a share of the largest that the region has had. A window then
  has :math:`a^r b^{1 - r}` micro-steps: a is `min_period`, for the peak, b `max_period`, for when
  nothing moves any more. A learning rate that decays settles a region, too. An update with a NaN
  leaves the period as it is. Gradients are not read: a sample of the parameters, up to 4096 entries
  of each region, is kept from one update to the next. So `update` needs the parameters.

  Args:
    min_period: Micro-steps of a window to begin with.
    max_period: Micro-steps of a window at most.
    decay: How slowly the size is smoothed, from 0 to below 1.

  Returns:
    A policy, which is a cadence. The same object in several places decides once for all.

  Raises:
    ValueError: If a period or the decay is out of range.

  >>> import optax_cadence as oc
  >>> print(oc.as_settled(2, 16))
  as_settled(2-16)
  """
  return AsSettled(min_period, max_period, decay)


def each_layer(policy: Policy) -> "EachLayer":
  """A copy of a policy for every layer, so that each decides on its own.

  A layer is all parameters with the same parent in the tree: a kernel and its bias share a copy.

  Args:
    policy: The policy.

  Returns:
    A function of the parameters, to stand for `every`.

  Raises:
    ValueError: If it is not a policy.

  >>> import jax.numpy as jnp, optax_cadence as oc
  >>> params = {"a": {"w": jnp.ones(2), "b": jnp.ones(2)}, "c": {"w": jnp.ones(2)}}
  >>> every = oc.each_layer(oc.until_certain(1.0, 2, 64))(params)
  >>> every["a"]["w"] is every["a"]["b"], every["a"]["w"] is every["c"]["w"]
  (True, False)
  """
  if not isinstance(policy, Policy):
    raise ValueError(f"each_layer expects a policy, found {_checks.shown(policy)}")
  return EachLayer(policy)


@dataclasses.dataclass(frozen=True, eq=False)
class EachLayer:
  """What `each_layer` returns: call it with parameters for a tree of policies."""

  policy: Policy
  cycle = None  # as for every cadence that decides while training

  def __call__(self, params: Any) -> Any:
    layers = [path[:-1] for path, _ in _paths.flatten_with_paths(params)]
    copies = {layer: copy.copy(self.policy) for layer in layers}
    for policy, place in zip(copies.values(), _paths.names(copies), strict=True):
      policy.place = place
    return _paths.map_with_paths(lambda path, _: copies[path[:-1]], params)


def fraction(name: str, value: Any) -> Any:
  """A number from 0 to below 1; a traced one is not looked at.

  Raises:
    ValueError: If it is anything else.
  """
  return _checked(name, value, lambda x: 0 <= x < 1, "at least 0 and below 1")


def _checked(name: str, value: Any, is_allowed: Callable[[float], bool], expected: str) -> Any:
  if isinstance(value, jax.core.Tracer):
    return value
  try:
    if np.ndim(value) == 0 and is_allowed(float(value)):
      return value
  except (TypeError, ValueError):
    pass
  raise ValueError(f"{name} must be {expected}, found {_checks.shown(value)}")
