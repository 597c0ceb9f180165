"""The state of an optimizer follows its parameters when they grow, shrink, or lose their gate."""

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cadence import _paths
from optax_cadence._state import closed
from optax_cadence._state import opened
from optax_cadence._state import per_region
from optax_cadence._state import Regions
from optax_cadence.growth import _trees
from optax_cadence.growth._plan import copied
from optax_cadence.growth._plan import LeafChange
from optax_cadence.growth._plan import Plan
from optax_cadence.growth._plan import plan_for
from optax_cadence.pruning import packing

Keys = tuple[Any, ...]  # where a leaf stands, as `jax.tree_util` has it

_LAYERS_OF_PERIODS = (
  "if layers have a period each (oc.stacked), nobody has said those of the new ones. Flush the"
  " windows and give the layers one period while they grow: state = oc.convert(state, tx, params,"
  ' to=one, counters="most"); state = growth.grow_state(one, state, params, new_params, plan); then'
  " state = oc.convert(state, one, new_params, to=...), the cadence with a period for each layer"
)


def grow_state(
  tx: optax.GradientTransformation,
  state: optax.OptState,
  params: optax.Params,
  new_params: optax.Params,
  plan: Plan,
  *,
  new_tx: optax.GradientTransformation | None = None,
) -> optax.OptState:
  """The state of an optimizer after its parameters have grown, shrunk, or lost their gate.

  A leaf of the state follows the parameter whose key path its own key path ends in, the longest
  if there are several; so do moments and the accumulators of open windows. What is kept in dicts
  by the names in a parameter's path follows it too; so do the masks of `prune`, packed to bits or
  not. Where the parameters are a single array, every leaf of its shape follows it.

  What follows a parameter keeps its old entries bit for bit and gets new ones as `init` makes them,
  or copies of old ones with a parameter whose new entries are copies (see `stacking`). What follows
  a parameter that has moved (see `deepening`) moves with it. What a cadence keeps for each region,
  such as how many micro-batches are in its window, goes by the names of regions. Everything else
  (counters, hyperparameters, random keys) is kept. Three things are as `init` makes them: what
  follows a parameter that is new, the gate among them, whose schedule so begins anew; what was not
  in the old state, such as a new group of a cadence; and what a policy keeps under
  `confidence.sample`, entries of the old parameters to compare the next ones with.

  Args:
    tx: The transformation that `state` is of.
    state: Its state.
    params: The parameters before.
    new_params: The parameters after, the gate included if there is one.
    plan: The plan by which they differ. The same plan serves for the merge, after which the
      gate's own state is gone.
    new_tx: The transformation after, if it had to be written anew (labels of `partition`
      given as a tree).

  Returns:
    The state of `new_tx`, or `tx`, for `new_params`.

  Raises:
    ValueError: If a leaf has another shape than before and the plan does not explain it, or
      follows a parameter that was there before and is not in the old state; it is named. So it
      is where a cadence cuts an axis that grows into regions, as bands of equal width would be
      others afterwards; or layers of a stack that have a period each, for which the error says
      what to write.

  >>> import jax.numpy as jnp, optax
  >>> from optax_cadence import growth
  >>> params = {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1))}
  >>> tx = optax.trace(0.9)
  >>> _, state = tx.update(params, tx.init(params), params)
  >>> plan = growth.widening(params, growth.dimension(params, {"a": -1, "b": 0}), by=1)
  >>> grown = plan.apply(params, lambda path, shape, dtype: jnp.ones(shape, dtype))
  >>> print(growth.grow_state(tx, state, params, grown, plan).trace["a"])
  [[1. 1. 0.]]
  """
  _trees.check_concrete("grow_state", [state, params, new_params])
  fresh = _fresh_state(tx if new_tx is None else new_tx, new_params, plan)
  state, made = opened(state), opened(fresh)
  old = dict(jax.tree_util.tree_flatten_with_path(state)[0])
  by_name = {_named(keys): value for keys, value in old.items()}
  before, after = _trees.shapes(params), _trees.shapes(new_params)
  plan = plan_for(plan, params)
  changes, sources = plan.by_path, _sources(plan, before, after)
  parameters = dict(zip(_keys(new_params), after, strict=True))
  old_keys = dict(zip(before, _keys(params), strict=True))
  regions = _regions(state), _regions(made)
  names_before = dict(zip(before, _paths.names(before), strict=True))
  origins: dict[str, str | None] = {}
  for name, path in zip(_paths.names(after), after, strict=True):
    source = sources[path]
    origins[name] = None if source is None else names_before[source]

  def carried(keys: Keys, new: Any) -> Any:
    """The value of a leaf that `init` makes as `new`."""
    old_value: Any = old.get(keys)
    path, at, in_regions = _followed(keys, np.shape(new), parameters, after)
    source = None if path is None else sources[path]
    if source is not None and source != path:
      exact = keys[: at.start] + old_keys[source] + keys[at.stop :]
      names = _named(keys[: at.start]) + source + _named(keys[at.stop :])
      old_value = old.get(exact, by_name.get(names))
    if _is_sample(keys) or (source is None and (path is not None or old_value is None)):
      return new
    where = f"state{jax.tree_util.keystr(keys)}"
    if path is None:
      in_old, in_new = (_of_group(keys, named) for named in regions)
      by_region = _is_by_region(old_value, in_old) and _is_by_region(new, in_new)
      if by_region and (in_old or in_new):
        value = _by_region(old_value, new, in_old or [], in_new or [], origins)
        return _trees.like(value, old_value, where)
      if np.shape(old_value) != np.shape(new):
        raise ValueError(
          f"{where} follows no parameter and has shape {np.shape(old_value)} before,"
          f" {np.shape(new)} after: it cannot be carried over; start it anew with tx.init"
        )
      return old_value
    assert source is not None
    # Paths of a plan are those of the larger tree, which is the old one of a plan that shrinks.
    change = changes.get(path if plan.grows else source)
    if change is not None and plan.grows and change.adds_axis and not change.copies_state:
      return new
    packed = _is_packed(keys, new, path, after[path])
    more_layers = change is not None and change.layers and not change.adds_axis
    some_layers = more_layers and _is_cut(old_value, before[source])
    if old_value is not None and not (in_regions and change) and (packed or not some_layers):
      values = old_value, new
      if packed:
        values = packing.unpack(old_value, before[source]), packing.unpack(new, after[path])
      value = _resized(change, *values, plan.grows, where)
      if value is not None:
        return packing.pack(jnp.asarray(value)) if packed else value
    if some_layers:
      raise ValueError(
        f"{where} of {_paths.join(path)!r} is that of {np.shape(old_value)[0]} of"
        f" {before[source][0]} layers: {_LAYERS_OF_PERIODS}"
      )
    shapes = [_paths.described(None if x is None else np.shape(x)) for x in (old_value, new)]
    raise ValueError(
      f"{where} of {_paths.join(path)!r} has {shapes[0]} before and {shapes[1]} after, which the"
      " plan does not explain: a cadence that cuts the leaf into regions (channels, quadrants,"
      " masks), which would be others at the new size, or an optimizer that stores large leaves in"
      " another way than small ones. Flush the windows and start the state anew with tx.init, or"
      " give that leaf one period"
    )

  return closed(jax.tree_util.tree_map_with_path(carried, made), fresh)


