"""A value for each leaf, from a tree prefix of the parameters or an `oc.by_path`."""

from collections.abc import Callable, Iterable
from typing import Any

from optax_cadence import _paths
from optax_cadence.schedules.by_path import ByPath


def by_leaf(
  what: str,
  tree: Any,
  params: Any,
  paths: Iterable[_paths.Path],
  is_leaf: Callable[[Any], bool] | None = None,
) -> dict[_paths.Path, Any]:
  """The value of each leaf.

  Args:
    what: What the values are, for errors.
    tree: A tree prefix of the parameters, or an `oc.by_path`.
    params: All parameters.
    paths: The leaves that need a value.
    is_leaf: Which nodes of the prefix are values and no trees; functions always are, also those
      that JAX takes for trees, as `jax.tree_util.Partial`.

  Raises:
    ValueError: If the prefix does not fit the parameters.
  """
  tree = tree(params) if isinstance(tree, ByPath) else tree
  by_prefix = dict(
    _paths.flatten_with_paths(tree, lambda x: callable(x) or (is_leaf is not None and is_leaf(x)))
  )
  known = [path for path, _ in _paths.flatten_with_paths(params)]
  used = {_paths.prefix_of(path, by_prefix) for path in known}
  for prefix in by_prefix:
    if prefix not in used:
      raise ValueError(
        f"{what} of {_paths.join(prefix)!r}: no parameter is there; expected a prefix of"
        f" {_paths.listed(known)}"
      )
  values = {}
  for path in paths:
    covering = _paths.prefix_of(path, by_prefix)
    if covering is None:
      raise ValueError(f"{what} of {_paths.join(path)!r}: expected one in the tree, found none")
    values[path] = by_prefix[covering]
  return values
