"""A live NNX model as a tree of arrays and a function of it, and what its layers know of sizes."""

import fnmatch
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from optax_cadence import _paths
from optax_cadence.growth._plan import LeafChange
from optax_cadence.growth._plan import Plan

# Of what kind modules are, and other objects with variables, such as `nnx.Rngs`.
OBJECT: Any = getattr(nnx, "Pytree", nnx.Object)
# Lists and dicts of modules are modules too where Flax has them (since 0.12), without a forward
# pass or sizes of their own.
_CONTAINERS = tuple(getattr(nnx, name) for name in ("List", "Dict") if hasattr(nnx, name))

Place = tuple[_paths.Path, str]  # path of a module, and the name of an attribute


class Parts(NamedTuple):
  """What a model consists of, by path.

  Attributes:
    modules: Its modules, itself included, but no lists and dicts of them.
    variables: Its variables.
  """

  modules: dict[_paths.Path, Any]
  variables: dict[_paths.Path, Any]


def parts(model: Any) -> Parts:
  """The modules and variables of a model: both at once, for it takes long in a deep one."""
  found = Parts({}, {})
  for names, node in nnx.iter_graph(model):
    if isinstance(node, nnx.Variable):
      found.variables[tuple(map(str, names))] = node
    elif isinstance(node, nnx.Module) and not isinstance(node, _CONTAINERS):
      found.modules[tuple(map(str, names))] = node
  return found


def attributes_of(node: Any) -> dict[str, Any]:
  """The attributes of an object, but for those in which Flax keeps its books."""
  books = ("_pytree__", "_object__")
  return {name: value for name, value in vars(node).items() if not name.startswith(books)}


def attributes(modules: Mapping[_paths.Path, Any]) -> dict[Place, Any]:
  """What modules have in attributes, but for variables and objects."""
  return {
    (path, name): value
    for path, module in modules.items()
    for name, value in attributes_of(module).items()
    if not isinstance(value, (nnx.Variable, OBJECT))
  }


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
  return jax.tree.map(lambda x: nnx.clone(x) if is_object(x) else x, args, is_leaf=is_object)


def is_object(x: Any) -> bool:
  """Whether something is an object that may have variables."""
  return isinstance(x, OBJECT)


def filled(state: Any, tree: Any) -> Any:
  """The state with the arrays of a nested dict; what is not there stays."""
  leaves = _paths.by_path(tree)
  values = [leaves.get(path, leaf) for path, leaf in _paths.flatten_with_paths(state)]
  return jax.tree.unflatten(jax.tree.structure(state), values)


def resize(
  model: nnx.Module,
  tree: Any,
  plan: Plan,
  sizes: Mapping[str, Any] | None = None,
  refit: Callable[[Any], None] = lambda model: None,
) -> None:
  """Puts variables of other sizes into a model, and tells its modules.

  Args:
    model: The model; it is changed in place.
    tree: Its variables, as the plan has made them.
    plan: The plan.
    sizes: New values of attributes of the user's own classes.
    refit: Sets other attributes of these.

  Raises:
    ValueError: If there is no such attribute.
  """
  set_variables(model, tree)
  _fit(model, plan)
  refit(model)
  _set_sizes(model, sizes)
  _pad_for_taps(model, plan)


def _fit(model: nnx.Module, plan: Plan) -> None:
  """Makes the attributes of layers that repeat sizes agree with their arrays.

  Args:
    model: The model, with the arrays of the plan; it is changed in place.
    plan: The plan, which says of a `GroupNorm` or `Conv` whether its groups are others, or wider.
  """
  changes = plan.by_path
  for path, module in parts(model).modules.items():
    for kind, sizes in _SIZES.items():
      if isinstance(module, kind):
        for name, value in sizes(module).items():
          if hasattr(module, name):
            setattr(module, name, value)
    if isinstance(module, nnx.Conv):
      change = changes.get((*path, "kernel"))
      module.feature_group_count = _groups(change, plan.grows, module.feature_group_count)
      inputs_of_group = _shape(module.kernel)[-2]
      module.in_features = inputs_of_group * module.feature_group_count
    if isinstance(module, nnx.GroupNorm) and (features := _features(module)):
      change = changes.get((*path, "scale"), changes.get((*path, "bias")))
      module.num_groups = _groups(change, plan.grows, module.num_groups)
      module.group_size = features["num_features"] // module.num_groups


