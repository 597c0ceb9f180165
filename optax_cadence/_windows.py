"""What a group accumulates between two updates: sums, counts, and their mean.

A window does not know when it ends, nor what is done with its mean. The first
micro-step overwrites the accumulators, so that nothing needs clearing and a NaN does
not outlive its window.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _statistics

_SLABS = 8


class Window(NamedTuple):
  """The gradients of a window.

  Attributes:
    sums: One array for each of the R tensors of the group, or None where it is elsewhere;
      empty where no accumulators are kept and a window is one micro-step.
    length: Micro-steps in the sums: int32 scalar, or int32 [R].
    skipped: Micro-batches left out so far, int32 [R]; None where none ever is.
    squares: Sum of the squared norms of its gradients: float32 [R]; None where nobody asks.
  """

  sums: list[Any]
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


def add(window: Window, grads: Sequence[jax.Array]) -> Window:
  """The window with one more micro-batch, a gradient per tensor."""
  finite, one, skipped = None, jnp.int32(1), window.skipped
  if skipped is not None:
    finite = [_all_finite(grad) for grad in grads]
    one = jnp.stack(finite).astype(jnp.int32)
    skipped = skipped + 1 - one
  if not window.sums:
    return Window(list(grads), one, skipped)
  sums = []
  for i, (old, grad) in enumerate(zip(window.sums, grads, strict=True)):
    grad = grad.astype(old.dtype)
    new = jnp.where(item(window.length, i) == 0, grad, old + grad)
    sums.append(new if finite is None else jnp.where(finite[i], new, old))
  squares = _add_squares(window, grads, finite)
  return Window(sums, window.length + one, skipped, squares)


def _add_squares(
  window: Window, grads: Sequence[jax.Array], finite: list[jax.Array] | None
) -> jax.Array | None:
  if window.squares is None:
    return None
  found = _statistics.squared_norms(grads)
  new = jnp.where(window.length == 0, found, window.squares + found)
  return new if finite is None else jnp.where(jnp.stack(finite), new, window.squares)


def total(window: Window) -> list[jax.Array]:
  """The sum over the window; zero for a tensor that has nothing in its own."""
  if window.skipped is None:
    return window.sums
  filled = window.length > 0
  return [jnp.where(filled[i], x, jnp.zeros_like(x)) for i, x in enumerate(window.sums)]


def mean(window: Window) -> list[jax.Array]:
  """The mean over the window; zero for a tensor that has nothing in its own."""
  n = jnp.maximum(window.length, 1)
  return [divide(x, item(n, i)) for i, x in enumerate(total(window))]


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
