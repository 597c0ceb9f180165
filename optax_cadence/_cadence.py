"""The transformation: the settings of a cadence, their checks, and the functions Optax calls.

What happens at a micro-step is in `_step`; here is what it is given. `chain` is at the end.
"""

import dataclasses
import functools
import inspect
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _checks
from optax_cadence import _inner
from optax_cadence import _paths
from optax_cadence import _restart
from optax_cadence import _sharding
from optax_cadence import _step
from optax_cadence import _window
from optax_cadence._state import CadenceState
from optax_cadence._state import FoundState
from optax_cadence._state import GroupState
from optax_cadence._state import is_stand_in
from optax_cadence._state import per_region
from optax_cadence._state import plain
from optax_cadence._state import Regions
from optax_cadence._state import State
from optax_cadence.regions import layout as layouts
from optax_cadence.schedules import phases
from optax_cadence.schedules.every import Every
from optax_cadence.schedules.phases import Phase

_ON_TRACED = (
  ", and a period that is traced now but was a number then (as under optax.inject_hyperparams) is"
  " written Every(lambda _: period)"
)

_INSIDE = (
  "as oc.prune and growth.phase_in do, goes into it, oc.cadence(oc.prune(..., inner=optimizer), 8),"
  " or behind it by optax.chain"
)


class CadenceTransformation(optax.GradientTransformationExtraArgs):
  """A `GradientTransformationExtraArgs` with the methods of a cadence.

  It is the same pair of functions as any other; `apply`, `flush` and `cycle` are found
  through the object whose methods they are, and so survive whatever rebuilds the pair. Where
  `update` is replaced by another function (`tx._replace(update=...)`), `apply` and `flush`, which
  would not go through it, are no longer there.
  """

  @property
  def apply(self) -> Callable[..., tuple[optax.Params, Any]]:
    """`apply(params, state, grads, phase=None, **extra_args) -> params, state`.

    Update and apply in one. Parameters and inner state of regions that are not due are
    neither read nor written. Arguments stand in the order of the results, so that
    `jax.jit(tx.apply, donate_argnums=(0, 1))` updates every buffer in place.

    The `opt_state` of an `nnx.Optimizer` is taken as it is; the state comes back as `init` makes
    it, and `nnx.update(model, params)` takes the parameters.
    """
    return _owner_of_update(self, "apply").apply

  @property
  def flush(self) -> Callable[..., tuple[optax.Updates, Any]]:
    """`flush(state, params, **extra_args) -> updates, state`.

    Applies every window that is not empty, so that nothing is lost at the end of
    training. Like `update`, it is meant to be called under `jax.jit`. The `opt_state` of an
    `nnx.Optimizer` is taken as by `apply`.
    """
    return _owner_of_update(self, "flush").flush

  @property
  def cycle(self) -> int | None:
    """Micro-steps after which the schedule repeats; None when a period is dynamic.

    If `every` is a function of the parameters that does not say what periods it may give, they
    are known only with parameters: `oc.describe(tx, params).cycle`.
    """
    return of(self).cycle


