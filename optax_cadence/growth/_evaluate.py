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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence.growth._operation import bound
from optax_cadence.growth._operation import grown_axes
from optax_cadence.growth._operation import Units
from optax_cadence.growth._split import moved
from optax_cadence.growth._split import outline
from optax_cadence.growth._split import packed
from optax_cadence.growth._split import Split
from optax_cadence.growth._split import TAPS
from optax_cadence.growth._split import unpacked
from optax_cadence.growth._split import whole
from optax_cadence.growth._taps import check_taps
from optax_cadence.growth._taps import padded
from optax_cadence.growth._taps import pads_for_taps
from optax_cadence.growth._taps import passed
from optax_cadence.programs import reading


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
    (old, old_consts), (new, new_consts) = reading.opened(old), reading.opened(new)
    if [e.primitive.name for e in old.eqns] != [e.primitive.name for e in new.eqns]:
      raise ValueError(_different(old.eqns, new.eqns))
    values = {
      v: self._constant(a, b) for v, a, b in zip(old.constvars, old_consts, new_consts, strict=True)
    }
    values.update(zip(old.invars, inputs, strict=True))

    def read(one: Any, two: Any) -> Split:
      return self._constant(one.val, two.val) if reading.is_literal(one) else values[one]

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
      return [whole(y) for y in reading.bind(old, [x.blocks[()] for x in operands])]
    if name in ("scan", "cond"):
      return getattr(self, f"_{name}")(old, new, operands)
    inner = reading.called(old), reading.called(new)
    if inner[0] is None or inner[1] is None:
      return self._basic(old, new, operands)
    if name.startswith("custom_"):
      return self._custom(old, new, inner, operands)
    if name.startswith(("remat", "checkpoint")):
      return self._packed(jax.checkpoint, inner, operands, policy=old.params.get("policy"))
    return self.run(inner[0], inner[1], operands)

  def _basic(self, old: Any, new: Any, operands: list[Split]) -> list[Split]:
    if pads_for_taps(old, new, operands):
      return [padded(old, new, *operands)]
    if any(TAPS in x.axes for x in operands):
      if old.primitive.name != "conv_general_dilated":
        return [passed(old, operands)]
      check_taps(old, new, *operands)
    units = Units(old, new, operands)
    results = [Split(axes, {}) for axes in units.result_axes]
    for bits in itertools.product((0, 1), repeat=len(units.kept)):
      chosen = dict(zip(units.kept, bits, strict=True))
      outputs = self._sum(old, new, operands, units, chosen)
      for i, (result, output) in enumerate(zip(results, outputs, strict=True)):
        result.blocks[units.bits_of(i, chosen)] = output
    return results

  def _sum(
    self, old: Any, new: Any, operands: list[Split], units: Units, chosen: dict[int, int]
  ) -> list[Any]:
    """One part of the results: what is summed over, old first, then new."""
    total: list[Any] | None = None
    for bits in itertools.product((0, 1), repeat=len(units.summed)):
      at = {**chosen, **dict(zip(units.summed, bits, strict=True))}
      outputs = bound(old, new, units, at, units.blocks(operands, at))
      if any(bits):
        self.mixes += 1
        if not any(chosen.values()):
          outputs = [self.alpha.astype(y.dtype) * y for y in outputs]
      total = outputs if total is None else [a + b for a, b in zip(total, outputs, strict=True)]
    assert total is not None
    return total

  def _custom(self, old: Any, new: Any, inner: Any, operands: list[Split]) -> list[Split]:
    """A function with a derivative of its own: its parts must not meet.

    The old part is the old network's call. A new one lies among zeros in a call at the new
    size, as the derivative was traced for shapes.
    """
    if any(TAPS in x.axes for x in operands):
      raise ValueError(f"a kernel whose taps grow goes through {old.primitive.name}")
    inside = Evaluator(self.alpha)
    jax.eval_shape(
      lambda xs: packed(inside.run(inner[0], inner[1], unpacked(operands, xs))), packed(operands)
    )
    if inside.mixes:
      raise ValueError(
        f"{old.primitive.name} {old.params.get('name', '')} combines old and new entries, and its"
        " own derivative would be lost; widen another axis, or leave out the custom derivative"
      )
    results = [Split(grown_axes(a, b), {}) for a, b in zip(old.outvars, new.outvars, strict=True)]
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
      return reading.bind(old, [x.blocks[(0,) * len(x.axes)] for x in operands])
    inputs = []
    for x, small, big in zip(operands, old.invars, new.invars, strict=True):
      if not x.axes:
        inputs.append(x.blocks[()])
        continue
      at = _part(reading.shape(small), reading.shape(big), axes, bits)
      block = x.blocks[bits]
      inputs.append(jnp.zeros(reading.shape(big), block.dtype).at[at].set(block))
    outputs = reading.bind(new, inputs)
    pairs = zip(outputs, old.outvars, new.outvars, strict=True)
    return [y[_part(reading.shape(a), reading.shape(b), axes, bits)] for y, a, b in pairs]

  def _packed(
    self, wrap: Callable[..., Any], inner: Any, operands: list[Split], **kwargs: Any
  ) -> list[Split]:
    """Runs a pair of programs inside a transformation of functions of arrays."""
    layout: list[list[Split]] = []

    def body(xs: Any) -> Any:
      results = self.run(inner[0], inner[1], unpacked(operands, xs))
      layout.append(outline(results))
      return packed(results)

    outputs = wrap(body, **kwargs)(packed(operands))
    return unpacked(layout[-1], outputs)

  def _cond(self, old: Any, new: Any, operands: list[Split]) -> list[Split]:
    index, rest = operands[0].blocks[()], operands[1:]
    layout: list[list[Split]] = []

    def branch(one: Any, two: Any) -> Any:
      def body(xs: Any) -> Any:
        results = self.run(one, two, unpacked(rest, xs))
        layout.append(outline(results))
        return packed(results)

      return body

    pairs = zip(old.params["branches"], new.params["branches"], strict=True)
    outputs = jax.lax.switch(index, [branch(a, b) for a, b in pairs], packed(rest))
    return unpacked(layout[-1], outputs)

  def _scan(self, old: Any, new: Any, operands: list[Split]) -> list[Split]:
    p = old.params
    consts, carried = reading.scan_counts(old)
    end = consts + carried
    layout: list[list[Split]] = []
    slices = [moved(x, -1) for x in operands[end:]]

    def body(carry: Any, xs: Any) -> Any:
      inputs = operands[:consts] + unpacked(operands[consts:end], carry) + unpacked(slices, xs)
      results = self.run(p["jaxpr"], new.params["jaxpr"], inputs)
      layout.append(outline(results))
      return packed(results[: end - consts]), packed(results[end - consts :])

    carry, stacked = jax.lax.scan(
      body,
      packed(operands[consts:end]),
      packed(operands[end:]),
      length=p["length"],
      reverse=p["reverse"],
      unroll=p["unroll"],
    )
    n = end - consts
    ys = [moved(y, 1) for y in unpacked(layout[-1][n:], stacked)]
    return unpacked(layout[-1][:n], carry) + ys


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
    if reading.shape(one) != reading.shape(two):
      return False
    if reading.is_literal(one) and not _equal(one.val, two.val):
      return False
  inner, other = reading.bodies(old), reading.bodies(new)
  if not inner:
    if str(old.params) != str(new.params):
      raise ValueError(
        f"{old.primitive.name} differs before and after: {old.params} and {new.params}"
      )
    return True
  for one, two in zip(inner, other, strict=True):
    (one, one_consts), (two, two_consts) = reading.opened(one), reading.opened(two)
    if len(one.eqns) != len(two.eqns) or not all(map(_equal_consts, one_consts, two_consts)):
      return False
    if not all(
      a.primitive is b.primitive and _same(a, b) for a, b in zip(one.eqns, two.eqns, strict=True)
    ):
      return False
  return True


def _equal_consts(a: Any, b: Any) -> bool:
  return np.shape(a) == np.shape(b) and (a is b or _equal(a, b))


def _all_bits(axes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
  return itertools.product((0, 1), repeat=len(axes))


def _part(
  old: tuple[int, ...], new: tuple[int, ...], axes: tuple[int, ...], bits: tuple[int, ...]
) -> tuple[slice, ...]:
  at = [slice(None)] * len(new)
  for axis, bit in zip(axes, bits, strict=True):
    at[axis] = slice(old[axis], new[axis]) if bit else slice(0, old[axis])
  return tuple(at)
