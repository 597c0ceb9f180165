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
from optax_cadence import _windows
from optax_cadence._state import CadenceState
from optax_cadence._state import GroupState


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
    due = _due(group.every, old, phase)
    targets, new = firing.fire(due, group, old, window, targets, state.micro_step)
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
  return _windows.Window(jax.tree.leaves(state.accumulators), length, state.skipped)


def _due(every: _schedules.Every, state: GroupState, phase: int | None) -> bool | jax.Array:
  if every.always:
    return True
  return state.remaining == 1 if phase is None else every.due(phase)


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
