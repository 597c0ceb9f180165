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
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_cadence import _checks
from optax_cadence import _control
from optax_cadence import _paths
from optax_cadence import _sharding
from optax_cadence.pruning import allocation as allocations
from optax_cadence.pruning import packing
from optax_cadence.pruning import selection
from optax_cadence.pruning import sparsity
from optax_cadence.pruning import structure as structures
from optax_cadence.pruning.criterion import Criterion
from optax_cadence.pruning.regrowth import Regrowth
from optax_cadence.pruning.structure import Structure

# An array for each pruned leaf, by its path. A mask is a bool array of the leaf's shape, True where
# a weight is kept; stored, it is that or, packed, what `packing.pack` makes of it.
Leaves = dict[_paths.Path, jax.Array]
Arrays = Mapping[_paths.Path, jax.Array]


def load(path: _paths.Path, stored: jax.Array, leaf: Any) -> jax.Array:
  """The mask that is stored for a leaf, lying as it does.

  Raises:
    ValueError: If it is the mask of another shape.
  """
  packed, shape = stored.dtype == jnp.uint8, jnp.shape(leaf)
  expected = packing.packed_shape(shape) if packed else shape
  if stored.shape != expected:
    raise ValueError(
      f"mask of {_paths.join(path)!r}: expected shape {expected}, found {stored.shape}; after"
      " growth give the state its masks with pruning.with_masks"
    )
  if not packed:
    return stored
  unpack = functools.partial(packing.unpack, shape=shape)
  mask = _sharding.automatically(unpack, [stored], _sharding.spec_of(leaf))
  return _sharding.lying_as(mask, leaf)  # bytes may lie whole where they divide by no shards


class MicroStep(NamedTuple):
  """What new masks are made from.

  Attributes:
    step: Number of the micro-step: int32 scalar.
    params: Pruned leaves, as they are before the update.
    grads: Their gradients; nothing if there is no inner optimizer.
    memory: What a criterion scores in place of the gradient: what it remembers or is given.
  """

  step: jax.Array
  params: Arrays
  grads: Arrays
  memory: Arrays


class Parts(Arrays):
  """Arrays by path, in which each layer of a leaf that holds a stack of them has its own entry.

  A layer is cut out of its leaf where it is read, so that no pass over it stores anything.
  """

  def __init__(self, leaves: Mapping[_paths.Path, Any], layers: Mapping[_paths.Path, int]):
    self._leaves = leaves
    self._where: dict[_paths.Path, tuple[_paths.Path, int | None]] = {}
    for path in leaves:
      for layer, part in enumerate(parts(path, layers)):
        self._where[part] = (path, layer if path in layers else None)

  def __getitem__(self, part: _paths.Path) -> Any:
    path, layer = self._where[part]
    return self._leaves[path] if layer is None else self._leaves[path][layer]

  def __iter__(self) -> Iterator[_paths.Path]:
    return iter(self._where)

  def __len__(self) -> int:
    return len(self._where)


def parts(path: _paths.Path, layers: Mapping[_paths.Path, int]) -> list[_paths.Path]:
  """What a leaf is called; each of its layers if it holds a stack of them."""
  if path not in layers:
    return [path]
  return [(*path, f"layer {i}") for i in range(layers[path])]


