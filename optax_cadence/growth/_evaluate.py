"""Runs a widened network with its arrays held in two parts: the old entries and the new.

The programs of the network at its old and at its new size are walked side by side. An
operation on old parts is the old network's own, at its own shapes; parts that are new are
computed beside it. The two meet where an operation sums over an axis that has grown: there
what comes from new entries is multiplied by α, if it goes to old ones. So at α = 0 the old
network runs as it did, bit for bit, whatever lies between: products, convolutions, and the
statistics of a norm. Constants that differ between the programs (the number of entries that
a mean divides by) go linearly from one to the other.

Nothing here knows about parameters; see `_gate` for how they are cut into parts.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence.growth import _ties

# A kernel with new taps is held as two arrays that are added: the old taps, and an array at
# the new size with zeros in their place. This stands for the axis that tells which.
TAPS = -1


class Split(NamedTuple):
  """A value in parts.

  Attributes:
    axes: The axes that have grown, ascending.
    blocks: For each combination of old (0) and new (1) along them the array.
    offset: Where the old taps of a kernel begin among the new, for each spatial axis.
  """

  axes: tuple[int, ...]
  blocks: dict[tuple[int, ...], Any]
  offset: tuple[int, ...] = ()


def whole(x: Any) -> Split:
  """A value that has not grown."""
  return Split((), {(): x})


class Evaluator:
  """Evaluates a pair of programs.

  Attributes:
    alpha: The gate: scalar array.
    mixes: How often old and new have met so far.
  """

  def __init__(self, alpha: Any):
    self.alpha = alpha
    self.mixes = 0

  def run(self, old: Any, new: Any, inputs: list[Split]) -> list[Split]:
    """The outputs of the programs, in parts."""
    (old, old_consts), (new, new_consts) = _ties.opened(old), _ties.opened(new)
    if [e.primitive.name for e in old.eqns] != [e.primitive.name for e in new.eqns]:
      raise ValueError(_different(old.eqns, new.eqns))
    values = {
      v: self._constant(a, b) for v, a, b in zip(old.constvars, old_consts, new_consts, strict=True)
    }
    values.update(zip(old.invars, inputs, strict=True))

    def read(one: Any, two: Any) -> Split:
      return self._constant(one.val, two.val) if _ties.is_literal(one) else values[one]

    for one, two in zip(old.eqns, new.eqns, strict=True):
      operands = [read(a, b) for a, b in zip(one.invars, two.invars, strict=True)]
      outputs = self._apply(one, two, operands)
      values.update(zip(one.outvars, outputs, strict=True))
    return [read(a, b) for a, b in zip(old.outvars, new.outvars, strict=True)]

  def _constant(self, old: Any, new: Any) -> Split:
    if np.shape(old) != np.shape(new):
      raise ValueError(
        f"a constant of the program grows from shape {np.shape(old)} to {np.shape(new)}: pass it"
        " among the variables, so that the plan can say which of its entries are new"
      )
    if old is new or _equal(old, new):
      return whole(old)
    if not jnp.issubdtype(jnp.result_type(old), jnp.floating):
      raise ValueError(
        f"expected one constant in the programs before and after, found {old}, {new}"
      )
    self.mixes += 1
    dtype = jnp.result_type(old)
    old, new = jnp.asarray(old, dtype), jnp.asarray(new, dtype)
    return whole(old + self.alpha.astype(dtype) * (new - old))

  def _apply(self, old: Any, new: Any, operands: list[Split]) -> list[Split]:
    name = old.primitive.name
    split = any(x.axes for x in operands)
    if not split and _same(old, new):
      return [whole(y) for y in _ties.bind(old, [x.blocks[()] for x in operands])]
    if name in ("scan", "cond"):
      return getattr(self, f"_{name}")(old, new, operands)
    inner = _ties.inlined(old), _ties.inlined(new)
    if inner[0] is None or inner[1] is None:
      return self._basic(old, new, operands)
    if name.startswith("custom_"):
      return self._custom(old, new, inner, operands)
    if name.startswith(("remat", "checkpoint")):
      return self._packed(jax.checkpoint, inner, operands, policy=old.params.get("policy"))
    return self.run(inner[0], inner[1], operands)

  def _basic(self, old: Any, new: Any, operands: list[Split]) -> list[Split]:
    if any(TAPS in x.axes for x in operands) and old.primitive.name != "conv_general_dilated":
      return self._pass_taps(old, new, operands)
    if operands and operands[-1].offset:
      check_taps(old, new, operands[-1])
    units = _Units(old, new, operands)
    results = [Split(axes, {}) for axes in units.result_axes]
    for bits in itertools.product((0, 1), repeat=len(units.kept)):
      chosen = dict(zip(units.kept, bits, strict=True))
      outputs = self._sum(old, new, operands, units, chosen)
      for i, (result, output) in enumerate(zip(results, outputs, strict=True)):
        result.blocks[units.bits_of(i, chosen)] = output
    return results

  def _sum(
    self, old: Any, new: Any, operands: list[Split], units: "_Units", chosen: dict[int, int]
  ) -> list[Any]:
    """One part of the results: what is summed over, old first, then new."""
    total: list[Any] | None = None
    for bits in itertools.product((0, 1), repeat=len(units.summed)):
      at = {**chosen, **dict(zip(units.summed, bits, strict=True))}
      blocks = units.blocks(operands, at)
      if blocks is None:
        continue
      outputs = _bound(old, new, units, at, blocks)
      if any(bits):
        self.mixes += 1
        if not any(chosen.values()):
          outputs = [self.alpha.astype(y.dtype) * y for y in outputs]
      total = outputs if total is None else [a + b for a, b in zip(total, outputs, strict=True)]
    assert total is not None
    return total

  def _pass_taps(self, old: Any, new: Any, operands: list[Split]) -> list[Split]:
    if old.primitive.name not in ("convert_element_type", "copy", "neg"):
      raise ValueError(
        f"a kernel whose taps grow goes through {old.primitive.name} before its convolution:"
        " expected it to be used as it is"
      )
    (kernel,) = operands
    blocks = {bits: _ties.bind(old, [x])[0] for bits, x in kernel.blocks.items()}
    return [Split(kernel.axes, blocks, kernel.offset)]

  def _custom(self, old: Any, new: Any, inner: Any, operands: list[Split]) -> list[Split]:
    """A function with a derivative of its own: its parts must not meet.

    The old part is the old network's call. A new one lies among zeros in a call at the new
    size, as the derivative was traced for shapes.
    """
    if any(TAPS in x.axes for x in operands):
      raise ValueError(f"a kernel whose taps grow goes through {old.primitive.name}")
    inside = Evaluator(self.alpha)
    jax.eval_shape(
      lambda xs: _packs(inside.run(inner[0], inner[1], _unpacked(operands, xs))), _packs(operands)
    )
    if inside.mixes:
      raise ValueError(
        f"{old.primitive.name} {old.params.get('name', '')} combines old and new entries, and its"
        " own derivative would be lost; widen another axis, or leave out the custom derivative"
      )
    results = [Split(_grown(a, b), {}) for a, b in zip(old.outvars, new.outvars, strict=True)]
    keys = sorted({bits for r in results for bits in _all_bits(r.axes)})
    if any(r.axes != results[0].axes for r in results) or any(
      x.axes not in ((), results[0].axes) for x in operands
    ):
      raise ValueError(f"{old.primitive.name}: its operands and results grow along other axes")
    for bits in keys:
      outputs = self._custom_part(old, new, operands, results[0].axes, bits)
      for result, output in zip(results, outputs, strict=True):
        result.blocks[bits] = output
    return results

  def _custom_part(
    self, old: Any, new: Any, operands: list[Split], axes: tuple[int, ...], bits: tuple[int, ...]
  ) -> list[Any]:
    if not any(bits):
      return _ties.bind(old, [x.blocks[(0,) * len(x.axes)] for x in operands])
    inputs = []
    for x, small, big in zip(operands, old.invars, new.invars, strict=True):
      if not x.axes:
        inputs.append(x.blocks[()])
        continue
      at = _part(_ties.shape(small), _ties.shape(big), axes, bits)
      block = x.blocks[bits]
      inputs.append(jnp.zeros(_ties.shape(big), block.dtype).at[at].set(block))
    outputs = _ties.bind(new, inputs)
    pairs = zip(outputs, old.outvars, new.outvars, strict=True)
    return [y[_part(_ties.shape(a), _ties.shape(b), axes, bits)] for y, a, b in pairs]

  def _packed(
    self, wrap: Callable[..., Any], inner: Any, operands: list[Split], **kwargs: Any
  ) -> list[Split]:
    """Runs a pair of programs inside a transformation of functions of arrays."""
    layout: list[list[Split]] = []

    def body(xs: Any) -> Any:
      results = self.run(inner[0], inner[1], _unpacked(operands, xs))
      layout.append(_outline(results))
      return _packs(results)

    outputs = wrap(body, **kwargs)(_packs(operands))
    return _unpacked(layout[-1], outputs)

  def _cond(self, old: Any, new: Any, operands: list[Split]) -> list[Split]:
    index, rest = operands[0].blocks[()], operands[1:]
    layout: list[list[Split]] = []

    def branch(one: Any, two: Any) -> Any:
      def body(xs: Any) -> Any:
        results = self.run(one, two, _unpacked(rest, xs))
        layout.append(_outline(results))
        return _packs(results)

      return body

    pairs = zip(old.params["branches"], new.params["branches"], strict=True)
    outputs = jax.lax.switch(index, [branch(a, b) for a, b in pairs], _packs(rest))
    return _unpacked(layout[-1], outputs)

  def _scan(self, old: Any, new: Any, operands: list[Split]) -> list[Split]:
    p = old.params
    consts, carried = _ties.scan_counts(old)
    end = consts + carried
    layout: list[list[Split]] = []
    slices = [_moved(x, -1) for x in operands[end:]]

    def body(carry: Any, xs: Any) -> Any:
      inputs = operands[:consts] + _unpacked(operands[consts:end], carry) + _unpacked(slices, xs)
      results = self.run(p["jaxpr"], new.params["jaxpr"], inputs)
      layout.append(_outline(results))
      return _packs(results[: end - consts]), _packs(results[end - consts :])

    carry, stacked = jax.lax.scan(
      body,
      _packs(operands[consts:end]),
      _packs(operands[end:]),
      length=p["length"],
      reverse=p["reverse"],
      unroll=p["unroll"],
    )
    n = end - consts
    ys = [_moved(y, 1) for y in _unpacked(layout[-1][n:], stacked)]
    return _unpacked(layout[-1][:n], carry) + ys


def _moved(x: Split, by: int) -> Split:
  if by < 0 and 0 in x.axes:
    raise ValueError("the axis that a loop runs over cannot grow: expected its length to stay")
  return Split(tuple(a + by for a in x.axes), x.blocks, x.offset)


def _outline(values: list[Split]) -> list[Split]:
  """The values without their arrays, as `_unpacked` needs them."""
  return [Split(x.axes, dict.fromkeys(sorted(x.blocks))) for x in values]


def _packs(values: list[Split]) -> list[list[Any]]:
  return [[x.blocks[bits] for bits in sorted(x.blocks)] for x in values]


def _unpacked(like: list[Split], packs: Any) -> list[Split]:
  return [
    Split(x.axes, dict(zip(sorted(x.blocks), blocks, strict=True)), x.offset)
    for x, blocks in zip(like, packs, strict=True)
  ]


def _all_bits(axes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
  return itertools.product((0, 1), repeat=len(axes))


def _part(
  old: tuple[int, ...], new: tuple[int, ...], axes: tuple[int, ...], bits: tuple[int, ...]
) -> tuple[slice, ...]:
  at = [slice(None)] * len(new)
  for axis, bit in zip(axes, bits, strict=True):
    at[axis] = slice(old[axis], new[axis]) if bit else slice(0, old[axis])
  return tuple(at)


def _grown(old: Any, new: Any) -> tuple[int, ...]:
  """The axes along which two variables differ."""
  a, b = _ties.shape(old), _ties.shape(new)
  if len(a) != len(b):
    raise ValueError(f"the programs before and after differ: shapes {a} and {b}")
  for axis, (n, m) in enumerate(zip(a, b, strict=True)):
    if m < n:
      raise ValueError(f"axis {axis} of a value shrinks from {a} to {b}: expected it to grow")
  return tuple(axis for axis, (n, m) in enumerate(zip(a, b, strict=True)) if n != m)


def _different(old: list[Any], new: list[Any]) -> str:
  names = [[e.primitive.name for e in eqns] for eqns in (old, new)]
  at = next((i for i, (a, b) in enumerate(zip(*names, strict=False)) if a != b), None)
  where = f"{names[0][at]} and {names[1][at]}" if at is not None else str(list(map(len, names)))
  return (
    f"the programs before and after must have the same operations, found {where}; change one thing"
    " at a time: merge the gate of one growth before the next"
  )


def _equal(a: Any, b: Any) -> bool:
  if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
    return False
  if jax.dtypes.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
    with jax.ensure_compile_time_eval():
      a, b = jax.random.key_data(a), jax.random.key_data(b)
  return bool(
    np.array_equal(np.asarray(a), np.asarray(b), equal_nan=np.asarray(a).dtype.kind == "f")
  )


def _same(old: Any, new: Any) -> bool:
  """Whether two operations compute the same of the same operands, inside too."""
  for one, two in zip([*old.invars, *old.outvars], [*new.invars, *new.outvars], strict=True):
    if _ties.shape(one) != _ties.shape(two):
      return False
    if _ties.is_literal(one) and not _equal(one.val, two.val):
      return False
  inner, other = _ties.bodies(old), _ties.bodies(new)
  if not inner:
    if str(old.params) != str(new.params):
      raise ValueError(
        f"{old.primitive.name} differs before and after: {old.params} and {new.params}"
      )
    return True
  for one, two in zip(inner, other, strict=True):
    (one, one_consts), (two, two_consts) = _ties.opened(one), _ties.opened(two)
    if len(one.eqns) != len(two.eqns) or not all(map(_equal_consts, one_consts, two_consts)):
      return False
    if not all(
      a.primitive is b.primitive and _same(a, b) for a, b in zip(one.eqns, two.eqns, strict=True)
    ):
      return False
  return True


def _equal_consts(a: Any, b: Any) -> bool:
  return np.shape(a) == np.shape(b) and (a is b or _equal(a, b))


class _Units:
  """Which axes of one operation have grown, and which of them go together.

  A unit is a tie with a grown axis in it, or an axis of the results that is new and grown.

  Attributes:
    kept: Units that the results have.
    summed: Units that are summed over.
    result_axes: For each result the axes that have grown.
  """

  def __init__(self, old: Any, new: Any, operands: list[Split]):
    self.result_axes = [_grown(a, b) for a, b in zip(old.outvars, new.outvars, strict=True)]
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
      self._add(_ties.Tie((), (pair,)))

  def _add(self, tie: _ties.Tie) -> None:
    unit = len(self.kept) + len(self.summed)
    (self.summed if tie.summed else self.kept).append(unit)
    self.of_operand.update(dict.fromkeys(tie.operands, unit))
    self.of_result.update(dict.fromkeys(tie.results, unit))

  def _cannot(self, old: Any, new: Any, lost: Any) -> str:
    shapes = [[_ties.shape(v) for v in eqn.invars] for eqn in (old, new)]
    axis = f" along axis {sorted(lost)[0][1]} of operand {sorted(lost)[0][0]}" if lost else ""
    return (
      f"{old.primitive.name} of shapes {shapes[0]} before and {shapes[1]} after cannot keep old and"
      f" new entries apart{axis}: expected a sum, or an operation on each entry alone"
    )

  def bits_of(self, result: int, at: dict[int, int]) -> tuple[int, ...]:
    """The part of a result."""
    return tuple(at[self.of_result[result, a]] for a in self.result_axes[result])

  def blocks(self, operands: list[Split], at: dict[int, int]) -> list[Any] | None:
    """The parts of the operands; None where there is no such part."""
    found = []
    for i, x in enumerate(operands):
      found.append(x.blocks[tuple(at[self.of_operand[i, a]] for a in x.axes)])
    return found


def _tap_ties(operands: list[Split]) -> list[_ties.Tie]:
  return [_ties.Tie(((i, TAPS),), summed=True) for i, x in enumerate(operands) if TAPS in x.axes]


def _all_ties(old: Any, new: Any, grown: set[tuple[int, int]]) -> list[_ties.Tie]:
  name = old.primitive.name
  found = _ties.ties(old)
  if found is None:
    raise ValueError(f"{name} is not known here: its operands cannot be held in two parts")
  if name == "reshape":
    return list(_reshape_ties(old, new))
  if name == "split":
    axis = old.params["axis"]
    outs = tuple((i, axis) for i in range(len(old.outvars)))
    return [*found, _ties.Tie(((0, axis),), outs)]
  if name == "concatenate":
    axis = old.params["dimension"]
    return [*found, _ties.Tie(tuple((i, axis) for i in range(len(old.invars))), ((0, axis),))]
  if name == "slice":
    tied = {a for tie in found for _, a in tie.operands}
    rest = [a for i, a in grown if i == 0 and a not in tied]
    return [*found, *(_ties.Tie(((0, a),), ((0, a),)) for a in rest)]
  return found


def _reshape_ties(old: Any, new: Any) -> Iterator[_ties.Tie]:
  ins, outs = _grown(old.invars[0], new.invars[0]), _grown(old.outvars[0], new.outvars[0])
  groups = _ties.reshape_groups(_ties.shape(old.invars[0]), _ties.shape(old.outvars[0]))
  for before, after in groups:
    a, b = [i for i in before if i in ins], [o for o in after if o in outs]
    if len(a) == len(b) == 1:
      yield _ties.Tie(((0, a[0]),), ((0, b[0]),))


def _bound(old: Any, new: Any, units: _Units, at: dict[int, int], blocks: list[Any]) -> list[Any]:
  """One operation on one combination of parts."""
  name = old.primitive.name
  if name == "concatenate" and (axis := old.params["dimension"]) in units.result_axes[0]:
    return _concatenated(old, new, units, at, blocks, axis)
  changed = _adapted(old, new, units, at, blocks)
  if name == "random_bits" and any(at.values()):
    # The old entries keep their own numbers; new ones must not repeat them.
    bits = sum(bit << i for i, bit in enumerate(units.bits_of(0, at)))
    blocks = [jax.random.fold_in(blocks[0], bits)]
  return _ties.bind(old, blocks, **changed)


def _concatenated(
  old: Any, new: Any, units: _Units, at: dict[int, int], blocks: list[Any], axis: int
) -> list[Any]:
  sizes = [
    (_ties.shape(a)[axis], _ties.shape(b)[axis])
    for a, b in zip(old.invars, new.invars, strict=True)
  ]
  if at[units.of_result[0, axis]]:
    blocks = [x for x, (n, m) in zip(blocks, sizes, strict=True) if n != m]
  return _ties.bind(old, blocks)


def _adapted(
  old: Any, new: Any, units: _Units, at: dict[int, int], blocks: list[Any]
) -> dict[str, Any]:
  """The parameters that hold sizes, for one combination of parts."""
  name, p, q = old.primitive.name, old.params, new.params

  def size(n: int, m: int, unit: int | None) -> int:
    return m - n if unit is not None and at[unit] else n

  def result(i: int = 0) -> tuple[int, ...]:
    pair = zip(_ties.shape(old.outvars[i]), _ties.shape(new.outvars[i]), strict=True)
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


def _adapted_conv(old: Any, new: Any, units: _Units, at: dict[int, int]) -> dict[str, Any]:
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


def check_taps(old: Any, new: Any, kernel: Split) -> None:
  """Raises `ValueError` unless old taps meet the same inputs in both convolutions."""
  dilation = old.params["rhs_dilation"]
  for i, offset in enumerate(kernel.offset):
    low, higher = old.params["padding"][i][0], new.params["padding"][i][0]
    if higher - low != offset * dilation[i]:
      raise ValueError(
        f"a kernel grows along spatial axis {i} by {offset} taps at its start, for which its"
        f" convolution has to pad by {offset * dilation[i]} more, found {low} before and {higher}"
        ' after; expected padding "SAME" (or "CAUSAL", and old taps at the end)'
      )
