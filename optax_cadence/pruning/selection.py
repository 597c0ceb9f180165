"""Which entries are among the k largest: a search for the threshold, not a sort.

Scores become keys: integers that compare as the scores do, of 32 bits, or of 64 where scores have
as many. A pass over the data counts how many keys reach each of several thresholds, and so tells
between which two of them the k-th largest key is; the next pass divides that range in the same way.
No pass moves or copies the data. Entries of several arrays are searched together as one pool by
adding up their counts: nothing is joined, and of sharded arrays only the counts travel. The counts
are kept by rows: of the keys equal to the threshold the first ones stay, and where that ends is
found within one row of each array.

What is scored is decided by `criterion` and `structure`, and how many are kept by `allocation`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_cadence import _control
from optax_cadence import _sharding

# A function that makes keys, int32 or int64 of any shape. It is called inside the passes, so that
# cheap keys are computed from the data in the pass that counts them and are never stored.
Keys = Callable[[], jax.Array]

_MAX_SIZE = 2**31 - 1
_MIN_ROWS = 64  # enough for every core to have some
_MAX_ROWS = 2**16
_FEW_ENTRIES = 2**16  # in all pools together: compiling takes longer than counting
_GPU_COPIES = 64  # of the histogram, so that atomic additions seldom meet


@dataclasses.dataclass(frozen=True)
class Method:
  """How a pass over an array counts.

  Attributes:
    ways: Into how many parts a pass divides the range of keys.
    few_ways: The same where there is little to read, so that the time to compile counts for more:
      in small pools, and in the row in which ties are cut.
    count: `count(keys, axes, low, step, ways)`: how many keys of each row reach `low + i * step`,
      for i = 1, …, ways - 1: int32 [rows, ways - 1].
    rows: From the shape of an array, the shape in which it is viewed, and how many axes of that
      count the rows.
  """

  ways: int
  few_ways: int
  count: Callable[..., jax.Array]
  rows: Callable[[tuple[int, ...]], tuple[tuple[int, ...], int]]

  def for_few(self) -> "Method":
    """The same where there is little to read."""
    return dataclasses.replace(self, ways=self.few_ways)


def excluded(dtype: Any) -> int:
  """The key that ranks below every score."""
  return int(jnp.iinfo(dtype).min)


def order(scores: jax.Array, wide: bool = False) -> jax.Array:
  """Integers that compare as the scores do.

  Args:
    scores: Floats or integers, of any shape.
    wide: Whether keys of 64 bits are asked for, so that they compare with those of wider scores.
      Scores of 64 bits have such keys anyway.

  Returns:
    int32 or int64 of the same shape. -0.0 equals 0.0; NaNs equal one another and rank below -inf.
  """
  dtype = scores.dtype
  wide = wide or dtype.itemsize > 4
  signed, unsigned = (jnp.int64, jnp.uint64) if wide else (jnp.int32, jnp.uint32)
  bits = jnp.iinfo(signed).bits
  lowest, highest = jnp.iinfo(signed).min, jnp.iinfo(signed).max
  # The two lowest keys are that of what is excluded and that of NaNs, and the highest is a bound.
  if dtype == unsigned:
    scores = jnp.clip(scores, unsigned(2), unsigned(2**bits - 2))
    return jax.lax.bitcast_convert_type(scores ^ unsigned(2 ** (bits - 1)), signed)
  if jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_:
    return jnp.clip(scores.astype(signed), signed(lowest + 2), signed(highest - 1))
  scores = scores.astype(jnp.float64 if wide else jnp.float32)
  infinity = 0x7FF0000000000000 if wide else 0x7F800000
  pattern = jax.lax.bitcast_convert_type(scores, signed)
  magnitude = pattern & signed(highest)
  keys = jnp.where(pattern < 0, -magnitude, magnitude)
  return jnp.where(magnitude > signed(infinity), signed(lowest + 1), keys)


def largest(pools: Sequence[Sequence[Keys]], kept: Sequence[int | jax.Array]) -> list[list[Keys]]:
  """Masks of the largest keys of every pool; among equal ones those of the lower index.

  Args:
    pools: For each array of each pool, a function that makes its keys, all of the same dtype. In
      `jax.shard_map` all keys vary over the same axes: every shard searches among its own.
      Indices run through the arrays in order, and through each in row-major order.
    kept: How many entries of each pool are kept, at most its size: int32 scalars.

  Returns:
    For each array a function that makes its mask, bool of the array's shape.

  Raises:
    ValueError: If a pool has 2**31 entries or more.
  """
  if not pools:
    return []
  sizes = [sum(math.prod(shape) for shape in _shapes(pool)) for pool in pools]
  if max(sizes) > _MAX_SIZE:
    raise ValueError(f"a pool of weights has at most {_MAX_SIZE} entries, found more")

  wanted = jnp.stack([jnp.asarray(k, jnp.int32) for k in kept])
  find = _find
  if not _control.is_traced(wanted):
    # Outside of a program the loop would be compiled anew at every call.
    pools = [[jax.tree_util.Partial(_itself, keys()) for keys in pool] for pool in pools]
    find = _find_compiled
  thresholds, ends = find(pools, wanted)
  return [
    [
      functools.partial(_mask, keys, thresholds[g], end)
      for keys, end in zip(pool, ends[g], strict=True)
    ]
    for g, pool in enumerate(pools)
  ]


def _itself(keys: jax.Array) -> jax.Array:
  return keys


def _find(
  pools: Sequence[Sequence[Keys]], wanted: jax.Array
) -> tuple[jax.Array, list[list[jax.Array]]]:
  """`_cut`, counting in the way that is fast on the device."""
  n_entries = sum(math.prod(shape) for pool in pools for shape in _shapes(pool))

  def by(method: Method) -> Callable[..., Any]:
    method = method.for_few() if n_entries < _FEW_ENTRIES else method
    return functools.partial(_cut, pools, method=method)

  histogram = by(HISTOGRAM)
  return jax.lax.platform_dependent(wanted, cuda=histogram, rocm=histogram, default=by(COMPARE))


_find_compiled = jax.jit(_find)


def _shapes(pool: Sequence[Keys]) -> list[tuple[int, ...]]:
  return [jax.eval_shape(keys).shape for keys in pool]


def _mask(keys: Keys, threshold: jax.Array, end: jax.Array) -> jax.Array:
  """Keeps the keys above the threshold, and those equal to it with an index before `end`."""
  k = keys()
  return (k > threshold) | ((k == threshold) & (_index(k.shape) < end))


def _index(shape: tuple[int, ...]) -> jax.Array:
  """Position in row-major order: int32 of this shape."""
  index = jnp.zeros(shape, jnp.int32)
  for axis, stride in enumerate(math.prod(shape[i + 1 :]) for i in range(len(shape))):
    index += jax.lax.broadcasted_iota(jnp.int32, shape, axis) * stride
  return index


def _cut(
  pools: Sequence[Sequence[Keys]], wanted: jax.Array, method: Method
) -> tuple[jax.Array, list[list[jax.Array]]]:
  """The threshold of each pool, and for each array the index before which keys equal to it stay."""
  dtype = jax.eval_shape(pools[0][0]).dtype
  low = jnp.full(wanted.shape, jnp.iinfo(dtype).min, dtype)
  high = jnp.full(wanted.shape, jnp.iinfo(dtype).max, dtype)
  threshold, above, equal = _search(pools, low, high, wanted, method)
  ranks, sizes, starts, in_row = [], [], [], []
  for g, pool in enumerate(pools):
    left = wanted[g] - above[g]
    for keys, shape, counts in zip(pool, _shapes(pool), equal[g], strict=True):
      # The row in which the ties of this array are cut, and how many of them stay in it.
      staying = jnp.clip(left, 0, counts.sum(dtype=jnp.int32))
      whole = jnp.cumsum(counts, dtype=jnp.int32) < staying  # rows in which all ties stay
      row = whole.sum(dtype=jnp.int32)
      view, axes = method.rows(shape)
      size = math.prod(view[axes:])
      ranks.append([functools.partial(_ranks, keys, threshold[g], row, view, axes)])
      sizes.append(size)
      starts.append(row * size)
      in_row.append(staying - jnp.where(whole, counts, 0).sum(dtype=jnp.int32))
      left -= staying
  stay, beyond = jnp.stack(in_row), jnp.array(sizes, jnp.int32) + 1
  any_stay = stay > 0
  top = jnp.where(any_stay, beyond, 1)
  least, more, _ = _search(ranks, jnp.zeros_like(top), top, stay, method.for_few())
  # Where exactly as many as stay are above what was found, the least of them is the next number.
  least = jnp.where(more < stay, least, least + 1)
  ends = jnp.where(any_stay, jnp.stack(starts) + beyond - least, 0)
  flat = iter(ends)
  return threshold, [[next(flat) for _ in pool] for pool in pools]


def _ranks(
  keys: Keys, threshold: jax.Array, row: jax.Array, view: tuple[int, ...], axes: int
) -> jax.Array:
  """Ranks of the entries of a row that equal the threshold, the first the highest; else 0."""
  k = keys().reshape(view)
  for axis in range(axes):
    i = row // math.prod(view[axis + 1 : axes]) % view[axis]
    k = jnp.take(k, i, axis=0, mode="clip")  # of a sharded array the row travels, not the rest
  return jnp.where(k == threshold, k.size - _index(k.shape), 0)


def _search(
  pools: Sequence[Sequence[Keys]],
  low: jax.Array,
  high: jax.Array,
  kept: jax.Array,
  method: Method,
) -> tuple[jax.Array, jax.Array, list[list[jax.Array]]]:
  """The kept-th largest key of each pool.

  Args:
    pools: For each array of each pool, a function that makes its keys.
    low: No key is below it: [G], of the dtype of the keys.
    high: No key reaches it: the same.
    kept: Which key is searched, the largest being 1: int32 [G].
    method: How passes count.

  Returns:
    That key, [G]; how many keys are larger, int32 [G]; and for each array how many are equal,
    int32 [rows]. Where a pass meets a threshold that exactly `kept` keys reach, the search ends
    with the integer below it, which need not be a key.
  """

  def unfinished(carry: Any) -> jax.Array:
    low, high, *_ = carry
    return (_distance(high, low) > 1).any()

  def one_pass(carry: Any) -> Any:
    low, high, reached, above = carry
    # Without the barrier XLA would compute the keys ahead of the loop, and so store them.
    data, low = jax.lax.optimization_barrier((consts, low))
    step = jnp.maximum((_distance(high, low) - 1) // method.ways + 1, 1)
    new: list[tuple[Any, ...]] = []
    for g, pool in enumerate(all_keys(data)):
      counts = []
      for keys in pool:
        view, axes = method.rows(keys.shape)
        counts.append(method.count(keys.reshape(view), axes, low[g], step[g], method.ways))
      new.append(_narrowed(low[g], high[g], step[g], kept[g], reached[g], above[g], counts))
    lows, highs, reached, above = zip(*new, strict=True)
    return jnp.stack(lows), jnp.stack(highs), list(reached), list(above)

  def row_sizes(keys: jax.ShapeDtypeStruct) -> jax.Array:
    view, axes = method.rows(keys.shape)
    return jnp.full(math.prod(view[:axes]), math.prod(view[axes:]), jnp.int32)

  all_keys, shapes, consts = _hoisted(pools)
  everything = jax.tree.map(row_sizes, shapes)
  nothing = jax.tree.map(jnp.zeros_like, everything)
  axes = _sharding.axes_of((consts, low, high, kept))
  start = _sharding.varying((low, high, everything, nothing), axes)
  low, _, reached, above = jax.lax.while_loop(unfinished, one_pass, start)
  larger = jnp.stack([sum(x.sum(dtype=jnp.int32) for x in pool) for pool in above])
  return low, larger, jax.tree.map(jnp.subtract, reached, above)


def _hoisted(pools: Sequence[Sequence[Keys]]) -> tuple[Callable[[Any], Any], Any, Any]:
  """Turns the arrays that functions of keys close over into an argument of one function.

  Returns:
    A function from these arrays to the keys of all pools, the shapes of the keys, and the arrays.
  """
  closed, out = jax.make_jaxpr(
    lambda: [[keys() for keys in pool] for pool in pools], return_shape=True
  )()

  def all_keys(consts: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(out), jax.core.eval_jaxpr(closed.jaxpr, consts))

  return all_keys, out, closed.consts


def _narrowed(
  low: jax.Array,
  high: jax.Array,
  step: jax.Array,
  kept: jax.Array,
  reached: list[jax.Array],
  above: list[jax.Array],
  counts: list[jax.Array],
) -> tuple[jax.Array, jax.Array, list[jax.Array], list[jax.Array]]:
  """Narrows the range of one pool to the part in which the kept-th largest key is.

  Args:
    low: Lower bound of the range.
    high: Upper bound, not included.
    step: Distance between the thresholds.
    kept: Which key is searched, the largest being 1.
    reached: For each array how many keys of a row reach `low`: int32 [rows].
    above: How many reach `high`.
    counts: How many reach each of the thresholds: int32 [rows, ways - 1].

  Returns:
    low, high, reached and above of that part.
  """
  width = _distance(high, low)
  at = jnp.arange(1, counts[0].shape[1] + 1, dtype=step.dtype) * step
  inside = at < width
  bounds = [
    jnp.concatenate([r[:, None], jnp.where(inside, c, a[:, None]), a[:, None]], axis=1)
    for r, a, c in zip(reached, above, counts, strict=True)
  ]
  totals = jnp.stack([b.sum(0, dtype=jnp.int32) for b in bounds]).sum(0, dtype=jnp.int32)[1:-1]
  part = (inside & (totals >= kept)).sum(dtype=jnp.int32)
  offset = part.astype(step.dtype) * step
  start = low + offset.astype(low.dtype)
  end = start + jnp.minimum(step, width - offset).astype(low.dtype)
  # A threshold that exactly as many as are kept reach ends the search just below it.
  ended = (inside & (totals == kept)).any()
  upper = jnp.where(ended, part, part + 1)
  column = lambda b, i: jax.lax.dynamic_index_in_dim(b, i, 1, keepdims=False)  # noqa: E731
  return (
    jnp.where(ended, start - 1, start),
    jnp.where(ended, start, end),
    [column(b, part) for b in bounds],
    [column(b, upper) for b in bounds],
  )


def _distance(high: jax.Array, low: jax.Array) -> jax.Array:
  """The difference, which wraps in signed integers and not in unsigned ones."""
  return (high - low).astype(jnp.uint64 if low.dtype == jnp.int64 else jnp.uint32)


def _compare(keys: jax.Array, axes: int, low: jax.Array, step: jax.Array, ways: int) -> jax.Array:
  """Counts by comparing with every threshold.

  One reduction of many operands, which reads the data once; a reduction for each threshold
  would read it as often. Subtracting a comparison, which is -1 where it holds, vectorizes.
  """
  thresholds = [low + (step.dtype.type(i) * step).astype(low.dtype) for i in range(1, ways)]
  reached = [-(keys >= t).astype(jnp.int32) for t in thresholds]
  zeros = [jnp.int32(0)] * len(reached)
  add = lambda x, y: [a + b for a, b in zip(x, y, strict=True)]  # noqa: E731
  partial = jax.lax.reduce(reached, zeros, add, tuple(range(axes, keys.ndim)))
  return -jnp.stack([p.reshape(-1) for p in partial], axis=1)


def _histogram(keys: jax.Array, axes: int, low: jax.Array, step: jax.Array, ways: int) -> jax.Array:
  """Counts with a histogram of the keys between the thresholds; the array is one row."""
  del axes
  distance = _distance(keys, low) // step
  bins = jnp.where(keys < low, 0, jnp.minimum(distance, ways - 1).astype(jnp.int32))
  copy = _index(keys.shape) // max(1, -(-keys.size // _GPU_COPIES))
  counts = jnp.zeros((_GPU_COPIES, ways), jnp.int32).at[copy, bins].add(1)
  return jnp.cumsum(counts.sum(0, dtype=jnp.int32)[::-1], dtype=jnp.int32)[::-1][None, 1:]


def _rows(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
  """Makes rows of the first few axes, enough to keep every core busy; splits a long first axis.

  Later axes are neither split nor joined, so that a sharded array stays where it is. Keys that
  are split are stored, since XLA does not fuse what comes before a reshape with a reduction.
  """
  if 0 in shape:
    return shape, 0
  if shape and shape[0] > _MAX_ROWS:
    n = max(d for d in range(1, 4097) if shape[0] % d == 0)
    shape = (n, shape[0] // n, *shape[1:])
  axes = 0
  while axes < len(shape) - 1 and math.prod(shape[:axes]) < _MIN_ROWS:
    axes += 1
  return shape, axes


# On a CPU a pass compares with as many thresholds as it does at nearly the speed of memory;
# seven passes narrow 2**32 keys to one. Few thresholds compile sooner. On a GPU a pass is a
# histogram, and three are enough.
COMPARE = Method(24, 4, _compare, _rows)
HISTOGRAM = Method(2**11, 2**11, _histogram, lambda shape: (shape, 0))
