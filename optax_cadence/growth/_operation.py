"""One operation on values in parts: which parts it combines, and with what sizes."""

from collections.abc import Iterator
from typing import Any

import jax

from optax_cadence.growth._split import Split
from optax_cadence.growth._split import TAPS
from optax_cadence.programs import primitives
from optax_cadence.programs import reading


def grown_axes(old: Any, new: Any) -> tuple[int, ...]:
  """The axes along which two variables differ."""
  a, b = reading.shape(old), reading.shape(new)
  if len(a) != len(b):
    raise ValueError(f"the programs before and after differ: shapes {a} and {b}")
  for axis, (n, m) in enumerate(zip(a, b, strict=True)):
    if m < n:
      raise ValueError(f"axis {axis} of a value shrinks from {a} to {b}: expected it to grow")
  return tuple(axis for axis, (n, m) in enumerate(zip(a, b, strict=True)) if n != m)


class Units:
  """Which axes of one operation have grown, and which of them go together.

  A unit is a tie with a grown axis in it, or an axis of the results that is new and grown.

  Attributes:
    kept: Units that the results have.
    summed: Units that are summed over.
    result_axes: For each result the axes that have grown.
  """

  def __init__(self, old: Any, new: Any, operands: list[Split]):
    self.result_axes = [grown_axes(a, b) for a, b in zip(old.outvars, new.outvars, strict=True)]
    self.of_operand: dict[tuple[int, int], int] = {}
    self.of_result: dict[tuple[int, int], int] = {}
    self.kept: list[int] = []
    self.summed: list[int] = []
    grown = {(i, a) for i, x in enumerate(operands) for a in x.axes}
    for tie in [*_all_ties(old, new, grown), *_tap_ties(operands)]:
      if any(pair in grown for pair in tie.operands):
        self._add(tie)
    results = {(i, a) for i, axes in enumerate(self.result_axes) for a in axes}
    lost = grown - self.of_operand.keys()
    if lost or self.of_result.keys() - results:
      raise ValueError(self._cannot(old, new, lost))
    for pair in sorted(results - self.of_result.keys()):
      self._add(primitives.Tie((), (pair,)))

  def _add(self, tie: primitives.Tie) -> None:
    unit = len(self.kept) + len(self.summed)
    (self.summed if tie.summed else self.kept).append(unit)
    self.of_operand.update(dict.fromkeys(tie.operands, unit))
    self.of_result.update(dict.fromkeys(tie.results, unit))

  def _cannot(self, old: Any, new: Any, lost: Any) -> str:
    shapes = [[reading.shape(v) for v in eqn.invars] for eqn in (old, new)]
    axis = f" along axis {sorted(lost)[0][1]} of operand {sorted(lost)[0][0]}" if lost else ""
    return (
      f"{old.primitive.name} of shapes {shapes[0]} before and {shapes[1]} after cannot keep old and"
      f" new entries apart{axis}: expected a sum, or an operation on each entry alone"
    )

  def bits_of(self, result: int, at: dict[int, int]) -> tuple[int, ...]:
    """The part of a result."""
    return tuple(at[self.of_result[result, a]] for a in self.result_axes[result])

  def blocks(self, operands: list[Split], at: dict[int, int]) -> list[Any]:
    """The parts of the operands."""
    return [
      x.blocks[tuple(at[self.of_operand[i, a]] for a in x.axes)] for i, x in enumerate(operands)
    ]


def _tap_ties(operands: list[Split]) -> list[primitives.Tie]:
  taps = tuple((i, TAPS) for i, x in enumerate(operands) if TAPS in x.axes)
  return [primitives.Tie(taps, summed=True)] if taps else []


def _all_ties(old: Any, new: Any, grown: set[tuple[int, int]]) -> list[primitives.Tie]:
  name = old.primitive.name
  found = primitives.ties(old)
  if found is None:
    raise ValueError(f"{name} is not known here: its operands cannot be held in two parts")
  if name == "reshape":
    return list(_reshape_ties(old, new))
  if name == "split":
    axis = old.params["axis"]
    outs = tuple((i, axis) for i in range(len(old.outvars)))
    return [*found, primitives.Tie(((0, axis),), outs)]
  if name == "concatenate":
    axis = old.params["dimension"]
    return [*found, primitives.Tie(tuple((i, axis) for i in range(len(old.invars))), ((0, axis),))]
  if name == "slice":
    tied = {a for tie in found for _, a in tie.operands}
    rest = [a for i, a in grown if i == 0 and a not in tied]
    return [*found, *(primitives.Tie(((0, a),), ((0, a),)) for a in rest)]
  return found


