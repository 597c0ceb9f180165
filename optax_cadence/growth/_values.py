"""Values of a widened network, whose old entries lie before their new ones, and operations on them.

A value is one array, at the new size. Along every axis that has grown its old entries come first,
in their own order, and the new ones after them, wherever they lie in the network's own arrays. So
an operation on each entry, a product or a sum is the network's own at its new size. What cuts,
joins or reshapes such an axis is run on old entries and on new ones apart, and put together again.
See `_evaluate` for whole programs.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence.growth._plan import LeafChange
from optax_cadence.programs import primitives
from optax_cadence.programs import reading


class Value(NamedTuple):
  """A value of a widened network.

  Attributes:
    array: The array; of an integer that is not the same at both sizes, what it is at the old one.
    old: For each axis that has grown the number of its old entries, which come first.
    offset: Of a kernel with new taps, which lie around the old ones, for each spatial axis: where
      the old ones begin. Of what such a kernel reads, if an operation of its own pads it, for each
      axis: how much more it is padded at its start. Else empty.
    new: Of an integer that is not the same at both sizes, what it is at the new one.
  """

  array: Any
  old: Mapping[int, int] = {}
  offset: tuple[int, ...] = ()
  new: Any = None

  @property
  def old_and_new(self) -> tuple[Any, Any]:
    """A value that has not grown, as it is in the old program and in the new one."""
    return self.array, self.array if self.new is None else self.new


def empty(old: Any, new: Any) -> Value:
  """A value without entries, which may have grown along any axis."""
  sizes = {a: n for a, (n, m) in enumerate(zip(old.shape, new.shape, strict=True)) if n != m}
  return Value(jnp.zeros(new.shape, old.dtype), sizes)


def ordered(leaf: Any, change: LeafChange) -> Value:
  """A leaf, its old entries first along every axis that has grown."""
  x, old = jnp.asarray(leaf), {}
  for axis in sorted(set(change.positions) - set(change.taps)):
    at = change.positions[axis]
    old[axis] = len(at)
    x = _permuted(x, np.concatenate([at, change.new(axis)]), axis)
  if not change.taps:
    return Value(x, old)
  starts = [change.positions[a][0] if a in change.taps else 0 for a in change.spatial]
  return Value(x, old, tuple(map(int, starts)))


def in_place(x: Value, positions: Mapping[int, np.ndarray]) -> Any:
  """The array of a value, with its old entries along each axis at these positions."""
  array = x.array
  for axis in sorted(x.old):
    if axis not in positions:
      raise ValueError(
        f"an output of shape {array.shape} has new entries along axis {axis} that no unit accounts"
        " for"
      )
    at, places = positions[axis], np.arange(array.shape[axis])
    array = _permuted(array, np.argsort(np.concatenate([at, np.setdiff1d(places, at)])), axis)
  return array


def _permuted(x: Any, order: np.ndarray, axis: int) -> Any:
  if (order == np.arange(len(order))).all():
    return x
  return jnp.take(x, order, axis=axis, unique_indices=True, mode="clip")


def grown_axes(old: Any, new: Any) -> dict[int, int]:
  """The axes along which two variables differ, with the size of the old one."""
  before, after = reading.shape(old), reading.shape(new)
  if len(before) != len(after):
    raise ValueError(f"the programs before and after differ: shapes {before} and {after}")
  grown = {a: n for a, (n, m) in enumerate(zip(before, after, strict=True)) if n != m}
  for axis, size in grown.items():
    if after[axis] < size:
      raise ValueError(
        f"axis {axis} of a value shrinks from {before} to {after}: expected it to grow"
      )
  return grown


class Axes:
  """The axes along which an operation runs over old and new entries.

  Axes that the operation ties together have one number: an entry is either old or new along all
  of them. So has an axis of the results alone that has grown.

  Attributes:
    kept: The numbers of axes that the results have.
    summed: The numbers of axes that are summed over.
    apart: The numbers of those kept axes along which old and new entries have to be run apart.
    of_operand: For (operand, axis) that has grown the number.
    of_result: For (result, axis) the number.
  """

  def __init__(self, old: Any, new: Any, operands: list[Value]):
    self.of_operand: dict[tuple[int, int], int] = {}
    self.of_result: dict[tuple[int, int], int] = {}
    self.kept: list[int] = []
    self.summed: list[int] = []
    self.apart: list[int] = []
    grown = {(i, a) for i, x in enumerate(operands) for a in x.old}
    results = {
      (i, a)
      for i, pair in enumerate(zip(old.outvars, new.outvars, strict=True))
      for a in grown_axes(*pair)
    }
    for tie in _tied(old, new):
      self._add(tie, grown)
    for tie in _tied_apart(old, new, sorted(grown - self.of_operand.keys())):
      self._add(tie, grown, apart=True)
    lost = sorted(grown - self.of_operand.keys())
    if lost or self.of_result.keys() - results:
      shapes = [[reading.shape(v) for v in eqn.invars] for eqn in (old, new)]
      raise ValueError(
        f"{old.primitive.name} of shapes {shapes[0]} before and {shapes[1]} after cannot keep old"
        " and new entries apart"
        + (f" along axis {lost[0][1]} of operand {lost[0][0]}" if lost else "")
        + ": expected a sum, or an operation on each entry alone"
      )
    # An axis of the results alone holds one number many times, or counts; but for random ones.
    draws = old.primitive.name == "random_bits"
    for pair in sorted(results - self.of_result.keys()):
      self._number(primitives.Tie((), (pair,)), apart=draws)

  def _add(self, tie: primitives.Tie, grown: set[tuple[int, int]], apart: bool = False) -> None:
    operands = tuple(pair for pair in tie.operands if pair in grown)
    if operands:
      self._number(tie._replace(operands=operands), apart)

  def _number(self, tie: primitives.Tie, apart: bool) -> None:
    number = len(self.kept) + len(self.summed)
    (self.summed if tie.summed else self.kept).append(number)
    if apart:
      self.apart.append(number)
    self.of_operand.update(dict.fromkeys(tie.operands, number))
    self.of_result.update(dict.fromkeys(tie.results, number))

  def along(self, operand: int, numbers: Sequence[int]) -> list[int]:
    """The axes of an operand that have these numbers."""
    return [a for (i, a), number in self.of_operand.items() if i == operand and number in numbers]

  def holds_kept(self, operand: int) -> bool:
    """Whether an operand has all axes that have grown and are in the results."""
    return set(self.kept) <= {n for (i, _), n in self.of_operand.items() if i == operand}


EXTREMA = ("reduce_max", "reduce_min")


def _tied(old: Any, new: Any) -> Iterator[primitives.Tie]:
  """The ties of an operation that takes old entries before new ones to results that are so too."""
  name, ties = old.primitive.name, primitives.ties(old)
  if ties is None:
    raise ValueError(f"{name} cannot be run with new entries behind old: {primitives.WANTED}")
  if name == "conv_general_dilated":
    more_groups = old.params["feature_group_count"] != new.params["feature_group_count"]
    yield from primitives.of_groups(primitives.ties(new) or [], more_groups)
  else:
    yield from ties
  if name in EXTREMA:
    for axis in old.params["axes"]:
      yield primitives.Tie(((0, axis),), summed=True)
  elif name == "reshape":
    yield from (tie for tie, in_order in _ties_of_reshape(old, new) if in_order)


def _tied_apart(old: Any, new: Any, others: list[tuple[int, int]]) -> Iterator[primitives.Tie]:
  """The ties of an operation that has to be run on old entries and on new ones apart.

  Such a one cuts, joins or reshapes an axis: the old entries among themselves, and the new ones.
  `others` are the axes that have grown and are in no tie of another kind.
  """
  name, p = old.primitive.name, old.params
  if name == "reshape":
    yield from (tie for tie, in_order in _ties_of_reshape(old, new) if not in_order)
  elif name == "split":
    pairs = enumerate(zip(old.outvars, new.outvars, strict=True))
    pieces = tuple((i, p["axis"]) for i, (a, b) in pairs if p["axis"] in grown_axes(a, b))
    yield primitives.Tie(((0, p["axis"]),), pieces)
  elif name == "concatenate":
    operands = tuple((i, p["dimension"]) for i in range(len(old.invars)))
    yield primitives.Tie(operands, ((0, p["dimension"]),))
  elif name == "slice":
    yield from (primitives.Tie((pair,), (pair,)) for pair in others)


def _ties_of_reshape(old: Any, new: Any) -> Iterator[tuple[primitives.Tie, bool]]:
  """The ties of a reshape, and whether it keeps old entries before new ones."""
  ins, outs = grown_axes(old.invars[0], new.invars[0]), grown_axes(old.outvars[0], new.outvars[0])
  shapes = reading.shape(old.invars[0]), reading.shape(old.outvars[0])
  for before, after in primitives.reshape_groups(*shapes):
    a, b = [i for i in before if i in ins], [o for o in after if o in outs]
    if len(a) == len(b) == 1:
      outer = [shapes[0][i] for i in before if i < a[0]] + [shapes[1][o] for o in after if o < b[0]]
      yield primitives.Tie(((0, a[0]),), ((0, b[0]),)), all(n == 1 for n in outer)


def new_entries(shape: Sequence[int], old: Mapping[int, range]) -> Any:
  """Which entries of an array are outside of the old ones along any axis that has some.

  The other axes of the result have size 1.
  """
  found: Any = jnp.zeros((1,) * len(shape), bool)
  for axis, places in old.items():
    along = [n if a == axis else 1 for a, n in enumerate(shape)]
    place = jax.lax.broadcasted_iota(jnp.int32, along, axis)
    found |= place >= places.stop
    if places.start:
      found |= place < places.start
  return found


def where_new(old: Any, new: Any, x: Any, y: Any) -> Any:
  """The result of an operation: of `x` the new entries, of `y` the old ones."""
  grown = grown_axes(old.outvars[0], new.outvars[0])
  return jnp.where(new_entries(y.shape, {a: range(n) for a, n in grown.items()}), x, y)


def old_taps(eqn: Any, offset: tuple[int, ...]) -> dict[int, range]:
  """Along each spatial axis of a larger kernel the taps of a convolution at the old size."""
  axes, sizes = eqn.params["dimension_numbers"].rhs_spec[2:], reading.shape(eqn.invars[1])
  return {a: range(start, start + sizes[a]) for a, start in zip(axes, offset, strict=True)}


def bind(old: Any, new: Any, operands: list[Value], arrays: Sequence[Any]) -> list[Any]:
  """Runs an operation at its new size, on the arrays of operands or on what stands for them."""
  groups = new.params.get("feature_group_count", 1)
  if groups == 1 or groups != old.params["feature_group_count"]:
    return reading.bind(new, arrays)
  # Every group of channels has old ones and new ones.
  numbers, arrays = new.params["dimension_numbers"], list(arrays)
  for i, axis in enumerate((numbers.lhs_spec[1], numbers.rhs_spec[0])):
    if axis in operands[i].old:
      arrays[i] = _by_group(arrays[i], axis, operands[i].old[axis], groups)
  (result,), axis = reading.bind(new, arrays), numbers.out_spec[1]
  grown = grown_axes(old.outvars[0], new.outvars[0])
  return [_by_group(result, axis, grown[axis], groups, back=True) if axis in grown else result]


def _by_group(x: Any, axis: int, old: int, groups: int, back: bool = False) -> Any:
  """Old entries and then new ones along an axis, laid out as both of each group; or back."""
  sizes, ahead, behind = (old, x.shape[axis] - old), x.shape[:axis], x.shape[axis + 1 :]
  if back:
    cut = x.reshape(*ahead, groups, -1, *behind)
    pieces = jax.lax.split(cut, [n // groups for n in sizes], axis + 1)
    flat = [y.reshape(*ahead, n, *behind) for n, y in zip(sizes, pieces, strict=True)]
    return jnp.concatenate(flat, axis)
  pieces = jax.lax.split(x, sizes, axis)
  cut = [y.reshape(*ahead, groups, -1, *behind) for y in pieces]
  return jnp.concatenate(cut, axis + 1).reshape(x.shape)


def extremum(old: Any, new: Any, axes: Axes, x: Value, alpha: Any) -> Any:
  """The largest or smallest entries, which go from those of old entries to those of all."""
  (everywhere,) = reading.bind(new, [x.array])
  before = x.array
  for axis in axes.along(0, axes.summed):
    before = jax.lax.slice_in_dim(before, 0, x.old[axis], axis=axis)
  (before,) = reading.bind(new, [before])
  if jnp.issubdtype(before.dtype, jnp.floating):
    # An infinity, as of what is masked, is not approached but jumped from.
    far = jnp.where(alpha > 0, everywhere, before)
    near = jnp.isfinite(everywhere) & jnp.isfinite(before)
    way = jnp.where(near, everywhere, 0) - jnp.where(near, before, 0)
    between = jnp.where(near, before + alpha.astype(before.dtype) * way, far)
  else:
    between = jnp.where(alpha >= 1, everywhere, before)
  return where_new(old, new, everywhere, between)


def run_apart(old: Any, new: Any, axes: Axes, operands: list[Value]) -> list[Any]:
  """Runs an operation on old and on new entries along some axes, and puts the results together."""
  cuts = [axes.along(i, axes.apart) for i in range(len(operands))]
  blocks = [_blocks(x, along) for x, along in zip(operands, cuts, strict=True)]
  pieces = {}
  for bits in itertools.product((0, 1), repeat=len(axes.apart)):
    at = dict(zip(axes.apart, bits, strict=True))
    places = [tuple(at[axes.of_operand[i, a]] for a in along) for i, along in enumerate(cuts)]
    pieces[bits] = _piece(old, new, axes, at, [b[p] for b, p in zip(blocks, places, strict=True)])

  def joined(result: int, at: dict[int, int], along: list[tuple[int, int]]) -> Any:
    if not along:
      return pieces[tuple(at.get(number, 0) for number in axes.apart)][result]
    (axis, number), *rest = along
    return jnp.concatenate([joined(result, {**at, number: bit}, rest) for bit in (0, 1)], axis)

  of_results = [(i, a, number) for (i, a), number in axes.of_result.items() if number in axes.apart]
  return [
    joined(i, {}, [(a, number) for j, a, number in of_results if j == i])
    for i in range(len(new.outvars))
  ]


def _blocks(x: Value, axes: list[int]) -> dict[tuple[int, ...], Any]:
  """An array cut into old (0) and new (1) entries along some axes."""
  blocks: dict[tuple[int, ...], Any] = {(): x.array}
  for axis in axes:
    # Gradients of a split are joined again, where those of slices would be padded and added up.
    sizes = x.old[axis], x.array.shape[axis] - x.old[axis]
    blocks = {
      (*bits, bit): part
      for bits, block in blocks.items()
      for bit, part in enumerate(jax.lax.split(block, sizes, axis))
    }
  return blocks


def _piece(old: Any, new: Any, axes: Axes, at: dict[int, int], blocks: list[Any]) -> list[Any]:
  """Runs an operation on old entries alone along some axes, and on new ones alone along others."""
  name, p, q = new.primitive.name, old.params, new.params

  def sizes(before: Any, after: Any, numbers: list[int | None]) -> tuple[int, ...]:
    return tuple(
      m if number not in at else m - n if at[number] else n
      for n, m, number in zip(before, after, numbers, strict=True)
    )

  before, after = reading.shape(old.outvars[0]), reading.shape(new.outvars[0])
  result = sizes(before, after, [axes.of_result.get((0, a)) for a in range(len(before))])
  changed: dict[str, Any] = {}
  if name == "reshape":
    changed["new_sizes"] = result
  elif name == "random_bits":
    changed["shape"] = result
    if any(at.values()):  # The old entries keep their own numbers; new ones must not repeat them.
      places = enumerate(sorted(grown_axes(old.outvars[0], new.outvars[0])))
      blocks = [
        jax.random.fold_in(blocks[0], sum(at[axes.of_result[0, a]] << i for i, a in places))
      ]
  elif name == "split":
    number = axes.of_operand[0, p["axis"]]
    changed["sizes"] = sizes(p["sizes"], q["sizes"], [number] * len(p["sizes"]))
  elif name == "slice":
    numbers = [axes.of_operand.get((0, a)) for a in range(len(p["start_indices"]))]
    strided = [a for a, step in enumerate(p["strides"] or ()) if step != 1]
    if any(at.get(axes.of_operand.get((0, a), -1)) for a in strided):
      raise ValueError("an axis that grows is cut with strides: expected whole pieces of it")
    for key in ("start_indices", "limit_indices"):
      changed[key] = sizes(p[key], q[key], numbers)
  elif name == "concatenate":
    along = p["dimension"]
    if at[axes.of_result[0, along]]:
      shapes = [[reading.shape(v)[along] for v in eqn.invars] for eqn in (old, new)]
      blocks = [x for x, n, m in zip(blocks, *shapes, strict=True) if n != m]
  return reading.bind(new, blocks, **changed)


def pads_for_taps(old: Any, new: Any, operands: list[Value]) -> bool:
  """Whether an operation pads more at the new size, along axes that have not grown."""
  if old.primitive.name != "pad":
    return False
  pairs = enumerate(zip(old.params["padding_config"], new.params["padding_config"], strict=True))
  changed = [axis for axis, (before, after) in pairs if before != after]
  return bool(changed) and not any(axis in operands[0].old for axis in changed)


def padded(old: Any, new: Any, x: Value, fill: Value) -> Value:
  """What a kernel reads, padded for all of its taps."""
  before, after = ([low for low, _, _ in eqn.params["padding_config"]] for eqn in (old, new))
  offset = tuple(m - n for n, m in zip(before, after, strict=True))
  return Value(reading.bind(new, [x.array, fill.array])[0], x.old, offset)


def passed(old: Any, new: Any, operands: list[Value]) -> Value:
  """A kernel, or what it reads, after an operation that changes each entry alone."""
  name, spatial = old.primitive.name, len(operands[0].offset)
  order = list(old.params["permutation"]) if name == "transpose" else []
  swaps = bool(order) and order[:spatial] == list(range(spatial))  # inputs and outputs, in place
  if name not in ("convert_element_type", "copy", "neg", "rev") and not swaps:
    raise ValueError(
      f"a kernel whose taps grow, or what it reads, goes through {name} before its"
      " convolution: expected it to be used as it is"
    )
  (x,) = operands
  offset = x.offset
  if name == "rev":  # what was at the start is at the end: the new taps that are there count now
    smaller, larger = (reading.shape(eqn.invars[0]) for eqn in (old, new))
    ends = old.params["dimensions"]
    offset = tuple(
      larger[a] - smaller[a] - at if a in ends else at for a, at in enumerate(x.offset)
    )
  grown = {order.index(a) if swaps else a: n for a, n in x.old.items()}
  return Value(reading.bind(new, [x.array])[0], grown, offset)


def check_taps(old: Any, new: Any, x: Value, kernel: Value) -> None:
  """Raises `ValueError` unless old taps meet the same inputs in both convolutions."""
  if not kernel.offset:
    raise ValueError("what a convolution reads is padded otherwise, but its kernel has not grown")
  p, q = old.params, new.params
  spatial = p["dimension_numbers"].lhs_spec[2:]
  for i, (axis, offset) in enumerate(zip(spatial, kernel.offset, strict=True)):
    need = offset * p["rhs_dilation"][i]
    more = q["padding"][i][0] - p["padding"][i][0] + (x.offset[axis] if x.offset else 0)
    if more != need:
      raise ValueError(
        f"a kernel grows along spatial axis {i} by {offset} taps at its start, for which its"
        f" convolution has to pad by {need} more, found {more}; expected padding"
        ' "SAME" (or "CAUSAL", and old taps at the end)'
      )
