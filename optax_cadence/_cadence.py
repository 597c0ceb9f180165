"""The transformation: the settings of a cadence and the functions Optax calls.

What happens at a micro-step is in `_step`; here is what it is given.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _control
from optax_cadence import _firing
from optax_cadence import _layout
from optax_cadence import _masks
from optax_cadence import _moves
from optax_cadence import _paths
from optax_cadence import _regions
from optax_cadence import _schedules
from optax_cadence import _shared
from optax_cadence import _split
from optax_cadence import _statistics
from optax_cadence import _step
from optax_cadence import _windows
from optax_cadence._policy import Policy
from optax_cadence._state import CadenceState
from optax_cadence._state import ConfidenceState
from optax_cadence._state import GroupState


class CadenceTransformation(optax.GradientTransformationExtraArgs):
  """A `GradientTransformationExtraArgs` with the methods of a cadence.

  It is the same pair of functions as any other; `apply`, `flush` and `cycle` are found
  through the object whose methods they are, and so survive whatever rebuilds the pair.
  """

  @property
  def apply(self) -> Callable[..., tuple[optax.Params, Any]]:
    """`apply(params, state, grads, phase=None, **extra_args) -> params, state`.

    Update and apply in one. Parameters and inner state of regions that are not due are
    neither read nor written. Arguments stand in the order of the results, so that
    `jax.jit(tx.apply, donate_argnums=(0, 1))` updates every buffer in place.
    """
    return _owner(self).apply

  @property
  def flush(self) -> Callable[..., tuple[optax.Updates, Any]]:
    """`flush(state, params, **extra_args) -> updates, state`.

    Applies every window that is not empty, so that nothing is lost at the end of
    training. Like `update`, it is meant to be called under `jax.jit`.
    """
    return _owner(self).flush

  @property
  def cycle(self) -> int | None:
    """Micro-steps after which the schedule repeats; None when a period is dynamic."""
    return of(self).cycle


def cadence(
  inner: optax.GradientTransformation,
  every: Any,
  *,
  accumulate: Literal["mean", "sum", "latest"] = "mean",
  accumulator_dtype: Any = None,
  nonfinite: Literal["propagate", "skip"] = "propagate",
  clock: Literal["updates", "micro_steps"] = "updates",
) -> CadenceTransformation:
  r"""Lets every part of the parameters accumulate gradients over its own period.

  A region with period :math:`k` is due at micro-steps :math:`t = k, 2k, \dots` and
  hands `inner` the mean gradient of its window; in between its update is exactly zero
  and nothing of its inner state changes. All regions with the same cadence form a
  group, and each group behaves as if `optax.MultiSteps(inner, k)` trained it alone.

  Args:
    inner: The optimizer that every group has an instance of.
    every: A tree prefix of the parameters whose leaves are cadences, matched by key
      path, or a callable from parameters to one. A cadence is an integer, an `Every`,
      a `Grid` (`channels`, `quadrants`, `stacked`), an integer mask that broadcasts
      against the leaf, a schedule `micro_steps_done -> period`, a traced integer, or a
      policy (`until_certain`, `as_settled`), which decides from the gradients.
      One schedule for the whole tree is `Every(schedule)`.
    accumulate: `"mean"` or `"sum"` of the gradients in a window, or `"latest"`, the
      last one alone, for which no accumulator is allocated.
    accumulator_dtype: Dtype of the accumulators; by default that of the parameters,
      but at least float32.
    nonfinite: `"propagate"`: a NaN reaches the update of its own window and no other.
      `"skip"`: a micro-batch with a NaN or an infinity in a region is left out of
      that region's window and counted in `skipped`; a window left with none does not
      fire. Needs an `inner` that `optax.tree_utils.tree_map_params` understands.
    clock: What a learning-rate schedule in `inner` counts: `"updates"` of its group, as
      in `optax.MultiSteps`, or `"micro_steps"` of the whole run. Adam's own counter
      always counts updates.

  Returns:
    A `CadenceTransformation`: `init` and `update` as in Optax, where `update` takes
    `phase`, a Python int that is t modulo `cycle`, so that what is due is known while
    tracing; besides them `apply`, `flush` and `cycle`.

  Raises:
    ValueError: For a bad argument, at construction, `init` or while tracing; it names
      the parameter's path, what was found and what was expected.

  References:
    Hermans et al. 2017, accumulated gradient normalization, arXiv:1710.02368.

  >>> import jax.numpy as jnp, optax, optax_cadence as oc
  >>> params = {"body": jnp.zeros(2), "head": jnp.zeros(2)}
  >>> tx = oc.cadence(optax.sgd(1.0), {"body": 2, "head": 1})
  >>> state = tx.init(params)
  >>> for _ in range(2):
  ...   updates, state = tx.update({"body": jnp.ones(2), "head": jnp.ones(2)}, state)
  ...   print(updates["body"], updates["head"])
  [0. 0.] [-1. -1.]
  [-1. -1.] [-1. -1.]
  """
  self = Cadence(inner, every, accumulate, accumulator_dtype, nonfinite, clock)
  return CadenceTransformation(self.init, self.update)


def of(tx: Any) -> "Cadence":
  """The cadence behind a transformation.

  Raises:
    ValueError: If there is none.
  """
  if not isinstance(tx, CadenceTransformation):
    raise ValueError(f"expected a cadence, or an oc.chain that ends in one, found {tx!r}")
  return _owner(tx).cadence


def check_transformation(name: str, tx: Any) -> None:
  """Raises `ValueError` unless `tx` is a gradient transformation."""
  if not (hasattr(tx, "init") and hasattr(tx, "update")):
    raise ValueError(f"{name} must be an optax.GradientTransformation, found {tx!r}")


def _owner(tx: CadenceTransformation) -> Any:
  return getattr(tx.init, "__self__")  # noqa: B009 (no type checker knows that it is a method)


class Cadence:
  """The settings of a cadence, and the four functions that make the transformation."""

  def __init__(
    self,
    inner: optax.GradientTransformation,
    every: Any,
    accumulate: str,
    accumulator_dtype: Any,
    nonfinite: str,
    clock: str,
  ):
    check_transformation("inner", inner)
    _one_of("accumulate", accumulate, ("mean", "sum", "latest"))
    _one_of("nonfinite", nonfinite, ("propagate", "skip"))
    _one_of("clock", clock, ("updates", "micro_steps"))
    _check_float("accumulator_dtype", accumulator_dtype)
    self.accumulate = accumulate
    if not callable(every):
      self._check_policies(_layout.everys(every))
    self.inner = optax.with_extra_args_support(inner)
    self.every = every
    self.accumulator_dtype = accumulator_dtype
    self.skip = nonfinite == "skip"
    self.clock = clock
    # Of the last tree, for where no parameters are at hand.
    self._seen: _layout.Layout | None = None

  @property
  def cadence(self) -> "Cadence":
    """This cadence; an `oc.chain` has the one that stands last."""
    return self

  @property
  def cycle(self) -> int | None:
    """Least common multiple of the periods; None when one is dynamic."""
    if not callable(self.every):
      return _schedules.cycle(_layout.everys(self.every))
    groups = self._layout_seen("the cycle of a callable every").groups
    return _schedules.cycle(group.every for group in groups)

  def layout(self, params: Any) -> _layout.Layout:
    """The groups of parameters, as the state has them; only shapes and dtypes are read."""
    layout = self._cut(params)
    if self.accumulate != "latest":
      leaves = layout.avals(_dtypes(params))
      if not self.skip:
        layout = layout.recut(_shared.provable(self.inner, layout, leaves), _regions.shared)
      layout = layout.recut(_split.provable(self.inner, layout, leaves), _regions.split)
    self._seen = layout
    return layout

  def _cut(self, tree: Any) -> _layout.Layout:
    """The groups of a tree, each with the entries of its own."""
    found = _layout.layout(self.every, tree)
    self._check_policies(group.every for group in found.groups)
    return found

  def _check_policies(self, everys: Iterable[_schedules.Every]) -> None:
    """Raises where a policy has no accumulator to judge."""
    for every in everys:
      if every.policy is not None and self.accumulate == "latest":
        raise ValueError(
          f'{every}: a policy needs the sum of its window, expected accumulate="mean" or "sum",'
          ' found "latest"'
        )

  def accumulates(self, every: _schedules.Every) -> bool:
    """Whether groups with this cadence have accumulators."""
    return self.accumulate != "latest" and not every.always

  def sum_dtype(self, dtype: Any) -> Any:
    """Dtype of the accumulator of a parameter."""
    return _windows.accumulator_dtype(dtype, self.accumulator_dtype)

  def init(self, params: optax.Params) -> CadenceState:
    if isinstance(params, optax.LookaheadParams):
      raise ValueError(
        "expected parameters as the gradients are shaped, found LookaheadParams; put the cadence"
        " inside: optax.lookahead(oc.cadence(...), ...)"
      )
    if _is_placeholder(params):
      return self._init_placeholder(params)
    layout, leaves, groups = self.layout(params), _layout.leaves(params), []
    for group in layout.groups:
      tensors = group.take(leaves)
      sums = [jnp.zeros(x.shape, self.sum_dtype(x.dtype)) for x in tensors]
      trees = layout.tree(group, tensors), layout.tree(group, sums)
      path = layout.paths[group.leaves[0]]
      _layout.named(path, _schedules.Every.first_window, group.every)
      groups.append(self._init_group(group, layout.regions(group), tensors, *trees))
    shared = []
    for mask in _masks.shared(layout):
      leaf = leaves[mask.leaf]
      shared.append(_shared.init(self.inner, layout, mask, leaf, self.sum_dtype(leaf.dtype)))
    return CadenceState(jnp.int32(0), tuple(groups), tuple(shared))

  def update(
    self,
    grads: optax.Updates,
    state: CadenceState,
    params: optax.Params | None = None,
    *,
    phase: int | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, CadenceState]:
    firing, leaves = self._firing(grads, state, params, extra_args), _layout.leaves(grads)
    zeros = {i: jnp.zeros_like(g) for i, g in leaves.items()}
    updates, state = _step.advance(firing, leaves, state, zeros, self._phase(phase))
    return jax.tree.unflatten(jax.tree.structure(grads), updates.values()), state

  def apply(
    self,
    params: optax.Params,
    state: CadenceState,
    grads: optax.Updates,
    phase: int | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Params, CadenceState]:
    _check_given("apply", params, needed=bool(jax.tree.leaves(grads)))
    firing = self._firing(grads, state, params, extra_args, in_place=True)
    given, targets = _layout.leaves(grads), _layout.leaves(params)
    leaves, state = _step.advance(firing, given, state, targets, self._phase(phase))
    return jax.tree.unflatten(jax.tree.structure(params), leaves.values()), state

  def flush(
    self, state: CadenceState, params: optax.Params, **extra_args: Any
  ) -> tuple[optax.Updates, CadenceState]:
    _check_given("flush", params, needed=getattr(state, "groups", None) != ())
    firing = self._firing(params, state, params, extra_args)
    zeros = {i: jnp.zeros_like(p) for i, p in _layout.leaves(params).items()}
    updates, state = _step.flush(firing, state, zeros)
    return jax.tree.unflatten(jax.tree.structure(params), updates.values()), state

  def _firing(
    self,
    grads: Any,
    state: CadenceState,
    params: Any,
    extra_args: dict[str, Any],
    in_place: bool = False,
  ) -> _firing.Firing:
    if params is not None:
      _paths.check_same("gradient", "as the parameters have", params, grads)
    layout = self._cut(grads)
    self._check_state(layout, state)
    layout = layout.recut(_shared.leaves_of(layout, state.shared), _regions.shared)
    dtypes, split = _dtypes(grads), _split.leaves_of(layout, state.groups)
    if split and extra_args:
      _split.check(self.inner, layout, split, layout.avals(dtypes), extra_args)
    self._seen = layout = layout.recut(split, _regions.split)
    return _firing.Firing(
      inner=self.inner,
      layout=layout,
      dtypes=dtypes,
      param_dtypes=None if params is None else _dtypes(params),
      params=None if params is None or in_place else _layout.leaves(params),
      extra_args=extra_args,
      in_place=in_place,
      sums=self.accumulate == "sum",
      set_schedules=self.clock == "micro_steps",
    )

  def _check_state(self, layout: _layout.Layout, state: Any) -> None:
    """Raises unless the state has the groups of this tree."""
    if not isinstance(state, CadenceState):
      raise ValueError(f"state: expected a CadenceState, found {type(state).__name__}")
    needs = [self._needs(group.every) for group in layout.groups]
    holds = [_holds(group) for group in state.groups]
    if needs != holds:
      raise ValueError(
        f"state: expected {len(needs)} groups as every makes of this tree, found"
        f" {len(holds)}, or the same number that accumulate or skip otherwise; a state goes with"
        " the cadences and settings it was made for"
      )

  def _needs(self, every: _schedules.Every) -> tuple[bool, ...]:
    """Which of accumulators, window, remaining, skipped and confidence a group has."""
    accumulates = self.accumulates(every)
    return accumulates, accumulates, not every.always, self.skip, every.policy is not None

  def _phase(self, phase: Any) -> int | None:
    return None if phase is None else _schedules.checked_phase(phase, self.cycle)

  def _init_group(
    self, group: _layout.Group, regions: Any, tensors: list[jax.Array], params: Any, sums: Any
  ) -> GroupState:
    every, n = group.every, len(tensors)
    accumulates = self.accumulates(every)
    return GroupState(
      inner_state=self.inner.init(params),
      accumulators=sums if accumulates else None,
      window=jnp.zeros((n,) if self.skip else (), jnp.int32) if accumulates else None,
      remaining=None if every.always else every.first_window(),
      period=jnp.int32(0) if every.policy is not None else every.first_window(),
      updates=jnp.int32(0),
      skipped=jnp.zeros((n,), jnp.int32) if self.skip else None,
      regions=regions,
      confidence=None if every.policy is None else _init_confidence(every.policy, tensors),
    )

  def _init_placeholder(self, placeholder: Any) -> CadenceState:
    # As `optax.masked` does: `tree_map_params` probes with a stand-in for the parameters.
    layout = self._layout_seen("tree_map_params")
    groups = []
    for group in layout.groups:
      tensors = [jnp.float32(0)] * len(group.tensors)
      trees = placeholder, placeholder
      groups.append(self._init_group(group, layout.regions(group), tensors, *trees))
    shared = [_shared.stand_in(self.inner, placeholder)] * len(_masks.shared(layout))
    return CadenceState(jnp.int32(0), tuple(groups), tuple(shared))

  def _layout_seen(self, what: str) -> _layout.Layout:
    if self._seen is None:
      raise ValueError(
        f"{what} depends on the parameters: call tx.init(params) first (or"
        " jax.eval_shape(tx.init, params), which allocates nothing)"
      )
    return self._seen


def _dtypes(tree: Any) -> dict[int, Any]:
  return dict(enumerate(map(jax.dtypes.result_type, jax.tree.leaves(tree))))


def _holds(group: GroupState) -> tuple[bool, ...]:
  """Which of accumulators, window, remaining, skipped and confidence are there."""
  fields = group.accumulators, group.window, group.remaining, group.skipped, group.confidence
  return tuple(field is not None for field in fields)


def _init_confidence(policy: Policy, tensors: list[jax.Array]) -> ConfidenceState:
  n, remembered = len(tensors), jax.tree.map(jnp.asarray, policy.init())
  return ConfidenceState(
    squares=jnp.zeros(n, jnp.float32) if policy.reads_gradients else None,
    estimate=_statistics.no_estimate(n) if policy.reads_gradients else None,
    sample=_moves.nothing_seen(tensors) if policy.reads_updates else None,
    policy=_control.cast_like(remembered, remembered),
  )


def _is_placeholder(tree: Any) -> bool:
  # By name: the class is private to Optax, the way it is used is not.
  return type(tree).__name__ == "_ParamsPlaceholder"


def _one_of(name: str, value: Any, options: tuple[str, ...]) -> None:
  if value not in options:
    raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, found {value!r}")


def _check_float(name: str, dtype: Any) -> None:
  try:
    known = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
  except TypeError:
    known = False
  if not known:
    raise ValueError(f"{name} must be a float dtype, found {dtype!r}")


def _check_given(method: str, params: Any, needed: bool) -> None:
  if params is None and needed:
    raise ValueError(f"{method} needs the parameters: expected params, found None")
