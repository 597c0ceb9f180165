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

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching
from jax.interpreters import mlir

from optax_cadence import _control
from optax_cadence import _sharding
from optax_cadence.programs import reading
from optax_cadence.regions.layout import Leaves

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
  """

  program: Any
  consts: Sequence[jax.Array]
  returned: Any
  scanned: Collection[int]


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
    return Loss(program, (), returned, ())
  scanned, (program, consts) = _scanned(program), reading.hoisted(program)
  return Loss(reading.with_strides(program), consts, returned, scanned)


def _found(value: Any) -> str:
  if isinstance(value, jax.ShapeDtypeStruct):
    return f"{value.dtype} of shape {value.shape}"
  return f"a {type(value).__name__}"


def value_and_sums(loss: Loss, leaves: Leaves, sums: Leaves) -> tuple[Any, Leaves]:
  """The value of a loss, and its gradient with respect to each leaf, or a sum with that added.

  Args:
    loss: The loss.
    leaves: The leaves that it was traced with.
    sums: For some that a scan reads an array of the leaf's shape and dtype.

  Returns:
    What the loss returns; and for each leaf its sum with the gradient, or else its gradient.
  """
  jaxpr, numbers = reading.opened(loss.program)
  added = {i: leaves[i] for i in sums}
  others = {i: x for i, x in leaves.items() if i not in sums}

  def evaluate(consts: Any, others: Leaves, added: Leaves) -> tuple[jax.Array, Any]:
    given = jax.tree.leaves({**others, **added})
    value, *aux = jax.core.eval_jaxpr(jaxpr, numbers, *consts, *given)
    return value, list(map(jnp.asarray, aux))  # some may be numbers that the program has

  def by_references(consts: Any, others: Leaves, added: Leaves, sums: Leaves) -> Any:
    references = jax.tree.map(jax.new_ref, sums)
    fn = functools.partial(evaluate, consts)
    value, backward, aux = _vjp(fn, others, added, has_aux=True)
    asked = jax.tree.map(lambda _: _ad.GradValue(), others)
    # What a gradient is to be multiplied with belongs here, where it costs nothing.
    grads, _ = backward.with_refs(asked, references)(jnp.ones_like(value))
    return value, aux, grads, jax.tree.map(jax.freeze, references)

  def by_gradients(consts: Any, others: Leaves, added: Leaves, sums: Leaves) -> Any:
    fn = jax.value_and_grad(functools.partial(evaluate, consts), argnums=(0, 1), has_aux=True)
    (value, aux), (grads, more) = fn(others, added)
    return value, aux, grads, jax.tree.map(jnp.add, sums, more)

  operands = loss.consts, others, added, sums
  if sums:
    value, aux, grads, sums = _as_one_operation(by_references, by_gradients, operands)
  else:
    value, aux, grads, sums = by_gradients(*operands)
  structure = jax.tree.structure(loss.returned)
  return jax.tree.unflatten(structure, [value, *aux]), {**grads, **sums}


def _scanned(program: Any) -> frozenset[int]:
  """The arguments of a program that a scan reads as they are, from position to position."""
  nothing: frozenset[int] = frozenset()
  found: set[int] = set()

  def run(program: Any, inputs: list[frozenset[int]]) -> list[frozenset[int]]:
    return reading.walk([program], inputs, operation, lambda _: nothing)

  def operation(eqns: reading.Eqns, operands: list[frozenset[int]]) -> list[frozenset[int]]:
    (eqn,) = eqns
    name = eqn.primitive.name
    if name == "scan":
      consts, carried = reading.scan_counts(eqn)
      found.update(*operands[:consts], *operands[consts + carried :])
    elif name == "cond":
      return [nothing.union(*x) for x in reading.branch_results(eqn, operands, run)]
    # The derivative of a `custom_vjp`, and what `shard_map` makes of an argument, are arrays.
    elif name != "shard_map" and not name.startswith("custom_vjp"):
      inner = reading.called(eqn)
      if inner is not None:
        return run(inner, operands)
    return [nothing] * len(eqn.outvars)

  run(program, [frozenset([i]) for i in range(len(program.in_avals))])
  return frozenset(found)


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
