"""Leaves under a mask: one state for all entries, shared by the groups that they belong to.

Every period of a random mask has entries in every cache line, so that to gather the entries of
each group is to read the leaf once a group. Where the inner optimizer is elementwise, which
`_programs` proves, accumulators and moments stay in the shape of the leaf and one pass serves
all groups; numbers of a group are looked up by the code that each entry has. In the groups, which
`_step` and `_firing` know, stand tensors without entries.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _control
from optax_cadence import _elementwise
from optax_cadence import _firing
from optax_cadence import _layout
from optax_cadence import _masks
from optax_cadence import _paths
from optax_cadence import _programs
from optax_cadence import _windows
from optax_cadence._state import SharedState


class Turn(NamedTuple):
  """A group at a micro-step, before it fires.

  Attributes:
    inner_state: State of its inner optimizer.
    window: Its window, with this micro-step.
    when: Whether it fires.
  """

  inner_state: optax.OptState
  window: _windows.Window
  when: bool | jax.Array


class _Update(NamedTuple):
  """How a group is updated, and the arrays of the state that it starts from."""

  program: _programs.Program
  state: list[jax.Array]


def provable(inner: Any, layout: _layout.Layout, leaves: Mapping[int, Any]) -> frozenset[int]:
  """The leaves under a mask that the inner optimizer can be proved to treat entry by entry."""
  found = [m for m in _masks.of(layout) if len(m.groups) <= _masks.MAX_GROUPS]
  try:
    moments = {m.leaf: _moments(inner, layout, m, leaves[m.leaf]) for m in found}
    groups = {g: layout.groups[g] for m in found for g in m.groups}
    programs = {g: _programs.trace(inner, layout, x, leaves, leaves) for g, x in groups.items()}
  except Exception:  # Whatever an optimizer may raise that wants other arguments than these.
    return frozenset()

  def proved(mask: _masks.Mask) -> bool:
    mine = [programs[g] for g in mask.groups]
    return _elementwise.provable(_programs.prove, mine, mask.leaf, moments)

  return frozenset(m.leaf for m in found if proved(m))


def _moments(inner: Any, layout: _layout.Layout, mask: _masks.Mask, leaf: Any) -> dict[Any, int]:
  return _programs.moments(inner, layout, mask.leaf, _programs.vector(mask.cuts[0], leaf))


def init(
  inner: Any, layout: _layout.Layout, mask: _masks.Mask, leaf: jax.Array, dtype: Any
) -> SharedState:
  """The state of a leaf, with an accumulator of this dtype."""
  vectors = [_programs.vector(cut, leaf) for cut in mask.cuts]
  jaxprs = [_elementwise.trace(inner.init, layout.only(mask.leaf, v)) for v in vectors]
  moments = _moments(inner, layout, mask, leaf)
  look_up = functools.partial(mask.look_up, mask.codes(leaf.shape), leaf)
  at = [(i,) * len(jaxprs) for i in moments.values()]
  values = _elementwise.run(jaxprs, [((0,) * len(jaxprs), leaf)], at, look_up)
  found = dict(zip(moments, (_elementwise.array(x, look_up) for x in values), strict=True))
  made = jax.eval_shape(inner.init, layout.only(mask.leaf, vectors[0]))
  kept = jax.tree_util.tree_map_with_path(lambda path, _: found.get(path, optax.MaskedNode()), made)
  return SharedState(kept, layout.only(mask.leaf, jnp.zeros(leaf.shape, dtype)))


def stand_in(inner: Any, placeholder: Any) -> SharedState:
  """The state of a stand-in for the parameters, which `tree_map_params` probes with."""
  made = inner.init(placeholder)
  kept = jax.tree.map(lambda x: optax.MaskedNode() if hasattr(x, "dtype") else x, made)
  return SharedState(kept, placeholder)


def leaves_of(layout: _layout.Layout, states: Sequence[SharedState]) -> list[int]:
  """The leaves that states are of.

  Raises:
    ValueError: If one is not under a mask here.
  """
  known, found = {layout.paths[m.leaf]: m.leaf for m in _masks.of(layout)}, []
  for state in states:
    paths = [path for path, _ in _paths.flatten_with_paths(state.accumulators)]
    if len(paths) != 1 or paths[0] not in known:
      raise ValueError(
        f"state: expected leaves under masks to be {_paths.listed(known)}, found"
        f" {_paths.listed(paths)}; a state goes with the cadences it was made for"
      )
    found.append(known[paths[0]])
  return found


def advance(
  firing: _firing.Firing,
  states: Sequence[SharedState],
  grads: _firing.Leaves | None,
  turns: Sequence[Turn],
  targets: _firing.Leaves,
  micro_step: jax.Array,
) -> tuple[_firing.Leaves, tuple[SharedState, ...]]:
  """Adds the gradients, if there are any, and fires the entries that are due."""
  masks, new = _masks.shared(firing.layout), []
  due = {g for mask in masks for g in mask.groups if turns[g].when is not False}
  updates = {g: _update(firing, firing.layout.groups[g], turns[g], micro_step) for g in sorted(due)}
  for mask, state in zip(masks, states, strict=True):
    mine = [turns[g] for g in mask.groups]
    total, moments = jax.tree.leaves(state.accumulators)[0], jax.tree.leaves(state.inner_state)
    codes = mask.codes(total.shape)
    if grads is not None:
      first = mask.any(codes, [turn.window.length == 1 for turn in mine])
      grad = grads[mask.leaf].astype(total.dtype)
      total = jnp.where(first, grad, total + grad)
    carry = total, targets[mask.leaf], moments
    mask = mask.only(due)
    if mask.groups:
      mine = [turns[g] for g in mask.groups]
      carry = _fire(firing, mask, codes, mine, [updates[g] for g in mask.groups], carry)
    total, target, moments = carry
    targets = targets | {mask.leaf: target}
    new.append(jax.tree.unflatten(jax.tree.structure(state), [*moments, total]))
  return targets, tuple(new)


def _update(
  firing: _firing.Firing, group: _layout.Group, turn: Turn, micro_step: jax.Array
) -> _Update:
  """How the inner optimizer updates a group, and from which state."""
  layout = firing.layout
  old = firing.prepared(group, turn.inner_state, turn.window, micro_step)
  state = jax.tree.leaves(old)
  grads = layout.avals(firing.dtypes)
  params = None if firing.param_dtypes is None else layout.avals(firing.param_dtypes)
  dtypes = [x.dtype for x in state]
  program = _programs.trace(firing.inner, layout, group, grads, params, dtypes, firing.extra_args)
  return _Update(program, state)


def _fire(
  firing: _firing.Firing,
  mask: _masks.Mask,
  codes: jax.Array,
  turns: Sequence[Turn],
  updates: Sequence[_Update],
  carry: Any,
) -> Any:
  """Sum, target and moments of a leaf, after the groups that are due have fired."""
  whens = [turn.when for turn in turns]
  lengths = [jnp.maximum(turn.window.length, 1) for turn in turns]

  def compute(carry: Any, params: Any) -> Any:
    total, target, moments = carry
    look_up = functools.partial(mask.look_up, codes, total)
    mean = total if firing.sums else _windows.divide(total, look_up(lengths))
    params = target if firing.in_place else params
    grad = mean.astype(firing.dtypes[mask.leaf])
    new, *moments = _run(firing, mask, updates, look_up, grad, moments, params)
    new = new.astype(grad.dtype)
    new = optax.apply_updates([params], [new])[0] if firing.in_place else new
    return mean, new, moments

  def fire(carry: Any, params: Any) -> Any:
    # The mean takes the place of the sum, which nobody needs any more: no room is made for it.
    return _control.keep(mask.any(codes, whens), compute, carry, params)

  when = any(when is True for when in whens) or functools.reduce(jnp.logical_or, whens)
  params = None if firing.params is None else firing.params[mask.leaf]
  return _control.maybe(when, fire, carry, params)


def _run(
  firing: _firing.Firing,
  mask: _masks.Mask,
  updates: Sequence[_Update],
  look_up: _elementwise.LookUp,
  grad: jax.Array,
  moments: list[jax.Array],
  params: jax.Array | None,
) -> list[jax.Array]:
  """The update of a leaf by the inner optimizer, and its new moments.

  Raises:
    ValueError: If entries are updated one by one no longer.
  """
  paths = _moments(firing.inner, firing.layout, mask, grad if params is None else params)
  programs, states = zip(*updates, strict=True)
  held = dict(zip(paths, moments, strict=True))
  try:
    if firing.extra_args:  # The proof was without.
      _programs.prove(programs, mask.leaf, {mask.leaf: paths})
    return _programs.run(programs, mask.leaf, held, states, grad, params, look_up)
  except _elementwise.NotElementwiseError as error:
    raise ValueError(
      f"update of {firing.layout.name(mask.leaf)!r}: expected an inner optimizer that treats the"
      f" entries of a mask one by one, as it did when the state was made, found {error}"
    ) from None
