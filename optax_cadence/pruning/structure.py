"""What is pruned together: single weights, blocks, channels, N of every M weights.

A unit is what is kept or pruned whole: a weight, a block, a channel. `prune` scores the units and
keeps the best of them, as many as the allocation leaves. To add a structure, write a subclass of
`Structure`, here or in your own code; nothing else has to know it.

>>> import jax.numpy as jnp, optax_cadence as oc
>>> from optax_cadence import pruning
>>> class Rows(pruning.structure.Structure):
...   def check(self, shape):
...     if len(shape) != 2:
...       raise ValueError(f"expected a matrix, found shape {shape}")
...
...   def unit_scores(self, scores):
...     return scores.max(axis=1, keepdims=True)  # one unit per row
>>> tx = oc.prune(0.5, every=1, structure=Rows())
>>> params = {"kernel": jnp.array([[1.0, 2.0], [0.1, 3.0]])}
>>> _, state = tx.update(params, tx.init(params), params)
>>> print(pruning.masks(params, state)["kernel"])
[[False False]
 [ True  True]]

Where a mask is more than the best units, a function of the scores and the sparsity makes it:

>>> tx = oc.prune(0.5, every=1, structure=lambda scores, sparsity: scores > 2 * sparsity)
>>> _, state = tx.update(params, tx.init(params), params)
>>> print(pruning.masks(params, state)["kernel"])
[[False  True]
 [False  True]]
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _checks
from optax_cadence import _paths
from optax_cadence.pruning import allocation
from optax_cadence.pruning import prefixes
from optax_cadence.pruning import selection
from optax_cadence.schedules.by_path import ByPath


class Structure:
  """Base class: what `prune` asks of a structure.

  Attributes:
    single_weights: Whether every unit is one weight.
    makes_mask: Whether the structure makes the mask itself, in `mask`. Otherwise `prune` keeps
      the units with the highest scores, by `unit_scores` and `weight_mask`.
    gradual: Whether a schedule may lead up to the sparsity that the structure implies.
  """

  single_weights: ClassVar[bool] = False
  makes_mask: ClassVar[bool] = False
  gradual: ClassVar[bool] = False

  @property
  def fixed_sparsity(self) -> float | None:
    """The sparsity that the structure implies; None if the user chooses it."""
    return None

  def by_leaf(self, params: Any, paths: Iterable[_paths.Path]) -> dict[_paths.Path, "Structure"]:
    """The structure of each leaf, where it is not the same for all.

    Args:
      params: All parameters.
      paths: The leaves that are pruned.
    """
    del params
    return dict.fromkeys(paths, self)

  def of_layer(self, ndim: int) -> "Structure":
    """The structure of each of the layers that a leaf of `ndim` axes holds, stacked on axis 0."""
    del ndim
    return self

  def check(self, shape: tuple[int, ...]) -> None:
    """Raises `ValueError` if a leaf of this shape cannot be pruned like this."""

  def unit_scores(self, scores: jax.Array) -> jax.Array:
    """Scores of the units of a leaf, from the scores of its weights.

    Also called with 1 for every weight that is kept and 0 for the others: a unit with a result
    above 0 counts as kept.
    """
    return scores

  def weight_mask(self, unit_mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The mask of a leaf of this shape, from the mask of its units."""
    return jnp.broadcast_to(unit_mask, shape)

  def mask(self, scores: jax.Array, sparsity: Any, allowed: jax.Array) -> jax.Array:
    """The mask of a leaf, if `makes_mask`. Weights that are not allowed are pruned in any case."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Unstructured(Structure):
  """Every weight by itself."""

  single_weights: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Block(Structure):
  """Rectangles of `shape` in the last axes, scored by their mean.

  >>> from optax_cadence import pruning
  >>> pruning.Block((4, 4))
  Block(shape=(4, 4))
  """

  shape: tuple[int, ...]

  def __post_init__(self) -> None:
    if not isinstance(self.shape, tuple) or not self.shape:
      raise ValueError(
        f"Block: shape must be a tuple of integers, found {_checks.shown(self.shape)}"
      )
    for size in self.shape:
      _checks.integer("Block: a size in shape", size, 1)

  def check(self, shape: tuple[int, ...]) -> None:
    n = len(self.shape)
    if len(shape) < n or any(d % b for d, b in zip(shape[-n:], self.shape, strict=True)):
      raise ValueError(f"expected blocks of {self.shape} that divide its last axes, found {shape}")

  def unit_scores(self, scores: jax.Array) -> jax.Array:
    first = scores.ndim - len(self.shape)  # the first axis that is cut into blocks
    cut = [(d // b, b) for d, b in zip(scores.shape[first:], self.shape, strict=True)]
    blocks = scores.reshape(*scores.shape[:first], *(n for pair in cut for n in pair))
    within_block = tuple(first + 2 * i + 1 for i in range(len(cut)))
    return wide(blocks).mean(within_block)

  def weight_mask(self, unit_mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    first = unit_mask.ndim - len(self.shape)
    for axis, b in enumerate(self.shape, start=first):
      unit_mask = jnp.repeat(unit_mask, b, axis=axis)
    return unit_mask.reshape(shape)


# One axis, several, or a tree of them.
Axis = Any


class _AlongAxes(Structure):
  """Base class of what has an `axis` that may differ from leaf to leaf."""

  axis: Axis

  def __post_init__(self) -> None:
    by_path = isinstance(self.axis, ByPath)
    for value in [axis for _, axis in self.axis.cadences] if by_path else [self.axis]:
      for leaf in jax.tree.leaves(value, is_leaf=_is_axes):
        if not _is_axes(leaf):
          raise ValueError(
            f"{type(self).__name__}: axis must be an integer, a tuple of integers or a tree prefix"
            f" of the parameters with these, found {_checks.shown(leaf)}"
          )

  def by_leaf(self, params: Any, paths: Iterable[_paths.Path]) -> dict[_paths.Path, Structure]:
    axes = prefixes.by_leaf("axis", self.axis, params, paths, is_leaf=_is_axes)
    return {path: self._along(axis) for path, axis in axes.items()}

  def of_layer(self, ndim: int) -> Structure:
    # Counted from the last, an axis of the leaf is the same one of the layer.
    axes = tuple(a if a < 0 else a - ndim for a in _listed(self.axis))
    if -ndim in axes:
      raise ValueError("expected axes within a layer, found axis 0, on which layers are stacked")
    return self._along(axes)

  def check(self, shape: tuple[int, ...]) -> None:
    axes = _listed(self.axis)
    known = all(-len(shape) <= a < len(shape) for a in axes)
    if not axes or not known or len({a % len(shape) for a in axes}) < len(axes):
      found = "none" if not axes else f"axis {', '.join(map(str, axes))}"
      raise ValueError(f"expected different axes of shape {shape}, found {found}")

  def _along(self: Any, axis: Axis) -> Structure:
    return dataclasses.replace(self, axis=axis)


@dataclasses.dataclass(frozen=True)
class Channel(_AlongAxes):
  """Whole channels: slices of one axis, scored by their mean.

  Attributes:
    axis: The axis, or a tree prefix of the parameters (or an `oc.by_path`) with an axis for each
      leaf. Of several axes, a tuple, each combination is a channel.

  >>> from optax_cadence import pruning
  >>> pruning.Channel(axis=-1)
  Channel(axis=-1)
  """

  axis: Axis = -1

  def unit_scores(self, scores: jax.Array) -> jax.Array:
    along = {axis % scores.ndim for axis in _listed(self.axis)}
    others = tuple(i for i in range(scores.ndim) if i not in along)
    return wide(scores).mean(others, keepdims=True)


@dataclasses.dataclass(frozen=True)
class NM(_AlongAxes):
  """At most `n` of every `m` consecutive weights along an axis; a last group may be shorter.

  Under a schedule for the sparsity, which has to end at the one that n of m imply, more are kept
  at first: with `NM(2, 4)` and a sparsity of 0.25 it is three of four.

  Attributes:
    n: How many weights of a group are kept.
    m: How many weights a group has.
    axis: The axis along which the groups lie. Hardware wants them along what the product sums
      over, which is axis -2 of the kernel of a dense layer or convolution, and which
      `pruning.contraction_axes` reads from the program. Also several axes, a tuple, which are
      taken as one (heads and their entries, before the output projection), or a tree prefix of
      the parameters (or an `oc.by_path`) of these.

  Raises:
    ValueError: If these are no integers, or `n` is larger than `m`.

  >>> from optax_cadence import pruning
  >>> pruning.NM(2, 4)
  NM(n=2, m=4, axis=-2)
  """

  n: int
  m: int
  axis: Axis = -2
  makes_mask: ClassVar[bool] = True
  gradual: ClassVar[bool] = True

  def __post_init__(self) -> None:
    super().__post_init__()
    _checks.integer("NM: n", self.n, 0)
    _checks.integer("NM: m", self.m, 1)
    if self.n > self.m:
      raise ValueError(f"NM: n must be at most m, found {self.n} of {self.m}")

  @property
  def fixed_sparsity(self) -> float:
    return 1 - self.n / self.m

  def mask(self, scores: jax.Array, sparsity: Any, allowed: jax.Array) -> jax.Array:
    # Of equal scores the lower index goes first.
    kept = self.m - allocation.pruned(sparsity, self.m)
    keys = selection.order(scores)
    lowest = selection.excluded(keys.dtype)
    axes = _listed(self.axis)
    last = range(-len(axes), 0)
    keys = jnp.moveaxis(jnp.where(allowed, keys, lowest), axes, last)
    others, along = keys.shape[: -len(axes)], keys.shape[-len(axes) :]
    length = math.prod(along)
    keys = keys.reshape(*others, length)
    padding = [(0, 0)] * len(others) + [(0, -length % self.m)]
    groups = jnp.pad(keys, padding, constant_values=lowest)
    groups = groups.reshape(*others, -1, self.m)
    # The rank of a weight is the number of weights in its group that go before it.
    index = jnp.arange(self.m).reshape((1,) * (groups.ndim - 1) + (self.m,))
    rank = jnp.zeros(groups.shape, jnp.int32)
    for j in range(self.m):
      other = groups[..., j : j + 1]
      rank += ((other > groups) | ((other == groups) & (j < index))).astype(jnp.int32)
    mask = (rank < kept).reshape(*others, math.prod(groups.shape[-2:]))[..., :length]
    return jnp.moveaxis(mask.reshape(*others, *along), last, axes)


@dataclasses.dataclass(frozen=True)
class ByFunction(Structure):
  """A user's function `(scores, sparsity) -> mask`."""

  fn: Callable[[jax.Array, Any], Any]
  makes_mask: ClassVar[bool] = True

  def mask(self, scores: jax.Array, sparsity: Any, allowed: jax.Array) -> jax.Array:
    del allowed
    mask = jnp.asarray(self.fn(scores, sparsity))
    if mask.shape != scores.shape or mask.dtype != jnp.bool_:
      raise ValueError(
        f"expected a mask of bools and of shape {scores.shape}, found shape {mask.shape} and dtype"
        f" {mask.dtype}"
      )
    return mask


def _is_axes(node: Any) -> bool:
  """Whether it is an axis or several, and no tree of them."""
  if isinstance(node, tuple):
    return all(map(_is_axis, node))
  return _is_axis(node)


def _is_axis(node: Any) -> bool:
  return isinstance(node, int | np.integer) and not isinstance(node, bool)


def _listed(axis: Axis) -> tuple[int, ...]:
  return axis if isinstance(axis, tuple) else (axis,)


def wide(scores: jax.Array) -> jax.Array:
  """Scores of which a mean is taken, in no fewer than 32 bits."""
  return scores if scores.dtype == jnp.float64 else scores.astype(jnp.float32)


def as_structure(structure: Any) -> Structure:
  """The structure that the user gave: as such, or as a function `(scores, sparsity) -> mask`."""
  if isinstance(structure, Structure):
    return structure
  if callable(structure) and not isinstance(structure, type):
    return ByFunction(structure)
  raise ValueError(f"structure: expected a structure or a function, found {structure!r}")
