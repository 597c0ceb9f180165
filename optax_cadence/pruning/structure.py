"""What is pruned together: single weights, N of M, blocks, channels."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from optax_cadence.pruning import selection


class Structure:
  """What `prune` asks of a structure.

  Attributes:
    single: Whether the units are the weights themselves.
    counted: Whether units are kept by number, the best of them first; otherwise `mask`
      decides.
    stated: The sparsity that the structure itself states; None where it is asked for.
  """

  single: ClassVar[bool] = False
  counted: ClassVar[bool] = True

  @property
  def stated(self) -> float | None:
    """See the class."""
    return None

  def check(self, shape: tuple[int, ...]) -> None:
    """Raises `ValueError` if a leaf of this shape cannot be pruned so."""

  def check_named(self, path: str, shape: tuple[int, ...]) -> None:
    """The same; the error names the leaf."""
    try:
      self.check(shape)
    except ValueError as error:
      raise ValueError(f"structure of {path!r}: {error}") from None

  def units(self, x: jax.Array) -> jax.Array:
    """Scores of the units that are kept or pruned whole, from those of the weights."""
    return x

  def spread(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The mask of a leaf of this shape, from that of its units."""
    return jnp.broadcast_to(mask, shape)

  def mask(self, scores: jax.Array, sparsity: Any, allowed: jax.Array) -> jax.Array:
    """The mask where units are not counted; what is not allowed is not kept."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Unstructured(Structure):
  """Every weight by itself."""

  single: ClassVar[bool] = True


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

  def units(self, x: jax.Array) -> jax.Array:
    """See `Structure`."""
    lead = x.shape[: x.ndim - len(self.shape)]
    pairs = [(d // b, b) for d, b in zip(x.shape[len(lead) :], self.shape, strict=True)]
    axes = tuple(len(lead) + 2 * i + 1 for i in range(len(pairs)))
    return x.reshape(*lead, *(n for pair in pairs for n in pair)).astype(jnp.float32).mean(axes)

  def spread(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """See `Structure`."""
    for i, b in enumerate(self.shape):
      mask = jnp.repeat(mask, b, axis=mask.ndim - len(self.shape) + i)
    return mask.reshape(shape)


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
    if not -len(shape) <= self.axis < len(shape):
      raise ValueError(f"expected an axis {self.axis}, found shape {shape}")

  def units(self, x: jax.Array) -> jax.Array:
    """See `Structure`."""
    axes = tuple(i for i in range(x.ndim) if i != self.axis % x.ndim)
    return x.astype(jnp.float32).mean(axes, keepdims=True)


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
  counted: ClassVar[bool] = False

  @property
  def stated(self) -> float:
    """See `Structure`."""
    return 1 - self.n / max(self.m, 1)

  def check(self, shape: tuple[int, ...]) -> None:
    """See `Structure`."""
    if not 0 <= self.n <= self.m or self.m < 1:
      raise ValueError(f"expected N of M with 0 <= N <= M, found {self.n} of {self.m}")
    if not -len(shape) <= self.axis < len(shape):
      raise ValueError(f"expected an axis {self.axis}, found shape {shape}")

  def mask(self, scores: jax.Array, sparsity: Any, allowed: jax.Array) -> jax.Array:
    """See `Structure`; ties go to the lower index."""
    del sparsity
    keys = jnp.where(allowed, selection.order(scores), selection.EXCLUDED)
    moved = jnp.moveaxis(keys, self.axis, -1)
    size = moved.shape[-1]
    pad = [(0, 0)] * (moved.ndim - 1) + [(0, -size % self.m)]
    groups = jnp.pad(moved, pad, constant_values=selection.EXCLUDED)
    groups = groups.reshape(*moved.shape[:-1], -1, self.m)
    index = jnp.arange(self.m)
    rank = jnp.zeros(groups.shape, jnp.int32)
    for j in range(self.m):
      other = groups[..., j : j + 1]
      before = (j < index).reshape((1,) * (groups.ndim - 1) + (self.m,))
      rank += ((other > groups) | ((other == groups) & before)).astype(jnp.int32)
    kept = (rank < self.n).reshape(*moved.shape[:-1], math.prod(groups.shape[-2:]))[..., :size]
    return jnp.moveaxis(kept, -1, self.axis)


@dataclasses.dataclass(frozen=True)
class ByFunction(Structure):
  """A user's function `(scores, sparsity) -> mask`."""

  fn: Callable[[jax.Array, Any], Any]
  counted: ClassVar[bool] = False

  def mask(self, scores: jax.Array, sparsity: Any, allowed: jax.Array) -> jax.Array:
    """See `Structure`."""
    del allowed
    found = jnp.asarray(self.fn(scores, sparsity), bool)
    if found.shape != scores.shape:
      raise ValueError(f"structure: expected a mask of shape {scores.shape}, found {found.shape}")
    return found


def as_structure(structure: Any) -> Structure:
  """The structure that a function `(scores, sparsity) -> mask` stands for."""
  if isinstance(structure, Structure):
    return structure
  if callable(structure) and not isinstance(structure, type):
    return ByFunction(structure)
  raise ValueError(f"structure: expected a structure or a function, found {structure!r}")
