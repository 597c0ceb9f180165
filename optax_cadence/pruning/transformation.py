"""The transformation: masks when they are due, and updates that keep the pruned weights at zero."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _checks
from optax_cadence import _control
from optax_cadence import _paths
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
  times = schedules.as_times(every)
  filler = filling.as_fill(fill)
  _check_choices(sparsity, criterion, structure, allocation, regrow, hold, straight_through, inner)
  _check_companions(
    allocation, normalize, hold, filler, straight_through, sparse_gradients, restart, inner
  )
  optimizer = None
  if inner is not None:
    extended = optax.with_extra_args_support(inner)
    optimizer = optimizing.Optimizer(extended, sparse_gradients, restarts=restart is not False)
  permanent = hold and not straight_through and regrow is None
  settings = masking.Masker(criterion, structure, allocation, regrow, permanent, packed, normalize)
  stacked = stacked or getattr(where, "stacked", None) or (lambda path, param: False)

  def masker_of(params: Any, leaves: masking.Arrays) -> masking.Masker:
    return settings.on(
      params, leaves, [path for path, x in leaves.items() if stacked(_paths.join(path), x)]
    )

  def init_fn(params: optax.Params) -> PruneState:
    inner_state = optax.EmptyState() if optimizer is None else optimizer.inner.init(params)
    # With a placeholder `optax.tree_utils.tree_map_params` asks which parts of the state are
    # trees of parameters.
    if type(params).__name__ == "_ParamsPlaceholder":
      memory = params if criterion.remembers else {}
      drawing = () if hold else filling.stand_in(filler)
      return PruneState(jnp.int32(0), jnp.int32(0) if hold else {}, memory, inner_state, drawing)
    leaves = _pruned_leaves(params, where)
    masker = masker_of(params, leaves)
    asked = sparsities.by_leaf(sparsity, structure, params, leaves)
    # Of leaves with the same sparsity the first stands for all.
    for path in {id(asked[path]): path for path in reversed(leaves)}.values():
      implied = structure.fixed_sparsity
      sparsities.check(_paths.join(path), asked[path], times, not permanent, implied)
    if inner is None:
      for reader in [criterion, *([regrow.first, regrow.grow] if regrow else [])]:
        criteria.check_needs_no_gradient(reader, next(iter(leaves.values())), inner)
    memory = {}
    if criterion.remembers:
      slots = [
        jnp.zeros(x.shape, _memory_dtype(x)) if path in leaves else optax.MaskedNode()
        for path, x in _by_path(params).items()
      ]
      memory = jax.tree.unflatten(jax.tree.structure(params), slots)
    masks = masking.nested(first_masks(masker, leaves, asked)) if hold else {}
    drawing = () if hold else filling.init(filler, leaves)
    return PruneState(jnp.int32(0), masks, memory, inner_state, drawing)

  def first_masks(
    masker: masking.Masker, leaves: masking.Leaves, asked: dict[_paths.Path, Any]
  ) -> masking.Leaves:
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
    return masker.first(dense, due, asked, masking.MicroStep(jnp.int32(step), leaves, None, {}))

  def update_fn(
    updates: optax.Updates, state: PruneState, params: Any = None, **extra_args: Any
  ) -> tuple[optax.Updates, PruneState]:
    if params is None:
      raise ValueError("prune needs the parameters: expected params, found None")
    _paths.check_same("gradient", "as the parameters have", params, updates)
    step = optax.safe_increment(state.step)
    leaves = _pruned_leaves(params, where)
    masker = masker_of(params, leaves)

    # The gradients are read before the inner optimizer turns them into updates.
    grads, memory = None, masking.by_path(state.memory)
    if optimizer is not None:
      grads = {path: g for path, g in _by_path(updates).items() if path in leaves}
      memory = {
        path: criterion.remember(old, leaves[path], grads[path]) for path, old in memory.items()
      }
    asked, due = sparsities.by_leaf(sparsity, structure, params, leaves), times.due(step)
    given = criteria.given(criterion, leaves, extra_args)
    micro_step = masking.MicroStep(step, leaves, grads, given or memory)
    remembered = jax.tree.unflatten(jax.tree.structure(state.memory), memory.values())

    state = PruneState(step, state.masks, remembered, state.inner_state, state.fill)
    if not hold:
      if optimizer is not None:
        updates, inner_state = optimizer.update(updates, state.inner_state, params, {}, extra_args)
        state = state._replace(inner_state=inner_state)
      return shocked(updates, state, params, due, asked, micro_step)

    # New masks where they are due, else the old ones.
    masks = masking.by_path(state.masks)
    if set(masks) != set(leaves):
      raise ValueError(
        f"state: expected masks of {_paths.listed(leaves)}, found {_paths.listed(masks)}"
      )
    if not straight_through:
      masks = masker.next(masks, due, asked, micro_step)
    if optimizer is not None:
      exchanging = due & (step > 1) if regrow else False
      updates, inner_state = optimized(updates, state, params, masks, extra_args, exchanging)
      state = state._replace(inner_state=inner_state)
    if straight_through:
      updates, after = _after(updates, leaves)
      masks = masker.next(masks, due, asked, micro_step._replace(params=after))
      return updates, state._replace(masks=masking.nested(masks))

    # The update makes pruned weights zero.
    by_path = _by_path(updates)
    for path, mask in masks.items():
      weights = masking.load(path, mask, leaves[path].shape)
      by_path[path] = _zeroed(by_path[path], leaves[path], weights)
    updates = jax.tree.unflatten(jax.tree.structure(updates), by_path.values())
    return updates, state._replace(masks=masking.nested(masks))

  def loaded(masks: masking.Leaves, leaves: masking.Arrays) -> masking.Leaves:
    return {path: masking.load(path, mask, leaves[path].shape) for path, mask in masks.items()}

  def optimized(
    updates: optax.Updates,
    state: PruneState,
    params: optax.Params,
    masks: masking.Leaves,
    extra_args: dict[str, Any],
    exchanging: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    """What the inner optimizer makes of gradients under new masks, and its state."""
    assert optimizer is not None
    leaves, inner_state = _pruned_leaves(params, where), state.inner_state
    if regrow is not None and optimizer.restarts:

      def restarted(inner_state: Any, masks: tuple[masking.Leaves, masking.Leaves]) -> Any:
        old, new = (loaded(each, leaves) for each in masks)
        return optimizer.restarted(inner_state, params, {p: new[p] & ~old[p] for p in new})

      old = masking.by_path(state.masks)
      inner_state = _control.maybe(exchanging, restarted, inner_state, (old, masks))
    rests = exchanging if regrow is not None and regrow.skip_step else False
    kept = loaded(masks, leaves) if sparse_gradients else {}
    return optimizer.update(updates, inner_state, params, kept, extra_args, rests)

  def shocked(
    updates: optax.Updates,
    state: PruneState,
    params: optax.Params,
    due: Any,
    asked: dict[_paths.Path, Any],
    micro_step: masking.MicroStep,
  ) -> tuple[optax.Updates, PruneState]:
    """The updates, where a shock is due such that it fills what new masks leave out."""
    leaves, by_path = micro_step.params, _by_path(updates)
    masker = masker_of(params, leaves)

    def hit(carry: tuple[Any, Any], _: Any) -> tuple[Any, Any]:
      updates, inner_state = carry
      kept = loaded(masker.next(masker.dense(leaves), True, asked, micro_step), leaves)
      filled = filling.weights(filler, state.fill, micro_step.step, leaves)
      updates = {
        path: _moved(update, leaves[path], filled[path], kept[path])
        for path, update in updates.items()
      }
      if optimizer is not None:
        after = _by_path(params)
        for path, mask in kept.items():
          after[path] = jnp.where(mask, leaves[path], filled[path])
        after = jax.tree.unflatten(jax.tree.structure(params), after.values())
        inner_state = optimizer.restarted(inner_state, after, {p: ~m for p, m in kept.items()})
      return updates, inner_state

    wide = {path: filling.as_wide(by_path[path], x) for path, x in leaves.items()}
    wide, inner_state = _control.maybe(due, hit, (wide, state.inner_state), ())
    updates = jax.tree.unflatten(jax.tree.structure(updates), (by_path | wide).values())
    return updates, state._replace(inner_state=inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_choices(
  sparsity: Any,
  criterion: criteria.Criterion,
  structure: structures.Structure,
  allocation: str,
  regrow: Regrowth | None,
  hold: bool,
  straight_through: bool,
  inner: optax.GradientTransformation | None,
) -> None:
  """Raises if two of the choices do not go together."""
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


def _check_companions(
  allocation: str,
  normalize: bool,
  hold: bool,
  fill: filling.Fill,
  straight_through: bool,
  sparse_gradients: bool,
  restart: bool | None,
  inner: optax.GradientTransformation | None,
) -> None:
  """Raises if a choice has nothing that it could change."""
  if normalize and allocation != "global":
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


def _memory_dtype(param: jax.Array) -> Any:
  return jnp.float64 if param.dtype == jnp.float64 else jnp.float32


def _zeroed(update: jax.Array, param: jax.Array, kept: jax.Array) -> jax.Array:
  """The update; for a weight that is not kept, the one that makes it zero."""
  update = filling.as_wide(update, param)
  return jnp.where(kept, update, -param.astype(update.dtype))


def _moved(update: jax.Array, param: jax.Array, to: jax.Array, kept: jax.Array) -> jax.Array:
  """The update; for a weight that is not kept, the one that turns it into `to`."""
  update = filling.as_wide(update, param)
  return jnp.where(kept, update, to.astype(update.dtype) - param.astype(update.dtype))


def _after(updates: Any, leaves: masking.Leaves) -> tuple[Any, masking.Leaves]:
  """The updates, and what `optax.apply_updates` will make of these leaves."""
  # Behind the barrier the updates are numbers, not a formula of which the compiler may make
  # something else, rounded in another way, here than where they are applied.
  updates = jax.lax.optimization_barrier(updates)
  by_path = _by_path(updates)
  with jax.numpy_dtype_promotion("standard"):
    return updates, {path: (x + by_path[path]).astype(x.dtype) for path, x in leaves.items()}
