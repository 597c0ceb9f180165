"""Calls the inner optimizer on the tensors of one group.

Here its state is matched to them: restored where a framework has rebuilt it, explained
where it belongs to other parameters, and told apart where a window is empty.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _paths


def update(
  inner: optax.GradientTransformationExtraArgs,
  grads: Any,
  state: optax.OptState,
  params: Any,
  extra_args: Mapping[str, Any],
) -> tuple[Any, optax.OptState]:
  """`inner.update`, with an error that says so where the state is that of other tensors.

  Raises:
    ValueError: If a leaf of the state does not fit the gradients.
  """
  try:
    return inner.update(grads, state, params, **extra_args)
  except (TypeError, ValueError) as error:
    expected = jax.eval_shape(inner.init, grads if params is None else params)
    difference = _paths.mismatch(expected, state)
    if difference is None:
      raise
    raise ValueError(
      f"state of the inner optimizer, {difference} (a state goes with the parameters and cadences"
      " it was made for)"
    ) from error


def restored(inner: optax.GradientTransformation, state: Any, tensors: Any) -> optax.OptState:
  """The state in the containers that `init` makes.

  `nnx.Optimizer` turns a tuple below a parameter, as a leaf cut into several tensors is,
  into containers of its own.
  """
  made = jax.tree.structure(jax.eval_shape(inner.init, tensors))
  return jax.tree.unflatten(made, jax.tree.leaves(state))


def like(state: optax.OptState, old: Any) -> Any:
  """The state in the containers of `old`."""
  return jax.tree.unflatten(jax.tree.structure(old), jax.tree.leaves(state))


def filled(inner: optax.GradientTransformation, state: optax.OptState, tensors: Any) -> Any:
  """Which leaves of a state belong to tensors whose window is not empty.

  Args:
    inner: The inner optimizer.
    state: Its state.
    tensors: Tree of bool scalars, one per tensor of the group.

  Returns:
    A tree like the state; what belongs to no tensor goes with any that is not empty.

  Raises:
    ValueError: If the state does not follow the parameters.
  """
  any_filled = jnp.stack(jax.tree.leaves(tensors)).any()
  try:
    return optax.tree_utils.tree_map_params(
      inner,
      lambda x, flag: x if _is_masked(x) else flag,
      state,
      tensors,
      transform_non_params=lambda _: any_filled,
      is_leaf=_is_masked,
    )
  except (TypeError, ValueError, AttributeError) as error:
    raise ValueError(
      'nonfinite="skip" expected an inner optimizer whose state follows the parameters, as'
      f" optax.tree_utils.tree_map_params understands it, found {type(state).__name__}"
    ) from error


def _is_masked(node: Any) -> bool:
  return isinstance(node, optax.MaskedNode)