def cadence(
  inner: optax.GradientTransformation | Callable[[Any], optax.GradientTransformation],
  every: Any,
  *,
  accumulate: Literal["mean", "sum", "latest"] = "mean",
  accumulator_dtype: Any = None,
  nonfinite: Literal["propagate", "skip"] = "propagate",
  clock: Literal["updates", "micro_steps"] = "updates",
  weighted: bool = False,
  skip: Callable[[optax.Updates, optax.Params | None], Any] | None = None,
  clip_norm: Any = None,
) -> CadenceTransformation:
  r"""Lets every part of the parameters accumulate gradients over its own period.

  A region with period :math:`k` is due at micro-steps :math:`t = k, 2k, \dots` and
  hands `inner` the mean gradient of its window; in between its update is exactly zero
  and nothing of its inner state changes. All regions with the same cadence form a
  group, and each group behaves as if `optax.MultiSteps(inner, k)` trained it alone.

  Args:
    inner: The optimizer that every group has an instance of; or a function that makes one of the
      length n of a group's window, so that learning rate, betas and weight decay can follow it:
      `lambda n: optax.adamw(3e-4 * n**0.5, b1=0.9**n, b2=0.999**n)`. n is the period, a Python int,
      where that is static; else the micro-steps in the window that fires, an int32 scalar that is
      traced. All must have states of one structure, that of `inner(1)`.
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
      always counts updates. A few optimizers read a schedule by such a counter: they are
      refused, and `optax.inject_hyperparams` gives them a schedule that can be set. One of
      your own has its count in an `optax.ScaleByScheduleState`.
    weighted: Whether micro-batches count by a `weight`, which `update` and `apply` then need: a
      scalar, or a tree prefix of the parameters with a scalar for each (the tokens of a
      micro-batch, those that an expert saw). The mean of a window is Σ w g / Σ w, its sum Σ w g. A
      micro-batch of weight 0 does not count, whatever its gradient holds, and a window of total
      weight 0 does not fire. A NaN is to its window what a NaN in the gradient is. Needs an `inner`
      as `nonfinite="skip"` does.
    skip: A function `(grads, params) -> bool` that says whether a micro-batch is left out, besides
      those that `nonfinite` leaves out and in the same way; what it returns may be a tree prefix of
      the parameters that says it for each.
    clip_norm: The largest norm of what all groups that are due at a micro-step hand to `inner`,
      together: more is scaled down to it. (`optax.clip_by_global_norm` inside a cadence sees one
      group at a time.) A NaN clips nothing, and an infinity everything, to zero. In `jax.shard_map`
      the norm is that of each shard.

  Returns:
    A `CadenceTransformation`: `init` and `update` as in Optax, where `update` takes
    `phase`, of `oc.phases` or a Python int that is t modulo `cycle`, so that what is due is known
    while tracing; besides them `apply`, `flush` and `cycle`.

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
  self = Cadence(
    inner, every, accumulate, accumulator_dtype, nonfinite, clock, weighted, skip, clip_norm
  )
  return CadenceTransformation(self.init, self.update)


def of(tx: Any, call: str = "") -> "Cadence":
  """The cadence behind a transformation.

  Raises:
    ValueError: If there is none; it says how the function is called that was given it.
  """
  if not isinstance(tx, CadenceTransformation):
    found = f"a {type(tx).__name__}" if hasattr(tx, "update") else _checks.shown(tx)
    raise ValueError(
      f"expected a cadence, or an oc.chain (optax.chain is none) that ends in one,"
      f" {f'as in {call}, ' if call else ''}found {found}"
    )
  return _owner(tx).cadence


def _check_predicate(skip: Any) -> None:
  """Raises `ValueError` if this cannot be called as `skip(grads, params)`."""
  try:
    inspect.signature(skip).bind(None, None)
  except TypeError as error:
    raise ValueError(
      f"skip must be a function (grads, params) -> bool, found {_checks.shown(skip)}: {error}"
    ) from error
  except ValueError:  # no signature is known
    return


def chain_of(tx: Any) -> "Chain | None":
  """The chain behind an `oc.chain`; None for anything else."""
  owner = _owner(tx) if isinstance(tx, CadenceTransformation) else None
  return owner if isinstance(owner, Chain) else None


def _owner(tx: CadenceTransformation) -> Any:
  """The object whose methods the functions of a transformation are."""
  for fn in tx:
    owner = getattr(fn, "__self__", None)
    if isinstance(owner, Cadence | Chain):
      return owner
  raise ValueError("expected a cadence, found one whose init and update are both replaced")


def _owner_of_update(tx: CadenceTransformation, method: str) -> Any:
  """The object whose method `update` is; `AttributeError` where another function took its place."""
  owner = getattr(tx.update, "__self__", None)
  if isinstance(owner, Cadence | Chain):
    return owner
  raise AttributeError(
    f"{method} of a cadence whose update was replaced by {tx.update!r}: it would not go through"
    " that; call update, or make the cadence around what the new function does"
  )


class Cadence:
  """The settings of a cadence, and the four functions that make the transformation.

  It remembers nothing of the parameters that it is called with.
  """

  def __init__(
    self,
    inner: optax.GradientTransformation | Callable[[Any], optax.GradientTransformation],
    every: Any,
    accumulate: str,
    accumulator_dtype: Any,
    nonfinite: str,
    clock: str,
    weighted: bool,
    skip: Callable[[Any, Any], Any] | None,
    clip_norm: Any,
  ):
    _one_of("accumulate", accumulate, ("mean", "sum", "latest"))
    _one_of("nonfinite", nonfinite, ("propagate", "skip"))
    _one_of("clock", clock, ("updates", "micro_steps"))
    _check_float("accumulator_dtype", accumulator_dtype)
    self.inner = _inner.Inner(inner)
    self.every = every
    self.accumulate = accumulate
    self.accumulator_dtype = accumulator_dtype
    if skip is not None:
      _check_predicate(skip)
    if clip_norm is not None:
      _checks.number("clip_norm", clip_norm, 0, math.inf)
    self.clip_norm = clip_norm
    self.skips_nonfinite = nonfinite == "skip"
    self.skip_if = skip
    self.skip = self.skips_nonfinite or skip is not None
    self.weighted = bool(weighted)
    # Whether a micro-batch may count in some of the regions of a group alone.
    self.by_region = self.skip or self.weighted
    self.set_schedules = None
    if clock == "micro_steps":
      from optax_cadence import _clocks

      _clocks.check(self.inner.any)
      self.set_schedules = _clocks.set_schedules
    # All cadences there are, whatever the parameters; None where only a function of them knows.
    self.cadences = layouts.cadences_of(every)
    if self.cadences is not None:
      self._check_policies(self.cadences.everys.values())

  @property
  def cadence(self) -> "Cadence":
    """This cadence; an `oc.chain` has the one that stands last."""
    return self

  @functools.cached_property
  def cycle(self) -> int | None:
    """Least common multiple of the periods; None when one is dynamic."""
    if self.cadences is not None:
      return phases.cycle(self.cadences.everys.values())
    if hasattr(self.every, "cycle"):
      return self.every.cycle
    raise ValueError(
      "the cycle of a function of the parameters depends on them: expected a tree of cadences or"
      f" by_path, found {_checks.shown(self.every)}; ask oc.describe(tx, params).cycle"
    )

  def groups_of(self, tree: Any) -> layouts.Layout:
    """The groups of a tree, as the cadences cut it."""
    layout = layouts.layout(self.every, tree, self.cadences)
    if self.cadences is None:
      self._check_policies(group.every for group in layout.groups)
    return layout

  def lay_out(self, params: Any) -> tuple[layouts.Layout, dict[int, str | None]]:
    """The groups of parameters, as `init` lays out their state; only shapes and dtypes are read.

    Returns:
      The groups; and for each leaf under a mask, by its position, why it is not trained by one pass
      for all periods, or None where it is.
    """
    layout = self.groups_of(params)
    layouts.check_cuts(layout)
    if not layout.scattered:
      return layout, {}
    from optax_cadence.entrywise import choice

    dtypes = list(map(self.mean_dtype, _dtypes(params)))
    return choice.choose(self.inner, layout, dtypes)

  def layout_of(self, state: State, params: Any) -> layouts.Layout:
    """The groups of parameters, as a state has them."""
    return self._prepare(params, state, params, {}).layout

  def _check_policies(self, everys: Iterable[Every]) -> None:
    """Raises where a policy has no accumulator to judge."""
    for every in everys:
      if every.policy is not None and self.accumulate == "latest":
        raise ValueError(
          f'{every}: a policy needs the sum of its window, expected accumulate="mean" or "sum",'
          ' found "latest"'
        )

  def accumulates(self, every: Every) -> bool:
    """Whether groups with this cadence have accumulators."""
    return self.accumulate != "latest" and not every.always

  def sum_dtype(self, dtype: Any) -> Any:
    """Dtype of the accumulator of a parameter."""
    return _window.accumulator_dtype(dtype, self.accumulator_dtype)

  def mean_dtype(self, dtype: Any) -> Any:
    """Dtype in which the inner optimizer gets the mean of a parameter."""
    return _window.wider(self.sum_dtype(dtype), dtype)

  def init(self, params: optax.Params) -> State:
    if isinstance(params, optax.LookaheadParams):
      raise ValueError(
        "expected parameters as the gradients are shaped, found LookaheadParams; put the cadence"
        " inside: optax.lookahead(oc.cadence(...), ...)"
      )
    if is_stand_in(params):
      return self._init_without_parameters(params)
    _check_trainable("parameter", params)
    layout, leaves, dtypes = self.lay_out(params)[0], layouts.leaves_of(params), _dtypes(params)
    call = self._call(layout, dtypes, None)
    masks, masked, groups = None, [], {}
    if layout.has_masks:
      from optax_cadence.entrywise import masks as entries

      call = dataclasses.replace(call, moments=entries.moments_of(call))
      masks = entries.init(call, leaves, self.sum_dtype if self.accumulate != "latest" else None)
      masked = entries.positions(call, masks)
    for group in layout.groups:
      tensors = group.take(leaves)
      sums = [jnp.zeros_like(x, self.sum_dtype(x.dtype)) for x in tensors]
      trees = layout.tree(group, tensors), layout.tree(group, sums)
      try:
        group.every.first_window()
      except ValueError as error:
        raise layouts.named(error, layout.name(group.leaves[0]) if group.leaves else "") from None
      inner = _step.inner_of(call, group) if group.leaves else _inner.for_no_leaves(self.inner.any)
      n = len(group.regions)
      state = self._init_group(inner, group.every, n, *trees)
      if self.by_region and n:
        flags = layout.tree(group, [jnp.array(True)] * n)
        jax.eval_shape(functools.partial(_inner.filled, self.inner.any), state.inner_state, flags)
      if self.by_region or group.every.policy is not None:
        # Where gradients decide when it fires, so does what they vary over in `jax.shard_map`.
        state = _sharding.varying(state, _sharding.axes_of([leaves[i] for i in group.leaves]))
      groups[group.name] = state
    regions = Regions.of(
      names=layout.region_names(),
      folded=[layout.paths[i] for i in layout.folded],
      masked=masked,
      dtypes=list(zip(layout.paths, map(str, dtypes), strict=True)),
    )
    made = CadenceState(jnp.int32(0), groups, regions, masks)
    if self.cadences is not None:
      return made
    try:
      stand_ins = functools.partial(self._stand_ins, layout.everys, masks is not None)
      return FoundState.of(made, stand_ins)
    except (TypeError, ValueError, AttributeError, LookupError):
      return made  # `tree_map_params` does not understand the inner optimizer

  def _init_group(self, inner: Any, every: Every, n: int, params: Any, sums: Any) -> GroupState:
    accumulates, confidence = self.accumulates(every), None
    shape = per_region(n)
    if every.policy is not None:
      from optax_cadence.confidence import deciding

      confidence = deciding.init(every.policy, params, n)
    return GroupState(
      inner_state=inner.init(params),
      accumulators=sums if accumulates else None,
      window=jnp.zeros(shape if self.by_region else (), jnp.int32) if accumulates else None,
      remaining=None if every.always else every.first_window(),
      period=jnp.int32(0) if every.policy is not None else every.first_window(),
      updates=jnp.int32(0),
      fired=jnp.int32(0),
      skipped=jnp.zeros(shape, jnp.int32) if self.skip else None,
      weight=jnp.zeros(shape, jnp.float32) if self.weighted and accumulates else None,
      confidence=confidence,
    )

  def _init_without_parameters(self, placeholder: Any) -> State:
    """The state with a stand-in for the parameters, as `tree_map_params` asks for it."""
    if self.cadences is None:
      return FoundState(0, placeholder, 0, Regions({}))
    groups, masks = self._stand_ins(self.cadences.by_name, self.cadences.has_masks, placeholder)
    return CadenceState(jnp.int32(0), groups, Regions({}), masks)

  def _stand_ins(self, everys: Mapping[str, Every], has_masks: bool, placeholder: Any) -> Any:
    """The states of groups with these cadences, and of masks, for a stand-in for the parameters."""
    groups = {}
    for name, every in everys.items():
      groups[name] = self._init_group(self.inner.of(every), every, 0, placeholder, placeholder)
    masks = None
    if has_masks:
      from optax_cadence.entrywise import masks as entries

      masks = entries.stand_in(self.inner.any, placeholder, self.accumulate != "latest")
    return groups, masks

  def plain(self, state: Any, params: Any) -> State:
    """The state in the containers that `init` makes; raises `ValueError` if it is no such state."""
    state = plain(self.init, state, params)
    if not isinstance(state, State):
      raise ValueError(
        f"state: expected a CadenceState, found {_checks.shown(state)}; the order is"
        " update(grads, state, params), apply(params, state, grads), flush(state, params), and of"
        " a training_step step(params, state, *args)"
      )
    return state

  def update(
    self,
    grads: optax.Updates,
    state: State,
    params: optax.Params | None = None,
    *,
    phase: int | Phase | None = None,
    weight: Any = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, State]:
    state = self.plain(state, grads if params is None else params)
    call = self._prepare(grads, state, params, extra_args)
    leaves, zeros = layouts.leaves_of(grads), {}
    call = self._counted(call, weight, leaves, params)
    for i, g in leaves.items():
      zeros[i] = jnp.zeros_like(g, _window.wider(g.dtype, call.param_dtypes[i]))
    updates, state = _step.advance(call, leaves, state, zeros, phase)
    return layouts.with_leaves(grads, updates), state

  def apply(
    self,
    params: optax.Params,
    state: State,
    grads: optax.Updates,
    phase: int | Phase | None = None,
    weight: Any = None,
    **extra_args: Any,
  ) -> tuple[optax.Params, State]:
    if params is None and jax.tree.leaves(grads):
      raise ValueError("apply needs the parameters: expected params, found None")
    state = self.plain(state, params)
    if _dtypes(params) != _dtypes(grads):
      _check_order(params, state, grads)
    call = self._prepare(grads, state, params, extra_args, in_place=True)
    given, targets = layouts.leaves_of(grads), layouts.leaves_of(params)
    call = self._counted(call, weight, given, params)
    leaves, state = _step.advance(call, given, state, targets, phase)
    return layouts.with_leaves(params, leaves), state

  def train(
    self,
    params: optax.Params,
    state: State,
    differentiate: Callable[[_step.Call, State], tuple[Any, layouts.Leaves, Any, Any]],
    phase: int | Phase | None = None,
    weight: Any = None,
    **extra_args: Any,
  ) -> tuple[optax.Params, State, Any]:
    """`apply` of gradients that are worked out on the way; see `_training.training_step`.

    The state is one that `plain` gives. `differentiate` returns a value that is passed on, the
    gradient of every leaf, and `given` and `summed` of a `Call`.
    """
    call = self._prepare(params, state, params, extra_args, in_place=True)
    value, grads, given, summed = differentiate(call, state)
    call = dataclasses.replace(call, given=given, summed=summed)
    call = self._counted(call, weight, grads, params)
    leaves, state = _step.advance(call, grads, state, layouts.leaves_of(params), phase)
    return layouts.with_leaves(params, leaves), state, value

  def flush(
    self, state: State, params: optax.Params, **extra_args: Any
  ) -> tuple[optax.Updates, State]:
    trains = not isinstance(state, State) or any(state.regions.names.values())
    if params is None and trains:
      raise ValueError("flush needs the parameters: expected params, found None")
    state = self.plain(state, params)
    call = self._prepare(params, state, params, extra_args)
    zeros = {i: jnp.zeros_like(p) for i, p in layouts.leaves_of(params).items()}
    updates, state = _step.flush(call, state, zeros)
    return layouts.with_leaves(params, updates), state

  def restarted(self, state: State, params: optax.Params, new: Any) -> State:
    """The state, where some entries of the parameters are new; see `_restart.restarted`.

    A region all of whose entries are new has an empty window; where only some are, the window goes
    on and they have gathered nothing in it. No rhythm changes.
    """
    call = self._prepare(params, state, params, {})
    if call.layout.masked:
      raise ValueError(
        f"restart=True: expected no random mask as a cadence of"
        f" {call.layout.name(call.layout.masked[0])!r}, found one, whose periods are trained in one"
        " pass; give restart=False"
      )
    leaves, flags = layouts.leaves_of(params), layouts.leaves_of(new)
    groups = dict(state.groups)
    for group in call.layout.groups:
      if not group.tensors:
        continue
      old, masks = groups[group.name], group.take(flags)
      trees = [call.layout.tree(group, x) for x in (group.take(leaves), masks)]
      fields = {
        "inner_state": _restart.restarted(_step.inner_of(call, group), old.inner_state, *trees)
      }
      if old.window is not None:
        whole = jnp.stack([mask.all() for mask in masks])
        whole = whole if self.by_region else whole.all()
        fields["window"] = jnp.where(whole, jnp.zeros_like(old.window), old.window)
        fields["accumulators"] = jax.tree.map(
          lambda mask, x: jnp.where(mask, jnp.zeros_like(x), x), trees[1], old.accumulators
        )
      groups[group.name] = old._replace(**fields)
    return state._replace(groups=groups)

  def _prepare(
    self,
    grads: Any,
    state: State,
    params: Any,
    extra_args: dict[str, Any],
    in_place: bool = False,
  ) -> _step.Call:
    """Checks what a call is given, and puts together what its micro-step needs."""
    _check_trainable("gradient of", grads)
    if params is not None:
      _paths.check_same("gradient", "as the parameters have", params, grads)
    layout = self.groups_of(grads)
    self._check_state(layout, state)
    dtypes = _dtypes(grads if params is None else params)
    if params is None:
      known = state.regions.dtypes
      dtypes = [known.get(path, x) for path, x in zip(layout.paths, dtypes, strict=True)]
    for i, (of_grad, of_param) in enumerate(zip(_dtypes(grads), dtypes, strict=True)):
      if of_grad.kind == "c" and of_param.kind != "c":
        raise ValueError(
          f"gradient of {layout.name(i)!r}: expected real numbers, as the parameter has, found"
          f" {of_grad}, whose imaginary part would be lost"
        )
    if layout.scattered:
      from optax_cadence.entrywise import choice

      of_means = list(map(self.mean_dtype, dtypes))
      layout = choice.as_in_state(self.inner, layout, state, of_means, extra_args)
    call = self._call(layout, dtypes, params, extra_args, in_place)
    if layout.masked:
      from optax_cadence.entrywise import masks

      call = dataclasses.replace(call, moments=masks.moments_in(layout, state))
    return call

  def _call(
    self,
    layout: layouts.Layout,
    dtypes: list[Any],
    params: Any,
    extra_args: dict[str, Any] | None = None,
    in_place: bool = False,
  ) -> _step.Call:
    of_means = list(map(self.mean_dtype, dtypes))
    differs = map(operator.ne, of_means, dtypes)
    return _step.Call(
      inner=self.inner,
      layout=layout,
      dtypes=of_means,
      param_dtypes=dtypes,
      widened=frozenset(itertools.compress(itertools.count(), differs)),
      params=None if params is None else layouts.leaves_of(params),
      extra_args=extra_args or {},
      in_place=in_place,
      sums=self.accumulate == "sum",
      clip_norm=self.clip_norm,
      set_schedules=self.set_schedules,
    )

  def _counted(
    self, call: _step.Call, weight: Any, grads: layouts.Leaves, params: Any
  ) -> _step.Call:
    """The call, with where and how much the micro-batch counts, where that may differ.

    Raises:
      ValueError: If there is a weight and none is expected, or the other way round.
    """
    if weight is not None and not self.weighted:
      raise ValueError(
        "weight: expected none without oc.cadence(..., weighted=True), found"
        f" {_checks.shown(weight)}"
      )
    if not self.by_region:
      return call
    from optax_cadence import _weights

    usable = weights = None
    entries: dict[str, list[jax.Array]] = {}
    if self.skip_if is not None:
      tree = call.layout.treedef.unflatten(grads.values())
      usable = _weights.usable(self.skip_if, tree, params, call.layout)
    if self.weighted:
      weights = _weights.of_leaves(weight, call.layout, grads)
    if self.skips_nonfinite and call.layout.masked:
      from optax_cadence.entrywise import masks

      entries = masks.all_finite(call.layout, grads)
    counting = _weights.Counting(weights, usable, self.skips_nonfinite, entries)
    return dataclasses.replace(call, counting=counting)

  def _check_state(self, layout: layouts.Layout, state: State) -> None:
    """Raises unless the state has the groups of this tree."""
    names = list(map(operator.attrgetter("name"), layout.groups))
    if set(names) != set(state.groups):
      traced = any(name.startswith("traced") for name in names)
      raise ValueError(
        f"state: expected the groups {_quoted(names)}, as every makes of this tree, found"
        f" {_quoted(state.groups)}; a state goes with the cadences it was made for"
        f"{_ON_TRACED if traced else ''}"
      )
    for group in layout.groups:
      if not group.leaves:
        continue
      accumulates = self.accumulates(group.every)
      needed = {
        "accumulators": accumulates,
        "window": accumulates,
        "remaining": not group.every.always,
        "skipped": self.skip,
        "weight": self.weighted and accumulates,
        "confidence": group.every.policy is not None,
      }
      for field, is_needed in needed.items():
        if is_needed != (getattr(state.groups[group.name], field) is not None):
          raise ValueError(
            f"state of group {group.name!r}: expected {'' if is_needed else 'no '}{field}, found"
            f" {'none' if is_needed else 'some'}; a state goes with the settings (accumulate,"
            " nonfinite, skip, weighted) it was made for"
          )


def _quoted(names: Any) -> str:
  return ", ".join(map(repr, sorted(names))) or "none"


def _dtypes(tree: Any) -> list[Any]:
  return list(map(jax.dtypes.result_type, jax.tree.leaves(tree)))


def _one_of(name: str, value: Any, options: tuple[str, ...]) -> None:
  if value not in options:
    raise ValueError(
      f"{name} must be one of {', '.join(map(repr, options))}, found {_checks.shown(value)}"
    )


def _check_float(name: str, dtype: Any) -> None:
  try:
    known = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
  except (TypeError, ValueError):
    known = False
  if not known:
    raise ValueError(f"{name} must be a float dtype, found {_checks.shown(dtype)}")


def _check_trainable(what: str, tree: Any) -> None:
  """Raises `ValueError` for a leaf that no gradient descends on: integers, truth values, keys."""
  leaves = jax.tree.leaves(tree)
  for i, x in enumerate(leaves):
    dtype = x.dtype if hasattr(x, "dtype") else jax.dtypes.result_type(x)
    if not jnp.issubdtype(dtype, jnp.inexact):
      name = _paths.names(path for path, _ in _paths.flatten_with_paths(tree))[i]
      kind = "float0" if dtype == jax.dtypes.float0 else dtype
      raise ValueError(
        f"{what} {name!r}: expected a dtype of real or complex numbers, found {kind} (JAX gives"
        " float0 as the gradient of an integer); leave such a leaf out with optax.masked, or"
        " optax.partition and optax.set_to_zero, or keep it out of the tree that is trained"
      )


def _check_order(params: Any, state: State, grads: Any) -> None:
  """Raises `ValueError` where `apply` is called in the order of `update`, if one can tell."""
  known = state.regions.dtypes

  def fit(tree: Any) -> bool:
    rows = _paths.flatten_with_paths(tree)
    return all(known.get(path) == jax.dtypes.result_type(x) for path, x in rows)

  if fit(grads) and not fit(params):
    raise ValueError(
      "apply takes (params, state, grads), and update (grads, state, params): expected parameters"
      " of the dtypes that the state was made for first, found these dtypes in the gradients"
    )


def chain(*transforms: optax.GradientTransformation) -> CadenceTransformation:
  """`optax.chain` that keeps `apply`, `flush` and `cycle` of the cadence that stands last.

  Args:
    *transforms: Gradient transformations, of which the last is a cadence.

  Returns:
    A `CadenceTransformation` whose state is the tuple of the states, as in Optax.

  Raises:
    ValueError: If the last transformation is not a cadence; and at `init`, if one before it does
      what belongs behind an optimizer, as `oc.prune` does.

  >>> import optax, optax_cadence as oc
  >>> tx = oc.chain(optax.clip_by_global_norm(1.0), oc.cadence(optax.adam(1e-3), 8))
  >>> tx.cycle
  8
  """
  self = Chain(*transforms)
  return CadenceTransformation(self.init, self.update)


def _sets_parameters(state: Any) -> bool:
  """Whether this is the state of a transformation whose updates set parameters to a value."""
  return hasattr(type(state), "sets_parameters")


class Chain:
  """The functions that make the transformation."""

  def __init__(self, *transforms: optax.GradientTransformation) -> None:
    last = transforms[-1] if transforms else None
    if not isinstance(last, CadenceTransformation):
      raise ValueError(
        f"chain expects a cadence as the last transformation, found {_checks.shown(last)}; what"
        f" stands behind a cadence, {_INSIDE}"
      )
    for tx in transforms:
      if not _inner.is_transformation(tx):
        raise ValueError(
          "each transformation in chain must be an optax.GradientTransformation, found"
          f" {_checks.shown(tx)}"
        )
    self.before = [optax.with_extra_args_support(tx) for tx in transforms[:-1]]
    self.last = last

  @property
  def cadence(self) -> Cadence:
    """The cadence that stands last."""
    return of(self.last)

  def init(self, params: optax.Params) -> tuple[Any, ...]:
    before = [tx.init(params) for tx in self.before]
    for state in filter(_sets_parameters, jax.tree.leaves(before, is_leaf=_sets_parameters)):
      raise ValueError(
        f"chain: expected transformations of gradients before the cadence, found that of a"
        f" {type(state).__name__}, whose updates set parameters to a value; what does so, {_INSIDE}"
      )
    return (*before, self.last.init(params))

  def plain(self, state: Any, params: Any) -> tuple[Any, ...]:
    """The state in the containers that `init` makes; raises `ValueError` if it is no such state."""
    state = plain(self.init, state, params)
    self._check(state)
    return state

  def update(
    self, grads: Any, state: Any, params: Any = None, **extra_args: Any
  ) -> tuple[Any, tuple[Any, ...]]:
    state = self.plain(state, grads if params is None else params)
    grads, done = self._through(grads, state, params, extra_args)
    updates, last_state = self.last.update(grads, state[-1], params, **extra_args)
    return updates, (*done, last_state)

  def apply(
    self, params: Any, state: Any, grads: Any, phase: int | Phase | None = None, **extra_args: Any
  ) -> tuple[Any, tuple[Any, ...]]:
    state = self.plain(state, params)
    grads, done = self._through(grads, state, params, extra_args)
    params, last_state = self.last.apply(params, state[-1], grads, phase, **extra_args)
    return params, (*done, last_state)

  def flush(self, state: Any, params: Any, **extra_args: Any) -> tuple[Any, tuple[Any, ...]]:
    state = self.plain(state, params)
    updates, last_state = self.last.flush(state[-1], params, **extra_args)
    return updates, (*state[:-1], last_state)

  def restarted(self, state: Any, params: Any, new: Any) -> tuple[Any, ...]:
    """The state, where some entries of the parameters are new; see `_restart.restarted`."""
    self._check(state)
    return tuple(
      _restart.restarted(tx, part, params, new)
      for tx, part in zip([*self.before, self.last], state, strict=True)
    )

  def _through(
    self, grads: Any, states: Any, params: Any, extra_args: dict[str, Any]
  ) -> tuple[Any, list[Any]]:
    done = []
    for tx, state in zip(self.before, states, strict=False):
      grads, state = tx.update(grads, state, params, **extra_args)
      done.append(state)
    return grads, done

  def _check(self, states: Any) -> None:
    n = len(self.before) + 1
    if type(states) is not tuple or len(states) != n:
      found = f"{len(states)} states" if type(states) is tuple else type(states).__name__
      raise ValueError(f"state of chain: expected a tuple of {n} states, found {found}")
