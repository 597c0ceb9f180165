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
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence.growth import _parts
from optax_cadence.growth._parts import Parts
from optax_cadence.growth._parts import whole
from optax_cadence.programs import primitives
from optax_cadence.programs import reading


class Evaluator:
  """Evaluates a pair of programs.

  Attributes:
    alpha: The gate: scalar array.
    counts: Whether the program may count along an axis that grows: whether it is known that new
      entries lie behind all old ones there.
    mixes: How often old and new have met so far.
    made: What was computed of the gate before and may be used again, by what it was computed of.
  """

  def __init__(self, alpha: Any, counts: bool = True):
    self.alpha = alpha
    self.counts = counts
    self.mixes = 0
    self.made: dict[Any, Any] = {}

  def run(self, old: Any, new: Any, inputs: list[Parts]) -> list[Parts]:
    """The outputs of the programs, in parts.

    Raises:
      ValueError: If the programs do not have the same operations.
    """
    try:
      return reading.walk([old, new], inputs, self._operation, self._constant, dead=False)
    except reading.DifferentProgramsError as error:
      raise ValueError(
        f"the programs before and after must have the same operations, found {error}; change one"
        " thing at a time: merge the gate of one growth before the next"
      ) from error

  def _constant(self, numbers: tuple[Any, ...]) -> Parts:
    """A constant, between that of the old program and that of the new one."""
    old, new = numbers
    if np.size(old) == np.size(new) == 0:
      return _parts.empty(old, new)
    if np.shape(old) != np.shape(new):
      raise ValueError(
        f"a constant of the program grows from shape {np.shape(old)} to {np.shape(new)}: pass it"
        " among the variables, so that the plan can say which of its entries are new"
      )
    if _equal(old, new):
      return whole(old)
    return self._between(old, new)

  def _between(self, old: Any, new: Any) -> Parts:
    """What is one number in the old program and another in the new one."""
    dtype = jnp.result_type(old)
    if not jnp.issubdtype(dtype, jnp.floating):
      return Parts((), {(): old}, new=new)
    self.mixes += 1
    if isinstance(old, jax.core.Tracer) or isinstance(new, jax.core.Tracer) or np.ndim(old):
      key: Any = id(old), id(new)
    else:
      key = float(old), float(new), dtype
    if key not in self.made:
      a, b = jnp.asarray(old, dtype), jnp.asarray(new, dtype)
      self.made[key] = old, new, whole(a + self.alpha.astype(dtype) * (b - a))
    return self.made[key][-1]

  def _scaled(self, x: Any) -> Any:
    """What comes from new entries times the gate; once, where several products read it."""
    if id(x) not in self.made:
      self.made[id(x)] = x, self.alpha.astype(x.dtype) * x  # x is kept, and so is its id
    return self.made[id(x)][1]

  def _of_two(self, old: Any, new: Any, operands: list[Parts]) -> list[Parts]:
    """An operation on integers that are not the same in both programs, such as sizes.

    There is nothing between two integers. But what is computed of them may be the same again, as
    an index counted from either end is, or a number of another kind.
    """
    pairs = [x.old_and_new for x in operands]
    if any(x.axes for x in operands) or not _same(old, new):
      (found,) = [pair for x, pair in zip(operands, pairs, strict=True) if x.new is not None][:1]
      raise ValueError(
        f"{old.primitive.name} goes by an integer that is {found[0]} in the program before and"
        f" {found[1]} in the one after: expected one for both, as there is none between them"
      )
    results = zip(
      *(_folded(eqn, xs) for eqn, xs in zip((old, new), zip(*pairs, strict=True), strict=True)),
      strict=True,
    )
    return [whole(a) if _equal(a, b) else self._between(a, b) for a, b in results]

  def _operation(self, eqns: reading.Eqns, operands: list[Parts]) -> list[Parts]:
    old, new = eqns
    name = old.primitive.name
    inner = reading.called(old), reading.called(new)
    opens = inner[0] is not None and not name.startswith(("custom_", "remat", "checkpoint"))
    if any(x.new is not None for x in operands):
      if not opens:
        return self._of_two(old, new, operands)
    elif not any(x.axes for x in operands) and _same(old, new):
      return [whole(y) for y in _folded(old, [x.blocks[()] for x in operands])]
    if name == "scan":
      return self._scan(old, new, operands)
    if name == "while":
      return self._while(old, new, operands)
    if name == "cond":
      return self._cond(old, new, operands)
    if name == "custom_linear_solve":
      (before, taken), (after, _) = reading.solver(old), reading.solver(new)
      return self._custom(old, new, (before, after), operands, [operands[i] for i in taken])
    if inner[0] is None or inner[1] is None:
      return self._single(old, new, operands)
    if name.startswith("custom_"):
      return self._custom(old, new, inner, operands)
    if name.startswith(("remat", "checkpoint")):
      body = _Body(self, inner, operands)
      policy = old.params.get("policy")
      return body.results(jax.checkpoint(body, policy=policy)(_arrays(operands)))
    return self.run(inner[0], inner[1], operands)

  def _single(self, old: Any, new: Any, operands: list[Parts]) -> list[Parts]:
    """An operation without programs inside."""
    if _parts.pads_for_taps(old, new, operands):
      return [_parts.padded(old, new, *operands)]
    if any(_parts.TAPS in x.axes for x in operands):
      if old.primitive.name != "conv_general_dilated":
        return [_parts.passed(old, operands)]
      _parts.check_taps(old, new, *operands)
    if old.primitive.name == "iota" and not self.counts:
      raise ValueError(
        "the program counts along an axis that grows (iota), which it must not unless it is known"
        " where new entries lie there: expected inputs when the units were described"
      )
    axes = _parts.Combinations(old, new, operands)
    # The gate multiplies what a product reads, unless that is of less precision than what it gives.
    early = old.primitive.name in primitives.PRODUCTS and (
      old.invars[0].aval.dtype == old.outvars[0].aval.dtype
    )
    results = [Parts(grown, {}) for grown in axes.result_axes]
    for kept_bits in itertools.product((0, 1), repeat=len(axes.kept)):
      kept = dict(zip(axes.kept, kept_bits, strict=True))
      totals: list[Any] = []
      # The sum over what comes from old entries, then over what comes from new ones.
      for bits in itertools.product((0, 1), repeat=len(axes.summed)):
        at = {**kept, **dict(zip(axes.summed, bits, strict=True))}
        blocks = axes.blocks(operands, at)
        gated = any(bits) and not any(kept_bits)
        if gated and early:
          blocks[0] = self._scaled(blocks[0])
        outputs = _parts.bind(old, new, axes, at, blocks)
        if any(bits):
          self.mixes += 1
          alpha = self.alpha if gated and not early else None
          pairs = zip(totals, outputs, strict=True)
          totals = [_parts.met(old, a, b, alpha) for a, b in pairs]
        else:
          totals = outputs
      for i, (result, total) in enumerate(zip(results, totals, strict=True)):
        if axes.gives(i, kept):
          result.blocks[axes.result_bits(i, kept)] = total
    return results

  def _custom(
    self,
    old: Any,
    new: Any,
    inner: Any,
    operands: list[Parts],
    inside_operands: list[Parts] | None = None,
  ) -> list[Parts]:
    """A function with a derivative of its own, in which old and new entries must not meet.

    The old part is the old network's call. A new one lies among zeros in a call at the new
    size, as the derivative was traced for shapes. `inner` are the programs of the function, of
    these operands or of some of them.
    """
    name = old.primitive.name
    if any(_parts.TAPS in x.axes for x in operands):
      raise ValueError(f"a kernel whose taps grow goes through {name}")
    inside = Evaluator(self.alpha, self.counts)
    taken = operands if inside_operands is None else inside_operands
    jax.eval_shape(_Body(inside, inner, taken), _arrays(taken))
    if inside.mixes and reading.has_true_derivative(old):
      return self.run(inner[0], inner[1], operands)
    if inside.mixes:
      raise ValueError(
        f"{name} {old.params.get('name', '')} combines old and new entries, and its own derivative"
        " would be lost; widen another axis, or leave out the custom derivative"
      )
    results = [
      Parts(_parts.grown_axes(a, b), {}) for a, b in zip(old.outvars, new.outvars, strict=True)
    ]
    axes = results[0].axes
    if any(x.axes != axes for x in results) or any(x.axes not in ((), axes) for x in operands):
      raise ValueError(f"{name}: its operands and results grow along other axes")

    def place(before: Any, after: Any, bits: tuple[int, ...]) -> tuple[list[int], list[int]]:
      """Where a part begins in the whole array, and where it ends."""
      n, m = reading.shape(before), reading.shape(after)
      start, end = [0] * len(m), list(m)
      for axis, bit in zip(axes, bits, strict=True):
        start[axis], end[axis] = (n[axis], m[axis]) if bit else (0, n[axis])
      return start, end

    for bits in itertools.product((0, 1), repeat=len(axes)):
      blocks = [x.blocks[bits if x.axes else ()] for x in operands]
      if not any(bits):
        outputs = reading.bind(old, blocks)
      else:
        for i, (x, a, b) in enumerate(zip(operands, old.invars, new.invars, strict=True)):
          if x.axes:
            ends = zip(*place(a, b, bits), reading.shape(b), strict=True)
            around = [(start, n - end, 0) for start, end, n in ends]
            blocks[i] = jax.lax.pad(blocks[i], jnp.zeros((), blocks[i].dtype), around)
        pairs = zip(reading.bind(new, blocks), old.outvars, new.outvars, strict=True)
        outputs = [jax.lax.slice(y, *place(a, b, bits)) for y, a, b in pairs]
      for result, output in zip(results, outputs, strict=True):
        result.blocks[bits] = output
    return results

  def _cond(self, old: Any, new: Any, operands: list[Parts]) -> list[Parts]:
    index, rest = operands[0].blocks[()], operands[1:]
    pairs = zip(old.params["branches"], new.params["branches"], strict=True)
    branches = [_Body(self, pair, rest) for pair in pairs]
    return branches[-1].results(jax.lax.switch(index, branches, _arrays(rest)))

  def _while(self, old: Any, new: Any, operands: list[Parts]) -> list[Parts]:
    head, body = reading.while_counts(old)
    of_head, of_body, carry = operands[:head], operands[head : head + body], operands[head + body :]
    condition, step = (
      _Body(self, (old.params[which], new.params[which]), carry)
      for which in ("cond_jaxpr", "body_jaxpr")
    )

    def goes_on(arrays: Any) -> Any:
      return condition(arrays, of_head)[0][0]

    def once(arrays: Any) -> Any:
      return step(arrays, of_body)

    return step.results(jax.lax.while_loop(goes_on, once, _arrays(carry)))

  def _scan(self, old: Any, new: Any, operands: list[Parts]) -> list[Parts]:
    p = old.params
    consts, carried = reading.scan_counts(old)
    first = consts + carried  # the first operand that is read slice by slice
    slices = [_moved(x, -1) for x in operands[first:]]
    programs = p["jaxpr"], new.params["jaxpr"]
    body = _Body(self, programs, [*operands[consts:first], *slices])

    def step(carry: Any, xs: Any) -> Any:
      outputs = body([*carry, *xs], operands[:consts])
      return outputs[:carried], outputs[carried:]

    carry, stacked = jax.lax.scan(
      step,
      _arrays(operands[consts:first]),
      _arrays(operands[first:]),
      length=p["length"],
      reverse=p["reverse"],
      unroll=p["unroll"],
    )
    results = body.results([*carry, *stacked])
    return results[:carried] + [_moved(y, 1) for y in results[carried:]]