@dataclasses.dataclass(frozen=True)
class Masker:
  """The settings that masks depend on, and, after `on`, what they are for the leaves of a tree.

  Attributes:
    sparsity: What `prune` was given.
    criterion: How the weights are scored.
    structure: What is pruned together.
    allocation: How a sparsity is shared out over the leaves.
    normalize: Whether the scores of each leaf are divided by their norm.
    regrow: Which pruned weights come back; None if nothing regrows.
    permanent: Whether a weight that has been pruned stays so.
    stacked: `stacked(path, param)`: whether a leaf holds layers stacked on axis 0.
    packed: Whether masks are stored as one bit per weight.
    sparsities: The sparsity of each leaf: a number, a traced scalar or a schedule.
    layers: How many layers a leaf holds that is a stack of them. Each is pruned by itself, as if it
      were a leaf: a part.
    structures: The structure of each part.
  """

  sparsity: Any
  criterion: Criterion
  structure: Structure
  allocation: str
  normalize: bool
  regrow: Regrowth | None
  permanent: bool
  stacked: Callable[[str, Any], bool]
  packed: bool
  sparsities: Mapping[_paths.Path, Any] = dataclasses.field(default_factory=dict)
  layers: Mapping[_paths.Path, int] = dataclasses.field(default_factory=dict)
  structures: Mapping[_paths.Path, Structure] = dataclasses.field(default_factory=dict)

  def on(self, params: Any, leaves: Mapping[_paths.Path, Any]) -> "Masker":
    """The same settings for the leaves of a tree.

    Args:
      params: All parameters.
      leaves: Those that are pruned, by path.

    Raises:
      ValueError: If the structure or the sparsity does not fit a leaf.
    """
    of_leaf = self.structure.by_leaf(params, leaves)
    layers: dict[_paths.Path, int] = {}
    for path in leaves:
      name, shape, structure = _paths.join(path), jnp.shape(leaves[path]), of_leaf[path]
      is_stack = self.stacked(name, leaves[path])
      try:
        if is_stack:
          if len(shape) < 2:
            raise ValueError(f"expected layers stacked on axis 0, found shape {shape}")
          structure.check(shape)
          layers[path], structure, shape = shape[0], structure.of_layer(len(shape)), shape[1:]
        structure.check(shape)
      except ValueError as error:
        raise ValueError(f"structure of {name!r}: {error}") from None
      of_leaf[path] = structure
    if self.allocation == "global" and self.structure.single_weights and not self.normalize:
      layers = {}  # All weights are one pool, however they are divided.
    of_part = {part: of_leaf[path] for path in leaves for part in parts(path, layers)}
    asked = sparsity.by_leaf(self.sparsity, self.structure, params, leaves)
    return dataclasses.replace(self, sparsities=asked, layers=layers, structures=of_part)

  def dense(self, params: Mapping[_paths.Path, Any]) -> Leaves:
    """Stored masks that keep everything."""
    return {path: self._store(jnp.ones_like(x, bool)) for path, x in params.items()}

  def _store(self, mask: jax.Array) -> jax.Array:
    return packing.pack(mask) if self.packed else mask

  def next(self, stored: Leaves, due: Any, micro_step: MicroStep, first: bool = False) -> Leaves:
    """The stored masks after a micro-step. Where they are not due, nothing is computed.

    Args:
      stored: The stored masks before it.
      due: Whether new masks are due: a bool or a boolean scalar.
      micro_step: What new masks are made from.
      first: Whether these are the masks to begin with, before the first update.
    """
    renew = self._prune
    if self.regrow is not None and not first:
      renew, due = self._exchange, due & (micro_step.step > 1)

    def renew_stored(stored: Leaves, micro_step: MicroStep) -> Leaves:
      step, *arrays = micro_step
      old = {p: load(p, x, micro_step.params[p]) for p, x in stored.items()}
      sparsities = {
        part: s(step) if callable(s) else s
        for p, s in self.sparsities.items()
        for part in parts(p, self.layers)
      }
      old_parts, *others = (Parts(leaves, self.layers) for leaves in (old, *arrays))
      masks = self._joined(renew(old_parts, sparsities, MicroStep(step, *others)))
      return {p: self._store(mask) for p, mask in masks.items()}

    def renew_lying_as_they_do(stored: Leaves, micro_step: MicroStep) -> Leaves:
      specs = jax.tree.map(_sharding.spec_of, stored)
      return _sharding.automatically(renew_stored, [stored, micro_step], specs)

    return _control.maybe(due, renew_lying_as_they_do, stored, micro_step)

  def _joined(self, masks: Leaves) -> Leaves:
    """The masks of leaves from those of their parts."""
    joined = dict(masks)
    for path in self.layers:
      joined[path] = jnp.stack([joined.pop(part) for part in parts(path, self.layers)])
    return joined

  def _prune(
    self, old: Arrays, sparsities: Mapping[_paths.Path, Any], micro_step: MicroStep
  ) -> Leaves:
    """Keeps the best units; if pruning is permanent, the best of those that are left."""
    criterion = self.regrow.first if self.regrow else self.criterion
    if self.structure.makes_mask:
      masks = {}
      for i, (path, mask) in enumerate(old.items()):
        scores = self._scores(criterion, i, path, micro_step)
        allowed = mask if self.permanent else jnp.ones_like(mask)
        try:
          mask = self.structures[path].mask(scores, sparsities[path], allowed)
        except ValueError as error:
          raise ValueError(f"structure of {_paths.join(path)!r}: {error}") from error
        masks[path] = mask & allowed
      return masks
    keys = self._keys(criterion, micro_step)
    if self.permanent:
      keys = {path: _only(key, self._unit_mask(path, old[path])) for path, key in keys.items()}
    shapes = {path: jax.eval_shape(key).shape for path, key in keys.items()}
    best = _largest(keys, *allocations.pools(self.allocation, sparsities, shapes))
    masks = {
      path: self.structures[path].weight_mask(best[path](), x.shape) for path, x in old.items()
    }
    # If fewer units are left than may be kept, pruned ones are among the best.
    return {path: mask & old[path] if self.permanent else mask for path, mask in masks.items()}

  def _exchange(
    self, old: Arrays, sparsities: Mapping[_paths.Path, Any], micro_step: MicroStep
  ) -> Leaves:
    """Drops the worst of the kept units, and grows as many of all that do not survive.

    A unit that was dropped just now may be the best to grow; it is then kept as it is.
    """
    assert self.regrow is not None
    active = {path: self._unit_mask(path, mask) for path, mask in old.items()}
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
      path: self.structures[path].weight_mask(surviving[path] | newcomers[path](), mask.shape)
      for path, mask in old.items()
    }

  def _scores(
    self, criterion: Criterion, i: int, path: _paths.Path, micro_step: MicroStep
  ) -> jax.Array:
    """Scores of the weights of a leaf, the i-th of those that are pruned."""
    param, key = micro_step.params[path], None
    if criterion.key is not None:
      key = jax.random.fold_in(jax.random.fold_in(criterion.key, micro_step.step), i)
    own = criterion.remembers or criterion.reads is not None
    read = micro_step.memory if own else micro_step.grads
    scores = criterion.score(param, read.get(path), key)
    if getattr(scores, "shape", None) != param.shape or jnp.iscomplexobj(scores):
      raise ValueError(
        f"scores of {_paths.join(path)!r} by criterion {criterion.name}: expected real numbers of"
        f" shape {param.shape}, found {_checks.shown(scores)}"
      )
    return jnp.asarray(scores)

  def _keys(self, criterion: Criterion, micro_step: MicroStep) -> dict[_paths.Path, selection.Keys]:
    """For each leaf a function that makes the keys of its units."""

    def unit_scores(i: int, path: _paths.Path, norm: Any = None) -> jax.Array:
      scores = self._scores(criterion, i, path, micro_step)
      if norm is not None:
        scores = scores.astype(norm.dtype) / norm
      return self.structures[path].unit_scores(scores)

    def keys_of(i: int, path: _paths.Path) -> selection.Keys:
      norm = None
      if self.normalize:
        # Outside of `compute`, which may run in every pass over the scores.
        scores = structures.wide(self._scores(criterion, i, path, micro_step))
        norm = jnp.linalg.norm(scores.reshape(-1)) + 1e-8

      def compute() -> jax.Array:
        return selection.order(unit_scores(i, path, norm), wide)

      if criterion.cheap and self.structures[path].single_weights:
        return compute
      keys = compute()
      return lambda: keys

    # Where some scores have 64 bits, which takes x64, those of all leaves are compared as such.
    wide = jnp.dtype(jax.dtypes.canonicalize_dtype("float64")).itemsize > 4 and any(
      jax.eval_shape(functools.partial(unit_scores, i, path)).dtype.itemsize > 4
      for i, path in enumerate(micro_step.params)
    )
    return {path: keys_of(i, path) for i, path in enumerate(micro_step.params)}

  def _unit_mask(self, path: _paths.Path, mask: jax.Array) -> jax.Array:
    """Which units are kept, from the mask of the weights."""
    if self.structures[path].single_weights:
      return mask
    return self.structures[path].unit_scores(mask.astype(jnp.float32)) > 0


