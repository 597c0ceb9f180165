"""The optimizer inside: which gradients it sees, when it rests, and what it forgets."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _control
from optax_cadence import _paths
from optax_cadence import _restart


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """An optimizer around which `prune` stands.

  Attributes:
    inner: The optimizer.
    sparse_gradients: Whether it sees 0 as the gradient of a pruned weight.
    restarts: Whether it forgets what it knew of weights that are filled or grown.
  """

  inner: optax.GradientTransformationExtraArgs
  sparse_gradients: bool
  restarts: bool

  def update(
    self,
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    kept: Mapping[_paths.Path, jax.Array],
    extra_args: Mapping[str, Any],
    rests: Any = False,
  ) -> tuple[optax.Updates, optax.OptState]:
    """The updates and the new state.

    Args:
      grads: Gradients.
      state: State of the optimizer.
      params: Parameters.
      kept: By path, the masks of the weights; only read with `sparse_gradients`.
      extra_args: Further arguments of the optimizer.
      rests: Whether it does nothing this time: a bool or a boolean scalar.
    """
    if self.sparse_gradients:
      by_path = dict(_paths.flatten_with_paths(grads))
      for path, mask in kept.items():
        by_path[path] = jnp.where(mask, by_path[path], jnp.zeros_like(by_path[path]))
      grads = jax.tree.unflatten(jax.tree.structure(grads), list(by_path.values()))

    def update(grads: Any, state: Any) -> Any:
      return self.inner.update(grads, state, params, **extra_args)

    if rests is False:
      return update(grads, state)
    updates, _ = jax.eval_shape(update, grads, state)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), updates)
    # Gradients are handed in, so that they are read only where it does not rest.
    return _control.maybe(
      jnp.logical_not(rests), lambda carry, grads: update(grads, carry[1]), (nothing, state), grads
    )

  def restarted(
    self, state: optax.OptState, params: optax.Params, entries: dict[_paths.Path, jax.Array]
  ) -> optax.OptState:
    """The state; if `restarts`, without what it knew of these entries."""
    if not self.restarts:
      return state
    new = [
      entries.get(path, jnp.zeros(jnp.shape(x), bool))
      for path, x in _paths.flatten_with_paths(params)
    ]
    new = jax.tree.unflatten(jax.tree.structure(params), new)
    return _restart.restarted(self.inner, state, params, new)
