"""New masks, when they are due.

The way from a leaf to its mask, with the module that each step is in:

  criterion   scores of the weights
  structure   scores of the units: weights, blocks or channels
  selection   the scores as integers that compare as they do: keys
  allocation  which leaves compete in one pool, and how many units each pool keeps
  selection   the units with the largest keys
  structure   the mask of the weights

What a mask does to an update is in `transformation`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_cadence import _control
from optax_cadence import _paths
from optax_cadence.pruning import allocation as allocations
from optax_cadence.pruning import packing
from optax_cadence.pruning import selection
from optax_cadence.pruning.criterion import Criterion
from optax_cadence.pruning.regrowth import Regrowth
from optax_cadence.pruning.structure import Structure

# An array for each pruned leaf, by its path. A mask is a bool array of the leaf's shape, True where
# a weight is kept; stored, it is that or, packed, what `packing.pack` makes of it.
Leaves = dict[_paths.Path, jax.Array]


def nested(leaves: Leaves) -> Any:
  """The arrays in dicts of dicts, a level for each name in a path, as a state keeps masks.

  What the parameters are kept in does not matter then, nor what is written into a name. The array
  of parameters that are a single array is in no dict.
  """
  if () in leaves:
    return leaves[()]
  tree: dict[str, Any] = {}
  for (*names, last), x in leaves.items():
    node = tree
    for name in names:
      node = node.setdefault(name, {})
    node[last] = x
  return tree


def by_path(tree: Any) -> Leaves:
  """Undoes `nested`; the same of any tree."""
  return dict(_paths.flatten_with_paths(tree))


class MicroStep(NamedTuple):
  """What new masks are made from.

  Attributes:
    step: Number of the micro-step: int32 scalar.
    params: Pruned leaves, as they are before the update.
    grads: Their gradients; None if there is no inner optimizer.
    memory: What a criterion that remembers has summed up.
  """

  step: jax.Array
  params: Leaves
  grads: Leaves | None
  memory: Leaves


@dataclasses.dataclass(frozen=True)
class Masker:
  """The settings that masks depend on.

  Attributes:
    criterion: How the weights are scored.
    structure: What is pruned together.
    allocation: How a sparsity is shared out over the leaves.
    regrow: Which pruned weights come back; None if nothing regrows.
    permanent: Whether a weight that has been pruned stays so.
    packed: Whether masks are stored as one bit per weight.
    normalize: Whether the scores of each leaf are divided by their norm.
  """

  criterion: Criterion
  structure: Structure
  allocation: str
  regrow: Regrowth | None
  permanent: bool
  packed: bool
  normalize: bool = False

  def dense(self, params: Mapping[_paths.Path, Any]) -> Leaves:
    """Stored masks that keep everything."""
    return {path: self._store(jnp.ones(jnp.shape(x), bool)) for path, x in params.items()}

  def load(self, path: _paths.Path, stored: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The mask that is stored for a leaf of this shape.

    Raises:
      ValueError: If it is the mask of another shape.
    """
    expected = packing.packed_shape(shape) if self.packed else shape
    if stored.shape != expected:
      raise ValueError(
        f"mask of {_paths.join(path)!r}: expected shape {expected}, found {stored.shape}; after"
        " growth give the state its masks with pruning.with_masks"
      )
    return packing.unpack(stored, shape) if self.packed else stored

  def _store(self, mask: jax.Array) -> jax.Array:
    return packing.pack(mask) if self.packed else mask

  def next(
    self, stored: Leaves, due: Any, sparsities: Mapping[_paths.Path, Any], micro_step: MicroStep
  ) -> Leaves:
    """The stored masks after a micro-step. Where they are not due, nothing is computed.

    Args:
      stored: The stored masks before it.
      due: Whether new masks are due: a bool or a boolean scalar.
      sparsities: A number, a traced scalar or a schedule for each leaf.
      micro_step: What new masks are made from.
    """
    if self.regrow is None:
      return self._renew_if(due, self._prune, stored, sparsities, micro_step)
    due = due & (micro_step.step > 1)
    return self._renew_if(due, self._exchange, stored, sparsities, micro_step)

  def first(
    self, stored: Leaves, due: Any, sparsities: Mapping[_paths.Path, Any], micro_step: MicroStep
  ) -> Leaves:
    """The stored masks to begin with, where there are some before the first update; see `next`."""
    return self._renew_if(due, self._prune, stored, sparsities, micro_step)

  def _renew_if(
    self,
    due: Any,
    renew: Callable[..., Leaves],
    stored: Leaves,
    sparsities: Mapping[_paths.Path, Any],
    micro_step: MicroStep,
  ) -> Leaves:
    def renew_stored(stored: Leaves, micro_step: MicroStep) -> Leaves:
      now = {p: s(micro_step.step) if callable(s) else s for p, s in sparsities.items()}
      old = {p: self.load(p, x, micro_step.params[p].shape) for p, x in stored.items()}
      return {p: self._store(mask) for p, mask in renew(old, now, micro_step).items()}

    return _control.maybe(due, renew_stored, stored, micro_step)

  def _prune(
    self, old: Leaves, sparsities: Mapping[_paths.Path, Any], micro_step: MicroStep
  ) -> Leaves:
    """Keeps the best units; if pruning is permanent, the best of those that are left."""
    criterion = self.regrow.first if self.regrow else self.criterion
    if self.structure.makes_mask:
      masks = {}
      for i, (path, mask) in enumerate(old.items()):
        scores = self._scores(criterion, i, path, micro_step)
        allowed = mask if self.permanent else jnp.ones_like(mask)
        masks[path] = self.structure.mask(scores, sparsities[path], allowed) & allowed
      return masks
    keys = self._keys(criterion, micro_step)
    if self.permanent:
      keys = {path: _only(key, self._unit_mask(old[path])) for path, key in keys.items()}
    shapes = {path: jax.eval_shape(key).shape for path, key in keys.items()}
    best = _largest(keys, *allocations.pools(self.allocation, sparsities, shapes))
    masks = {path: self.structure.weight_mask(best[path](), x.shape) for path, x in old.items()}
    # If fewer units are left than may be kept, pruned ones are among the best.
    return {path: mask & old[path] if self.permanent else mask for path, mask in masks.items()}

  def _exchange(
    self, old: Leaves, sparsities: Mapping[_paths.Path, Any], micro_step: MicroStep
  ) -> Leaves:
    """Drops the worst of the kept units, and grows as many of all that do not survive.

    A unit that was dropped just now may be the best to grow; it is then kept as it is.
    """
    assert self.regrow is not None
    active = {path: self._unit_mask(mask) for path, mask in old.items()}
    shapes = {path: mask.shape for path, mask in active.items()}
    pools, kept = allocations.pools(self.allocation, sparsities, shapes)
    share = self.regrow.share(micro_step.step)
    n_surviving, n_grown = [], []
    for pool, target in zip(pools, kept, strict=True):
      n_active = sum(active[path].sum(dtype=jnp.int32) for path in pool)
      n_exchanged = jnp.floor(share * jnp.asarray(target, jnp.float32)).astype(jnp.int32)
      # More grow if the sparsity has fallen.
      n_growing = jnp.maximum(n_exchanged, target - n_active)
      n_surviving.append(target - n_growing)
      n_grown.append(n_growing)
    scored = self._keys(self.criterion, micro_step)
    grown = self._keys(self.regrow.grow, micro_step)
    survivors = _largest({p: _only(scored[p], active[p]) for p in active}, pools, n_surviving)
    surviving = {path: mask() for path, mask in survivors.items()}
    newcomers = _largest({p: _only(grown[p], ~surviving[p]) for p in active}, pools, n_grown)
    return {
      path: self.structure.weight_mask(surviving[path] | newcomers[path](), mask.shape)
      for path, mask in old.items()
    }

  def _scores(
    self, criterion: Criterion, i: int, path: _paths.Path, micro_step: MicroStep
  ) -> jax.Array:
    """Scores of the weights of a leaf, the i-th of those that are pruned."""
    param, key = micro_step.params[path], None
    if criterion.key is not None:
      key = jax.random.fold_in(jax.random.fold_in(criterion.key, micro_step.step), i)
    read = micro_step.memory if criterion.remembers else micro_step.grads or {}
    scores = criterion.score(param, read.get(path), key)
    if scores.shape != param.shape:
      raise ValueError(
        f"scores of {_paths.join(path)!r}: expected shape {param.shape}, found {scores.shape}"
      )
    return scores

  def _keys(self, criterion: Criterion, micro_step: MicroStep) -> dict[_paths.Path, selection.Keys]:
    """For each leaf a function that makes the keys of its units."""

    def keys_of(i: int, path: _paths.Path) -> selection.Keys:
      norm = None
      if self.normalize:
        # Outside of `compute`, which may run in every pass over the scores.
        scores = self._scores(criterion, i, path, micro_step).astype(jnp.float32)
        norm = jnp.linalg.norm(scores.reshape(-1)) + 1e-8

      def compute() -> jax.Array:
        scores = self._scores(criterion, i, path, micro_step)
        if norm is not None:
          scores = scores.astype(jnp.float32) / norm
        return selection.order(self.structure.unit_scores(scores))

      if criterion.cheap and self.structure.single_weights:
        return compute
      keys = compute()
      return lambda: keys

    return {path: keys_of(i, path) for i, path in enumerate(micro_step.params)}

  def _unit_mask(self, mask: jax.Array) -> jax.Array:
    """Which units are kept, from the mask of the weights."""
    if self.structure.single_weights:
      return mask
    return self.structure.unit_scores(mask.astype(jnp.float32)) > 0


def _only(keys: selection.Keys, allowed: jax.Array) -> selection.Keys:
  """The same keys, with the units that are not allowed below all others."""
  return lambda: jnp.where(allowed, keys(), selection.EXCLUDED)


def _largest(
  keys: Mapping[_paths.Path, selection.Keys], pools: list[list[_paths.Path]], kept: list[Any]
) -> dict[_paths.Path, selection.Keys]:
  """For each leaf a function that makes the mask of the units that its pool keeps."""
  masks = selection.largest([[keys[path] for path in pool] for pool in pools], kept)
  return {
    path: mask
    for pool, of_pool in zip(pools, masks, strict=True)
    for path, mask in zip(pool, of_pool, strict=True)
  }
