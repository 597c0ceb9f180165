"""Trees of variables: finding leaves by path, putting new ones in, telling arrays from flags."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths


def shapes(tree: Any) -> dict[_paths.Path, tuple[int, ...]]:
  """Shape of every leaf, by path."""
  return {path: tuple(np.shape(leaf)) for path, leaf in _paths.flatten_with_paths(tree)}


def with_leaves(tree: Any, new: Mapping[_paths.Path, Any]) -> Any:
  """The tree with the leaves of some paths replaced."""
  flat = [new.get(path, leaf) for path, leaf in _paths.flatten_with_paths(tree)]
  return jax.tree.unflatten(jax.tree.structure(tree), flat)


def find(known: Any, name: str) -> _paths.Path:
  """The path that is written `name`.

  Raises:
    ValueError: If there is none.
  """
  path = tuple(name.split("/"))
  if path not in known:
    raise ValueError(f"no leaf {name!r}: expected one of {_paths.listed(known)}")
  return path


def under(paths: Iterable[_paths.Path], name: str) -> list[_paths.Path]:
  """Those of some paths that are written `name`, or stand below it."""
  prefix = tuple(name.split("/"))
  return [path for path in paths if path[: len(prefix)] == prefix]


def layers(tree: Any, name: str) -> list[_paths.Path]:
  """The paths of all layers, or leaves, that a path or a glob names, in the order of the tree.

  As for `by_path`, `*` also crosses `/`; what is below a path that matches is not looked at.

  Raises:
    ValueError: If a glob matches nothing.
  """
  if not set("*?[") & set(name):
    return [tuple(name.split("/"))]
  found: dict[_paths.Path, None] = {}
  for path in shapes(tree):
    prefixes = (path[:n] for n in range(1, len(path) + 1))
    matching = (prefix for prefix in prefixes if fnmatch.fnmatchcase(_paths.join(prefix), name))
    if first := next(matching, None):
      found[first] = None
  if not found:
    raise ValueError(
      f"{name!r} matches nothing: expected layers or leaves of {_paths.listed(shapes(tree))}"
    )
  return list(found)


def kernel(tree: Any, prefix: _paths.Path) -> _paths.Path:
  """The path of a layer's kernel: of the leaves at or under a path the one with the most axes.

  Of several it is the one that the layer itself has, to which those below are added, as of LoRA.

  Raises:
    ValueError: If there are none, or several.
  """
  under = {p: len(s) for p, s in shapes(tree).items() if p[: len(prefix)] == prefix}
  kernels = [path for path, axes in under.items() if axes == max(under.values())]
  own = [path for path in kernels if len(path) == len(prefix) + 1]
  kernels = own if len(own) == 1 else kernels
  if len(kernels) != 1:
    raise ValueError(
      f"{_paths.join(prefix)!r}: expected one kernel there, found"
      f" {_paths.listed(kernels or shapes(tree))}; name the layer, or the leaf, inside"
    )
  return kernels[0]


def insert(tree: Any, path: _paths.Path, value: Any) -> Any:
  """The nested mapping with `value` at a path where nothing is.

  Raises:
    ValueError: If something is there, or the tree is no mapping.
  """
  if not isinstance(tree, Mapping):
    raise ValueError(
      f"cannot add {_paths.join(path)!r} to a {type(tree).__name__}: expected a mapping; put the"
      ' parameters into a dict, {"net": params}'
    )
  key, rest = _key(tree, path[0]), path[1:]
  if not rest and key in tree:
    raise ValueError(f"{_paths.join(path)!r}: expected nothing at this path, found something")
  new = insert(tree.get(key, {}), rest, value) if rest else value
  return _like(tree, {**tree, key: new})


def rearranged(tree: Any, leaves: Mapping[_paths.Path, Any]) -> Any:
  """The nested mapping with these leaves and no others, in mappings of the same kinds."""
  result = with_leaves(tree, leaves)
  known = shapes(tree)
  for path in leaves:
    result = result if path in known else insert(result, path, leaves[path])
  for path in known:
    result = result if path in leaves else remove(result, path)
  return result


def remove(tree: Any, path: _paths.Path) -> Any:
  """The nested mapping without what is at a path, and without mappings that this empties."""
  key, rest = _key(tree, path[0]), path[1:]
  if not isinstance(tree, Mapping) or key not in tree:
    raise ValueError(f"expected {_paths.join(path)!r}, found no such key in {type(tree).__name__}")
  below = remove(tree[key], rest) if rest else {}
  if below:
    return _like(tree, {**tree, key: below})
  return _like(tree, {k: v for k, v in tree.items() if k != key})


def _key(tree: Any, name: str) -> Any:
  """The key that is written so, or would be: modules in a list have integers."""
  for key in tree:
    if str(key) == name:
      return key
  in_list = name.isdigit() and tree and all(isinstance(key, int) for key in tree)
  return int(name) if in_list else name


def _like(tree: Any, items: dict[Any, Any]) -> Any:
  """A mapping of the same kind."""
  kind: Any = type(tree)
  return kind(items)


def partition_arrays(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
  """The arrays of a tree, and a function that puts others in their place."""
  flat, structure = jax.tree.flatten(tree)

  def rebuild(arrays: list[Any]) -> Any:
    remaining = iter(arrays)
    return jax.tree.unflatten(structure, [next(remaining) if is_array(x) else x for x in flat])

  return [x for x in flat if is_array(x)], rebuild


def is_array(x: Any) -> bool:
  """Whether a leaf is an array, or stands for one."""
  return hasattr(x, "shape") and hasattr(x, "dtype")


def placed(large: Any, index: Any, small: Any, what: str) -> Any:
  """`large` with `small` at an index, laid out over devices as `small` is.

  On the host: nothing is compiled for a shape that is used once.
  """
  result = np.array(large)
  result[index] = np.asarray(small)
  return like(result, small, what)


def taken(large: Any, index: Any, what: str, *, axis: int = 0) -> Any:
  """The entries of `large` at an index, laid out over devices as `large` is.

  If the index takes an axis away, `axis` says which. Done on the host, as in `placed`.
  """
  if jax.dtypes.issubdtype(jnp.asarray(large).dtype, jax.dtypes.prng_key):
    return large[index]
  return like(np.asarray(large)[index], large, what, axis=axis)


def like(value: Any, other: Any, what: str, *, axis: int = 0) -> Any:
  """The value as an array that is laid out over devices as another is, which has another size.

  The value may have one axis more, or less, than the other; one more is not divided.

  Args:
    value: The value.
    other: The other array.
    what: What the value is called in errors.
    axis: Which axis that is.

  Raises:
    ValueError: If its size cannot be divided among the devices as that of the other is.
  """
  if not isinstance(other, jax.Array) or not other.committed:
    return jnp.asarray(value)
  sharding: Any = other.sharding
  more = np.ndim(value) - other.ndim
  if more and isinstance(sharding, jax.sharding.NamedSharding):
    axes = [*sharding.spec, *[None] * (other.ndim - len(sharding.spec))]
    axes[axis : axis + (more < 0)] = [None] * (more > 0)
    sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*axes))
  try:
    return jax.device_put(value, sharding)
  except ValueError as error:
    raise ValueError(
      f"{what} is laid out over devices by {other.sharding}: expected a shape that divides among"
      f" them, found {np.shape(value)} in place of {np.shape(other)}; grow by a multiple of the"
      " number of devices along that axis, or lay the array out in another way first"
    ) from error


def smaller(leaf: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
  """Shape and dtype of a leaf at another shape, to trace a program with.

  On a mesh with explicit axes the layout of an array is a part of its type.
  """
  aval: Any = jax.typeof(leaf)
  explicit = jax.sharding.AxisType.Explicit in aval.sharding.mesh.axis_types
  return jax.ShapeDtypeStruct(shape, aval.dtype, sharding=aval.sharding if explicit else None)


def check_concrete(what: str, tree: Any) -> None:
  """Raises `ValueError` if a leaf is being traced: growth happens outside jit."""
  for path, leaf in _paths.flatten_with_paths(tree):
    if isinstance(leaf, jax.core.Tracer):
      raise ValueError(
        f"{what}: {_paths.join(path)!r} of shape {np.shape(leaf)} is being traced; shapes change"
        " outside jit, grad and vmap, once"
      )
