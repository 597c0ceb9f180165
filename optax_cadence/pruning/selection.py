"""Which entries are among the k largest: a search for the threshold, not a sort.

Scores become 32-bit integers that compare as the scores do. A pass over the data counts how
many keys reach each of several thresholds at once, which narrows the range of the k-th
largest key by that factor; no pass moves or copies the data. Entries of several arrays are
searched together as one pool by adding up their counts: nothing is joined, and on sharded
arrays what travels is the counts.

What is scored, and how many are kept, is decided elsewhere.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Makes keys, int32 of any shape. It is called inside the passes, so that cheap keys are
# computed from the data in the pass that counts them and are never stored.
Keys = Callable[[], jax.Array]

_LOWEST = -(2**31)
EXCLUDED = _LOWEST  # ranks below every score
_NAN = _LOWEST + 1  # ranks below every number

# A pass on a CPU compares with 23 thresholds, as many as it does at nearly the speed of memory;
# seven passes narrow 2**32 keys to one. On a GPU it is a histogram of 2**11 bins: three passes.
_CPU_WAYS = 24
_GPU_WAYS = 2**11
_GPU_COPIES = 64  # of the histogram, so that atomic additions seldom meet
_MAX_SIZE = 2**31 - 1
_MIN_ROWS = 64  # enough for every core to have some


def order(scores: jax.Array) -> jax.Array:
  """Integers that compare as the scores do.

  Args:
    scores: Floats or integers of at most 32 bits, of any shape.

  Returns:
    int32 of the same shape. -0.0 equals 0.0; NaNs equal one another and rank below -inf.

  Raises:
    ValueError: If the scores are not real numbers, or too wide.
  """
  dtype = scores.dtype
  if dtype == jnp.uint32:
    # The two lowest keys have a meaning of their own.
    scores = jnp.maximum(scores, 2)
    return jax.lax.bitcast_convert_type(scores ^ jnp.uint32(2**31), jnp.int32)
  if jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_:
    if dtype.itemsize > 4:
      raise ValueError(f"scores: expected at most 32 bits, found dtype {dtype}")
    return jnp.maximum(scores.astype(jnp.int32), _NAN + 1)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"scores: expected real numbers, found dtype {dtype}")
  bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
  magnitude = bits & 0x7FFFFFFF
  keys = jnp.where(bits < 0, -magnitude, magnitude)
  return jnp.where(magnitude > 0x7F800000, _NAN, keys)


def largest(pools: Sequence[Sequence[Keys]], kept: Sequence[int | jax.Array]) -> list[list[Keys]]:
  """Masks of the largest keys of every pool; among equal ones those of the lower index.

  Args:
    pools: Makers of the keys of each array of each pool. Indices run through the arrays
      in order, and through each in row-major order.
    kept: How many entries of each pool are kept, at most its size: int32 scalars.

  Returns:
    For each array a function that makes its mask, bool of the array's shape.

  Raises:
    ValueError: If a pool has 2**31 entries or more.
  """
  shapes = [[jax.eval_shape(keys).shape for keys in pool] for pool in pools]
  for pool in shapes:
    if sum(map(math.prod, pool)) > _MAX_SIZE:
      raise ValueError(f"a pool of weights has at most {_MAX_SIZE} entries, found more")
  wanted = jnp.stack([jnp.asarray(k, jnp.int32) for k in kept]) if kept else jnp.zeros(0, jnp.int32)
  below = jnp.full(len(pools), _LOWEST, jnp.int32)
  threshold, above = _search(pools, below, jnp.full_like(below, 2**31 - 1), wanted)
  ranks = [
    [functools.partial(_tie_rank, keys, threshold[g], rank) for keys, rank in _placed(pool, at)]
    for g, (pool, at) in enumerate(zip(pools, shapes, strict=True))
  ]
  # Among the entries that equal the threshold: a second search, of no pass where all or none stay.
  sizes = jnp.array([sum(map(math.prod, pool)) for pool in shapes], jnp.int32)
  missing = wanted - above
  top = jnp.where(missing > 0, sizes + 1, 1)
  cutoff, before = _search(ranks, jnp.zeros_like(below), top, missing)
  cutoff = jnp.where(missing > 0, jnp.where(before < missing, cutoff, cutoff + 1), _MAX_SIZE)
  return [
    [
      functools.partial(_mask, keys, threshold[g], cutoff[g], rank)
      for keys, rank in _placed(pool, at)
    ]
    for g, (pool, at) in enumerate(zip(pools, shapes, strict=True))
  ]


def _placed(pool: Sequence[Keys], shapes: Sequence[tuple[int, ...]]) -> list[tuple[Keys, int]]:
  """Each array of a pool with the rank of its first entry, which falls from there to 1."""
  sizes = [math.prod(shape) for shape in shapes]
  return [(keys, sum(sizes[i:])) for i, keys in enumerate(pool)]


def _tie_rank(keys: Keys, threshold: jax.Array, first: int) -> jax.Array:
  """For entries at the threshold the larger the lower their index, and 0 for all others."""
  k = keys()
  return jnp.where(k == threshold, first - _index(k.shape), 0)


def _mask(keys: Keys, threshold: jax.Array, cutoff: jax.Array, first: int) -> jax.Array:
  k = keys()
  return (k > threshold) | ((k == threshold) & (first - _index(k.shape) >= cutoff))


def _index(shape: tuple[int, ...]) -> jax.Array:
  """Position in row-major order: int32 of this shape."""
  index = jnp.zeros(shape, jnp.int32)
  for axis, stride in enumerate(math.prod(shape[i + 1 :]) for i in range(len(shape))):
    index += jax.lax.broadcasted_iota(jnp.int32, shape, axis) * stride
  return index


def _search(
  pools: Sequence[Sequence[Keys]], low: jax.Array, high: jax.Array, kept: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The kept-th largest key of each pool, and how many keys are larger.

  Args:
    pools: Makers of keys.
    low: At least `kept` keys reach it: int32 [G].
    high: No key reaches it: int32 [G].
    kept: int32 [G].

  Returns:
    int32 [G] each. Where a threshold splits off exactly `kept` keys, the largest
    integer below it stands for the kept-th largest key.
  """

  def run(ways: int, count: Callable[..., jax.Array]) -> Callable[..., Any]:
    return lambda *args: _narrow(pools, ways, count, *args)

  by_histogram = run(_GPU_WAYS, _histogram)
  return jax.lax.platform_dependent(
    low, high, kept, cuda=by_histogram, rocm=by_histogram, default=run(_CPU_WAYS, _compare)
  )


