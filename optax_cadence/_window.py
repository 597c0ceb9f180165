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

_AS_IN_STATE = "as in the state, which goes with the parameters and cadences it was made for"


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
    """What the sum of region i is divided by for the mean; 1 where the window is empty."""
    if self.weights is None:
      return jnp.maximum(item(self.length, i), 1)
    weight = item(self.weights, i)
    return jnp.where(weight > 0, weight, 1)

  def reduced(self, i: int, dtype: Any, as_sum: bool = False) -> jax.Array:
    """The mean of region i in this dtype, or its sum; zero where nothing is in its window."""
    x, reduce = self.sums[i], sum_of if as_sum else mean_of
    if self.by_region:
      x = jnp.where(item(self.length, i) > 0, x, jnp.zeros_like(x))
    return reduce(x, self.total_weight(i), dtype, self.single)


def wider(*dtypes: Any) -> np.dtype:
  """The dtype that holds the values of all of these."""
  given = list(map(jnp.dtype, dtypes))
  if any(dtype != given[0] for dtype in given):
    # JAX promotes no floats of 8 bits and fewer; all of them fit into bfloat16.
    given = [jnp.dtype(jnp.bfloat16) if _is_below_half(dtype) else dtype for dtype in given]
  with jax.numpy_dtype_promotion("standard"):
    return functools.reduce(jnp.promote_types, given)


def _is_below_half(dtype: np.dtype) -> bool:
  return dtype.itemsize < 2 and bool(jnp.issubdtype(dtype, jnp.floating))


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


def so_far(state: GroupState, tree: Any) -> Window:
  """The window of a group as it is in its state; the tree is that of the group's tensors.

  Raises:
    ValueError: If the state is of other tensors.
  """
  if state.accumulators is not None:
    _paths.check_same("gradient", _AS_IN_STATE, state.accumulators, tree)
  return Window(
    sums=jax.tree.leaves(state.accumulators),
    length=jnp.int32(0) if state.window is None else state.window,
    skipped=state.skipped,
    squares=None if state.confidence is None else state.confidence.squares,
    weights=state.weight,
    single=state.accumulators is None,
  )


def accumulate(
  window: Window,
  tensors: Sequence[jax.Array],
  counts: jax.Array | None = None,
  summed: Sequence[bool] = (),
  weights: jax.Array | None = None,
) -> Window:
  """A window with one more micro-batch; where it is `single`, that micro-batch alone.

  Args:
    window: The window.
    tensors: The gradient of each tensor.
    counts: Whether the micro-batch is usable in each region: bool [R]. None where it always is.
    summed: Whether what is given of each tensor is the sum of the window with its gradient, and not
      the gradient; none is where this is empty.
    weights: How much the micro-batch counts in each region: float32 [R]. None for 1 in all.
  """
  skipped = window.skipped
  weighs = None if weights is None else ~(weights <= 0)  # a NaN does, and reaches the mean
  if counts is not None and skipped is not None:
    left_out = ~counts if weighs is None else ~counts & weighs
    skipped = skipped + left_out.astype(jnp.int32)
  if weighs is not None:
    counts = weighs if counts is None else counts & weighs
  new = jnp.int32(1) if counts is None else counts.astype(jnp.int32)
  flags = None if counts is None else [item(counts, i) for i in range(counts.size)]
  if window.single:
    return Window(list(tensors), new, skipped, flags, weights=weights, single=True)
  sums, length, total_weight = [], window.length + new, None
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
  return Window(sums, length, skipped, flags, squares, total_weight)


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


def sum_of(total: jax.Array, n: jax.Array, dtype: Any, single: bool = False) -> jax.Array:
  """The sum of gradients; n is their number or weight: a scalar, or one for each entry.

  The total is that sum, or their mean, or, where `single`, one gradient as it is.
  """
  x = total.astype(dtype)
  return multiply(x, n) if single or holds_mean(total) else x


def mean_of(total: jax.Array, n: jax.Array, dtype: Any, single: bool = False) -> jax.Array:
  """The mean of gradients, from the same as in `sum_of`."""
  x = total.astype(dtype)
  return x if single or holds_mean(total) else divide(x, n)


def listens(node: Any) -> bool:
  """Whether a part of an optimizer's state is told the length of its window."""
  return hasattr(node, "with_window")


def told(state: Any, length: Any) -> Any:
  """The state of an optimizer, of which every part with a method `with_window` is told the length.

  So a transformation inside a cadence can know how many gradients its update is the mean of, as
  `scale_by_cadence` does: `with_window` takes that number and returns the new state. It is an int32
  scalar, or, where windows may differ, a tree of one for each tensor.
  """
  nodes, treedef = jax.tree.flatten(state, is_leaf=listens)
  for i, node in enumerate(nodes):
    if hasattr(node, "with_window"):
      nodes[i] = node.with_window(length)
  return jax.tree.unflatten(treedef, nodes)


def item(x: jax.Array, i: int) -> jax.Array:
  """The number of region i, where there is one for each region or one for all."""
  if not x.ndim:
    return x
  # Outside of a program to cut a number out of an array takes longer than to compute with it.
  return x[i] if _control.is_traced(x) else np.asarray(x)[i]


def all_finite(x: jax.Array) -> jax.Array:
  """Whether all entries are finite: bool scalar."""
  if x.ndim == 0 or x.shape[0] % _SLABS or _sharding.spec_of(x) or not _control.is_traced(x):
    return jnp.isfinite(x).all()
  return jax.lax.platform_dependent(
    x, cpu=_all_finite_by_slabs, default=lambda x: jnp.isfinite(x).all()
  )


def _all_finite_by_slabs(x: jax.Array) -> jax.Array:
  """`all_finite` as a sum of zeros, which an infinity or a NaN makes NaN.

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
