"""Runs a branch zero times or once without copying what it leaves alone.

A branch of `lax.cond` that returns an operand unchanged copies it; a loop that runs
zero times leaves its carry where it is. A loop cannot be differentiated in reverse,
so under differentiation the same computation is a `lax.cond`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


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
  carry = jax.tree.map(_strong, carry)
  if isinstance(when, bool):
    return cast_like(fn(carry, consts), carry) if when else carry
  run, hoisted = _hoist(lambda carry, consts: cast_like(fn(carry, consts), carry), carry, consts)
  return _zero_or_once(run, when, carry, (hoisted, consts))


def cast_like(tree: Any, like: Any) -> Any:
  """`tree` with the dtypes of `like`, none of them weak.

  Raises:
    ValueError: If the trees differ in structure or in the shape of a leaf.
  """

  def cast(x: Any, old: jax.Array) -> jax.Array:
    if jnp.shape(x) != old.shape:
      raise ValueError(
        f"an optimizer's state must keep its shapes: expected {old.shape} as before the update,"
        f" found {jnp.shape(x)}"
      )
    return _strong(x, old.dtype)

  return jax.tree.map(cast, tree, like)


def _strong(x: Any, dtype: Any = None) -> jax.Array:
  x = jnp.asarray(x)
  if jnp.issubdtype(x.dtype, jax.dtypes.extended):
    return x
  return jax.lax.convert_element_type(x, x.dtype if dtype is None else dtype)


def _hoist(fn: Callable[..., Any], carry: Any, consts: Any) -> tuple[Callable[..., Any], Any]:
  """`fn` as a function of what it closes over, and that.

  `jax.closure_convert` leaves integers behind, which a `custom_jvp` may not close over.
  """
  closed, out = jax.make_jaxpr(fn, return_shape=True)(carry, consts)

  def run(hoisted: Any, carry: Any, consts: Any) -> Any:
    flat = jax.core.eval_jaxpr(closed.jaxpr, hoisted, *jax.tree.leaves((carry, consts)))
    return jax.tree.unflatten(jax.tree.structure(out), flat)

  return run, closed.consts


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _zero_or_once(fn: Callable[..., Any], when: jax.Array, carry: Any, args: Any) -> Any:
  hoisted, consts = args

  def body(loop: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
    return jnp.zeros_like(when), fn(hoisted, loop[1], consts)

  return jax.lax.while_loop(lambda loop: loop[0], body, (when, carry))[1]


@_zero_or_once.defjvp
def _zero_or_once_jvp(fn: Callable[..., Any], primals: Any, tangents: Any) -> Any:
  def branch(when: jax.Array, carry: Any, args: Any) -> Any:
    return jax.lax.cond(when, lambda c, args: fn(args[0], c, args[1]), lambda c, _: c, carry, args)

  return jax.jvp(branch, primals, tangents)
