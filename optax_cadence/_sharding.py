"""What the types of arrays say about devices: explicit mesh axes, and axes that values vary over.

On a mesh with explicit axes (what `jax.make_mesh` makes) the type of an array says how it lies, and
operations want operands that lie alike. In `jax.shard_map` it says over which axes it varies.
Everywhere else, and in versions of JAX without these types, nothing here does anything.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax


def spec_of(x: Any) -> tuple[Any, ...] | None:
  """The mesh axes of each axis of an array; None where its type does not say."""
  sharding = getattr(jax.typeof(x), "sharding", None)
  spec = tuple(getattr(sharding, "spec", ()))
  return spec if any(axes is not None for axes in spec) else None


def shards_of(x: jax.Array) -> tuple[int, ...]:
  """Into how many parts each axis of an array falls, as far as its type says so."""
  spec = spec_of(x)
  if spec is None:
    return (1,) * x.ndim
  sizes = jax.typeof(x).sharding.mesh.shape
  names = [() if axes is None else axes if isinstance(axes, tuple) else (axes,) for axes in spec]
  return tuple(math.prod(sizes[name] for name in axes) for axes in names)


def gathered(x: jax.Array, axes: Iterable[int]) -> jax.Array:
  """The array, lying so that every device has the whole of these axes."""
  spec, axes = spec_of(x), set(axes)
  if spec is None or not axes:
    return x
  kept = [None if i in axes else names for i, names in enumerate(spec)]
  return jax.sharding.reshard(x, jax.sharding.PartitionSpec(*kept))


def lying_as(x: jax.Array, like: jax.Array) -> jax.Array:
  """The array, lying as another of its shape."""
  spec, wanted = spec_of(x), spec_of(like)
  if spec == wanted:
    return x
  return jax.sharding.reshard(x, jax.sharding.PartitionSpec(*(wanted or ())))


def automatically(fn: Callable[..., Any], args: Sequence[Any], specs: Any) -> Any:
  """`fn(*args)` as on a mesh with automatic axes, where operands need not lie alike.

  Args:
    fn: A function of trees of arrays, which closes over none that say how they lie.
    args: Its arguments.
    specs: How the result is to lie: a tree like it of what `spec_of` says.
  """
  if not any(map(spec_of, jax.tree.leaves(args))):
    return fn(*args)
  is_spec = lambda node: node is None or isinstance(node, tuple)  # noqa: E731
  wanted = jax.tree.map(
    lambda spec: jax.sharding.PartitionSpec(*(spec or ())), specs, is_leaf=is_spec
  )
  return jax.sharding.auto_axes(fn, out_sharding=wanted)(*args)


def axes_of(tree: Any) -> frozenset[Any]:
  """The axes of `jax.shard_map` that any array, or type of one, in a tree varies over."""
  found: frozenset[Any] = frozenset()
  for x in jax.tree.leaves(tree):
    kind = x if isinstance(x, jax.core.AbstractValue) else jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # `vma` before JAX 0.10
    found |= getattr(kind, "vma", frozenset()) if manual is None else manual.varying
  return found


def in_order(axes: Iterable[Any]) -> tuple[Any, ...]:
  """The axes by name: that of a set differs from process to process."""
  return tuple(sorted(axes, key=str))


def varying(tree: Any, axes: frozenset[Any]) -> Any:
  """The tree, with arrays that all vary over these axes; they keep their values."""

  def cast(x: Any) -> Any:
    missing = in_order(axes - axes_of(x))
    if not missing:
      return x
    if hasattr(jax.lax, "pcast"):
      return jax.lax.pcast(x, missing, to="varying")
    return getattr(jax.lax, "pvary")(x, missing)  # noqa: B009 (as it was called before)

  return jax.tree.map(cast, tree) if axes else tree