def _keys(tree: Any) -> list[Keys]:
  return [keys for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _resized(change: LeafChange | None, old: Any, new: Any, grows: bool, where: str) -> Any:
  """`old` at the shape of `new`, of which new entries are; None if the plan does not explain it."""
  shapes = np.shape(old), np.shape(new)
  if shapes[0] == shapes[1]:
    return old
  if change is None:
    return None
  axis = _copied_axis(change, *shapes) if grows else None
  if axis is not None:
    value = copied(change, old, axis)
    return value if value.shape == shapes[1] else None
  index = _index(change, *shapes, grows)
  if index is None:
    return None
  if grows:
    return _trees.placed(new, index, old, where)
  return _trees.taken(old, index, where, axis=next(iter(change.positions), 0))


def _fresh_state(tx: optax.GradientTransformation, params: Any, plan: Plan) -> Any:
  """The state as `init` makes it; where it cannot for want of a period, it says what to do."""
  try:
    return tx.init(params)
  except ValueError as error:
    if any(change.layers for change in plan.changes):
      raise ValueError(f"{error}: {_LAYERS_OF_PERIODS}") from error
    if plan.alpha in _trees.shapes(params):
      raise ValueError(
        f"{error} (the growth has added the gate {_paths.join(plan.alpha)!r}: a cadence needs a"
        " period for it too, which oc.by_path({...}, default=1) has before it is there)"
      ) from error
    raise


def _sources(
  plan: Plan, before: Collection[_paths.Path], after: Iterable[_paths.Path]
) -> dict[_paths.Path, _paths.Path | None]:
  """For the path of each parameter the one that it had before; None for one that is new."""
  if plan.grows and plan.alpha in before:  # the merge of that plan
    return {path: path if path in before else None for path in after}
  moved = {new: path for path, new in plan.moved.items()} if plan.grows else plan.moved
  added = {change.path for change in plan.changes if change.before is None}
  origins = {path: moved.get(path, path) for path in after}
  return {
    path: origin if origin in before and path not in added else None
    for path, origin in origins.items()
  }


def _regions(state: Any) -> dict[Keys, list[str]]:
  """The names of the regions of every group of a cadence, or of what measures like one."""

  def has_regions(node: Any) -> bool:
    return isinstance(getattr(node, "regions", None), Regions)

  found: dict[Keys, list[str]] = {}
  for keys, node in jax.tree_util.tree_flatten_with_path(state, is_leaf=has_regions)[0]:
    if has_regions(node):
      groups = (*keys, jax.tree_util.GetAttrKey("groups"))
      for group, names in node.regions.names.items():
        found[*groups, jax.tree_util.DictKey(group)] = names
  return found


def _of_group(keys: Keys, regions: Mapping[Keys, list[str]]) -> list[str] | None:
  """The regions of the group that has a leaf beside its optimizer's state; None where none has."""
  n = next((n for n in range(len(keys)) if keys[:n] in regions), None)
  if n is None or getattr(keys[n], "name", None) == "inner_state":
    return None
  return regions[keys[:n]]


def _is_by_region(leaf: Any, names: list[str] | None) -> bool:
  return names is not None and np.shape(leaf) == per_region(len(names))


def _by_region(
  old: Any, new: Any, before: list[str], after: list[str], origins: Mapping[str, str | None]
) -> np.ndarray:
  """What is kept for each region.

  Args:
    old: What was kept for the regions `before`.
    new: What `init` makes for the regions `after`.
    before: Names of regions.
    after: Likewise.
    origins: For the name of each parameter the one that it had before; None for one that is new.
  """
  values, places = np.array(new), {name: i for i, name in enumerate(before)}
  for i, name in enumerate(after):
    # Of several regions in a parameter each has a number behind its name.
    whole, _, number = (name, "", "") if name in origins else name.rpartition("/")
    origin = origins.get(whole)
    if origin is not None:
      place = places.get(f"{origin}/{number}" if number else origin)
      values[i] = values[i] if place is None else np.asarray(old)[place]
  return values


def _named(keys: Keys) -> tuple[str, ...]:
  """The names of keys, the same for every kind of container."""
  return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)


