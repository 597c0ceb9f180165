"""A backward pass that adds to arrays, so that the gradients which go into them never exist.

JAX adds the cotangents of an argument into a *reference* where `jax.vjp` is given one. Of layers
that are stacked in a leaf and run by a scan, each step of the scan in reverse then adds to one row
of the sum, in place; a gradient would be an array of all rows, which the scan writes and whoever
adds it up reads. A leaf that no scan reads gains nothing, since XLA adds up its gradient where that
is computed.

References cannot be differentiated, nor is a scan over them batched. So that nobody tries, the pass
is an operation of its own, whose program is seen by the compiler alone: under differentiation and
under `vmap` gradients take its place.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching
from jax.interpreters import mlir

from optax_cadence import _control
from optax_cadence import _sharding
from optax_cadence.programs import reading
from optax_cadence.regions.cuts import Box
from optax_cadence.regions.layout import Leaves
from optax_cadence.regions.layout import Tensor

# What is new in them is not yet in their types.
_ad: Any = getattr(jax, "ad", None)
_vjp: Any = jax.vjp


# Calls that are the same as what they call.
_CALLS = ("jit", "pjit", "closed_call", "core_call")


@dataclasses.dataclass(frozen=True)
class Loss:
  """A loss that has been traced.

  Attributes:
    program: Its program, of `consts` and the leaves.
    consts: What it closes over.
    returned: What it returns, as shapes: a scalar; with `has_aux` a pair of that and anything else.
    scanned: The leaves that a scan reads; none where references would be in the way: where nothing
      is compiled, the types of arrays say how they lie, or the loss has effects.
    by_rows: Those that nothing but one scan reads, a row at each turn.
  """

  program: Any
  consts: Sequence[jax.Array]
  returned: Any
  scanned: Collection[int] = ()
  by_rows: Collection[int] = ()


def trace(loss: Callable[[Leaves], Any], leaves: Leaves, has_aux: bool) -> Loss:
  """Traces a loss.

  Raises:
    ValueError: If it does not return a scalar that can be differentiated.
  """
  program, returned = jax.make_jaxpr(loss, return_shape=True)(leaves)
  if has_aux and not (isinstance(returned, tuple | list) and len(returned) == 2):
    raise ValueError(f"loss: expected a pair, as has_aux=True says, found {_found(returned)}")
  value = returned[0] if has_aux else returned
  scalar = isinstance(value, jax.ShapeDtypeStruct) and value.shape == ()
  if not (scalar and jnp.issubdtype(value.dtype, jnp.floating)):
    raise ValueError(
      f"loss: expected a scalar of real numbers, found {_found(value)}; with has_aux=True it"
      " returns a pair of that and anything else"
    )
  arrays = [*program.consts, *leaves.values()]
  apart = _sharding.axes_of(arrays) or any(map(_sharding.spec_of, arrays))
  if apart or program.effects or not _control.is_traced(arrays):
    return Loss(program, (), returned)
  leaves_of_scans, (program, consts) = _scanned(program), reading.hoisted(program)
  return Loss(program, consts, returned, *leaves_of_scans)


def _found(value: Any) -> str:
  if isinstance(value, jax.ShapeDtypeStruct):
    return f"{value.dtype} of shape {value.shape}"
  return f"a {type(value).__name__}"


def value_and_sums(
  loss: Loss,
  leaves: Leaves,
  sums: Mapping[Tensor, jax.Array],
  parts: Sequence[Tensor] = (),
) -> tuple[Any, Leaves, dict[Tensor, jax.Array]]:
  """The value of a loss, and its gradient with respect to each leaf, or sums with that added.

  Args:
    loss: The loss.
    leaves: The leaves that it was traced with.
    sums: Of some leaves that a scan reads the sum that their gradient is added to, of a leaf as
      large as it, or of a part.
    parts: The runs of rows that leaves fall into which are read by rows, for those that have a sum
      for a part.

  Returns:
    What the loss returns; the gradient of each leaf that is not mentioned in `sums` and `parts`;
    and of what is its sum with the gradient, or where it has none its gradient.
  """
  jaxpr, numbers = reading.opened(loss.program)
  whole = {t.leaf: x for t, x in sums.items() if t not in parts}
  of_parts = [sums.get(t) for t in parts]
  in_parts = {t.leaf: leaves[t.leaf] for t in parts}
  added = {i: leaves[i] for i in whole}
  others = {i: x for i, x in leaves.items() if i not in whole and i not in in_parts}

  def evaluate(
    consts: Any, others: Leaves, added: Leaves, in_parts: Leaves, places: Sequence[jax.Array] = ()
  ) -> tuple[jax.Array, Any]:
    given = [*consts, *jax.tree.leaves({**others, **added, **in_parts})]
    if places:
      cut = _Cut(len(consts), parts, places, added)
      value, *aux = cut.run(loss.program, given)
    else:
      value, *aux = jax.core.eval_jaxpr(jaxpr, numbers, *given)
    return value, list(map(jnp.asarray, aux))  # some may be numbers that the program has

  def by_references(
    consts: Any, others: Leaves, added: Leaves, in_parts: Leaves, whole: Leaves, of_parts: Any
  ) -> Any:
    places = [jnp.zeros_like(t.cut.take(in_parts[t.leaf])) for t in parts]
    arguments = others, added, places, consts, in_parts

    def run(others: Leaves, added: Leaves, places: Any, consts: Any, in_parts: Leaves) -> Any:
      return evaluate(consts, others, added, in_parts, places)

    program = jax.make_jaxpr(run)(*arguments)
    has_reference = jax.tree.map(lambda _: False, others), jax.tree.map(lambda _: True, added)
    marks = [*jax.tree.leaves(has_reference), *(x is not None for x in of_parts)]
    marks += [False] * (len(program.in_avals) - len(marks))
    program = reading.for_references(program, marks)

    def fn(*differentiated: Any) -> tuple[jax.Array, Any]:
      given = jax.tree.leaves((*differentiated, consts, in_parts))
      value, *aux = jax.core.eval_jaxpr(program.jaxpr, program.consts, *given)
      return value, aux

    references = jax.tree.map(jax.new_ref, (whole, of_parts))
    value, backward, aux = _vjp(fn, others, added, places, has_aux=True)
    wanted = [_ad.GradValue() if x is None else x for x in references[1]]
    asked = jax.tree.map(lambda _: _ad.GradValue(), others), references[0], wanted
    # What a gradient is to be multiplied with belongs here, where it costs nothing.
    grads, _, found = backward.with_refs(*asked)(jnp.ones_like(value))
    whole, of_parts = jax.tree.map(jax.freeze, references)
    pairs = zip(found, of_parts, strict=True)
    return value, aux, grads, whole, [x if total is None else total for x, total in pairs]

  def by_gradients(
    consts: Any, others: Leaves, added: Leaves, in_parts: Leaves, whole: Leaves, of_parts: Any
  ) -> Any:
    fn = jax.value_and_grad(functools.partial(evaluate, consts), argnums=(0, 1, 2), has_aux=True)
    (value, aux), (grads, more, cut) = fn(others, added, in_parts)
    found = [t.cut.take(cut[t.leaf]) for t in parts]
    found = [x if total is None else total + x for x, total in zip(found, of_parts, strict=True)]
    return value, aux, grads, jax.tree.map(jnp.add, whole, more), found

  operands = loss.consts, others, added, in_parts, whole, of_parts
  if sums:
    results = _as_one_operation(by_references, by_gradients, operands)
  else:
    results = by_gradients(*operands)
  value, aux, grads, whole, of_parts = results
  given = dict(zip(parts, of_parts, strict=True))
  given |= {t: whole[t.leaf] for t in sums if t not in parts}
  return jax.tree.unflatten(jax.tree.structure(loss.returned), [value, *aux]), grads, given


def _scanned(program: Any) -> tuple[frozenset[int], frozenset[int]]:
  """The arguments of a program that a scan reads as they are; and those that nothing else reads.

  Returns:
    Positions of the former; and of those of them that one scan alone reads, by rows, where it
    stands in no call but such as are the same as what they call.
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
      consts, carried = reading.scan_counts(eqn)
      rows = operands[consts + carried :]
      found.update(*operands[:consts], *rows)
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
  return frozenset(found), frozenset(i for i, n in by_rows.items() if n == uses[i] == 1)


