"""A live NNX model as a tree of arrays and a function of it, and what its layers know of sizes."""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from optax_cadence import _paths
from optax_cadence.growth import _trees
from optax_cadence.growth._plan import LeafChange
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
    args, kwargs = _cloned((args, kwargs))
    output = copy(*args, **kwargs)
    return output, nnx.to_pure_dict(nnx.state(copy, nnx.Not(nnx.Param)))

  return run


def _cloned(args: Any) -> Any:
  """Arguments, of which objects with variables (`nnx.Rngs`) are copies that a trace may change."""
  kind: Any = getattr(nnx, "Pytree", nnx.Object)

  def is_object(x: Any) -> bool:
    return isinstance(x, kind)

  return jax.tree.map(lambda x: nnx.clone(x) if is_object(x) else x, args, is_leaf=is_object)


def filled(state: Any, tree: Any) -> Any:
  """The state with the arrays of a nested dict; what is not there stays."""
  leaves = _trees.leaves(tree)
  values = [leaves.get(path, leaf) for path, leaf in _paths.flatten_with_paths(state)]
  return jax.tree.unflatten(jax.tree.structure(state), values)


def fit(model: nnx.Module, plan: Plan) -> None:
  """Makes the attributes of layers that repeat sizes agree with their arrays.

  Args:
    model: The model, with the arrays of the plan; it is changed in place.
    plan: The plan, which says of a `GroupNorm` or `Conv` whether its groups are others, or wider.
  """
  changes = plan.by_path
  for path, node in nnx.iter_graph(model):
    prefix = tuple(map(str, path))
    for kind, sizes in _SIZES.items():
      if isinstance(node, kind):
        for name, value in sizes(node).items():
          if hasattr(node, name):
            setattr(node, name, value)
    if isinstance(node, nnx.Conv):
      change = changes.get((*prefix, "kernel"))
      groups = _groups(change, plan.grows, node.feature_group_count)
      for name, value in _conv(node, groups).items():
        setattr(node, name, value)
    if isinstance(node, nnx.ConvTranspose):
      for name, value in _conv_transpose(node).items():
        setattr(node, name, value)
    if isinstance(node, nnx.GroupNorm) and _features(node):
      change = changes.get((*prefix, "scale"), changes.get((*prefix, "bias")))
      node.num_groups = _groups(change, plan.grows, node.num_groups)
      node.group_size = _features(node)["num_features"] // node.num_groups


