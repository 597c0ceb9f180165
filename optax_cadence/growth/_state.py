"""Optimizer state follows its parameters, wherever Optax says that it does."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cadence import _paths
from optax_cadence.growth import _trees
from optax_cadence.growth._phase_in import relative
from optax_cadence.growth._plan import LeafChange
from optax_cadence.growth._plan import Plan
from optax_cadence.pruning import packing


class _Tag:
  """A leaf of a state: the parameter it follows (None: none), and how many keys that has."""

  def __init__(self, path: _paths.Path | None, keys: int, value: Any):
    self.path, self.keys, self.value = path, keys, value


class _Leaf:
  """Stands for a parameter: its path, and how many keys that has. Not a tree, as a tuple is."""

  def __init__(self, path: _paths.Path, keys: int):
    self.path, self.keys = path, keys


class _State(NamedTuple):
  """A state in parts.

  Attributes:
    following: Value by where its copy of the parameter tree stands, and the parameter's path.
    rest: All other leaves, by where they stand. What a transformation keeps by path instead of as
      a copy of the tree, as `prune` does its masks, is one of them: a dict.
    order: What the leaves are, in order: the keys of the two above.
    structure: Its tree structure.
  """

  following: dict[tuple[Any, _paths.Path], Any]
  rest: dict[Any, Any]
  order: list[Any]
  structure: Any


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

  What follows the parameters (moments, accumulators of open windows, masks) keeps its old
  entries bit for bit and gets new ones as `init` makes them; everything else (counters,
  hyperparameters, random keys) is kept, but for what `init` makes NaN, as not known yet: a
  policy's sample of the old parameters tells nothing of the new ones. What follows is told by
  `optax.tree_utils.tree_map_params`.

  Args:
    tx: The transformation that `state` is of.
    state: Its state.
    params: The parameters before.
    new_params: The parameters after, the gate included if there is one.
    plan: The plan by which they differ. The same plan serves for the merge, after which the
      gate's own state is gone.
    new_tx: The transformation after, if it had to be written anew (labels of `partition`
      given as a tree). Its state must have the structure of that of `tx`.

  Returns:
    The state of `new_tx`, or `tx`, for `new_params`.

  Raises:
    ValueError: If the state cannot be followed: it names the leaf. So it is where a cadence
      cuts a leaf into regions, as bands of equal width would be others afterwards.

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
  new_tx = tx if new_tx is None else new_tx
  jax.eval_shape(tx.init, params)  # a cadence remembers the groups of the last tree
  old = _taken_apart(tx, state, params)
  new = _taken_apart(new_tx, new_tx.init(new_params), new_params)
  names = _renamed(old, new)
  changes = relative(plan, params)
  values = []
  for key in new.order:
    if key in new.following:
      (where, path), fresh = key, new.following[key]
      before = old.following.get((names.get(where, where), path))
      values.append(_follow(key, before, fresh, changes, path, plan, params))
    else:
      value = _keep(key, old, new, names)
      if isinstance(value, Mapping):
        value = _follow_by_path(key, value, new.rest[key], changes, plan, params, new_params)
      values.append(value)
  return jax.tree.unflatten(new.structure, values)


def _taken_apart(tx: Any, state: Any, params: Any) -> _State:
  keys = [len(p) for p, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
  paths = [path for path, _ in _paths.flatten_with_paths(params)]
  named = jax.tree.unflatten(
    jax.tree.structure(params), [_Leaf(p, n) for p, n in zip(paths, keys, strict=True)]
  )

  def tag(value: Any, leaf: _Leaf) -> Any:
    return value if isinstance(value, optax.MaskedNode) else _Tag(leaf.path, leaf.keys, value)

  try:
    tagged = optax.tree_utils.tree_map_params(
      tx,
      tag,
      state,
      named,
      is_leaf=lambda x: isinstance(x, optax.MaskedNode),
      transform_non_params=lambda value: _Tag(None, 0, value),
    )
  except (TypeError, ValueError, AttributeError) as error:
    raise ValueError(
      "the state does not follow these parameters leaf by leaf, as"
      " optax.tree_utils.tree_map_params understands it: expected the tree that it was made for."
      " Where a cadence cuts a leaf into regions"
      " (channels, quadrants, masks), they would be others at the new size: flush its windows and"
      f" start it anew with tx.init, or give that leaf one period. ({error})"
    ) from error
  flat, _ = jax.tree_util.tree_flatten_with_path(tagged, is_leaf=lambda x: isinstance(x, _Tag))
  following, rest, order = {}, {}, []
  for path, x in flat:
    if x.path is None:
      rest[path] = x.value
      order.append(path)
    else:
      key = (path[: len(path) - x.keys], x.path)
      following[key] = x.value
      order.append(key)
  structure = jax.tree.structure(tagged, is_leaf=lambda x: isinstance(x, _Tag))
  return _State(following, rest, order, structure)


def _renamed(old: _State, new: _State) -> dict[Any, Any]:
  """Where the copies of the parameter tree stood, for those that stand elsewhere now.

  The groups of a cadence are numbered in the order of their first leaves, which new leaves
  may change.
  """
  held = [_holdings(state) for state in (old, new)]
  names = {}
  for where, paths in held[1].items():
    if paths & held[0].get(where, set()):
      continue
    like = [w for w in held[0] if _alike(w, where) and held[0][w] & paths]
    if like:
      names[where] = max(like, key=lambda w: len(held[0][w] & paths))
  return names


def _holdings(state: _State) -> dict[Any, set[_paths.Path]]:
  found: dict[Any, set[_paths.Path]] = {}
  for where, path in state.following:
    found.setdefault(where, set()).add(path)
  return found


def _alike(one: Any, other: Any) -> bool:
  def kind(key: Any) -> Any:
    return "index" if isinstance(key, jax.tree_util.SequenceKey) else key

  return list(map(kind, one)) == list(map(kind, other))


def _keep(path: Any, old: _State, new: _State, names: Mapping[Any, Any]) -> Any:
  """A leaf that follows no parameter: as it was, if there was one."""
  source, fresh = path, new.rest[path]
  if _unknown(fresh):
    return fresh
  for where, before in names.items():
    at = next((i for i, (a, b) in enumerate(zip(where, before, strict=True)) if a != b), len(where))
    if path[: at + 1] == where[: at + 1]:
      source = before[: at + 1] + path[at + 1 :]
      break
  else:
    if any(_covers(before, path) for before in names.values()):
      return fresh  # a group that is new stands where another one stood
  if source not in old.rest:
    return fresh
  value = old.rest[source]
  if np.shape(value) != np.shape(fresh):
    raise ValueError(
      f"state{jax.tree_util.keystr(path)} follows no parameter and has shape {np.shape(value)}"
      f" before, {np.shape(fresh)} after: it cannot be carried over; start it anew with tx.init"
    )
  return value


def _unknown(x: Any) -> bool:
  """Whether this is NaN throughout."""
  if not isinstance(x, jax.Array) or not jnp.issubdtype(x.dtype, jnp.floating) or x.size == 0:
    return False
  return bool(jnp.isnan(x).all())


def _covers(where: Any, path: Any) -> bool:
  index = [i for i, key in enumerate(where) if isinstance(key, jax.tree_util.SequenceKey)]
  return bool(index) and path[: index[-1] + 1] == where[: index[-1] + 1]


def _follow_by_path(
  key: Any,
  old: Mapping[str, Any],
  fresh: Mapping[str, Any],
  changes: Mapping[_paths.Path, LeafChange],
  plan: Plan,
  params: Any,
  new_params: Any,
) -> dict[str, Any]:
  """A dict by path of leaves that follow parameters; masks may be packed to bits."""
  shapes = [
    {_paths.join(path): shape for path, shape in _trees.shapes(tree).items()}
    for tree in (params, new_params)
  ]
  named = {_paths.join(path): path for path in _trees.shapes(new_params)}
  values = {}
  for name, new in fresh.items():
    if name not in named:
      raise ValueError(
        f"state{jax.tree_util.keystr(key)} holds {name!r}: expected one of"
        f" {_paths.listed(named.values())}"
      )
    before = old.get(name)
    packed = new.dtype == jnp.uint8
    if packed:
      new = packing.unpack(new, shapes[1][name])
      before = None if before is None else packing.unpack(before, shapes[0][name])
    value = _follow((key, named[name]), before, new, changes, named[name], plan, params)
    values[name] = packing.pack(jnp.asarray(value)) if packed else value
  return values


def _follow(
  key: Any,
  old: Any,
  fresh: Any,
  changes: Mapping[_paths.Path, LeafChange],
  path: _paths.Path,
  plan: Plan,
  params: Any,
) -> Any:
  """A leaf that follows a parameter."""
  change = changes.get(path)
  where = f"state{jax.tree_util.keystr(key[0])} of {_paths.join(path)!r}"
  if old is None:
    if path in _trees.shapes(params):
      raise ValueError(f"{where}: expected it in the state before, found nothing")
    return fresh
  if np.shape(old) == np.shape(fresh):
    return old
  at = None if change is None else _index(change, np.shape(old), np.shape(fresh), plan.grows)
  if at is None:
    raise ValueError(
      f"{where} has shape {np.shape(old)} before and {np.shape(fresh)} after, which the plan does"
      " not explain: a cadence that cuts the leaf into regions, which would be others at the new"
      " size, or an optimizer that stores large leaves in another way than small ones"
    )
  return _trees.placed(fresh, at, old) if plan.grows else _trees.taken(old, at)


def _index(change: LeafChange, old: Any, new: Any, grows: bool) -> Any:
  """Where the smaller of two arrays lies in the larger; None if the plan does not say.

  An array of the parameter's shape, or one that has only some of its axes (factored moments).
  """
  if (old, new) == (change.before, change.after):
    return change.index
  if len(old) != len(new) or change.before is None or change.after is None:
    return None
  small = old if grows else new
  at = [np.arange(n) for n in small]
  for axis, (n, m) in enumerate(zip(old, new, strict=True)):
    if n != m:
      like = [
        p for a, p in change.positions.items() if (change.before[a], change.after[a]) == (n, m)
      ]
      if not like or any((p != like[0]).any() for p in like):
        return None
      at[axis] = like[0]
  return np.ix_(*at)