class _Cut:
  """Runs a program in which the rows of some arguments belong to several sums.

  The scan that reads them is run as several, one after the other, each over layers that lie in one
  run of every such argument. It reads the rows out of the argument itself, of which nothing is
  copied; their cotangents go to the run's *place*, which nobody reads.

  Attributes:
    consts: How many arguments of the program stand before the leaves.
    parts: The runs.
    places: An array of the rows of each, to differentiate with respect to.
    added: The leaves whose cotangents go to references; rows of others are copied.
  """

  def __init__(
    self, consts: int, parts: Sequence[Tensor], places: Sequence[jax.Array], added: Collection[int]
  ):
    self.consts, self.added = consts, added
    self.runs: dict[int, list[tuple[int, int, jax.Array]]] = {}
    for t, place in zip(parts, places, strict=True):
      self.runs.setdefault(t.leaf, []).append((*rows_of(t), place))

  def run(self, program: Any, inputs: Sequence[jax.Array]) -> list[jax.Array]:
    """The results of the program."""
    marked = [(x, i - self.consts) for i, x in enumerate(inputs)]
    return [x for x, _ in self._run(program, marked)]

  def _run(self, program: Any, inputs: Sequence[Any]) -> list[Any]:
    return reading.walk([program], inputs, self._operation, lambda numbers: (numbers[0], None))

  def _operation(self, eqns: reading.Eqns, operands: list[Any]) -> list[Any]:
    (eqn,) = eqns
    if eqn.primitive.name in _CALLS:
      return self._run(reading.called(eqn), operands)
    arrays = [x for x, _ in operands]
    if eqn.primitive.name == "scan":
      consts, carried = reading.scan_counts(eqn)
      if any(leaf in self.runs for _, leaf in operands[consts + carried :]):
        start = consts + carried
        results = self._scan(eqn, arrays[:consts], arrays[consts:start], operands[start:])
        return [(x, None) for x in results]
    return [(x, None) for x in reading.bind(eqn, arrays)]

  def _scan(
    self, eqn: Any, consts: list[jax.Array], carry: list[jax.Array], xs: list[Any]
  ) -> list[jax.Array]:
    body, numbers = reading.opened(eqn.params["jaxpr"])
    ends = {0} | {end for _, leaf in xs for _, end, _ in self.runs.get(leaf, ())}
    spans = list(itertools.pairwise(sorted(ends)))
    reads = {x.shape for x, leaf in xs if leaf in self.runs or leaf in self.added}
    policy = functools.partial(_is_kept, reads)
    results, reverse = [], eqn.params["reverse"]
    for start, end in reversed(spans) if reverse else spans:
      turn = functools.partial(self._turn, body, numbers, consts, xs, start)
      turn = jax.checkpoint(turn, policy=policy, prevent_cse=False)
      copied = [None if leaf in self.runs or leaf in self.added else x[start:end] for x, leaf in xs]
      counted = jnp.arange(start, end), copied
      carry, ys = jax.lax.scan(turn, carry, counted, reverse=reverse, unroll=eqn.params["unroll"])
      results.append(ys)
    results = results[::-1] if reverse else results
    return [*carry, *(jnp.concatenate(ys) for ys in zip(*results, strict=True))]

  def _turn(
    self,
    body: Any,
    numbers: Any,
    consts: list[jax.Array],
    xs: list[Any],
    start: int,
    carry: list[jax.Array],
    counted: Any,
  ) -> tuple[list[jax.Array], list[jax.Array]]:
    """One turn of the scan, at row i of every array."""
    i, rows = counted
    rows = list(rows)
    for k, (x, leaf) in enumerate(xs):
      if rows[k] is None:
        rows[k] = jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
      for first, end, place in self.runs.get(leaf, ()):
        if first <= start < end:
          rows[k] = _instead_of(
            rows[k], jax.lax.dynamic_index_in_dim(place, i - first, keepdims=False)
          )
    results = jax.core.eval_jaxpr(body, numbers, *consts, *carry, *rows)
    return results[: len(carry)], results[len(carry) :]


