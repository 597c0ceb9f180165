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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cadence import _control
from optax_cadence import _paths
from optax_cadence import _sharding
from optax_cadence import _step
from optax_cadence import _window
from optax_cadence._state import MaskState
from optax_cadence._state import State
from optax_cadence.entrywise import proof
from optax_cadence.regions.cuts import Entries
from optax_cadence.regions.layout import Group
from optax_cadence.regions.layout import Layout
from optax_cadence.regions.layout import Leaves

_CODES = (np.uint8, np.uint16, np.uint32)


@dataclasses.dataclass(frozen=True)
class Mask:
  """A leaf whose entries belong to several groups.

  Attributes:
    leaf: Its position in the tree.
    cuts: Which entries each group has, by the name of the group.
    bits: The bit that stands for the group, likewise.
  """

  leaf: int
  cuts: Mapping[str, Entries]
  bits: Mapping[str, int]

  def only(self, groups: Collection[str]) -> "Mask":
    """The mask of those of its groups that are among these; they keep their bits."""
    bits = {name: bit for name, bit in self.bits.items() if name in groups}
    return dataclasses.replace(self, bits=bits)

  def codes(self, like: jax.Array) -> jax.Array:
    """The bit of its group for every entry: unsigned integers, as wide as that takes."""
    largest = max(self.bits.values())
    codes = np.zeros(like.shape, next(d for d in _CODES if np.iinfo(d).max >= largest))
    for name, bit in self.bits.items():
      codes.reshape(-1)[self.cuts[name].indices] = bit
    # Else the compiler would work out every comparison with them, and keep it as a constant.
    return jax.lax.optimization_barrier(_sharding.lying_as(jnp.asarray(codes), like))

  def any(self, codes: jax.Array, flags: Sequence[Any]) -> jax.Array:
    """Whether the flag of its group is set, for every entry."""
    dtype = codes.dtype.type
    pairs = zip(self.bits.values(), flags, strict=True)
    bits = [jnp.where(flag, dtype(bit), dtype(0)) for bit, flag in pairs]
    return (codes & functools.reduce(jnp.bitwise_or, bits)) != 0

  def look_up(self, codes: jax.Array, like: jax.Array, numbers: Sequence[Any]) -> jax.Array:
    """The number of its group for every entry, in an array of this shape.

    Counts of some groups may stand beside weights of others: all are of the wider dtype.
    """
    dtype = _window.wider(*(x.dtype for x in numbers))
    *others, last = (x if x.dtype == dtype else x.astype(dtype) for x in numbers)
    result = jnp.full_like(like, last, dtype=dtype)
    for bit, x in zip(self.bits.values(), others, strict=False):
      if x is not last and not _equal(x, last):
        result = jnp.where(codes == bit, x, result)
    return result


def masks_of(layout: Layout) -> list[Mask]:
  """The leaves under masks that their groups train together, in order."""
  masks = []
  for leaf in layout.masked:
    cuts: Any = {g.name: t.cut for g in layout.groups for t in g.masked if t.leaf == leaf}
    masks.append(Mask(leaf, cuts, {name: 1 << i for i, name in enumerate(cuts)}))
  return masks


def _equal(x: Any, y: Any) -> bool:
  known = all(isinstance(value, np.ndarray | np.generic) for value in (x, y))
  return known and bool(x == y)


def moments_of(call: _step.Call) -> dict[int, list[Any]]:
  """Where the inner optimizer keeps its arrays for the entries of each leaf, as key paths."""
  moments = {}
  for leaf in call.layout.masked:
    entries = jax.ShapeDtypeStruct(call.layout.shapes[leaf], call.dtypes[leaf])
    paths = proof.moments(call.inner.any, call.layout, leaf, entries)
    assert not isinstance(paths, str), paths
    moments[leaf] = list(paths)
  return moments


def moments_in(layout: Layout, state: State) -> dict[int, list[Any]]:
  """Where a state says that it keeps the arrays for the entries of each leaf, as key paths."""
  if state.masks is None:
    return {}
  paths, masked = list(_paths.by_keys(state.masks.inner_state)), state.regions.masked
  return {i: [paths[place] for place in masked[layout.paths[i]]] for i in layout.masked}


