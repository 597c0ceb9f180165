"""One micro-step: every group accumulates, and fires if it is due.

Each group is on its own. It cuts its tensors out of the gradients and accumulates them;
only when it is due are parameters and inner state reached, in `_firing`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _control
from optax_cadence import _firing
from optax_cadence import _paths
from optax_cadence import _schedules
from optax_cadence import _statistics
from optax_cadence import _windows
from optax_cadence._policy import Policy
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
  groups = []
  for group, old in zip(firing.layout.groups, state.groups, strict=True):
    tensors = group.take(grads)
    window = _windows.add(_open(old, firing.layout.tree(group, tensors)), tensors)
    due, confidence = _due(group.every, old, window, phase)
    targets, new = firing.fire(due, group, old, window, targets, state.micro_step)
    new = new._replace(confidence=confidence)
    groups.append(_close(group.every, new, window, due, state.micro_step))
  return targets, CadenceState(optax.safe_increment(state.micro_step), tuple(groups))


def flush(
  firing: _firing.Firing, state: CadenceState, targets: _firing.Leaves
) -> tuple[_firing.Leaves, CadenceState]:
  """Fires every window that is not empty; when groups are due next stays as it was."""
  groups = []
  for group, old in zip(firing.layout.groups, state.groups, strict=True):
    if old.window is not None:
      window = _open(old, firing.layout.tree(group, group.take(targets)))
      filled = window.length.max() > 0
      targets, old = firing.fire(filled, group, old, window, targets, state.micro_step - 1)
      old = old._replace(window=jnp.zeros_like(window.length))
    groups.append(old)
  return targets, state._replace(groups=tuple(groups))


def _open(state: GroupState, tensors: Any) -> _windows.Window:
  """The window so far, which has to fit the tree of the group's tensors."""
  if state.accumulators is not None:
    _paths.check_same("gradient", "as in the state", state.accumulators, tensors)
  length = jnp.int32(0) if state.window is None else state.window
  squares = None if state.confidence is None else state.confidence.squares
  return _windows.Window(jax.tree.leaves(state.accumulators), length, state.skipped, squares)


def _due(
  every: _schedules.Every, state: GroupState, window: _windows.Window, phase: int | None
) -> tuple[bool | jax.Array, ConfidenceState | None]:
  """Whether the group is due, and what it knows then of its gradients."""
  if every.always:
    return True, None
  if every.policy is not None and state.confidence is not None:
    return _decide(every.policy, state.confidence, state.remaining, window)
  return state.remaining == 1 if phase is None else every.due(phase), None


def _decide(
  policy: Policy, old: ConfidenceState, remaining: Any, window: _windows.Window
) -> tuple[jax.Array, ConfidenceState]:
  """What a policy says to a window; its sum is read only where there is something to decide."""
  regions, squares = len(window.sums), jnp.asarray(window.squares)
  elapsed = policy.max_period - remaining + 1
  asked = elapsed >= policy.opens(old.policy)
  square = _control.maybe(
    asked,
    lambda _, sums: _statistics.squared_norms(sums),
    jnp.zeros(regions, jnp.float32),
    window.sums,
  )
  length = _statistics.per_region(window.length, regions)
  found = _statistics.Statistics(length, squares, square)
  due = (remaining == 1) | (asked & policy.due(found, old.policy))
  fired = ConfidenceState(
    old.squares,
    _statistics.smooth(old.estimate, found, _DECAY),
    elapsed,
    _control.cast_like(policy.fired(found, old.policy), old.policy),
  )
  new = jax.tree.map(lambda x, y: jnp.where(due, x, y), fired, old)
  return due, new._replace(squares=squares)


def _close(
  every: _schedules.Every,
  state: GroupState,
  window: _windows.Window,
  due: bool | jax.Array,
  micro_step: jax.Array,
) -> GroupState:
  """The group's state after this micro-step: a new window where it was due."""
  new = state._replace(skipped=window.skipped)
  if state.remaining is not None:
    ahead = every.window(optax.safe_increment(micro_step))
    new = new._replace(remaining=_control.choose(due, ahead, state.remaining - 1))
  if state.window is not None:
    new = new._replace(window=_control.choose(due, jnp.zeros_like(window.length), window.length))
  return new
