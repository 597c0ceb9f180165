"""A live NNX model as a tree of arrays and a function of it, and what its layers know of sizes."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optax_cadence import _paths
from optax_cadence.growth import _trees
from optax_cadence.growth._fresh import Fresh
from optax_cadence.growth._plan import Plan


def get_array(variable: Any) -> Any:
  """The array in a variable, in every version of Flax that is supported."""
  return variable.get_value() if hasattr(variable, "get_value") else variable.value


def set_array(variable: Any, value: Any) -> None:
  """Puts an array into a variable."""
  if hasattr(variable, "set_value"):
    variable.set_value(value)
  else:
    variable.value = value


def variables(model: nnx.Module) -> dict[str, Any]:
  """All variables of a model as a nested dict of arrays: the tree that its plans are for."""
  return nnx.to_pure_dict(nnx.state(model))


def set_variables(model: nnx.Module, tree: Any) -> None:
  """Puts the arrays of such a tree into the model."""
  nnx.update(model, filled(nnx.state(model), tree))


def paths_of_variables(model: nnx.Module) -> list[tuple[Any, _paths.Path]]:
  """The variables of a model, as the objects that they are, and where each stands."""
  return [
    (node, tuple(map(str, path)))
    for path, node in nnx.iter_graph(model)
    if isinstance(node, nnx.Variable)
  ]


def forward(model: nnx.Module) -> Callable[..., Any]:
  """The forward pass as a function of `variables(model)`; it returns what changes too."""
  graphdef, state = nnx.split(model)

  def run(tree: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    copy = nnx.merge(graphdef, filled(state, tree))
    output = copy(*args, **kwargs)
    return output, nnx.to_pure_dict(nnx.state(copy, nnx.Not(nnx.Param)))

  return run


def filled(state: Any, tree: Any) -> Any:
  """The state with the arrays of a nested dict; what is not there stays."""
  leaves = _trees.leaves(tree)
  values = [leaves.get(path, leaf) for path, leaf in _paths.flatten_with_paths(state)]
  return jax.tree.unflatten(jax.tree.structure(state), values)


def fit(model: nnx.Module, keep_groups: bool = False) -> None:
  """Makes the attributes of layers that repeat sizes agree with their arrays.

  Args:
    model: The model; it is changed in place.
    keep_groups: Whether the groups of a `GroupNorm` or `Conv` get wider, instead of more.
  """
  for _, node in nnx.iter_graph(model):
    for kind, sizes in _SIZES.items():
      if isinstance(node, kind):
        for name, value in sizes(node).items():
          if hasattr(node, name):
            setattr(node, name, value)
    if isinstance(node, nnx.Conv):
      for name, value in _conv(node, keep_groups).items():
        setattr(node, name, value)
    if isinstance(node, nnx.ConvTranspose):
      for name, value in _conv_transpose(node).items():
        setattr(node, name, value)
    if isinstance(node, nnx.GroupNorm) and _features(node):
      if keep_groups:
        node.group_size = _features(node)["num_features"] // node.num_groups
      else:
        node.num_groups = _features(node)["num_features"] // node.group_size


def pad_for_taps(model: nnx.Module, plan: Plan) -> None:
  """Makes convolutions whose padding is written out pad for kernels of another size.

  So the outputs stay where they were. What is padded by a rule ("SAME", "CAUSAL") follows it.

  Args:
    model: The model, whose kernels the plan changes; it is changed in place.
    plan: The plan.
  """
  modules = {tuple(map(str, path)): node for path, node in nnx.iter_graph(model)}
  for change in plan.changes:
    conv: Any = modules.get(change.path[:-1])
    padding = getattr(conv, "padding", None)
    by_rule = isinstance(padding, str) and (
      padding != "VALID" or isinstance(conv, nnx.ConvTranspose)
    )
    if not change.taps or by_rule:
      continue
    spatial = len(change.spatial)
    each = 0 if padding == "VALID" else padding
    pairs: list[Any] = [each] * spatial if isinstance(each, int) else list(each or ())
    dilation = conv.kernel_dilation or 1
    dilations = [dilation] * spatial if isinstance(dilation, int) else list(dilation)
    sign = 1 if plan.grows else -1
    for i, axis in enumerate(change.spatial):
      low, high = (pairs[i], pairs[i]) if isinstance(pairs[i], int) else pairs[i]
      if axis in change.positions:
        at = change.positions[axis]
        size = max((change.before or ())[axis], (change.after or ())[axis])
        low += sign * int(at[0]) * dilations[i]
        high += sign * int(size - 1 - at[-1]) * dilations[i]
      pairs[i] = (low, high)
    conv.padding = tuple(pairs)


def _shape(variable: Any) -> tuple[int, ...]:
  return tuple(np.shape(get_array(variable)))


def _features(m: Any) -> dict[str, Any]:
  arrays = [getattr(m, name, None) for name in ("scale", "bias", "mean")]
  sizes = [_shape(x)[-1] for x in arrays if x is not None]
  return {"num_features": sizes[0]} if sizes else {}


def _own(m: Any, variable: Any) -> tuple[int, ...]:
  """The shape of a kernel in one layer, of those that `nnx.vmap` has stacked in front."""
  return _shape(variable)[-rank(m, variable) :]


def rank(m: Any, variable: Any) -> int:
  """How many axes a kernel has in one layer, of those that `nnx.vmap` may have stacked."""
  if isinstance(m, nnx.LinearGeneral):
    return len(m.batch_axis) + len(m.in_features) + len(m.out_features)
  if isinstance(m, nnx.Conv | nnx.ConvTranspose):
    return 2 + len(m.kernel_size)
  return 2 if isinstance(m, nnx.Linear | nnx.Embed) else len(_shape(variable))


def _linear(m: Any) -> dict[str, Any]:
  return dict(zip(("in_features", "out_features"), _own(m, m.kernel), strict=True))


def _general(m: Any) -> dict[str, Any]:
  n, shape = len(m.in_features), _own(m, m.kernel)
  return {} if m.batch_axis else {"in_features": shape[:n], "out_features": shape[n:]}


def _conv(m: Any, keep_groups: bool) -> dict[str, Any]:
  shape, groups = _own(m, m.kernel), m.feature_group_count
  inputs, outputs = shape[-2:]  # the inputs are those of one group
  sizes = {"kernel_shape": shape, "kernel_size": shape[:-2], "out_features": outputs}
  if groups > 1 and not keep_groups and inputs == m.in_features // groups:
    groups = outputs // (m.out_features // groups)
  return {**sizes, "in_features": inputs * groups, "feature_group_count": groups}


def _conv_transpose(m: Any) -> dict[str, Any]:
  shape = _own(m, m.kernel)
  inputs, outputs = shape[:-3:-1] if m.transpose_kernel else shape[-2:]
  sizes = {"kernel_shape": shape, "kernel_size": shape[:-2]}
  return {**sizes, "in_features": inputs, "out_features": outputs}


def _embed(m: Any) -> dict[str, Any]:
  return dict(zip(("num_embeddings", "features"), _own(m, m.embedding), strict=True))


def _attention(m: Any) -> dict[str, Any]:
  query, key, out = (_own(part, part.kernel) for part in (m.query, m.key, m.out))
  return {
    "num_heads": query[-2],
    "head_dim": query[-1],
    "qkv_features": query[-2] * query[-1],
    "in_features": query[0],
    "out_features": out[-1],
    "in_kv_features": key[0],
    "num_kv_heads": key[-2],
  }


_SIZES: dict[Any, Callable[[Any], dict[str, Any]]] = {
  nnx.Linear: _linear,
  nnx.LinearGeneral: _general,
  nnx.Embed: _embed,
  nnx.BatchNorm: _features,
  nnx.LayerNorm: _features,
  nnx.RMSNorm: _features,
  nnx.MultiHeadAttention: _attention,
}


def default_init(model: nnx.Module, rngs: nnx.Rngs | None = None) -> Fresh:
  """Fresh values by the initializers that the layers' classes have by default.

  A class of the user's takes part if its constructor has a parameter `<leaf>_init`.

  Args:
    model: The model before it grows.
    rngs: Random numbers.

  Returns:
    A function `(path, shape, dtype) -> array` for `Plan.apply`; it raises a `ValueError` that
    names a leaf for which no initializer is known.
  """
  nodes = {tuple(map(str, path)): node for path, node in nnx.iter_graph(model)}
  rngs = nnx.Rngs(0) if rngs is None else rngs

  def read(path: _paths.Path, shape: tuple[int, ...], dtype: Any) -> Any:
    node = nodes[path[:-1]]
    if isinstance(node, nnx.BatchNorm) and path[-1] in ("mean", "var"):
      return (jnp.zeros if path[-1] == "mean" else jnp.ones)(shape, dtype)
    parameter = inspect.signature(type(node).__init__).parameters.get(f"{path[-1]}_init")
    if parameter is None or not callable(parameter.default):
      raise ValueError(
        f"no initializer is known for {_paths.join(path)!r} of {type(node).__name__}: give fresh="
      )
    kernel = path[-1] in ("kernel", "embedding")
    axes = rank(node, getattr(node, path[-1])) if kernel else len(shape)
    own = flat = shape[len(shape) - axes :]
    if isinstance(node, nnx.LinearGeneral) and kernel:
      n = len(node.in_features)
      flat = (int(np.prod(own[:n])), int(np.prod(own[n:])))
    if own == shape:
      return _drawn(parameter.default, rngs.params(), flat, dtype).reshape(shape)
    # Layers that are stacked are initialized one by one.
    keys = jax.random.split(rngs.params(), int(np.prod(shape[:-axes])))
    return jnp.stack([_drawn(parameter.default, key, flat, dtype) for key in keys]).reshape(shape)

  return read


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _drawn(initializer: Any, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """Fresh values: one program for all layers of a shape, and not one for each operation."""
  return initializer(key, shape, dtype)
