"""Masks when they are due: scores, how many are kept, and which.

What a mask does to an update, and what the state holds, is in `transformation`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_cadence import _control
from optax_cadence.pruning import packing
from optax_cadence.pruning import selection
from optax_cadence.pruning import sparsity
from optax_cadence.pruning.criterion import Criterion
from optax_cadence.pruning.regrowth import Regrowth
from optax_cadence.pruning.structure import Structure

# Masks as they are stored, by path.
Masks = dict[str, jax.Array]


class Seen(NamedTuple):
  """What masks are made from at a micro-step.

  Attributes:
    params: Pruned leaves by path.
    grads: Their gradients; None where there is no inner optimizer.
    memory: What a criterion that remembers has summed up.
    step: The micro-step: int32 scalar.
  """

  params: dict[str, jax.Array]
  grads: dict[str, jax.Array] | None
  memory: dict[str, jax.Array]
  step: jax.Array


@dataclasses.dataclass(frozen=True)
class Masker:
  """The settings that masks depend on.

  Attributes:
    criterion: Scores the weights.
    structure: What is pruned together.
    allocation: How a sparsity is shared out.
    regrow: Which pruned weights come back.
    sticky: Whether what is pruned once stays so, other than by `regrow`.
    packed: Whether masks are stored as bits.
  """

  criterion: Criterion
  structure: Structure
  allocation: str
  regrow: Regrowth | None
  sticky: bool
  packed: bool

  def dense(self, params: Mapping[str, Any]) -> Masks:
    """Masks that leave everything."""
    return {path: self._stored(jnp.ones(jnp.shape(x), bool)) for path, x in params.items()}

  def read(self, path: str, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A stored mask as bool of this shape.

    Raises:
      ValueError: If it was made for another.
    """
    expected = packing.packed_shape(shape) if self.packed else shape
    if mask.shape != expected:
      raise ValueError(
        f"mask of {path!r}: expected shape {expected}, found {mask.shape}; after growth give"
        " the state its masks with pruning.with_masks"
      )
    return packing.unpack(mask, shape) if self.packed else mask

  def next(self, masks: Masks, due: Any, sparsities: sparsity.Sparsities, seen: Seen) -> Masks:
    """The masks after a micro-step; only where they are due anything is computed."""

    def fresh(masks: Masks, seen: Seen) -> Masks:
      criterion = self.regrow.first if self.regrow else self.criterion
      return self._fresh(masks, sparsity.at(sparsities, seen.step), criterion, seen)

    def regrown(masks: Masks, seen: Seen) -> Masks:
      return self._regrown(masks, sparsity.at(sparsities, seen.step), seen)

    if self.regrow is None:
      return _control.maybe(due, fresh, masks, seen)
    masks = _control.maybe(seen.step == 1, fresh, masks, seen)
    return _control.maybe(due & (seen.step > 1), regrown, masks, seen)

  def _stored(self, mask: jax.Array) -> jax.Array:
    return packing.pack(mask) if self.packed else mask

  def _units(self, mask: jax.Array) -> jax.Array:
    """The mask of units, from that of weights."""
    if self.structure.single:
      return mask
    return self.structure.units(mask.astype(jnp.float32)) > 0

  def _scores(self, criterion: Criterion, i: int, path: str, seen: Seen) -> jax.Array:
    """Scores of the i-th leaf's weights."""
    param, key = seen.params[path], None
    if criterion.key is not None:
      key = jax.random.fold_in(jax.random.fold_in(criterion.key, seen.step), i)
    given = seen.memory.get(path) if criterion.remembers else (seen.grads or {}).get(path)
    scores = criterion.score(param, given, key)
    if scores.shape != param.shape:
      raise ValueError(f"scores of {path!r}: expected shape {param.shape}, found {scores.shape}")
    return scores

  def _keys(self, criterion: Criterion, seen: Seen) -> dict[str, selection.Keys]:
    """Makers of the keys of each leaf's units."""

    def maker(i: int, path: str) -> selection.Keys:
      def keys() -> jax.Array:
        return selection.order(self.structure.units(self._scores(criterion, i, path, seen)))

      if criterion.cheap and self.structure.single:
        return keys
      made = keys()
      return lambda: made

    return {path: maker(i, path) for i, path in enumerate(seen.params)}

  def _fresh(self, masks: Masks, now: Any, criterion: Criterion, seen: Seen) -> Masks:
    old = {p: self.read(p, m, seen.params[p].shape) for p, m in masks.items()}
    if not self.structure.counted:
      made = {}
      for i, (path, mask) in enumerate(old.items()):
        scores = self._scores(criterion, i, path, seen)
        allowed = mask if self.sticky else jnp.ones_like(mask)
        made[path] = self._stored(self.structure.mask(scores, now[path], allowed) & allowed)
      return made
    keys = self._keys(criterion, seen)
    if self.sticky:
      keys = {p: _only(k, self._units(old[p])) for p, k in keys.items()}
    shapes = {p: jax.eval_shape(k).shape for p, k in keys.items()}
    chosen = _largest(keys, *sparsity.kept(now, shapes, self.allocation))
    made = {p: self.structure.spread(chosen[p](), mask.shape) for p, mask in old.items()}
    return {p: self._stored(m & old[p] if self.sticky else m) for p, m in made.items()}

  def _regrown(self, masks: Masks, now: Any, seen: Seen) -> Masks:
    assert self.regrow is not None
    old = {p: self._units(self.read(p, m, seen.params[p].shape)) for p, m in masks.items()}
    shapes = {p: m.shape for p, m in old.items()}
    pools, counts = sparsity.kept(now, shapes, self.allocation)
    share, survivors, grown = self.regrow.share(seen.step), [], []
    for pool, kept in zip(pools, counts, strict=True):
      active = sum(old[p].sum(dtype=jnp.int32) for p in pool)
      free = sum(old[p].size for p in pool) - active
      wanted = jnp.floor(share * jnp.asarray(kept, jnp.float32)).astype(jnp.int32)
      grow = jnp.minimum(free, jnp.maximum(wanted, kept - active))
      survivors.append(kept - grow)
      grown.append(grow)
    scored, free_scored = self._keys(self.criterion, seen), self._keys(self.regrow.grow, seen)
    stay = _largest({p: _only(k, old[p]) for p, k in scored.items()}, pools, survivors)
    come = _largest({p: _only(k, ~old[p]) for p, k in free_scored.items()}, pools, grown)
    return {
      p: self._stored(self.structure.spread(stay[p]() | come[p](), x.shape))
      for p, x in seen.params.items()
    }


def _only(keys: selection.Keys, allowed: jax.Array) -> selection.Keys:
  return lambda: jnp.where(allowed, keys(), selection.EXCLUDED)


def _largest(
  keys: Mapping[str, selection.Keys], pools: list[list[str]], counts: list[Any]
) -> dict[str, selection.Keys]:
  """Makers of the masks, by path."""
  found = selection.largest([[keys[p] for p in pool] for pool in pools], counts)
  pairs = zip(pools, found, strict=True)
  return {p: mask for pool, masks in pairs for p, mask in zip(pool, masks, strict=True)}
