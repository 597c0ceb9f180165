"""What a person or a loss reads of the masks in an optimizer state."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_cadence import _paths
from optax_cadence.pruning import packing as bits
from optax_cadence.pruning.transformation import PruneState


def find(state: Any) -> PruneState:
  """The one `PruneState` within the state of an optimizer.

  Raises:
    ValueError: If there is none, or more than one.
  """
  found = [s for s in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(s)]
  if len(found) != 1:
    raise ValueError(f"state: expected one PruneState, found {len(found)}")
  return found[0]


def _is_state(node: Any) -> bool:
  return isinstance(node, PruneState)


def masks(params: Any, state: Any) -> Any:
  """The masks as a tree like the parameters: bool, True where nothing was pruned."""
  held = find(state).masks
  made = []
  for path, x in _paths.flatten_with_paths(params):
    mask = held.get(_paths.join(path))
    if mask is not None and mask.dtype == jnp.uint8:
      mask = bits.unpack(mask, jnp.shape(x))
    made.append(jnp.ones(jnp.shape(x), bool) if mask is None else mask)
  return jax.tree.unflatten(jax.tree.structure(params), made)


def with_masks(state: Any, new: Any) -> Any:
  """The state with other masks: a bool tree like the parameters, of the old shapes or new ones.

  After growth: pad what `masks` returned with True as the parameters were padded.
  """
  by_path = {_paths.join(path): m for path, m in _paths.flatten_with_paths(new)}

  def visit(node: Any) -> Any:
    if not _is_state(node):
      return node
    made = {p: by_path[p] if m.dtype == jnp.bool_ else bits.pack(by_path[p])
            for p, m in node.masks.items()}  # fmt: skip
    return node._replace(masks=made)

  find(state)
  return jax.tree.map(visit, state, is_leaf=_is_state)


def masked(params: Any, state: Any) -> Any:
  """The parameters with pruned entries 0, whose gradient goes straight through to all of them.

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
