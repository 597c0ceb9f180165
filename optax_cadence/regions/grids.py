"""Rectangular partitions of a leaf: `Grid` and its three short forms."""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from optax_cadence import _checks
from optax_cadence.regions.cuts import Bands
from optax_cadence.regions.cuts import Box
from optax_cadence.regions.cuts import Cut
from optax_cadence.regions.cuts import Interval
from optax_cadence.regions.cuts import Shape
from optax_cadence.regions.cuts import Whole
from optax_cadence.regions.partitions import is_mask
from optax_cadence.regions.partitions import Partition


@dataclasses.dataclass(frozen=True, eq=False)
class Grid(Partition):
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

  @property
  def cells(self) -> list[Any]:
    return list(self.periods.flat)

  def map(self, fn: Callable[[Any], Any]) -> "Grid":
    cells = np.empty(self.periods.shape, object)
    cells.flat[:] = [fn(cell) for cell in self.periods.flat]
    return Grid(cells.tolist(), self.axes, self.one_each)

  def cut(self, shape: Shape, key: Callable[[Any], Hashable]) -> list[tuple[Any, Cut]]:
    return cut_cells(self.periods, self.intervals(shape), shape, key)

  def intervals(self, shape: Shape) -> dict[int, list[Interval]]:
    """Where a leaf of this shape is cut: for each axis, counted from the first, its intervals.

    Raises:
      ValueError: If an axis is not there, or has fewer entries than cells.
    """
    found: dict[int, list[Interval]] = {}
    for axis, cells in zip(self.axes, self.periods.shape, strict=True):
      if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis {axis} is not there: the leaf has {len(shape)} axes")
      axis %= len(shape)
      length = shape[axis]
      if self.one_each and cells != length:
        raise ValueError(f"stacked expects one period for each of {length} layers, found {cells}")
      if cells > length:
        raise ValueError(f"{cells} bands are finer than axis {axis}, which has {length} entries")
      if axis in found:
        raise ValueError(f"axes {tuple(self.axes)} name one axis of the leaf twice")
      widths = (length // cells + (i < length % cells) for i in range(cells))
      found[axis] = list(itertools.pairwise(itertools.accumulate(widths, initial=0)))
    return found


def _is_sequence(x: Any) -> bool:
  return isinstance(x, list | tuple) or is_mask(x)


def _integers(axes: Any) -> tuple[int, ...]:
  if not _is_sequence(axes):
    raise ValueError(f"axes must be a sequence of integers, found {_checks.shown(axes)}")
  return tuple(_checks.integer("each of axes", axis) for axis in axes)


def _cells(periods: Any, depth: int) -> np.ndarray:
  """Nested sequences as an object array with `depth` axes, one cadence in each cell."""
  if is_mask(periods) and not isinstance(periods, jax.core.Tracer):
    periods = np.asarray(periods)
  shape: list[int] = []
  rows = [periods]
  for _ in range(depth):
    if not _is_sequence(rows[0]) or len(rows[0]) == 0:
      raise ValueError(
        f"periods must be non-empty sequences nested {depth} deep, one level per axis,"
        f" found {_checks.shown(periods)}"
      )
    n = len(rows[0])
    for row in rows:
      if not _is_sequence(row) or len(row) != n:
        raise ValueError(
          f"periods must not be ragged: expected {n} cells, found {_checks.shown(row)}"
        )
    shape.append(n)
    rows = [row[i] for row in rows for i in range(n)]
  cells = np.empty(len(rows), object)
  for i, cell in enumerate(rows):
    if _is_sequence(cell):
      raise ValueError(
        f"periods are nested deeper than there are axes: found {_checks.shown(cell)}"
      )
    cells[i] = cell
  return cells.reshape(shape)


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


def cut_cells(
  cells: np.ndarray,
  intervals: dict[int, list[Interval]],
  shape: Shape,
  key: Callable[[Any], Hashable],
) -> list[tuple[Any, Cut]]:
  """Cuts a leaf of this shape along some axes: an array of cadences, and intervals of each axis."""
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
