"""Masks of one bit per weight."""

import math

import jax
import jax.numpy as jnp

from optax_cadence import _sharding


def _axis(shape: tuple[int, ...]) -> int | None:
  """The axis along which eight bits become a byte: the first with a multiple of eight entries.

  The other axes stay as they are, and so does the sharding along them. None if there is no such
  axis: the mask is then packed flat.
  """
  return next((i for i, n in enumerate(shape) if n and n % 8 == 0), None)


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of a packed mask of ⌈n / 8⌉ bytes; flat if no axis is a multiple of eight."""
  axis = _axis(shape)
  if axis is None:
    return (-(-math.prod(shape) // 8),)
  return (*shape[:axis], shape[axis] // 8, *shape[axis + 1 :])


def pack(mask: jax.Array) -> jax.Array:
  """Packs a bool mask; uint8 of shape `packed_shape(mask.shape)`, lying as the mask does."""
  spec, axis = _sharding.spec_of(mask), _axis(mask.shape)
  if axis is None:
    spec = None
  elif spec is not None and mask.shape[axis] // 8 % _sharding.shards_of(mask)[axis]:
    spec = (*spec[:axis], None, *spec[axis + 1 :])
  return _sharding.automatically(_pack, [mask], spec)


def _pack(mask: jax.Array) -> jax.Array:
  axis = _axis(mask.shape)
  if axis is None:
    mask = jnp.pad(mask.reshape(-1), (0, -mask.size % 8))
    axis = 0
  shape = (*mask.shape[:axis], mask.shape[axis] // 8, 8, *mask.shape[axis + 1 :])
  bits = mask.reshape(shape).astype(jnp.uint8)
  shifts = jax.lax.broadcasted_iota(jnp.uint8, shape, axis + 1)
  return (bits << shifts).sum(axis + 1, dtype=jnp.uint8)


def unpack(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Undoes `pack`; `shape` is that of the mask, which lies as on automatic axes."""
  axis = _axis(shape)
  after = 1 if axis is None else axis + 1
  wide = (*packed.shape[:after], 8, *packed.shape[after:])
  shifts = jax.lax.broadcasted_iota(jnp.uint8, wide, after)
  bits = (jnp.broadcast_to(jnp.expand_dims(packed, after), wide) >> shifts) & jnp.uint8(1)
  if axis is None:
    bits = bits.reshape(-1)[: math.prod(shape)]  # without the padding
  return bits.reshape(shape).astype(jnp.bool_)
