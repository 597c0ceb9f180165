"""An optimizer's state, for entries of the parameters that are new to it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _inner


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

  def of_leaf(mask: jax.Array, kept: Any) -> Any:
    return jax.tree.map(lambda x: mask if jnp.shape(x) == mask.shape else mask.all(), kept)

  def follow(part: Any) -> _Followed:
    return _Followed(jax.tree.map(of_leaf, new, part))

  flags = _inner.mapped("restart=True", inner, state, follow, lambda _: _OTHER)
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
        choose = functools.partial(jnp.where, jnp.stack(everything).all())
        fields.append(jax.tree.map(choose, getattr(beside, name), x))
      else:
        fields.append(x)
    return type(flag)(*fields)

  return jax.tree.map(merge, flags, fresh, old, is_leaf=is_part)


def _is_named(node: Any) -> bool:
  return isinstance(node, tuple) and hasattr(node, "_fields")
