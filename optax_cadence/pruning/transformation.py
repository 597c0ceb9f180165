"""The transformation: masks when they are due, and updates that keep the pruned weights at zero."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _checks
from optax_cadence import _paths
from optax_cadence.pruning import allocation as allocations
from optax_cadence.pruning import criterion as criteria
from optax_cadence.pruning import masking
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
    memory: What a criterion that remembers has summed up of each pruned leaf, in float32 or wider,
      in a tree like the parameters, in which the other leaves are `MaskedNode`; else empty.
    inner_state: State of the inner optimizer.

  For `optax.tree_utils.tree_map_params`, memory and inner state follow the parameters. Masks do
  not: they are no numbers to be cast, averaged or cleared, and packed they have another shape. They
  are one field, for which `transform_non_params` is called once.
  """

  step: jax.Array
  masks: Any
  memory: Any
  inner_state: optax.OptState


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
  stacked: Callable[[str, Any], bool] | None = None,
  packed: bool = True,
  inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Prunes while training: for a pruned entry the update is `-param`, so that it becomes 0.

  Stands last in a chain, or around an optimizer given as `inner`, whose gradients it then
  sees. At a micro-step at which new masks are due, they are made from `params` as they are
  before the update; the update then makes what they leave out zero.

  Args:
    sparsity: Share of the units (weights, blocks, channels) that is pruned: a number, a traced
      scalar, a schedule `micro_step -> sparsity`, or a tree prefix of the parameters (or an
      `oc.by_path`) of these. A traced one is a float32. None with `NM`, which implies it.
    every: When new masks are due: an integer, `pruning.Times`, `once`, `every_epoch`, or a
      function `micro_step -> bool`. Micro-steps are counted 1, 2, …
    criterion: `"magnitude"`, `"saliency"`, `pruning.random(key)`, `pruning.movement()` or
      a function `(param, grad) -> scores`, where `grad` is None without `inner`.
    structure: `pruning.Unstructured()`, `NM`, `Block`, `Channel`, or a function
      `(scores, sparsity) -> mask`.
    allocation: `"uniform"`, `"erdos_renyi"`, `"erk"`, or `"global"` over all leaves.
    regrow: `pruning.by_gradient(...)` or `pruning.at_random(...)`: the first mask is drawn at
      micro-step 1, and then as many weights grow as are dropped by the criterion.
    hold: Whether pruned weights stay 0. False: a shock, after which they come back.
    straight_through: Leaves the weights dense; the loss reads `pruning.masked(params, state)`.
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
  criterion = criteria.as_criterion(criterion)
  structure = structures.as_structure(structure)
  times = schedules.as_times(every)
  _check_choices(sparsity, criterion, structure, allocation, regrow, hold, straight_through, inner)
  optimizer = None if inner is None else optax.with_extra_args_support(inner)
  permanent = hold and not straight_through and regrow is None
  settings = masking.Masker(criterion, structure, allocation, regrow, permanent, packed)
  stacked = stacked or getattr(where, "stacked", None) or (lambda path, param: False)

  def masker_of(params: Any, leaves: masking.Leaves) -> masking.Masker:
    return settings.on(
      params, leaves, [path for path, x in leaves.items() if stacked(_paths.join(path), x)]
    )

  def init_fn(params: optax.Params) -> PruneState:
    inner_state = optax.EmptyState() if optimizer is None else optimizer.init(params)
    # With a placeholder `optax.tree_utils.tree_map_params` asks which parts of the state are
    # trees of parameters.
    if type(params).__name__ == "_ParamsPlaceholder":
      memory = params if criterion.remembers else {}
      return PruneState(jnp.int32(0), jnp.int32(0) if hold else {}, memory, inner_state)
    leaves = _pruned_leaves(params, where)
    masker = masker_of(params, leaves)
    asked = sparsities.by_leaf(sparsity, structure, params, leaves)
    # Of leaves with the same sparsity the first stands for all.
    for path in {id(asked[path]): path for path in reversed(leaves)}.values():
      implied = structure.fixed_sparsity
      sparsities.check(_paths.join(path), asked[path], times, not permanent, implied)
    if inner is None:
      for reader in [criterion, *([regrow.first, regrow.grow] if regrow else [])]:
        criteria.check_needs_no_gradient(reader, next(iter(leaves.values())))
    memory = {}
    if criterion.remembers:
      slots = [
        jnp.zeros(x.shape, _memory_dtype(x)) if path in leaves else optax.MaskedNode()
        for path, x in _by_path(params).items()
      ]
      memory = jax.tree.unflatten(jax.tree.structure(params), slots)
    masks = masking.nested(masker.dense(leaves)) if hold else {}
    return PruneState(jnp.int32(0), masks, memory, inner_state)

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
    grads, memory, inner_state = None, masking.by_path(state.memory), state.inner_state
    if optimizer is not None:
      grads = {path: g for path, g in _by_path(updates).items() if path in leaves}
      memory = {
        path: _remembered(total, grads[path], leaves[path]) for path, total in memory.items()
      }
      updates, inner_state = optimizer.update(updates, inner_state, params, **extra_args)

    # New masks where they are due, else the old ones; a shock starts from dense ones.
    masks = masking.by_path(state.masks) if hold else masker.dense(leaves)
    if set(masks) != set(leaves):
      raise ValueError(
        f"state: expected masks of {_paths.listed(leaves)}, found {_paths.listed(masks)}"
      )
    asked = sparsities.by_leaf(sparsity, structure, params, leaves)
    micro_step = masking.MicroStep(step, leaves, grads, memory)
    masks = masker.next(masks, times.due(step), asked, micro_step)
    remembered = jax.tree.unflatten(jax.tree.structure(state.memory), memory.values())
    kept = masking.nested(masks) if hold else {}
    state = PruneState(step, kept, remembered, inner_state)

    # The update makes pruned weights zero.
    if straight_through:
      return updates, state
    by_path = _by_path(updates)
    for path, mask in masks.items():
      weights = masking.load(path, mask, leaves[path].shape)
      by_path[path] = _zeroed(by_path[path], leaves[path], weights)
    return jax.tree.unflatten(jax.tree.structure(updates), by_path.values()), state

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
    if reader.reads_grads and inner is None:
      raise ValueError(
        f"{reader.name} reads gradients, which do not reach the end of a chain: expected"
        " prune(..., inner=optimizer), found inner=None"
      )


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


def _remembered(total: jax.Array, grad: jax.Array, param: jax.Array) -> jax.Array:
  """The sum of `-grad * param` with another term, but for what of that is not finite.

  A sum would never be rid of it, and a cadence inside leaves such a micro-batch out as well.
  """
  term = grad.astype(total.dtype) * param.astype(total.dtype)
  return total - jnp.where(jnp.isfinite(term), term, jnp.zeros_like(term))


def _zeroed(update: jax.Array, param: jax.Array, kept: jax.Array) -> jax.Array:
  """The update, and `-param` where the weight is not kept."""
  with jax.numpy_dtype_promotion("standard"):
    # As wide as the parameter, or `param - param` would not be zero.
    dtype = jnp.promote_types(update.dtype, param.dtype)
  return jnp.where(kept, update.astype(dtype), -param.astype(dtype))
