"""Reads the masks in an optimizer state, replaces them, and lays them over parameters."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_cadence import _checks
from optax_cadence import _paths
from optax_cadence import _state
from optax_cadence.pruning import masking
from optax_cadence.pruning import packing
from optax_cadence.pruning.transformation import PruneState


def find(state: Any) -> list[PruneState]:
  """The states of all `prune`s within the state of an optimizer.

  Raises:
    ValueError: If there is none.
  """
  found = _state.states_of(state, PruneState)
  if not found:
    raise ValueError("state: expected the state of a prune in it, found none")
  return [_paths.without_variables(node) for node in found]


def by_path(params: Any, state: Any) -> masking.Leaves:
  """The masks of the leaves that have one, by path; what any of several `prune`s prunes is False.

  Raises:
    ValueError: If a mask is that of another shape.
  """
  leaves = _paths.by_path(params)
  found: masking.Leaves = {}
  for node in find(state):
    for path, stored in _paths.by_path(node.masks).items():
      if path not in leaves:
        raise ValueError(
          f"params: expected the parameters that the state has masks of, among them"
          f" {_paths.join(path)!r}, found {_paths.listed(leaves)}"
        )
      mask = masking.load(path, stored, leaves[path])
      found[path] = found[path] & mask if path in found else mask
  return found


def masks(params: Any, state: Any) -> Any:
  """The masks as a tree like the parameters: bool, True where a weight is kept.

  A leaf that is not pruned has a mask that is all True. Several `prune`s in one chain are read as
  one, as by everything here that takes the state.
  """
  found = by_path(params, state)

  def mask(path: _paths.Path, x: Any) -> jax.Array:
    return found[path] if path in found else jnp.ones(jnp.shape(x), bool)

  return _paths.map_with_paths(mask, params)


def with_masks(state: Any, new: Any, params: Any = None) -> Any:
  """The state with other masks.

  After growth: pad what `masks` returned with True as the parameters were padded.

  Args:
    state: Optimizer state with that of a `prune` in it, or of several.
    new: Masks as a bool tree like the parameters, of their old shapes or of new ones.
    params: The parameters; if given, the masks have to be of their shapes.

  Raises:
    ValueError: If there is no mask for a leaf that is pruned, one that prunes a leaf that is not,
      or one that is no mask of the leaf.
  """
  masks = _paths.by_path(new)
  pruned: set[_paths.Path] = set()
  for node in find(state):
    for path, old in _paths.by_path(node.masks).items():
      pruned.add(path)
      if path not in masks:
        raise ValueError(
          f"masks: expected one for {_paths.join(path)!r}, found masks of {_paths.listed(masks)}"
        )
      # Of a flat packed mask the number of axes is not known.
      axes = None if old.dtype == jnp.uint8 and old.ndim == 1 else old.ndim
      if axes not in (None, jnp.ndim(masks[path])):
        raise ValueError(
          f"mask of {_paths.join(path)!r}: expected {axes} axes, found shape"
          f" {jnp.shape(masks[path])}"
        )
  for path, mask in masks.items():
    name = _paths.join(path)
    if getattr(mask, "dtype", None) != jnp.bool_:
      raise ValueError(f"mask of {name!r}: expected bools, found {_checks.shown(mask)}")
    if path not in pruned and not isinstance(mask, jax.core.Tracer) and not mask.all():
      raise ValueError(
        f"mask of {name!r}: no prune in the state prunes this leaf, expected all True, found False"
      )
  if params is not None:
    _paths.check_same("mask", "as the parameters have", params, new)

  def replace(node: Any) -> Any:
    if not isinstance(node, PruneState):
      return node
    stored = {
      path: masks[path] if old.dtype == jnp.bool_ else packing.pack(masks[path])
      for path, old in _paths.by_path(node.masks).items()
    }
    # In the containers they were in, which are variables in an `nnx.Optimizer`.
    arrays = jax.tree.leaves(_paths.nested(stored))
    return node._replace(masks=jax.tree.unflatten(jax.tree.structure(node.masks), arrays))

  return jax.tree.map(replace, state, is_leaf=lambda node: isinstance(node, PruneState))


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
