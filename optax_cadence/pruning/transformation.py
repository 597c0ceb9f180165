"""The transformation: masks when they are due, and updates that keep the pruned weights at zero."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cadence import _control
from optax_cadence import _paths
from optax_cadence._builders import ByPath
from optax_cadence.pruning import allocation as allocations
from optax_cadence.pruning import criterion as criteria
from optax_cadence.pruning import packing as bits
from optax_cadence.pruning import schedule as schedules
from optax_cadence.pruning import selection
from optax_cadence.pruning import structure as structures
from optax_cadence.pruning.regrowth import Regrowth


class PruneState(NamedTuple):
  """State of `prune`.

  Attributes:
    step: Micro-steps done: int32 scalar.
    masks: By path of each pruned leaf its mask: packed, uint8, or bool of its shape. Empty
      where masks do not hold.
    memory: By path what a criterion that remembers has summed up, float32; else empty.
    inner_state: State of the inner optimizer.
  """

  step: jax.Array
  masks: dict[str, jax.Array]
  memory: dict[str, jax.Array]
  inner_state: optax.OptState


def prunable(path: str, param: Any) -> bool:
  """The default of `where`: matrices and kernels, but no bias, norm or embedding."""
  named = re.search(r"bias|norm|embed|(^|/)(bn|ln)\d*(/|$)", path, re.IGNORECASE)
  return np.ndim(param) >= 2 and jnp.issubdtype(param.dtype, jnp.inexact) and not named


def prune(
  sparsity: Any = None,
  *,
  every: Any,
  criterion: Any = "magnitude",
  structure: Any = structures.Unstructured(),  # noqa: B008 (frozen)
  allocation: str = "uniform",
  regrow: Regrowth | None = None,
  hold: bool = True,
  straight_through: bool = False,
  where: Callable[[str, Any], bool] = prunable,
  packed: bool = True,
  inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Prunes while training: for a pruned entry the update is `-param`, so that it becomes 0.

  Stands last in a chain, or around an optimizer given as `inner`, whose gradients it then
  sees. At a micro-step that is due, `params` as they are before the update are scored and the
  masks follow; the update then zeroes what they leave out.

  Args:
    sparsity: Share of the units (weights, blocks, channels) that is pruned: a number, a traced
      scalar, a schedule `micro_step -> sparsity`, or a tree prefix of the parameters (or an
      `oc.by_path`) of these. A traced one is a float32. None with `NM`, which states it.
    every: When masks are due: an integer, `pruning.Times`, `once`, `every_epoch`, or a
      function `micro_step -> bool`, counted 1, 2, …
    criterion: `"magnitude"`, `"saliency"`, `pruning.random(key)`, `pruning.movement()` or
      a function `(param, grad) -> scores`, where `grad` is None without `inner`.
    structure: `pruning.Unstructured()`, `NM`, `Block`, `Channel`, or a function
      `(scores, sparsity) -> mask`.
    allocation: `"uniform"`, `"erdos_renyi"`, `"erk"`, or `"global"` over all leaves.
    regrow: `pruning.by_gradient(...)` or `pruning.at_random(...)`: the first mask is drawn at
      micro-step 1, and then as many weights grow as are dropped by the criterion.
    hold: Whether pruned weights stay 0. False: a shock, after which they come back.
    straight_through: Leave the weights dense; the loss reads `pruning.masked(params, state)`.
    where: Which leaves are pruned: `(path, param) -> bool`.
    packed: One bit per weight; otherwise a bool.
    inner: An optimizer; needed by what reads gradients (saliency, movement, RigL).

  Returns:
    A `GradientTransformationExtraArgs` with state `PruneState`.

  Raises:
    ValueError: For a bad argument, at construction, `init` or while tracing.

  >>> import jax.numpy as jnp, optax, optax_cadence as oc
  >>> tx = optax.chain(optax.sgd(0.0), oc.prune(0.5, every=1))
  >>> params = {"kernel": jnp.array([[1.0, -3.0], [2.0, 0.5]])}
  >>> updates, state = tx.update(params, tx.init(params), params)
  >>> print(optax.apply_updates(params, updates)["kernel"])
  [[ 0. -3.]
   [ 2.  0.]]
  """
  self = _Prune(
    sparsity, every, criterion, structure, allocation, regrow, hold, straight_through, where,
    packed, inner,
  )  # fmt: skip
  return optax.GradientTransformationExtraArgs(self.init, self.update)


