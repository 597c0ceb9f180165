"""One micro-step, from top to bottom: cut, accumulate, due?, fire, close.

Each group is on its own. It cuts its tensors out of the gradients and accumulates them; only when
it is due are parameters and inner state reached, in `fire`. What few cadences use (policies, masks)
has modules of its own, which are imported where a group needs them.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _control
from optax_cadence import _inner
from optax_cadence import _sharding
from optax_cadence import _window
from optax_cadence._state import CadenceState
from optax_cadence._state import GroupState
from optax_cadence._state import MaskState
from optax_cadence.regions.cuts import gathered
from optax_cadence.regions.cuts import Whole
from optax_cadence.regions.layout import Group
from optax_cadence.regions.layout import Layout
from optax_cadence.regions.layout import Leaves
from optax_cadence.regions.layout import Tensor
from optax_cadence.schedules.every import Every
from optax_cadence.schedules.phases import Phase


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
    params: Parameters; None where there are none. Where `in_place` only their dtypes are read.
    extra_args: Extra arguments for the inner optimizer.
    in_place: Whether the targets are the parameters.
    sums: Whether the optimizer gets the sum of a window and not its mean.
    skips: Whether micro-batches that are not finite are left out.
    usable: Whether the micro-batch is to be used for each leaf; None where it is for all.
    weights: How much the micro-batch counts for each leaf; None where all count alike.
    set_schedules: Sets the schedules in an inner state to a number of micro-steps; None where
      they count updates.
    clip_norm: The largest norm of all means that fire at a micro-step together; None for any.
    scale: What these are multiplied with so that it is; None for 1.
    moments: Where the inner optimizer keeps its arrays for the entries of each leaf under a mask,
      as key paths, by the position of the leaf.
    given: For some tensors their gradient, which is not read from that of the leaf.
    summed: Those of them for which it is the sum of their window with this gradient in it.
  """

  inner: _inner.Inner
  layout: Layout
  dtypes: Sequence[Any]
  param_dtypes: Sequence[Any]
  params: Leaves | None
  extra_args: Mapping[str, Any]
  in_place: bool
  sums: bool
  skips: bool
  set_schedules: Callable[[Any, jax.Array], Any] | None
  weights: Leaves | None = None
  usable: Leaves | None = None
  clip_norm: Any = None
  scale: jax.Array | None = None
  moments: Mapping[int, list[Any]] = dataclasses.field(default_factory=dict)
  given: Mapping[Tensor, jax.Array] = dataclasses.field(default_factory=dict)
  summed: Collection[Tensor] = ()

  def rounds(self, group: Group) -> bool:
    """Whether what the inner optimizer computes of a group is wider than its state."""
    return any(self.dtypes[leaf] != self.param_dtypes[leaf] for leaf in group.leaves)

  def inner_on_leaves(
    self, group: Group, length: Any = None
  ) -> optax.GradientTransformationExtraArgs:
    """The inner optimizer of a group on tensors in the dtypes of their means.

    For the length of its window see `Inner.of`.
    """
    inner = self.inner.of(group.every, length)
    return _inner.widened(inner) if self.rounds(group) else inner

  def inner_of(self, group: Group, length: Any = None) -> optax.GradientTransformationExtraArgs:
    """The same as a group runs it, without the entries that it has of leaves under masks."""
    inner = self.inner_on_leaves(group, length)
    if not group.masked:
      return inner
    from optax_cadence.entrywise import masks

    return masks.without_entries(inner, self, group)

  def state_of(
    self, group: Group, state: Any, window: _window.Window, micro_step: jax.Array
  ) -> Any:
    """The inner state that an update of the group starts from."""
    if group.in_pieces:
      state = _inner.restored(self.inner_of(group), state, self.layout.tree(group, window.sums))
    if self.set_schedules is not None:
      state = self.set_schedules(state, micro_step)
    return _inner.told_window(state, self.layout, group, window.length)


