"""The state of one way of accumulating, made from that of another with the same optimizer.

Both states are read as regions: parts of a leaf, each with what is kept for it. What is kept in the
shape of a region is put back into the shape of its leaf, and the new regions are cut out of that.
What belongs to no parameter (counters, hyperparameters) is a group's, and goes where its entries
go.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cadence import _cadence
from optax_cadence import _checks
from optax_cadence import _paths
from optax_cadence import _sharding
from optax_cadence import _window
from optax_cadence._state import CadenceState
from optax_cadence._state import ConfidenceState
from optax_cadence._state import GroupState
from optax_cadence._state import plain
from optax_cadence.confidence.statistics import Estimate
from optax_cadence.regions import cuts
from optax_cadence.regions.layout import Group
from optax_cadence.regions.layout import Layout
from optax_cadence.regions.layout import layout as lay_out
from optax_cadence.regions.layout import Leaves
from optax_cadence.regions.layout import leaves_of
from optax_cadence.schedules.every import Every

_MULTI_STEPS = "MultiSteps"
_OR_FLUSH = "; apply it first with tx.flush, or convert when it has just fired"


def convert(
  state: optax.OptState,
  tx: Any,
  params: optax.Params,
  *,
  to: Any,
  counters: Literal["equal", "most", "least"] = "equal",
) -> optax.OptState:
  """The state of another cadence of the same optimizer, or of `optax.MultiSteps`, in mid-window.

  Training goes on with `to` where `tx` left it:

  - Every entry of a parameter keeps its moments and what its window has gathered. A window may be
    longer than the period that it now has. One that is read as a mean (`optax.MultiSteps`) and kept
    as a sum is equal up to rounding, everything else to the bit.
  - Micro-steps are counted on (of `optax.MultiSteps` those that it did not skip), so that a static
    period is due at t ≡ offset (mod period), and `oc.phases(to, params, state)` is right. A window
    under a schedule has the length that the schedule gives for the micro-step at which it began;
    one that is over is due next.
  - A group has the counters (Adam's, `updates`) and hyperparameters of the group its entries come
    from. With `inner` a function of the window's length, a hyperparameter that is as `init` made it
    is as `init` makes it for the new group.
  - A policy goes on where it decides for the same region. For another it does not know the norms of
    gradients that it has not seen: an open window then lasts its `max_period`.

  It is called outside of `jax.jit`. The new state shares buffers with the old one, so donate only
  one of them.

  Args:
    state: The state.
    tx: What made it: a cadence, an `oc.chain` that ends in one, or an `optax.MultiSteps` (or its
      `gradient_transformation()`).
    params: The parameters.
    to: What it is to be a state of; likewise. In an `oc.chain` what stands before the cadence has
      to be the same in both.
    counters: What is right where groups merge that have counted differently, as after periods of 4
      and 2: `"equal"`: it is an error; `"most"`, `"least"`: those of the group with the most or the
      fewest updates (Adam's bias correction is then that of older or younger moments).

  Returns:
    The state of `to`.

  Raises:
    ValueError: If something cannot be carried, before anything is changed: groups that merge and
      have counted differently; regions that merge, or a group without `nonfinite="skip"` and
      weights, whose windows differ in length; a window that is not empty, for a region that has
      none (period 1, `accumulate="latest"`), or a narrower one; weights that count no longer; an
      array that an optimizer keeps for a region that is now another, in another shape than it.

  >>> import jax.numpy as jnp, optax, optax_cadence as oc
  >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
  >>> old = oc.cadence(optax.adam(0.1), 4)
  >>> updates, state = old.update(params, old.init(params), params)
  >>> new = oc.cadence(optax.adam(0.1), {"a": 4, "b": 2})
  >>> state = oc.convert(state, old, params, to=new)
  >>> {name: int(group.remaining) for name, group in state.groups.items()}
  {'2': 1, '4': 3}
  """
  if counters not in ("equal", "most", "least"):
    raise ValueError(
      f"counters must be 'equal', 'most' or 'least', found {_checks.shown(counters)}"
    )
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((state, params))):
    raise ValueError("convert: expected arrays, found traced ones; call it outside of jax.jit")
  return _without_aliases(_converted(state, tx, params, to, counters))


def _converted(state: Any, tx: Any, params: Any, to: Any, counters: str) -> Any:
  """`convert`, of which one result may stand in several places."""
  old, new = (_cadence.chain_of(x) for x in (tx, to))
  if old is not None:
    state = _in_containers(state, old.init, params)
  if old is not None and new is not None and _same_before(old, new, params):
    return (*state[:-1], _converted(state[-1], old.last, params, new.last, counters))
  if old is not None and not old.before:
    return _converted(state[-1], old.last, params, to, counters)
  if new is not None and not new.before:
    return (_converted(state, tx, params, new.last, counters),)
  if old is not None or new is not None:
    raise ValueError(
      "convert: expected the same transformations before the cadence in tx and in to, found"
      " others; what stands before optax.MultiSteps belongs in an optimizer of its own"
    )
  before, after = _accumulating("tx", tx), _accumulating("to", to)
  state = _in_containers(state, before.init, params)
  return _written(_read(before, state, params), after, params, counters)


def _same_before(old: _cadence.Chain, new: _cadence.Chain, params: Any) -> bool:
  """Whether what stands before the cadences has the same states."""
  states = [[jax.eval_shape(tx.init, params) for tx in chain.before] for chain in (old, new)]
  forms = [(jax.tree.structure(x), [*map(np.shape, jax.tree.leaves(x))]) for x in states]
  return forms[0] == forms[1]


def _accumulating(name: str, tx: Any) -> Any:
  """The `MultiSteps`, or the `Cadence`, behind a transformation."""
  owner = getattr(getattr(tx, "update", None), "__self__", None)
  if isinstance(owner, optax.MultiSteps):
    return owner
  if not isinstance(tx, _cadence.CadenceTransformation):
    raise ValueError(
      f"convert: expected a cadence, an oc.chain that ends in one or an optax.MultiSteps as {name},"
      f" found {_checks.shown(tx)}; of a larger optimizer convert the part of the state that is"
      " the cadence's"
    )
  return _cadence.of(tx)


def _in_containers(state: Any, init: Any, params: Any) -> Any:
  """The state as `init` makes it.

  Raises:
    ValueError: If it is that of something else.
  """
  state = plain(init, state, params)
  difference = _paths.mismatch(jax.eval_shape(init, params), state)
  if difference is not None:
    raise ValueError(f"convert: expected the state of tx, which has {difference}")
  return state


def _without_aliases(tree: Any) -> Any:
  """The tree, with a copy of each array that stands in several places: it may be donated."""
  seen: set[int] = set()
  leaves, treedef = jax.tree.flatten(tree)
  for i, x in enumerate(leaves):
    leaves[i] = x.copy() if id(x) in seen and isinstance(x, jax.Array) else x
    seen.add(id(x))
  return jax.tree.unflatten(treedef, leaves)


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
    size = int(np.prod(self.leaf_shape, dtype=np.int64))
    return np.asarray(self.cut.take(jnp.arange(size).reshape(self.leaf_shape))).reshape(-1)

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
    whole = cuts.gathered(full, [self.cut])
    return _sharding.lying_as(self.cut.put(self.cut.view(whole), x).reshape(full.shape), full)

  def take(self, full: jax.Array) -> jax.Array:
    """What is kept for this region, out of the leaf."""
    return full if self.masked else self.cut.take(cuts.gathered(full, [self.cut]))


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
    return keys in self.started and _bits(self.numbers[keys]) == _bits(self.started[keys])


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
    return {}

  def of(self, region: Region) -> list[Region]:
    """The regions that some of a region's entries were in."""
    there = self.regions.get(region.leaf, [])
    if len(there) < 2 or region.at is None:
      return there
    owners = self._owners.get(region.leaf)
    if owners is None:
      owners = np.zeros(int(np.prod(region.leaf_shape, dtype=np.int64)), np.int32)
      for i, old in enumerate(there):
        owners[old.at] = i
      self._owners[region.leaf] = owners
    return [there[i] for i in np.unique(owners[region.at])]

  def window(self, region: Region) -> Window:
    """The window of one of the regions as they were."""
    return self.groups[region.group].windows[region]


_FRESH = object()  # stands for what `init` makes


@dataclasses.dataclass(frozen=True)
class _Missing:
  """Stands for what cannot be carried, and says why."""

  why: str


def _read(old: Any, state: Any, params: Any) -> Sources:
  """What a state holds."""
  if isinstance(old, optax.MultiSteps):
    return _read_multi_steps(old, state, params)
  layout, started, groups = old.layout_of(state, params), None, {}
  if old.inner.follows_window:
    started = old.init(params)
  held: dict[Any, Any] = {}
  totals: dict[int, jax.Array] = {}
  if state.masks is not None:
    held = _by_path(state.masks.inner_state)
    totals = dict(zip(layout.masked, jax.tree.leaves(state.masks.accumulators), strict=False))
  for group, regions in _regions(layout):
    if not regions:
      continue
    was, places = state.groups[group.name], _Places(params, regions)
    slots, numbers = places.split(_by_path(was.inner_state))
    for where, found in places.split(held)[0].items():
      slots[where] = slots.get(where, {}) | found
    compared = numbers
    if old.set_schedules is not None:  # they differ by when each has fired last
      inner_state = old.set_schedules(was.inner_state, jnp.int32(0))
      compared = places.split(_by_path(inner_state))[1]
    at_first = {}
    if started is not None:
      at_first = places.split(_by_path(started.groups[group.name].inner_state))[1]
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
  regions = _multi_steps_regions(params)
  slots, numbers = _Places(params, regions).split(_by_path(state.inner_opt_state))
  n, updates = int(state.mini_step), int(state.gradient_step)
  windows = {}
  for region, total in zip(regions, jax.tree.leaves(state.acc_grads), strict=True):
    windows[region] = Window(total, old._use_grad_mean, n, float(n), 0)
  micro_step = n
  if updates:
    lengths = jax.vmap(lambda t: jnp.int32(old._every_k_schedule(t)))(jnp.arange(updates))
    micro_step += int(lengths.sum())
  source = Source(
    name=_MULTI_STEPS,
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


def _multi_steps_regions(params: Any) -> list[Region]:
  """All parameters as one group, as `MultiSteps` trains them."""
  ((_, regions),) = _regions(lay_out(2, params))  # any period would do
  return [dataclasses.replace(region, group=_MULTI_STEPS) for region in regions]


def _regions(layout: Layout) -> Iterator[tuple[Group, list[Region]]]:
  """The groups of a layout, each with its regions."""
  names = layout.region_names()
  leaves: Any = {}
  for i, shape in enumerate(layout.shapes):
    leaves[i] = jax.ShapeDtypeStruct(shape, jnp.float32)
  for group in layout.groups:
    shapes = [x.shape for x in group.take(leaves)] + [layout.shapes[t.leaf] for t in group.masked]
    regions = []
    for i, t in enumerate((*group.tensors, *group.masked)):
      masked, leaf_shape = i >= len(group.tensors), layout.shapes[t.leaf]
      name = names[group.name][i]
      regions.append(Region(name, group.name, t.leaf, leaf_shape, t.cut, shapes[i], masked))
    yield group, regions


def _by_path(tree: Any) -> dict[Any, Any]:
  return dict(jax.tree_util.tree_flatten_with_path(tree)[0])


class _Places:
  """Which region a leaf of an inner state belongs to: its path ends in that of the parameter.

  A parameter that is cut into several tensors has a tuple of them in its place.
  """

  def __init__(self, params: Any, regions: Sequence[Region]):
    paths = [keys for keys, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
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

  def split(self, leaves: Mapping[Any, Any]) -> tuple[dict[Any, dict[Region, Any]], dict[Any, Any]]:
    """The leaves that stand in the place of a region, by that place, and all others."""
    slots: dict[Any, dict[Region, Any]] = {}
    numbers = {}
    for keys, x in leaves.items():
      where, region = self.of(keys, np.shape(x))
      if region is None:
        numbers[keys] = x
      else:
        slots.setdefault(where, {})[region] = x
    return slots, numbers


def _name(key: Any) -> str:
  return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _bits(x: Any) -> Any:
  """Equal for arrays that are equal to the bit."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  return np.shape(x), x.dtype, np.asarray(x).tobytes()


_NOTHING = _Missing("expected the same optimizer in tx and in to, found nothing there in tx")


class _Merged:
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
        and _bits(first.compared[keys]) != _bits(other.compared[keys])
      ]
      if first.updates != other.updates or differing:
        raise ValueError(
          f"convert: group {self.name!r} has regions of the groups {first.name!r} and"
          f" {other.name!r}, which have applied {first.updates} and {other.updates} updates:"
          f" expected equal counters, found that {', '.join(sorted(differing)[:3]) or 'updates'}"
          " differ; counters='most' or 'least' takes those of one"
        )

  def inner_state(self, params: Any, whole: Any) -> dict[Any, Any]:
    """What goes into an inner state, by its paths: an array, or `_FRESH`, or why there is none.

    Args:
      params: The parameters.
      whole: A state in which leaves under masks have the arrays for their entries.
    """
    places, carried = _Places(params, list(self.regions)), {}
    for keys, x in _by_path(whole).items():
      where, region = places.of(keys, x.shape)
      carried[keys] = self._number(keys) if region is None else self._slot(where, region, x.shape)
      if not isinstance(carried[keys], _Missing) and carried[keys] is not _FRESH:
        found = carried[keys]
        if (found.shape, found.dtype) != (x.shape, x.dtype):
          shown = f"expected {x.dtype}{list(x.shape)}, found {found.dtype}{list(found.shape)}"
          carried[keys] = _Missing(shown)
    return carried

  def _number(self, keys: Any) -> Any:
    for group in (self.chosen, *self.groups):
      if keys in group.numbers:
        return _FRESH if group.as_started(keys) else group.numbers[keys]
    return _NOTHING

  def _slot(self, where: Any, region: Region, shape: tuple[int, ...]) -> Any:
    def kept(old: Region) -> Any:
      return self._sources.groups[old.group].slots.get(where, {}).get(old)

    same = [old for old in self.regions[region] if old.key == region.key]
    if same and kept(same[0]) is not None and not (region.masked and shape == region.shape):
      return kept(same[0])
    parts = {old: kept(old) for old in self._parts(region)}
    if any(x is None for x in parts.values()):
      return _NOTHING
    if shape != region.shape or any(np.shape(x) != old.shape for old, x in parts.items()):
      return _Missing(
        f"it has not an entry for each of {region.name!r}, which is another region than there was;"
        " start such an optimizer anew with to.init"
      )
    return self._assembled(region, parts)

  def _parts(self, region: Region) -> list[Region]:
    """The regions that what is kept for a region is put together from."""
    return self._sources.regions[region.leaf] if region.masked else self.regions[region]

  def _assembled(self, region: Region, parts: Mapping[Region, jax.Array]) -> jax.Array:
    full = jnp.zeros_like(self._leaves[region.leaf], next(iter(parts.values())).dtype)
    for old, x in parts.items():
      full = old.put(full, x)
    return region.take(full)

  def _windows(self, region: Region) -> list[Window]:
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
          f"{where}: its parts have gathered {_listed(found)}, expected as many in each{_OR_FLUSH}"
        )
      length, weight = found[0]
      if length and not accumulates:
        raise ValueError(
          f"{where} has gathered {length} micro-steps, expected none, as with period 1 or"
          f' accumulate="latest" it holds nothing{_OR_FLUSH}'
        )
      if not weighted and weight != length:
        raise ValueError(
          f"{where} holds {length} micro-steps of weight {weight}, expected weight 1 each without"
          f" weighted=True{_OR_FLUSH}"
        )
      if known is not None and length != known[1] and not by_region:
        raise ValueError(
          f"{where} has gathered {length} micro-steps, expected {known[1]} as in that of"
          f" {known[0].name!r}: a group has one length of its windows{_OR_FLUSH}"
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
    same = [old for old in self.regions[region] if old.key == region.key]
    if same and not region.masked:
      return self._total_of(same[0], dtype, is_mean)
    parts = {old: self._total_of(old, dtype, is_mean) for old in self._parts(region)}
    return self._assembled(region, parts)

  def _total_of(self, old: Region, dtype: Any, is_mean: bool) -> jax.Array:
    x, was_mean, length, weight, _ = self._sources.window(old)
    if x is not None and x.dtype == dtype and is_mean == was_mean:
      return x
    if not length:  # of no meaning
      return jnp.zeros(old.shape, dtype)
    if _window.wider(x.dtype, dtype) != dtype:
      raise ValueError(
        f"convert: the window of {old.name!r} is kept in {x.dtype}, expected an accumulator that"
        f" holds it, found {dtype}{_OR_FLUSH}"
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
    for old in self.regions[region]:
      source = self._sources.groups[old.group]
      if old.key == region.key and source.state is not None:
        return source.state.confidence, list(source.windows).index(old)
    return None, 0


def _listed(values: Any) -> str:
  return " and ".join(map(str, values))


def _written(sources: Sources, new: Any, params: Any, counters: str) -> Any:
  """A state that holds what was read."""
  fresh, leaves = new.init(params), leaves_of(params)
  if isinstance(new, optax.MultiSteps):
    return _multi_steps_state(sources, new, fresh, params, leaves, counters)
  layout, groups = new.layout_of(fresh, params), dict(fresh.groups)
  moments: dict[Any, Any] = {}
  totals: dict[int, jax.Array] = {}
  for group, regions in _regions(layout):
    if not regions:
      continue
    merged = _Merged(sources, group.name, regions, leaves, counters)
    state = groups[group.name]
    merged.check_windows(state.accumulators is not None, new.by_region, new.weighted)
    tensors = [leaves[r.leaf] if r.masked else r.take(leaves[r.leaf]) for r in regions]
    whole = jax.eval_shape(new.inner.of(group.every).init, layout.tree(group, tensors))
    carried = merged.inner_state(params, whole)
    moments |= carried
    inner_state = _picked(group.name, state.inner_state, carried)
    if sources.by_micro_steps and new.set_schedules is None:
      from optax_cadence import _clocks

      inner_state = _clocks.set_schedules(inner_state, jnp.int32(merged.chosen.updates))
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
  return CadenceState(jnp.int32(sources.micro_step), groups, fresh.regions, masks)


def _group_state(
  merged: _Merged, every: Every, fresh: GroupState, inner_state: Any, sums: Iterable[jax.Array]
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
    return x if carried[keys] is _FRESH else carried[keys]

  def is_told(node: Any) -> bool:
    return hasattr(node, "with_window")

  def settled(old: Any, new: Any) -> Any:
    missing = any(isinstance(x, _Missing) for x in jax.tree.leaves(new))
    return old if missing and is_told(old) else new

  picked = jax.tree_util.tree_map_with_path(pick, fresh)
  picked = jax.tree.map(settled, fresh, picked, is_leaf=is_told)
  for keys, x in _by_path(picked).items():
    if isinstance(x, _Missing):
      where = f"inner_state{jax.tree_util.keystr(keys)}"
      raise ValueError(f"convert: {where} of group {group!r} cannot be carried: {x.why}")
  return picked


def _multi_steps_state(
  sources: Sources, new: optax.MultiSteps, fresh: Any, params: Any, leaves: Leaves, counters: str
) -> Any:
  regions = _multi_steps_regions(params)
  merged = _Merged(sources, _MULTI_STEPS, regions, leaves, counters)
  merged.check_windows(accumulates=True, by_region=False, weighted=False)
  inner_state = _picked(
    _MULTI_STEPS, fresh.inner_opt_state, merged.inner_state(params, fresh.inner_opt_state)
  )
  if sources.by_micro_steps:
    from optax_cadence import _clocks

    inner_state = _clocks.set_schedules(inner_state, jnp.int32(merged.chosen.updates))
  n, updates, sums = merged.length(regions[0]), jnp.int32(merged.chosen.updates), fresh.acc_grads
  period = int(new._every_k_schedule(updates))
  if n >= period:
    raise ValueError(
      f"convert: the window has gathered {n} micro-steps, expected fewer than the {period} of"
      f" optax.MultiSteps{_OR_FLUSH}"
    )
  if n:  # else they have to be zero
    old = zip(regions, jax.tree.leaves(sums), strict=True)
    found = [merged.total(region, x.dtype, new._use_grad_mean) for region, x in old]
    sums = jax.tree.unflatten(jax.tree.structure(sums), found)
  return fresh._replace(
    mini_step=jnp.int32(n), gradient_step=updates, inner_opt_state=inner_state, acc_grads=sums
  )
