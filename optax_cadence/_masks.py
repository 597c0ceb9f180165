"""Leaves under a mask, in which entries of several groups lie next to one another.

To what group an entry belongs is told by a code of one bit for each group, so that a flag or a
number of its group is found without an index. What is done with these leaves is in `_shared`.
"""

import dataclasses
import functools
from collections.abc import Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _layout
from optax_cadence import _regions

_CODES = (np.uint8, np.uint16, np.uint32)
MAX_GROUPS = 32


@dataclasses.dataclass(frozen=True)
class Mask:
  """A leaf whose entries belong to several groups.

  Attributes:
    leaf: Its position in the tree.
    groups: The groups, by position.
    cuts: Which entries each has.
    bits: The bit that stands for each.
  """

  leaf: int
  groups: tuple[int, ...]
  cuts: tuple[_regions.Entries, ...]
  bits: tuple[int, ...]

  def only(self, groups: Container[int]) -> "Mask":
    """The same of those that are among these groups, with the bits that they have here."""
    rows = zip(self.groups, self.cuts, self.bits, strict=True)
    kept = [row for row in rows if row[0] in groups]
    return Mask(self.leaf, *zip(*kept, strict=True)) if kept else Mask(self.leaf, (), (), ())

  def codes(self, shape: _regions.Shape) -> jax.Array:
    """The bit of its group for every entry: unsigned integers, as wide as that takes."""
    codes = np.zeros(shape, next(d for d in _CODES if np.iinfo(d).max >= max(self.bits)))
    for bit, cut in zip(self.bits, self.cuts, strict=True):
      codes.reshape(-1)[cut.indices] = bit
    # Else the compiler would work out every comparison with them, and keep it as a constant.
    return jax.lax.optimization_barrier(jnp.asarray(codes))

  def any(self, codes: jax.Array, flags: Sequence[Any]) -> jax.Array:
    """Whether the flag of its group is set, for every entry."""
    dtype = codes.dtype.type
    pairs = zip(self.bits, flags, strict=True)
    found = [jnp.where(flag, dtype(bit), dtype(0)) for bit, flag in pairs]
    return (codes & functools.reduce(jnp.bitwise_or, found)) != 0

  def look_up(self, codes: jax.Array, like: jax.Array, numbers: Sequence[Any]) -> jax.Array:
    """The number of its group for every entry, in an array of this shape."""
    *others, last = numbers
    found = jnp.full_like(like, last, dtype=last.dtype)
    for bit, x in zip(self.bits, others, strict=False):
      if x is not last and not _equal(x, last):
        found = jnp.where(codes == bit, x, found)
    return found


def of(layout: _layout.Layout, kind: type[_regions.Entries] = _regions.Entries) -> list[Mask]:
  """The leaves under a mask, in order."""
  found: dict[int, list[tuple[int, Any]]] = {}
  for g, group in enumerate(layout.groups):
    for t in group.tensors:
      if isinstance(t.cut, kind):
        found.setdefault(t.leaf, []).append((g, t.cut))
  masks = []
  for i in sorted(found):
    groups, cuts = zip(*found[i], strict=True)
    masks.append(Mask(i, groups, cuts, tuple(1 << j for j in range(len(groups)))))
  return masks


def shared(layout: _layout.Layout) -> list[Mask]:
  """Those of them whose entries are shared."""
  return of(layout, _regions.SharedEntries)


def _equal(one: Any, other: Any) -> bool:
  known = all(isinstance(x, np.ndarray | np.generic) for x in (one, other))
  return known and bool(one == other)
