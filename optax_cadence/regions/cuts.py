"""The tensors that a grid or mask cuts a leaf into, each with a way to read and write it.

A *cut* says where one tensor lies in a leaf: `take` reads it, `put` writes it back. To add a kind
of region, write a class with the methods of `Cut` and return it from `cut`. Nothing here knows
about time, trees or optimizers.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import jax
import numpy as np

from optax_cadence.regions.grids import Grid
from optax_cadence.regions.grids import Interval
from optax_cadence.regions.grids import is_mask
from optax_cadence.regions.grids import Shape

# Up to this many slices are written one by one; above it, a scatter compiles faster.
_MAX_SLICES = 16

# A run of this many entries of a leaf is computed at nearly the speed of memory.
_RUN = 32


class Cut(Protocol):
  """One tensor cut out of a leaf."""

  @property
  def contiguous(self) -> bool:
    """Whether it is one run of the leaf's memory (in the row-major layout)."""
    ...

  @property
  def start(self) -> tuple[int, ...]:
    """Where the tensor begins; sorts the cuts of a leaf."""
    ...

  def take(self, leaf: jax.Array) -> jax.Array:
    """Reads the tensor out of the leaf."""
    ...

  def view(self, leaf: jax.Array) -> jax.Array:
    """The leaf in the shape in which `put` can write the tensor in place."""
    ...

  def put(self, view: jax.Array, tensor: jax.Array) -> jax.Array:
    """Returns the view with the tensor written in its place."""
    ...

  def size(self, shape: Shape) -> int:
    """Number of entries, in a leaf of this shape."""
    ...


class Whole:
  """The leaf itself."""

  contiguous = True
  start = ()

  def __str__(self) -> str:
    return ""

  def take(self, leaf: jax.Array) -> jax.Array:
    return leaf

  def view(self, leaf: jax.Array) -> jax.Array:
    return leaf

  def put(self, view: jax.Array, tensor: jax.Array) -> jax.Array:
    del view
    return tensor

  def size(self, shape: Shape) -> int:
    return int(np.prod(shape, dtype=np.int64))


