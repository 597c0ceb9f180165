"""What a new group is made of, and what of it cannot be carried."""

import dataclasses
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths
from optax_cadence import _window
from optax_cadence._state import ConfidenceState
from optax_cadence.confidence.statistics import Estimate
from optax_cadence.conversion import reading
from optax_cadence.conversion.sources import bits
from optax_cadence.conversion.sources import Region
from optax_cadence.conversion.sources import Sources
from optax_cadence.conversion.sources import Window
from optax_cadence.regions.layout import Leaves
from optax_cadence.schedules.every import Every

OR_FLUSH = "; apply it first with tx.flush, or convert when it has just fired"

FRESH = object()  # stands for what `init` makes


@dataclasses.dataclass(frozen=True)
class Missing:
  """Stands for what cannot be carried, and says why."""

  why: str


_NOTHING = Missing("expected the same optimizer in tx and in to, found nothing there in tx")


class Merged:
  """What a new group is made of.

  Attributes:
    name: Its name.
    regions: Its regions, and which regions their entries were in.
    groups: The groups they come from.
    chosen: That of them whose counters it has.
  """

  def __init__(
    self, sources: Sources, name: str, regions: Sequence[Region], leaves: Leaves, counters: str
  ):
    self.name = name
    self.regions = {region: sources.of(region) for region in regions}
    origins = itertools.chain.from_iterable(self.regions.values())
    self.groups = [sources.groups[name] for name in dict.fromkeys(r.group for r in origins)]
    self._sources, self._leaves, self._counters = sources, leaves, counters
    self.chosen = self.groups[0]
    if counters == "equal":
      self._check_counters()
    else:
      select = max if counters == "most" else min
      self.chosen = select(self.groups, key=operator.attrgetter("updates"))

  def _check_counters(self) -> None:
    first, *others = self.groups
    for other in others:
      differing = [
        jax.tree_util.keystr(keys)
        for keys in first.compared.keys() & other.compared.keys()
        if not (first.as_started(keys) and other.as_started(keys))
        and bits(first.compared[keys]) != bits(other.compared[keys])
      ]
      if first.updates != other.updates or differing:
        raise ValueError(
          f"convert: group {self.name!r} has regions of the groups {first.name!r} and"
          f" {other.name!r}, which have applied {first.updates} and {other.updates} updates:"
          f" expected equal counters, found that {', '.join(sorted(differing)[:3]) or 'updates'}"
          " differ; counters='most' or 'least' takes those of one"
        )

  def inner_state(self, params: Any, whole: Any) -> dict[Any, Any]:
    """What goes into an inner state, by its paths: an array, or `FRESH`, or why there is none.

    `whole` is such a state in which leaves under masks have the arrays for their entries.
    """
    places, carried = reading.Places(params, list(self.regions)), {}
    for keys, x in _paths.by_keys(whole).items():
      where, region = places.of(keys, x.shape)
      found = self._number(keys) if region is None else self._slot(where, region, x.shape)
      is_array = found is not FRESH and not isinstance(found, Missing)
      if is_array and (found.shape, found.dtype) != (x.shape, x.dtype):
        shown = f"expected {x.dtype}{list(x.shape)}, found {found.dtype}{list(found.shape)}"
        found = Missing(shown)
      carried[keys] = found
    return carried

  def _number(self, keys: Any) -> Any:
    """What belongs to no region: that of the group whose counters are taken, if it has it."""
    for group in (self.chosen, *self.groups):
      if keys in group.numbers:
        return FRESH if group.as_started(keys) else group.numbers[keys]
    return _NOTHING

  def _slot(self, where: Any, region: Region, shape: tuple[int, ...]) -> Any:
    """What is kept for a region in one place of the inner state, in this shape."""

    def kept(old: Region) -> Any:
      return self._sources.groups[old.group].slots.get(where, {}).get(old)

    same = self._same(region)
    # What has the shape of a leaf under a mask has entries of other groups too.
    if same and kept(same) is not None and not (region.masked and shape == region.shape):
      return kept(same)
    parts = {old: kept(old) for old in self._parts(region)}
    if any(x is None for x in parts.values()):
      return _NOTHING
    if shape != region.shape or any(np.shape(x) != old.shape for old, x in parts.items()):
      return Missing(
        f"it has not an entry for each of {region.name!r}, which is another region than there was;"
        " start such an optimizer anew with to.init"
      )
    return self._assembled(region, parts)

  def _same(self, region: Region) -> Region | None:
    """The same region as it was, if it was one."""
    return next((old for old in self.regions[region] if old.key == region.key), None)

  def _parts(self, region: Region) -> list[Region]:
    """The regions that what is kept for a region is put together from."""
    return self._sources.regions[region.leaf] if region.masked else self.regions[region]

  def _assembled(self, region: Region, parts: Mapping[Region, jax.Array]) -> jax.Array:
    """An array for a region, out of those for the regions that its entries were in."""
    full = jnp.zeros_like(self._leaves[region.leaf], next(iter(parts.values())).dtype)
    for old, x in parts.items():
      full = old.put(full, x)
    return region.take(full)

  def _windows(self, region: Region) -> list[Window]:
    """The windows that its entries were in."""
    return [self._sources.window(old) for old in self.regions[region]]

  def check_windows(self, accumulates: bool, by_region: bool, weighted: bool) -> None:
    """Raises where the windows cannot be those of the new group."""
    known: tuple[Region, int] | None = None
    for region in self.regions:
      windows = self._windows(region)
      found = sorted({(w.length, w.weight if w.length else 0.0) for w in windows})
      where = f"convert: the window of {region.name!r} in group {self.name!r}"
      if len(found) > 1:
        raise ValueError(
          f"{where}: its parts have gathered {_listed(found)}, expected as many in each{OR_FLUSH}"
        )
      length, weight = found[0]
      if length and not accumulates:
        raise ValueError(
          f"{where} has gathered {length} micro-steps, expected none, as with period 1 or"
          f' accumulate="latest" it holds nothing{OR_FLUSH}'
        )
      if not weighted and weight != length:
        raise ValueError(
          f"{where} holds {length} micro-steps of weight {weight}, expected weight 1 each without"
          f" weighted=True{OR_FLUSH}"
        )
      if known is not None and length != known[1] and not by_region:
        raise ValueError(
          f"{where} has gathered {length} micro-steps, expected {known[1]} as in that of"
          f" {known[0].name!r}: a group has one length of its windows{OR_FLUSH}"
        )
      known = region, length

  def length(self, region: Region) -> int:
    """Micro-steps in the window of a region."""
    return self._windows(region)[0].length

  def weight(self, region: Region) -> float:
    """Their weight."""
    return max(window.weight for window in self._windows(region))

  def total(self, region: Region, dtype: Any, is_mean: bool | None = None) -> jax.Array:
    """The sum or mean of a region's window; unless it is said, as a cadence keeps it."""
    if is_mean is None:
      is_mean = _window.holds_mean(jnp.zeros((), dtype))
    same = self._same(region)
    if same and not region.masked:
      return self._total_of(same, dtype, is_mean)
    parts = {old: self._total_of(old, dtype, is_mean) for old in self._parts(region)}
    return self._assembled(region, parts)

  def _total_of(self, old: Region, dtype: Any, is_mean: bool) -> jax.Array:
    """The same, of a region as it was."""
    x, was_mean, length, weight, _ = self._sources.window(old)
    if x is not None and x.dtype == dtype and is_mean == was_mean:
      return x
    if not length:  # of no meaning
      return jnp.zeros_like(old.take(self._leaves[old.leaf]), dtype)
    if _window.wider(x.dtype, dtype) != dtype:
      raise ValueError(
        f"convert: the window of {old.name!r} is kept in {x.dtype}, expected an accumulator that"
        f" holds it, found {dtype}{OR_FLUSH}"
      )
    x, n = x.astype(dtype), jnp.float32(weight)
    if is_mean == was_mean:
      return x
    return _window.divide(x, n) if is_mean else _window.multiply(x, n)

  def skipped(self, region: Region) -> int:
    """Micro-batches left out of a region."""
    found = {window.skipped for window in self._windows(region)}
    if len(found) > 1 and self._counters == "equal":
      raise ValueError(
        f"convert: {region.name!r} has parts of which {_listed(sorted(found))} micro-batches were"
        " skipped, expected equal counters; counters='most' or 'least' takes one"
      )
    return min(found) if self._counters == "least" else max(found)

  def rhythm(self, every: Every) -> tuple[int, int]:
    """Micro-steps until the group is due, and of its window."""
    now = self._sources.micro_step
    if every.static:
      window = every.offset if now < every.offset else every.period
      return every.period - (now - every.offset) % every.period, window
    first = self.groups[0]
    if len(self.groups) == 1 and first.every is not None and first.every.key == every.key:
      assert first.state is not None
      assert first.state.remaining is not None
      return int(first.state.remaining), int(first.state.period)
    elapsed = max(group.elapsed for group in self.groups)
    elapsed = max(elapsed, *(self.length(region) for region in self.regions), 0)
    window = int(every.window(jnp.int32(max(now - elapsed, 0))))
    last = window
    if every.policy is not None:
      state = self.chosen.state
      last = int(state.period) if state is not None and self.chosen.updates else 0
    return max(window - elapsed, 1), last

  def confidence(self, every: Every, fresh: ConfidenceState) -> ConfidenceState:
    """What a policy knows: of the same regions what was known, of others nothing."""
    squares, estimate, sample = fresh.squares, fresh.estimate, jax.tree.leaves(fresh.sample)
    for i, region in enumerate(self.regions):
      known, at = self._known_of(region)
      if squares is not None and (known is not None or self.length(region)):
        seen = None if known is None else known.squares
        squares = squares.at[i].set(jnp.nan if seen is None else seen[at])
      if estimate is not None and known is not None and known.estimate is not None:
        pairs = zip(estimate, known.estimate, strict=True)
        estimate = Estimate(*(x.at[i].set(y[at]) for x, y in pairs))
      if sample and known is not None and known.sample is not None:
        sample[i] = jax.tree.leaves(known.sample)[at]
    first = self.groups[0]
    policy = None if first.every is None else first.every.policy
    memory = fresh.policy
    if len(self.groups) == 1 and policy is not None and str(policy) == str(every.policy):
      assert first.state is not None
      assert first.state.confidence is not None
      memory = first.state.confidence.policy
    sample = jax.tree.unflatten(jax.tree.structure(fresh.sample), sample)
    return ConfidenceState(squares, estimate, sample, memory)

  def _known_of(self, region: Region) -> tuple[ConfidenceState | None, int]:
    """What a policy knew of the same region, and at which place; None where none did."""
    old = self._same(region)
    if old is None:
      return None, 0
    source = self._sources.groups[old.group]
    known = None if source.state is None else source.state.confidence
    return known, list(source.windows).index(old)


def _listed(values: Any) -> str:
  return " and ".join(map(str, values))
