"""Scans over stacked layers, for a backward pass that adds gradients to references.

Which arguments of a program scans read, and how to rewrite the scans for that pass, which is in
`_backward`.
"""

import collections
import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_cadence.programs import reading

# Calls that do nothing but call: the program inside could stand in their place.
_CALLS = ("jit", "pjit", "closed_call", "core_call")

# First row, the first row after it, and the place: see `Cut`.
Run = tuple[int, int, jax.Array]


def read_by_scans(program: Any) -> tuple[frozenset[int], frozenset[int]]:
  """Which arguments of a program a scan reads as they are, with nothing computed of them before.

  Returns:
    Their positions, but for those that `taken_twice` finds; and those of the arguments that are
    read by rows in one scan and nowhere else, which `Cut` can therefore cut: a scan in no loop,
    branch or function with a custom derivative.
  """
  nothing: frozenset[int] = frozenset()
  found: set[int] = set()
  uses: collections.Counter[int] = collections.Counter()
  by_rows: collections.Counter[int] = collections.Counter()

  def run(program: Any, inputs: list[frozenset[int]], plainly: bool) -> list[frozenset[int]]:
    operation = functools.partial(of_operation, plainly)
    return reading.walk([program], inputs, operation, lambda _: nothing)

  def of_operation(
    plainly: bool, eqns: reading.Eqns, operands: list[frozenset[int]]
  ) -> list[frozenset[int]]:
    (eqn,) = eqns
    name = eqn.primitive.name
    if name not in _CALLS:
      for operand in operands:
        uses.update(operand)
    if name == "scan":
      consts, _, rows = reading.scan_operands(eqn, operands)
      found.update(*consts, *rows)
      if plainly:
        for operand in rows:
          by_rows.update(operand)
    elif name == "cond":
      branch = functools.partial(run, plainly=False)
      return [nothing.union(*x) for x in reading.branch_results(eqn, operands, branch)]
    # A derivative that somebody has written, and that of an argument of `shard_map`, are arrays.
    elif name != "shard_map" and not name.startswith("custom_"):
      inner = reading.called(eqn)
      if inner is not None:
        return run(inner, operands, plainly and name in _CALLS)
    return [nothing] * len(eqn.outvars)

  run(program, [frozenset([i]) for i in range(len(program.in_avals))], True)
  rows = frozenset(i for i, n in by_rows.items() if n == uses[i] == 1)
  return frozenset(found) - taken_twice(program), rows


def taken_twice(program: Any) -> set[int]:
  """Which arguments of a program one of its scans, branches or calls takes as several operands.

  An argument stands for its rows inside a scan, too. In a backward pass JAX hands such an operation
  one reference several times, and what is added through all of them but one is lost.
  """
  nothing: frozenset[int] = frozenset()
  found: set[int] = set()

  def run(program: Any, inputs: list[frozenset[int]]) -> list[frozenset[int]]:
    return reading.walk([program], inputs, of_operation, lambda _: nothing)

  def of_operation(eqns: reading.Eqns, operands: list[frozenset[int]]) -> Sequence[frozenset[int]]:
    (eqn,) = eqns
    if reading.bodies(eqn):
      times = collections.Counter(itertools.chain.from_iterable(operands))
      found.update(i for i, n in times.items() if n > 1)
    inner = reading.called(eqn)
    if eqn.primitive.name == "scan":
      consts, carried, rows = reading.scan_operands(eqn, operands)
      run(eqn.params["jaxpr"], [*consts, *[nothing] * len(carried), *rows])
    elif eqn.primitive.name == "cond":
      return [nothing.union(*x) for x in reading.branch_results(eqn, operands, run)]
    elif inner is not None:
      return run(inner, operands)
    return [nothing] * len(eqn.outvars)

  run(program, [frozenset([i]) for i in range(len(program.in_avals))])
  return found


