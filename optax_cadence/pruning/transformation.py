"""The transformation: masks when they are due, and updates that keep the pruned weights at zero."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _checks
from optax_cadence import _control
from optax_cadence import _paths
from optax_cadence import _sharding
from optax_cadence._state import is_stand_in
from optax_cadence.pruning import allocation as allocations
from optax_cadence.pruning import criterion as criteria
from optax_cadence.pruning import filling
from optax_cadence.pruning import masking
from optax_cadence.pruning import optimizing
from optax_cadence.pruning import schedule as schedules
from optax_cadence.pruning import sparsity as sparsities
from optax_cadence.pruning import structure as structures
from optax_cadence.pruning.prunable import prunable
from optax_cadence.pruning.regrowth import Regrowth


class PruneState(NamedTuple):
  """State of `prune`.

  Attributes:
    step: Number of micro-steps done: int32 scalar.
    masks: The mask of each pruned leaf, in dicts of dicts by the names in its path: packed, uint8,
      or bool of the leaf's shape. Empty with `hold=False`.
    memory: What a criterion that remembers has kept of each pruned leaf, in float32 or wider, in a
      tree like the parameters, in which the other leaves are `MaskedNode`; else empty.
    inner_state: State of the inner optimizer.
    fill: What is needed to draw fresh weights for `fill`; empty where none are drawn.

  For `optax.tree_utils.tree_map_params`, memory and inner state follow the parameters. Masks do
  not: they are no numbers to be cast, averaged or cleared, and packed they have another shape. They
  are one field, for which `transform_non_params` is called once.
  """

  step: jax.Array
  masks: Any
  memory: Any
  inner_state: optax.OptState
  fill: Any = ()

  @property
  def sets_parameters(self) -> bool:
    """Whether updates set parameters to a value: they are then no gradients for a cadence."""
    return True


def prune(
  sparsity: Any = None,
  *,
  every: Any,
  criterion: Any = "magnitude",
  structure: Any = structures.Unstructured(),  # noqa: B008 (frozen)
  allocation: str = "uniform",
  normalize: bool = False,
  regrow: Regrowth | None = None,
  hold: bool = True,
  fill: Any = "zero",
  straight_through: bool = False,
  sparse_gradients: bool = False,
  restart: bool | None = None,
  where: Callable[[str, Any], bool] = prunable,
  stacked: Callable[[str, Any], bool] | None = None,
  packed: bool = True,
  inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Prunes while training: for a pruned entry the update is `-param`, so that it becomes 0.

  Stands last in a chain, or around an optimizer given as `inner`, whose gradients it then
  sees. At a micro-step at which new masks are due, they are made from `params` as they are
  before the update; the update then makes what they leave out zero.

  Some masks need no update and are there from `init` on, so that `pruning.masked(params, state)`
  gives the parameters to begin with: with `regrow`, with `every=pruning.once(1)`, and with
  `straight_through` unless `every` begins later. A criterion that reads gradients has none then.

  Args:
    sparsity: Share of the units (weights, blocks, channels) that is pruned: a number, a traced
      scalar, a schedule `micro_step -> sparsity`, or a tree prefix of the parameters (or an
      `oc.by_path`) of these. A traced one is a float32. None with `NM`, which implies it.
    every: When new masks are due: an integer, `pruning.Times`, `once`, `every_epoch`, or a
      function `micro_step -> bool`. Micro-steps are counted 1, 2, …
    criterion: `"magnitude"`, `"saliency"`, `pruning.random(key)`, `pruning.movement()`, a
      function `(param, grad) -> scores`, where `grad` is None without `inner`, or a
      `pruning.Criterion`, which can remember, or read extra arguments of `update`.
    structure: `pruning.Unstructured()`, `NM`, `Block`, `Channel`, or a function
      `(scores, sparsity) -> mask`.
    allocation: `"uniform"`, `"erdos_renyi"`, `"erk"`, or `"global"` over all leaves.
    normalize: Whether leaves compete by their scores over the norm of these; only with `"global"`.
    regrow: `pruning.by_gradient(...)` or `pruning.at_random(...)`: the first mask is drawn at
      `init`, and then as many weights grow as are dropped by the criterion.
    hold: Whether pruned weights stay 0. False: a shock, after which they come back.
    fill: With `hold=False`, what a shock leaves behind: `"zero"`; `"init"`, fresh weights;
      `"shrink"`, half of the old ones and half of fresh ones; or a `pruning.Fill`.
    straight_through: Leaves the weights dense; the loss reads `pruning.masked(params, state)`.
      Masks that are due are then made from the parameters as they are after the update, for
      which this must stand last: they are those of the weights that the next loss reads.
    sparse_gradients: Whether the inner optimizer sees gradients of 0 for pruned weights, so that
      they count in no norm and no moment.
    restart: Whether the inner optimizer forgets what it knew of the weights that a shock hits or
      that grow: their moments and windows, and counters if all weights of all leaves are hit. By
      default it does if there is one.
    where: Which leaves are pruned: `(path, param) -> bool`, of the `/`-joined path. By default
      those that are kernels by their name; `pruning.kernels` reads them from the program.
    stacked: Which of these hold layers stacked on axis 0, as `nn.scan` stacks them, each of which
      is to be pruned by itself: `(path, param) -> bool`. By default those that a `where` from
      `pruning.kernels` knows of, or none.
    packed: Whether a mask is stored as one bit per weight; otherwise as a bool.
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
  for name, function in (("where", where), ("stacked", stacked)):
    if function is not None and not callable(function):
      raise ValueError(
        f"{name}: expected a function (path, param) -> bool, found {_checks.shown(function)}"
      )
  # Whether scores may need what only comes with an update: a gradient or an extra argument. A
  # function may read the gradient where there is one.
  needs_an_update = callable(criterion) and inner is not None
  criterion = criteria.as_criterion(criterion)
  needs_an_update |= criterion.needs_grads or criterion.reads is not None
  structure = structures.as_structure(structure)
  if regrow is not None and not isinstance(regrow, Regrowth):
    raise ValueError(
      "regrow: expected pruning.by_gradient(...) or pruning.at_random(...), found"
      f" {_checks.shown(regrow)}"
    )
  times = schedules.as_times(every)
  filler = filling.as_fill(fill)
  settings = masking.Masker(
    sparsity=sparsity,
    criterion=criterion,
    structure=structure,
    allocation=allocation,
    normalize=normalize,
    regrow=regrow,
    permanent=hold and not straight_through and regrow is None,
    stacked=stacked or getattr(where, "stacked", None) or (lambda path, param: False),
    packed=packed,
  )
  _check_choices(settings, hold, filler, straight_through, sparse_gradients, restart, inner)
  optimizer = None if inner is None else optax.with_extra_args_support(inner)
  restarts = restart is not False

  def init_fn(params: optax.Params) -> PruneState:
    inner_state = optax.EmptyState() if optimizer is None else optimizer.init(params)
    if is_stand_in(params):
      memory = params if criterion.remembers else {}
      drawing = () if hold else filling.stand_in(filler)
      return PruneState(jnp.int32(0), jnp.int32(0) if hold else {}, memory, inner_state, drawing)
    leaves = _pruned_leaves(params, where)
    masker = settings.on(params, leaves)
    if restarts and (regrow is not None or not hold):
      # Where masks say what it forgets, so does what they vary over in `jax.shard_map`.
      inner_state = _sharding.varying(inner_state, _sharding.axes_of(leaves))
    asked = masker.sparsities
    # Of leaves with the same sparsity the first stands for all.
    for path in {id(asked[path]): path for path in reversed(leaves)}.values():
      implied = structure.fixed_sparsity
      sparsities.check(_paths.join(path), asked[path], times, not masker.permanent, implied)
    if inner is None:
      for reader in [criterion, *([regrow.first, regrow.grow] if regrow else [])]:
        criteria.check_needs_no_gradient(reader, next(iter(leaves.values())), inner)
    memory = {}
    if criterion.remembers:
      memory = _paths.map_with_paths(lambda path, _: _no_memory(leaves.get(path)), params)
    masks = _paths.nested(first_masks(masker, leaves)) if hold else {}
    drawing = () if hold else filling.init(filler, leaves)
    return PruneState(jnp.int32(0), masks, memory, inner_state, drawing)

  def first_masks(masker: masking.Masker, leaves: masking.Leaves) -> masking.Leaves:
    """The masks before any update; dense where they need one."""
    dense = masker.dense(leaves)
    if needs_an_update and regrow is None:
      return dense
    step, due = 1, regrow is not None or (times.begin, times.end) == (1, 1)
    if straight_through:
      step, due = 0, times.from_the_start()  # those of the weights after no micro-step
    if due is not False:
      scored = regrow.first if regrow is not None else criterion
      criteria.check_needs_no_gradient(scored, next(iter(leaves.values())), inner)
    micro_step = masking.MicroStep(jnp.int32(step), leaves, {}, {})
    return masker.next(dense, due, micro_step, first=True)

  def update_fn(
    updates: optax.Updates, state: PruneState, params: Any = None, **extra_args: Any
  ) -> tuple[optax.Updates, PruneState]:
    if params is None:
      raise ValueError("prune needs the parameters: expected params, found None")
    _paths.check_same("gradient", "as the parameters have", params, updates)
    step = optax.safe_increment(state.step)
    leaves = _pruned_leaves(params, where)
    masker = settings.on(params, leaves)

    # The gradients are read before the inner optimizer turns them into updates.
    grads, memory = {}, _paths.by_path(state.memory)
    if optimizer is not None:
      grads = {path: g for path, g in _by_path(updates).items() if path in leaves}
      memory = {
        path: criterion.remember(old, leaves[path], grads[path]) for path, old in memory.items()
      }
    given = criteria.given(criterion, leaves, extra_args)
    micro_step = masking.MicroStep(step, leaves, grads, given or memory)
    remembered = jax.tree.unflatten(jax.tree.structure(state.memory), memory.values())
    state = state._replace(step=step, memory=remembered)
    pruned = held if hold else shocked
    return pruned(updates, state, params, masker, micro_step, extra_args)

  def held(
    updates: optax.Updates,
    state: PruneState,
    params: optax.Params,
    masker: masking.Masker,
    micro_step: masking.MicroStep,
    extra_args: dict[str, Any],
  ) -> tuple[optax.Updates, PruneState]:
    """The updates under masks that hold: new ones where they are due, else the old ones."""
    leaves, due = micro_step.params, times.due(micro_step.step)
    old = _paths.by_path(state.masks)
    if set(old) != set(leaves):
      raise ValueError(
        f"state: expected masks of {_paths.listed(leaves)}, found {_paths.listed(old)}"
      )
    masks = old if straight_through else masker.next(old, due, micro_step)

    def without_grown(inner_state: Any, masks: tuple[masking.Leaves, masking.Leaves]) -> Any:
      old, new = (loaded(each, leaves) for each in masks)
      grown = {path: new[path] & ~old[path] for path in new}
      return optimizing.restarted(optimizer, inner_state, params, grown)

    if optimizer is not None:
      inner_state, rests = state.inner_state, False
      if regrow is not None:
        exchanging = due & (micro_step.step > 1)
        rests = exchanging if regrow.skip_step else False
        if restarts:
          inner_state = _control.maybe(exchanging, without_grown, inner_state, (old, masks))
      kept = loaded(masks, leaves) if sparse_gradients else {}
      updates, inner_state = optimizing.updates(
        optimizer, updates, inner_state, params, extra_args, kept, rests
      )
      state = state._replace(inner_state=inner_state)
    if straight_through:
      updates, after = _after(updates, leaves)
      masks = masker.next(old, due, micro_step._replace(params=after))
      return updates, state._replace(masks=_paths.nested(masks))

    # The update makes pruned weights zero.
    by_path = _by_path(updates)
    for path, mask in loaded(masks, leaves).items():
      update = filling.as_wide(by_path[path], leaves[path])
      by_path[path] = jnp.where(mask, update, -leaves[path].astype(update.dtype))
    updates = jax.tree.unflatten(jax.tree.structure(updates), by_path.values())
    return updates, state._replace(masks=_paths.nested(masks))

  def shocked(
    updates: optax.Updates,
    state: PruneState,
    params: optax.Params,
    masker: masking.Masker,
    micro_step: masking.MicroStep,
    extra_args: dict[str, Any],
  ) -> tuple[optax.Updates, PruneState]:
    """The updates, where a shock is due such that it fills what new masks leave out."""
    leaves, inner_state = micro_step.params, state.inner_state
    if optimizer is not None:
      updates, inner_state = optimizer.update(updates, inner_state, params, **extra_args)

    def hit(carry: tuple[Any, Any], _: Any) -> tuple[Any, Any]:
      updates, inner_state = carry
      kept = loaded(masker.next(masker.dense(leaves), True, micro_step), leaves)
      filled = filling.weights(filler, state.fill, micro_step.step, leaves)
      moved = {}
      for path, update in updates.items():
        move = filled[path].astype(update.dtype) - leaves[path].astype(update.dtype)
        moved[path] = jnp.where(kept[path], update, move)
      if optimizer is not None and restarts:
        after = {path: jnp.where(kept[path], x, filled[path]) for path, x in leaves.items()}
        new = {path: ~mask for path, mask in kept.items()}
        params_after = _paths.map_with_paths(after.get, params)
        inner_state = optimizing.restarted(optimizer, inner_state, params_after, new)
      return moved, inner_state

    by_path, due = _by_path(updates), times.due(micro_step.step)
    wide = {path: filling.as_wide(by_path[path], x) for path, x in leaves.items()}
    wide, inner_state = _control.maybe(due, hit, (wide, inner_state), ())
    updates = jax.tree.unflatten(jax.tree.structure(updates), (by_path | wide).values())
    return updates, state._replace(inner_state=inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def loaded(masks: masking.Leaves, leaves: masking.Arrays) -> masking.Leaves:
  """The stored masks of leaves."""
  return {path: masking.load(path, mask, leaves[path]) for path, mask in masks.items()}


def _check_choices(
  settings: masking.Masker,
  hold: bool,
  fill: filling.Fill,
  straight_through: bool,
  sparse_gradients: bool,
  restart: bool | None,
  inner: optax.GradientTransformation | None,
) -> None:
  """Raises if two of the choices do not go together, or one has nothing that it could change."""
  sparsity, criterion, structure = settings.sparsity, settings.criterion, settings.structure
  allocation, regrow = settings.allocation, settings.regrow
  if allocation not in allocations.NAMES:
    raise ValueError(f"allocation: expected one of {allocations.NAMES}, found {allocation!r}")
  if structure.makes_mask and (regrow is not None or allocation != "uniform"):
    raise ValueError(
      f"structure {structure}: expected no regrow and allocation='uniform', found {allocation!r}"
      f" and regrow={regrow}"
    )
  if isinstance(sparsity, str | bool) or (sparsity is None and structure.fixed_sparsity is None):
    raise ValueError(f"sparsity: expected a number, a schedule or a tree, found {sparsity!r}")
  if inner is not None and not (hasattr(inner, "init") and hasattr(inner, "update")):
    raise ValueError(
      f"inner: expected a gradient transformation, as optax.sgd(0.1), found {_checks.shown(inner)}"
    )
  if not hold and (regrow is not None or straight_through):
    raise ValueError("hold=False: expected neither regrow nor straight_through")
  if allocation != "uniform" and sparsities.is_tree(sparsity):
    raise ValueError(f"allocation {allocation!r}: expected one sparsity, found a tree")
  for reader in [criterion, *([regrow.grow] if regrow else [])]:
    if reader.needs_grads and inner is None:
      raise ValueError(
        f"{reader.name} reads gradients, which do not reach the end of a chain: expected"
        " prune(..., inner=optimizer), found inner=None"
      )
  if settings.normalize and allocation != "global":
    raise ValueError(f"normalize: expected allocation='global', found {allocation!r}")
  if hold and (fill.keep, fill.fresh) != (0, 0):
    raise ValueError("fill: expected hold=False, or 'zero', since pruned weights are held at 0")
  if sparse_gradients and (inner is None or not hold or straight_through):
    raise ValueError(
      "sparse_gradients: expected prune(..., inner=optimizer) with masks that hold, found"
      f" {'no inner' if inner is None else 'inner'}, hold={hold},"
      f" straight_through={straight_through}"
    )
  if restart and inner is None:
    raise ValueError("restart=True: expected prune(..., inner=optimizer), found inner=None")


def _pruned_leaves(params: Any, where: Callable[[str, Any], bool]) -> masking.Leaves:
  """The leaves that `where` selects, by path.

  Raises:
    ValueError: If there is none.
  """
  by_path = _by_path(params)
  leaves = {path: x for path, x in by_path.items() if where(_paths.join(path), x)}
  if not leaves:
    raise ValueError(
      f"where selects no leaf: expected at least one of {_paths.listed(by_path)} to be prunable,"
      " found none"
    )
  return leaves


def _by_path(tree: Any) -> dict[_paths.Path, Any]:
  """The leaves of a tree by path, in order."""
  return {
    path: x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)
    for path, x in _paths.flatten_with_paths(tree)
  }


def _no_memory(leaf: jax.Array | None) -> Any:
  """What a criterion remembers of a leaf to begin with; nothing of one that is not pruned."""
  if leaf is None:
    return optax.MaskedNode()
  return jnp.zeros_like(leaf, jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32)


def _after(updates: Any, leaves: masking.Arrays) -> tuple[Any, masking.Leaves]:
  """The updates, and what `optax.apply_updates` will make of these leaves."""
  # Behind the barrier the updates are numbers, not a formula of which the compiler may make
  # something else, rounded in another way, here than where they are applied.
  updates = jax.lax.optimization_barrier(updates)
  by_path = _by_path(updates)
  with jax.numpy_dtype_promotion("standard"):
    return updates, {path: (x + by_path[path]).astype(x.dtype) for path, x in leaves.items()}
