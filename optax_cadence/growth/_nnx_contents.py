"""What the modules of a live model hold, remembered so that it can be put back.

A growth may put modules into lists and attributes. What stood there before is kept as paths and
not as objects, so that a clone of the model puts back its own.
"""

from collections.abc import Callable, Mapping, MutableSequence, Sequence
from typing import Any, NamedTuple

from flax import nnx

from optax_cadence import _paths
from optax_cadence.growth import _nnx_model
from optax_cadence.growth._plan import Plan


class _At(NamedTuple):
  """Stands for the object at a path of the changed model."""

  path: _paths.Path


class _Made(NamedTuple):
  """Stands for a tuple, list or dict that the changed model no longer holds: it is made anew."""

  kind: Any
  items: tuple[Any, ...]


Contents = Mapping[_paths.Path, Mapping[Any, Any]]


def snapshot(model: Any) -> list[tuple[Any, dict[Any, Any]]]:
  """Every module, list and dict of a model, and what it holds."""
  nodes = _nodes(model).values()
  return [(node, _items(node)) for node in nodes if not isinstance(node, nnx.Variable)]


def changes(before: list[tuple[Any, dict[Any, Any]]], model: Any) -> Contents:
  """What those nodes held at a snapshot that hold something else now, by their present path."""
  different = [(node, items) for node, items in before if not _same(items, _items(node))]
  if not different:
    return {}
  paths = {id(node): path for path, node in _nodes(model).items()}

  def encoded(value: Any) -> Any:
    if id(value) in paths:
      return _At(paths[id(value)])
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
      return _Made(tuple, tuple(map(encoded, value)))
    if isinstance(value, MutableSequence):
      return _Made(type(value), tuple(map(encoded, value)))
    if isinstance(value, dict):
      return _Made(dict, tuple((name, encoded(x)) for name, x in value.items()))
    return value

  return {
    paths[id(node)]: {name: encoded(value) for name, value in items.items()}
    for node, items in different
    if id(node) in paths
  }


def restore(model: Any, contents: Contents) -> None:
  """Puts back what the modules of a model held."""
  nodes = _nodes(model)

  def decoded(value: Any) -> Any:
    if isinstance(value, _At):
      return nodes[value.path]
    if not isinstance(value, _Made):
      return value
    if value.kind is dict:
      return {name: decoded(x) for name, x in value.items}
    return value.kind([decoded(x) for x in value.items])

  gone = [path for path in contents if path not in nodes]
  if gone:
    raise ValueError(
      f"{_paths.listed(gone)} of {type(model).__name__}: expected the modules to stand where the"
      " growth left them, found none there"
    )
  for path, items in contents.items():
    _put(nodes[path], {name: decoded(value) for name, value in items.items()})


def replace(model: Any, path: _paths.Path, new: Callable[[Any], Any]) -> None:
  """Puts `new(module)` in the place of the module at a path."""
  *outer, name = path
  parent = _at(model, outer)
  items, key = _items(parent), _key(parent, name)
  _put(parent, {**items, key: new(items[key])})


def unwrap(model: Any, plan: Plan) -> None:
  """Puts each module of which a growth has made experts back in its old place."""
  if any(change.adds_axis for change in plan.changes):
    for change in plan.changes:
      if change.before is None:  # the weights of a router
        *place, _, _ = change.path
        replace(model, tuple(place), lambda mixture: mixture.experts)


def _nodes(model: Any) -> dict[_paths.Path, Any]:
  """The modules, variables, lists and dicts of a model, by path."""
  kinds = (_nnx_model.OBJECT, nnx.Variable, list, dict)
  nodes = nnx.iter_graph(model)
  return {tuple(map(str, path)): node for path, node in nodes if isinstance(node, kinds)}


def _at(node: Any, path: Sequence[str]) -> Any:
  """What stands at a path below a module, list or dict."""
  for name in path:
    node = _items(node)[_key(node, name)]
  return node


def _key(node: Any, name: str) -> Any:
  """The key of what a module, list or dict holds under a name."""
  return next(key for key in _items(node) if str(key) == name)


def _items(node: Any) -> dict[Any, Any]:
  """What a module, list or dict holds, by name."""
  if isinstance(node, MutableSequence):
    return dict(enumerate(node))
  return dict(node) if isinstance(node, dict) else _nnx_model.attributes_of(node)


def _same(items: dict[Any, Any], others: dict[Any, Any]) -> bool:
  """Whether both hold the same objects, by the same names."""
  return items.keys() == others.keys() and all(items[name] is others[name] for name in items)


def _put(node: Any, items: dict[Any, Any]) -> None:
  """Makes a module, list or dict hold these."""
  if isinstance(node, MutableSequence):
    node.clear()
    node.extend(items.values())
  elif isinstance(node, dict):
    node.clear()
    node.update(items)
  else:
    now = _items(node)
    for name in now.keys() - items.keys():
      delattr(node, name)
    for name, value in items.items():
      if name not in now or now[name] is not value:
        setattr(node, name, value)
