"""One micro-step: every group accumulates, and fires if it is due.

Each group is on its own. It cuts its tensors out of the gradients and accumulates them;
only when it is due are parameters and inner state reached, in `_firing`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _control
from optax_cadence import _firing
from optax_cadence import _layout
from optax_cadence import _moves
from optax_cadence import _paths
from optax_cadence import _schedules
from optax_cadence import _shared
from optax_cadence import _statistics
from optax_cadence import _windows
from optax_cadence._state import CadenceState
from optax_cadence._state import ConfidenceState
from optax_cadence._state import GroupState

# Of the estimates that a policy's group keeps for whoever looks at them, per window.
_DECAY = 0.9


def advance(
  firing: _firing.Firing,
  grads: _firing.Leaves,
  state: CadenceState,
  targets: _firing.Leaves,
  phase: int | None,
) -> tuple[_firing.Leaves, CadenceState]:
  """Adds the gradients to every window and fires the groups that are due."""
  groups, turns = [], []
  for group, old in zip(firing.layout.groups, state.groups, strict=True):
    tensors = group.take(grads)
    window = _windows.add(_open(old, firing.layout.tree(group, tensors)), tensors)
    due, found = _due(group.every, old, window, phase)
    fires, found, old = _look(firing, group, old, window, due, found, targets)
    turns.append(_shared.Turn(old.inner_state, window, fires))
    targets, new = firing.fire(fires, group, old, window, targets, state.micro_step)
    new = _close(group.every, new, window, due, state.micro_step)
    groups.append(_learn(group.every, new, old, due, found))
  targets, shared = _shared.advance(firing, state.shared, grads, turns, targets, state.micro_step)
  return targets, CadenceState(optax.safe_increment(state.micro_step), tuple(groups), shared)


def flush(
  firing: _firing.Firing, state: CadenceState, targets: _firing.Leaves
) -> tuple[_firing.Leaves, CadenceState]:
  """Fires every window that is not empty; when groups are due next stays as it was."""
  groups, turns, micro_step = [], [], state.micro_step - 1
  for group, old in zip(firing.layout.groups, state.groups, strict=True):
    window = _open(old, firing.layout.tree(group, group.take(targets)))
    filled = False if old.window is None else window.length.max() > 0
    turns.append(_shared.Turn(old.inner_state, window, filled))
    if old.window is not None:
      targets, old = firing.fire(filled, group, old, window, targets, micro_step)
      old = old._replace(window=jnp.zeros_like(window.length))
    groups.append(old)
  targets, shared = _shared.advance(firing, state.shared, None, turns, targets, micro_step)
  return targets, state._replace(groups=tuple(groups), shared=shared)


def _open(state: GroupState, tensors: Any) -> _windows.Window:
  """The window so far, which has to fit the tree of the group's tensors."""
  if state.accumulators is not None:
    _paths.check_same("gradient", "as in the state", state.accumulators, tensors)
  length = jnp.int32(0) if state.window is None else state.window
  squares = None if state.confidence is None else state.confidence.squares
  return _windows.Window(jax.tree.leaves(state.accumulators), length, state.skipped, squares)


def _due(
  every: _schedules.Every, state: GroupState, window: _windows.Window, phase: int | None
) -> tuple[bool | jax.Array, _statistics.Statistics | None]:
  """Whether the group is due, and what a policy has found by then."""
  if every.always:
    return True, None
  if every.policy is None or state.confidence is None:
    return state.remaining == 1 if phase is None else every.due(phase), None
  policy, remembered = every.policy, state.confidence.policy
  asked = _elapsed(every, state) >= policy.opens(remembered)
  found = _found(asked, window)
  return (state.remaining == 1) | (asked & policy.due(found, remembered)), found


def _found(asked: jax.Array, window: _windows.Window) -> _statistics.Statistics:
  """Statistics of a window; its sum is read only where there is something to decide."""
  unknown = jnp.full(len(window.sums), jnp.nan, jnp.float32)
  if window.squares is None:
    return _statistics.of(window.length, unknown, unknown)
  square = _control.maybe(
    asked, lambda _, sums: _statistics.squared_norms(sums), jnp.zeros_like(unknown), window.sums
  )
  return _statistics.of(window.length, window.squares, square)


def _elapsed(every: _schedules.Every, state: GroupState) -> Any:
  """Micro-steps of a policy's window, this one included."""
  return every.period.max_period - state.remaining + 1


def _look(
  firing: _firing.Firing,
  group: _layout.Group,
  state: GroupState,
  window: _windows.Window,
  due: bool | jax.Array,
  found: _statistics.Statistics | None,
  targets: _firing.Leaves,
) -> tuple[bool | jax.Array, _statistics.Statistics | None, GroupState]:
  """How far the parameters have moved, if a policy asks and the group is about to fire.

  Returns whether it fires: the same as `due`, but known only after the look, or XLA would keep
  the parameters for it in a copy.
  """
  if found is None or state.confidence is None or state.confidence.sample is None:
    return due, found, state
  params = targets if firing.in_place else firing.params
  if params is None:
    raise ValueError(f"{group.every}: a policy that reads updates needs params, found None")

  def look(carry: Any, params: _firing.Leaves) -> Any:
    return *_moves.distances(carry[0], group.take(params)), jnp.array(True)

  carry = state.confidence.sample, jnp.stack([found.update, found.params]), jnp.array(False)
  consts = {i: params[i] for i in group.leaves}
  fires = due & (window.length > 0).any()
  sample, (update, norm), fires = _control.maybe(fires, look, carry, consts)
  state = state._replace(confidence=state.confidence._replace(sample=sample))
  return fires, found._replace(update=update, params=norm), state


def _learn(
  every: _schedules.Every,
  new: GroupState,
  old: GroupState,
  due: bool | jax.Array,
  found: _statistics.Statistics | None,
) -> GroupState:
  """The group's state with what its policy learns of a window that has fired."""
  if found is None or new.confidence is None:
    return new
  policy, (squares, estimate, sample, remembered) = every.period, new.confidence
  before = old.period, estimate, remembered
  if estimate is not None:
    estimate = _statistics.smooth(estimate, found, _DECAY)
  remembered = _control.cast_like(policy.fired(found, remembered), remembered)
  after = _elapsed(every, old), estimate, remembered
  choose = functools.partial(jnp.where, due)
  period, estimate, remembered = jax.tree.map(choose, after, before)
  confidence = ConfidenceState(squares, estimate, sample, remembered)
  return new._replace(period=period, confidence=confidence)


def _close(
  every: _schedules.Every,
  state: GroupState,
  window: _windows.Window,
  due: bool | jax.Array,
  micro_step: jax.Array,
) -> GroupState:
  """The group's state after this micro-step: a new window where it was due."""
  new = state._replace(skipped=window.skipped)
  if state.confidence is not None:
    new = new._replace(confidence=state.confidence._replace(squares=window.squares))
  if state.remaining is not None:
    ahead = every.window(optax.safe_increment(micro_step))
    new = new._replace(remaining=_control.choose(due, ahead, state.remaining - 1))
    if every.policy is None:
      new = new._replace(period=_control.choose(due, ahead, state.period))
  if state.window is not None:
    new = new._replace(window=_control.choose(due, jnp.zeros_like(window.length), window.length))
  return new
