"""Leaves under a mask: one accumulator and one set of moments for the entries of all groups.

Every period of a random mask has entries in every cache line, so that to gather the entries of
each group is to read the leaf once a group. Where the inner optimizer is elementwise (see `proof`),
accumulators and moments stay in the shape of the leaf and one pass serves all groups. Counters and
other numbers stay with the groups, and are looked up for each entry: to what group an entry belongs
is told by a code of one bit for each group.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cadence import _control
from optax_cadence import _window
from optax_cadence._state import MaskState
from optax_cadence.entrywise import lanes
from optax_cadence.entrywise import proof
from optax_cadence.programs import reading
from optax_cadence.regions.cuts import Entries
from optax_cadence.regions.cuts import Shape
from optax_cadence.regions.layout import Group
from optax_cadence.regions.layout import Layout
from optax_cadence.regions.layout import Leaves

if TYPE_CHECKING:
  from optax_cadence._step import Call
  from optax_cadence._step import Turn

_CODES = (np.uint8, np.uint16, np.uint32)


@dataclasses.dataclass(frozen=True)
class Mask:
  """A leaf whose entries belong to several groups.

  Attributes:
    leaf: Its position in the tree.
    groups: The names of the groups.
    cuts: Which entries each has.
    bits: The bit that stands for each.
  """

  leaf: int
  groups: tuple[str, ...]
  cuts: tuple[Entries, ...]
  bits: tuple[int, ...]

  def only(self, groups: Collection[str]) -> "Mask":
    """The same of those that are among these groups, with the bits that they have here."""
    kept = [i for i, name in enumerate(self.groups) if name in groups]
    names, cuts = tuple(self.groups[i] for i in kept), tuple(self.cuts[i] for i in kept)
    return Mask(self.leaf, names, cuts, tuple(self.bits[i] for i in kept))

  def codes(self, shape: Shape) -> jax.Array:
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
    bits = [jnp.where(flag, dtype(bit), dtype(0)) for bit, flag in pairs]
    return (codes & functools.reduce(jnp.bitwise_or, bits)) != 0

  def look_up(self, codes: jax.Array, like: jax.Array, numbers: Sequence[Any]) -> jax.Array:
    """The number of its group for every entry, in an array of this shape."""
    *others, last = numbers
    result = jnp.full_like(like, last, dtype=last.dtype)
    for bit, x in zip(self.bits, others, strict=False):
      if x is not last and not _equal(x, last):
        result = jnp.where(codes == bit, x, result)
    return result


def masks_of(layout: Layout) -> list[Mask]:
  """The leaves under masks that their groups train together, in order."""
  masks = []
  for leaf in layout.masked:
    rows = [(g.name, t.cut) for g in layout.groups for t in g.masked if t.leaf == leaf]
    names, cuts = zip(*rows, strict=True)
    masks.append(Mask(leaf, names, cuts, tuple(1 << i for i in range(len(names)))))
  return masks


def _equal(x: Any, y: Any) -> bool:
  known = all(isinstance(value, np.ndarray | np.generic) for value in (x, y))
  return known and bool(x == y)


def init(
  inner: Any, layout: Layout, leaves: Leaves, sum_dtype: Callable[[Any], Any]
) -> MaskState | None:
  """The state of all leaves under masks."""
  masks = masks_of(layout)
  vectors: dict[int, list[jax.ShapeDtypeStruct]] = {}
  held: dict[Any, Any] = {}
  for mask in masks:
    leaf = leaves[mask.leaf]
    sizes = [cut.indices.size for cut in mask.cuts]
    vectors[mask.leaf] = [jax.ShapeDtypeStruct((size,), leaf.dtype) for size in sizes]
    programs = [
      reading.traced(inner.init, proof.tree_of(layout, {mask.leaf: v})) for v in vectors[mask.leaf]
    ]
    moments = _moments(inner, layout, mask.leaf, vectors[mask.leaf][0])
    look_up = functools.partial(mask.look_up, mask.codes(leaf.shape), leaf)
    parts = [reading.part(program, [0], list(moments.values())) for program in programs]
    values = lanes.run(parts, [leaf], look_up)
    held |= dict(zip(moments, (lanes.as_array(x, look_up) for x in values), strict=True))
  sums = {m.leaf: jnp.zeros(layout.shapes[m.leaf], sum_dtype(leaves[m.leaf].dtype)) for m in masks}
  tree = proof.tree_of(layout, {leaf: vector[0] for leaf, vector in vectors.items()})
  try:
    example = jax.eval_shape(inner.init, tree)
  except proof.REFUSALS:
    return None  # No leaf is trained here, and an optimizer need not take a tree without any.
  kept = jax.tree_util.tree_map_with_path(
    lambda path, _: held.get(path, optax.MaskedNode()), example
  )
  return MaskState(kept, proof.tree_of(layout, sums))


def stand_in(inner: Any, placeholder: Any) -> MaskState:
  """The state of a stand-in for the parameters, which `tree_map_params` probes with."""
  state = inner.init(placeholder)
  kept = jax.tree.map(lambda x: optax.MaskedNode() if hasattr(x, "dtype") else x, state)
  return MaskState(kept, placeholder)


def without_entries(
  inner: optax.GradientTransformationExtraArgs, layout: Layout, group: Group
) -> optax.GradientTransformationExtraArgs:
  """The inner optimizer as a group runs it whose entries under masks are trained elsewhere.

  It sees an empty vector in the place of each such leaf, so that its state has the numbers that
  belong to the leaf (a counter, say); arrays without entries are left out of the state that is
  kept.
  """
  empty = {t.leaf: jnp.zeros(0, jnp.float32) for t in group.masked}

  def with_empty(tree: Any) -> Any:
    slots = layout.treedef.flatten_up_to(tree)
    return layout.treedef.unflatten([empty.get(i, x) for i, x in enumerate(slots)])

  def without_empty(state: Any) -> Any:
    return jax.tree.map(lambda x: optax.MaskedNode() if jnp.size(x) == 0 else x, state)

  def init(params: Any) -> Any:
    return without_empty(inner.init(with_empty(params)))

  def update(grads: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
    grads = with_empty(grads)
    params = None if params is None else with_empty(params)
    expected = jax.eval_shape(inner.init, grads if params is None else params)
    kept = dict(jax.tree_util.tree_flatten_with_path(state)[0])
    state = jax.tree_util.tree_map_with_path(
      lambda path, x: kept[path] if path in kept else jnp.zeros(x.shape, x.dtype), expected
    )
    updates, state = inner.update(grads, state, params, **extra_args)
    slots = layout.treedef.flatten_up_to(updates)
    updates = [optax.MaskedNode() if i in empty else x for i, x in enumerate(slots)]
    return layout.treedef.unflatten(updates), without_empty(state)

  return optax.GradientTransformationExtraArgs(init, update)


def advance(
  call: "Call",
  state: MaskState,
  grads: Leaves | None,
  turns: Mapping[str, "Turn"],
  targets: Leaves,
  micro_step: jax.Array,
) -> tuple[Leaves, MaskState]:
  """Adds the gradients, if there are any, and fires the entries that are due."""
  masks = masks_of(call.layout)
  due = {name for mask in masks for name in mask.groups if turns[name].fires is not False}
  states, programs = {}, {}
  for group in call.layout.groups:
    if group.name in due:
      turn = turns[group.name]
      inner_state = call.state_of(group, turn.inner_state, turn.window, micro_step)
      states[group.name] = dict(jax.tree_util.tree_flatten_with_path(inner_state)[0])
      programs[group.name] = proof.trace(
        call.inner,
        call.layout,
        group,
        call.dtypes,
        None if call.params is None else [x.dtype for x in call.params.values()],
        states[group.name],
        call.extra_args,
      )
  totals, paths, moments = _by_leaf(call, state)
  for mask in masks:
    total = totals[mask.leaf]
    codes = mask.codes(total.shape)
    if grads is not None:
      first = mask.any(codes, [turns[name].window.length == 1 for name in mask.groups])
      grad = grads[mask.leaf].astype(total.dtype)
      total = jnp.where(first, grad, total + grad)
    carry = total, targets[mask.leaf], moments[mask.leaf]
    now = mask.only(due)
    if now.groups:
      carry = _fire(call, now, codes, turns, programs, states, paths[mask.leaf], carry)
    totals[mask.leaf], target, moments[mask.leaf] = carry
    targets = targets | {mask.leaf: target}
  new = {path: x for leaf in paths for path, x in zip(paths[leaf], moments[leaf], strict=True)}
  inner_state = jax.tree_util.tree_map_with_path(lambda path, _: new[path], state.inner_state)
  sums = jax.tree.unflatten(jax.tree.structure(state.accumulators), totals.values())
  return targets, MaskState(inner_state, sums)


def _by_leaf(
  call: "Call", state: MaskState
) -> tuple[dict[int, jax.Array], dict[int, list[Any]], dict[int, list[jax.Array]]]:
  """The sum of each leaf under a mask, where a state keeps its moments, and the moments."""
  held = dict(jax.tree_util.tree_flatten_with_path(state.inner_state)[0])
  totals = dict(zip(call.layout.masked, jax.tree.leaves(state.accumulators), strict=True))
  paths = {}
  for mask in masks_of(call.layout):
    leaf, size = mask.leaf, mask.cuts[0].indices.size
    dtype = call.dtypes[leaf] if call.params is None else call.params[leaf].dtype
    entries = jax.ShapeDtypeStruct((size,), dtype)
    paths[leaf] = list(_moments(call.inner, call.layout, leaf, entries))
  return totals, paths, {leaf: [held[path] for path in paths[leaf]] for leaf in paths}


def _moments(inner: Any, layout: Layout, leaf: int, entries: Any) -> dict[Any, int]:
  paths = proof.moments(inner, layout, leaf, entries)
  assert not isinstance(paths, str), paths
  return paths


def _fire(
  call: "Call",
  mask: Mask,
  codes: jax.Array,
  turns: Mapping[str, "Turn"],
  programs: Mapping[str, proof.Program],
  states: Mapping[str, Mapping[Any, jax.Array]],
  paths: Sequence[Any],
  carry: Any,
) -> Any:
  """Sum, target and moments of a leaf, after the groups that are due have fired."""
  fires = [turns[name].fires for name in mask.groups]
  lengths = [jnp.maximum(turns[name].window.length, 1) for name in mask.groups]
  updates = [programs[name] for name in mask.groups]
  numbers = [states[name] for name in mask.groups]
  _check(call, mask, updates, paths)

  def compute(carry: Any, param: Any) -> Any:
    total, target, moments = carry
    look_up = functools.partial(mask.look_up, codes, total)
    mean = total if call.sums else _window.divide(total, look_up(lengths))
    param = target if call.in_place else param
    grad = mean.astype(call.dtypes[mask.leaf])
    held = dict(zip(paths, moments, strict=True))
    results = proof.run(updates, mask.leaf, held, numbers, grad, param, look_up)
    if isinstance(results, str):
      raise _no_longer(call, mask, results)
    update, *new = results
    update = update.astype(grad.dtype)
    target = optax.apply_updates([param], [update])[0] if call.in_place else update
    return mean, target, new

  def fire(carry: Any, param: Any) -> Any:
    # The mean takes the place of the sum, which nobody needs any more: no room is made for it.
    return _control.keep(mask.any(codes, fires), compute, carry, param)

  when = any(flag is True for flag in fires) or functools.reduce(jnp.logical_or, fires)
  param = None if call.in_place or call.params is None else call.params[mask.leaf]
  return _control.maybe(when, fire, carry, param)


def _check(
  call: "Call", mask: Mask, updates: Sequence[proof.Program], paths: Sequence[Any]
) -> None:
  """Raises where extra arguments, which the proof was without, couple the entries."""
  if call.extra_args:
    reason = proof.coupled(updates, mask.leaf, {mask.leaf: dict.fromkeys(paths, 0)})
    if reason is not None:
      raise _no_longer(call, mask, reason)


def _no_longer(call: "Call", mask: Mask, reason: str) -> ValueError:
  return ValueError(
    f"update of {call.layout.name(mask.leaf)!r}: expected an inner optimizer that treats the"
    f" entries of a mask one by one, as it did when the state was made, found {reason}"
  )
