"""A micro-step of one group with four kinds of branch.

A small copy of what the library does, so that the kinds can be compared on a new backend. The
library's own code is not used.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

KINDS = ("while_loop", "cond", "select")  # the fourth: a phase that is known while tracing


def maybe(kind: str, when: Any, fn: Any, carry: Any, *consts: Any) -> Any:
  """`fn(carry, *consts)` if `when`, else `carry`."""
  if isinstance(when, bool):
    return fn(carry, *consts) if when else carry
  if kind == "cond":
    return jax.lax.cond(when, fn, lambda carry, *_: carry, carry, *consts)
  if kind == "select":
    fired = fn(carry, *consts)
    return jax.tree.map(lambda new, old: jnp.where(when, new, old), fired, carry)

  def body(loop: Any) -> Any:
    return jnp.zeros_like(loop[0]), fn(loop[1], *consts)

  return jax.lax.while_loop(lambda loop: loop[0], body, (when, carry))[1]


def init(tx: optax.GradientTransformation, params: Any) -> Any:
  """State: that of the optimizer, accumulators, and number of micro-steps in the window."""
  return tx.init(params), jax.tree.map(jnp.zeros_like, params), jnp.int32(0)


def stepper(tx: optax.GradientTransformation, period: int, kind: str, phase: Any = None) -> Any:
  """A micro-step that accumulates and fires every `period`; with a `phase`, without a branch."""

  def fire(carry: Any, sums: Any) -> Any:
    params, inner = carry
    grads = jax.tree.map(lambda total: total / period, sums)
    updates, inner = tx.update(grads, inner, params)
    return optax.apply_updates(params, updates), inner

  def step(params: Any, state: Any, grads: Any) -> Any:
    inner, sums, n = state
    sums = jax.tree.map(lambda total, g: jnp.where(n == 0, g, total + g), sums, grads)
    due = n == period - 1 if phase is None else phase % period == 0
    params, inner = maybe(kind, due, fire, (params, inner), sums)
    return params, (inner, sums, jnp.where(n == period - 1, 0, n + 1))

  return step
