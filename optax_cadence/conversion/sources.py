"""What a state holds, as `convert` reads it: regions, and what the groups keep for them."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence._state import GroupState
from optax_cadence.regions import cuts
from optax_cadence.schedules.every import Every


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
  """A part of a leaf.

  Attributes:
    name: How errors call it.
    group: The name of its group.
    leaf: The position of its leaf.
    leaf_shape: The shape of that.
    cut: Where it lies in the leaf.
    shape: The shape of the arrays that are kept for it: that of its tensor; or, where `masked`,
      that of the leaf, of whose entries some are its own.
    masked: Whether its entries are trained together with those of other groups.
  """

  name: str
  group: str
  leaf: int
  leaf_shape: tuple[int, ...]
  cut: cuts.Cut
  shape: tuple[int, ...]
  masked: bool

  @functools.cached_property
  def at(self) -> np.ndarray | None:
    """The positions of its entries in the leaf, in order; None for the whole of it."""
    if isinstance(self.cut, cuts.Whole):
      return None
    if isinstance(self.cut, cuts.Entries):
      return self.cut.indices
    positions = jnp.arange(math.prod(self.leaf_shape)).reshape(self.leaf_shape)
    return np.asarray(self.cut.take(positions)).reshape(-1)

  @functools.cached_property
  def key(self) -> Any:
    """Equal for regions with the same entries, kept in the same shape."""
    at = None if self.at is None else self.at.tobytes()
    return self.leaf, self.masked, self.shape, at

  def put(self, full: jax.Array, x: jax.Array) -> jax.Array:
    """The leaf with what is kept for this region in its place."""
    if self.masked:
      mine = np.zeros(full.size, bool)
      mine[self.at] = True
      return jnp.where(mine.reshape(full.shape), x, full)
    return cuts.written(full, self.cut, x)

  def take(self, full: jax.Array) -> jax.Array:
    """What is kept for this region, out of the leaf."""
    return full if self.masked else cuts.read(full, self.cut)


class Window(NamedTuple):
  """What the window of a region holds.

  Attributes:
    total: The sum or mean of the gradients; None where the region accumulates nothing.
    is_mean: Which of the two.
    length: Micro-steps in it.
    weight: The sum of their weights.
    skipped: Micro-batches left out until now.
  """

  total: Any
  is_mean: bool
  length: int
  weight: float
  skipped: int


@dataclasses.dataclass(frozen=True)
class Source:
  """A group as it was.

  Attributes:
    name: Its name.
    every: Its cadence; None for `MultiSteps`.
    slots: What its inner state keeps for a region, by where that stands beside the parameters.
    numbers: What else is in the inner state, by where it stands.
    compared: The same, as it is compared with that of other groups.
    started: The same as `init` made it; empty where that makes no difference.
    windows: The windows, by region.
    updates: Updates applied.
    fired: Whether one was at the last micro-step.
    elapsed: Micro-steps since its windows were opened.
    state: Its state; None for `MultiSteps`.
  """

  name: str
  every: Every | None
  slots: dict[Any, dict[Region, jax.Array]]
  numbers: dict[Any, Any]
  compared: dict[Any, Any]
  started: dict[Any, Any]
  windows: dict[Region, Window]
  updates: int
  fired: bool
  elapsed: int
  state: GroupState | None

  def as_started(self, keys: Any) -> bool:
    """Whether a number is known to be as `init` made it."""
    return keys in self.started and bits(self.numbers[keys]) == bits(self.started[keys])


@dataclasses.dataclass(frozen=True)
class Sources:
  """All groups as they were.

  Attributes:
    groups: The groups, by name.
    micro_step: Micro-steps done.
    by_micro_steps: Whether schedules inside the optimizer count these.
  """

  groups: dict[str, Source]
  micro_step: int
  by_micro_steps: bool

  @functools.cached_property
  def regions(self) -> dict[int, list[Region]]:
    """The regions of each leaf."""
    found: dict[int, list[Region]] = {}
    for group in self.groups.values():
      for region in group.windows:
        found.setdefault(region.leaf, []).append(region)
    return found

  @functools.cached_property
  def _owners(self) -> dict[int, np.ndarray]:
    """For each leaf with several regions which of them each entry is in."""
    found = {}
    for leaf, regions in self.regions.items():
      if len(regions) > 1:
        found[leaf] = np.zeros(math.prod(regions[0].leaf_shape), np.int32)
        for i, region in enumerate(regions):
          found[leaf][region.at] = i
    return found

  def of(self, region: Region) -> list[Region]:
    """The regions that some of a region's entries were in; any one, where it has no entries."""
    there = self.regions.get(region.leaf, [])
    if region.at is None or region.leaf not in self._owners:
      return there
    owners = np.unique(self._owners[region.leaf][region.at])
    return [there[i] for i in owners] or there[:1]

  def window(self, region: Region) -> Window:
    """The window of one of the regions as they were."""
    return self.groups[region.group].windows[region]


def bits(x: Any) -> Any:
  """Equal for arrays that are equal to the bit."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  return np.shape(x), x.dtype, np.asarray(x).tobytes()
