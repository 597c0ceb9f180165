"""The optimizer inside: which gradients it sees, when it rests, and what it forgets."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _control
from optax_cadence import _paths
from optax_cadence import _restart


def updates(
  inner: optax.GradientTransformationExtraArgs,
  grads: optax.Updates,
  state: optax.OptState,
  params: optax.Params,
  extra_args: Mapping[str, Any],
  kept: Mapping[_paths.Path, jax.Array],
  rests: Any = False,
) -> tuple[optax.Updates, optax.OptState]:
  """The updates of the optimizer, and its new state.

  Args:
    inner: The optimizer.
    grads: Gradients.
    state: State of the optimizer.
    params: Parameters.
    extra_args: Further arguments of the optimizer.
    kept: By path, the masks of the leaves of which it sees 0 as the gradient of a pruned weight.
    rests: Whether it does nothing this time: a bool or a boolean scalar.
  """

  def kept_of(path: _paths.Path, grad: jax.Array) -> jax.Array:
    return jnp.where(kept[path], grad, jnp.zeros_like(grad)) if path in kept else grad

  def update(grads: Any, state: Any) -> Any:
    return inner.update(grads, state, params, **extra_args)

  grads = _paths.map_with_paths(kept_of, grads) if kept else grads
  if rests is False:
    return update(grads, state)
  like, _ = jax.eval_shape(update, grads, state)
  nothing = jax.tree.map(lambda x, grad: jnp.zeros_like(grad, x.dtype), like, grads)
  # Gradients are handed in, so that they are read only where it does not rest.
  return _control.maybe(
    jnp.logical_not(rests), lambda carry, grads: update(grads, carry[1]), (nothing, state), grads
  )


def restarted(
  inner: optax.GradientTransformationExtraArgs,
  state: optax.OptState,
  params: optax.Params,
  entries: Mapping[_paths.Path, jax.Array],
) -> optax.OptState:
  """The state of the optimizer without what it knew of these entries."""

  def new(path: _paths.Path, x: Any) -> jax.Array:
    return entries.get(path, jnp.zeros(jnp.shape(x), bool))

  return _restart.restarted(inner, state, params, _paths.map_with_paths(new, params))