class _Prune:
  """The settings, and the two functions."""

  def __init__(
    self,
    sparsity: Any,
    every: Any,
    criterion: Any,
    structure: Any,
    allocation: str,
    regrow: Regrowth | None,
    hold: bool,
    straight_through: bool,
    where: Callable[[str, Any], bool],
    packed: bool,
    inner: optax.GradientTransformation | None,
  ):
    if allocation not in allocations.NAMES:
      raise ValueError(f"allocation: expected one of {allocations.NAMES}, found {allocation!r}")
    self.structured = isinstance(structure, structures.Unstructured)
    if not self.structured and not callable(structure):
      raise ValueError(f"structure: expected a structure or a function, found {structure!r}")
    self.direct = not self.structured or isinstance(structure, structures.NM)
    if self.direct and (regrow is not None or allocation == "global"):
      raise ValueError(f"structure {structure}: expected no regrow and no global allocation")
    if sparsity is None and not isinstance(structure, structures.NM):
      raise ValueError("sparsity: expected a number, a schedule or a tree, found None")
    if not hold and (regrow is not None or straight_through):
      raise ValueError("hold=False: expected neither regrow nor straight_through")
    scalar = callable(sparsity) or jax.tree_util.all_leaves([sparsity]) or sparsity is None
    self.is_tree = isinstance(sparsity, ByPath) or not scalar
    if self.is_tree and allocation != "uniform":
      raise ValueError(f"allocation {allocation!r}: expected one sparsity, found a tree")
    self.sparsity, self.times = sparsity, schedules.as_times(every)
    self.criterion, self.structure = criteria.as_criterion(criterion), structure
    self.allocation, self.regrow, self.hold = allocation, regrow, hold
    self.straight_through, self.where, self.packed = straight_through, where, packed
    self.inner = None if inner is None else optax.with_extra_args_support(inner)
    reading = [
      c.name for c in (self.criterion, *([regrow.grow] if regrow else [])) if c.reads_grads
    ]
    if reading and inner is None:
      raise ValueError(
        f"{reading[0]} reads gradients, which do not reach the end of a chain: expected"
        " prune(..., inner=optimizer), found inner=None"
      )

  def init(self, params: optax.Params) -> PruneState:
    inner_state = optax.EmptyState() if self.inner is None else self.inner.init(params)
    if type(params).__name__ == "_ParamsPlaceholder":
      return PruneState(jnp.int32(0), jnp.int32(0), jnp.int32(0), inner_state)  # type: ignore[arg-type]
    leaves = self._leaves(params)
    sparsities = self._sparsities(params, leaves)
    for path, leaf in leaves.items():
      if self.structured:
        _named(path, self.structure.check, np.shape(leaf))
      _check_sparsity(path, sparsities[path], self.times, self.hold and not self._may_grow)
    masks = {path: self._stored(jnp.ones(x.shape, bool)) for path, x in leaves.items()}
    remembers = self.criterion.remembers
    memory = {p: jnp.zeros(x.shape, jnp.float32) for p, x in leaves.items() if remembers}
    return PruneState(jnp.int32(0), masks if self.hold else {}, memory, inner_state)

  def update(
    self, updates: optax.Updates, state: PruneState, params: Any = None, **extra_args: Any
  ) -> tuple[optax.Updates, PruneState]:
    if params is None:
      raise ValueError("prune needs the parameters: expected params, found None")
    _paths.check_same("gradient", "as the parameters have", params, updates)
    grads, inner_state = None, state.inner_state
    leaves = self._leaves(params)
    if self.inner is not None:
      grads = {p: g for p, g in _by_path(updates).items() if p in leaves}
      updates, inner_state = self.inner.update(updates, inner_state, params, **extra_args)
    step = optax.safe_increment(state.step)
    memory = {
      p: m - (grads[p] * leaves[p]).astype(jnp.float32) for p, m in state.memory.items()
    } if grads else state.memory  # fmt: skip
    masks = self._masks(params, leaves, grads, memory, state, step)
    new = PruneState(step, masks if self.hold else {}, memory, inner_state)
    if self.straight_through:
      return updates, new
    flat, treedef = jax.tree.flatten(updates)
    paths = [_paths.join(p) for p, _ in _paths.flatten_with_paths(updates)]
    for i, path in enumerate(paths):
      if path in masks:
        flat[i] = self._zeroed(path, flat[i], leaves[path], masks[path])
    return jax.tree.unflatten(treedef, flat), new

  @property
  def _may_grow(self) -> bool:
    return self.regrow is not None or self.straight_through

  def _zeroed(self, path: str, update: Any, param: Any, mask: Any) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):
      # As wide as the parameter, or `param - param` would not be zero.
      dtype = jnp.promote_types(update.dtype, param.dtype)
    kept = self._read(path, mask, param.shape)
    return jnp.where(kept, update.astype(dtype), -param.astype(dtype))

  def _stored(self, mask: jax.Array) -> jax.Array:
    return bits.pack(mask) if self.packed else mask

  def _read(self, path: str, mask: Any, shape: tuple[int, ...]) -> jax.Array:
    expected = bits.packed_shape(shape) if self.packed else shape
    if mask.shape != expected:
      raise ValueError(
        f"mask of {path!r}: expected shape {expected}, found {mask.shape}; after growth give"
        " the state its masks with pruning.with_masks"
      )
    return bits.unpack(mask, shape) if self.packed else mask

  def _leaves(self, params: Any) -> dict[str, jax.Array]:
    found = _by_path(params)
    leaves = {p: x for p, x in found.items() if self.where(p, x)}
    if not leaves:
      raise ValueError(
        f"where selects no leaf: expected at least one of {', '.join(map(repr, found))} to be"
        " prunable, found none"
      )
    return leaves

  def _sparsities(self, params: Any, leaves: dict[str, Any]) -> dict[str, Any]:
    """What was asked for each leaf: a number, a traced scalar or a schedule."""
    sparsity = self.sparsity
    if isinstance(self.structure, structures.NM):
      stated = 1 - self.structure.n / max(self.structure.m, 1)
      if sparsity is not None and sparsity != stated:
        path = next(iter(leaves))
        raise ValueError(
          f"sparsity of {path!r}: {self.structure} states {stated}, found {sparsity!r}"
        )
      return dict.fromkeys(leaves, min(max(stated, 0.0), 1.0))
    if isinstance(sparsity, ByPath):
      sparsity = sparsity(params)
    elif not self.is_tree:
      return dict.fromkeys(leaves, sparsity)
    given = {_paths.join(path): s for path, s in _paths.flatten_with_paths(sparsity)}
    found = {}
    for path in leaves:
      match = [g for g in given if g in ("", path) or path.startswith(f"{g}/")]
      if not match:
        raise ValueError(f"sparsity of {path!r}: expected a number in the tree, found none")
      found[path] = given[match[0]]
    return found

  def _masks(
    self, params: Any, leaves: Any, grads: Any, memory: Any, state: PruneState, step: jax.Array
  ) -> dict[str, jax.Array]:
    masks = state.masks if self.hold else {
      p: jnp.full_like(self._stored(jnp.ones(x.shape, bool)), 255 if self.packed else True)
      for p, x in leaves.items()
    }  # fmt: skip
    if set(masks) != set(leaves):
      raise ValueError(
        f"state: expected masks of {', '.join(map(repr, leaves))}, found {', '.join(masks)}"
      )
    sparsities = self._sparsities(params, leaves)
    due = self.times.due(step)
    consts = (leaves, grads, memory, step)
    if self.regrow is None:
      return _control.maybe(due, lambda m, c: self._fresh(m, sparsities, self.criterion, c), masks,
                            consts)  # fmt: skip
    first = self.regrow.first
    masks = _control.maybe(
      step == 1, lambda m, c: self._fresh(m, sparsities, first, c), masks, consts
    )
    return _control.maybe(
      due & (step > 1), lambda m, c: self._regrown(m, sparsities, c), masks, consts
    )

  def _pools(self, leaves: Any) -> list[list[str]]:
    return [list(leaves)] if self.allocation == "global" else [[path] for path in leaves]

  def _at(self, sparsities: dict[str, Any], step: jax.Array) -> dict[str, Any]:
    """The sparsity of each leaf now, before it is shared out."""
    return {p: s(step) if callable(s) else s for p, s in sparsities.items()}

  def _counts(self, now: dict[str, Any], units: dict[str, Any]) -> list[Any]:
    """How many units each pool keeps."""
    if self.allocation in ("erk", "erdos_renyi"):
      shapes = [x.shape for x in units.values()]
      one = next(iter(now.values()))
      shared = allocations.erdos_renyi(shapes, one, self.allocation == "erk")
      now = dict(zip(now, shared, strict=True))
    counts = []
    for pool in self._pools(now):
      size = sum(units[p].size for p in pool)
      counts.append(size - allocations.pruned(now[pool[0]], size))
    return counts

  def _keys(self, criterion: criteria.Criterion, consts: Any) -> dict[str, selection.Keys]:
    """Makers of the keys of each leaf's units."""
    leaves, grads, memory, step = consts

    def maker(i: int, path: str) -> selection.Keys:
      key = None
      if criterion.key is not None:
        key = jax.random.fold_in(jax.random.fold_in(criterion.key, step), i)

      def scores() -> jax.Array:
        given = memory[path] if criterion.remembers else grads[path] if grads else None
        found = criterion.score(leaves[path], given, key)
        if found.shape != leaves[path].shape:
          raise ValueError(
            f"scores of {path!r}: expected shape {leaves[path].shape}, found {found.shape}"
          )
        if self.structured and not self.direct:
          return selection.order(self.structure.units(found))
        return selection.order(found) if self.structured else found

      if key is None and isinstance(self.structure, structures.Unstructured):
        return scores
      made = scores()
      return lambda: made

    return {path: maker(i, path) for i, path in enumerate(leaves)}

  def _fresh(
    self, masks: Any, sparsities: Any, criterion: criteria.Criterion, consts: Any
  ) -> dict[str, jax.Array]:
    leaves, _, _, step = consts
    now, keys = self._at(sparsities, step), self._keys(criterion, consts)
    # A mask that holds never gives a weight back.
    sticky = self.hold and not self.straight_through and self.regrow is None
    old = {p: self._read(p, m, leaves[p].shape) for p, m in masks.items()}
    if self.direct:
      return {
        p: self._stored(self._direct(keys[p](), now[p], old[p] if sticky else None)) for p in leaves
      }
    if sticky:
      keys = {p: _only(k, self._unit_mask(old[p])) for p, k in keys.items()}
    chosen = self._largest(keys, self._counts(now, _shapes(keys)))
    made = {}
    for p, unit in chosen.items():
      mask = self.structure.spread(unit(), leaves[p].shape)
      made[p] = self._stored(mask & old[p] if sticky else mask)
    return made

  def _direct(self, found: jax.Array, sparsity: Any, old: Any) -> jax.Array:
    if self.structured:
      keys = found if old is None else jnp.where(old, found, selection.EXCLUDED)
      mask = self.structure.mask(keys)
    else:
      mask = jnp.asarray(self.structure(found, sparsity), bool)
    return mask if old is None else mask & old

  def _unit_mask(self, mask: jax.Array) -> jax.Array:
    if type(self.structure) is structures.Unstructured:
      return mask
    return self.structure.units(mask.astype(jnp.float32)) > 0

  def _largest(self, keys: dict[str, selection.Keys], counts: list[Any]) -> dict[str, Any]:
    pools = self._pools(keys)
    found = selection.largest([[keys[p] for p in pool] for pool in pools], counts)
    return {p: m for pool, ms in zip(pools, found, strict=True)
            for p, m in zip(pool, ms, strict=True)}  # fmt: skip

  def _regrown(self, masks: Any, sparsities: Any, consts: Any) -> dict[str, jax.Array]:
    leaves, _, _, step = consts
    assert self.regrow is not None
    old = {p: self._unit_mask(self._read(p, m, leaves[p].shape)) for p, m in masks.items()}
    counts = self._counts(self._at(sparsities, step), old)
    share, survivors, grown = self.regrow.share(step), [], []
    for pool, kept in zip(self._pools(leaves), counts, strict=True):
      active = sum(old[p].sum(dtype=jnp.int32) for p in pool)
      free = sum(old[p].size for p in pool) - active
      wanted = _share_of(share, kept)
      grow = jnp.minimum(free, jnp.maximum(wanted, kept - active))
      survivors.append(kept - grow)
      grown.append(grow)
    drop_keys = {p: _only(k, old[p]) for p, k in self._keys(self.criterion, consts).items()}
    grow_keys = {p: _only(k, ~old[p]) for p, k in self._keys(self.regrow.grow, consts).items()}
    stay, come = self._largest(drop_keys, survivors), self._largest(grow_keys, grown)
    return {
      p: self._stored(self.structure.spread(stay[p]() | come[p](), leaves[p].shape)) for p in leaves
    }


