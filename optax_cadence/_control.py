"""Runs a branch zero times or once without copying what it leaves alone.

A branch of `lax.cond` that returns an operand unchanged copies it; a loop that runs
zero times leaves its carry where it is. A loop cannot be differentiated in reverse,
so under differentiation the same computation is a `lax.cond`. Where a batch has a
predicate for each of its members, the loop runs if any is true and `keep` selects.

On GPUs it is a `lax.cond` throughout: it copies nothing there, and a loop waits for the host.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _sharding
from optax_cadence.programs import primitives
from optax_cadence.programs import reading


def maybe(when: bool | jax.Array, fn: Callable[[Any, Any], Any], carry: Any, consts: Any) -> Any:
  """Returns `fn(carry, consts)` if `when`, else `carry`.

  Args:
    when: A Python bool, which leaves no branch in the program, or a boolean scalar.
    fn: Returns a tree of the structure, shapes and dtypes of `carry`. What it closes
      over may be traced, batched and differentiated.
    carry: Tree of arrays; overwritten in place where its buffers are donated.
    consts: Tree of arrays that `fn` reads.

  Returns:
    A tree like `carry`.
  """
  carry, fn = jax.tree.map(_strong, carry), functools.partial(_typed, fn)
  if not is_traced(when):
    when = bool(when)  # outside of a program there is nothing to branch in
  if isinstance(when, bool):
    return fn(carry, consts) if when else carry
  if jax.typeof(when) != jax.typeof(np.False_):  # in `jax.shard_map` it may vary over devices
    carry = _sharding.varying(carry, _sharding.axes_of(when))
  program = jax.make_jaxpr(fn)(carry, consts)
  leaves, treedef = jax.tree.flatten(carry)
  while program.out_avals != list(map(jax.typeof, leaves)):
    wider = list(map(_varying_as, leaves, program.out_avals))
    if list(map(jax.typeof, wider)) == list(map(jax.typeof, leaves)):
      break  # it is not over more devices that results vary
    leaves = wider
    program = jax.make_jaxpr(fn)(jax.tree.unflatten(treedef, leaves), consts)
  # What `fn` closes over becomes an argument: not even an integer may a `custom_jvp` close over.
  run, args = functools.partial(jax.core.eval_jaxpr, program.jaxpr), jax.tree.leaves(consts)
  leaves = _zero_or_once(run, when, leaves, (program.consts, args))
  return jax.tree.unflatten(treedef, leaves)


def _varying_as(x: jax.Array, like: Any) -> jax.Array:
  """The array, varying in `jax.shard_map` also over the axes that another does."""
  return _sharding.varying(x, _sharding.axes_of(like))


def keep(when: Any, fn: Callable[[Any, Any], Any], carry: Any, consts: Any) -> Any:
  """Returns `fn(carry, consts)` where `when`, else `carry`, without a branch.

  A value that goes into the result is selected as soon as it is computed, and what `fn`
  computes from it further on reads the selected one. A select at the end instead would
  keep the old and the new value of every array alive, and so copy it.

  Arguments and result are those of `maybe`, but `when` may also be a tree prefix of `carry` with a
  boolean scalar, or True, for each part.
  """
  fn = functools.partial(_typed, fn)
  each = jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), when, carry)
  if not is_traced((when, carry, consts)):
    return jax.tree.map(choose, each, fn(carry, consts), carry)
  carry, consts = _sharding.varying((carry, consts), _sharding.axes_of(when))
  old, treedef = jax.tree.flatten(jax.tree.map(_strong, carry))
  flags = jax.tree.leaves(each)
  closed = jax.make_jaxpr(fn)(carry, consts)
  outputs = [(i, v) for i, v in enumerate(closed.jaxpr.outvars) if not reading.is_literal(v)]
  # A value that goes into the result several times is selected at the end, for each by itself.
  times = collections.Counter(v for _, v in outputs)
  place = {v: i for i, v in outputs if times[v] == 1}
  selected = set()

  def select(i: int, x: jax.Array) -> jax.Array:
    return x if flags[i] is True else jnp.where(flags[i], x, old[i])

  def operation(eqns: reading.Eqns, operands: list[Any]) -> list[Any]:
    results = reading.bind(eqns[0], operands)
    for j, v in enumerate(eqns[0].outvars):
      if v in place:
        selected.add(place[v])
        results[j] = select(place[v], results[j])
    return results

  inputs = jax.tree.leaves((carry, consts))
  new = reading.walk([closed], inputs, operation, lambda numbers: numbers[0])
  return jax.tree.unflatten(
    treedef, [x if i in selected else select(i, x) for i, x in enumerate(new)]
  )


def apart(fn: Callable[[Any, Any], Any], carry: Any, consts: Any, count: jax.Array) -> Any:
  """Returns `fn(carry, consts)`, on CPUs fused with nothing that comes before or after.

  There XLA runs an operation that computes and writes a part of an array on one core, and
  copies the array where it is reshaped on the way. The means is a loop that always runs
  once, which the compiler cannot know: `count` is an int32 scalar that is never negative.
  """
  if not is_traced((carry, consts)):
    return _typed(fn, carry, consts)
  return jax.lax.platform_dependent(
    carry,
    consts,
    count,
    cpu=lambda carry, consts, count: maybe(count >= 0, fn, carry, consts),
    default=lambda carry, consts, _: _typed(fn, carry, consts),
  )


def first_part_first(
  when: bool | jax.Array, fn: Callable[..., Any], carry: Any, consts: Any, count: jax.Array
) -> Any:
  """As `maybe`; but the first part of the carry is written before the rest is computed.

  Where that part is computed from what the rest overwrites, XLA on CPUs would copy the rest: which
  of two operations in one loop comes first it does not know, of two loops where one waits for the
  other it does. What both need is computed twice: so it is for what `is_one_pass`. The carry is a
  tuple; `count` is as in `apart`.
  """

  def first_loop(loop: Any, consts: Any) -> Any:
    return fn((loop[0], *consts[0]), consts[1])[0], jnp.ones((), bool)

  def second_loop(rest: Any, consts: Any) -> Any:
    return fn((consts[0], *rest), consts[1])[1:]

  when = count >= 0 if when is True else when
  part, done = maybe(when, first_loop, (carry[0], jnp.zeros((), bool)), (carry[1:], consts))
  return part, *maybe(done, second_loop, carry[1:], (carry[0], consts))


def is_one_pass(fn: Callable[..., Any], carry: Any, consts: Any) -> bool:
  """Whether, in a program for CPUs, there is nothing in `fn` but passes over memory.

  Products of matrices, say, are more than that.
  """
  if not is_traced((carry, consts)) or jax.default_backend() != "cpu":
    return False
  return reading.primitive_names(jax.make_jaxpr(fn)(carry, consts)) <= primitives.ONE_PASS


def is_traced(tree: Any) -> bool:
  """Whether an array of a tree is part of a program that is being traced."""
  for x in [tree] if isinstance(tree, jax.Array) else jax.tree.leaves(tree):
    if isinstance(x, jax.core.Tracer):
      return True
  return False


def choose(when: bool | jax.Array, then: jax.Array, otherwise: jax.Array) -> jax.Array:
  """`then` if `when`; a Python bool leaves no select in the program."""
  if isinstance(when, bool):
    return then if when else otherwise
  return jnp.where(when, then, otherwise)


def cast_like(tree: Any, like: Any) -> Any:
  """`tree` with the types of `like`, none of them weak: dtypes, where it lies, what it varies over.

  Raises:
    ValueError: If the trees differ in structure or in the shape of a leaf.
  """

  def cast(x: Any, old: jax.Array) -> jax.Array:
    if jnp.shape(x) != old.shape:
      raise ValueError(
        f"an optimizer's state must keep its shapes: expected {old.shape} as before the update,"
        f" found {jnp.shape(x)}"
      )
    x = _strong(x, old.dtype)
    if jax.typeof(x) == jax.typeof(old):
      return x
    return _varying_as(_sharding.lying_as(x, old), old)

  return jax.tree.map(cast, tree, like)


def _typed(fn: Callable[[Any, Any], Any], carry: Any, consts: Any) -> Any:
  """The result of the function of `maybe`, in the types of its carry."""
  return cast_like(fn(carry, consts), carry)


def _strong(x: Any, dtype: Any = None) -> jax.Array:
  """The array in a dtype, its own by default, that no promotion takes for a Python number's."""
  x = x if isinstance(x, jax.Array) else jnp.asarray(x)
  if jnp.issubdtype(x.dtype, jax.dtypes.extended):
    return x
  if not x.weak_type and (dtype is None or x.dtype == dtype):
    return x
  return jax.lax.convert_element_type(x, x.dtype if dtype is None else dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _zero_or_once(fn: Callable[..., Any], when: jax.Array, carry: list[Any], args: Any) -> Any:
  """`fn(closed_over, *carry, *consts)` if `when`, else `carry`; `args` are what `fn` reads."""

  @jax.custom_batching.custom_vmap
  def run(when: jax.Array, carry: Any, args: Any) -> Any:
    closed_over, consts = args
    if jax.default_backend() == "gpu":
      return _branch(fn, when, carry, args)

    def body(loop: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
      return jnp.zeros_like(when), fn(closed_over, *loop[1], *consts)

    return jax.lax.while_loop(lambda loop: loop[0], body, (when, carry))[1]

  run.def_vmap(functools.partial(_batched, fn))
  return run(when, carry, args)


def _batched(
  fn: Callable[..., Any], size: int, batched: Any, when: jax.Array, carry: Any, args: Any
) -> tuple[Any, Any]:
  """The rule of `_zero_or_once` for `jax.vmap`: the carry is batched throughout."""
  each_when, each_carry, each_args = batched
  carry = jax.tree.map(
    lambda x, each: x if each else jnp.broadcast_to(x, (size, *x.shape)), carry, each_carry
  )
  axes = jax.tree.map(lambda each: 0 if each else None, each_args)
  if not each_when:
    in_axes = axes[0], *[0] * len(carry), *axes[1]
    new = _zero_or_once(jax.vmap(fn, in_axes=in_axes), when, carry, args)
  else:

    def member(when: jax.Array, carry: Any, args: Any) -> Any:
      return keep(when, lambda carry, args: fn(args[0], *carry, *args[1]), carry, args)

    def selected(given: Any, *carry: Any) -> Any:
      when, args = given
      return jax.vmap(member, in_axes=(0, 0, axes))(when, list(carry), args)

    new = _zero_or_once(selected, when.any(), carry, ((when, args), []))
  return new, jax.tree.map(lambda _: True, carry)


def _branch(fn: Callable[..., Any], when: jax.Array, carry: Any, args: Any) -> Any:
  """`_zero_or_once` as a branch, which can be differentiated."""

  def then(carry: Any, args: Any) -> Any:
    return fn(args[0], *carry, *args[1])

  return jax.lax.cond(when, then, lambda carry, _: carry, carry, args)


@_zero_or_once.defjvp
def _zero_or_once_jvp(fn: Callable[..., Any], primals: Any, tangents: Any) -> Any:
  return jax.jvp(functools.partial(_branch, fn), primals, tangents)