def fit_heads(model: nnx.Module, layers: Collection[_paths.Path], of: str, plan: Plan) -> None:
  """Makes attributes of attention layers of the user's agree with their heads, by their names.

  Args:
    model: The model; it is changed in place.
    layers: Where the attention layers stand.
    of: What they have got more of: "heads", "queries" or "size".
    plan: The plan, which has a dimension of it: heads, queries of one group, entries.
  """
  for path, layer in parts(model).modules.items():
    if path in layers and not isinstance(layer, nnx.MultiHeadAttention):
      units, more = next(
        (dimension.size, more)
        for dimension, more in plan.dimensions
        if any(member.path[: len(path)] == path for member in dimension.members)
      )
      for name, value in attributes_of(layer).items():
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if is_number and value % units == 0 and _follows(name, of, value == units):
          setattr(layer, name, value // units * (units + more))


def _follows(name: str, of: str, is_number_of_units: bool) -> bool:
  """Whether an attribute of an attention layer, by its name, is a number that grows with `of`."""
  counts_entries = any(word in name for word in ("dim", "size", "width", "features"))
  counts_heads = "head" in name and not counts_entries
  if of == "size":
    return counts_entries and any(word in name for word in ("head", "qkv", "inner"))
  if of == "heads":
    return counts_heads or (counts_entries and "qkv" in name)
  if is_number_of_units and any(word in name for word in ("group", "rep")):
    return True
  return counts_heads and not any(word in name for word in ("kv", "key"))


def _set_sizes(model: nnx.Module, sizes: Mapping[str, Any] | None) -> None:
  """Sets attributes in which classes of the user's hold sizes.

  Args:
    model: The model; it is changed in place.
    sizes: For the name of an attribute, wherever it stands, or for its path, a glob perhaps, its
      new value: a number, or an object such as a config that holds some.

  Raises:
    ValueError: If there is no such attribute.
  """
  modules = _modules_of_users(model)
  places = attributes(modules)
  for name, value in (sizes or {}).items():
    of_path = "/" in name
    matching = [
      (path, attribute)
      for path, attribute in places
      if fnmatch.fnmatchcase(_paths.join((*path, attribute)) if of_path else attribute, name)
    ]
    if not matching:
      known = [(*path, attribute) for path, attribute in _possible_sizes(modules)]
      raise ValueError(f"sizes: no attribute {name!r}: expected one of {_paths.listed(known)}")
    for path, attribute in matching:
      setattr(modules[path], attribute, value)


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
  modules = _modules_of_users(model)
  sizes = _possible_sizes(modules)
  values: dict[str, set[str]] = {}
  for (_, name), value in sizes.items():
    values.setdefault(name, set()).add(str(value))
  hints: dict[str, bool] = {}
  for (path, name), value in sizes.items():
    expected = _resized(value, numbers)
    if expected != value:
      # The name alone stands for the attributes of all modules.
      key = name if len(values[name]) == 1 else _paths.join((*path, name))
      hint = (
        f"{type(modules[path]).__name__} holds {key!r}, {value}: if that is the size which has"
        f" changed, pass sizes={{{key!r}: {expected}}}"
      )
      hints[hint] = value not in of_units if type(value) is int else True
  likely = sorted(hints, key=hints.__getitem__)  # first what is the number of units
  return "; ".join(likely[:8] + ["…"] * (len(likely) > 8))


def _resized(value: Any, numbers: Mapping[int, int]) -> Any:
  """A size, or sizes, of which those that have changed are other ones."""
  if isinstance(value, tuple | list):
    return type(value)(_resized(x, numbers) for x in value)
  return numbers.get(value, value)


def _modules_of_users(model: nnx.Module) -> dict[_paths.Path, Any]:
  """The modules of the user's own classes, by path: Flax's own are told their sizes by `_fit`."""
  modules = parts(model).modules.items()
  return {path: m for path, m in modules if not type(m).__module__.startswith("flax.")}


def _possible_sizes(modules: Mapping[_paths.Path, Any]) -> dict[Place, Any]:
  """The attributes of modules that may be a size, or several."""
  found = {}
  for place, value in attributes(modules).items():
    numbers = value if isinstance(value, tuple | list) else [value]
    if numbers and all(type(x) is int for x in numbers):
      found[place] = value
  return found


def _pad_for_taps(model: nnx.Module, plan: Plan) -> None:
  """Makes convolutions whose padding is written out pad for kernels of another size.

  So the outputs stay where they were. What is padded by a rule ("SAME", "CAUSAL") follows it.

  Args:
    model: The model, whose kernels the plan changes; it is changed in place.
    plan: The plan.
  """
  modules = parts(model).modules
  for change in (change for change in plan.changes if change.taps):
    conv: Any = modules.get(change.path[:-1])
    if not hasattr(conv, "padding"):  # a class of the user's, which pads in code of its own
      continue
    padding = conv.padding
    if isinstance(padding, str) and (padding != "VALID" or isinstance(conv, nnx.ConvTranspose)):
      continue
    spatial = len(change.spatial)
    each = 0 if padding == "VALID" else padding
    pairs: list[Any] = [each] * spatial if isinstance(each, int) else list(each)
    dilation = getattr(conv, "kernel_dilation", None) or 1
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


def _conv(m: Any) -> dict[str, Any]:
  """All but the number of its inputs, which depends on that of its groups."""
  shape = _own(m, m.kernel)
  return {"kernel_shape": shape, "kernel_size": shape[:-2], "out_features": shape[-1]}


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
  nnx.Conv: _conv,
  nnx.ConvTranspose: _conv_transpose,
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
