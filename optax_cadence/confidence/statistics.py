"""How noisy the gradients of a window are, and how far parameters move, from sums of squares.

From n gradients g_i with mean G and covariance Σ, s1 = Σ‖g_i‖² and s2 = ‖Σ g_i‖²:
(s2 - s1) / (n (n - 1)) estimates |G|² and (s1 - s2/n) / (n - 1) estimates tr Σ, both
without bias (McCandlish et al. 2018, arXiv:1812.06162). What is decided from them is in
`policies`.

A gradient of weight w is the mean of a batch of that size, whose covariance is Σ/w: then Σ is that
of one of weight 1. With s1 = Σ w_i ‖g_i‖², s2 = ‖Σ w_i g_i‖² and W = Σ w_i, tr Σ is estimated by
(s1 - s2/W) / (n - 1), and |G|² by (s2/W - tr Σ) / W: the above where every weight is 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence._state import per_region

_TINY = np.finfo(np.float32).tiny


class Statistics(NamedTuple):
  """The gradients of a window, as numbers for each of the R regions of a group.

  Attributes:
    length: Gradients in the window: int32 [R].
    squares: s1, the sum of the squared norm of each gradient times its weight: float32 [R].
    square: s2, the squared norm of the sum of all gradients, each times its weight: float32 [R].
      Both are NaN for a policy that does not read gradients.
    update: Squared norm of the last update of a sample of the parameters: float32 [R].
    params: Squared norm of the sample before that: float32 [R]. Both are there when a window
      has fired, and NaN before, at the first, and for a policy that does not read updates.
    weight: Sum of the weights of the gradients, their number where there are none: float32 [R].
    extra_args: Extra arguments that `update` was called with at this micro-step, such as a loss.
  """

  length: jax.Array
  squares: jax.Array
  square: jax.Array
  update: jax.Array
  params: jax.Array
  weight: jax.Array
  extra_args: Mapping[str, Any] = {}

  def signals(self) -> jax.Array:
    """Unbiased |G|² of each region: float32 [R]; zero where there are fewer than two gradients."""
    n, weight = self.length.astype(jnp.float32), self._divisor()
    signal = (n * self.square / weight - self.squares) / (weight * jnp.maximum(n - 1, 1))
    return jnp.where(n > 1, signal, 0)

  def noises(self) -> jax.Array:
    """Unbiased tr Σ of each region: float32 [R]; zero where there are fewer than two gradients."""
    n = self.length.astype(jnp.float32)
    spread = self.squares - self.square / self._divisor()
    return jnp.where(n > 1, spread / jnp.maximum(n - 1, 1), 0)

  def signal(self) -> jax.Array:
    """|G|² of the whole group: float32 scalar."""
    return self.signals().sum()

  def noise_of_mean(self) -> jax.Array:
    """Tr Σ / W, the variance of the window's mean, of the whole group: float32 scalar."""
    return (self.noises() / self._divisor()).sum()

  def _divisor(self) -> jax.Array:
    return jnp.where(self.weight > 0, self.weight, 1)

  def relative_update(self) -> jax.Array:
    """Norm of the update over that of the parameters, for the whole group: float32 scalar.

    At most 1, so that it is finite for parameters that are zero.
    """
    update, params = self.update.sum(), self.params.sum()
    return jnp.sqrt(update / jnp.maximum(jnp.maximum(update, params), _TINY))


class Estimate(NamedTuple):
  """|G|² and tr Σ of each region, smoothed over windows apart from one another.

  Attributes:
    signal: Decaying sum of estimates of |G|²: float32 [R].
    noise: Decaying sum of estimates of tr Σ: float32 [R].
    weight: Decaying sum of ones, which both are divided by: float32 [R].
  """

  signal: jax.Array
  noise: jax.Array
  weight: jax.Array

  def signals(self) -> jax.Array:
    """Smoothed |G|², without the bias of a start at zero: float32 [R]; NaN before the first."""
    return self.signal / self.weight

  def noises(self) -> jax.Array:
    """Smoothed tr Σ, likewise."""
    return self.noise / self.weight


def no_estimate(regions: int) -> Estimate:
  """The estimate before the first window."""
  return Estimate(*(jnp.zeros(per_region(regions), jnp.float32) for _ in range(3)))


def smooth(old: Estimate, window: Statistics, decay: Any) -> Estimate:
  """The estimate with one more window, left as it was where that says nothing.

  It says nothing with fewer than two gradients, or where a sum is not finite.
  """
  estimate = Estimate(window.signals(), window.noises(), jnp.ones_like(old.weight))
  usable = (window.length > 1) & jnp.isfinite(estimate.signal) & jnp.isfinite(estimate.noise)
  return decayed(old, estimate, usable, decay)


def decayed(old: Any, found: Any, usable: jax.Array, decay: Any) -> Any:
  """A tree of decaying sums with one more value in each, where that is usable."""
  decay = jnp.asarray(decay, jnp.float32)
  return jax.tree.map(lambda x, y: jnp.where(usable, decay * x + (1 - decay) * y, x), old, found)


def of(
  length: jax.Array, squares: jax.Array, square: jax.Array, weight: jax.Array | None = None
) -> Statistics:
  """The statistics of a window that has not fired; its length may be one for all regions.

  Without a weight all gradients have one of 1.
  """
  length = jnp.broadcast_to(length, squares.shape)
  weight = length.astype(jnp.float32) if weight is None else weight
  unknown = jnp.full_like(squares, jnp.nan)
  return Statistics(length, squares, square, unknown, unknown, weight)


def squared_norms(tensors: Sequence[jax.Array]) -> jax.Array:
  """Squared norm of each tensor, computed in float32: float32 [R]."""
  return jnp.stack([_squared_norm(x) for x in tensors])


def _squared_norm(x: jax.Array) -> jax.Array:
  if jnp.iscomplexobj(x):
    return _squared_norm(x.real) + _squared_norm(x.imag)
  return jnp.square(x.astype(jnp.float32)).sum()
