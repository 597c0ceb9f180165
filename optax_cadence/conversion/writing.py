"""Writes the state of a cadence, or of `optax.MultiSteps`, that holds what was read."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _paths
from optax_cadence import _window
from optax_cadence._state import GroupState
from optax_cadence.conversion import merging
from optax_cadence.conversion import reading
from optax_cadence.conversion.merging import Merged
from optax_cadence.conversion.sources import Sources
from optax_cadence.regions.layout import Leaves
from optax_cadence.regions.layout import leaves_of
from optax_cadence.schedules.every import Every


def written(sources: Sources, new: Any, params: Any, counters: str) -> Any:
  """A state that holds what was read."""
  fresh, leaves = new.init(params), leaves_of(params)
  if isinstance(new, optax.MultiSteps):
    return _multi_steps_state(sources, new, fresh, params, leaves, counters)
  layout, groups = new.layout_of(fresh, params), dict(fresh.groups)
  moments: dict[Any, Any] = {}
  totals: dict[int, jax.Array] = {}
  for group, regions in reading.regions_of(layout):
    merged = Merged(sources, group.name, regions, leaves, counters)
    state = groups[group.name]
    merged.check_windows(state.accumulators is not None, new.by_region, new.weighted)
    tensors = [leaves[r.leaf] if r.masked else r.take(leaves[r.leaf]) for r in regions]
    whole = jax.eval_shape(new.inner.of(group.every).init, layout.tree(group, tensors))
    carried = merged.inner_state(params, whole)
    moments |= carried
    inner_state = _picked(group.name, state.inner_state, carried)
    if sources.by_micro_steps and new.set_schedules is None:
      inner_state = _counting_updates(inner_state, merged)
    sums = []
    if state.accumulators is not None:
      for region in regions:
        total = merged.total(region, new.sum_dtype(leaves[region.leaf].dtype))
        if region.masked:
          totals[region.leaf] = total
        else:
          sums.append(total)
    groups[group.name] = _group_state(merged, group.every, state, inner_state, sums)
  masks = fresh.masks
  if masks is not None and layout.masked:
    masks = masks._replace(inner_state=_picked("masks", masks.inner_state, moments))
    if masks.accumulators is not None:
      structure = jax.tree.structure(masks.accumulators)
      found = [totals[leaf] for leaf in layout.masked]
      masks = masks._replace(accumulators=jax.tree.unflatten(structure, found))
  micro_step = jnp.int32(sources.micro_step)
  return fresh._replace(micro_step=micro_step, groups=groups, masks=masks)


def _group_state(
  merged: Merged, every: Every, fresh: GroupState, inner_state: Any, sums: Iterable[jax.Array]
) -> GroupState:
  state = fresh._replace(
    inner_state=inner_state,
    updates=jnp.int32(merged.chosen.updates),
    fired=jnp.int32(any(group.fired for group in merged.groups)),
  )
  if state.accumulators is not None:
    structure = jax.tree.structure(state.accumulators)
    state = state._replace(accumulators=jax.tree.unflatten(structure, sums))
  if state.remaining is not None:
    remaining, period = merged.rhythm(every)
    state = state._replace(remaining=jnp.int32(remaining), period=jnp.int32(period))
  if state.window is not None:
    lengths = list(map(merged.length, merged.regions))
    state = state._replace(
      window=jnp.asarray(lengths if state.window.ndim else lengths[0], jnp.int32)
    )
  if state.weight is not None:
    state = state._replace(weight=jnp.asarray([*map(merged.weight, merged.regions)], jnp.float32))
  if state.skipped is not None:
    state = state._replace(skipped=jnp.asarray([*map(merged.skipped, merged.regions)], jnp.int32))
  if state.confidence is not None:
    state = state._replace(confidence=merged.confidence(every, state.confidence))
  return state


def _picked(group: str, fresh: Any, carried: Mapping[Any, Any]) -> Any:
  """An inner state with what is carried in it.

  Raises:
    ValueError: If something is not there that the cadence does not set itself.
  """

  def pick(keys: Any, x: Any) -> Any:
    return x if carried[keys] is merging.FRESH else carried[keys]

  def settled(old: Any, new: Any) -> Any:
    missing = any(isinstance(x, merging.Missing) for x in jax.tree.leaves(new))
    return old if missing and _window.listens(old) else new

  picked = jax.tree_util.tree_map_with_path(pick, fresh)
  picked = jax.tree.map(settled, fresh, picked, is_leaf=_window.listens)
  for keys, x in _paths.by_keys(picked).items():
    if isinstance(x, merging.Missing):
      where = f"inner_state{jax.tree_util.keystr(keys)}"
      raise ValueError(f"convert: {where} of group {group!r} cannot be carried: {x.why}")
  return picked


def _counting_updates(inner_state: Any, merged: Merged) -> Any:
  """An inner state whose schedules counted micro-steps, and now count the group's updates."""
  from optax_cadence import _clocks

  return _clocks.set_schedules(inner_state, jnp.int32(merged.chosen.updates))


def _multi_steps_state(
  sources: Sources, new: optax.MultiSteps, fresh: Any, params: Any, leaves: Leaves, counters: str
) -> Any:
  regions = reading.multi_steps_regions(params)
  merged = Merged(sources, reading.MULTI_STEPS, regions, leaves, counters)
  merged.check_windows(accumulates=True, by_region=False, weighted=False)
  inner_state = _picked(
    reading.MULTI_STEPS, fresh.inner_opt_state, merged.inner_state(params, fresh.inner_opt_state)
  )
  if sources.by_micro_steps:
    inner_state = _counting_updates(inner_state, merged)
  n, updates, sums = merged.length(regions[0]), jnp.int32(merged.chosen.updates), fresh.acc_grads
  period = int(new._every_k_schedule(updates))
  if n >= period:
    raise ValueError(
      f"convert: the window has gathered {n} micro-steps, expected fewer than the {period} of"
      f" optax.MultiSteps{merging.OR_FLUSH}"
    )
  if n:  # else they have to be zero
    old = zip(regions, jax.tree.leaves(sums), strict=True)
    found = [merged.total(region, x.dtype, new._use_grad_mean) for region, x in old]
    sums = jax.tree.unflatten(jax.tree.structure(sums), found)
  return fresh._replace(
    mini_step=jnp.int32(n), gradient_step=updates, inner_opt_state=inner_state, acc_grads=sums
  )
