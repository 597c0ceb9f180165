"""How far parameters move from one update to the next, told from a sample of them.

The sample is kept in the state. So nothing else of the parameters is read, an update is measured
as it arrived, whatever comes after the cadence, and the operation that fires stays as it is.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

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


def nothing_seen(tensors: Sequence[jax.Array]) -> jax.Array:
  """The sample from before the first update: NaN, from which no distance can be told."""
  return jnp.full_like(_joined([of(x) for x in tensors]), jnp.nan)


def distances(before: jax.Array, tensors: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
  """The new sample, and the squared norms of what has changed and of what was: float32 [2, R]."""
  now = [of(x) for x in tensors]
  ends = np.cumsum([x.size for x in now]).tolist()
  old = jnp.split(before, ends[:-1])
  changes = [x.reshape(-1) - y for x, y in zip(now, old, strict=True)]
  norms = jnp.stack([statistics.squared_norms(changes), statistics.squared_norms(old)])
  return _joined(now), norms


def _joined(samples: Sequence[jax.Array]) -> jax.Array:
  """The samples of all regions as one vector."""
  if not samples:
    return jnp.zeros(0, jnp.float32)
  with jax.numpy_dtype_promotion("standard"):
    return jnp.concatenate([x.reshape(-1) for x in samples])
