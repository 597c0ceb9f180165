"""The tensors that a partition cuts a leaf into, each with a way to read and write it.

A *cut* says where one tensor lies in a leaf: `take` reads it, `put` writes it back. Which cuts a
leaf falls into is said by a `Partition`. Nothing here knows about time, trees or optimizers.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np

from optax_cadence import _sharding

Shape: TypeAlias = tuple[int, ...]
Interval: TypeAlias = tuple[int, int]

# Up to this many slices are written one by one; above it, a scatter compiles faster.
_MAX_SLICES = 16

# A run of this many entries of a leaf is computed at nearly the speed of memory.
_RUN = 32

# What indices of cuts are to a gather or scatter: ascending, none twice, all in the leaf.
_SORTED: Any = {
  "unique_indices": True,
  "indices_are_sorted": True,
  "mode": "promise_in_bounds",
}


class Cut(Protocol):
  """One tensor cut out of a leaf; `str` of it is what pictures write behind the leaf's name."""

  @property
  def contiguous(self) -> bool:
    """Whether it is one run of the leaf's memory (in the row-major layout)."""
    ...

  @property
  def start(self) -> tuple[int, ...]:
    """Where the tensor begins in the leaf; `plot_score` draws the cuts of a leaf in this order."""
    ...

  def across(self, shards: Sequence[int]) -> set[int]:
    """The axes across whose shards the tensor is cut, of a leaf of so many along each axis.

    On a mesh with explicit axes the leaf must lie whole along these to be read or written.
    """
    ...

  def take(self, leaf: jax.Array) -> jax.Array:
    """Reads the tensor out of the leaf."""
    ...

  def view(self, leaf: jax.Array) -> jax.Array:
    """The leaf in the shape in which `put` can write the tensor in place; mostly as it is.

    It has to be the same shape for all cuts of a leaf that are in one group.
    """
    ...

  def put(self, view: jax.Array, tensor: jax.Array) -> jax.Array:
    """Returns the view with the tensor written in its place."""
    ...

  def size(self, shape: Shape) -> int:
    """Number of entries, in a leaf of this shape."""
    ...


def gathered(leaf: jax.Array, cuts: Iterable[Cut]) -> jax.Array:
  """The leaf, lying whole along every axis across whose shards one of these cuts goes."""
  if not _says_how_it_lies(leaf):
    return leaf
  shards = _sharding.shards_of(leaf)
  return _sharding.gathered(leaf, set().union(*(cut.across(shards) for cut in cuts)))


def lying_as(x: jax.Array, like: jax.Array) -> jax.Array:
  """The array, lying as another of its shape or number of axes."""
  lies = _says_how_it_lies(x) or _says_how_it_lies(like)
  return _sharding.lying_as(x, like) if lies else x


def read(leaf: jax.Array, cut: Cut) -> jax.Array:
  """The tensor of a cut, out of a leaf however that lies."""
  return cut.take(gathered(leaf, [cut]))


def written(leaf: jax.Array, cut: Cut, tensor: jax.Array) -> jax.Array:
  """The leaf with the tensor of a cut written in its place, lying as before."""
  view = cut.view(gathered(leaf, [cut]))
  return lying_as(cut.put(view, tensor).reshape(leaf.shape), leaf)


def _says_how_it_lies(x: jax.Array) -> bool:
  """Whether the type of an array does so, as on a mesh with explicit axes."""
  return any(getattr(getattr(jax.typeof(x), "sharding", None), "spec", ()))


class Whole:
  """The leaf itself."""

  contiguous = True
  start = ()

  def __str__(self) -> str:
    return ""

  def across(self, shards: Sequence[int]) -> set[int]:
    del shards
    return set()

  def take(self, leaf: jax.Array) -> jax.Array:
    return leaf

  def view(self, leaf: jax.Array) -> jax.Array:
    return leaf

  def put(self, view: jax.Array, tensor: jax.Array) -> jax.Array:
    del view
    return tensor

  def size(self, shape: Shape) -> int:
    return math.prod(shape)


@dataclasses.dataclass(frozen=True)
class Box:
  """A rectangle: one interval per axis."""

  intervals: tuple[Interval, ...]
  contiguous: bool = False

  @property
  def start(self) -> tuple[int, ...]:
    return next(zip(*self.intervals, strict=True))

  def __str__(self) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in self.intervals) + "]"

  def across(self, shards: Sequence[int]) -> set[int]:
    sides = zip(shards, self.intervals, strict=True)
    return {i for i, (n, (start, stop)) in enumerate(sides) if (stop - start) % n}

  def take(self, leaf: jax.Array) -> jax.Array:
    return jax.lax.slice(leaf, *zip(*self.intervals, strict=True))

  def view(self, leaf: jax.Array) -> jax.Array:
    return leaf

  def put(self, view: jax.Array, tensor: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(view, lying_as(tensor, view), self.start)

  def size(self, shape: Shape) -> int:
    del shape
    return math.prod(stop - start for start, stop in self.intervals)


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

  def across(self, shards: Sequence[int]) -> set[int]:
    return {self.axis} if shards[self.axis] > 1 else set()

  def take(self, leaf: jax.Array) -> jax.Array:
    folded = self.folded_shape(leaf.shape)
    if folded is None:
      return leaf.at[self._at()].get(**_SORTED)
    return self._box(folded).take(leaf.reshape(folded)).reshape(self._shape(leaf.shape))

  def view(self, leaf: jax.Array) -> jax.Array:
    folded = self.folded_shape(leaf.shape)
    return leaf if folded is None else leaf.reshape(folded)

  def put(self, view: jax.Array, tensor: jax.Array) -> jax.Array:
    if view.ndim > tensor.ndim:
      box = self._box(view.shape)
      return box.put(view, tensor.reshape([stop - start for start, stop in box.intervals]))
    tensor = lying_as(tensor, view)
    if len(self.intervals) > _MAX_SLICES:
      return view.at[self._at()].set(tensor, **_SORTED)
    done = 0
    for start, stop in self.intervals:
      band = jax.lax.slice_in_dim(tensor, done, done + stop - start, axis=self.axis)
      view = jax.lax.dynamic_update_slice_in_dim(view, band, start, axis=self.axis)
      done += stop - start
    return view

  def size(self, shape: Shape) -> int:
    return math.prod(self._shape(shape))

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
  after = math.prod(shape[cut.axis + 1 :])
  start, stop = cut.intervals[0]
  # Joined, the vectorized run is what comes after the axis; folded, a band of it.
  return after < _RUN <= after * (stop - start)


@dataclasses.dataclass(frozen=True, eq=False)
class Entries:
  """Scattered entries, as a vector in row-major order.

  Attributes:
    indices: Their positions in the flattened leaf, ascending: int32.
  """

  indices: np.ndarray
  contiguous = False

  @property
  def start(self) -> tuple[int, ...]:
    return tuple(self.indices[:1].tolist())

  def __str__(self) -> str:
    return f"[{self.indices.size} entries]"

  def across(self, shards: Sequence[int]) -> set[int]:
    return {i for i, n in enumerate(shards) if n > 1}

  def take(self, leaf: jax.Array) -> jax.Array:
    return leaf.reshape(-1).at[self.indices].get(**_SORTED)

  def view(self, leaf: jax.Array) -> jax.Array:
    return leaf.reshape(-1)

  def put(self, view: jax.Array, tensor: jax.Array) -> jax.Array:
    return view.at[self.indices].set(tensor, **_SORTED)

  def size(self, shape: Shape) -> int:
    del shape
    return self.indices.size
