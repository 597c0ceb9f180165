"""Names for the leaves of a parameter tree, the same for every kind of container.

A dict, a Linen `FrozenDict`, an `nnx.State` and a dataclass that hold the same
parameters give the same paths, so that cadences written for one fit the other.
Nothing here looks at the values of the leaves.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

Path = tuple[str, ...]


def join(path: Path) -> str:
  """`/`-joined path; several may read the same, since a key may have a slash in it: see `names`."""
  return "/".join(path)


def names(paths: Iterable[Path]) -> list[str]:
  """The names of the leaves of a tree, as errors, tables and keys show them, all distinct.

  They are the `/`-joined paths; of several that read the same, as those of
  `{"a": {"b": x}, "a/b": y}`, all but the first in the order of the tree have a number: `a/b#2`.
  """
  return distinct(map(join, paths))


def distinct(names: Iterable[str]) -> list[str]:
  """The names in order, with a number where one was there before."""
  taken: dict[str, None] = {}
  for name in names:
    taken[unused(name, taken)] = None
  return list(taken)


def listed(paths: Iterable[Path]) -> str:
  """The first few paths, for an error."""
  shown = list(map(repr, names(paths)))
  return ", ".join(shown[:8] + ["…"] * (len(shown) > 8)) or "nothing"


def prefix_of(path: Path, given: Collection[Path]) -> Path | None:
  """The shortest prefix of a path that is among these, as in a tree prefix; None if none is."""
  for n in range(len(path) + 1):
    if path[:n] in given:
      return path[:n]
  return None


def unused(name: str, names: Collection[str]) -> str:
  """The name, with a number where it is taken."""
  numbered = (f"{name}#{i}" for i in itertools.count(2))
  return next(n for n in itertools.chain([name], numbered) if n not in names)


def check_same(what: str, as_where: str, expected: Any, found: Any) -> None:
  """Raises `ValueError` unless two trees have the same paths and shapes."""
  structures: Any = jax.tree.structure(expected), jax.tree.structure(found)
  want, have = jax.tree.leaves(expected), jax.tree.leaves(found)
  if structures[0] == structures[1] and list(map(np.shape, want)) == list(map(np.shape, have)):
    return
  difference = mismatch(expected, found)
  if difference:
    raise ValueError(f"{what} of {difference} ({as_where})")


def mismatch(expected: Any, found: Any) -> str | None:
  """The first leaf at which two trees differ in path or shape; None if there is none.

  Containers are not compared: a dict and a dataclass with the same paths are the same.
  """
  want, have = _shapes(expected), _shapes(found)
  paths = list(want | have)
  for path, name in zip(paths, names(paths), strict=True):
    if want.get(path) != have.get(path):
      return f"{name!r}: expected {described(want.get(path))}, found {described(have.get(path))}"
  return None


def _shapes(tree: Any) -> dict[Path, tuple[int, ...]]:
  return {path: np.shape(leaf) for path, leaf in flatten_with_paths(tree)}


def described(shape: tuple[int, ...] | None) -> str:
  """A shape, or that there is none, for an error."""
  return "nothing there" if shape is None else f"shape {shape}"


def flatten_with_paths(tree: Any, is_leaf: Any = None) -> list[tuple[Path, Any]]:
  """Leaves of `tree` in order, each with its path.

  The attribute under which an `nnx.Variable` keeps its array is not part of the
  path: the same parameters have the same paths with and without the wrapper.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  wrapped: set[Any] = set()
  for path, _ in flat:
    if path and _name(path[-1]) == "value":
      wrapped = _variable_paths(tree)
      break
  rows = []
  for path, leaf in flat:
    rows.append((tuple(map(_name, path[:-1] if path[:-1] in wrapped else path)), leaf))
  return rows


def by_path(tree: Any, is_leaf: Any = None) -> dict[Path, Any]:
  """Every leaf of a tree, by its path."""
  return dict(flatten_with_paths(tree, is_leaf))


