"""A value in parts: its old entries and the new ones that it has grown by."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence.growth._plan import LeafChange

# A kernel with new taps is held as two arrays that are added: the old taps, and an array at
# the new size with zeros in their place. This stands for the axis that tells which.
TAPS = -1


class Split(NamedTuple):
  """A value in parts.

  Attributes:
    axes: The axes that have grown, ascending.
    blocks: For each combination of old (0) and new (1) along them the array.
    offset: Of a kernel, for each spatial axis: where its old taps begin among the new. Of what it
      reads, for each axis: how much more it is padded at its start.
  """

  axes: tuple[int, ...]
  blocks: dict[tuple[int, ...], Any]
  offset: tuple[int, ...] = ()


def whole(x: Any) -> Split:
  """A value that has not grown."""
  return Split((), {(): x})


def split(leaf: Any, change: LeafChange) -> Split:
  """A leaf in parts: old and new entries along every axis that has grown."""
  taps = change.taps
  axes = tuple(sorted(a for a in change.positions if a not in taps))
  leaf = jnp.asarray(leaf)
  blocks: dict[tuple[int, ...], Any] = {(): leaf}
  for axis in axes:
    at = change.positions[axis]
    blocks = {
      (*bits, bit): _take(x, where, axis)
      for bits, x in blocks.items()
      for bit, where in ((0, at), (1, change.new(axis)))
    }
  if not taps:
    return Split(axes, blocks)
  offset = tuple(int(change.positions[a][0]) if a in taps else 0 for a in change.spatial)
  parted = {}
  for bits, x in blocks.items():
    middle = tuple(
      _middle(change.positions[a]) if a in taps else slice(None) for a in range(x.ndim)
    )
    parted[(0, *bits)] = x[middle]
    parted[(1, *bits)] = x.at[middle].set(0)
  return Split((TAPS, *axes), parted, offset)


def _middle(at: np.ndarray) -> slice:
  return slice(int(at[0]), int(at[-1]) + 1)


def _take(x: Any, at: np.ndarray, axis: int) -> Any:
  if (np.diff(at) == 1).all():
    return jax.lax.slice_in_dim(x, int(at[0]), int(at[-1]) + 1, axis=axis)
  return jnp.take(x, at, axis=axis, unique_indices=True, indices_are_sorted=True, mode="clip")


def joined(x: Split, positions: dict[int, np.ndarray]) -> Any:
  """A value of parts at its new size."""
  blocks = x.blocks
  for k in reversed(range(len(x.axes))):
    axis = x.axes[k]
    blocks = {
      bits[:k]: _interleaved(
        blocks[(*bits[:k], 0)], blocks[(*bits[:k], 1)], axis, positions.get(axis)
      )
      for bits in blocks
      if not bits[k]
    }
  return blocks[()]


def _interleaved(old: Any, new: Any, axis: int, at: np.ndarray | None) -> Any:
  both = jnp.concatenate([old, new], axis)
  n = old.shape[axis]
  if at is None:
    raise ValueError(
      f"an output of shape {both.shape} has new entries along axis {axis} that no unit accounts for"
    )
  if (at == np.arange(n)).all():
    return both
  rest = np.setdiff1d(np.arange(both.shape[axis]), at)
  return jnp.take(both, np.argsort(np.concatenate([at, rest])), axis=axis)


def moved(x: Split, by: int) -> Split:
  if by < 0 and 0 in x.axes:
    raise ValueError("the axis that a loop runs over cannot grow: expected its length to stay")
  return Split(tuple(a + by for a in x.axes), x.blocks, x.offset)


def outline(values: list[Split]) -> list[Split]:
  """The values without their arrays, as `unpacked` needs them."""
  return [Split(x.axes, dict.fromkeys(sorted(x.blocks)), x.offset) for x in values]


def packed(values: list[Split]) -> list[list[Any]]:
  return [[x.blocks[bits] for bits in sorted(x.blocks)] for x in values]


def unpacked(like: list[Split], packs: Any) -> list[Split]:
  return [
    Split(x.axes, dict(zip(sorted(x.blocks), blocks, strict=True)), x.offset)
    for x, blocks in zip(like, packs, strict=True)
  ]
