"""What is pruned together: single weights, N of M, blocks, channels."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from optax_cadence.pruning import selection


@dataclasses.dataclass(frozen=True)
class Unstructured:
  """Every weight by itself."""

  def check(self, shape: tuple[int, ...]) -> None:
    """Raises `ValueError` if a leaf of this shape cannot be pruned so."""

  def units(self, x: jax.Array) -> jax.Array:
    """Scores of the units that are kept or pruned whole."""
    return x

  def spread(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The mask of a leaf of this shape, from that of its units."""
    del shape
    return mask


@dataclasses.dataclass(frozen=True)
class Block(Unstructured):
  """Rectangles of `shape` in the last axes, scored by their mean.

  >>> from optax_cadence import pruning
  >>> pruning.Block((4, 4))
  Block(shape=(4, 4))
  """

  shape: tuple[int, ...]

  def check(self, shape: tuple[int, ...]) -> None:
    """See `Unstructured`."""
    n = len(self.shape)
    if len(shape) < n or any(d % b for d, b in zip(shape[-n:], self.shape, strict=True)):
      raise ValueError(f"expected blocks of {self.shape} that divide its last axes, found {shape}")

  def units(self, x: jax.Array) -> jax.Array:
    """See `Unstructured`."""
    lead = x.shape[: x.ndim - len(self.shape)]
    pairs = [(d // b, b) for d, b in zip(x.shape[len(lead) :], self.shape, strict=True)]
    axes = tuple(len(lead) + 2 * i + 1 for i in range(len(pairs)))
    return x.reshape(*lead, *(n for pair in pairs for n in pair)).astype(jnp.float32).mean(axes)

  def spread(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """See `Unstructured`."""
    for i, b in enumerate(self.shape):
      mask = jnp.repeat(mask, b, axis=mask.ndim - len(self.shape) + i)
    return mask.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Channel(Unstructured):
  """Whole channels: slices of one axis, scored by their mean.

  >>> from optax_cadence import pruning
  >>> pruning.Channel(axis=-1)
  Channel(axis=-1)
  """

  axis: int = -1

  def check(self, shape: tuple[int, ...]) -> None:
    """See `Unstructured`."""
    if not -len(shape) <= self.axis < len(shape):
      raise ValueError(f"expected an axis {self.axis}, found shape {shape}")

  def units(self, x: jax.Array) -> jax.Array:
    """See `Unstructured`."""
    axes = tuple(i for i in range(x.ndim) if i != self.axis % x.ndim)
    return x.astype(jnp.float32).mean(axes, keepdims=True)

  def spread(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """See `Unstructured`."""
    return jnp.broadcast_to(mask, shape)


@dataclasses.dataclass(frozen=True)
class NM(Unstructured):
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

  def check(self, shape: tuple[int, ...]) -> None:
    """See `Unstructured`."""
    if not 0 <= self.n <= self.m or self.m < 1:
      raise ValueError(f"expected N of M with 0 <= N <= M, found {self.n} of {self.m}")
    if not -len(shape) <= self.axis < len(shape):
      raise ValueError(f"expected an axis {self.axis}, found shape {shape}")

  def mask(self, keys: jax.Array) -> jax.Array:
    """The mask, from ordered keys (int32); ties to the lower index."""
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
