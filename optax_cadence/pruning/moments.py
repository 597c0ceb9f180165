"""An optimizer that forgets what it knew of pruned entries, wherever it stands."""

from typing import Any

import jax.numpy as jnp
import optax


def clear_moments(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """Sets the moments of an optimizer to zero wherever the parameter is exactly zero.

  Since pruned parameters are zero, it needs no masks, and works inside a cadence, which shows it
  regions as tensors: `oc.cadence(pruning.clear_moments(optax.adam(1e-3)), 8)`. Parameters of
  fewer than two axes are left alone.

  Args:
    inner: The optimizer.

  Returns:
    The optimizer; before each update it clears these moments. It needs `params`.

  >>> import optax
  >>> from optax_cadence import pruning
  >>> tx = pruning.clear_moments(optax.adam(1e-3))
  """
  inner = optax.with_extra_args_support(inner)

  def clear(moment: Any, param: Any) -> Any:
    if _is_masked(moment) or jnp.shape(moment) != jnp.shape(param):
      return moment
    return jnp.where(param == 0, jnp.zeros_like(moment), moment) if param.ndim > 1 else moment

  def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
    if params is None:
      raise ValueError("clear_moments needs the parameters: expected params, found None")
    state = optax.tree_utils.tree_map_params(inner, clear, state, params, is_leaf=_is_masked)
    return inner.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(inner.init, update)


def _is_masked(node: Any) -> bool:
  return isinstance(node, optax.MaskedNode)