def _only(keys: selection.Keys, allowed: jax.Array) -> selection.Keys:
  """The same keys, with the units that are not allowed below all others."""

  def compute() -> jax.Array:
    k = keys()
    return jnp.where(allowed, k, selection.excluded(k.dtype))

  return compute


def _largest(
  keys: Mapping[_paths.Path, selection.Keys], pools: list[list[_paths.Path]], kept: list[Any]
) -> dict[_paths.Path, selection.Keys]:
  """For each leaf a function that makes the mask of the units that its pool keeps."""
  found: dict[_paths.Path, selection.Keys] = {}
  for alike in _by_axes(keys, pools):
    masks = selection.largest(
      [[keys[path] for path in pools[g]] for g in alike], [kept[g] for g in alike]
    )
    for g, of_pool in zip(alike, masks, strict=True):
      found |= zip(pools[g], of_pool, strict=True)
  return found


def _by_axes(
  keys: Mapping[_paths.Path, selection.Keys], pools: list[list[_paths.Path]]
) -> list[list[int]]:
  """The pools, by position, that are searched together.

  In `jax.shard_map` these are pools that vary over the same axes: a leaf that is the same on all
  shards, searched together with one that is not, would vary as that does.

  Raises:
    ValueError: If some leaves of a pool vary over axes that others do not.
  """
  together: dict[frozenset[Any], list[int]] = {}
  for g, pool in enumerate(pools):
    axes = {path: _sharding.axes_of(jax.make_jaxpr(keys[path])().out_avals) for path in pool}
    first, *others = axes
    for path in others:
      if axes[path] != axes[first]:
        shown = [
          f"{_paths.join(p)!r} over {', '.join(sorted(map(str, axes[p]))) or 'none'}"
          for p in (first, path)
        ]
        raise ValueError(
          "allocation 'global': expected leaves that vary over the same axes of jax.shard_map,"
          f" found {' and '.join(shown)}: every shard has a threshold of its own; take"
          " allocation='uniform', or shard with jax.jit alone"
        )
    together.setdefault(axes[first], []).append(g)
  return list(together.values())
