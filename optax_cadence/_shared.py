"""Leaves under a mask: one state for all entries, shared by the groups that they belong to.

Every period of a random mask has entries in every cache line, so that to gather the entries of
each group is to read the leaf once a group. Where the inner optimizer is elementwise, which
`_programs` proves, accumulators and moments stay in the shape of the leaf and one pass serves
all groups; numbers of a group are looked up by the code that each entry has. In the groups, which
`_step` and `_firing` know, stand tensors without entries.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cadence import _control
from optax_cadence import _elementwise
from optax_cadence import _firing
from optax_cadence import _layout
from optax_cadence import _paths
from optax_cadence import _programs
from optax_cadence import _regions
from optax_cadence import _windows
from optax_cadence._state import SharedState

_CODES = (np.uint8, np.uint16, np.uint32)


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


@dataclasses.dataclass(frozen=True)
class Mask:
  """A leaf whose entries belong to several groups.

  Attributes:
    leaf: Its position in the tree.
    groups: The groups, by position.
    cuts: Which entries each has.
    bits: The bit that stands for each in the codes of the entries.
  """

  leaf: int
  groups: tuple[int, ...]
  cuts: tuple[_regions.Entries, ...]
  bits: tuple[int, ...]

  def of(self, which: Sequence[int]) -> "Mask":
    """The same of some of the groups."""

    def pick(row: tuple[Any, ...]) -> tuple[Any, ...]:
      return tuple(row[i] for i in which)

    return Mask(self.leaf, pick(self.groups), pick(self.cuts), pick(self.bits))

  def codes(self, shape: _regions.Shape) -> jax.Array:
    """The bit of its group for every entry: unsigned integers, as wide as that takes."""
    codes = np.zeros(shape, next(d for d in _CODES if np.iinfo(d).max >= max(self.bits)))
    for bit, cut in zip(self.bits, self.cuts, strict=True):
      codes.reshape(-1)[cut.indices] = bit
    # Else the compiler would work out every comparison with them, and keep it as a constant.
    return jax.lax.optimization_barrier(jnp.asarray(codes))

  def any(self, codes: jax.Array, flags: Sequence[Any]) -> jax.Array:
    """Whether the flag of its group is set, for every entry."""
    dtype = codes.dtype.type
    pairs = zip(self.bits, flags, strict=True)
    found = [jnp.where(flag, dtype(bit), dtype(0)) for bit, flag in pairs]
    return (codes & functools.reduce(jnp.bitwise_or, found)) != 0

  def look_up(self, codes: jax.Array, like: jax.Array, numbers: Sequence[Any]) -> jax.Array:
    """The number of its group for every entry, in an array of this shape."""
    *others, last = numbers
    found = jnp.full_like(like, last, dtype=last.dtype)
    for bit, x in zip(self.bits, others, strict=False):
      if x is not last and not _equal(x, last):
        found = jnp.where(codes == bit, x, found)
    return found


def masks(layout: _layout.Layout, kind: type = _regions.Entries) -> list[Mask]:
  """The leaves under a mask, or those of them that are shared, in order."""
  found: dict[int, list[tuple[int, Any]]] = {}
  for g, group in enumerate(layout.groups):
    for t in group.tensors:
      if isinstance(t.cut, kind):
        found.setdefault(t.leaf, []).append((g, t.cut))
  masks = []
  for i in sorted(found):
    groups, cuts = zip(*found[i], strict=True)
    masks.append(Mask(i, groups, cuts, tuple(1 << j for j in range(len(groups)))))
  return masks


def shared(layout: _layout.Layout) -> list[Mask]:
  """The leaves under a mask that are shared, in order."""
  return masks(layout, _regions.SharedEntries)


def provable(inner: Any, layout: _layout.Layout, leaves: Mapping[int, Any]) -> frozenset[int]:
  """The leaves under a mask that the inner optimizer can be proved to treat entry by entry."""
  found = [m for m in masks(layout) if len(m.groups) <= np.iinfo(_CODES[-1]).bits]
  try:
    moments = {m.leaf: _moments(inner, layout, m, leaves[m.leaf]) for m in found}
    groups = {g: layout.groups[g] for m in found for g in m.groups}
    programs = {g: _programs.trace(inner, layout, x, leaves, leaves) for g, x in groups.items()}
  except Exception:  # Whatever an optimizer may raise that wants other arguments than these.
    return frozenset()
  return frozenset(m.leaf for m in found if _proved(m, programs, moments))


def _proved(mask: Mask, programs: Mapping[int, _programs.Program], moments: Any) -> bool:
  try:
    _programs.prove([programs[g] for g in mask.groups], mask.leaf, moments)
  except _elementwise.NotElementwiseError:
    return False
  return True


def _moments(inner: Any, layout: _layout.Layout, mask: Mask, leaf: Any) -> dict[Any, int]:
  return _programs.moments(inner, layout, mask.leaf, _programs.vector(mask.cuts[0], leaf))


def init(
  inner: Any, layout: _layout.Layout, mask: Mask, leaf: jax.Array, dtype: Any
) -> SharedState:
  """The state of a leaf, with an accumulator of this dtype."""
  vectors = [_programs.vector(cut, leaf) for cut in mask.cuts]
  jaxprs = [_elementwise.trace(inner.init, layout.only(mask.leaf, v)) for v in vectors]
  moments = _moments(inner, layout, mask, leaf)
  look_up = functools.partial(mask.look_up, mask.codes(leaf.shape), leaf)
  at = [(i,) * len(jaxprs) for i in moments.values()]
  values = _elementwise.run(jaxprs, [((0,) * len(jaxprs), leaf)], at, look_up)
  found = dict(zip(moments, (_elementwise.array(x, look_up) for x in values), strict=True))
  made = jax.eval_shape(inner.init, layout.only(mask.leaf, leaf))
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
  known, found = {layout.paths[m.leaf]: m.leaf for m in masks(layout)}, []
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
  new = []
  for mask, state in zip(shared(firing.layout), states, strict=True):
    mine = [turns[g] for g in mask.groups]
    total, moments = jax.tree.leaves(state.accumulators)[0], jax.tree.leaves(state.inner_state)
    codes = mask.codes(total.shape)
    if grads is not None:
      first = mask.any(codes, [turn.window.length == 1 for turn in mine])
      grad = grads[mask.leaf].astype(total.dtype)
      total = jnp.where(first, grad, total + grad)
    carry = total, targets[mask.leaf], moments
    total, target, moments = _fire(firing, mask, codes, mine, carry, micro_step)
    targets = targets | {mask.leaf: target}
    arrays = jax.tree.unflatten(jax.tree.structure(state), [*moments, total])
    new.append(arrays)
  return targets, tuple(new)


def _fire(
  firing: _firing.Firing,
  mask: Mask,
  codes: jax.Array,
  turns: Sequence[Turn],
  carry: Any,
  micro_step: jax.Array,
) -> Any:
  """Sum, target and moments of a leaf, after the groups that are due have fired."""
  due = [i for i, turn in enumerate(turns) if turn.when is not False]
  if not due:
    return carry
  mask, turns = mask.of(due), [turns[i] for i in due]
  lengths = [jnp.maximum(turn.window.length, 1) for turn in turns]
  states = [
    jax.tree.leaves(firing.prepared(firing.layout.groups[g], inner, window, micro_step))
    for g, (inner, window, _) in zip(mask.groups, turns, strict=True)
  ]

  whens = [turn.when for turn in turns]

  def compute(carry: Any, params: Any) -> Any:
    total, target, moments = carry
    look_up = functools.partial(mask.look_up, codes, total)
    mean = total if firing.sums else _windows.divide(total, look_up(lengths))
    params = target if firing.in_place else params
    grad = mean.astype(firing.dtypes[mask.leaf])
    update, moments = _update(firing, mask, states, look_up, grad, moments, params)
    new = optax.apply_updates([params], [update])[0] if firing.in_place else update
    return mean, new, moments

  def fire(carry: Any, params: Any) -> Any:
    # The mean takes the place of the sum, which nobody needs any more: no room is made for it.
    return _control.keep(mask.any(codes, whens), compute, carry, params)

  when = any(when is True for when in whens) or functools.reduce(jnp.logical_or, whens)
  params = None if firing.params is None else firing.params[mask.leaf]
  return _control.maybe(when, fire, carry, params)


def _update(
  firing: _firing.Firing,
  mask: Mask,
  states: Sequence[list[jax.Array]],
  look_up: _elementwise.LookUp,
  grad: jax.Array,
  moments: list[jax.Array],
  params: jax.Array | None,
) -> tuple[jax.Array, list[jax.Array]]:
  """The inner optimizer's update of a leaf and new moments, for all its groups.

  Raises:
    ValueError: If it is elementwise no longer.
  """
  leaf, programs = mask.leaf, _traced(firing, mask, states)
  paths = _moments(firing.inner, firing.layout, mask, grad if params is None else params)
  held = dict(zip(paths, moments, strict=True))
  try:
    if firing.extra_args:  # The proof was without.
      _programs.prove(programs, leaf, {leaf: paths})
    update, *moments = _programs.run(programs, leaf, held, states, grad, params, look_up)
  except _elementwise.NotElementwiseError as error:
    raise ValueError(
      f"update of {firing.layout.name(leaf)!r}: expected an inner optimizer that treats the entries"
      f" of a mask one by one, as it did when the state was made, found {error}"
    ) from None
  return update.astype(grad.dtype), moments


def _traced(
  firing: _firing.Firing, mask: Mask, states: Sequence[list[jax.Array]]
) -> list[_programs.Program]:
  """The inner optimizer's updates of the groups."""
  layout, programs = firing.layout, []
  grads = layout.avals(firing.dtypes)
  params = None if firing.param_dtypes is None else layout.avals(firing.param_dtypes)
  for g, state in zip(mask.groups, states, strict=True):
    dtypes = [x.dtype for x in state]
    args = layout, layout.groups[g], grads, params, dtypes, firing.extra_args
    programs.append(_programs.trace(firing.inner, *args))
  return programs


def _equal(one: Any, other: Any) -> bool:
  known = all(isinstance(x, np.ndarray | np.generic) for x in (one, other))
  return known and bool(one == other)
