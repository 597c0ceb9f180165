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
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from optax_cadence.pruning import selection


class Structure:
  """Base class: what `prune` asks of a structure.

  Attributes:
    single_weights: Whether every unit is one weight.
    makes_mask: Whether the structure makes the mask itself, in `mask`. Otherwise `prune` keeps
      the units with the highest scores, by `unit_scores` and `weight_mask`.
    fixed_sparsity: The sparsity that the structure implies; None if the user chooses it.
  """

  single_weights: ClassVar[bool] = False
  makes_mask: ClassVar[bool] = False

  @property
  def fixed_sparsity(self) -> float | None:
    """The sparsity that the structure implies; None if the user chooses it."""
    return None

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

  def check(self, shape: tuple[int, ...]) -> None:
    """See `Structure`."""
    n = len(self.shape)
    if len(shape) < n or any(d % b for d, b in zip(shape[-n:], self.shape, strict=True)):
      raise ValueError(f"expected blocks of {self.shape} that divide its last axes, found {shape}")

  def unit_scores(self, scores: jax.Array) -> jax.Array:
    """See `Structure`."""
    first = scores.ndim - len(self.shape)  # the first axis that is cut into blocks
    cut = [(d // b, b) for d, b in zip(scores.shape[first:], self.shape, strict=True)]
    blocks = scores.reshape(*scores.shape[:first], *(n for pair in cut for n in pair))
    within_block = tuple(first + 2 * i + 1 for i in range(len(cut)))
    return blocks.astype(jnp.float32).mean(within_block)

  def weight_mask(self, unit_mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """See `Structure`."""
    first = unit_mask.ndim - len(self.shape)
    for axis, b in enumerate(self.shape, start=first):
      unit_mask = jnp.repeat(unit_mask, b, axis=axis)
    return unit_mask.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Channel(Structure):
  """Whole channels: slices of one axis, scored by their mean.

  >>> from optax_cadence import pruning
  >>> pruning.Channel(axis=-1)
  Channel(axis=-1)
  """

  axis: int = -1

  def check(self, shape: tuple[int, ...]) -> None:
    """See `Structure`."""
    _check_axis(self.axis, shape)

  def unit_scores(self, scores: jax.Array) -> jax.Array:
    """See `Structure`."""
    others = tuple(i for i in range(scores.ndim) if i != self.axis % scores.ndim)
    return scores.astype(jnp.float32).mean(others, keepdims=True)


@dataclasses.dataclass(frozen=True)
class NM(Structure):
  """At most `n` of every `m` consecutive weights along an axis; a last group may be shorter.

  Raises:
    ValueError: If `n` is larger than `m`; `prune` names the leaf.

  >>> from optax_cadence import pruning
  >>> pruning.NM(2, 4)
  NM(n=2, m=4, axis=-1)
  """

  n: int
  m: int
  axis: int = -1
  makes_mask: ClassVar[bool] = True

  @property
  def fixed_sparsity(self) -> float:
    """See `Structure`."""
    return 1 - self.n / max(self.m, 1)

  def check(self, shape: tuple[int, ...]) -> None:
    """See `Structure`."""
    if not 0 <= self.n <= self.m or self.m < 1:
      raise ValueError(f"expected N of M with 0 <= N <= M, found {self.n} of {self.m}")
    _check_axis(self.axis, shape)

  def mask(self, scores: jax.Array, sparsity: Any, allowed: jax.Array) -> jax.Array:
    """See `Structure`; ties go to the lower index."""
    del sparsity
    keys = jnp.where(allowed, selection.order(scores), selection.EXCLUDED)
    keys = jnp.moveaxis(keys, self.axis, -1)
    *others, length = keys.shape
    padding = [(0, 0)] * len(others) + [(0, -length % self.m)]
    groups = jnp.pad(keys, padding, constant_values=selection.EXCLUDED)
    groups = groups.reshape(*others, -1, self.m)
    # The rank of a weight is the number of weights in its group that go before it.
    index = jnp.arange(self.m).reshape((1,) * (groups.ndim - 1) + (self.m,))
    rank = jnp.zeros(groups.shape, jnp.int32)
    for j in range(self.m):
      other = groups[..., j : j + 1]
      rank += ((other > groups) | ((other == groups) & (j < index))).astype(jnp.int32)
    kept = (rank < self.n).reshape(*others, math.prod(groups.shape[-2:]))[..., :length]
    return jnp.moveaxis(kept, -1, self.axis)


@dataclasses.dataclass(frozen=True)
class ByFunction(Structure):
  """A user's function `(scores, sparsity) -> mask`."""

  fn: Callable[[jax.Array, Any], Any]
  makes_mask: ClassVar[bool] = True

  def mask(self, scores: jax.Array, sparsity: Any, allowed: jax.Array) -> jax.Array:
    """See `Structure`."""
    del allowed
    mask = jnp.asarray(self.fn(scores, sparsity), bool)
    if mask.shape != scores.shape:
      raise ValueError(f"structure: expected a mask of shape {scores.shape}, found {mask.shape}")
    return mask


def _check_axis(axis: int, shape: tuple[int, ...]) -> None:
  if not -len(shape) <= axis < len(shape):
    raise ValueError(f"expected an axis {axis}, found shape {shape}")


def as_structure(structure: Any) -> Structure:
  """The structure that the user gave: as such, or as a function `(scores, sparsity) -> mask`."""
  if isinstance(structure, Structure):
    return structure
  if callable(structure) and not isinstance(structure, type):
    return ByFunction(structure)
  raise ValueError(f"structure: expected a structure or a function, found {structure!r}")
