"""An optimizer's state, for entries of the parameters that are new to it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax


def restarted(
  inner: optax.GradientTransformation, state: optax.OptState, params: Any, new: Any
) -> optax.OptState:
  """The state of an optimizer that meets some entries of the parameters for the first time.

  What it keeps for each entry starts anew where the entry is new. What it keeps for a leaf in
  another shape starts anew with the whole leaf. What stands beside trees like the parameters in a
  state, as Adam's counter does, starts anew if every entry of these is new. Anything else, such as
  the counter of a schedule, is no matter of the parameters and stays.

  A transformation that knows better has a method `restarted(state, params, new)`, which is found
  through its `update`: a cadence cuts the entries as it cuts the parameters. A state that knows
  better what starts anew of it has a method `emptied(fresh)`.

  Args:
    inner: The optimizer.
    state: Its state.
    params: The parameters, with the new entries.
    new: Tree of bool arrays like the parameters: True where an entry is new.

  Raises:
    ValueError: If the state does not follow the parameters.
  """
  owner: Any = getattr(inner.update, "__self__", None)
  if hasattr(owner, "restarted"):
    return owner.restarted(state, params, new)

  def follow(part: Any) -> _Followed:
    return _Followed(jax.tree.map(lambda mask, x: jax.tree.map(as_part(mask), x), new, part))

  def as_part(mask: jax.Array) -> Any:
    return lambda x: mask if jnp.shape(x) == mask.shape else mask.all()

  try:
    # Every tree like the parameters is a leaf here, and so followed as a whole.
    flags = optax.tree_utils.tree_map_params(
      inner, follow, state, transform_non_params=lambda _: _OTHER, is_leaf=lambda _: True
    )
  except (TypeError, ValueError, AttributeError) as error:
    raise ValueError(
      "restart=True: expected an inner optimizer whose state follows the parameters, as"
      f" optax.tree_utils.tree_map_params understands it, found {type(state).__name__}: {error}"
    ) from error
  return _merged(flags, inner.init(params), state)


@dataclasses.dataclass(frozen=True)
class _Followed:
  """For a tree like the parameters, which entries of it start anew."""

  new: Any


_OTHER = object()  # what is no tree like the parameters


def _merged(flags: Any, fresh: Any, old: Any) -> Any:
  """The old state, with what starts anew from a fresh one."""

  def is_part(node: Any) -> bool:
    return _is_named(node) or node is _OTHER or isinstance(node, _Followed)

  def merge(flag: Any, fresh: Any, old: Any) -> Any:
    if isinstance(flag, _Followed):
      return jax.tree.map(jnp.where, flag.new, fresh, old)
    if not _is_named(flag):
      return old
    everything = [
      mask.all()
      for field in flag
      if isinstance(field, _Followed)
      for mask in jax.tree.leaves(field.new)
    ]
    beside = old.emptied(fresh) if hasattr(old, "emptied") else fresh
    fields = []
    for name in flag._fields:
      field, x = getattr(flag, name), getattr(old, name)
      if field is not _OTHER:
        fields.append(_merged(field, getattr(fresh, name), x))
      elif everything:
        fields.append(_where(jnp.stack(everything).all(), getattr(beside, name), x))
      else:
        fields.append(x)
    return type(flag)(*fields)

  return jax.tree.map(merge, flags, fresh, old, is_leaf=is_part)


def _where(flag: jax.Array, fresh: Any, old: Any) -> Any:
  return jax.tree.map(lambda x, y: jnp.where(flag, x, y), fresh, old)


def _is_named(node: Any) -> bool:
  return isinstance(node, tuple) and hasattr(node, "_fields")
