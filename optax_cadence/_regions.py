"""The geometry of one leaf: into which tensors does a cadence cut it?

A `Grid` (or an integer mask) divides an array; a *cut* is one tensor of that
division, with `take` to read it out of the whole array and `put` to write it back.
Nothing here knows about time, trees or optimizers.
"""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np

Shape: TypeAlias = tuple[int, ...]
Interval: TypeAlias = tuple[int, int]

# Up to this many slices are written one by one; above it, a scatter compiles faster.
_MAX_SLICES = 16

# A run of this many entries of a leaf is computed at nearly the speed of memory.
_RUN = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
  """A rectangular partition of a leaf, with a cadence for every cell.

  Each of `axes` is cut into as many bands of equal width as `periods` has cells
  along it (the first bands are one wider where it does not divide, as in
  `numpy.array_split`). Bands of a single axis that share a cadence are one tensor,
  joined in order; over several axes each rectangle is a tensor.

  Attributes:
    periods: Nested sequences or an array of cadences, as deep as there are axes.
      A cell is an integer, an `Every`, a schedule or a traced integer.
    axes: The axes that are cut; negative ones count from the last.
    one_each: Whether every axis must have exactly as many entries as cells.

  Raises:
    ValueError: If `periods` is empty, ragged, or not as deep as there are axes.

  >>> import optax_cadence as oc
  >>> oc.Grid([[1, 2, 4]], axes=(0, 1)).periods.shape
  (1, 3)
  """

  periods: Any
  axes: Sequence[int]
  one_each: bool = False

  def __post_init__(self) -> None:
    axes = _integers(self.axes)
    if not axes or len(set(axes)) != len(axes):
      raise ValueError(f"axes must be distinct and at least one, found {axes}")
    object.__setattr__(self, "axes", axes)
    object.__setattr__(self, "periods", _cells(self.periods, len(axes)))


def _integers(axes: Any) -> tuple[int, ...]:
  found = tuple(axes) if isinstance(axes, list | tuple | np.ndarray) else None
  if found is None or not all(isinstance(a, int | np.integer) and a is not True for a in found):
    raise ValueError(f"axes must be a sequence of integers, found {axes!r}")
  return tuple(int(a) for a in found)


def channels(periods: Sequence[Any], axis: int = -1) -> Grid:
  """Cuts one axis into bands of equal width, each with its period.

  Args:
    periods: One cadence per band. As many as the axis has entries gives every
      channel its own.
    axis: The axis to cut; the last one by default, where Flax keeps output channels.

  Returns:
    A `Grid` over that axis.

  >>> import jax.numpy as jnp, optax, optax_cadence as oc
  >>> tx = oc.cadence(optax.sgd(1.0), oc.channels([1, 2]))
  >>> state = tx.init(jnp.zeros((3, 4)))
  >>> updates, state = tx.update(jnp.ones((3, 4)), state)
  >>> print(updates[0])
  [-1. -1.  0.  0.]
  """
  return Grid(periods, (axis,))


def quadrants(periods: Sequence[Sequence[Any]], axes: Sequence[int] = (-2, -1)) -> Grid:
  """Cuts a matrix into four rectangles, each with its period.

  Args:
    periods: Two rows of two cadences.
    axes: The two axes that are halved.

  Returns:
    A `Grid` over those axes.

  Raises:
    ValueError: If `periods` is not two by two.
  """
  grid = Grid(periods, axes)
  if grid.periods.shape != (2, 2):
    raise ValueError(
      f"quadrants expects two rows of two periods, found shape {grid.periods.shape};"
      " use Grid for any other partition"
    )
  return grid


def stacked(periods: Sequence[Any]) -> Grid:
  """Gives each of the layers stacked on axis 0 its period.

  Args:
    periods: One cadence per layer, as many as axis 0 is long (as `nn.scan` and
      `nnx.vmap` stack layers).

  Returns:
    A `Grid` over axis 0.
  """
  return Grid(periods, (0,), one_each=True)


class Cut(Protocol):
  """One tensor cut out of a leaf."""

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

  @property
  def start(self) -> tuple[int, ...]:
    """Where the tensor begins; sorts the cuts of a leaf."""
    ...

  @property
  def contiguous(self) -> bool:
    """Whether it is one run of the leaf's memory (in the row-major layout)."""
    ...


