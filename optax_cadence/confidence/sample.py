"""How far parameters move from one update to the next, told from a sample of them.

The sample is kept in the state. So nothing else of the parameters is read, an update is measured
as it arrived, whatever comes after the cadence, and the operation that fires stays as it is.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from optax_cadence import _window
from optax_cadence.confidence import statistics

_ENTRIES = 4096


def of(x: jax.Array) -> jax.Array:
  """Up to 4096 entries, at equal distances along each axis, in float32 or wider.

  A slice stays sharded as the array is; to gather entries would gather the array first.
  """
  strides = [1] * x.ndim
  while math.prod(counts := [-(-n // s) for n, s in zip(x.shape, strides, strict=True)]) > _ENTRIES:
    strides[counts.index(max(counts))] *= 2
  entries = jax.lax.slice(x, [s // 2 for s in strides], x.shape, strides)
  return entries.astype(_window.accumulator_dtype(x.dtype, None))


def nothing_seen(x: jax.Array) -> jax.Array:
  """The sample from before the first update: NaN, from which no distance can be told."""
  return jnp.full_like(of(x), jnp.nan)


def distances(
  before: Sequence[jax.Array], tensors: Sequence[jax.Array]
) -> tuple[list[jax.Array], jax.Array]:
  """New samples, and the squared norms of what has changed and of what was: float32 [2, R]."""
  now = [of(x) for x in tensors]
  changes = [x - y for x, y in zip(now, before, strict=True)]
  return now, jnp.stack([statistics.squared_norms(x) for x in (changes, before)])
