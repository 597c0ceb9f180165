"""Reads a traced program (a jaxpr): its constants, literals, calls and loops, and runs its parts.

All that differs between versions of JAX is handled here. Literals, programs and the like are known
by their attributes, since importing their classes would take longer than all the rest.
What an operation does to the axes of its operands is in `primitives`.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from optax_cadence import _sharding

# An operation, as it stands in each of the programs that are walked side by side.
Eqns = tuple[Any, ...]


class DifferentProgramsError(ValueError):
  """Raised where programs that are walked side by side do not have the same operations."""


class Part(NamedTuple):
  """A part of a program, in the fields of a jaxpr: see `part`."""

  constvars: list[Any]
  invars: list[Any]
  eqns: list[Any]
  outvars: list[Any]
  consts: list[Any]


def opened(program: Any) -> tuple[Any, list[Any]]:
  """The jaxpr of a program, and the arrays of its constants; a plain jaxpr has none."""
  if isinstance(program, Part):
    return program, program.consts
  if hasattr(program, "consts"):
    return program.jaxpr, list(program.consts)
  return program, []


def trace(fn: Callable[..., Any], params: Any, *args: Any) -> Any:
  """The program of `fn(params, *args)`: its first arguments are the leaves of `params`."""
  leaves, structure = jax.tree.flatten(params)

  def flat(leaves: list[Any], args: tuple[Any, ...]) -> list[Any]:
    outputs = jax.tree.leaves(fn(jax.tree.unflatten(structure, leaves), *args))
    return [output for output in outputs if hasattr(output, "aval")]

  return jax.make_jaxpr(flat)(leaves, args)


def shape(var: Any) -> tuple[int, ...]:
  """Shape of a variable or literal."""
  return tuple(getattr(var.aval, "shape", ()))


def is_literal(var: Any) -> bool:
  """Whether an operand is a number written into the program."""
  return hasattr(var, "val")


def literal(var: Any) -> Any:
  """The number that a literal stands for, in the literal's dtype."""
  return np.asarray(var.val, var.aval.dtype) if np.isscalar(var.val) else var.val


def bodies(eqn: Any) -> list[Any]:
  """The programs inside an operation, whatever its parameters are called."""
  programs = []
  for value in eqn.params.values():
    items = value if isinstance(value, (tuple, list)) else [value]
    programs += [v for v in items if hasattr(v, "eqns")]
  return programs


def primitive_names(program: Any) -> set[str]:
  """The names of all operations of a program; of those with programs inside, the ones in these."""
  names = set()
  for eqn in opened(program)[0].eqns:
    inside = bodies(eqn)
    names |= set().union(*map(primitive_names, inside)) if inside else {eqn.primitive.name}
  return names


def called(eqn: Any) -> Any | None:
  """The program inside an operation that only calls it, as `jit`, `remat` and `custom_jvp_call` do.

  It has the operands of the operation as arguments, and its results. None for other operations.
  """
  if eqn.primitive.name in ("cond", "custom_linear_solve", "scan", "while"):
    return None
  programs = bodies(eqn)
  if not programs:
    return None
  body, _ = opened(programs[0])
  # The program inside a `reduce` is none: it combines two entries, so its arguments are scalars.
  axes, outside = ([len(shape(v)) for v in variables] for variables in (body.invars, eqn.invars))
  return programs[0] if axes == outside and len(body.outvars) == len(eqn.outvars) else None


def has_true_derivative(eqn: Any) -> bool:
  """Whether the custom derivative of a function is the same as that of the program inside.

  It is for JAX's softmax, which defines one only to save memory; of others it is not known.
  """
  inner = called(eqn)
  info = None if inner is None else getattr(opened(inner)[0], "debug_info", None)
  return getattr(info, "func_name", "") == "_softmax"