class Cut:
  """Runs a program whose scan over stacked layers is cut into several, one after the other.

  Layers that have a period each add their gradients to different windows, and a reference is to one
  array. So an argument falls into *runs* of layers with one window, and no scan goes across the
  end of a run. Rows are read out of the argument itself, of which nothing is copied. Their
  cotangents go to the *place* of their run, an array as large as the run that nobody reads.

  Attributes:
    runs: For each of these arguments its runs: the first row, the first row after it, and the
      place, with respect to which is differentiated.
    referred: The arguments whose cotangents go to references; rows of others are copied.
  """

  def __init__(self, runs: Mapping[int, Sequence[Run]], referred: Collection[int]):
    self.runs, self.referred = runs, referred

  def run(self, program: Any, inputs: Sequence[jax.Array]) -> list[jax.Array]:
    """The results of the program."""
    return [x for x, _ in self._run(program, list(zip(inputs, itertools.count())))]

  def _run(self, program: Any, inputs: Sequence[Any]) -> list[Any]:
    return reading.walk([program], inputs, self._operation, lambda numbers: (numbers[0], None))

  def _operation(self, eqns: reading.Eqns, operands: list[Any]) -> list[Any]:
    (eqn,) = eqns
    if eqn.primitive.name in _CALLS:
      return self._run(reading.called(eqn), operands)
    arrays = [x for x, _ in operands]
    if eqn.primitive.name == "scan":
      consts, carry, _ = reading.scan_operands(eqn, arrays)
      xs = operands[len(consts) + len(carry) :]
      if any(argument in self.runs for _, argument in xs):
        return [(x, None) for x in self._scan(eqn, consts, carry, xs)]
    return [(x, None) for x in reading.bind(eqn, arrays)]

  def _scan(
    self, eqn: Any, consts: list[jax.Array], carry: list[jax.Array], xs: list[Any]
  ) -> list[jax.Array]:
    """The results of a scan; `xs` has each array with the position of the argument that it is."""
    body, numbers = reading.opened(eqn.params["jaxpr"])
    reverse, unroll = eqn.params["reverse"], eqn.params["unroll"]
    in_place = {i: x for x, i in xs if i in self.runs or i in self.referred}
    policy = functools.partial(_is_kept, {x.shape for x in in_place.values()})

    def turn(start: int, carry: list[jax.Array], counted: Any) -> tuple[list[Any], list[Any]]:
      i, copied = counted
      rows = dict(copied)
      for k, (x, argument) in enumerate(xs):
        if argument in in_place:
          rows[k] = _row(x, i)
        for first, end, place in self.runs.get(argument, ()):
          if first <= start < end:
            rows[k] = _instead_of(rows[k], _row(place, i - first))
      given = (rows[k] for k in range(len(xs)))
      results = jax.core.eval_jaxpr(body, numbers, *consts, *carry, *given)
      return results[: len(carry)], results[len(carry) :]

    ends = {end for i in in_place for _, end, _ in self.runs.get(i, ())}
    spans = list(itertools.pairwise(sorted({0} | ends)))
    parts = []
    for start, end in reversed(spans) if reverse else spans:
      copied = {k: x[start:end] for k, (x, i) in enumerate(xs) if i not in in_place}
      one = jax.checkpoint(functools.partial(turn, start), policy=policy, prevent_cse=False)
      counted = jnp.arange(start, end), copied
      carry, results = jax.lax.scan(one, carry, counted, reverse=reverse, unroll=unroll)
      parts.append(results)
    parts = parts[::-1] if reverse else parts
    return [*carry, *(jnp.concatenate(results) for results in zip(*parts, strict=True))]


def _row(x: jax.Array, i: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _is_kept(reads: Collection[Any], primitive: Any, *operands: Any, **_: Any) -> bool:
  """A policy of `jax.checkpoint`: keeps every result but rows of arrays of the shapes in `reads`.

  These the backward pass can read again, and to keep them would be to copy them.
  """
  if primitive.name == "dynamic_slice":
    return operands[0].shape not in reads
  return primitive.name != "squeeze" or operands[0].shape not in {(1, *x[1:]) for x in reads}


@jax.custom_vjp
def _instead_of(row: jax.Array, place: jax.Array) -> jax.Array:
  """Returns the row; its cotangent goes to the place instead."""
  del place
  return row


_instead_of.defvjp(lambda row, _: (row, None), lambda _, cotangent: (None, cotangent))


def for_references(program: Any, referred: Sequence[bool]) -> Any:
  """Works around JAX before 0.12, so that cotangents of arguments can be added to references.

  It mixes up the operands of a scan unless those with references stand before the others, and
  cannot transpose a slice without strides. For later versions the program stays as it is.
  `referred` says of each argument whether it has a reference.
  """
  if jax.__version_info__ >= (0, 12):
    return program
  jaxpr, _ = reading.opened(program)
  marks = dict(zip(jaxpr.invars, referred, strict=True))
  eqns = []
  for eqn in jaxpr.eqns:
    mine = [not reading.is_literal(v) and marks.get(v, False) for v in eqn.invars]
    eqns.append(_for_references(eqn, mine))
  return _with(program, jaxpr.replace(eqns=eqns))


def _for_references(eqn: Any, referred: list[bool]) -> Any:
  """`for_references` of one operation."""
  if eqn.primitive.name == "slice" and eqn.params["strides"] is None:
    strides = (1,) * len(eqn.params["start_indices"])
    return eqn.replace(params=eqn.params | {"strides": strides})
  if eqn.primitive.name == "scan":
    consts, carry, xs = reading.scan_operands(eqn, referred)
    inside = [*consts, *[False] * len(carry), *xs]
    # Constants first, what is carried in its order, then what is scanned over.
    rank = [0] * len(consts) + [1] * len(carry) + [2] * len(xs)
    order = sorted(range(len(inside)), key=lambda i: (rank[i], not inside[i]))
    body, _ = reading.opened(eqn.params["jaxpr"])
    body = body.replace(invars=[body.invars[i] for i in order])
    body = for_references(_with(eqn.params["jaxpr"], body), [inside[i] for i in order])
    params = eqn.params | {"jaxpr": body}
    return eqn.replace(invars=[eqn.invars[i] for i in order], params=params)
  if eqn.primitive.name == "cond":
    branches = tuple(for_references(b, referred[1:]) for b in eqn.params["branches"])
    return eqn.replace(params=eqn.params | {"branches": branches})
  inner = reading.called(eqn)
  if inner is None:
    return eqn
  changed = for_references(inner, referred)
  return eqn.replace(params={k: changed if v is inner else v for k, v in eqn.params.items()})


def _with(program: Any, jaxpr: Any) -> Any:
  """The program with another jaxpr, and the same constants."""
  # What the names of arguments were is no longer true of them.
  jaxpr = jaxpr.replace(debug_info=jaxpr.debug_info.with_unknown_names())
  return program.replace(jaxpr=jaxpr) if hasattr(program, "consts") else jaxpr
