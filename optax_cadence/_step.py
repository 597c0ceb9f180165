"""One micro-step, from top to bottom: cut, accumulate, due?, fire, close.

Each group is on its own. It cuts its tensors out of the gradients and accumulates them; only when
it is due are parameters and inner state reached, in `fire`. What few cadences use (policies, masks,
weights, a limit on the norm) has modules of its own, which are imported where they are needed.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _control
from optax_cadence import _inner
from optax_cadence import _window
from optax_cadence._state import GroupState
from optax_cadence._state import MaskState
from optax_cadence._state import State
from optax_cadence.regions import cuts
from optax_cadence.regions.layout import Group
from optax_cadence.regions.layout import Layout
from optax_cadence.regions.layout import Leaves
from optax_cadence.regions.layout import Tensor
from optax_cadence.schedules import phases
from optax_cadence.schedules.every import Every
from optax_cadence.schedules.phases import Phase

if TYPE_CHECKING:
  from optax_cadence._weights import Counting


@dataclasses.dataclass(frozen=True)
class Call:
  """What one call of `update`, `apply` or `flush` is given.

  A group that fires writes into *targets*: zeros that become the updates, or, where `in_place`, the
  parameters themselves.

  Attributes:
    inner: The inner optimizer.
    layout: Groups of the tree.
    dtypes: Dtype in which the inner optimizer gets the mean of each leaf.
    param_dtypes: Dtype of each parameter.
    widened: The leaves for which these two differ.
    params: Parameters; None where there are none. Where `in_place` only their dtypes are read.
    extra_args: Extra arguments for the inner optimizer.
    in_place: Whether the targets are the parameters.
    sums: Whether the optimizer gets the sum of a window and not its mean.
    set_schedules: Sets the schedules in an inner state to a number of micro-steps; None where
      they count updates.
    clip_norm: The largest norm of all means that fire at a micro-step together; None for any.
    counting: How much the micro-batch counts in each region; None where it counts once in all.
    scale: What the means that fire are multiplied with to limit their norm; None for 1.
    moments: Where the inner optimizer keeps its arrays for the entries of each leaf under a mask,
      as key paths, by the position of the leaf.
    given: For some tensors their gradient, which is not read from that of the leaf.
    summed: Those of them for which it is the sum of their window with this gradient in it.
  """

  inner: _inner.Inner
  layout: Layout
  dtypes: Sequence[Any]
  param_dtypes: Sequence[Any]
  widened: frozenset[int]
  params: Leaves | None
  extra_args: Mapping[str, Any]
  in_place: bool
  sums: bool
  set_schedules: Callable[[Any, jax.Array], Any] | None
  clip_norm: Any
  counting: "Counting | None" = None
  scale: jax.Array | None = None
  moments: Mapping[int, list[Any]] = dataclasses.field(default_factory=dict)
  given: Mapping[Tensor, jax.Array] = dataclasses.field(default_factory=dict)
  summed: Collection[Tensor] = ()


class Turn(NamedTuple):
  """A group at a micro-step, before it fires.

  Attributes:
    state: Its state.
    window: Its window, with the gradients of this micro-step.
    due: Whether it is due.
    fires: Whether it fires, the same for all but some policies.
    decision: What its policy has decided; None without one.
    before: The sums of its window without these gradients, and what adds them to such sums. None
      where some of them do not count, or are added already.
  """

  state: GroupState
  window: _window.Window
  due: bool | jax.Array
  fires: bool | jax.Array
  decision: Any = None
  before: tuple[list[jax.Array], Callable[[Any], Any]] | None = None


def advance(
  call: Call, grads: Leaves, state: State, targets: Leaves, phase: int | Phase | None
) -> tuple[Leaves, State]:
  """Adds the gradients to every window and fires the groups that are due."""
  if phase is not None:
    phase = phases.checked(phase, call.layout.everys, state.micro_step)
  groups: dict[str, GroupState] = {}
  turns: dict[str, Turn] = {}
  if call.clip_norm is not None:  # which takes the means of all groups before the first fires
    for group in call.layout.groups:
      turns[group.name] = accumulate(call, group, grads, state, targets, phase)
    from optax_cadence import _clipping

    call = _clipping.clipped(call, state, grads, turns, targets)
  for group in call.layout.groups:
    turn = turns.get(group.name) or accumulate(call, group, grads, state, targets, phase)
    targets, new = fire(call, group, turn, targets, state.micro_step)
    groups[group.name] = close(group.every, new, turn, state.micro_step)
    turns[group.name] = turn
  mask_state = state.masks
  if call.layout.masked:
    targets, mask_state = under_masks(call, state, grads, turns, targets, state.micro_step)
  micro_step = optax.safe_increment(state.micro_step)
  return targets, state._replace(micro_step=micro_step, groups=groups, masks=mask_state)


def under_masks(
  call: Call,
  state: State,
  grads: Leaves | None,
  turns: Mapping[str, Turn],
  targets: Leaves,
  micro_step: jax.Array,
) -> tuple[Leaves, MaskState | None]:
  """The targets and the state of leaves under masks, which their groups train together."""
  if state.masks is None:
    return targets, None
  from optax_cadence.entrywise import masks

  return masks.advance(call, state.masks, grads, turns, targets, micro_step)


def accumulate(
  call: Call,
  group: Group,
  grads: Leaves,
  state: State,
  targets: Leaves,
  phase: Phase | None,
) -> Turn:
  """Adds the gradients to the window of a group, and says whether it is due."""
  old, tensors, summed = state.groups[group.name], group.take(grads), []
  if call.given:
    pairs = zip(group.tensors, tensors, strict=True)
    tensors = [call.given.get(t, x) for t, x in pairs]
    summed = [t in call.summed for t in group.tensors]
  counts = weights = None
  if call.counting is not None and group.regions:
    counts, weights = call.counting.of(group, tensors)
  before = _window.so_far(old, call.layout.tree(group, tensors))
  window = _window.accumulate(before, tensors, counts, summed, weights)
  if group.every.policy is not None and tensors:
    from optax_cadence.confidence import deciding

    decision = deciding.decide(call, group, old, window, targets)
    return Turn(decision.state, window, decision.due, decision.fires, decision)
  due = is_due(group, old, phase)
  if counts is not None or any(summed) or window.single:
    return Turn(old, window, due, due)

  def add(sums: list[jax.Array]) -> list[jax.Array]:
    return _window.accumulate(before._replace(sums=sums), tensors).sums

  return Turn(old, window, due, due, before=(before.sums, add))


def is_due(group: Group, state: GroupState, phase: Phase | None) -> bool | jax.Array:
  """Whether a group is due; a Python bool where that is known while tracing, or nothing is."""
  if group.every.always:
    return True
  if phase is not None:
    return group.name in phase.due
  due = state.remaining == 1
  return due if _control.is_traced(due) else bool(due)


def fire(
  call: Call, group: Group, turn: Turn, targets: Leaves, micro_step: jax.Array
) -> tuple[Leaves, GroupState]:
  """Runs the inner optimizer on the window, if the group fires and the window is not empty.

  Some results are written into the leaf as soon as they are computed; others replace the sum in
  their accumulator, which nobody needs any more, and are moved from there: see `writes_directly`.
  """
  state, window, when = turn.state, turn.window, turn.fires
  if not group.regions:
    return targets, state
  fired = when
  if window.by_region:
    fired = when & (window.length > 0).any()
    when = when if isinstance(when, bool) else fired
  direct, leaves = [], {}
  for tensor, total in zip(group.tensors, window.sums, strict=True):
    direct.append(writes_directly(call, state, tensor, total, when, targets))
    if direct[-1]:
      leaves[tensor.leaf] = targets[tensor.leaf]
  params, read = targets if call.in_place else call.params or {}, {}
  for tensor in group.tensors:
    if tensor.leaf in params and not (call.in_place and tensor.leaf in leaves):
      read[tensor.leaf] = params[tensor.leaf]

  def compute(carry: Any, consts: Any) -> Any:
    leaves, sums, inner_state = carry
    length, weights, params, micro_step = consts
    params = leaves | params if call.in_place else params
    before = None if call.params is None else group.take(params)
    total = window._replace(sums=sums, length=length, weights=weights)
    results, inner_state = run_inner(call, group, total, inner_state, before, micro_step)
    if call.in_place:
      results = applied(before, results)
    if window.by_region:
      unchanged = before if call.in_place and before else [jnp.zeros_like(x) for x in results]
      for i, (x, old) in enumerate(zip(results, unchanged, strict=True)):
        results[i] = jnp.where(_window.item(length, i) > 0, x, old)
    leaves = write(True, leaves, group, results, direct, micro_step)
    for i, x in enumerate(results):
      if not direct[i]:
        sums[i] = x.astype(sums[i].dtype)
    return leaves, sums, inner_state

  waits = list(map(operator.not_, direct))
  run = runner(when, group, waits, micro_step)
  body = functools.partial(where_filled, call, group, compute) if window.by_region else compute
  carry = leaves, window.sums, state.inner_state
  consts = window.length, window.weights, read, micro_step
  narrow = call.in_place and all(direct) and not call.widened.isdisjoint(group.leaves)
  if narrow and _control.is_one_pass(body, carry, consts):
    # Parameters step by what is not rounded yet, out of moments that are then overwritten.
    run = functools.partial(_control.first_part_first, when, count=micro_step)
    if turn.before is not None:
      # Nor is a sum written that is read for the last time: it is computed where it is read.
      (sums, add), held = turn.before, not when if isinstance(when, bool) else ~when
      sums = _control.maybe(held, lambda sums, _: add(sums), sums, None)
      body, carry = functools.partial(where_added, add, body), (leaves, sums, state.inner_state)
  leaves, sums, inner_state = run(body, carry, consts)
  targets = write(when, targets | leaves, group, sums, waits, micro_step)
  state = state._replace(
    inner_state=inner_state, updates=state.updates + jnp.int32(fired), fired=jnp.int32(fired)
  )
  if state.accumulators is not None:
    sums = jax.tree.unflatten(jax.tree.structure(state.accumulators), sums)
    state = state._replace(accumulators=sums)
  return targets, state


def where_added(
  add: Callable[[Any], Any], compute: Callable[[Any, Any], Any], carry: Any, consts: Any
) -> Any:
  """What `fire` computes, of sums to which the last gradients are yet to be added."""
  leaves, sums, inner_state = carry
  leaves, _, inner_state = compute((leaves, add(sums), inner_state), consts)
  return leaves, sums, inner_state


def where_filled(
  call: Call, group: Group, compute: Callable[[Any, Any], Any], carry: Any, consts: Any
) -> Any:
  """What `fire` computes, but inner state of regions with an empty window stays as it is."""
  _, sums, old = carry
  length = consts[0]
  inner_state, filled = old, call.layout.tree(group, list(length > 0))
  if group.in_pieces:
    inner_state = _inner.restored(inner_of(call, group), old, call.layout.tree(group, sums))
  flags = _inner.like(_inner.filled(call.inner.any, inner_state, filled), old)
  return _control.keep((True, True, flags), compute, carry, consts)


def writes_directly(
  call: Call,
  state: GroupState,
  tensor: Tensor,
  total: jax.Array,
  when: bool | jax.Array,
  targets: Leaves,
) -> bool:
  """Whether a tensor's result is written into its leaf where it is computed.

  So is what is contiguous in a leaf that is written in place. The rest waits in its accumulator and
  is moved by an operation of its own: XLA runs one that computes and writes scattered parts of an
  array on a single CPU core. For `update` it saves an array of zeros that would be carried around
  the branch, if there is one. Without an accumulator that can hold the result there is no choice.
  """
  straight = tensor.cut.contiguous and (call.in_place or when is True)
  return straight or state.accumulators is None or not _window.holds(total, targets[tensor.leaf])


def write(
  when: bool | jax.Array,
  leaves: Leaves,
  group: Group,
  results: Sequence[jax.Array],
  which: Sequence[bool],
  micro_step: jax.Array,
) -> Leaves:
  """The leaves, with those of a group's results that `which` says written into them if `when`.

  Parts of a leaf are written by an operation of their own.
  """
  leaves, parts, values = dict(leaves), [], []
  for tensor, x, wanted in zip(group.tensors, results, which, strict=True):
    if not wanted:
      continue
    leaf = leaves[tensor.leaf]
    if isinstance(tensor.cut, cuts.Whole):
      leaves[tensor.leaf] = _control.choose(when, x.astype(leaf.dtype), leaf)
    else:
      parts.append(tensor)
      values.append(x.astype(leaf.dtype))
  if not parts:
    return leaves

  def move(views: Leaves, values: list[jax.Array]) -> Leaves:
    views = dict(views)
    for tensor, x in zip(parts, values, strict=True):
      views[tensor.leaf] = tensor.cut.put(views[tensor.leaf], x)
    return views

  views = {}
  for t in parts:
    if t.leaf not in views:
      leaf = cuts.gathered(leaves[t.leaf], [other.cut for other in parts if other.leaf == t.leaf])
      views[t.leaf] = t.cut.view(leaf)
  views = runner(when, group, which, micro_step)(move, views, values)
  for leaf, view in views.items():
    leaves[leaf] = cuts.lying_as(view.reshape(leaves[leaf].shape), leaves[leaf])
  return leaves


def runner(
  when: bool | jax.Array, group: Group, which: Sequence[bool], micro_step: jax.Array
) -> Callable[..., Any]:
  """`maybe`; but `apart` where one of these tensors is scattered and known to be due.

  Fused with what comes before, its gradient would be read by index once for every result.
  """
  if when is True:
    for tensor, wanted in zip(group.tensors, which, strict=True):
      if wanted and not tensor.cut.contiguous:
        return functools.partial(_control.apart, count=micro_step)
  return functools.partial(_control.maybe, when)


def run_inner(
  call: Call,
  group: Group,
  window: _window.Window,
  state: Any,
  params: list[jax.Array] | None,
  micro_step: jax.Array,
) -> tuple[list[jax.Array], Any]:
  """Updates of the group's tensors, in the dtype of their mean, and the new inner state."""
  inner, grads = inner_of(call, group, window.length), reduced(call, group, window)
  old = state_of(call, group, state, window, micro_step)
  tree = call.layout.tree(group, grads)
  values = None if params is None else call.layout.tree(group, params)
  updates, new = updated(call, inner, tree, old, values)
  results = jax.tree.leaves(updates)
  for i, (tensor, grad) in enumerate(zip(group.tensors, grads, strict=True)):
    if jnp.shape(results[i]) != grad.shape:
      raise ValueError(
        f"update of {call.layout.name(tensor.leaf)!r}: expected shape {grad.shape} from the"
        f" inner optimizer, found {jnp.shape(results[i])}"
      )
    results[i] = results[i].astype(grad.dtype)
  return results, _inner.like(new, state) if group.in_pieces else new


