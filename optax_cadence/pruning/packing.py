"""Masks of one bit per weight: packing, unpacking, counting."""

import math

import jax
import jax.numpy as jnp


def _axis(shape: tuple[int, ...]) -> int | None:
  """The first axis of a multiple of eight entries; packing along it keeps the others whole."""
  return next((i for i, n in enumerate(shape) if n and n % 8 == 0), None)


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of a packed mask, ⌈n / 8⌉ bytes; flat where no axis is a multiple of eight."""
  axis = _axis(shape)
  if axis is None:
    return (-(-math.prod(shape) // 8),)
  return (*shape[:axis], shape[axis] // 8, *shape[axis + 1 :])


def pack(mask: jax.Array) -> jax.Array:
  """A bool mask as uint8 of shape `packed_shape(mask.shape)`."""
  axis = _axis(mask.shape)
  if axis is None:
    mask = jnp.pad(mask.reshape(-1), (0, -mask.size % 8))
    axis = 0
  shape = (*mask.shape[:axis], mask.shape[axis] // 8, 8, *mask.shape[axis + 1 :])
  bits = mask.reshape(shape).astype(jnp.uint8)
  shifts = jax.lax.broadcasted_iota(jnp.uint8, shape, axis + 1)
  return (bits << shifts).sum(axis + 1, dtype=jnp.uint8)


def unpack(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The bool mask of this shape."""
  axis = _axis(shape)
  flat = axis is None
  axis = axis or 0
  wide = (*packed.shape[: axis + 1], 8, *packed.shape[axis + 1 :])
  shifts = jax.lax.broadcasted_iota(jnp.uint8, wide, axis + 1)
  bits = (jnp.broadcast_to(jnp.expand_dims(packed, axis + 1), wide) >> shifts) & jnp.uint8(1)
  if flat:
    return bits.reshape(-1)[: math.prod(shape)].reshape(shape).astype(jnp.bool_)
  return bits.reshape(shape).astype(jnp.bool_)
