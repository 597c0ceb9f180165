"""What a group accumulates between two updates: sums, counts, and their mean.

A window does not know when it ends, nor what is done with its mean. Its first micro-step
overwrites the accumulators, so that nothing needs clearing and a NaN does not outlive its
window. Only a backward pass that adds to them by itself clears them first: see `_training`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _control
from optax_cadence import _paths
from optax_cadence import _sharding
from optax_cadence._state import GroupState

_SLABS = 8


class Window(NamedTuple):
  """The gradients of a window.

  Attributes:
    sums: One array for each of the R tensors of the group: the sum of its gradients or, where
      that is narrower than 32 bits, their mean, since a sum would overflow or stand still.
    length: Micro-steps in the sums: int32 scalar, or int32 [R].
    skipped: Micro-batches left out so far, int32 [R]; None where none ever is.
    counts: Whether this micro-batch is in the sums: R bool scalars; None where it always is.
    squares: Sum of the squared norms of its gradients: float32 [R]; None where nobody asks.
    weights: Sum of the weights of its micro-batches, which the gradients in the sums are multiplied
      with: float32 [R]. None where all count alike.
    single: Whether the sums are the gradients of one micro-batch as they are, for lack of
      accumulators.
  """

  sums: list[jax.Array]
  length: jax.Array
  skipped: jax.Array | None
  counts: list[jax.Array] | None = None
  squares: jax.Array | None = None
  weights: jax.Array | None = None
  single: bool = False

  @property
  def by_region(self) -> bool:
    """Whether a micro-batch may be missing in some of the regions: lengths are then [R]."""
    return self.length.ndim > 0

  def total_weight(self, i: int) -> jax.Array:
    """What the mean of region i is the sum divided by; 1 for nothing."""
    if self.weights is None:
      return jnp.maximum(item(self.length, i), 1)
    return jnp.where(self.weights[i] > 0, self.weights[i], 1)


def wider(*dtypes: Any) -> np.dtype:
  """The dtype that holds the values of all of these."""
  with jax.numpy_dtype_promotion("standard"):
    return functools.reduce(jnp.promote_types, dtypes)


def accumulator_dtype(dtype: Any, asked: Any | None) -> np.dtype:
  """Float32 or wider, or the dtype asked for; complex where the parameter is."""
  is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
  if asked is not None and not is_complex:
    return jnp.dtype(asked)
  return wider(dtype, jnp.float32) if asked is None else wider(asked, jnp.complex64)


def holds(accumulator: jax.Array, x: jax.Array) -> bool:
  """Whether an accumulator's dtype represents every value of the dtype of `x`."""
  if jnp.iscomplexobj(accumulator) != jnp.iscomplexobj(x):
    return False
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    return bool(accumulator.dtype == x.dtype)
  return bool(wider(accumulator.dtype, x.dtype) == accumulator.dtype)


def accumulate(
  state: GroupState,
  tensors: Sequence[jax.Array],
  tree: Any,
  counts: jax.Array | None = None,
  summed: Sequence[bool] = (),
  weights: jax.Array | None = None,
) -> Window:
  """The window of a group with one more micro-batch.

  Args:
    state: State of the group.
    tensors: The gradient of each of its tensors.
    tree: The same, as the inner optimizer sees them.
    counts: Whether the micro-batch is usable in each region: bool [R]. None where it always is.
    summed: Whether what is given of each tensor is the sum of the window with its gradient, and not
      the gradient; none is where this is empty.
    weights: How much the micro-batch counts in each region: float32 [R]. None for 1 in all.

  Returns:
    The window. Without accumulators it is this micro-batch alone.

  Raises:
    ValueError: If the state is of other tensors.
  """
  skipped = state.skipped
  if counts is not None:
    assert skipped is not None
    left_out = ~counts if weights is None else ~counts & (weights > 0)
    skipped = skipped + left_out.astype(jnp.int32)
  if weights is not None:
    counts = weights > 0 if counts is None else counts & (weights > 0)
  if state.accumulators is None:
    flags = None if counts is None else list(counts)
    return Window(list(tensors), _as_length(counts), skipped, flags, weights=weights, single=True)
  squares = None if state.confidence is None else state.confidence.squares
  before = so_far(state, tree)._replace(skipped=skipped, squares=squares)
  return extended(before, tensors, counts, summed, weights)


def extended(
  window: Window,
  tensors: Sequence[jax.Array],
  counts: jax.Array | None = None,
  summed: Sequence[bool] = (),
  weights: jax.Array | None = None,
) -> Window:
  """A window with one more micro-batch; arguments as in `accumulate`.

  With weights, `counts` is given too, and False where a weight is 0.
  """
  flags = None if counts is None else list(counts)
  sums, length, total_weight = [], window.length + _as_length(counts), None
  if weights is not None and counts is not None and window.weights is not None:
    before = jnp.where(window.length > 0, window.weights, 0)
    total_weight = before + jnp.where(counts, weights, 0)
  for i, (old, x) in enumerate(zip(window.sums, tensors, strict=True)):
    if summed and summed[i]:
      sums.append(x)
      continue
    count, weight = item(length, i), None
    if weights is not None and total_weight is not None:
      count, weight = total_weight[i], weights[i]
    total = added(old, x, item(window.length, i) == 0, count, weight)
    sums.append(total if flags is None else jnp.where(flags[i], total, old))
  squares = window.squares
  if squares is not None and tensors:
    squares = _add_squares(squares, window.length, tensors, flags, weights)
  return Window(sums, length, window.skipped, flags, squares, total_weight)


