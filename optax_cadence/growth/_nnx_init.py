"""Where the new entries of a live NNX model's layers come from, if nobody says."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optax_cadence import _paths
from optax_cadence.growth import _nnx_model
from optax_cadence.growth._fresh import Fresh
from optax_cadence.growth._plan import Plan

# What constructors of Flax call the initializers of leaves, where it is not `<leaf>_init`.
_NAMES = {
  ("LoRA", "lora_a"): "a_initializer",
  ("LoRA", "lora_b"): "b_initializer",
  ("WeightNorm", "scales"): "scale_init",
}
# Variables that layers of Flax make without an argument for their initializer.
_STATISTICS: dict[tuple[str, str], Callable[..., Any]] = {
  ("BatchNorm", "mean"): nnx.initializers.zeros_init(),
  ("BatchNorm", "var"): nnx.initializers.ones_init(),
  ("SpectralNorm", "batch_stats"): nnx.initializers.normal(),
}
_CELLS = (nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.SimpleCell, nnx.GRUCell)
_OF_STATE = ("dense_h", "hi", "hf", "hg", "ho")  # the layers of a cell that read its state


class _Leaf(NamedTuple):
  """A variable, and the modules that hold it.

  Attributes:
    module: The module.
    name: The attribute that holds it, itself or in a dict or list.
    place: The attribute in which the module stands, "" for the model.
    above: The module that has this attribute; None for the model.
  """

  module: Any
  name: str
  place: str
  above: Any

  def __str__(self) -> str:
    return f"{self.name!r} of {type(self.module).__name__}"


def default_init(model: nnx.Module, rngs: nnx.Rngs | jax.Array | None = None) -> Fresh:
  """Fresh values by the initializers that layers keep, or that their classes have by default.

  (Layers of Flax 0.11 and later keep none.) A class of the user's takes part if it has an attribute
  `<leaf>_init`, or its constructor a parameter of that name with a default. All other variables of
  such classes, a class token or the scale of a LayerScale, are drawn like their old entries: from
  a normal distribution with the mean and the deviation of those. A plan says where that is so.

  Args:
    model: The model before it grows.
    rngs: Random numbers, or a key.

  Returns:
    A function `(path, shape, dtype) -> array` for `Plan.apply`; it raises a `ValueError` that
    names a leaf for which nothing is known and which has no mean.
  """
  modules, old = _nnx_model.parts(model).modules, _paths.by_path(_nnx_model.variables(model))
  source = rngs if isinstance(rngs, nnx.Rngs) else nnx.Rngs(0 if rngs is None else rngs)

  def read(path: _paths.Path, shape: tuple[int, ...], dtype: Any) -> Any:
    leaf = _leaf(modules, path)
    module, name = leaf.module, leaf.name
    initializer = _initializer(leaf)
    if initializer is None:
      return _alike(old[path], source.params(), shape, f"{_paths.join(path)!r}, {leaf}")
    kernel = name in ("kernel", "embedding")
    axes = _nnx_model.rank(module, getattr(module, name)) if kernel else len(shape)
    own = flat = shape[len(shape) - axes :]
    if isinstance(module, nnx.LinearGeneral) and kernel:
      n = len(module.in_features)
      flat = (int(np.prod(own[:n])), int(np.prod(own[n:])))
    if own == shape:
      return _drawn(initializer, source.params(), flat, dtype).reshape(shape)
    # Layers that are stacked are initialized one by one.
    keys = jax.random.split(source.params(), int(np.prod(shape[:-axes])))
    return jnp.stack([_drawn(initializer, key, flat, dtype) for key in keys]).reshape(shape)

  return read


def _drawn(initializer: Any, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """Fresh values."""
  if str(getattr(initializer, "__module__", "")).split(".")[0] in ("jax", "flax"):
    return _compiled(initializer, key, shape, dtype)
  return initializer(key, shape, dtype)  # it may be one that cannot be traced


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _compiled(initializer: Any, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """One program for all layers of a shape, and not one for each operation."""
  return initializer(key, shape, dtype)


def notes(model: nnx.Module, plan: Plan) -> tuple[str, ...]:
  """What `default_init` has to make up for a plan, in words."""
  modules = _nnx_model.parts(model).modules
  leaves = [_leaf(modules, change.path) for change in plan.changes if change.before is not None]
  made_up = dict.fromkeys(str(leaf) for leaf in leaves if _initializer(leaf) is None)
  return tuple(
    f"new entries of {leaf}: drawn like the old ones, normal, of their mean and deviation"
    for leaf in made_up
  )


def _leaf(modules: dict[_paths.Path, Any], path: _paths.Path) -> _Leaf:
  n, *above = (n for n in reversed(range(len(path))) if path[:n] in modules)
  parent = modules[path[: above[0]]] if above else None
  return _Leaf(modules[path[:n]], path[n], path[n - 1] if n else "", parent)


def _initializer(leaf: _Leaf) -> Callable[..., Any] | None:
  """The initializer of a leaf, as far as it is known."""
  name = f"{leaf.name}_init"
  for cls in type(leaf.module).__mro__:
    if statistics := _STATISTICS.get((cls.__name__, leaf.name)):
      return statistics
    name = _NAMES.get((cls.__name__, leaf.name), name)
  kept = getattr(leaf.module, name, None)
  if callable(kept):
    return kept
  of_state = isinstance(leaf.above, _CELLS) and leaf.place in _OF_STATE and leaf.name == "kernel"
  made_by = (leaf.above, "recurrent_kernel_init") if of_state else (leaf.module, name)
  parameter = inspect.signature(type(made_by[0]).__init__).parameters.get(made_by[1])
  default = None if parameter is None else parameter.default
  return default if callable(default) and default is not inspect.Parameter.empty else None


def _alike(old: Any, key: Any, shape: tuple[int, ...], what: str) -> Any:
  """Entries like the old ones of a leaf: normal, with their mean and deviation."""
  if not jnp.issubdtype(old.dtype, jnp.floating):
    raise ValueError(
      f"no initializer is known for {what}, and {old.dtype} entries have no mean: give fresh="
    )
  entries = np.asarray(old, np.float64)
  return float(entries.mean()) + float(entries.std()) * jax.random.normal(key, shape)