@dataclasses.dataclass(frozen=True)
class Box:
  """A rectangle: one interval per axis."""

  intervals: tuple[Interval, ...]
  contiguous: bool = False

  @property
  def start(self) -> tuple[int, ...]:
    return tuple(start for start, _ in self.intervals)

  def __str__(self) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in self.intervals) + "]"

  def take(self, leaf: jax.Array) -> jax.Array:
    return jax.lax.slice(leaf, *zip(*self.intervals, strict=True))

  def view(self, leaf: jax.Array) -> jax.Array:
    return leaf

  def put(self, view: jax.Array, tensor: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(view, tensor, self.start)

  def size(self, shape: Shape) -> int:
    del shape
    return int(np.prod([stop - start for start, stop in self.intervals], dtype=np.int64))


@dataclasses.dataclass(frozen=True)
class Bands:
  """Several intervals of one axis, joined along it in order.

  Bands that repeat regularly are read and written through a reshape, because XLA
  moves a strided slice at nearly the speed of memory and a concatenation at a tenth.
  """

  axis: int
  intervals: tuple[Interval, ...]
  contiguous = False

  @property
  def start(self) -> tuple[int, ...]:
    return (0,) * self.axis + self.intervals[0][:1]

  def __str__(self) -> str:
    shown = [f"{start}:{stop}" for start, stop in self.intervals[:2]]
    return f"[axis {self.axis}: {', '.join(shown)}{', …' if len(self.intervals) > 2 else ''}]"

  def take(self, leaf: jax.Array) -> jax.Array:
    folded = self.folded_shape(leaf.shape)
    if folded is None:
      return leaf.at[self._at()].get(
        unique_indices=True, indices_are_sorted=True, mode="promise_in_bounds"
      )
    return self._box(folded).take(leaf.reshape(folded)).reshape(self._shape(leaf.shape))

  def view(self, leaf: jax.Array) -> jax.Array:
    folded = self.folded_shape(leaf.shape)
    return leaf if folded is None else leaf.reshape(folded)

  def put(self, view: jax.Array, tensor: jax.Array) -> jax.Array:
    if view.ndim > tensor.ndim:
      box = self._box(view.shape)
      return box.put(view, tensor.reshape([stop - start for start, stop in box.intervals]))
    if len(self.intervals) > _MAX_SLICES:
      return view.at[self._at()].set(
        tensor, unique_indices=True, indices_are_sorted=True, mode="promise_in_bounds"
      )
    done = 0
    for start, stop in self.intervals:
      band = jax.lax.slice_in_dim(tensor, done, done + stop - start, axis=self.axis)
      view = jax.lax.dynamic_update_slice_in_dim(view, band, start, axis=self.axis)
      done += stop - start
    return view

  def size(self, shape: Shape) -> int:
    return int(np.prod(self._shape(shape), dtype=np.int64))

  def _at(self) -> tuple[Any, ...]:
    indices = np.concatenate([np.arange(*i, dtype=np.int32) for i in self.intervals])
    return (slice(None),) * self.axis + (indices,)

  def _shape(self, shape: Shape) -> Shape:
    width = sum(stop - start for start, stop in self.intervals)
    return (*shape[: self.axis], width, *shape[self.axis + 1 :])

  def folded_shape(self, shape: Shape) -> Shape | None:
    """Shape of the leaf with the axis folded: rows of one distance, in each a band at its start.

    None where the bands are not of one width at one distance.
    """
    (start, stop), (second, _) = self.intervals[:2]
    stride, n = second - start, len(self.intervals)
    repeated = tuple((start + i * stride, stop + i * stride) for i in range(n))
    if repeated != self.intervals or shape[self.axis] != n * stride:
      return None
    return (*shape[: self.axis], n, stride, *shape[self.axis + 1 :])

  def _box(self, folded: Shape) -> Box:
    """Where the bands are, in the leaf with the axis folded."""
    intervals = [(0, n) for n in folded]
    intervals[self.axis + 1] = self.intervals[0]
    return Box(tuple(intervals))


class FoldedBands(Bands):
  """Regular bands as a tensor that keeps the fold: bands along an axis, entries of a band after it.

  Along an axis that joins bands XLA divides every index by their width, and does not vectorize
  what it computes there.
  """

  def take(self, leaf: jax.Array) -> jax.Array:
    view = self.view(leaf)
    return self._box(view.shape).take(view)

  def put(self, view: jax.Array, tensor: jax.Array) -> jax.Array:
    return self._box(view.shape).put(view, tensor)


def can_fold(cut: Cut, shape: Shape) -> bool:
  """Whether a leaf of this shape has this cut faster if the tensor keeps the fold."""
  if not isinstance(cut, Bands) or cut.folded_shape(shape) is None:
    return False
  after = int(np.prod(shape[cut.axis + 1 :], dtype=np.int64))
  start, stop = cut.intervals[0]
  # Joined, the vectorized run is what comes after the axis; folded, a band of it.
  return after < _RUN <= after * (stop - start)


@dataclasses.dataclass(frozen=True, eq=False)
class Entries:
  """Scattered entries, as a vector in row-major order."""

  indices: np.ndarray
  contiguous = False

  @property
  def start(self) -> tuple[int, ...]:
    return tuple(self.indices[:1].tolist())

  def __str__(self) -> str:
    return f"[{self.indices.size} entries]"

  def take(self, leaf: jax.Array) -> jax.Array:
    return (
      leaf.reshape(-1)
      .at[self.indices]
      .get(unique_indices=True, indices_are_sorted=True, mode="promise_in_bounds")
    )

  def view(self, leaf: jax.Array) -> jax.Array:
    return leaf.reshape(-1)

  def put(self, view: jax.Array, tensor: jax.Array) -> jax.Array:
    return view.at[self.indices].set(
      tensor, unique_indices=True, indices_are_sorted=True, mode="promise_in_bounds"
    )

  def size(self, shape: Shape) -> int:
    del shape
    return self.indices.size


def cut(cadence: Any, shape: Shape, key: Callable[[Any], Hashable]) -> list[tuple[Any, Cut]]:
  """Cuts a leaf of this shape into the tensors that a cadence asks for.

  Args:
    cadence: A `Grid`, an integer mask, or one cadence for the whole leaf.
    shape: Shape of the leaf.
    key: What two cells must have in common to share a group.

  Returns:
    A cadence and a cut for each tensor, in order of first appearance.

  Raises:
    ValueError: If the partition does not fit the shape.
  """
  if isinstance(cadence, Grid):
    return _cut_grid(cadence.periods, cadence.intervals(shape), shape, key)
  if is_mask(cadence):
    return _cut_mask(_broadcast(checked_mask(cadence), shape), shape, key)
  return [(cadence, Whole())]


def _cut_grid(
  cells: np.ndarray,
  intervals: dict[int, list[Interval]],
  shape: Shape,
  key: Callable[[Any], Hashable],
) -> list[tuple[Any, Cut]]:
  if cells.size == 1:
    return [(cells.flat[0], Whole())]
  if len(intervals) == 1:
    ((axis, along),) = intervals.items()
    return _cut_bands(cells, axis, along, shape, key)
  boxes: list[tuple[Any, Cut]] = []
  for index in np.ndindex(*cells.shape):
    sides = [(0, n) for n in shape]
    for i, (axis, along) in zip(index, intervals.items(), strict=True):
      sides[axis] = along[i]
    boxes.append((cells[index], Box(tuple(sides))))
  return boxes


def _cut_bands(
  cells: np.ndarray,
  axis: int,
  bounds: list[Interval],
  shape: Shape,
  key: Callable[[Any], Hashable],
) -> list[tuple[Any, Cut]]:
  """The bands of one axis, those with the same cadence joined and neighbours among them merged."""
  joined: dict[Hashable, tuple[Any, list[Interval]]] = {}
  for cell, (start, stop) in zip(cells, bounds, strict=True):
    intervals = joined.setdefault(key(cell), (cell, []))[1]
    if intervals and intervals[-1][1] == start:
      start = intervals.pop()[0]
    intervals.append((start, stop))
  return [(cell, _band(axis, intervals, shape)) for cell, intervals in joined.values()]


def _band(axis: int, intervals: list[Interval], shape: Shape) -> Cut:
  if intervals == [(0, shape[axis])]:
    return Whole()
  if len(intervals) > 1:
    return Bands(axis, tuple(intervals))
  box = tuple(intervals[0] if i == axis else (0, n) for i, n in enumerate(shape))
  return Box(box, contiguous=axis == 0)


def checked_mask(mask: Any) -> np.ndarray:
  """A mask as a NumPy array.

  Raises:
    ValueError: If it is traced, or does not hold integers.
  """
  if isinstance(mask, jax.core.Tracer):
    raise ValueError("a mask must be a concrete array, found a traced one; pass it as NumPy")
  mask = np.asarray(mask)
  if not np.issubdtype(mask.dtype, np.integer):
    raise ValueError(f"a mask must hold integer periods, found dtype {mask.dtype}")
  return mask


def _broadcast(mask: np.ndarray, shape: Shape) -> np.ndarray:
  try:
    return np.broadcast_to(mask, shape)
  except ValueError:
    raise ValueError(
      f"a mask must broadcast against the leaf of shape {shape}, found shape {mask.shape}"
    ) from None


def _cut_mask(
  mask: np.ndarray, shape: Shape, key: Callable[[Any], Hashable]
) -> list[tuple[Any, Cut]]:
  """A mask is the coarsest grid on which it is constant, or else vectors of entries.

  It counts as a grid while its cells hold two entries or more on average, so that a
  random mask does not fall into a tensor for every entry.
  """
  if mask.size == 0:
    return [(int(mask.min(initial=1)), Whole())]
  changes = [_changes(mask, axis) for axis in range(mask.ndim)]
  axes = [axis for axis, at in enumerate(changes) if at]
  n_cells = int(np.prod([len(changes[axis]) + 1 for axis in axes]))
  if len(axes) > 1 and 2 * n_cells > mask.size:
    flat = mask.reshape(-1)
    return [(int(p), Entries(np.flatnonzero(flat == p).astype(np.int32))) for p in np.unique(flat)]
  intervals = {
    axis: list(zip([0, *changes[axis]], [*changes[axis], shape[axis]], strict=True))
    for axis in axes
  }
  corners = iter(np.ix_(*([start for start, _ in along] for along in intervals.values())))
  cells = mask[tuple(next(corners) if i in axes else 0 for i in range(mask.ndim))]
  periods = np.empty(cells.shape, object)
  periods[...] = np.vectorize(int, otypes=[object])(cells)
  return _cut_grid(periods, intervals, shape, key)


def _changes(mask: np.ndarray, axis: int) -> list[int]:
  """Positions along an axis at which the mask differs from the position before."""
  rows = np.moveaxis(mask, axis, 0).reshape(mask.shape[axis], -1)
  return [int(i) for i in np.flatnonzero((rows[1:] != rows[:-1]).any(axis=1)) + 1]


def periods_of(cadence: Any) -> list[Any]:
  """Every cadence that occurs in a grid or mask, or the one cadence itself."""
  if isinstance(cadence, Grid):
    return list(cadence.periods.flat)
  if is_mask(cadence):
    return [int(p) for p in np.unique(checked_mask(cadence))]
  return [cadence]