def positions(call: _step.Call, state: MaskState | None) -> list[Any]:
  """For each leaf its path, and which arrays of the state belong to its entries."""
  if state is None:
    return []
  paths, leaves = list(_paths.by_keys(state.inner_state)), call.layout.masked
  return [(call.layout.paths[i], [*map(paths.index, call.moments[i])]) for i in leaves]


def init(
  call: _step.Call, leaves: Leaves, sum_dtype: Callable[[Any], Any] | None
) -> MaskState | None:
  """The state of all leaves under masks; without a `sum_dtype` there are no accumulators."""
  layout = call.layout
  tree = layout.tree_of({leaf: [leaves[leaf]] for leaf in layout.masked})
  try:
    state = call.inner.any.init(tree)
  except proof.REFUSALS:
    if layout.masked:
      raise
    return None  # An optimizer need not take a tree without leaves.
  paths = {path for leaf in layout.masked for path in call.moments[leaf]}
  kept = jax.tree_util.tree_map_with_path(
    lambda path, x: x if path in paths else optax.MaskedNode(), state
  )
  if sum_dtype is None:
    return MaskState(kept, None)
  sums = {i: [jnp.zeros_like(leaves[i], sum_dtype(leaves[i].dtype))] for i in layout.masked}
  return MaskState(kept, layout.tree_of(sums))


def stand_in(inner: Any, placeholder: Any, accumulates: bool) -> MaskState:
  """The state of a stand-in for the parameters, which `tree_map_params` probes with."""
  state = inner.init(placeholder)
  kept = jax.tree.map(lambda x: optax.MaskedNode() if hasattr(x, "dtype") else x, state)
  return MaskState(kept, placeholder if accumulates else None)


