"""A backward pass that adds to arrays, so that the gradients which go into them never exist.

JAX adds the cotangents of an argument into a *reference* where `jax.vjp` is given one. Of layers
that are stacked in a leaf and run by a scan, each step of the scan in reverse then adds to one row
of the sum, in place. Without references the scan writes the gradients of all rows into an array,
which is then read once to add it up. A leaf that no scan reads gains nothing, since XLA adds up its
gradient where that is computed.

JAX neither differentiates references nor batches a scan over them. So the pass is an operation of
its own, whose program only the compiler sees: under differentiation and under `vmap` it is replaced
by one that computes gradients and adds them up.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching
from jax.interpreters import mlir

from optax_cadence import _control
from optax_cadence import _sharding
from optax_cadence import _window
from optax_cadence.programs import reading
from optax_cadence.programs import scans
from optax_cadence.regions.cuts import Box
from optax_cadence.regions.layout import Leaves
from optax_cadence.regions.layout import Tensor

# What is new in them is not yet in their types.
_ad: Any = getattr(jax, "ad", None)
_vjp: Any = jax.vjp


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
  value = value_and_aux(returned)[0] if has_aux else returned
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
  scanned, by_rows = scans.read_by_scans(program)
  program, consts = reading.hoisted(program)
  return Loss(program, consts, returned, scanned, by_rows)


def value_and_aux(returned: Any) -> tuple[Any, Any]:
  """The pair that a loss returns with `has_aux=True`.

  Raises:
    ValueError: If it is none.
  """
  if not (isinstance(returned, tuple | list) and len(returned) == 2):
    raise ValueError(f"loss: expected a pair, as has_aux=True says, found {_found(returned)}")
  return returned[0], returned[1]


def _found(value: Any) -> str:
  if isinstance(value, jax.ShapeDtypeStruct):
    return f"{value.dtype} of shape {value.shape}"
  return f"a {type(value).__name__}"


def value_and_sums(
  loss: Loss,
  leaves: Leaves,
  sums: Mapping[Tensor, jax.Array],
  parts: Sequence[Tensor] = (),
  weight: jax.Array | None = None,
) -> tuple[Any, Leaves, dict[Tensor, jax.Array]]:
  """The value of a loss, and its gradient with respect to each leaf, or sums with that added.

  Args:
    loss: The loss.
    leaves: The leaves that it was traced with.
    sums: Of some leaves that a scan reads the sum that their gradient is added to, of a leaf as
      large as it, or of a part.
    parts: The runs of rows that leaves fall into which are read by rows, for those that have a sum
      for a part.
    weight: What the gradient is multiplied with where it is added to a sum: a scalar; where it is
      not above 0, nothing is added, whatever the gradient is. None for 1.

  Returns:
    What the loss returns; the gradient of each leaf that is not mentioned in `sums` and `parts`;
    and of what is its sum with the gradient, or where it has none its gradient.
  """
  # What closes over `loss` has its constants too, which may be tracers of a program around.
  loss_program = loss.program
  jaxpr, numbers = reading.opened(loss_program)
  whole = [t for t in sums if t not in parts]
  targets = [*whole, *parts]
  totals = [sums.get(t) for t in targets]
  others = leaves.keys() - {t.leaf for t in targets}

  def evaluate(consts: Any, leaves: Leaves, places: Sequence[jax.Array] = ()) -> Any:
    given = [*consts, *jax.tree.leaves(leaves)]
    if places:
      runs: dict[int, list[scans.Run]] = {}
      for t, place in zip(parts, places, strict=True):
        assert isinstance(t.cut, Box)
        runs.setdefault(len(consts) + t.leaf, []).append((*t.cut.intervals[0], place))
      cut = scans.Cut(runs, [len(consts) + t.leaf for t in whole])
      value, *aux = cut.run(loss_program, given)
    else:
      value, *aux = jax.core.eval_jaxpr(jaxpr, numbers, *given)
    return value, list(map(jnp.asarray, aux))  # some may be numbers that the program has

  def by_references(consts: Any, leaves: Leaves, totals: Any, weight: Any) -> Any:
    alone = {i: leaves[i] for i in others}
    added = [leaves[t.leaf] for t in whole]
    places = [jnp.zeros_like(t.cut.take(leaves[t.leaf])) for t in parts]
    rest = consts, {t.leaf: leaves[t.leaf] for t in parts}

    def run(alone: Leaves, added: Any, places: Any, consts: Any, in_parts: Leaves) -> Any:
      summed = {t.leaf: x for t, x in zip(whole, added, strict=True)}
      return evaluate(consts, {**alone, **summed, **in_parts}, places)

    program = jax.make_jaxpr(run)(alone, added, places, *rest)
    marks = [*(False for _ in alone), *(total is not None for total in totals)]
    marks += [False] * (len(program.in_avals) - len(marks))
    program = scans.for_references(program, marks)

    def fn(*differentiated: Any) -> tuple[jax.Array, Any]:
      given = jax.tree.leaves((*differentiated, *rest))
      value, *aux = jax.core.eval_jaxpr(program.jaxpr, program.consts, *given)
      return value, aux

    value, backward, aux = _vjp(fn, alone, added, places, has_aux=True)
    references = [None if total is None else jax.new_ref(total) for total in totals]
    asked = [_ad.GradValue() if ref is None else ref for ref in references]
    n = len(whole)
    factor = jnp.ones_like(value) if weight is None else weight.astype(value.dtype)
    grads, *found = backward.with_refs(
      jax.tree.map(lambda _: _ad.GradValue(), alone), asked[:n], asked[n:]
    )(factor)
    results = [
      _divided(x, weight) if ref is None else jax.freeze(ref)
      for x, ref in zip([*found[0], *found[1]], references, strict=True)
    ]
    return value, aux, _divided(grads, weight), results

  def by_gradients(consts: Any, leaves: Leaves, totals: Any, weight: Any) -> Any:
    (value, aux), grads = jax.value_and_grad(evaluate, argnums=1, has_aux=True)(consts, leaves)
    found = [t.cut.take(grads[t.leaf]) for t in targets]
    results = [
      x if total is None else total + (x if weight is None else _window.multiply(x, weight))
      for x, total in zip(found, totals, strict=True)
    ]
    return value, aux, {i: grads[i] for i in others}, results

  def differentiated(*operands: Any) -> Any:
    if sums:
      return _as_one_operation(by_references, by_gradients, operands)
    return by_gradients(*operands)

  if not sums or weight is None:
    results = differentiated(loss.consts, leaves, totals, None)
  else:
    results = _where_it_counts(differentiated, evaluate, (loss.consts, leaves), totals, weight)
  value, aux, grads, found = results
  value = jax.tree.unflatten(jax.tree.structure(loss.returned), [value, *aux])
  return value, grads, dict(zip(targets, found, strict=True))


def _divided(tree: Any, weight: jax.Array | None) -> Any:
  """Gradients, without the weight that they were multiplied with on the way."""
  return tree if weight is None else jax.tree.map(lambda x: _window.divide(x, weight), tree)


def _where_it_counts(
  differentiated: Callable[..., Any],
  evaluate: Callable[..., Any],
  inputs: Any,
  totals: Sequence[jax.Array | None],
  weight: jax.Array,
) -> Any:
  """What is differentiated where the weight is not 0; else the value, and no gradient.

  Of a weight of 0 times a gradient that is not finite, something would come into the sums.
  """
  shapes = jax.eval_shape(differentiated, *inputs, totals, weight)
  value, aux, grads, found = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  pairs = zip(found, totals, strict=True)
  carry = value, aux, grads, [x if total is None else total for x, total in pairs]

  def counted(carry: Any, consts: Any) -> Any:
    inputs, weight = consts
    pairs = zip(carry[-1], totals, strict=True)
    return differentiated(*inputs, [None if total is None else x for x, total in pairs], weight)

  nothing = weight <= 0
  carry = _control.maybe(~nothing, counted, carry, (inputs, weight))
  result = _control.maybe(
    nothing, lambda _, inputs: evaluate(*inputs), (carry[0], carry[1]), inputs
  )
  return *result, *carry[2:]


def _as_one_operation(fn: Callable[..., Any], instead: Callable[..., Any], operands: Any) -> Any:
  """`fn` of operands, as an operation that is `instead` where it is differentiated or batched.

  `fn` makes references and returns none, `instead` returns the same and makes none; neither closes
  over arrays.
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