class Whole:
  """The leaf itself."""

  start = ()
  contiguous = True

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
    starts = [start for start, _ in self.intervals]
    return jax.lax.dynamic_update_slice(view, tensor, starts)

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
    split = self.split_shape(leaf.shape)
    if split is None:
      return leaf.at[self._at()].get(
        unique_indices=True, indices_are_sorted=True, mode="promise_in_bounds"
      )
    return self._box(split).take(leaf.reshape(split)).reshape(self._shape(leaf.shape))

  def view(self, leaf: jax.Array) -> jax.Array:
    split = self.split_shape(leaf.shape)
    return leaf if split is None else leaf.reshape(split)

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

  def split_shape(self, shape: Shape) -> Shape | None:
    """The axis as bands of one width at one distance; None where they are not."""
    (start, stop), (second, _) = self.intervals[:2]
    stride, n = second - start, len(self.intervals)
    repeated = tuple((start + i * stride, stop + i * stride) for i in range(n))
    if repeated != self.intervals or shape[self.axis] != n * stride:
      return None
    return (*shape[: self.axis], n, stride, *shape[self.axis + 1 :])

  def _box(self, split: Shape) -> Box:
    """Where the bands are, in the leaf with the axis split."""
    intervals = [(0, d) for d in split]
    intervals[self.axis + 1] = self.intervals[0]
    return Box(tuple(intervals))


class SplitBands(Bands):
  """The same as a tensor in which the axis is split: bands along it, entries of a band after it.

  Only where they repeat regularly. Along an axis that joins bands XLA divides every index by
  their width, and does not vectorize what it computes there.
  """

  def take(self, leaf: jax.Array) -> jax.Array:
    view = self.view(leaf)
    return self._box(view.shape).take(view)

  def put(self, view: jax.Array, tensor: jax.Array) -> jax.Array:
    return self._box(view.shape).put(view, tensor)


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


class SharedEntries(Entries):
  """The same in a leaf that is kept whole for all its groups: here a tensor without entries."""

  contiguous = True

  def take(self, leaf: jax.Array) -> jax.Array:
    return leaf.reshape(-1)[:0]

  def view(self, leaf: jax.Array) -> jax.Array:
    return leaf

  def put(self, view: jax.Array, tensor: jax.Array) -> jax.Array:
    del tensor
    return view


def shared(cut: Cut, shape: Shape) -> Cut:
  """The cut in a leaf of this shape that is kept whole for all its groups, if it is a mask."""
  del shape
  return SharedEntries(cut.indices) if isinstance(cut, Entries) else cut


def split(cut: Cut, shape: Shape) -> Cut:
  """The cut with its axis split, if in a leaf of this shape that is faster to compute."""
  if not isinstance(cut, Bands) or cut.split_shape(shape) is None:
    return cut
  after = int(np.prod(shape[cut.axis + 1 :], dtype=np.int64))
  start, stop = cut.intervals[0]
  # Joined, the vectorized run is what comes after the axis; split, a band of it.
  return SplitBands(cut.axis, cut.intervals) if after < _RUN <= after * (stop - start) else cut


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
    return _cut_grid(cadence.periods, *_bounds(cadence, shape), shape, key)
  if is_mask(cadence):
    return _cut_mask(_broadcast(_checked_mask(cadence), shape), shape, key)
  return [(cadence, Whole())]


def is_mask(cadence: Any) -> bool:
  """Whether this is an array of periods, one for each entry."""
  return isinstance(cadence, np.ndarray | jax.Array) and cadence.ndim > 0


def periods_of(cadence: Any) -> list[Any]:
  """Every cadence that occurs in a grid or mask, or the one cadence itself."""
  if isinstance(cadence, Grid):
    return list(cadence.periods.flat)
  if is_mask(cadence):
    return [int(p) for p in np.unique(_checked_mask(cadence))]
  return [cadence]


def _cells(periods: Any, depth: int) -> np.ndarray:
  shape: list[int] = []
  row = periods
  for _ in range(depth):
    if not (isinstance(row, list | tuple) or is_mask(row)) or len(row) == 0:
      raise ValueError(
        f"periods must be non-empty sequences nested {depth} deep, one level per axis,"
        f" found {periods!r}"
      )
    shape.append(len(row))
    row = row[0]
  cells = np.empty(shape, object)
  for index in np.ndindex(*shape):
    cells[index] = _cell(periods, index, shape)
  return cells