def nested(leaves: Mapping[Path, Any]) -> Any:
  """The leaves in dicts of dicts, a level for each name in a path, which `by_path` undoes.

  What the tree was kept in does not matter then, nor what is written into a name. The leaf of a
  tree that is a single leaf is in no dict.
  """
  if () in leaves:
    return leaves[()]
  tree: dict[str, Any] = {}
  for (*names, last), x in leaves.items():
    node = tree
    for name in names:
      node = node.setdefault(name, {})
    node[last] = x
  return tree


def map_with_paths(fn: Callable[[Path, Any], Any], tree: Any) -> Any:
  """The tree with what `fn(path, leaf)` makes of each leaf."""
  leaves = [fn(path, leaf) for path, leaf in flatten_with_paths(tree)]
  return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def by_keys(tree: Any) -> dict[Any, Any]:
  """The leaves of a tree by their key paths, which are those of its kinds of containers alone."""
  return dict(jax.tree_util.tree_flatten_with_path(tree)[0])


def arrays(tree: Any) -> list[Any]:
  """The leaves of a tree, out of the variables in which NNX keeps them."""
  leaves = []
  for node in jax.tree.leaves(tree, is_leaf=is_variable):
    # Before Flax 0.11 a variable is no tree.
    inside = node.value if jax.tree_util.all_leaves([node]) and is_variable(node) else node
    leaves += jax.tree.leaves(inside)
  return leaves


def set_arrays(tree: Any, new: Sequence[Any]) -> None:
  """Puts arrays into the variables of a tree, in the order in which `arrays` gives them.

  They are put there as they are: what a parameter's metadata does to a value that is set, it does
  not to a moment of its optimizer.
  """
  assert len(new) == len(arrays(tree))
  rest = iter(new)
  for variable in filter(is_variable, jax.tree.leaves(tree, is_leaf=is_variable)):
    current = hasattr(type(variable), "set_raw_value")
    old = variable.get_raw_value() if current else variable.raw_value
    # Where a leaf is cut into several tensors, all of them are in its variable.
    structure: Any = jax.tree.structure(old)
    value = structure.unflatten(itertools.islice(rest, structure.num_leaves))
    if current:
      variable.set_raw_value(value)
    else:
      variable.raw_value = value


def without_variables(tree: Any) -> Any:
  """The tree with what is in each variable of NNX in its place."""

  def bare(node: Any) -> Any:
    return next(iter(arrays(node)), None) if is_variable(node) else node

  return jax.tree.map(bare, tree, is_leaf=is_variable)


def parameters(tree: Any) -> Any:
  """The state of an NNX model without what is no parameter, such as statistics and random keys.

  Any other tree is left as it is, and so is a state in which nothing is a `Param`.
  """
  nodes = jax.tree.leaves(tree, is_leaf=is_variable)
  if not any(map(_is_param, nodes)):
    return tree

  def kept(node: Any) -> Any:
    return optax.MaskedNode() if is_variable(node) and not _is_param(node) else node

  return jax.tree.map(kept, tree, is_leaf=is_variable)


def _is_param(node: Any) -> bool:
  # Before Flax 0.11 a state holds stand-ins for variables, which say of what type those are.
  kind = getattr(node, "type", None) if is_variable(node) else None
  return _is_of_nnx(kind if isinstance(kind, type) else type(node), "Param")


def _name(key: Any) -> str:
  for attribute in ("key", "name", "idx"):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)


def _variable_paths(tree: Any) -> set[tuple[Any, ...]]:
  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)
  return {p for p, leaf in flat if is_variable(leaf)}


def is_variable(node: Any) -> bool:
  """Whether a node is a variable of NNX, which has an array in it."""
  return _is_of_nnx(type(node), "Variable", "VariableState")


def is_optimizer_variable(node: Any) -> bool:
  """Whether a node is a variable in which `nnx.Optimizer` keeps a part of its state."""
  return _is_of_nnx(type(node), "OptState")


def _is_of_nnx(kind: type, *names: str) -> bool:
  # By name: the core does not import Flax.
  return any(c.__name__ in names and c.__module__.startswith("flax.nnx") for c in kind.__mro__)
