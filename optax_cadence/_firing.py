"""One group fires: its window goes through the inner optimizer, the result into the leaves.

When a group is due, and what it accumulated until then, is decided in `_step`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _clocks
from optax_cadence import _control
from optax_cadence import _inner
from optax_cadence import _layout
from optax_cadence import _learning_rate
from optax_cadence import _regions
from optax_cadence import _windows
from optax_cadence._state import GroupState

# A tree as a dict from the position of a leaf to its array.
Leaves = dict[int, jax.Array]


@dataclasses.dataclass(frozen=True)
class Firing:
  """How groups fire in one call of `update`, `apply` or `flush`.

  A group that fires writes into `targets`: zeros that become the updates, or, where
  `in_place`, the parameters themselves.

  Attributes:
    inner: The inner optimizer.
    layout: Groups of the tree.
    dtypes: Dtype of each leaf's gradient.
    param_dtypes: The same of the parameters; None where there are none.
    params: Parameters; None where there are none, or where they are the targets.
    extra_args: Extra arguments for the inner optimizer.
    in_place: Whether the targets are the parameters.
    sums: Whether the optimizer gets the sum of a window and not its mean.
    set_schedules: Whether schedules in the inner state count micro-steps.
  """

  inner: optax.GradientTransformationExtraArgs
  layout: _layout.Layout
  dtypes: Mapping[int, Any]
  param_dtypes: Mapping[int, Any] | None
  params: Leaves | None
  extra_args: Mapping[str, Any]
  in_place: bool
  sums: bool
  set_schedules: bool

  def fire(
    self,
    when: bool | jax.Array,
    group: _layout.Group,
    state: GroupState,
    window: _windows.Window,
    targets: Leaves,
    micro_step: jax.Array,
  ) -> tuple[Leaves, GroupState]:
    """Runs the inner optimizer on the window, if it is due and not empty."""
    filled = (window.length > 0).any()
    if window.skipped is not None and not isinstance(when, bool):
      when = when & filled
    scratch = self._scratch(when, group, state, window, targets)
    kept = [x if left is None else None for x, left in zip(window.sums, scratch, strict=True)]
    here = {
      t.leaf: targets[t.leaf] for t, x in zip(group.tensors, scratch, strict=True) if x is None
    }
    read = self.params
    if self.in_place:
      read = {i: targets[i] for i in group.leaves if i not in here}
    elif read is not None:
      read = {i: read[i] for i in group.leaves}
    carry, consts = (
      (here, scratch, state.inner_state),
      (window._replace(sums=kept), read, micro_step),
    )
    compute = functools.partial(self._computed, group)
    lent = [t for t, x in zip(group.tensors, scratch, strict=True) if x is not None]
    run = _runner(when, lent, micro_step)
    here, scratch, inner_state = run(compute, carry, consts)
    left = [(t, x) for t, x in zip(group.tensors, scratch, strict=True) if x is not None]
    targets = self._put(when, left, targets | here, micro_step)
    state = state._replace(
      inner_state=inner_state,
      updates=state.updates + (filled & when).astype(jnp.int32),
    )
    if state.accumulators is not None:
      sums = jax.tree.unflatten(jax.tree.structure(state.accumulators), _either(scratch, kept))
      state = state._replace(accumulators=sums)
    return targets, state

  def _scratch(
    self,
    when: bool | jax.Array,
    group: _layout.Group,
    state: GroupState,
    window: _windows.Window,
    targets: Leaves,
  ) -> list[jax.Array | None]:
    """Accumulators by way of which results go into the leaf; None where they go straight.

    Straight goes what is contiguous in a leaf that is written in place. The rest is left in
    its accumulator, which nobody needs any more, and moved by an operation of its own: XLA
    runs one that computes and writes scattered parts of an array on a single CPU core. For
    `update` it saves an array of zeros that would be carried around the branch, if there is
    one.
    """

    def lends(tensor: _layout.Tensor, total: jax.Array) -> bool:
      straight = tensor.cut.contiguous and (self.in_place or when is True)
      return not straight and _windows.holds(total, targets[tensor.leaf])

    if state.accumulators is None:
      return [None] * len(group.tensors)
    return [x if lends(t, x) else None for t, x in zip(group.tensors, window.sums, strict=True)]

  def _put(
    self,
    when: bool | jax.Array,
    results: list[tuple[_layout.Tensor, jax.Array]],
    leaves: Leaves,
    micro_step: jax.Array,
  ) -> Leaves:
    """The leaves, with results written into them; a part of one by an operation of its own."""
    whole = {t.leaf: x for t, x in results if isinstance(t.cut, _regions.Whole)}
    parts = [(t, x) for t, x in results if t.leaf not in whole]

    def move(views: Leaves, values: list[jax.Array]) -> Leaves:
      views = dict(views)
      for (tensor, _), x in zip(parts, values, strict=True):
        views[tensor.leaf] = tensor.cut.put(views[tensor.leaf], x)
      return views

    values = [x.astype(leaves[t.leaf].dtype) for t, x in parts]
    views = {t.leaf: t.cut.view(leaves[t.leaf]) for t, _ in parts}
    if parts:
      views = _runner(when, [t for t, _ in parts], micro_step)(move, views, values)
    written = {i: view.reshape(leaves[i].shape) for i, view in views.items()}
    chosen = {
      i: _control.choose(when, x.astype(leaves[i].dtype), leaves[i]) for i, x in whole.items()
    }
    return leaves | chosen | written

  def _computed(self, group: _layout.Group, carry: Any, consts: Any) -> Any:
    """The carry after the group has fired; but nothing changes where a window is empty."""
    here, scratch, state = carry
    window, _, _ = consts
    compute = functools.partial(self._results, group)
    if window.skipped is None:
      return compute(carry, consts)
    tree = functools.partial(self.layout.tree, group)
    made = self._restored(group, state, tree(_either(scratch, window.sums)))
    flags = _inner.filled(self.inner, made, tree(list(window.length > 0)))
    always = [True] * len(jax.tree.leaves((here, scratch)))
    return _control.keep([*always, *jax.tree.leaves(flags)], compute, carry, consts)

  def _results(self, group: _layout.Group, carry: Any, consts: Any) -> Any:
    """The carry after the inner optimizer has run."""
    here, scratch, state = carry
    window, read, micro_step = consts
    window = window._replace(sums=_either(scratch, window.sums))
    leaves = here | read if self.in_place else read
    tensors = None if leaves is None else group.take(leaves)
    results, state = self._inner_update(group, window, state, tensors, micro_step)
    if self.in_place:
      results = optax.apply_updates(tensors, results)
    if window.skipped is not None:
      filled = window.length > 0
      before = tensors if self.in_place and tensors else map(jnp.zeros_like, results)
      pairs = zip(results, before, strict=True)
      results = [jnp.where(filled[i], x, old) for i, (x, old) in enumerate(pairs)]
    straight = [
      (t, x) for t, s, x in zip(group.tensors, scratch, results, strict=True) if s is None
    ]
    here = self._put(True, straight, here, micro_step)
    left = [None if s is None else x.astype(s.dtype) for s, x in zip(scratch, results, strict=True)]
    return here, left, state

  def _inner_update(
    self,
    group: _layout.Group,
    window: _windows.Window,
    state: optax.OptState,
    params: list[jax.Array] | None,
    micro_step: jax.Array,
  ) -> tuple[list[jax.Array], optax.OptState]:
    """Updates of the group's tensors, in the gradients' dtype, and the new inner state."""
    dtypes = [self.dtypes[tensor.leaf] for tensor in group.tensors]
    grads = _cast(_windows.total(window) if self.sums else _windows.mean(window), dtypes)
    tree = functools.partial(self.layout.tree, group)
    old = self.prepared(group, state, window, micro_step)
    tensors = None if params is None else tree(params)
    found, new = _inner.update(self.inner, tree(grads), old, tensors, self.extra_args)
    updates = _cast(self._checked(group, jax.tree.leaves(found), grads), dtypes)
    return updates, _inner.like(new, state) if group.in_pieces else new

  def prepared(
    self, group: _layout.Group, state: Any, window: _windows.Window, micro_step: jax.Array
  ) -> optax.OptState:
    """The inner state that the group's update starts from."""
    tree = functools.partial(self.layout.tree, group)
    old = self._restored(group, state, tree(window.sums))
    old = _clocks.set_schedules(old, micro_step) if self.set_schedules else old
    lengths = [_windows.item(window.length, i) for i in range(len(group.tensors))]
    return _learning_rate.set_lengths(old, lambda: tree(lengths))

  def _restored(self, group: _layout.Group, state: Any, tensors: Any) -> optax.OptState:
    return _inner.restored(self.inner, state, tensors) if group.in_pieces else state

  def _checked(self, group: _layout.Group, updates: list[Any], grads: list[jax.Array]) -> list[Any]:
    """The updates, if they have the gradients' shapes."""
    for tensor, update, grad in zip(group.tensors, updates, grads, strict=True):
      if jnp.shape(update) != grad.shape:
        raise ValueError(
          f"update of {self.layout.name(tensor.leaf)!r}: expected shape {grad.shape} from the"
          f" inner optimizer, found {jnp.shape(update)}"
        )
    return updates


def _runner(
  when: bool | jax.Array, tensors: list[_layout.Tensor], micro_step: jax.Array
) -> Callable[..., Any]:
  """`maybe`; but `apart` where a scattered tensor is known to be due.

  Fused with what comes before, its gradient would be read by index once for every result.
  """
  if when is True and not all(t.cut.contiguous for t in tensors):
    return functools.partial(_control.apart, count=micro_step)
  return functools.partial(_control.maybe, when)


def _either(first: list[Any], second: list[Any]) -> list[Any]:
  return [y if x is None else x for x, y in zip(first, second, strict=True)]


def _cast(tensors: list[jax.Array], dtypes: list[Any]) -> list[jax.Array]:
  return [x.astype(dtype) for x, dtype in zip(tensors, dtypes, strict=True)]