def without_entries(
  inner: optax.GradientTransformationExtraArgs, call: _step.Call, group: Group
) -> optax.GradientTransformationExtraArgs:
  """The inner optimizer as a group runs it whose entries under masks are trained elsewhere.

  It sees zeros in the place of each such leaf, so that its state has the numbers that belong to
  the leaf (a counter, say). What it computes for the entries is left out of the state that is kept,
  and so never computed.
  """
  layout, leaves = call.layout, [t.leaf for t in group.masked]
  moments = {path for leaf in leaves for path in call.moments[leaf]}

  def filled(tree: Any, dtypes: Sequence[Any], zeros: Callable[..., jax.Array] = jnp.zeros) -> Any:
    slots = layout.treedef.flatten_up_to(tree)
    for leaf in leaves:
      slots[leaf] = zeros(layout.shapes[leaf], dtypes[leaf])
    return layout.treedef.unflatten(slots)

  def kept(state: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
      lambda path, x: optax.MaskedNode() if path in moments else x, state
    )

  def init(params: Any) -> Any:
    return kept(inner.init(filled(params, call.param_dtypes)))

  def update(grads: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
    zeros = functools.cache(jnp.zeros)
    grads = filled(grads, call.dtypes, zeros)
    params = None if params is None else filled(params, call.param_dtypes, zeros)
    numbers = _paths.by_keys(state)
    state = jax.tree_util.tree_map_with_path(
      lambda path, x: numbers[path] if path in numbers else zeros(x.shape, x.dtype),
      jax.eval_shape(inner.init, grads),
    )
    updates, state = inner.update(grads, state, params, **extra_args)
    slots = layout.treedef.flatten_up_to(updates)
    for leaf in leaves:
      slots[leaf] = optax.MaskedNode()
    return layout.treedef.unflatten(slots), kept(state)

  return optax.GradientTransformationExtraArgs(init, update)


def all_finite(layout: Layout, grads: Leaves) -> dict[str, list[jax.Array]]:
  """Whether all entries that a group has of each of its leaves under masks are finite."""
  flags: dict[str, list[jax.Array]] = {group.name: [] for group in layout.groups}
  for mask in masks_of(layout):
    grad = grads[mask.leaf]
    codes, good = mask.codes(grad), jnp.isfinite(grad)
    for name, bit in mask.bits.items():
      flags[name].append((good | (codes != bit)).all())
  return flags


def advance(
  call: _step.Call,
  state: MaskState,
  grads: Leaves | None,
  turns: Mapping[str, _step.Turn],
  targets: Leaves,
  micro_step: jax.Array,
) -> tuple[Leaves, MaskState]:
  """Adds the gradients, if there are any, and fires the entries that are due."""
  masks, states, programs = masks_of(call.layout), {}, {}
  # Programs are read in a program, or where extra arguments have to be looked at.
  reads = bool(call.extra_args) or _control.is_traced((grads, turns, targets, state))
  for group in call.layout.groups:
    turn = turns[group.name]
    fires = turn.fires if reads else bool(turn.fires)
    if group.masked and fires is not False:
      inner_state = _step.state_of(call, group, turn.state.inner_state, turn.window, micro_step)
      states[group.name] = _paths.by_keys(inner_state)
      if reads:
        inner = call.inner.of(group.every, turn.window.length)
        has_params = call.params is not None
        programs[group.name] = proof.trace(
          inner, call.layout, group, call.dtypes, call.extra_args, has_params
        )
  held = _paths.by_keys(state.inner_state)
  totals = _sums(call, state)
  for mask in masks:
    codes, regions = mask.codes(targets[mask.leaf]), _regions(call, mask, turns, state)
    total = _added(call, mask, codes, regions, totals.get(mask.leaf), grads)
    if total is None:
      continue
    paths = call.moments[mask.leaf]
    carry = targets[mask.leaf], [held[path] for path in paths], total
    now = mask.only(programs)
    if now.bits:
      carry = _fire(call, now, codes, regions, programs, states, paths, carry, micro_step)
    target, moments, totals[mask.leaf] = carry
    held |= zip(paths, moments, strict=True)
    targets = targets | {mask.leaf: target}
  if not reads:
    for group in call.layout.groups:
      if group.name in states:
        targets, held = _fire_now(
          call, state, group, turns[group.name], states, totals, targets, held
        )
  inner_state = jax.tree_util.tree_map_with_path(lambda path, _: held[path], state.inner_state)
  if state.accumulators is None:
    return targets, MaskState(inner_state, None)
  sums = jax.tree.unflatten(jax.tree.structure(state.accumulators), totals.values())
  return targets, MaskState(inner_state, sums)


def squared_norm(
  call: _step.Call,
  state: MaskState,
  grads: Leaves | None,
  turns: Mapping[str, _step.Turn],
  targets: Leaves,
) -> jax.Array:
  """Squared norm of the means of all entries that fire: float32 scalar."""
  from optax_cadence.confidence import statistics

  square, totals = jnp.float32(0), _sums(call, state)
  for mask in masks_of(call.layout):
    codes, regions = mask.codes(targets[mask.leaf]), _regions(call, mask, turns, state)
    fires = [region.fires for region in regions.values()]
    weights = [region.total_weight for region in regions.values()]
    total = _added(call, mask, codes, regions, totals.get(mask.leaf), grads)
    if total is None:
      continue

    def measure(
      _: Any,
      total: jax.Array,
      mask: Mask = mask,
      codes: Any = codes,
      fires: Any = fires,
      weights: Any = weights,
    ) -> jax.Array:
      mean = _reduced(call, mask.leaf, total, mask.look_up(codes, total, weights))
      mean = jnp.where(mask.any(codes, fires), mean, jnp.zeros_like(mean))
      return statistics.squared_norms([mean])[0]

    when = _any(fires)
    square += _control.maybe(when, measure, jnp.float32(0), total)
  return square


def _any(flags: Sequence[Any]) -> Any:
  """Whether a flag is set: a Python bool where one is known to be."""
  return any(flag is True for flag in flags) or functools.reduce(jnp.logical_or, flags)


def _total_weight(state: MaskState, window: _window.Window, i: int) -> jax.Array:
  """What the sum of region i is divided by for the mean; 1 where there are no accumulators."""
  return jnp.int32(1) if state.accumulators is None else window.total_weight(i)


class Region(NamedTuple):
  """The entries that a group has of a leaf under a mask, at a micro-step.

  Attributes:
    length: Gradients in their window: int32 scalar.
    total_weight: What the mean is their sum divided by: scalar.
    counts: Whether this one is among them.
    fires: Whether they fire.
  """

  length: jax.Array
  total_weight: jax.Array
  counts: bool | jax.Array
  fires: bool | jax.Array


def _regions(
  call: _step.Call, mask: Mask, turns: Mapping[str, _step.Turn], state: MaskState
) -> dict[str, Region]:
  """The regions of a leaf under a mask, by group."""
  regions = {}
  for group in call.layout.groups:
    if group.name in mask.bits:
      window, fires = turns[group.name].window, turns[group.name].fires
      i = [t.leaf for t in group.regions].index(mask.leaf)
      length = _window.item(window.length, i)
      if window.by_region:
        fires = False if fires is False else (length > 0) & fires
      counts = True if window.counts is None else window.counts[i]
      regions[group.name] = Region(length, _total_weight(state, window, i), counts, fires)
  return regions


def _sums(call: _step.Call, state: MaskState) -> Leaves:
  """The accumulator of each leaf under a mask; none for `accumulate="latest"`."""
  if state.accumulators is None:
    return {}
  return dict(zip(call.layout.masked, jax.tree.leaves(state.accumulators), strict=True))


def _added(
  call: _step.Call,
  mask: Mask,
  codes: jax.Array,
  regions: Mapping[str, Region],
  total: jax.Array | None,
  grads: Leaves | None,
) -> jax.Array | None:
  """The sum or mean of a leaf, with the gradient of this micro-step, if there is one.

  Without an accumulator it is this gradient alone; None where there is neither.
  """
  if grads is None:
    return total
  if total is None:
    return grads[mask.leaf].astype(call.dtypes[mask.leaf])
  weights = None if call.counting is None else call.counting.weights
  weight = None if weights is None else weights[mask.leaf]
  first = mask.any(codes, [region.length == 1 for region in regions.values()])
  lengths = None
  if _window.holds_mean(total):
    lengths = mask.look_up(codes, total, [region.total_weight for region in regions.values()])
  new = _window.added(total, grads[mask.leaf], first, lengths, weight)
  counts = [region.counts for region in regions.values()]
  if all(flag is True for flag in counts):
    return new
  return jnp.where(mask.any(codes, counts), new, total)


def _reduced(call: _step.Call, leaf: int, total: jax.Array, n: jax.Array) -> jax.Array:
  """What the inner optimizer is handed of a leaf: the mean of every entry, or its sum."""
  reduce = _window.sum_of if call.sums else _window.mean_of
  grad = reduce(total, n, call.dtypes[leaf])
  return grad if call.scale is None else _window.multiply(grad, call.scale)


def _fire(
  call: _step.Call,
  mask: Mask,
  codes: jax.Array,
  regions: Mapping[str, Region],
  programs: Mapping[str, proof.Program],
  states: Mapping[str, Mapping[Any, jax.Array]],
  paths: Sequence[Any],
  carry: Any,
  micro_step: jax.Array,
) -> Any:
  """Target, moments and sum of a leaf, after the groups that are due have fired."""
  fires = [regions[name].fires for name in mask.bits]
  weights = [regions[name].total_weight for name in mask.bits]
  updates = [programs[name] for name in mask.bits]
  numbers = [states[name] for name in mask.bits]
  _check(call, mask, updates, paths)

  def compute(carry: Any, param: Any) -> Any:
    target, moments, total = carry
    look_up = functools.partial(mask.look_up, codes, total)
    grad = _reduced(call, mask.leaf, total, look_up(weights))
    param = target if call.in_place else param
    held = dict(zip(paths, moments, strict=True))
    results = proof.run(updates, mask.leaf, held, numbers, grad, param, look_up)
    if isinstance(results, str):
      raise _no_longer(call, mask, results)
    update, *new = results
    if call.in_place:
      (update,) = _step.applied([param], [update])
    # The mean takes the place of the sum, which nobody needs any more: no room is made for it.
    return update, new, grad

  def fire(carry: Any, param: Any) -> Any:
    return _control.keep(mask.any(codes, fires), compute, carry, param)

  when = _any(fires)
  param = None if call.in_place or call.params is None else call.params[mask.leaf]
  narrow = call.dtypes[mask.leaf] != call.param_dtypes[mask.leaf]
  if narrow and _control.is_one_pass(fire, carry, param):
    return _control.first_part_first(when, fire, carry, param, micro_step)
  return _control.maybe(when, fire, carry, param)


def _fire_now(
  call: _step.Call,
  state_before: MaskState,
  group: Group,
  turn: _step.Turn,
  states: Mapping[str, Mapping[Any, jax.Array]],
  totals: Leaves,
  targets: Leaves,
  held: dict[Any, jax.Array],
) -> tuple[Leaves, dict[Any, jax.Array]]:
  """Targets and moments, by where the state keeps them, after a group has fired.

  Outside of a program, where to trace an update takes longer than to run it: it is run on whole
  leaves, and the entries of the group are taken out of the results.
  """
  dtypes, layout = call.dtypes, call.layout
  tensors, zeros = {}, functools.cache(jnp.zeros)
  for leaf, parts in proof.shapes_of(group, layout, dtypes).items():
    tensors[leaf] = [zeros(x.shape, x.dtype) for x in parts]
  params = dict(tensors)
  for i, t in enumerate(group.masked, len(group.tensors)):
    weight = _total_weight(state_before, turn.window, i)
    tensors[t.leaf] = [_reduced(call, t.leaf, totals[t.leaf], weight)]
    param = targets if call.in_place else call.params
    params[t.leaf] = tensors[t.leaf] if param is None else [param[t.leaf]]
  grads = layout.tree_of(tensors)
  arrays = {**held, **states[group.name]}
  state = jax.tree_util.tree_map_with_path(
    lambda path, _: arrays[path], jax.eval_shape(call.inner.any.init, grads)
  )
  inner = _step.inner_of(call, group, turn.window.length, whole=True)
  values = None if call.params is None else layout.tree_of(params)
  updates, state = _step.updated(call, inner, grads, state, values)
  slots, new = layout.treedef.flatten_up_to(updates), dict(held)
  results, targets = _paths.by_keys(state), dict(targets)
  for i, t in enumerate(group.masked, len(group.tensors)):
    assert isinstance(t.cut, Entries)
    mine = np.zeros(layout.shapes[t.leaf], bool)
    mine.reshape(-1)[t.cut.indices] = True
    fires = mine
    if turn.window.by_region:
      fires = mine & (_window.item(turn.window.length, i) > 0)
    update, target = slots[t.leaf], targets[t.leaf]
    if call.in_place:
      (update,) = _step.applied([target], [update])
    targets[t.leaf] = _replaced(fires, update, target)
    totals[t.leaf] = _replaced(fires, tensors[t.leaf][0], totals[t.leaf])  # as in a program
    for path in call.moments[t.leaf]:
      new[path] = _replaced(fires, results[path], held[path])
  return targets, new


def _replaced(where: Any, new: jax.Array, old: jax.Array) -> jax.Array:
  return jnp.where(_sharding.lying_as(jnp.asarray(where), old), new.astype(old.dtype), old)


def _check(
  call: _step.Call, mask: Mask, updates: Sequence[proof.Program], paths: Sequence[Any]
) -> None:
  """Raises where extra arguments, which the proof was without, couple the entries."""
  if call.extra_args:
    reason = proof.coupled(updates, mask.leaf, {mask.leaf: dict.fromkeys(paths, 0)})
    if reason is not None:
      raise _no_longer(call, mask, reason)


def _no_longer(call: _step.Call, mask: Mask, reason: str) -> ValueError:
  return ValueError(
    f"update of {call.layout.name(mask.leaf)!r}: expected an inner optimizer that treats the"
    f" entries of a mask one by one, as it did when the state was made, found {reason}"
  )
