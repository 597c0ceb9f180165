"""Reads the state of a cadence, or of `optax.MultiSteps`, as regions and what is kept for them."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cadence import _paths
from optax_cadence import _window
from optax_cadence._state import GroupState
from optax_cadence.conversion.sources import Region
from optax_cadence.conversion.sources import Source
from optax_cadence.conversion.sources import Sources
from optax_cadence.conversion.sources import Window
from optax_cadence.regions.layout import Group
from optax_cadence.regions.layout import Layout
from optax_cadence.regions.layout import layout as lay_out

MULTI_STEPS = "MultiSteps"


def read(old: Any, state: Any, params: Any) -> Sources:
  """What a state holds."""
  if isinstance(old, optax.MultiSteps):
    return _read_multi_steps(old, state, params)
  layout, groups = old.layout_of(state, params), {}
  started = old.init(params) if old.inner.follows_window else None
  held, sums = ((), ()) if state.masks is None else state.masks
  totals = dict(zip(layout.masked, jax.tree.leaves(sums), strict=False))
  for group, regions in regions_of(layout):
    was, places = state.groups[group.name], Places(params, regions)
    slots, numbers = places.split(was.inner_state)
    for where, found in places.split(held)[0].items():
      slots[where] = slots.get(where, {}) | found
    compared, at_first = numbers, {}
    if old.set_schedules is not None:  # they differ by when each has fired last
      compared = places.split(old.set_schedules(was.inner_state, jnp.int32(0)))[1]
    if started is not None:
      at_first = places.split(started.groups[group.name].inner_state)[1]
    elapsed = 0
    if was.remaining is not None:
      policy = group.every.policy
      elapsed = int(was.period if policy is None else policy.max_period) - int(was.remaining)
    groups[group.name] = Source(
      name=group.name,
      every=group.every,
      slots=slots,
      numbers=numbers,
      compared=compared,
      started=at_first,
      windows=_windows(was, regions, totals),
      updates=int(was.updates),
      fired=bool(was.fired),
      elapsed=elapsed,
      state=was,
    )
  return Sources(groups, int(state.micro_step), old.set_schedules is not None)


def _windows(
  state: GroupState, regions: Sequence[Region], totals: Mapping[int, jax.Array]
) -> dict[Region, Window]:
  """The windows of a group's regions; those of leaves under masks have these totals."""
  sums = dict(zip(regions, jax.tree.leaves(state.accumulators), strict=False))
  windows = {}
  for i, region in enumerate(regions):
    total = totals.get(region.leaf) if region.masked else sums.get(region)
    length = 0 if state.window is None else int(_window.item(state.window, i))
    weight = float(length) if state.weight is None else float(state.weight[i])
    skipped = 0 if state.skipped is None else int(state.skipped[i])
    is_mean = total is not None and _window.holds_mean(total)
    windows[region] = Window(total, is_mean, length, weight, skipped)
  return windows


def _read_multi_steps(old: optax.MultiSteps, state: Any, params: Any) -> Sources:
  regions = multi_steps_regions(params)
  slots, numbers = Places(params, regions).split(state.inner_opt_state)
  n, updates = int(state.mini_step), int(state.gradient_step)
  windows = {}
  for region, total in zip(regions, jax.tree.leaves(state.acc_grads), strict=True):
    windows[region] = Window(total, old._use_grad_mean, n, float(n), 0)
  micro_step = n
  if updates:
    lengths = jax.vmap(lambda t: jnp.int32(old._every_k_schedule(t)))(jnp.arange(updates))
    micro_step += int(lengths.sum())
  source = Source(
    name=MULTI_STEPS,
    every=None,
    slots=slots,
    numbers=numbers,
    compared=numbers,
    started={},
    windows=windows,
    updates=updates,
    fired=bool(old.has_updated(state)),
    elapsed=n,
    state=None,
  )
  return Sources({source.name: source}, micro_step, by_micro_steps=False)


def multi_steps_regions(params: Any) -> list[Region]:
  """All parameters as one group, as `MultiSteps` trains them."""
  # Any period would do.
  of_one_group = itertools.chain(*(found for _, found in regions_of(lay_out(2, params))))
  return [dataclasses.replace(region, group=MULTI_STEPS) for region in of_one_group]


def regions_of(layout: Layout) -> Iterator[tuple[Group, list[Region]]]:
  """The groups of a layout that have regions, each with them."""
  names = layout.region_names()
  leaves: Any = {i: jax.ShapeDtypeStruct(x, jnp.float32) for i, x in enumerate(layout.shapes)}
  for group in layout.groups:
    tensors = [*group.take(leaves), *(leaves[t.leaf] for t in group.masked)]
    regions = []
    for name, t, x in zip(names[group.name], group.regions, tensors, strict=True):
      leaf_shape, masked = layout.shapes[t.leaf], t in group.masked
      regions.append(Region(name, group.name, t.leaf, leaf_shape, t.cut, x.shape, masked))
    if regions:
      yield group, regions


class Places:
  """Which region a leaf of an inner state belongs to: its path ends in that of the parameter.

  A parameter that is cut into several tensors has a tuple of them in its place.
  """

  def __init__(self, params: Any, regions: Sequence[Region]):
    paths = list(_paths.by_keys(params))
    pieces: dict[Any, list[Region]] = {}
    for region in regions:
      pieces.setdefault(paths[region.leaf], []).append(region)
    # What is kept in dicts goes by the names in the path.
    self._known = pieces, {tuple(map(_name, keys)): found for keys, found in pieces.items()}

  def of(self, keys: Any, shape: tuple[int, ...]) -> tuple[Any, Region | None]:
    """Where the tree stands in which a leaf takes a parameter's place, and the region."""
    named = tuple(_name(k) if isinstance(k, jax.tree_util.DictKey) else None for k in keys)
    for known, given in zip(self._known, (keys, named), strict=True):
      for start, end in itertools.product(range(len(keys) + 1), (len(keys), len(keys) - 1)):
        found, is_piece = known.get(given[start:end]), end < len(keys)
        if found is None or start > end or is_piece != (len(found) > 1):
          continue
        piece = getattr(keys[-1], "idx", len(found)) if is_piece else 0
        # The path of parameters that are a single array ends every path.
        if piece < len(found) and (start < end or found[piece].shape == shape):
          return keys[:start], found[piece]
    return None, None

  def split(self, inner_state: Any) -> tuple[dict[Any, dict[Region, Any]], dict[Any, Any]]:
    """The leaves that stand in the place of a region, by that place, and all others."""
    slots: dict[Any, dict[Region, Any]] = {}
    numbers = {}
    for keys, x in _paths.by_keys(inner_state).items():
      where, region = self.of(keys, np.shape(x))
      if region is None:
        numbers[keys] = x
      else:
        slots.setdefault(where, {})[region] = x
    return slots, numbers


def _name(key: Any) -> str:
  return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