def _reshape_ties(old: Any, new: Any) -> Iterator[primitives.Tie]:
  ins, outs = grown_axes(old.invars[0], new.invars[0]), grown_axes(old.outvars[0], new.outvars[0])
  groups = primitives.reshape_groups(reading.shape(old.invars[0]), reading.shape(old.outvars[0]))
  for before, after in groups:
    a, b = [i for i in before if i in ins], [o for o in after if o in outs]
    if len(a) == len(b) == 1:
      yield primitives.Tie(((0, a[0]),), ((0, b[0]),))


def bound(old: Any, new: Any, units: Units, at: dict[int, int], blocks: list[Any]) -> list[Any]:
  """One operation on one combination of parts."""
  name = old.primitive.name
  if name == "concatenate" and (axis := old.params["dimension"]) in units.result_axes[0]:
    return _concatenated(old, new, units, at, blocks, axis)
  changed = _adapted(old, new, units, at, blocks)
  if name == "random_bits" and any(at.values()):
    # The old entries keep their own numbers; new ones must not repeat them.
    bits = sum(bit << i for i, bit in enumerate(units.bits_of(0, at)))
    blocks = [jax.random.fold_in(blocks[0], bits)]
  return reading.bind(old, blocks, **changed)


def _concatenated(
  old: Any, new: Any, units: Units, at: dict[int, int], blocks: list[Any], axis: int
) -> list[Any]:
  sizes = [
    (reading.shape(a)[axis], reading.shape(b)[axis])
    for a, b in zip(old.invars, new.invars, strict=True)
  ]
  if at[units.of_result[0, axis]]:
    blocks = [x for x, (n, m) in zip(blocks, sizes, strict=True) if n != m]
  return reading.bind(old, blocks)


def _adapted(
  old: Any, new: Any, units: Units, at: dict[int, int], blocks: list[Any]
) -> dict[str, Any]:
  """The parameters that hold sizes, for one combination of parts."""
  name, p, q = old.primitive.name, old.params, new.params

  def size(n: int, m: int, unit: int | None) -> int:
    return m - n if unit is not None and at[unit] else n

  def result(i: int = 0) -> tuple[int, ...]:
    pair = zip(reading.shape(old.outvars[i]), reading.shape(new.outvars[i]), strict=True)
    return tuple(size(n, m, units.of_result.get((i, a))) for a, (n, m) in enumerate(pair))

  if name in ("broadcast_in_dim", "random_bits"):
    return {"shape": result()}
  if name == "iota":
    if p["dimension"] in units.result_axes[0] and any(at.values()):
      raise ValueError("the program counts along an axis that grows (iota): expected it not to")
    return {"shape": result()}
  if name == "reshape":
    return {"new_sizes": result()}
  if name in ("gather", "dynamic_slice"):
    pair = zip(p["slice_sizes"], q["slice_sizes"], strict=True)
    return {
      "slice_sizes": tuple(
        size(n, m, units.of_operand.get((0, a))) for a, (n, m) in enumerate(pair)
      )
    }
  if name == "slice":
    ends = {
      key: tuple(
        size(n, m, units.of_operand.get((0, a)))
        for a, (n, m) in enumerate(zip(p[key], q[key], strict=True))
      )
      for key in ("start_indices", "limit_indices")
    }
    if any(s != 1 for s in p["strides"] or ()) and any(at.values()):
      raise ValueError("an axis that grows is cut with strides: expected whole pieces of it")
    return ends
  if name == "split":
    unit = units.of_operand.get((0, p["axis"]))
    pair = zip(p["sizes"], q["sizes"], strict=True)
    return {"sizes": tuple(size(n, m, unit) for n, m in pair)}
  if name == "conv_general_dilated":
    return _adapted_conv(old, new, units, at)
  del blocks
  return {}


def _adapted_conv(old: Any, new: Any, units: Units, at: dict[int, int]) -> dict[str, Any]:
  p, q = old.params, new.params
  changed = {}
  if (1, TAPS) in units.of_operand and at[units.of_operand[1, TAPS]]:
    changed["padding"] = q["padding"]
  groups = p["feature_group_count"], q["feature_group_count"]
  if groups[0] > 1:
    unit = units.of_operand.get((0, p["dimension_numbers"].lhs_spec[1]))
    if unit is not None and groups[0] == groups[1]:
      raise ValueError("a grouped convolution can only get more groups, not wider ones")
    if unit is not None and at[unit]:
      changed["feature_group_count"] = groups[1] - groups[0]
  return changed
