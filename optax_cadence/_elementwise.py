"""Runs a computation on an array whose entries belong to several groups, if it is elementwise.

Whether it is, is read off its jaxpr: an entry of a result may depend on the same entry of the
array and on numbers of its group (a counter, a bias correction), and on nothing else. There is
a jaxpr for each group, of the vector of its entries; they are evaluated together, on the array
as it is, and a number of a group is looked up for each entry where it meets one. Which arrays
and groups these are is told in `_shared`.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.extend.core import Literal

from optax_cadence import _control

_NAMES = """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp complex conj
convert_element_type copy copy_p cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag
integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not or pow real rem
round rsqrt select_n sign sin sinh sqrt square sub tan tanh xor"""
_ELEMENTWISE = frozenset(_NAMES.split())
# Operations that stand for another jaxpr, and where they have it.
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr"}


class NotElementwiseError(ValueError):
  """Raised where entries cannot be computed one by one; says what operation is in the way."""


class Lanes(NamedTuple):
  """A value that each group has one of.

  Attributes:
    values: One for each group.
    spread: Whether it stands for an array of entries that are all equal to it.
  """

  values: tuple[Any, ...]
  spread: bool = False


class Coupled(NamedTuple):
  """A value that depends on the entries otherwise than one by one, and the operation it is by."""

  by: str


class Elsewhere:
  """A value that other tensors have a part in, and this array has not."""


Value: TypeAlias = jax.Array | Lanes | Coupled | Elsewhere
LookUp: TypeAlias = Callable[[Sequence[Any]], jax.Array]
# A position in the jaxpr of each group.
At: TypeAlias = tuple[int, ...]


def trace(fn: Callable[..., Any], *args: Any) -> Any:
  """The closed jaxpr of a function, in which calls of compiled functions are inlined."""
  closed = jax.make_jaxpr(fn)(*args)
  return jax.make_jaxpr(functools.partial(_inlined, closed))(*closed.in_avals)


def _inlined(closed: Any, *args: Any) -> list[Any]:
  jaxpr = closed.jaxpr
  values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True))

  def read(atom: Any) -> Any:
    return _number(atom) if isinstance(atom, Literal) else values[atom]

  for eqn in jaxpr.eqns:
    operands = [read(atom) for atom in eqn.invars]
    called = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
    found = _inlined(called, *operands) if called else _control.evaluate(jaxpr, eqn, operands)
    values.update(zip(eqn.outvars, found, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _number(literal: Any) -> np.ndarray:
  return np.asarray(literal.val, literal.aval.dtype)


def run(
  jaxprs: Sequence[Any],
  inputs: Sequence[tuple[At, Value]],
  wanted: Sequence[At],
  look_up: LookUp,
) -> list[Value]:
  """Evaluates the jaxprs of the same computation, as `trace` gives them, one for each group.

  Args:
    jaxprs: In each, the array is a vector of the entries of its group.
    inputs: Where an argument stands in each jaxpr, and its value; the others are `Elsewhere`.
    wanted: Where a result stands in each; what none of them needs is not computed.
    look_up: From a scalar of each group, the array with every entry's own.

  Returns:
    The value of each of these results.

  Raises:
    NotElementwiseError: If the jaxprs differ in more than lengths and numbers.
  """
  opened = [j.jaxpr for j in jaxprs]
  values: dict[At, Value] = {_vars(opened, "invars", at): x for at, x in inputs}
  consts = zip(*(j.consts for j in jaxprs), strict=True)
  values |= {_vars(opened, "constvars", i): Lanes(x) for i, x in enumerate(consts)}
  needed = [_needed(j, [at[g] for at in wanted]) for g, j in enumerate(opened)]
  for eqns in itertools.zip_longest(*needed):
    if len({e and (e.primitive, len(e.invars)) for e in eqns}) > 1:
      raise NotElementwiseError("an operation that differs from group to group")
    operands = [_read(values, atoms) for atoms in zip(*(e.invars for e in eqns), strict=True)]
    outs = zip(*(e.outvars for e in eqns), strict=True)
    values.update(zip(outs, _apply(opened, eqns, operands, look_up), strict=True))
  return [_read(values, _vars(opened, "outvars", at)) for at in wanted]


def _vars(jaxprs: Sequence[Any], which: str, at: At | int) -> tuple[Any, ...]:
  """The variable that stands at this position of each jaxpr."""
  positions = (at,) * len(jaxprs) if isinstance(at, int) else at
  return tuple(getattr(j, which)[i] for j, i in zip(jaxprs, positions, strict=True))


def _read(values: dict[Any, Value], atoms: tuple[Any, ...]) -> Value:
  if all(isinstance(a, Literal) for a in atoms):
    return Lanes(tuple(map(_number, atoms)))
  return values.get(atoms, Elsewhere())


def _needed(jaxpr: Any, wanted: Sequence[int]) -> list[Any]:
  """The operations that these results depend on, in order."""
  needed, found = {v for i in wanted if not isinstance(v := jaxpr.outvars[i], Literal)}, []
  for eqn in reversed(jaxpr.eqns):
    if needed.intersection(eqn.outvars):
      needed.update(v for v in eqn.invars if not isinstance(v, Literal))
      found.append(eqn)
  return found[::-1]


def _apply(
  jaxprs: Sequence[Any], eqns: Sequence[Any], operands: list[Value], look_up: LookUp
) -> list[Value]:
  """The results of one operation."""
  eqn, name, n = eqns[0], eqns[0].primitive.name, len(eqns[0].outvars)
  coupled: list[Value] = [x for x in operands if isinstance(x, Coupled)]
  if coupled:
    return coupled[:1] * n
  touched = any(isinstance(x, jax.Array) for x in operands)
  elsewhere = any(isinstance(x, Elsewhere) for x in operands)
  lanes = [x for x in operands if isinstance(x, Lanes)]
  if not (touched or elsewhere or any(x.spread for x in lanes)):
    if name == "broadcast_in_dim" and _is_scalar(lanes[0]):
      return [Lanes(lanes[0].values, spread=True)]
    groups = zip(jaxprs, eqns, *(x.values for x in lanes), strict=True)
    found = [_control.evaluate(jaxpr, eqn, numbers) for jaxpr, eqn, *numbers in groups]
    return [Lanes(values) for values in zip(*found, strict=True)]
  if elsewhere:
    return [Coupled(name) if touched else Elsewhere()] * n
  same = all(e.params == eqn.params for e in eqns)
  if name not in _ELEMENTWISE or not same or not all(map(_is_scalar, lanes)):
    return [Coupled(name)] * n
  if touched:
    arrays = [look_up(x.values) if isinstance(x, Lanes) else x for x in operands]
    return [eqn.primitive.bind(*arrays, **eqn.params)]
  numbers = zip(*(x.values for x in lanes), strict=True)
  return [Lanes(tuple(eqn.primitive.bind(*x, **eqn.params) for x in numbers), spread=True)]


def _is_scalar(x: Value) -> bool:
  return isinstance(x, Lanes) and all(np.ndim(value) == 0 for value in x.values)


def provable(prove: Callable[..., None], *args: Any) -> bool:
  """Whether `prove(*args)` finds no operation in the way."""
  try:
    prove(*args)
  except NotElementwiseError:
    return False
  return True


def alike(one: Any, other: Any) -> bool:
  """Whether two jaxprs, as `trace` gives them, are the same but for the shapes of arrays."""
  pairs = dict(zip(one.jaxpr.invars, other.jaxpr.invars, strict=True))
  consts = zip(one.jaxpr.constvars, other.jaxpr.constvars, one.consts, other.consts, strict=False)
  pairs |= {v: w for v, w, x, y in consts if x is y}

  def match(a: Any, b: Any) -> bool:
    if isinstance(a, Literal) and isinstance(b, Literal):
      numbers = _number(a), _number(b)
      return numbers[0].dtype == numbers[1].dtype and np.array_equal(*numbers)
    return not isinstance(a, Literal) and a in pairs and pairs[a] is b

  def params(eqn: Any) -> dict[str, Any]:
    shape = ("shape", "broadcast_dimensions") if eqn.primitive.name == "broadcast_in_dim" else ()
    return {name: x for name, x in eqn.params.items() if name not in shape}

  for e, f in itertools.zip_longest(one.jaxpr.eqns, other.jaxpr.eqns):
    if e is None or f is None or e.primitive != f.primitive or params(e) != params(f):
      return False
    if not all(itertools.starmap(match, itertools.zip_longest(e.invars, f.invars))):
      return False
    pairs |= zip(e.outvars, f.outvars, strict=True)
  return all(itertools.starmap(match, zip(one.jaxpr.outvars, other.jaxpr.outvars, strict=True)))


def array(x: Value, look_up: LookUp) -> jax.Array:
  """A result for every entry.

  Raises:
    NotElementwiseError: If it is not one of these entries alone.
  """
  if isinstance(x, Coupled):
    raise NotElementwiseError(x.by)
  if isinstance(x, Elsewhere):
    raise NotElementwiseError("a result of other tensors")
  return look_up(x.values) if isinstance(x, Lanes) else x