def updated(call: Call, inner: Any, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
  """Updates and new state of an inner optimizer.

  Raises:
    ValueError: If the state is that of other tensors.
  """
  try:
    return inner.update(grads, state, params, **call.extra_args)
  except (AttributeError, TypeError, ValueError) as error:
    _inner.check_state(inner, state, grads if params is None else params, error)
    raise


def applied(params: Any, updates: Any) -> Any:
  """The parameters with their updates, added before they are rounded once."""

  def added(p: jax.Array, u: jax.Array) -> jax.Array:
    dtype = _window.wider(p.dtype, u.dtype)
    return (p.astype(dtype) + u.astype(dtype)).astype(p.dtype)

  return jax.tree.map(added, params, updates)


def inner_of(
  call: Call, group: Group, length: Any = None, whole: bool = False
) -> optax.GradientTransformationExtraArgs:
  """The inner optimizer of a group, for tensors in the dtypes of their means.

  The length is that of its window: see `Inner.of`. By itself a group runs without leaves under
  masks, which it trains together with others; with `whole` it is given them as they are.
  """
  inner = call.inner.of(group.every, length) if call.inner.follows_window else call.inner.any
  if not call.widened.isdisjoint(group.leaves):
    inner = _inner.widened(inner)
  if group.masked and not whole:
    from optax_cadence.entrywise import masks

    inner = masks.without_entries(inner, call, group)
  return inner


def state_of(
  call: Call, group: Group, state: Any, window: _window.Window, micro_step: jax.Array
) -> Any:
  """The inner state that an update of the group starts from."""
  if group.in_pieces:
    tensors = call.layout.tree(group, window.sums)
    state = _inner.restored(inner_of(call, group), state, tensors)
  if call.set_schedules is not None:
    state = call.set_schedules(state, micro_step)
  lengths = call.layout.tree(group, list(window.length)) if window.by_region else window.length
  return _window.told(state, lengths)


def reduced(call: Call, group: Group, window: _window.Window) -> list[jax.Array]:
  """What the inner optimizer is handed of a window: the mean of each tensor, or its sum."""
  grads = []
  for i, tensor in enumerate(group.tensors):
    grad = window.reduced(i, call.dtypes[tensor.leaf], as_sum=call.sums)
    grads.append(grad if call.scale is None else _window.multiply(grad, call.scale))
  return grads


def close(every: Every, state: GroupState, turn: Turn, micro_step: jax.Array) -> GroupState:
  """The group's state after this micro-step: a new window where it was due."""
  window, due = turn.window, turn.due
  new = state._replace(skipped=window.skipped)
  if state.weight is not None and window.weights is not None:
    new = new._replace(weight=window.weights)
  if state.remaining is not None:
    if every.static:
      ahead = jnp.int32(every.period)
    else:
      ahead = every.window(optax.safe_increment(micro_step))
    new = new._replace(remaining=_control.choose(due, ahead, state.remaining - 1))
    if every.policy is None:
      new = new._replace(period=_control.choose(due, ahead, state.period))
  if state.window is not None:
    new = new._replace(window=_control.choose(due, jnp.zeros_like(window.length), window.length))
  return new if turn.decision is None else turn.decision.learned(new)


def flush(call: Call, state: State, targets: Leaves) -> tuple[Leaves, State]:
  """Fires every window that is not empty; when groups are due next stays as it was."""
  groups, turns, micro_step = {}, {}, state.micro_step - 1
  for group in call.layout.groups:
    old = state.groups[group.name]
    window = _window.so_far(old, call.layout.tree(group, group.take(targets)))
    filled = False if old.window is None else window.length.max(initial=0) > 0
    old = old._replace(fired=jnp.zeros_like(old.fired))
    turns[group.name] = Turn(old, window, due=False, fires=filled)
  if call.clip_norm is not None:
    from optax_cadence import _clipping

    call = _clipping.clipped(call, state, None, turns, targets)
  for group in call.layout.groups:
    turn = turns[group.name]
    new = turn.state
    if new.window is not None:
      targets, new = fire(call, group, turn, targets, micro_step)
      new = new._replace(window=jnp.zeros_like(turn.window.length))
    groups[group.name] = new
  mask_state = state.masks
  if call.layout.masked:
    targets, mask_state = under_masks(call, state, None, turns, targets, micro_step)
  return targets, state._replace(groups=groups, masks=mask_state)