class Turn(NamedTuple):
  """A group at a micro-step, before it fires.

  Attributes:
    inner_state: State of its inner optimizer.
    window: Its window, with this micro-step.
    fires: Whether it fires.
  """

  inner_state: Any
  window: _window.Window
  fires: bool | jax.Array


class Opened(NamedTuple):
  """A group at a micro-step, before it fires, with all that is needed to close its window.

  Attributes:
    state: Its state.
    window: Its window, with this micro-step.
    due: Whether it is due.
    fires: Whether it fires, the same for all but some policies.
    decision: What its policy has decided; None without one.
  """

  state: GroupState
  window: _window.Window
  due: bool | jax.Array
  fires: bool | jax.Array
  decision: Any

  @property
  def turn(self) -> Turn:
    """What leaves under masks need to know of it."""
    return Turn(self.state.inner_state, self.window, self.fires)


def advance(
  call: Call, grads: Leaves, state: CadenceState, targets: Leaves, phase: Phase | None
) -> tuple[Leaves, CadenceState]:
  """Adds the gradients to every window and fires the groups that are due."""
  groups, turns, finite = {}, {}, {}
  if call.skips and call.layout.masked:
    from optax_cadence.entrywise import masks

    finite = masks.all_finite(call, grads)

  def opened(group: Group, targets: Leaves) -> Opened:
    flags = finite.get(group.name, ())
    return open_window(call, group, state.groups[group.name], grads, flags, targets, phase)

  ready = {}
  if call.clip_norm is not None:  # which takes the means of all groups before the first fires
    ready = {group.name: opened(group, targets) for group in call.layout.groups}
    turns = {name: group.turn for name, group in ready.items()}
    call = clipped(call, state, grads, turns, targets)
  for group in call.layout.groups:
    now = ready.get(group.name) or opened(group, targets)
    turns[group.name] = now.turn
    targets, new = fire(call, group, now.state, now.window, now.fires, targets, state.micro_step)
    new = close(group.every, new, now.window, now.due, state.micro_step)
    groups[group.name] = new if now.decision is None else now.decision.learned(new)
  mask_state = state.masks
  if call.layout.masked:
    targets, mask_state = advance_masks(call, state, grads, turns, targets, state.micro_step)
  micro_step = optax.safe_increment(state.micro_step)
  return targets, CadenceState(micro_step, groups, state.regions, mask_state)


def open_window(
  call: Call,
  group: Group,
  old: GroupState,
  grads: Leaves,
  finite: Sequence[jax.Array],
  targets: Leaves,
  phase: Phase | None,
) -> Opened:
  """Adds the gradients to the window of a group, and says whether it is due."""
  decision = counts = weights = None
  tensors, summed = group.take(grads), []
  if call.given:
    pairs = zip(group.tensors, tensors, strict=True)
    tensors = [call.given.get(t, x) for t, x in pairs]
    summed = [t in call.summed for t in group.tensors]
  tree = call.layout.tree(group, tensors)
  if (call.skips or call.usable is not None) and (tensors or group.masked):
    counts = countable(call, group, tensors, finite)
  if call.weights is not None and (group.tensors or group.masked):
    from optax_cadence import _weights

    weights = _weights.of_regions(call.weights, group)
  window = _window.accumulate(old, tensors, tree, counts, summed, weights)
  due = fires = is_due(group, old, phase)
  if group.every.policy is not None and tensors:
    from optax_cadence.confidence import deciding

    decision = deciding.decide(call, group, old, window, targets)
    due, fires, old = decision.due, decision.fires, decision.state
  return Opened(old, window, due, fires, decision)


