"""A period for every entry of a leaf, as an integer array; imported only where there is one."""

import itertools
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np

from optax_cadence.regions.cuts import Cut
from optax_cadence.regions.cuts import Entries
from optax_cadence.regions.cuts import Shape
from optax_cadence.regions.cuts import Whole
from optax_cadence.regions.grids import cut_cells
from optax_cadence.regions.partitions import Partition


class Mask(Partition):
  """An integer array of periods that broadcasts against the leaf.

  Raises:
    ValueError: If it is traced, or does not hold integers.
  """

  has_entries = True

  def __init__(self, periods: Any, cadences: Mapping[int, Any] | None = None) -> None:
    if isinstance(periods, jax.core.Tracer):
      raise ValueError("a mask must be a concrete array, found a traced one; pass it as NumPy")
    self.periods = np.asarray(periods)
    if not np.issubdtype(self.periods.dtype, np.integer):
      raise ValueError(f"a mask must hold integer periods, found dtype {self.periods.dtype}")

    # What stands for each period; by default the period itself.
    self.cadences = cadences or {p: p for p in np.unique(self.periods).tolist() or [1]}

  @property
  def cells(self) -> list[Any]:
    return list(self.cadences.values())

  def map(self, fn: Callable[[Any], Any]) -> "Mask":
    return Mask(self.periods, {period: fn(x) for period, x in self.cadences.items()})

  def cut(self, shape: Shape, key: Callable[[Any], Hashable]) -> list[tuple[Any, Cut]]:
    """The coarsest grid on which the mask is constant, or else vectors of entries.

    It counts as a grid while its cells hold two entries or more on average, so that a
    random mask does not fall into a tensor for every entry.
    """
    try:
      mask = np.broadcast_to(self.periods, shape)
    except ValueError:
      raise ValueError(
        f"a mask must broadcast against the leaf of shape {shape}, found shape {self.periods.shape}"
      ) from None
    if mask.size == 0:
      return [(self.cells[0], Whole())]
    changes = [_changes(mask, axis) for axis in range(mask.ndim)]
    axes = [axis for axis, at in enumerate(changes) if at]
    n_cells = math.prod(len(changes[axis]) + 1 for axis in axes)
    if len(axes) > 1 and 2 * n_cells > mask.size:
      flat = mask.reshape(-1)
      where = {p: np.flatnonzero(flat == p).astype(np.int32) for p in np.unique(flat).tolist()}
      return [(self.cadences[p], Entries(indices)) for p, indices in where.items()]
    intervals = {axis: list(itertools.pairwise([0, *changes[axis], shape[axis]])) for axis in axes}
    corners = iter(np.ix_(*([start for start, _ in along] for along in intervals.values())))
    cells = mask[tuple(next(corners) if i in axes else 0 for i in range(mask.ndim))]
    periods = np.empty(cells.shape, object)
    periods[...] = np.vectorize(self.cadences.get, otypes=[object])(cells)
    return cut_cells(periods, intervals, shape, key)


def _changes(mask: np.ndarray, axis: int) -> list[int]:
  """Positions along an axis at which the mask differs from the position before."""
  rows = np.moveaxis(mask, axis, 0).reshape(mask.shape[axis], -1)
  return (np.flatnonzero((rows[1:] != rows[:-1]).any(axis=1)) + 1).tolist()