def fit_heads(layer: Any, path: _paths.Path, of: str, plan: Plan) -> None:
  """Makes attributes of an attention layer of the user's agree with its heads, by their names.

  Args:
    layer: The layer; it is changed in place.
    path: Where it stands.
    of: What it has got more of: "heads", "queries" or "size".
    plan: The plan, which has a dimension of it: heads, queries of one group, entries.
  """
  n = len(path)
  units, more = next(
    (dimension.size, more)
    for dimension, more in plan.dimensions
    if any(member.path[:n] == path for member in dimension.members)
  )
  own = {} if isinstance(layer, nnx.MultiHeadAttention) else dict(vars(layer))
  for name, value in own.items():
    if not isinstance(value, int) or isinstance(value, bool) or value % units:
      continue
    counts_entries = any(word in name for word in ("dim", "size", "width", "features"))
    of_heads = "head" in name
    if of == "size":
      follows = counts_entries and (of_heads or "qkv" in name or "inner" in name)
    elif of == "heads":
      follows = (of_heads and not counts_entries) or (counts_entries and "qkv" in name)
    else:
      of_keys = "kv" in name or "key" in name
      of_group = value == units and any(word in name for word in ("group", "rep"))
      follows = of_group or (of_heads and not counts_entries and not of_keys)
    if follows:
      setattr(layer, name, value // units * (units + more))


def set_sizes(model: nnx.Module, sizes: Mapping[str, Any] | None) -> None:
  """Sets attributes in which classes of the user's hold sizes.

  Args:
    model: The model; it is changed in place.
    sizes: For the name of an attribute, wherever it stands, or for its path, a glob perhaps, its
      new value: a number, or an object such as a config that holds some.

  Raises:
    ValueError: If there is no such attribute.
  """
  places = _attributes_of_users(model)
  for name, value in (sizes or {}).items():
    of_path = "/" in name
    matching = [
      (path, attribute)
      for path, attribute in places
      if fnmatch.fnmatchcase(_paths.join((*path, attribute)) if of_path else attribute, name)
    ]
    if not matching:
      raise ValueError(
        f"sizes: no attribute {name!r}: expected one of"
        f" {_paths.listed((*path, attribute) for path, attribute in _sizes_of_users(model))}"
      )
    for path, attribute in matching:
      setattr(places[path, attribute][0], attribute, value)


def sizes_to_name(model: nnx.Module, plan: Plan) -> str:
  """Which attributes of the user's own classes are what has grown: a hint; empty if none is.

  Args:
    model: The model before it changes.
    plan: The plan.
  """
  numbers: dict[int, int] = {}
  for units, more in plan.dimensions:
    before, after = (0, more) if plan.grows else (more, 0)
    numbers[units.size + before] = units.size + after
  of_units = set(numbers)
  for change in (c for c in plan.changes if not c.adds_axis):
    for axis in change.positions:
      numbers.setdefault((change.before or ())[axis], (change.after or ())[axis])
  places = _sizes_of_users(model)
  values: dict[str, set[str]] = {}
  for (_, name), (_, value) in places.items():
    values.setdefault(name, set()).add(str(value))
  hints: dict[str, bool] = {}
  for (path, name), (node, value) in places.items():
    expected = _resized(value, numbers)
    if expected != value:
      # The name alone stands for the attributes of all modules.
      key = name if len(values[name]) == 1 else _paths.join((*path, name))
      hint = (
        f"{type(node).__name__} holds {key!r}, {value}: if that is the size which has changed, pass"
        f" sizes={{{key!r}: {expected}}}"
      )
      hints[hint] = value not in of_units if type(value) is int else True
  likely = sorted(hints, key=hints.__getitem__)  # first what is the number of units
  return "; ".join(likely[:8] + ["…"] * (len(likely) > 8))


def _resized(value: Any, numbers: Mapping[int, int]) -> Any:
  """A size, or sizes, of which those that have changed are other ones."""
  if isinstance(value, tuple | list):
    return type(value)(_resized(x, numbers) for x in value)
  return numbers.get(value, value)


def _sizes_of_users(model: nnx.Module) -> dict[tuple[_paths.Path, str], tuple[Any, Any]]:
  """Attributes of the user's own modules that may be sizes: the module and the value, by place."""
  found = {}
  for place, (node, value) in _attributes_of_users(model).items():
    numbers = value if isinstance(value, tuple | list) else [value]
    if numbers and all(type(x) is int for x in numbers):
      found[place] = (node, value)
  return found


def _attributes_of_users(model: nnx.Module) -> dict[tuple[_paths.Path, str], tuple[Any, Any]]:
  """All attributes of the user's own modules but variables and modules, by place.

  Flax's own layers are told their sizes by `fit`.
  """
  nodes: Any = (nnx.Variable, getattr(nnx, "Pytree", nnx.Object))
  return {
    (tuple(map(str, path)), name): (node, value)
    for path, node in nnx.iter_graph(model)
    if isinstance(node, nnx.Module) and not type(node).__module__.startswith("flax.")
    for name, value in vars(node).items()
    if not isinstance(value, nodes) and not name.startswith(("_pytree__", "_object__"))
  }


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


def _groups(change: LeafChange | None, grows: bool, groups: int) -> int:
  """How many groups there are then along the last axis of a leaf, of so many now.

  They are as many, and wider or narrower, if what stays of each is in its own part of the axis.
  Otherwise there are more or fewer, each as wide as it was.
  """
  if change is None or change.before is None or change.after is None:
    return groups
  at = change.positions.get(len(change.after) - 1)
  if groups == 1 or at is None:
    return groups
  before, after = change.before[-1], change.after[-1]
  small, large = (before, after) if grows else (after, before)
  same = small % groups == large % groups == 0
  if same and (at // (large // groups) == np.arange(small) // (small // groups)).all():
    return groups
  return after // (before // groups)


def _conv(m: Any, groups: int) -> dict[str, Any]:
  shape = _own(m, m.kernel)
  inputs, outputs = shape[-2:]  # the inputs are those of one group
  sizes = {"kernel_shape": shape, "kernel_size": shape[:-2], "out_features": outputs}
  return {**sizes, "in_features": inputs * groups, "feature_group_count": groups}


def _conv_transpose(m: Any) -> dict[str, Any]:
  shape = _own(m, m.kernel)
  inputs, outputs = shape[:-3:-1] if m.transpose_kernel else shape[-2:]
  sizes = {"kernel_shape": shape, "kernel_size": shape[:-2]}
  return {**sizes, "in_features": inputs, "out_features": outputs}


def _embed(m: Any) -> dict[str, Any]:
  return dict(zip(("num_embeddings", "features"), _own(m, m.embedding), strict=True))


def _einsum(m: Any) -> dict[str, Any]:
  sizes = {"kernel_shape": _shape(m.kernel)[-len(m.kernel_shape) :]}
  return {**sizes, "bias_shape": _shape(m.bias)[-len(m.bias_shape) :]} if m.bias_shape else sizes


def _lora(m: Any) -> dict[str, Any]:
  return {"in_features": _shape(m.lora_a)[-2], "out_features": _shape(m.lora_b)[-1]}


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


def _recurrent(m: Any) -> dict[str, Any]:
  """Of a cell: by a layer that reads its input, and one that reads its state."""
  of_input, of_state = (m.ii, m.hi) if hasattr(m, "ii") else (m.dense_i, m.dense_h)
  return {
    "in_features": _own(of_input, of_input.kernel)[0],
    "hidden_features": _own(of_state, of_state.kernel)[0],
  }


_SIZES: dict[Any, Callable[[Any], dict[str, Any]]] = {
  nnx.Linear: _linear,
  nnx.LinearGeneral: _general,
  nnx.Einsum: _einsum,
  nnx.Embed: _embed,
  nnx.LoRA: _lora,
  nnx.BatchNorm: _features,
  nnx.LayerNorm: _features,
  nnx.RMSNorm: _features,
  nnx.MultiHeadAttention: _attention,
  nnx.LSTMCell: _recurrent,
  nnx.OptimizedLSTMCell: _recurrent,
  nnx.SimpleCell: _recurrent,
  nnx.GRUCell: _recurrent,
}
if hasattr(nnx, "InstanceNorm"):  # since Flax 0.12
  _SIZES[nnx.InstanceNorm] = _features
