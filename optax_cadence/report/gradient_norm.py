"""The norm of the gradients that an optimizer is given, for a logger."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_cadence.confidence import statistics


class GradientNormState(NamedTuple):
  """State of `gradient_norm`.

  Attributes:
    norm: Norm of the last gradients, 0 before the first: float32 scalar.
  """

  norm: jax.Array


def gradient_norm() -> optax.GradientTransformation:
  """Measures the norm of the gradients, which it passes on, for `oc.metrics(state, by="group")`.

  First inside a cadence, `oc.cadence(optax.chain(oc.gradient_norm(), optax.adamw(3e-4)), every)`,
  it is the norm of the mean gradient of each group, and costs one more reading of that when the
  group fires, nothing at other micro-steps. It looks at all entries at once: those of a random mask
  fall into a vector for each period then.

  Returns:
    A gradient transformation.

  >>> import jax.numpy as jnp, optax, optax_cadence as oc
  >>> tx = oc.cadence(optax.chain(oc.gradient_norm(), optax.sgd(0.1)), 1)
  >>> _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
  >>> print(oc.metrics(state, by="group")["1/gradient_norm"])
  5.0
  """

  def init(params: optax.Params) -> GradientNormState:
    del params
    return GradientNormState(jnp.float32(0))

  def update(
    updates: optax.Updates, state: GradientNormState, params: Any = None
  ) -> tuple[optax.Updates, GradientNormState]:
    del state, params
    leaves = jax.tree.leaves(updates)
    square = statistics.squared_norms(leaves).sum() if leaves else jnp.float32(0)
    return updates, GradientNormState(jnp.sqrt(square))

  return optax.GradientTransformation(init, update)