def flush(call: Call, state: CadenceState, targets: Leaves) -> tuple[Leaves, CadenceState]:
  """Fires every window that is not empty; when groups are due next stays as it was."""
  groups, turns, micro_step = {}, {}, state.micro_step - 1
  for group in call.layout.groups:
    old = state.groups[group.name]
    window = _window.so_far(old, call.layout.tree(group, group.take(targets)))
    filled = False if old.window is None else window.length.max(initial=0) > 0
    turns[group.name] = Turn(old.inner_state, window, filled)
  if call.clip_norm is not None:
    call = clipped(call, state, None, turns, targets)
  for group in call.layout.groups:
    old, (_, window, filled) = state.groups[group.name], turns[group.name]
    old = old._replace(fired=jnp.zeros_like(old.fired))
    if old.window is not None:
      targets, old = fire(call, group, old, window, filled, targets, micro_step)
      old = old._replace(window=jnp.zeros_like(window.length))
    groups[group.name] = old
  mask_state = state.masks
  if call.layout.masked:
    targets, mask_state = advance_masks(call, state, None, turns, targets, micro_step)
  return targets, state._replace(groups=groups, masks=mask_state)


def clipped(
  call: Call,
  state: CadenceState,
  grads: Leaves | None,
  turns: Mapping[str, Turn],
  targets: Leaves,
) -> Call:
  """The call, with what all means that fire are multiplied with to limit their norm."""
  from optax_cadence import _clipping

  scale = _clipping.scale(call, state, grads, turns, targets)
  return dataclasses.replace(call, scale=scale)


def reduced(call: Call, group: Group, window: _window.Window) -> list[jax.Array]:
  """What the inner optimizer is handed of a window: the mean of each tensor, or its sum."""
  reduce = _window.sums if call.sums else _window.means
  grads = reduce(window, [call.dtypes[tensor.leaf] for tensor in group.tensors])
  return grads if call.scale is None else [_window.multiply(x, call.scale) for x in grads]


def advance_masks(
  call: Call,
  state: CadenceState,
  grads: Leaves | None,
  turns: Mapping[str, Turn],
  targets: Leaves,
  micro_step: jax.Array,
) -> tuple[Leaves, MaskState]:
  """The same of the leaves under masks that the groups train together."""
  from optax_cadence.entrywise import masks

  assert state.masks is not None
  return masks.advance(call, state.masks, grads, turns, targets, micro_step)


def countable(
  call: Call, group: Group, tensors: Sequence[jax.Array], finite: Sequence[jax.Array]
) -> jax.Array:
  """Whether the micro-batch is usable in each of a group's regions: bool [R].

  Args:
    call: The call.
    group: The group.
    tensors: Its gradients.
    finite: Whether those that it has of leaves under masks are finite.
  """
  found = []
  if call.skips:
    found.append(jnp.stack([*map(_window.all_finite, tensors), *finite]))
  if call.usable is not None:
    found.append(jnp.stack([call.usable[t.leaf] for t in (*group.tensors, *group.masked)]))
  return functools.reduce(jnp.logical_and, found)


def is_due(group: Group, state: GroupState, phase: Phase | None) -> bool | jax.Array:
  """Whether a group is due; a Python bool where that is known while tracing, or nothing is."""
  if group.every.always:
    return True
  if phase is not None:
    return group.name in phase.due
  due = state.remaining == 1
  return due if _control.is_traced(due) else bool(due)


