"""Runs a widened network, with the gate on what goes from new entries to old ones.

The programs of the network at its old and at its new size are walked side by side. What is run is
the new one, on arrays whose old entries lie before their new ones (see `_values`). Old and new meet
where an operation sums over an axis that has grown: there what comes from new entries is multiplied
by α, if it goes to old ones. So at α = 0 old entries are those of the old network, whatever lies
between: products, convolutions, and the statistics of a norm. Constants that differ between the
programs (the number of entries that a mean divides by) go linearly from one to the other.

One product stays one product, of the size that it has in the merged network, and α multiplies one
of its operands. To run old and new entries in products of their own would keep old outputs to the
bit, as the order in which XLA adds up depends on shapes; but then a step has twice the products,
and takes about twice as long to compile.

Nothing here knows about parameters; see `_gate` for how they are put in order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence.growth import _values
from optax_cadence.growth._values import Value
from optax_cadence.programs import reading


class Evaluator:
  """Evaluates a pair of programs.

  Attributes:
    alpha: The gate: scalar array.
    counts: Whether the program may count along an axis that grows: whether it is known that new
      entries lie behind all old ones there.
    mixes: How often old and new have met so far.
    apart: How often operations had to be run on old entries and on new ones apart.
    made: What was computed of the gate before and may be used again, by what it was computed of.
  """

  def __init__(self, alpha: Any, counts: bool = True):
    self.alpha = alpha
    self.counts = counts
    self.mixes = 0
    self.apart = 0
    self.made: dict[Any, Any] = {}

  def run(self, programs: Sequence[Any], inputs: list[Value]) -> list[Value]:
    """The outputs of the programs, at the old size and at the new one.

    Raises:
      ValueError: If the programs do not have the same operations.
    """
    try:
      return reading.walk(programs, inputs, self._operation, self._constant, dead=False)
    except reading.DifferentProgramsError as error:
      raise ValueError(
        f"the programs before and after must have the same operations, found {error}; change one"
        " thing at a time: merge the gate of one growth before the next"
      ) from error

  def _constant(self, numbers: tuple[Any, ...]) -> Value:
    """A constant, between that of the old program and that of the new one."""
    old, new = numbers
    if np.size(old) == np.size(new) == 0:
      return _values.empty(old, new)
    if np.shape(old) != np.shape(new):
      raise ValueError(
        f"a constant of the program grows from shape {np.shape(old)} to {np.shape(new)}: pass it"
        " among the variables, so that the plan can say which of its entries are new"
      )
    if _equal(old, new):
      return Value(old)
    return self._between(old, new)

  def _between(self, old: Any, new: Any) -> Value:
    """What is one number in the old program and another in the new one."""
    dtype = jnp.result_type(old)
    if not jnp.issubdtype(dtype, jnp.floating):
      return Value(old, new=new)
    self.mixes += 1
    if isinstance(old, jax.core.Tracer) or isinstance(new, jax.core.Tracer) or np.ndim(old):
      key: Any = id(old), id(new)
    else:
      key = float(old), float(new), dtype

    def between() -> Value:
      a, b = jnp.asarray(old, dtype), jnp.asarray(new, dtype)
      return Value(a + self.alpha.astype(dtype) * (b - a))

    return self._made_once(key, (old, new), between)

  def _made_once(self, key: Any, of: Any, make: Callable[[], Any]) -> Any:
    """What `make` returns; computed once, where several operations read it.

    A key may hold the id of an array, `of`, which is kept, and so is its id.
    """
    if key not in self.made:
      self.made[key] = of, make()
    return self.made[key][1]

  def _of_two(self, old: Any, new: Any, operands: list[Value]) -> list[Value]:
    """An operation on integers that are not the same in both programs, such as sizes.

    There is nothing between two integers. But what is computed of them may be the same again, as
    an index counted from either end is, or a number of another kind.
    """
    if any(x.old for x in operands) or not _same(old, new):
      found = next(x.old_and_new for x in operands if x.new is not None)
      raise ValueError(
        f"{old.primitive.name} goes by an integer that is {found[0]} in the program before and"
        f" {found[1]} in the one after: expected one for both, as there is none between them"
      )
    before, after = zip(*(x.old_and_new for x in operands), strict=True)
    results = zip(_folded(old, before), _folded(new, after), strict=True)
    return [Value(a) if _equal(a, b) else self._between(a, b) for a, b in results]

  def _operation(self, eqns: reading.Eqns, operands: list[Value]) -> list[Value]:
    old, new = eqns
    name = old.primitive.name
    inner = reading.called(old), reading.called(new)
    opens = inner[0] is not None and not name.startswith(("custom_", "remat", "checkpoint"))
    if any(x.new is not None for x in operands):
      if not opens:
        return self._of_two(old, new, operands)
    elif not any(x.old for x in operands) and _same(old, new):
      return [Value(y) for y in _folded(old, _arrays(operands))]
    special = {"cond": self._cond, "scan": self._scan, "while": self._while}
    if name in special:
      return special[name](old, new, operands)
    if name == "custom_linear_solve":
      (before, taken), (after, _) = reading.solver(old), reading.solver(new)
      return self._custom(eqns, (before, after), operands, [operands[i] for i in taken])
    if inner[0] is None or inner[1] is None:
      return self._single(old, new, operands)
    if name.startswith("custom_"):
      return self._custom(eqns, inner, operands, operands)
    if name.startswith(("remat", "checkpoint")):
      body = _Body(self, inner, operands)
      options = {name: new.params[name] for name in ("policy", "prevent_cse")}
      return body.results(jax.checkpoint(body, **options)(_arrays(operands)))
    return self.run(inner, operands)

  def _single(self, old: Any, new: Any, operands: list[Value]) -> list[Value]:
    """An operation without programs inside."""
    if _values.pads_for_taps(old, new, operands):
      return [_values.padded(old, new, *operands)]
    if any(x.offset for x in operands):
      if old.primitive.name != "conv_general_dilated":
        return [_values.passed(old, new, operands)]
      _values.check_taps(old, new, *operands)
    if old.primitive.name == "iota" and not self.counts:
      raise ValueError(
        "the program counts along an axis that grows (iota), which it must not unless it is known"
        " where new entries lie there: expected inputs when the units were described"
      )
    axes = _values.Axes(old, new, operands)
    if axes.apart:
      self.apart += 1
      results = _values.run_apart(old, new, axes, operands)
    elif not axes.summed and not any(x.offset for x in operands):
      results = _values.bind(old, new, operands, _arrays(operands))
    else:
      self.mixes += 1
      if old.primitive.name in _values.EXTREMA:
        results = [_values.extremum(old, new, axes, operands[0], self.alpha)]
      else:
        results = self._sum(old, new, axes, operands)
    return _grown(old, new, results)

  def _sum(self, old: Any, new: Any, axes: _values.Axes, operands: list[Value]) -> list[Any]:
    """A sum or product, with the gate on what comes from new entries and goes to old ones.

    The gate multiplies one operand, each entry by 1 or by α, which tells by itself where a term
    comes from and where it goes; the smaller one, if either can.
    """
    arrays = _arrays(operands)
    factors = [1] if operands[-1].offset else range(min(2, len(operands)))  # taps are the kernel's
    telling = [i for i in factors if axes.holds_kept(i)]
    if telling:
      i = min(telling, key=lambda i: arrays[i].size)
      arrays[i] = self._scaled(old, axes, operands, i, axes.kept)
      return _values.bind(old, new, operands, arrays)
    (ungated,) = _values.bind(old, new, operands, arrays)
    arrays[1] = self._scaled(old, axes, operands, 1, [])
    (gated,) = _values.bind(old, new, operands, arrays)
    return [_values.where_new(old, new, ungated, gated)]

  def _scaled(
    self, old: Any, axes: _values.Axes, operands: list[Value], i: int, kept: Sequence[int]
  ) -> Any:
    """An operand with the gate on its entries that are summed over, and new along no kept axis."""
    x, shape = operands[i], operands[i].array.shape
    summed = {a: range(x.old[a]) for a in sorted(axes.along(i, axes.summed))}
    if x.offset:
      summed |= _values.old_taps(old, x.offset)
    ungated = {a: range(x.old[a]) for a in sorted(axes.along(i, kept))}
    exact = jnp.issubdtype(x.array.dtype, jnp.inexact)
    dtype = jnp.promote_types(x.array.dtype, self.alpha.dtype) if exact else x.array.dtype
    sizes = tuple(n if a in summed or a in ungated else 1 for a, n in enumerate(shape))
    which = sizes, tuple(summed.items()), tuple(ungated.items()), dtype

    def gate() -> Any:
      is_new = _values.new_entries(shape, summed)
      if ungated:
        is_new &= ~_values.new_entries(shape, ungated)
      return jnp.where(is_new, self.alpha.astype(dtype), jnp.ones((), dtype))

    factor = self._made_once(which, None, gate)
    return self._made_once(
      (id(x.array), which), x.array, lambda: (x.array.astype(dtype) * factor).astype(x.array.dtype)
    )

  def _custom(
    self, eqns: reading.Eqns, inner: Any, operands: list[Value], taken: list[Value]
  ) -> list[Value]:
    """A function with a derivative of its own, in which old and new entries must not meet.

    `inner` are the programs of the function, of the operands in `taken`.
    """
    (old, new), name = eqns, eqns[0].primitive.name
    if any(x.offset for x in operands):
      raise ValueError(f"a kernel whose taps grow goes through {name}")
    inside = Evaluator(self.alpha, self.counts)
    jax.eval_shape(_Body(inside, inner, taken), _arrays(taken))
    if not inside.mixes and not inside.apart:
      return _grown(old, new, reading.bind(new, _arrays(operands)))
    if reading.has_true_derivative(old):
      return self.run(inner, operands)
    does = "combines" if inside.mixes else "rearranges"
    raise ValueError(
      f"{name} {old.params.get('name', '')} {does} old and new entries, and its own derivative"
      " would be lost; widen another axis, or leave out the custom derivative"
    )

  def _cond(self, old: Any, new: Any, operands: list[Value]) -> list[Value]:
    index, rest = operands[0].array, operands[1:]
    pairs = zip(old.params["branches"], new.params["branches"], strict=True)
    branches = [_Body(self, pair, rest) for pair in pairs]
    return branches[-1].results(jax.lax.switch(index, branches, _arrays(rest)))

  def _while(self, old: Any, new: Any, operands: list[Value]) -> list[Value]:
    of_condition, of_body, carry = reading.while_operands(old, operands)
    condition, step = (
      _Body(self, (old.params[which], new.params[which]), carry)
      for which in ("cond_jaxpr", "body_jaxpr")
    )
    results = jax.lax.while_loop(
      lambda arrays: condition(arrays, of_condition)[0],
      lambda arrays: step(arrays, of_body),
      _arrays(carry),
    )
    return step.results(results)

  def _scan(self, old: Any, new: Any, operands: list[Value]) -> list[Value]:
    consts, carried, scanned = reading.scan_operands(old, operands)
    slices, n = [_moved(x, -1) for x in scanned], len(carried)
    body = _Body(self, (old.params["jaxpr"], new.params["jaxpr"]), [*carried, *slices])

    def step(carry: Any, xs: Any) -> Any:
      outputs = body([*carry, *xs], consts)
      return outputs[:n], outputs[n:]

    settings = {name: old.params[name] for name in ("length", "reverse", "unroll")}
    carry, stacked = jax.lax.scan(step, _arrays(carried), _arrays(scanned), **settings)
    results = body.results([*carry, *stacked])
    return results[:n] + [_moved(y, 1) for y in results[n:]]


def _grown(old: Any, new: Any, results: Sequence[Any]) -> list[Value]:
  """The results of an operation, old entries before new ones."""
  pairs = zip(old.outvars, new.outvars, strict=True)
  return [Value(y, _values.grown_axes(*pair)) for y, pair in zip(results, pairs, strict=True)]


def _arrays(values: list[Value]) -> list[Any]:
  """The arrays of values, as transformations of JAX take them."""
  return [x.array for x in values]


def _with_arrays(values: list[Value], arrays: Sequence[Any]) -> list[Value]:
  """The values with other arrays."""
  return [x._replace(array=y) for x, y in zip(values, arrays, strict=True)]


class _Body:
  """A pair of programs as a function of arrays, for `jax.checkpoint`, `scan` and `switch`."""

  def __init__(self, evaluator: Evaluator, programs: Any, inputs: list[Value]):
    self.evaluator, self.programs, self.inputs = evaluator, programs, inputs
    self.outputs: list[Value] = []

  def __call__(self, arrays: Any, constants: Any = ()) -> Any:
    inputs = [*constants, *_with_arrays(self.inputs, arrays)]
    # What was computed outside may be used inside, but not the other way round.
    outside, self.evaluator.made = self.evaluator.made, dict(self.evaluator.made)
    outputs = self.evaluator.run(self.programs, inputs)
    self.evaluator.made = outside
    # Without the arrays, which are of the transformation's own tracing.
    self.outputs = [x._replace(array=None) for x in outputs]
    return _arrays(outputs)

  def results(self, arrays: Any) -> list[Value]:
    """What it returned."""
    return _with_arrays(self.outputs, arrays)


def _moved(x: Value, by: int) -> Value:
  """A value that a scan reads or writes slice by slice, and a slice of it: other axes."""
  if by < 0 and 0 in x.old:
    raise ValueError("the axis that a loop runs over cannot grow: expected its length to stay")
  return x._replace(old={a + by: n for a, n in x.old.items()})


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