def _share_of(share: jax.Array, kept: Any) -> jax.Array:
  return jnp.floor(share * jnp.asarray(kept, jnp.float32)).astype(jnp.int32)


def _only(keys: selection.Keys, allowed: jax.Array) -> selection.Keys:
  return lambda: jnp.where(allowed, keys(), selection.EXCLUDED)


def _shapes(keys: dict[str, selection.Keys]) -> dict[str, Any]:
  return {p: jax.eval_shape(k) for p, k in keys.items()}


def _by_path(tree: Any) -> dict[str, Any]:
  leaves = jax.tree.leaves(tree)
  paths = [path for path, _ in _paths.flatten_with_paths(tree)]
  return {_paths.join(p): jnp.asarray(x) if not isinstance(x, jax.ShapeDtypeStruct) else x
          for p, x in zip(paths, leaves, strict=True)}  # fmt: skip


def _named(path: str, fn: Callable[[Any], Any], value: Any) -> Any:
  try:
    return fn(value)
  except ValueError as error:
    raise ValueError(f"structure of {path!r}: {error}") from None


def _check_sparsity(path: str, sparsity: Any, times: Any, rising: bool) -> None:
  """Raises if a sparsity that is known now is outside [0, 1], or falls where none may."""
  if isinstance(sparsity, jax.core.Tracer):
    return
  values = sparsity
  if callable(sparsity):
    period = getattr(times, "period", 1)
    end = getattr(times, "end", None)
    steps = np.unique(np.concatenate([np.arange(1, 1025), np.geomspace(1024, 1e6, 1024)]))
    steps = np.minimum(steps * period, 2**30).astype(np.int32)
    begin = getattr(times, "begin", 1)
    steps = steps[(steps >= begin) & (steps <= (2**30 if end is None else end))]
    with jax.ensure_compile_time_eval():
      values = jax.vmap(sparsity)(jnp.asarray(steps)) if len(steps) else 0.0
    if isinstance(values, jax.core.Tracer):
      return
  values = np.asarray(values, np.float64)
  bad = values[~((values >= 0) & (values <= 1))]
  if bad.size:
    raise ValueError(f"sparsity of {path!r}: expected a number in [0, 1], found {bad.flat[0]}")
  if rising and values.ndim and (np.diff(values) < -1e-6).any():
    raise ValueError(
      f"sparsity of {path!r}: expected a schedule that does not fall while the mask holds and"
      f" nothing regrows, found a fall from {values.max():g} to {values[-1]:g}"
    )