def _narrow(
  pools: Sequence[Sequence[Keys]],
  ways: int,
  count: Callable[..., jax.Array],
  low: jax.Array,
  high: jax.Array,
  kept: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  if not pools:
    return low, kept

  def width(low: jax.Array, high: jax.Array) -> jax.Array:
    # Up to 2**32 - 1, which wraps in int32 and not in uint32.
    return (high - low).astype(jnp.uint32)

  def unfinished(carry: Any) -> jax.Array:
    low, high, _ = carry
    return (width(low, high) > 1).any()

  def one_pass(carry: Any) -> Any:
    low, high, above = carry
    step = jnp.maximum((width(low, high) - 1) // ways + 1, 1)
    inner = []
    for g, pool in enumerate(pools):
      inner.append(sum(count(keys(), low[g], step[g], ways) for keys in pool))
    at = jnp.arange(1, ways, dtype=jnp.uint32)[None] * step[:, None]
    inside = at < width(low, high)[:, None]
    counts = jnp.where(inside, jnp.stack(inner), above[:, None])
    reached = (inside & (counts >= kept[:, None])).sum(1, dtype=jnp.int32)
    exact = inside & (counts == kept[:, None])
    steps = reached.astype(jnp.uint32) * step
    new_low = low + steps.astype(jnp.int32)
    room = width(low, high) - steps
    new_high = new_low + jnp.minimum(step, room).astype(jnp.int32)
    padded = jnp.concatenate([counts, above[:, None]], axis=1)
    new_above = jnp.take_along_axis(padded, reached[:, None], axis=1)[:, 0]
    # A threshold that splits off exactly as many as are kept ends the search.
    found = exact.any(1)
    first = jnp.argmax(exact, axis=1).astype(jnp.uint32) + 1
    split = low + (first * step).astype(jnp.int32)
    return (
      jnp.where(found, split - 1, new_low),
      jnp.where(found, split, new_high),
      jnp.where(found, kept, new_above),
    )

  low, _, above = jax.lax.while_loop(unfinished, one_pass, (low, high, jnp.zeros_like(kept)))
  return low, above


def _compare(keys: jax.Array, low: jax.Array, step: jax.Array, ways: int) -> jax.Array:
  """How many keys reach `low + i * step`, for i = 1, …, ways - 1: int32 [ways - 1].

  One reduction of many operands, which reads the data once; a reduction for each threshold
  would read it as often. Subtracting a comparison, which is -1 where it holds, vectorizes.
  """
  keys = _rows(keys)
  thresholds = [low + (jnp.uint32(i) * step).astype(jnp.int32) for i in range(1, ways)]
  reached = [-(keys >= t).astype(jnp.int32) for t in thresholds]
  zeros = [jnp.int32(0)] * len(reached)
  partial = jax.lax.reduce(
    reached, zeros, lambda x, y: [a + b for a, b in zip(x, y, strict=True)], _inner_axes(keys.shape)
  )
  return -jnp.stack([p.reshape(-1) for p in partial]).sum(1, dtype=jnp.int32)


def _histogram(keys: jax.Array, low: jax.Array, step: jax.Array, ways: int) -> jax.Array:
  """As `_compare`, by counting the keys between two thresholds."""
  keys = _rows(keys)
  distance = (keys - low).astype(jnp.uint32) // step
  bins = jnp.where(keys < low, 0, jnp.minimum(distance, ways - 1).astype(jnp.int32))
  copy = _index(keys.shape) // max(1, -(-keys.size // _GPU_COPIES))
  counts = jnp.zeros((_GPU_COPIES, ways), jnp.int32).at[copy, bins].add(1)
  return jnp.cumsum(counts.sum(0, dtype=jnp.int32)[::-1], dtype=jnp.int32)[::-1][1:]


def _rows(keys: jax.Array) -> jax.Array:
  """A long vector as a matrix of as many rows as keep every core busy."""
  if keys.ndim == 1 and keys.size >= 2**16 and keys.size % _MIN_ROWS == 0:
    return keys.reshape(_MIN_ROWS, -1)
  return keys


def _inner_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
  """The axes to sum over in one go: all but the first few, which are shared out to the cores."""
  rows, first = 1, 0
  while first < len(shape) - 1 and rows < _MIN_ROWS:
    rows *= shape[first]
    first += 1
  return tuple(range(first, len(shape)))
