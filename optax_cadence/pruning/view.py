"""What a person or a loss reads of the masks in an optimizer state."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_cadence import _paths
from optax_cadence.pruning import masking
from optax_cadence.pruning import packing
from optax_cadence.pruning.transformation import PruneState


def find(state: Any) -> PruneState:
  """The one `PruneState` within the state of an optimizer.

  Raises:
    ValueError: If there is none, or more than one.
  """
  found = [node for node in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(node)]
  if len(found) != 1:
    raise ValueError(f"state: expected one PruneState, found {len(found)}")
  return _paths.without_variables(found[0])


def _is_state(node: Any) -> bool:
  return isinstance(node, PruneState)


def masks(params: Any, state: Any) -> Any:
  """The masks as a tree like the parameters: bool, True where a weight is kept.

  A leaf that is not pruned has a mask that is all True.
  """
  stored = masking.by_path(find(state).masks)

  def mask_of(path: _paths.Path, shape: tuple[int, ...]) -> jax.Array:
    mask = stored.get(path)
    if mask is None:
      return jnp.ones(shape, bool)
    return packing.unpack(mask, shape) if mask.dtype == jnp.uint8 else mask

  leaves = [mask_of(path, jnp.shape(x)) for path, x in _paths.flatten_with_paths(params)]
  return jax.tree.unflatten(jax.tree.structure(params), leaves)


def with_masks(state: Any, new: Any) -> Any:
  """The state with other masks.

  After growth: pad what `masks` returned with True as the parameters were padded.

  Args:
    state: Optimizer state with a `PruneState` in it.
    new: Masks as a bool tree like the parameters, of their old shapes or of new ones.
  """
  by_path = masking.by_path(new)

  def replace(node: Any) -> Any:
    if not _is_state(node):
      return node
    stored = {
      path: by_path[path] if old.dtype == jnp.bool_ else packing.pack(by_path[path])
      for path, old in masking.by_path(node.masks).items()
    }
    # In the containers they were in, which are variables in an `nnx.Optimizer`.
    arrays = jax.tree.leaves(masking.nested(stored))
    return node._replace(masks=jax.tree.unflatten(jax.tree.structure(node.masks), arrays))

  find(state)  # an error if there is not exactly one
  return jax.tree.map(replace, state, is_leaf=_is_state)


def masked(params: Any, state: Any) -> Any:
  """The parameters with 0 in place of pruned entries; gradients pass to all entries unchanged.

  >>> import jax, jax.numpy as jnp, optax_cadence as oc
  >>> from optax_cadence import pruning
  >>> tx = oc.prune(0.5, every=1, straight_through=True)
  >>> params = {"w": jnp.array([[1.0, 2.0]])}
  >>> _, state = tx.update(params, tx.init(params), params)
  >>> print(pruning.masked(params, state)["w"])
  [[0. 2.]]
  """
  return jax.tree.map(_straight_through, params, masks(params, state))


@jax.custom_jvp
def _straight_through(param: jax.Array, mask: jax.Array) -> jax.Array:
  return jnp.where(mask, param, jnp.zeros_like(param))


@_straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> Any:
  return _straight_through(*primals), tangents[0]
