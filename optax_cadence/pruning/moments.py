"""Clears an optimizer's moments of pruned entries, wherever the optimizer stands."""

from typing import Any

import jax.numpy as jnp
import optax


def clear_moments(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """An optimizer that forgets entries whose parameter is exactly zero, as pruned ones are.

  It needs no masks, so it works inside a cadence, whose regions it sees as tensors:
  `oc.cadence(pruning.clear_moments(optax.adam(1e-3)), 8)`. Parameters of fewer than two axes
  are left alone. Without it moments are kept.

  >>> import optax
  >>> from optax_cadence import pruning
  >>> tx = pruning.clear_moments(optax.adam(1e-3))
  """
  inner = optax.with_extra_args_support(inner)

  def clear(moment: Any, param: Any) -> Any:
    if isinstance(moment, optax.MaskedNode) or jnp.shape(moment) != jnp.shape(param):
      return moment
    return jnp.where(param == 0, jnp.zeros_like(moment), moment) if param.ndim > 1 else moment

  def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
    if params is None:
      raise ValueError("clear_moments needs the parameters: expected params, found None")
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    state = optax.tree_utils.tree_map_params(inner, clear, state, params, is_leaf=masked)
    return inner.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(inner.init, update)
