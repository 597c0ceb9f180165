"""What a group accumulates between two updates: sums, counts, and their mean.

A window does not know when it ends, nor what is done with its mean. Its first micro-step
overwrites the accumulators, so that nothing needs clearing and a NaN does not outlive its
window.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths
from optax_cadence._state import GroupState

_SLABS = 8


class Window(NamedTuple):
  """The gradients of a window.

  Attributes:
    sums: One array for each of the R tensors of the group.
    length: Micro-steps in the sums: int32 scalar, or int32 [R].
    skipped: Micro-batches left out so far, int32 [R]; None where none ever is.
    squares: Sum of the squared norms of its gradients: float32 [R]; None where nobody asks.
  """

  sums: list[jax.Array]
  length: jax.Array
  skipped: jax.Array | None
  squares: jax.Array | None = None


def accumulator_dtype(dtype: Any, asked: Any | None) -> np.dtype:
  """Float32 or wider, or the dtype asked for; complex where the parameter is."""
  is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
  if asked is not None and not is_complex:
    return jnp.dtype(asked)
  with jax.numpy_dtype_promotion("standard"):
    if asked is None:
      return jnp.promote_types(dtype, jnp.float32)
    return jnp.promote_types(asked, jnp.complex64)


def holds(accumulator: jax.Array, x: jax.Array) -> bool:
  """Whether an accumulator's dtype represents every value of the dtype of `x`."""
  if jnp.iscomplexobj(accumulator) != jnp.iscomplexobj(x):
    return False
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    return bool(accumulator.dtype == x.dtype)
  with jax.numpy_dtype_promotion("standard"):
    return bool(jnp.promote_types(accumulator.dtype, x.dtype) == accumulator.dtype)


def accumulate(state: GroupState, tensors: Sequence[jax.Array], tree: Any) -> Window:
  """The window of a group with one more micro-batch.

  Args:
    state: State of the group.
    tensors: The gradient of each of its tensors.
    tree: The same, as the inner optimizer sees them.

  Returns:
    The window. Without accumulators it is this micro-batch alone.

  Raises:
    ValueError: If the state is of other tensors.
  """
  new, finite, skipped = jnp.int32(1), None, state.skipped
  if skipped is not None and tensors:
    finite = [_all_finite(x) for x in tensors]
    new = jnp.stack(finite).astype(jnp.int32)
    skipped = skipped + 1 - new
  if state.accumulators is None or state.window is None:
    return Window(list(tensors), new, skipped)
  _check_tree(state, tree)
  sums = []
  for i, (old, x) in enumerate(zip(jax.tree.leaves(state.accumulators), tensors, strict=True)):
    total = added(old, x, item(state.window, i))
    sums.append(total if finite is None else jnp.where(finite[i], total, old))
  squares = None if state.confidence is None else state.confidence.squares
  if squares is not None and tensors:
    squares = add_squares(squares, state.window, tensors, finite)
  return Window(sums, state.window + new, skipped, squares)


def added(total: jax.Array, x: jax.Array, length: jax.Array) -> jax.Array:
  """The sum with one more gradient; the first of a window replaces what is there."""
  x = x.astype(total.dtype)
  return jnp.where(length == 0, x, total + x)


def so_far(state: GroupState, tree: Any) -> Window:
  """The window of a group as it is, without another micro-batch; arguments as in `accumulate`."""
  _check_tree(state, tree)
  length = jnp.int32(0) if state.window is None else state.window
  return Window(jax.tree.leaves(state.accumulators), length, state.skipped)


def _check_tree(state: GroupState, tree: Any) -> None:
  """Raises `ValueError` if a state has accumulators for other tensors than these."""
  if state.accumulators is not None:
    where = "as in the state, which goes with the parameters and cadences it was made for"
    _paths.check_same("gradient", where, state.accumulators, tree)


def add_squares(
  squares: jax.Array,
  length: jax.Array,
  tensors: Sequence[jax.Array],
  finite: Sequence[jax.Array] | None = None,
) -> jax.Array:
  """The sum of squared norms with those of one more micro-batch: float32 [R]."""
  from optax_cadence.confidence import statistics

  more = statistics.squared_norms(tensors)
  total = jnp.where(length == 0, more, squares + more)
  return total if finite is None else jnp.where(jnp.stack(finite), total, squares)


def total(window: Window) -> list[jax.Array]:
  """The sum over the window; zero for a tensor that has nothing in its own."""
  if window.skipped is None:
    return list(window.sums)
  filled = window.length > 0
  return [jnp.where(filled[i], x, jnp.zeros_like(x)) for i, x in enumerate(window.sums)]


def mean(window: Window) -> list[jax.Array]:
  """The mean over the window; zero for a tensor that has nothing in its own."""
  n, totals = jnp.maximum(window.length, 1), total(window)
  for i, x in enumerate(totals):
    totals[i] = divide(x, item(n, i))
  return totals


def item(x: jax.Array, i: int) -> jax.Array:
  """What belongs to region i: an entry of [R], or the one number for all."""
  return x[i] if x.ndim else x


def _all_finite(x: jax.Array) -> jax.Array:
  """Whether all entries are finite: bool scalar."""
  if x.ndim == 0 or x.shape[0] % _SLABS:
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


def divide(x: jax.Array, n: jax.Array) -> jax.Array:
  """The array over integers, in its own dtype."""
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    return jax.lax.complex(divide(x.real, n), divide(x.imag, n))
  return x / n.astype(x.dtype)