def _is_kept(reads: Collection[Any], primitive: Any, operand: Any, *others: Any, **_: Any) -> bool:
  """Whether the backward pass is given a result of the forward pass, and does not compute it again.

  All but the rows of these arrays: there they can be read again, and would be copies.
  """
  del others
  row_read = primitive.name == "dynamic_slice" and operand.shape in reads
  bare = primitive.name == "squeeze" and any(operand.shape == (1, *x[1:]) for x in reads)
  return not (row_read or bare)


def rows_of(tensor: Tensor) -> tuple[int, int]:
  """The first row of a leaf that is in a tensor that is a run of rows, and the first after it."""
  assert isinstance(tensor.cut, Box)
  return tensor.cut.intervals[0]


@jax.custom_vjp
def _instead_of(row: jax.Array, place: jax.Array) -> jax.Array:
  """The row; its cotangent is that of the place."""
  del place
  return row


_instead_of.defvjp(lambda row, _: (row, None), lambda _, cotangent: (None, cotangent))


def _as_one_operation(fn: Callable[..., Any], instead: Callable[..., Any], operands: Any) -> Any:
  """`fn` of operands, as an operation that is `instead` where it is differentiated or batched.

  Args:
    fn: A function of arrays that makes references, and returns none.
    instead: One that returns the same and makes none.
    operands: Trees of arrays; the functions close over no other.
  """
  flat, structure = jax.tree.flatten(operands)

  def flat_instead(*flat: jax.Array) -> list[jax.Array]:
    return jax.tree.leaves(instead(*jax.tree.unflatten(structure, flat)))

  program, results = jax.make_jaxpr(fn, return_shape=True)(*operands)
  return jax.tree.unflatten(jax.tree.structure(results), _run(program, flat_instead, *flat))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _run(program: Any, instead: Callable[..., Any], *operands: jax.Array) -> list[jax.Array]:
  return _operation.bind(*operands, program=program, instead=instead)


@_run.defjvp
def _run_jvp(program: Any, instead: Callable[..., Any], primals: Any, tangents: Any) -> Any:
  del program
  return jax.jvp(instead, primals, tangents)


def _evaluate(*operands: jax.Array, program: Any, instead: Callable[..., Any]) -> list[jax.Array]:
  del instead
  return jax.core.eval_jaxpr(program.jaxpr, program.consts, *operands)


def _types(*types: Any, program: Any, instead: Callable[..., Any]) -> list[Any]:
  del types, instead
  return program.out_avals


def _batched(operands: Any, axes: Any, *, program: Any, instead: Callable[..., Any]) -> Any:
  del program
  results = jax.vmap(instead, in_axes=tuple(axes))(*operands)
  return results, [0] * len(results)


_operation = Primitive("add_in_backward_pass")
_operation.multiple_results = True
_operation.def_impl(_evaluate)
_operation.def_abstract_eval(_types)
batching.primitive_batchers[_operation] = _batched
mlir.register_lowering(_operation, mlir.lower_fun(_evaluate, multiple_results=True))