def _followed(
  keys: Keys,
  shape: tuple[int, ...],
  parameters: Mapping[Keys, _paths.Path],
  shapes: Mapping[_paths.Path, tuple[int, ...]],
) -> tuple[_paths.Path | None, slice, bool]:
  """Which parameter a leaf of the state follows.

  Returns:
    The path of the parameter, None if it follows none; which of the leaf's keys are those of the
    parameter; and whether the leaf is one of regions: a cadence that cuts a parameter into
    regions has a tuple of them in its place.
  """
  if () in parameters:
    return (() if shape == shapes[()] else None), slice(0, 0), False
  end = len(keys)
  while end > 0:
    for start in range(end):
      if keys[start:end] in parameters:
        return parameters[keys[start:end]], slice(start, end), end < len(keys)
    if not isinstance(keys[end - 1], jax.tree_util.SequenceKey):
      break
    end -= 1
  names = tuple(str(getattr(key, "key", None)) for key in keys)
  tails = (names[i:] for i in range(len(names)) if names[i:] in shapes)
  path = next(tails, None)
  return path, slice(len(keys) - len(path or ()), len(keys)), False


def _is_sample(keys: Keys) -> bool:
  """Whether a leaf is what a policy has kept of the parameters themselves."""
  names = [getattr(key, "name", None) for key in keys]
  return ("confidence", "sample") in itertools.pairwise(names)


def _is_packed(keys: Keys, leaf: Any, path: _paths.Path, shape: tuple[int, ...]) -> bool:
  """Whether a leaf is a mask of a parameter's shape, packed to bits."""
  of_masks = len(keys) > len(path) and getattr(keys[-len(path) - 1], "name", None) == "masks"
  return of_masks and leaf.dtype == jnp.uint8 and leaf.shape == packing.packed_shape(shape)


def _index(change: LeafChange, old: tuple[int, ...], new: tuple[int, ...], grows: bool) -> Any:
  """Where the smaller of two arrays lies in the larger; None if the plan does not say.

  The arrays have the shapes of the parameter, or only some of its axes (factored moments).
  """
  if change.adds_axis:
    larger, smaller = (new, old) if grows else (old, new)
    (axis,) = change.positions
    return change.inside(smaller) if _without(larger, axis) == smaller else None
  if (old, new) == (change.before, change.after):
    return change.index
  if len(old) != len(new) or change.before is None or change.after is None:
    return None
  at = [np.arange(n) for n in (old if grows else new)]
  for axis, (n, m) in enumerate(zip(old, new, strict=True)):
    if n != m:
      candidates = [
        positions
        for a, positions in change.positions.items()
        if (change.before[a], change.after[a]) == (n, m)
      ]
      if not candidates or any((p != candidates[0]).any() for p in candidates):
        return None
      at[axis] = candidates[0]
  return np.ix_(*at)


def _is_cut(leaf: Any, shape: tuple[int, ...]) -> bool:
  """Whether an array of the state is that of some layers of a stack, which share a period."""
  found = np.shape(leaf)
  same = len(found) == len(shape) > 1 and found[1:] == shape[1:]
  return same and found[0] != shape[0]


def _copied_axis(change: LeafChange, old: tuple[int, ...], new: tuple[int, ...]) -> int | None:
  """Along which axis what is kept of a parameter is copied with it; None if it is not."""
  if change.sources is None or not change.copies_state:
    return None
  if change.adds_axis:
    (added,) = change.positions
    return added if len(new) > added and _without(new, added) == old else None
  if len(old) != len(new):
    return None
  assert change.before is not None
  sizes = change.before[0], len(change.sources)
  axes = [a for a, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]]
  return axes[0] if [(old[a], new[a]) for a in axes] == [sizes] else None


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
  """A shape without one of its axes."""
  return (*shape[:axis], *shape[axis + 1 :])
