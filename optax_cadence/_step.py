"""One micro-step: every group accumulates, and fires if it is due.

Each group is on its own. It cuts its tensors out of the gradients and accumulates them;
only when it is due, inside a branch that runs zero times or once (`_control.maybe`), are
parameters and inner state reached.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _clocks
from optax_cadence import _control
from optax_cadence import _inner
from optax_cadence import _layout
from optax_cadence import _paths
from optax_cadence import _schedules
from optax_cadence import _windows
from optax_cadence._state import CadenceState
from optax_cadence._state import GroupState

# A tree as a dict from the position of a leaf to its array.
Leaves = dict[int, jax.Array]


@dataclasses.dataclass(frozen=True)
class Step:
  """One call of `update`, `apply` or `flush`: all that its groups have in common.

  A group that fires writes into `targets`: zeros that become the updates, or, where
  `in_place`, the parameters themselves.

  Attributes:
    inner: The inner optimizer.
    layout: Groups of the tree.
    dtypes: Dtype of each leaf's gradient.
    params: Parameters; None where there are none, or where they are the targets.
    extra_args: Extra arguments for the inner optimizer.
    in_place: Whether the targets are the parameters.
    sums: Whether the optimizer gets the sum of a window and not its mean.
    set_schedules: Whether schedules in the inner state count micro-steps.
  """

  inner: optax.GradientTransformationExtraArgs
  layout: _layout.Layout
  dtypes: Mapping[int, Any]
  params: Leaves | None
  extra_args: Mapping[str, Any]
  in_place: bool
  sums: bool
  set_schedules: bool

  def advance(
    self, grads: Leaves, state: CadenceState, targets: Leaves, phase: int | None
  ) -> tuple[Leaves, CadenceState]:
    """Adds the gradients to every window and fires the groups that are due."""
    groups = []
    for group, old in zip(self.layout.groups, state.groups, strict=True):
      tensors = group.take(grads)
      window = _windows.add(_open(old, self.layout.tree(group, tensors)), tensors)
      due = _due(group.every, old, phase)
      targets, new = self._fire(due, group, old, window, targets, state.micro_step)
      groups.append(_close(group.every, new, window, due, state.micro_step))
    return targets, CadenceState(optax.safe_increment(state.micro_step), tuple(groups))

  def flush(self, state: CadenceState, targets: Leaves) -> tuple[Leaves, CadenceState]:
    """Fires every window that is not empty; when groups are due next stays as it was."""
    groups = []
    for group, old in zip(self.layout.groups, state.groups, strict=True):
      if old.window is not None:
        window = _open(old, self.layout.tree(group, group.take(targets)))
        filled = window.length.max() > 0
        targets, old = self._fire(filled, group, old, window, targets, state.micro_step - 1)
        old = old._replace(window=jnp.zeros_like(window.length))
      groups.append(old)
    return targets, state._replace(groups=tuple(groups))

  def _fire(
    self,
    when: bool | jax.Array,
    group: _layout.Group,
    state: GroupState,
    window: _windows.Window,
    targets: Leaves,
    micro_step: jax.Array,
  ) -> tuple[Leaves, GroupState]:
    """Runs the inner optimizer on the window, if it is due and not empty."""
    fire = functools.partial(self._updated, group, False)
    fire_beside_empty = functools.partial(self._updated, group, True)
    filled = window.length > 0
    here = {i: targets[i] for i in group.leaves}
    params = None if self.params is None else {i: self.params[i] for i in group.leaves}
    carry, consts = (here, state.inner_state), (window, params, micro_step)
    if window.skipped is None:
      carry = _control.maybe(when, fire, carry, consts)
    elif isinstance(when, bool):
      carry = _control.maybe(when, fire_beside_empty, carry, consts)
    else:
      # To select what stays costs a copy, so this rare case has a branch of its own.
      carry = _control.maybe(when & filled.all(), fire, carry, consts)
      if len(group.tensors) > 1:
        mixed = filled.any() & ~filled.all()
        carry = _control.maybe(when & mixed, fire_beside_empty, carry, consts)
    fired = (filled.any() & when).astype(jnp.int32)
    return targets | carry[0], state._replace(inner_state=carry[1], updates=state.updates + fired)

  def _updated(
    self, group: _layout.Group, keep_empty: bool, carry: Any, consts: Any
  ) -> tuple[Leaves, optax.OptState]:
    """Targets and inner state, `carry`, after the group has fired."""
    targets, state = carry
    window, params, micro_step = consts
    leaves = targets if self.in_place else params
    tensors = None if leaves is None else group.take(leaves)
    updates, new = self._inner_update(group, window, state, tensors, micro_step, keep_empty)
    if self.in_place:
      updates = optax.apply_updates(tensors, updates)
    return group.put(targets, updates), new

  def _inner_update(
    self,
    group: _layout.Group,
    window: _windows.Window,
    state: optax.OptState,
    params: list[jax.Array] | None,
    micro_step: jax.Array,
    keep_empty: bool,
  ) -> tuple[list[jax.Array], optax.OptState]:
    """Updates of the group's tensors, in the gradients' dtype, and the new inner state."""
    dtypes = [self.dtypes[region.leaf] for region in group.tensors]
    grads = _cast(_windows.total(window) if self.sums else _windows.mean(window), dtypes)
    tree = functools.partial(self.layout.tree, group)
    old = _inner.restored(self.inner, state, tree(grads)) if group.in_pieces else state
    before = _clocks.set_schedules(old, micro_step) if self.set_schedules else old
    tensors = None if params is None else tree(params)
    found, new = _inner.update(self.inner, tree(grads), before, tensors, self.extra_args)
    updates = _cast(self._checked(group, jax.tree.leaves(found), grads), dtypes)
    if keep_empty:
      filled = window.length > 0
      updates = [jnp.where(filled[i], u, jnp.zeros_like(u)) for i, u in enumerate(updates)]
      new = _inner.keep_empty(self.inner, tree(list(filled)), new, old)
    return updates, _inner.like(new, state) if group.in_pieces else new

  def _checked(self, group: _layout.Group, updates: list[Any], grads: list[jax.Array]) -> list[Any]:
    """The updates, if they have the gradients' shapes."""
    for region, update, grad in zip(group.tensors, updates, grads, strict=True):
      if jnp.shape(update) != grad.shape:
        raise ValueError(
          f"update of {self.layout.name(region.leaf)!r}: expected shape {grad.shape} from the"
          f" inner optimizer, found {jnp.shape(update)}"
        )
    return updates


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

  def reset(new: jax.Array, current: jax.Array) -> jax.Array:
    if isinstance(due, bool):
      return new if due else current
    return jnp.where(due, new, current)

  new = state._replace(skipped=window.skipped)
  if state.remaining is not None:
    ahead = every.window(optax.safe_increment(micro_step))
    new = new._replace(remaining=reset(ahead, state.remaining - 1))
  if state.window is not None:
    accumulators = jax.tree.unflatten(jax.tree.structure(state.accumulators), window.sums)
    length = reset(jnp.zeros_like(window.length), window.length)
    new = new._replace(accumulators=accumulators, window=length)
  return new


def _cast(tensors: list[jax.Array], dtypes: list[Any]) -> list[jax.Array]:
  return [x.astype(dtype) for x, dtype in zip(tensors, dtypes, strict=True)]
