"""Cuts parameters out of the backward pass where their gradient would go unused."""

import jax
import optax

from optax_cadence import _cadence
from optax_cadence import _sharding
from optax_cadence.regions import cuts
from optax_cadence.regions import layout as layouts
from optax_cadence.schedules import phases
from optax_cadence.schedules.phases import Phase


def trainable(
  params: optax.Params, tx: _cadence.CadenceTransformation, phase: int | Phase
) -> optax.Params:
  """Stops the gradient of regions that cannot use this micro-step's.

  With `accumulate="latest"` only the gradient of the micro-step that is due counts. Take
  the gradient of `loss(oc.trainable(params, tx, phase), batch)` and the compiler drops
  the rest from the backward pass. Other cadences use every gradient: nothing is stopped.

  Args:
    params: Parameters, as given to `tx.init`.
    tx: A cadence, or an `oc.chain` that ends in one.
    phase: Of `oc.phases`, or t modulo `tx.cycle`, a Python int.

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
  cadence = _cadence.of(tx, "oc.trainable(params, tx, phase)")
  layout = cadence.groups_of(params)
  due = phases.checked(phase, layout.everys).due
  if cadence.accumulate != "latest":
    return params
  leaves = layouts.leaves_of(params)
  for group in layout.groups:
    if group.name in due:
      continue
    for t in group.tensors:
      leaf = leaves[t.leaf]
      whole = cuts.gathered(leaf, [t.cut])
      stopped = t.cut.put(t.cut.view(whole), jax.lax.stop_gradient(t.cut.take(whole)))
      leaves[t.leaf] = _sharding.lying_as(stopped.reshape(leaf.shape), leaf)
  return layout.treedef.unflatten(leaves.values())