def fire(
  call: Call,
  group: Group,
  state: GroupState,
  window: _window.Window,
  when: bool | jax.Array,
  targets: Leaves,
  micro_step: jax.Array,
) -> tuple[Leaves, GroupState]:
  """Runs the inner optimizer on the window, if it is due and not empty.

  Some results are written into the leaf as soon as they are computed; others replace the sum in
  their accumulator, which nobody needs any more, and are moved from there: see `writes_directly`.
  """
  if not (group.tensors or group.masked):
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
  params = targets if call.in_place else call.params
  if params is not None:
    given, params = params, {}
    for tensor in group.tensors:
      if not (call.in_place and tensor.leaf in leaves):
        params[tensor.leaf] = given[tensor.leaf]

  def compute(carry: Any, consts: Any) -> Any:
    leaves, sums, inner_state = carry
    length, weights, params, micro_step = consts
    read = leaves | params if call.in_place else params
    before = None if read is None else group.take(read)
    totals = window._replace(sums=sums, length=length, weights=weights)
    results, inner_state = run_inner(call, group, totals, inner_state, before, micro_step)
    if call.in_place:
      with jax.numpy_dtype_promotion("standard"):  # added before it is rounded, once
        results = optax.apply_updates(before, results)
    if window.by_region:
      unchanged = before if call.in_place and before else [jnp.zeros_like(x) for x in results]
      for i, (x, old) in enumerate(zip(results, unchanged, strict=True)):
        results[i] = jnp.where(length[i] > 0, x, old)
    leaves = write(True, leaves, group, results, direct, micro_step)
    for i, x in enumerate(results):
      if not direct[i]:
        sums[i] = x.astype(sums[i].dtype)
    return leaves, sums, inner_state

  def compute_where_filled(carry: Any, consts: Any) -> Any:
    filled = call.layout.tree(group, list(window.length > 0))
    inner_state = carry[2]
    if group.in_pieces:
      tensors = call.layout.tree(group, carry[1])
      inner_state = _inner.restored(call.inner.any, inner_state, tensors)
    flags = _inner.like(_inner.filled(call.inner.any, inner_state, filled), carry[2])
    return _control.keep((True, True, flags), compute, carry, consts)

  waits = list(map(operator.not_, direct))
  carry = leaves, window.sums, state.inner_state
  consts = window.length, window.weights, params, micro_step
  run = runner(when, group, waits, micro_step)
  if call.in_place and all(direct) and call.rounds(group):
    # Parameters step by what is not rounded yet, out of moments that are then overwritten.
    run = functools.partial(_control.first_part_first, when, count=micro_step)
  body = compute_where_filled if window.by_region else compute
  leaves, sums, inner_state = run(body, carry, consts)
  targets = write(when, targets | leaves, group, sums, waits, micro_step)
  state = state._replace(
    inner_state=inner_state, updates=state.updates + jnp.int32(fired), fired=jnp.int32(fired)
  )
  if state.accumulators is not None:
    sums = jax.tree.unflatten(jax.tree.structure(state.accumulators), sums)
    state = state._replace(accumulators=sums)
  return targets, state


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
    if isinstance(tensor.cut, Whole):
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
      leaf = gathered(leaves[t.leaf], [other.cut for other in parts if other.leaf == t.leaf])
      views[t.leaf] = t.cut.view(leaf)
  views = runner(when, group, which, micro_step)(move, views, values)
  for leaf, view in views.items():
    leaves[leaf] = _sharding.lying_as(view.reshape(leaves[leaf].shape), leaves[leaf])
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
  grads = reduced(call, group, window)
  old = call.state_of(group, state, window, micro_step)
  values = None if params is None else call.layout.tree(group, params)
  inner, tree = call.inner_of(group, window.length), call.layout.tree(group, grads)
  updates, new = _inner.update(inner, tree, old, values, call.extra_args)
  results = jax.tree.leaves(updates)
  for i, (tensor, grad) in enumerate(zip(group.tensors, grads, strict=True)):
    if jnp.shape(results[i]) != grad.shape:
      raise ValueError(
        f"update of {call.layout.name(tensor.leaf)!r}: expected shape {grad.shape} from the"
        f" inner optimizer, found {jnp.shape(results[i])}"
      )
    results[i] = results[i].astype(grad.dtype)
  return results, _inner.like(new, state) if group.in_pieces else new


def close(
  every: Every,
  state: GroupState,
  window: _window.Window,
  due: bool | jax.Array,
  micro_step: jax.Array,
) -> GroupState:
  """The group's state after this micro-step: a new window where it was due."""
  new = state._replace(skipped=window.skipped)
  if state.weight is not None and window.weights is not None:
    new = new._replace(weight=window.weights)
  if state.remaining is not None:
    ahead = every.window(optax.safe_increment(micro_step))
    new = new._replace(remaining=_control.choose(due, ahead, state.remaining - 1))
    if every.policy is None:
      new = new._replace(period=_control.choose(due, ahead, state.period))
  if state.window is not None:
    new = new._replace(window=_control.choose(due, jnp.zeros_like(window.length), window.length))
  return new
