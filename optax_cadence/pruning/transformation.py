"""The transformation: masks when they are due, and updates that keep the pruned weights at zero."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cadence import _paths
from optax_cadence.pruning import allocation as allocations
from optax_cadence.pruning import criterion as criteria
from optax_cadence.pruning import masking
from optax_cadence.pruning import schedule as schedules
from optax_cadence.pruning import sparsity as sparsities
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
  scores, shape = criteria.as_criterion(criterion), structures.as_structure(structure)
  _check_choices(sparsity, shape, allocation, regrow, hold, straight_through)
  if inner is None:
    _check_reads_no_gradient([scores, *([regrow.grow] if regrow else [])])
  self = _Prune(
    sparsity,
    schedules.as_times(every),
    masking.Masker(
      criterion=scores,
      structure=shape,
      allocation=allocation,
      regrow=regrow,
      # A mask that holds never gives a weight back.
      sticky=hold and not straight_through and regrow is None,
      packed=packed,
    ),
    hold,
    straight_through,
    where,
    None if inner is None else optax.with_extra_args_support(inner),
  )
  return optax.GradientTransformationExtraArgs(self.init, self.update)


def _check_choices(
  sparsity: Any,
  structure: structures.Structure,
  allocation: str,
  regrow: Regrowth | None,
  hold: bool,
  straight_through: bool,
) -> None:
  """Raises if two of the choices do not go together."""
  if allocation not in allocations.NAMES:
    raise ValueError(f"allocation: expected one of {allocations.NAMES}, found {allocation!r}")
  if not structure.counted and (regrow is not None or allocation != "uniform"):
    raise ValueError(
      f"structure {structure}: expected no regrow and allocation='uniform', found {allocation!r}"
      f" and regrow={regrow}"
    )
  if sparsity is None and structure.stated is None:
    raise ValueError("sparsity: expected a number, a schedule or a tree, found None")
  if not hold and (regrow is not None or straight_through):
    raise ValueError("hold=False: expected neither regrow nor straight_through")
  if allocation != "uniform" and sparsities.is_tree(sparsity):
    raise ValueError(f"allocation {allocation!r}: expected one sparsity, found a tree")


def _check_reads_no_gradient(read: list[criteria.Criterion]) -> None:
  for criterion in read:
    if criterion.reads_grads:
      raise ValueError(
        f"{criterion.name} reads gradients, which do not reach the end of a chain: expected"
        " prune(..., inner=optimizer), found inner=None"
      )


@dataclasses.dataclass(frozen=True)
class _Prune:
  """The settings, and the two functions."""

  sparsity: Any
  times: Any
  masker: masking.Masker
  hold: bool
  straight_through: bool
  where: Callable[[str, Any], bool]
  inner: optax.GradientTransformationExtraArgs | None

  def init(self, params: optax.Params) -> PruneState:
    inner_state = optax.EmptyState() if self.inner is None else self.inner.init(params)
    if type(params).__name__ == "_ParamsPlaceholder":
      return PruneState(jnp.int32(0), jnp.int32(0), jnp.int32(0), inner_state)  # type: ignore[arg-type]
    leaves, masker = self._leaves(params), self.masker
    asked = sparsities.resolve(self.sparsity, masker.structure, params, leaves)
    for path, leaf in leaves.items():
      masker.structure.check_named(path, np.shape(leaf))
      sparsities.check(path, asked[path], self.times, masker.sticky)
    remembered = leaves if masker.criterion.remembers else {}
    memory = {path: jnp.zeros(x.shape, jnp.float32) for path, x in remembered.items()}
    return PruneState(jnp.int32(0), masker.dense(leaves) if self.hold else {}, memory, inner_state)

  def update(
    self, updates: optax.Updates, state: PruneState, params: Any = None, **extra_args: Any
  ) -> tuple[optax.Updates, PruneState]:
    if params is None:
      raise ValueError("prune needs the parameters: expected params, found None")
    _paths.check_same("gradient", "as the parameters have", params, updates)
    leaves, masker = self._leaves(params), self.masker
    grads, memory, inner_state = None, state.memory, state.inner_state
    if self.inner is not None:
      grads = {path: g for path, g in _by_path(updates).items() if path in leaves}
      memory = {path: m - _product(grads[path], leaves[path]) for path, m in memory.items()}
      updates, inner_state = self.inner.update(updates, inner_state, params, **extra_args)
    masks = state.masks if self.hold else masker.dense(leaves)
    if set(masks) != set(leaves):
      raise ValueError(
        f"state: expected masks of {', '.join(map(repr, leaves))}, found {', '.join(masks)}"
      )
    step = optax.safe_increment(state.step)
    asked = sparsities.resolve(self.sparsity, masker.structure, params, leaves)
    seen = masking.Seen(leaves, grads, memory, step)
    masks = masker.next(masks, self.times.due(step), asked, seen)
    new = PruneState(step, masks if self.hold else {}, memory, inner_state)
    if self.straight_through:
      return updates, new
    kept = {path: masker.read(path, mask, leaves[path].shape) for path, mask in masks.items()}
    flat = [
      _zeroed(x, leaves[path], kept[path]) if path in kept else x
      for path, x in _by_path(updates).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(updates), flat), new

  def _leaves(self, params: Any) -> dict[str, jax.Array]:
    found = _by_path(params)
    leaves = {path: x for path, x in found.items() if self.where(path, x)}
    if not leaves:
      raise ValueError(
        f"where selects no leaf: expected at least one of {', '.join(map(repr, found))} to be"
        " prunable, found none"
      )
    return leaves


def _product(grad: jax.Array, param: jax.Array) -> jax.Array:
  return grad.astype(jnp.float32) * param.astype(jnp.float32)


def _zeroed(update: jax.Array, param: jax.Array, kept: jax.Array) -> jax.Array:
  """The update, and `-param` where nothing is kept."""
  with jax.numpy_dtype_promotion("standard"):
    # As wide as the parameter, or `param - param` would not be zero.
    dtype = jnp.promote_types(update.dtype, param.dtype)
  return jnp.where(kept, update.astype(dtype), -param.astype(dtype))


def _by_path(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by path, in order."""
  paths = [_paths.join(path) for path, _ in _paths.flatten_with_paths(tree)]
  return {
    path: x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)
    for path, x in zip(paths, jax.tree.leaves(tree), strict=True)
  }
