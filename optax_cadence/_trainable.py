"""Cuts parameters out of the backward pass where their gradient would go unused."""

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _cadence
from optax_cadence import _layout
from optax_cadence import _schedules


def trainable(params: optax.Params, tx: _cadence.CadenceTransformation, phase: int) -> optax.Params:
  """Stops the gradient of regions that cannot use this micro-step's.

  With `accumulate="latest"` only the gradient of the micro-step that is due counts. Take
  the gradient of `loss(oc.trainable(params, tx, phase), batch)` and the compiler drops
  the rest from the backward pass. Other cadences use every gradient: nothing is stopped.

  Args:
    params: Parameters, as given to `tx.init`.
    tx: A cadence, or an `oc.chain` that ends in one.
    phase: t modulo `tx.cycle`, a Python int.

  Returns:
    The parameters, with the same values.

  Raises:
    ValueError: If the phase is traced or outside the cycle.

  >>> import jax, jax.numpy as jnp, optax, optax_cadence as oc
  >>> params = {"body": jnp.float32(2.0), "head": jnp.float32(3.0)}
  >>> tx = oc.cadence(optax.sgd(0.1), {"body": 2, "head": 1}, accumulate="latest")
  >>> loss = lambda p: p["body"] * p["head"]
  >>> grads = jax.grad(lambda p: loss(oc.trainable(p, tx, phase=1)))(params)
  >>> print(grads["body"], grads["head"])
  0.0 2.0
  """
  cadence = _cadence.of(tx)
  layout = cadence.layout(params)
  static_phase = _schedules.checked_phase(phase, cadence.cycle)
  if cadence.accumulate != "latest":
    return params
  leaves = dict(enumerate(map(jnp.asarray, jax.tree.leaves(params))))
  for group in layout.groups:
    if not group.every.due(static_phase):
      leaves = _stop(group, leaves)
  return layout.treedef.unflatten(leaves.values())


def _stop(group: _layout.Group, leaves: dict[int, jax.Array]) -> dict[int, jax.Array]:
  return group.put(leaves, [jax.lax.stop_gradient(x) for x in group.take(leaves)])
