"""One norm for all that is due at a micro-step: see `clip_norm` of `cadence`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_cadence import _control
from optax_cadence import _sharding
from optax_cadence import _step
from optax_cadence._state import State
from optax_cadence.confidence import statistics
from optax_cadence.regions.layout import Group
from optax_cadence.regions.layout import Leaves


def clipped(
  call: _step.Call,
  state: State,
  grads: Leaves | None,
  turns: Mapping[str, _step.Turn],
  targets: Leaves,
) -> _step.Call:
  """The call, with what to multiply the means that fire with, to limit their norm together.

  Its `scale` is a float32 scalar of at most 1. A NaN does not reach the updates of other windows by
  it: it clips nothing. The gradients are those that leaves under masks have not gathered yet; None
  in a flush.

  Raises:
    ValueError: If some parameters are sharded over an axis of `jax.shard_map` and others are not.
  """
  _check_axes(call, turns)
  square = jnp.float32(0)
  for group in call.layout.groups:
    turn = turns[group.name]
    if not group.tensors or turn.fires is False:
      continue

    def measure(_: Any, consts: Any, turn: _step.Turn = turn, group: Group = group) -> jax.Array:
      window = turn.window._replace(sums=consts[0], length=consts[1], weights=consts[2])
      return statistics.squared_norms(_step.reduced(call, group, window)).sum()

    consts = turn.window.sums, turn.window.length, turn.window.weights
    square += _control.maybe(turn.fires, measure, jnp.float32(0), consts)
  if state.masks is not None and call.layout.masked:
    from optax_cadence.entrywise import masks

    square += masks.squared_norm(call, state.masks, grads, turns, targets)
  norm = jnp.sqrt(square)
  largest = jnp.asarray(call.clip_norm, jnp.float32)
  return dataclasses.replace(call, scale=jnp.where(norm > largest, largest / norm, 1))


def _check_axes(call: _step.Call, turns: Mapping[str, _step.Turn]) -> None:
  """Raises where the norm of a shard would scale what has to be the same on all shards."""
  found: dict[frozenset[Any], int] = {}
  for group in call.layout.groups:
    turn = turns[group.name]
    if turn.fires is False:
      continue
    for t, x in zip(group.tensors, turn.window.sums, strict=True):
      found.setdefault(_sharding.axes_of(x), t.leaf)
  if len(found) > 1:
    shown = [
      f"{call.layout.name(leaf)!r} over {', '.join(sorted(map(str, axes))) or 'none'}"
      for axes, leaf in found.items()
    ]
    raise ValueError(
      "clip_norm: expected gradients that vary over the same axes of jax.shard_map, found that of"
      f" {' and that of '.join(shown)}: every shard has a norm of its own; clip in front of the"
      " cadence, by a norm that jax.lax.psum adds up over the shards, or shard with jax.jit alone"
    )