def _arrays(values: list[Parts]) -> list[list[Any]]:
  """The arrays of values in parts, as transformations of JAX take them."""
  return [[x.blocks[bits] for bits in sorted(x.blocks)] for x in values]


def _with_arrays(values: list[Parts], arrays: Any) -> list[Parts]:
  """The values with other arrays, in the order of `_arrays`."""
  return [
    x._replace(blocks=dict(zip(sorted(x.blocks), blocks, strict=True)))
    for x, blocks in zip(values, arrays, strict=True)
  ]


class _Body:
  """A pair of programs as a function of arrays, for `jax.checkpoint`, `scan` and `switch`."""

  def __init__(self, evaluator: Evaluator, programs: Any, inputs: list[Parts]):
    self.evaluator, self.programs, self.inputs = evaluator, programs, inputs
    self.outputs: list[Parts] = []

  def __call__(self, arrays: Any, constants: Any = ()) -> Any:
    inputs = [*constants, *_with_arrays(self.inputs, arrays)]
    # What was computed outside may be used inside, but not the other way round.
    outside, self.evaluator.made = self.evaluator.made, dict(self.evaluator.made)
    outputs = self.evaluator.run(self.programs[0], self.programs[1], inputs)
    self.evaluator.made = outside
    # Without the arrays, which are of the transformation's own tracing.
    self.outputs = [x._replace(blocks=dict.fromkeys(x.blocks)) for x in outputs]
    return _arrays(outputs)

  def results(self, arrays: Any) -> list[Parts]:
    """What it returned, in parts."""
    return _with_arrays(self.outputs, arrays)