def scan_operands(eqn: Any, operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
  """The operands of a scan: its constants, what is carried, and what is scanned over.

  Or whatever stands for each of them. They are known by their shapes, as the parameters that hold
  their numbers differ between JAX versions.
  """
  body, _ = opened(eqn.params["jaxpr"])

  def stacked(outside: list[Any], inside: list[Any]) -> int:
    return sum(len(shape(o)) != len(shape(i)) for o, i in zip(outside, inside, strict=True))

  end = len(eqn.invars) - stacked(eqn.invars, body.invars)
  start = end - (len(eqn.outvars) - stacked(eqn.outvars, body.outvars))
  return list(operands[:start]), list(operands[start:end]), list(operands[end:])


def while_operands(eqn: Any, operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
  """The operands of a `while`: constants of its condition, those of its body, what is carried."""
  start = eqn.params["cond_nconsts"]
  end = start + eqn.params["body_nconsts"]
  return list(operands[:start]), list(operands[start:end]), list(operands[end:])


def solver(eqn: Any) -> tuple[Any, list[int]]:
  """The program by which a `custom_linear_solve` solves, and which of its operands that takes."""
  lengths = eqn.params["const_lengths"]
  before = lengths.matvec + lengths.vecmat
  right_sides = range(sum(lengths), len(eqn.invars))
  return eqn.params["jaxprs"].solve, [*range(before, before + lengths.solve), *right_sides]


def branch_results(
  eqn: Any, inputs: Sequence[Any], run: Callable[[Any, list[Any]], Sequence[Any]]
) -> list[tuple[Any, ...]]:
  """For each result of a `cond`, its value in every branch; `run(program, inputs)` runs one."""
  return list(zip(*(run(b, list(inputs[1:])) for b in eqn.params["branches"]), strict=True))


def bind(eqn: Any, operands: Sequence[Any], **changed: Any) -> list[Any]:
  """Runs an operation on other operands, some of its parameters changed.

  In `jax.shard_map` the operands may vary over other axes than those it was traced with.
  """
  operands = _sharding.varying(list(operands), _sharding.axes_of(operands))
  params = eqn.primitive.get_bind_params({**eqn.params, **changed})
  # JAX before 0.10 keeps functions apart, as first operands.
  functions, params = ((), params) if isinstance(params, dict) else params
  with eqn.ctx.manager:
    results = eqn.primitive.bind(*functions, *operands, **params)
  return list(results) if eqn.primitive.multiple_results else [results]


def walk(
  programs: Sequence[Any],
  inputs: Sequence[Any],
  operation: Callable[[Eqns, list[Any]], Sequence[Any]],
  constant: Callable[[tuple[Any, ...]], Any],
  unknown: Any = None,
  dead: bool = True,
) -> list[Any]:
  """Interprets a program, or several with the same operations side by side, on values of any kind.

  The reader decides what a value is: a depth in the network, which leaves it is made of, an array.

  Args:
    programs: The programs; most readers have one.
    inputs: A value for each argument, one for all programs together.
    operation: `operation(eqns, operands) -> results`: the values of the results of an operation,
      which `eqns` has of each program. It is told of calls and loops as of any other operation.
    constant: `constant(numbers) -> value`: from a constant or literal, which each program has one
      of, its value.
    unknown: The value of arguments that a part of a program leaves out; None if there are none.
    dead: Whether operations are read that no result needs. If not, a result of size 0 counts as a
      constant.

  Returns:
    The values of the results.

  Raises:
    DifferentProgramsError: If the programs do not have the same operations on the same operands.
  """
  jaxprs, consts = zip(*map(opened, programs), strict=True)
  check_same_operations(jaxprs)
  values = {}
  for variables, numbers in zip(
    _columns(jaxprs, "constvars"), zip(*consts, strict=True), strict=True
  ):
    values[variables] = constant(numbers)
  values.update(zip(_columns(jaxprs, "invars"), inputs, strict=True))

  def read(atoms: tuple[Any, ...]) -> Any:
    if all(map(is_literal, atoms)):
      return constant(tuple(map(literal, atoms)))
    if atoms in values:
      return values[atoms]
    if unknown is None:
      raise DifferentProgramsError("an operand that differs")
    return unknown

  needed = None if dead else _needed(jaxprs[0])
  for i, eqns in enumerate(_columns(jaxprs, "eqns")):
    if needed is not None and i not in needed:
      continue
    results = _columns(eqns, "outvars")
    if needed is not None and all(map(is_empty, eqns)):
      values.update((atoms, constant(tuple(map(_empty, atoms)))) for atoms in results)
      continue
    operands = [read(atoms) for atoms in _columns(eqns, "invars")]
    values.update(zip(results, operation(eqns, operands), strict=True))
  return [read(atoms) for atoms in _columns(jaxprs, "outvars")]


class Reader(abc.ABC):
  """Reads a program with all that is inside its operations, on values of any kind.

  Calls, branches and loops are read here. A subclass says what is known of the rest: what a value
  is, and what is to be found on the way, is its affair.
  """

  def run(self, program: Any, inputs: Sequence[Any]) -> list[Any]:
    """The values of the results of a program."""
    return walk([program], inputs, self._read, self.constant)

  @abc.abstractmethod
  def constant(self, numbers: tuple[Any, ...]) -> Any:
    """The value of a constant or literal, of which `numbers` has one."""

  @abc.abstractmethod
  def operation(self, eqn: Any, inputs: list[Any]) -> list[Any]:
    """The values of the results of an operation without a program inside."""

  @abc.abstractmethod
  def joined(self, values: Sequence[Any]) -> Any:
    """The value of a result that is one of these, depending on the branch."""

  @abc.abstractmethod
  def loop(self, step: Callable[[list[Any]], list[Any]], carry: list[Any]) -> list[Any]:
    """The results of a loop; those of `step`, one iteration, begin with the next carry."""

  def sliced(self, value: Any) -> Any:
    """What is known of an entry along axis 0."""
    return value

  def stacked(self, value: Any) -> Any:
    """What is known of such values stacked on a new axis 0."""
    return value

  def _read(self, eqns: Eqns, inputs: list[Any]) -> list[Any]:
    (eqn,) = eqns
    name, inner = eqn.primitive.name, called(eqn)
    if inner is not None:
      return self.run(inner, inputs)
    if name == "cond":
      return list(map(self.joined, branch_results(eqn, inputs, self.run)))
    if name == "scan":
      return self._scan(eqn, inputs)
    if name == "while":
      return self._while(eqn, inputs)
    return self.operation(eqn, inputs)

  def _scan(self, eqn: Any, inputs: list[Any]) -> list[Any]:
    consts, carried, xs = scan_operands(eqn, inputs)
    slices, n = list(map(self.sliced, xs)), len(carried)

    def step(carry: list[Any]) -> list[Any]:
      return self.run(eqn.params["jaxpr"], consts + carry + slices)

    outputs = self.loop(step, carried)
    return outputs[:n] + list(map(self.stacked, outputs[n:]))

  def _while(self, eqn: Any, inputs: list[Any]) -> list[Any]:
    of_condition, of_body, carried = while_operands(eqn, inputs)

    def step(carry: list[Any]) -> list[Any]:
      self.run(eqn.params["cond_jaxpr"], of_condition + carry)
      return self.run(eqn.params["body_jaxpr"], of_body + carry)

    return self.loop(step, carried)


def check_same_operations(jaxprs: Sequence[Any]) -> None:
  """Raises `DifferentProgramsError` unless all have the same operations in the same order."""
  first = jaxprs[0]
  names = [(eqn.primitive.name, len(eqn.invars)) for eqn in first.eqns]
  for other in jaxprs[1:]:
    others = [(eqn.primitive.name, len(eqn.invars)) for eqn in other.eqns]
    for a, b in zip(names, others, strict=False):
      if a != b:
        raise DifferentProgramsError(f"{a[0]} and {b[0]}")
    for what, field in (("operations", "eqns"), ("constants", "constvars"), ("results", "outvars")):
      counts = len(getattr(first, field)), len(getattr(other, field))
      if counts[0] != counts[1]:
        raise DifferentProgramsError(f"{counts[0]} and {counts[1]} {what}")


def _needed(jaxpr: Any) -> set[int]:
  """Positions of the operations that results need, or that have effects."""
  used = {v for v in jaxpr.outvars if not is_literal(v)}
  needed = set()
  for i, eqn in reversed(list(enumerate(jaxpr.eqns))):
    if getattr(eqn, "effects", None) or not used.isdisjoint(eqn.outvars):
      needed.add(i)
      if not is_empty(eqn):
        used.update(v for v in eqn.invars if not is_literal(v))
  return needed


def is_empty(eqn: Any) -> bool:
  """Whether the results of an operation are arrays of numbers, and have no entries."""
  numbers = all(hasattr(getattr(v.aval, "dtype", None), "itemsize") for v in eqn.outvars)
  return numbers and not eqn.effects and all(0 in shape(v) for v in eqn.outvars)


def _empty(var: Any) -> Any:
  return np.zeros(shape(var), var.aval.dtype)


def _columns(items: Sequence[Any], field: str) -> list[tuple[Any, ...]]:
  """A list that all items have as a field, transposed: for each place, what each item has there."""
  return list(zip(*(getattr(item, field) for item in items), strict=True))


def hoisted(program: Any) -> tuple[Any, list[Any]]:
  """The program with its constants as its first arguments; and the constants."""
  jaxpr, consts = opened(program)

  def run(consts: list[Any], inputs: Sequence[Any]) -> list[Any]:
    return jax.core.eval_jaxpr(jaxpr, consts, *inputs)

  return jax.make_jaxpr(run)(consts, program.in_avals), consts


def traced(fn: Callable[..., Any], *args: Any) -> Any:
  """The program of a function of trees of arrays: calls inlined, branches replaced by selects.

  Functions with a custom derivative are left as they are.
  """
  program = jax.make_jaxpr(fn)(*args)
  return jax.make_jaxpr(lambda *flat: _flat(program, flat))(*program.in_avals)


def _flat(program: Any, inputs: Sequence[Any]) -> list[Any]:
  """Runs a program; see `traced`."""

  def operation(eqns: Eqns, operands: list[Any]) -> list[Any]:
    (eqn,) = eqns
    if eqn.primitive.name == "cond":
      results = branch_results(eqn, operands, _flat)
      return [jax.lax.select_n(operands[0], *values) for values in results]
    inner = None if eqn.primitive.name.startswith("custom_") else called(eqn)
    return bind(eqn, operands) if inner is None else _flat(inner, operands)

  return walk([program], inputs, operation, lambda numbers: numbers[0])


def part(program: Any, arguments: Sequence[int], results: Sequence[int]) -> Part:
  """The part of a program that some of its results need, as a program of some of its arguments.

  Args:
    program: The program.
    arguments: Positions of the arguments that the part takes, in their new order. What it needs of
      the others is unknown to it: see `walk`.
    results: Positions of its results.
  """
  jaxpr, consts = opened(program)
  outvars = [jaxpr.outvars[i] for i in results]
  needed, eqns = {v for v in outvars if not is_literal(v)}, []
  for eqn in reversed(jaxpr.eqns):
    if needed.intersection(eqn.outvars):
      needed.update(v for v in eqn.invars if not is_literal(v))
      eqns.append(eqn)
  kept = [(v, x) for v, x in zip(jaxpr.constvars, consts, strict=True) if v in needed]
  return Part(
    [v for v, _ in kept],
    [jaxpr.invars[i] for i in arguments],
    eqns[::-1],
    outvars,
    [x for _, x in kept],
  )
