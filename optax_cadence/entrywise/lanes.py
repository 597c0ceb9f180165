"""Runs the programs of several groups at once on an array that has entries of each.

A *lane* is a group. An entry of a result may depend on the same entry of the array and on numbers
of its group (a counter, a bias correction), and on nothing else: then there is one pass over the
array, and where a number of a group meets an entry, it is looked up for every entry. Whatever
depends on entries otherwise is `Coupled`, and says by which operation.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from optax_cadence.programs import primitives
from optax_cadence.programs import reading


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
# From a scalar of each group, the array with every entry's own.
LookUp: TypeAlias = Callable[[Sequence[Any]], jax.Array]


def run(programs: Sequence[Any], inputs: Sequence[Value], look_up: LookUp) -> list[Value]:
  """Runs programs of the same computation, one for each group.

  Args:
    programs: In each, the array is the entries of its group. They have no calls, and may be
      parts: what those leave out is `Elsewhere`.
    inputs: The value of each argument.
    look_up: From a scalar of each group, the array with every entry's own.

  Returns:
    The value of each result.

  Raises:
    DifferentProgramsError: If the programs differ in more than lengths and numbers.
  """
  return reading.walk(
    programs,
    inputs,
    lambda eqns, operands: _operation(eqns, operands, look_up),
    Lanes,
    unknown=Elsewhere(),
  )


def _operation(eqns: reading.Eqns, operands: list[Value], look_up: LookUp) -> list[Value]:
  """The results of one operation."""
  eqn, name, n = eqns[0], eqns[0].primitive.name, len(eqns[0].outvars)
  for x in operands:
    if isinstance(x, Coupled):
      return [x] * n
  lanes = [x for x in operands if isinstance(x, Lanes)]
  touched = any(isinstance(x, jax.Array) for x in operands)
  if any(isinstance(x, Elsewhere) for x in operands):
    return [Coupled(name) if touched else Elsewhere()] * n
  if not (touched or any(x.spread for x in lanes)):
    return _numbers(eqns, lanes)
  same = all(e.params == eqn.params for e in eqns)
  if name not in primitives.ELEMENTWISE or not same or not all(map(_is_scalar, lanes)):
    return [Coupled(name)] * n
  if touched:
    return reading.bind(eqn, [look_up(x.values) if isinstance(x, Lanes) else x for x in operands])
  groups = zip(*(x.values for x in lanes), strict=True)
  results = [reading.bind(eqn, numbers) for numbers in groups]
  return [Lanes(column, spread=True) for column in zip(*results, strict=True)]


def _numbers(eqns: reading.Eqns, lanes: list[Lanes]) -> list[Value]:
  """The results of an operation on numbers of the groups, computed for each group by itself."""
  if eqns[0].primitive.name == "broadcast_in_dim" and _is_scalar(lanes[0]):
    return [Lanes(lanes[0].values, spread=True)]
  values = [[x.values[i] for x in lanes] for i in range(len(eqns))]
  results = [reading.bind(eqn, numbers) for eqn, numbers in zip(eqns, values, strict=True)]
  return [Lanes(column) for column in zip(*results, strict=True)]


def _is_scalar(x: Lanes) -> bool:
  return all(np.ndim(value) == 0 for value in x.values)


def as_array(x: Value, look_up: LookUp) -> jax.Array | Coupled:
  """A result for every entry; or why there is none that depends on these entries alone."""
  if isinstance(x, Elsewhere):
    return Coupled("a result of other tensors")
  return look_up(x.values) if isinstance(x, Lanes) else x