def _moved(x: Parts, by: int) -> Parts:
  """A value that a scan reads or writes slice by slice, and a slice of it: other axes."""
  if by < 0 and 0 in x.axes:
    raise ValueError("the axis that a loop runs over cannot grow: expected its length to stay")
  return x._replace(axes=tuple(a + by for a in x.axes))


def _equal(a: Any, b: Any) -> bool:
  """Whether two numbers are the same, as far as is known while tracing."""
  if a is b:
    return True
  if np.shape(a) != np.shape(b) or isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
    return False
  if jax.dtypes.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
    with jax.ensure_compile_time_eval():
      a, b = jax.random.key_data(a), jax.random.key_data(b)
  a, b = np.asarray(a), np.asarray(b)
  return bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))


def _folded(eqn: Any, operands: Sequence[Any]) -> list[Any]:
  """The results of an operation: integers that are known while tracing stay known."""
  integers = all(
    not v.aval.shape and not jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars
  )
  if integers and operands and not any(isinstance(x, jax.core.Tracer) for x in operands):
    with jax.ensure_compile_time_eval():
      return reading.bind(eqn, operands)
  return reading.bind(eqn, operands)


def _same(old: Any, new: Any) -> bool:
  """Whether two operations compute the same of the same operands, inside too."""
  pairs = zip([*old.invars, *old.outvars], [*new.invars, *new.outvars], strict=True)
  if any(reading.shape(a) != reading.shape(b) for a, b in pairs):
    return False
  bodies = list(zip(reading.bodies(old), reading.bodies(new), strict=True))
  if not bodies and str(old.params) != str(new.params):
    raise ValueError(
      f"{old.primitive.name} differs before and after: {old.params} and {new.params}"
    )
  return all(_same_programs(*pair) for pair in bodies)


def _same_programs(old: Any, new: Any) -> bool:
  """Whether two programs compute the same."""
  same = []

  def operation(eqns: reading.Eqns, operands: list[Any]) -> list[Any]:
    del operands
    same.append(_same(*eqns))
    return [None] * len(eqns[0].outvars)

  def constant(numbers: tuple[Any, ...]) -> None:
    same.append(_equal(*numbers))

  try:
    reading.walk([old, new], [None] * len(reading.opened(old)[0].invars), operation, constant)
  except reading.DifferentProgramsError:
    return False
  return all(same)