def _cell(periods: Any, index: tuple[int, ...], shape: list[int]) -> Any:
  for i, n in zip(index, shape, strict=True):
    if not (isinstance(periods, list | tuple) or is_mask(periods)) or len(periods) != n:
      raise ValueError(f"periods must not be ragged: expected {n} cells, found {periods!r}")
    periods = periods[i]
  if isinstance(periods, list | tuple) or is_mask(periods):
    raise ValueError(f"periods are nested deeper than there are axes: found {periods!r}")
  return periods


def _bounds(grid: Grid, shape: Shape) -> tuple[list[int], list[list[Interval]]]:
  """The grid's axes, counted from the first, and the intervals along each."""
  axes, bounds = [], []
  for axis, n in zip(grid.axes, grid.periods.shape, strict=True):
    if not -len(shape) <= axis < len(shape):
      raise ValueError(f"axis {axis} is not there: the leaf has {len(shape)} axes")
    axis %= len(shape)
    length = shape[axis]
    if grid.one_each and n != length:
      raise ValueError(f"stacked expects one period for each of {length} layers, found {n}")
    if n > length:
      raise ValueError(f"{n} bands are finer than axis {axis}, which has {length} entries")
    ends = list(itertools.accumulate(length // n + (i < length % n) for i in range(n)))
    axes.append(axis)
    bounds.append(list(zip([0, *ends], ends, strict=False)))
  if len(set(axes)) != len(axes):
    raise ValueError(f"axes {tuple(grid.axes)} name one axis of the leaf twice")
  return axes, bounds


def _cut_grid(
  cells: np.ndarray,
  axes: list[int],
  bounds: list[list[Interval]],
  shape: Shape,
  key: Callable[[Any], Hashable],
) -> list[tuple[Any, Cut]]:
  if cells.size == 1:
    return [(cells.flat[0], Whole())]
  if len(axes) == 1:
    return _cut_bands(cells, axes[0], bounds[0], shape, key)
  boxes: list[tuple[Any, Cut]] = []
  for index in np.ndindex(*cells.shape):
    intervals = [(0, n) for n in shape]
    for axis, i, along in zip(axes, index, bounds, strict=True):
      intervals[axis] = along[i]
    boxes.append((cells[index], Box(tuple(intervals))))
  return boxes


def _cut_bands(
  cells: np.ndarray,
  axis: int,
  bounds: list[Interval],
  shape: Shape,
  key: Callable[[Any], Hashable],
) -> list[tuple[Any, Cut]]:
  shared: dict[Hashable, tuple[Any, list[Interval]]] = {}
  for cell, (start, stop) in zip(cells, bounds, strict=True):
    intervals = shared.setdefault(key(cell), (cell, []))[1]
    if intervals and intervals[-1][1] == start:
      start = intervals.pop()[0]
    intervals.append((start, stop))
  return [(cell, _band(axis, intervals, shape)) for cell, intervals in shared.values()]


def _band(axis: int, intervals: list[Interval], shape: Shape) -> Cut:
  if intervals == [(0, shape[axis])]:
    return Whole()
  if len(intervals) > 1:
    return Bands(axis, tuple(intervals))
  box = tuple(intervals[0] if i == axis else (0, n) for i, n in enumerate(shape))
  return Box(box, contiguous=axis == 0)


def _checked_mask(mask: Any) -> np.ndarray:
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
  bounds = [list(zip([0, *changes[a]], [*changes[a], shape[a]], strict=True)) for a in axes]
  corners = np.ix_(*([b[0] for b in along] for along in bounds))
  at = iter(corners)
  cells = mask[tuple(next(at) if i in axes else 0 for i in range(mask.ndim))]
  periods = np.empty(cells.shape, object)
  periods[...] = np.vectorize(int, otypes=[object])(cells)
  return _cut_grid(periods, axes, bounds, shape, key)


def _changes(mask: np.ndarray, axis: int) -> list[int]:
  """Positions along an axis at which the mask differs from the position before."""
  rows = np.moveaxis(mask, axis, 0).reshape(mask.shape[axis], -1)
  return [int(i) for i in np.flatnonzero((rows[1:] != rows[:-1]).any(axis=1)) + 1]