def _as_length(counts: jax.Array | None) -> jax.Array:
  """By how much a micro-batch makes a window longer."""
  return jnp.int32(1) if counts is None else counts.astype(jnp.int32)


def added(
  total: jax.Array,
  x: jax.Array,
  first: jax.Array,
  length: jax.Array | None,
  weight: jax.Array | None = None,
) -> jax.Array:
  """The sum or mean with one more gradient.

  Args:
    total: As in `Window.sums`.
    x: The gradient.
    first: Whether it is the first of its window, and so replaces what is there: a bool scalar, or
      one for each entry.
    length: How many there are with it, or the sum of their weights: a scalar, or one for each
      entry. Read for a mean.
    weight: How much it counts: float32 scalar. None for 1.
  """
  if length is None or not holds_mean(total):
    x = x.astype(total.dtype)
    if weight is not None:
      x = multiply(x, weight)
    return jnp.where(first, x, total + x)
  x, mean, count = x.astype(jnp.float32), total.astype(jnp.float32), length.astype(jnp.float32)
  if weight is not None:
    count = count / weight
  moved = mean + (x - mean) / count
  return jnp.where(first, x, moved).astype(total.dtype)


def holds_mean(total: jax.Array) -> bool:
  """Whether a window has the mean of its gradients in this array, and not their sum."""
  return jnp.dtype(total.dtype).itemsize < 4


def so_far(state: GroupState, tree: Any) -> Window:
  """The window of a group as it is, without another micro-batch; arguments as in `accumulate`."""
  _check_tree(state, tree)
  length = jnp.int32(0) if state.window is None else state.window
  return Window(jax.tree.leaves(state.accumulators), length, state.skipped, weights=state.weight)


def _check_tree(state: GroupState, tree: Any) -> None:
  """Raises `ValueError` if a state has accumulators for other tensors than these."""
  if state.accumulators is not None:
    where = "as in the state, which goes with the parameters and cadences it was made for"
    _paths.check_same("gradient", where, state.accumulators, tree)


def _add_squares(
  squares: jax.Array,
  length: jax.Array,
  tensors: Sequence[jax.Array],
  finite: Sequence[jax.Array] | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """The sum of squared norms with those of one more micro-batch, times its weight: float32 [R]."""
  from optax_cadence.confidence import statistics

  more = statistics.squared_norms(tensors)
  more = more if weights is None else more * weights
  total = jnp.where(length == 0, more, squares + more)
  return total if finite is None else jnp.where(jnp.stack(finite), total, squares)


def sums(window: Window, dtypes: Sequence[Any]) -> list[jax.Array]:
  """The sum over the window in these dtypes; zero for a tensor that has nothing in its own."""
  return _reduced(window, dtypes, sum_of)


def means(window: Window, dtypes: Sequence[Any]) -> list[jax.Array]:
  """The mean over the window in these dtypes; zero for a tensor that has nothing in its own."""
  return _reduced(window, dtypes, mean_of)


def _reduced(window: Window, dtypes: Sequence[Any], reduce: Any) -> list[jax.Array]:
  results = []
  for i, (x, dtype) in enumerate(zip(window.sums, dtypes, strict=True)):
    if window.by_region:
      x = jnp.where(window.length[i] > 0, x, jnp.zeros_like(x))
    results.append(reduce(x, window.total_weight(i), dtype, window.single))
  return results


def sum_of(total: jax.Array, n: jax.Array, dtype: Any, single: bool = False) -> jax.Array:
  """The sum of gradients; n is their number or weight: a scalar, or one for each entry.

  The total is that sum, or their mean, or, where `single`, one gradient as it is.
  """
  x = total.astype(dtype)
  return multiply(x, n) if single or holds_mean(total) else x


def mean_of(total: jax.Array, n: jax.Array, dtype: Any, single: bool = False) -> jax.Array:
  """Their mean."""
  x = total.astype(dtype)
  return x if single or holds_mean(total) else divide(x, n)


def item(x: jax.Array, i: int) -> jax.Array:
  """What belongs to region i: an entry of [R], or the one number for all."""
  return x[i] if x.ndim else x


def all_finite(x: jax.Array) -> jax.Array:
  """Whether all entries are finite: bool scalar."""
  if x.ndim == 0 or x.shape[0] % _SLABS or _sharding.spec_of(x) or not _control.is_traced(x):
    return jnp.isfinite(x).all()
  return jax.lax.platform_dependent(
    x, cpu=_all_finite_by_slabs, default=lambda x: jnp.isfinite(x).all()
  )


def _all_finite_by_slabs(x: jax.Array) -> jax.Array:
  """The same, as a sum of zeros, which an infinity or a NaN makes NaN.

  Most of it is an elementwise operation, which XLA vectorizes and runs on all CPU cores; a
  reduction to a scalar it does not.
  """
  slabs = (x * jnp.zeros((), x.dtype)).reshape(_SLABS, x.shape[0] // _SLABS, *x.shape[1:])
  return (functools.reduce(jnp.add, list(slabs)) == 0).all()


def multiply(x: jax.Array, n: jax.Array) -> jax.Array:
  """The array times real numbers, in its own dtype."""
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    return jax.lax.complex(multiply(x.real, n), multiply(x.imag, n))
  return x * n.astype(x.dtype)


def divide(x: jax.Array, n: jax.Array) -> jax.Array:
  """The array over real numbers, in its own dtype."""
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    return jax.lax.complex(divide(x.real, n), divide(x.imag, n))
  return x / n.astype(x.dtype)
