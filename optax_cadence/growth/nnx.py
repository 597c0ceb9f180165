"""Growth of live NNX models, their optimizer included.

A grown model stays the object it was, of a subclass of its own class whose forward pass goes
through the gate, with the gate as one more parameter, `alpha`. After `merge` it is a plain
model of its old class again, at its new size.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optax_cadence import _paths
from optax_cadence.growth import _coupling
from optax_cadence.growth import _dimension
from optax_cadence.growth import _gate
from optax_cadence.growth import _kernels
from optax_cadence.growth import _state
from optax_cadence.growth import _trees
from optax_cadence.growth import _variables
from optax_cadence.growth import _widening
from optax_cadence.growth._dimension import Axis
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._fresh import Fresh
from optax_cadence.growth._plan import Plan

_ALPHA = "alpha"


def variables(model: nnx.Module) -> dict[str, Any]:
  """All variables of a model as a nested dict of arrays: the tree that its plans are for."""
  return nnx.to_pure_dict(nnx.state(model))


def couple(
  model: nnx.Module, *inputs: Any, producer: nnx.Module, axis: int = -1, **kwargs: Any
) -> Dimension:
  """As `growth.couple`, for a module of a live model: every axis that grows with one of its own.

  Args:
    model: The model.
    *inputs: Inputs of its forward pass, arrays or `jax.ShapeDtypeStruct`s.
    producer: The module inside whose kernel (or embedding) has the units along `axis`.
    axis: The axis of that leaf.
    **kwargs: As for `growth.couple`, or further arguments of the forward pass.

  Returns:
    The `Dimension`, for the tree `nnx.variables(model)`.
  """
  _check_plain(model)
  name = _paths.join(_kernel(model, producer))
  return _coupling.couple(
    forward(model), variables(model), *inputs, producer=name, axis=axis, **kwargs
  )


def widen(
  model: nnx.Module,
  *inputs: Any,
  by: int,
  producer: nnx.Module | Dimension,
  consumers: Sequence[nnx.Module] | None = None,
  also: Sequence[nnx.Module] = (),
  axis: int = -1,
  unit: int = 1,
  blocks: int = 1,
  fresh: Fresh | None = None,
  rngs: nnx.Rngs | None = None,
  optimizer: nnx.Optimizer | None = None,
  alpha: float = 0.0,
) -> Plan:
  """Gives a live model more units behind a gate.

  Args:
    model: The model; it is changed in place, or, on an error, not at all.
    *inputs: Inputs of its forward pass, arrays or `jax.ShapeDtypeStruct`s. With them, all
      that must grow along is found and checked.
    by: Number of new units.
    producer: The module whose kernel (or embedding) makes the units, or a `Dimension`.
    consumers: The modules whose kernels read them. Needed without `inputs`.
    also: Modules in between that have a number per unit (norms). With `consumers`.
    axis: The axis of the producer's kernel that holds the units.
    unit: Adjacent positions that make one unit.
    blocks: How often the units repeat along the axis: for the groups of a norm that grow.
    fresh: Where new entries come from; by default from the initializer that the layer's class
      has by default. (NNX layers do not keep the one they were made with.)
    rngs: Random numbers for those initializers.
    optimizer: The model's optimizer, whose state follows.
    alpha: Value of the gate.

  Returns:
    The `Plan` that was applied.

  Raises:
    ValueError: If something does not fit; it names the path, the shapes, what is missing.
  """
  _check_plain(model)
  tree = variables(model)
  _trees.check_concrete("widen", tree)
  if isinstance(producer, Dimension):
    dimension = producer
  elif consumers is not None:
    dimension = _described(model, producer, consumers, also, Axis(axis, blocks, unit))
  elif inputs:
    dimension = couple(model, *inputs, producer=producer, axis=axis, unit=unit, blocks=blocks)
  else:
    raise ValueError("widen needs inputs, to find what reads the units, or consumers=[...]")
  if inputs and (consumers is not None or isinstance(producer, Dimension)):
    dimension = _coupling.couple(forward(model), tree, *inputs, producer=dimension)
  plan = _widening.widening(tree, dimension, by)
  grow(
    model,
    plan,
    fresh or default_init(model, rngs),
    inputs=inputs,
    optimizer=optimizer,
    alpha=alpha,
    keep_groups=blocks > 1,
  )
  return plan


def enlarge(
  model: nnx.Module,
  *inputs: Any,
  conv: nnx.Module,
  kernel_size: Sequence[int],
  fresh: Fresh | None = None,
  rngs: nnx.Rngs | None = None,
  optimizer: nnx.Optimizer | None = None,
  alpha: float = 0.0,
) -> Plan:
  """Gives a convolution of a live model a larger kernel, its new taps behind a gate.

  Args:
    model: The model; it is changed in place.
    *inputs: Inputs of its forward pass; with them FLOPs are counted and the result checked.
    conv: The `nnx.Conv` inside.
    kernel_size: Its new spatial size.
    fresh: As for `widen`.
    rngs: As for `widen`.
    optimizer: The model's optimizer, whose state follows.
    alpha: Value of the gate.

  Returns:
    The `Plan` that was applied.

  Raises:
    ValueError: If the kernel would become smaller, or its padding does not keep the taps.
  """
  _check_plain(model)
  tree = variables(model)
  name = _paths.join(_kernel(model, conv))
  plan = _kernels.enlarging(
    tree,
    {name: kernel_size},
    causal=getattr(conv, "padding", None) == "CAUSAL",
    fn=forward(model) if inputs else None,
    args=inputs,
  )
  grow(
    model, plan, fresh or default_init(model, rngs), inputs=inputs, optimizer=optimizer, alpha=alpha
  )
  return plan


def deepen(
  model: nnx.Module,
  add: Callable[[Any], None],
  *inputs: Any,
  outgoing: Callable[[Any], Sequence[nnx.Module]] = lambda model: (),
  optimizer: nnx.Optimizer | None = None,
  alpha: float = 0.0,
) -> Plan:
  """Adds modules to a live model, what they add to its residual stream behind a gate.

  Args:
    model: The model; it is changed in place.
    add: Puts the new modules where the forward pass finds them: `lambda m: m.blocks.append(...)`.
    *inputs: Inputs of its forward pass, to check the result.
    outgoing: The modules, of those that are new, whose parameters α multiplies: the last
      layer of a residual block, or the norm it ends in. None of them: the new modules are
      the identity as they are (Net2Deeper, `identity_kernel`).
    optimizer: The model's optimizer, whose state follows.
    alpha: Value of the gate.

  Returns:
    The `Plan` that was applied.

  Raises:
    ValueError: If nothing is new or the model does not run with it; it is then as before.
  """
  _check_plain(model)
  deeper = nnx.clone(model)
  add(deeper)
  names = [_paths.join(_path(deeper, module)) for module in outgoing(deeper)]
  tree, deeper_tree = variables(model), variables(deeper)
  _trees.check_concrete("deepen", tree)
  plan = _kernels.deepening(tree, deeper_tree, outgoing=names)
  if inputs:
    _check_runs(deeper, inputs)
  values = nnx.state(deeper)

  def change(model: nnx.Module) -> None:
    add(model)
    nnx.update(model, values)
    _close(model, plan, alpha, False)

  _with_optimizer(model, plan, optimizer, change)
  return plan


def grow(
  model: nnx.Module,
  plan: Plan,
  fresh: Any,
  *,
  inputs: Sequence[Any] = (),
  optimizer: nnx.Optimizer | None = None,
  alpha: float = 0.0,
  keep_groups: bool = False,
) -> None:
  """Applies a plan for the tree `nnx.variables(model)` to the live model.

  Args:
    model: The model; it is changed in place, or, on an error, not at all.
    plan: A plan of `growth.widening` or `growth.enlarging`, or a sum of them.
    fresh: Where new entries come from, as for `Plan.apply`.
    inputs: Inputs of the forward pass, to check the result.
    optimizer: The model's optimizer, whose state follows.
    alpha: Value of the gate.
    keep_groups: Whether the groups of a `GroupNorm` get wider, instead of more.
  """
  _check_plain(model)
  new = plan.apply(variables(model), fresh, alpha=alpha)
  new.pop(_ALPHA)
  probe = nnx.clone(model)
  _replace(probe, new)
  fit(probe, keep_groups)
  if inputs:
    _check_runs(probe, inputs)

  def change(model: nnx.Module) -> None:
    _replace(model, new)
    fit(model, keep_groups)
    _close(model, plan, alpha, keep_groups)

  _with_optimizer(model, plan, optimizer, change)


def shrink(
  model: nnx.Module,
  plan: Plan,
  *,
  optimizer: nnx.Optimizer | None = None,
  keep_groups: bool = False,
) -> None:
  """Applies a plan of `growth.shrinking` to the live model, and to its optimizer's state."""
  _check_plain(model)
  new = plan.apply(variables(model))

  def change(model: nnx.Module) -> None:
    _replace(model, new)
    fit(model, keep_groups)

  _with_optimizer(model, plan, optimizer, change)


def merge(model: nnx.Module, *, optimizer: nnx.Optimizer | None = None) -> None:
  """Folds the gate into the weights: the model is a plain one of its old class again.

  Args:
    model: The grown model; it is changed in place.
    optimizer: Its optimizer, from whose state the gate goes.

  Raises:
    ValueError: If there is no gate, or it is not 1 and cannot be folded; see `growth.merge`.
  """
  plan = plan_of(model)
  merged = _gate.merge(variables(model), plan)

  def change(model: nnx.Module) -> None:
    object.__setattr__(model, "__class__", _growth_of(model).base)
    delattr(model, _ALPHA)
    _replace(model, merged)

  _with_optimizer(model, plan, optimizer, change)


def set_alpha(model: nnx.Module, alpha: float) -> None:
  """Sets the gate of a grown model by hand."""
  plan_of(model)
  gate = getattr(model, _ALPHA)
  _variables.put(gate, jnp.asarray(alpha, _variables.get(gate).dtype))


def plan_of(model: nnx.Module) -> Plan:
  """The plan by which a model with a gate has grown."""
  if not hasattr(type(model), "_growth"):
    raise ValueError(f"{type(model).__name__} has no gate: it has not grown, or is merged already")
  return _growth_of(model).plan


def _growth_of(model: Any) -> Any:
  return type(model)._growth


class _Growth:
  """What the class of a grown model knows."""

  def __init__(self, base: type, plan: Plan, keep_groups: bool):
    self.base, self.plan, self.keep_groups = base, plan, keep_groups


def _close(model: Any, plan: Plan, alpha: float, keep_groups: bool) -> None:
  """Attaches the gate to a model whose arrays have grown."""
  base = type(model)
  dtypes = [x.dtype for x in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))]
  dtype = next((d for d in dtypes if jnp.issubdtype(d, jnp.floating)), jnp.float32)
  setattr(model, _ALPHA, nnx.Param(jnp.asarray(alpha, dtype)))
  body = {"__call__": _gated_call, "__module__": base.__module__, "__qualname__": base.__qualname__}
  metaclass: Any = type(base)
  cls = metaclass(base.__name__, (base,), body)
  cls._growth = _Growth(base, plan, keep_groups)
  object.__setattr__(model, "__class__", cls)


def _gated_call(self: Any, *args: Any, **kwargs: Any) -> Any:
  """The forward pass of a grown model, through its gate."""
  cls = type(self)
  growth = cls._growth
  object.__setattr__(self, "__class__", growth.base)
  try:
    graphdef, state = nnx.split(self)
  finally:
    object.__setattr__(self, "__class__", cls)
  tree = nnx.to_pure_dict(state)
  gate = tree[_ALPHA]

  def run(tree: Any, small: bool, *args: Any, **kwargs: Any) -> Any:
    model = nnx.merge(graphdef, _filled(state, {**tree, _ALPHA: gate}))
    if small:
      fit(model, growth.keep_groups)
    return model(*args, **kwargs), nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

  gated = _gate.gated(
    lambda tree, *a, **k: run(tree, False, *a, **k),
    growth.plan,
    old=lambda tree, *a, **k: run(tree, True, *a, **k),
  )
  output, changed = gated(tree, *args, **kwargs)
  if jax.tree.leaves(changed):
    nnx.update(self, _filled(nnx.state(self, nnx.Not(nnx.Param)), changed))
  return output


def forward(model: nnx.Module) -> Callable[..., Any]:
  """The forward pass as a function of `variables(model)`; it returns what changes too."""
  graphdef, state = nnx.split(model)

  def run(tree: Any, *args: Any, **kwargs: Any) -> Any:
    live = nnx.merge(graphdef, _filled(state, tree))
    return live(*args, **kwargs), nnx.to_pure_dict(nnx.state(live, nnx.Not(nnx.Param)))

  return run


def _filled(state: Any, tree: Any) -> Any:
  """The state with the arrays of a nested dict."""
  values = _trees.leaves(tree)
  structure = jax.tree.structure(state)
  paths = [path for path, _ in _paths.flatten_with_paths(state)]
  return jax.tree.unflatten(structure, [values[path] for path in paths])


def _replace(model: nnx.Module, tree: Any) -> None:
  nnx.update(model, _filled(nnx.state(model), tree))


def _check_runs(model: nnx.Module, inputs: Sequence[Any]) -> None:
  try:
    jax.eval_shape(forward(model), variables(model), *inputs)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"{type(model).__name__} does not run at its new size, so nothing was changed. A shared"
      " dimension may lack a member, or a module keep its size in an attribute of its own: set it"
      f" first. ({error})"
    ) from error


def _check_plain(model: nnx.Module) -> None:
  if hasattr(type(model), "_growth"):
    raise ValueError(f"{type(model).__name__} has a gate already: merge it before the next growth")
  if hasattr(model, _ALPHA):
    raise ValueError(f"{type(model).__name__} has an attribute 'alpha', where the gate would be")


def _path(model: nnx.Module, module: nnx.Module) -> _paths.Path:
  for path, node in nnx.iter_graph(model):
    if node is module:
      return tuple(map(str, path))
  raise ValueError(f"{type(module).__name__} is no part of {type(model).__name__}")


def _kernel(model: nnx.Module, module: nnx.Module) -> _paths.Path:
  """The path of a module's kernel, or embedding."""
  return _trees.kernel(variables(model), _path(model, module))


def _described(
  model: nnx.Module, producer: Any, consumers: Sequence[Any], also: Sequence[Any], axis: Axis
) -> Dimension:
  """The dimension between modules that were named."""
  tree = variables(model)
  shapes = _trees.shapes(tree)
  kernel = _kernel(model, producer)
  members: dict[str, Any] = {_paths.join(kernel): axis}
  size = shapes[kernel][axis.axis]
  bias = (*kernel[:-1], "bias")
  if bias in shapes:
    ndim = len(shapes[kernel])
    from_end = axis.axis if axis.axis < 0 else axis.axis - ndim
    if -from_end <= len(shapes[bias]):
      members[_paths.join(bias)] = axis._replace(axis=from_end)
  for module in consumers:
    path = _kernel(model, module)
    number = 0 if isinstance(module, nnx.Linear | nnx.LinearGeneral) else -2
    if shapes[path][number] % size:
      raise ValueError(
        f"consumer {_paths.join(path)!r} of shape {shapes[path]} has {shapes[path][number]} inputs"
        f" along axis {number % len(shapes[path])}: expected a multiple of the {size} outputs of"
        f" {_paths.join(kernel)!r}, of shape {shapes[kernel]}"
      )
    outer = shapes[path][number] // size * axis.outer
    members[_paths.join(path)] = Axis(number, outer, axis.inner)
  for module in also:
    prefix = _path(model, module)
    under = _trees.shapes(nnx.to_pure_dict(nnx.state(module)))
    members.update({_paths.join(prefix + p): axis._replace(axis=-1) for p, s in under.items() if s})
  return _dimension.dimension(tree, members)


def fit(model: nnx.Module, keep_groups: bool = False) -> None:
  """Makes the attributes of Flax's own layers that repeat sizes agree with their arrays."""
  for _, node in nnx.iter_graph(model):
    for kind, rule in _FIT.items():
      if isinstance(node, kind):
        rule(node, keep_groups)


def _fit_linear(m: Any, _: bool) -> None:
  m.in_features, m.out_features = _shape(m.kernel)


def _fit_general(m: Any, _: bool) -> None:
  n = len(m.in_features)
  if not m.batch_axis:
    m.in_features, m.out_features = _shape(m.kernel)[:n], _shape(m.kernel)[n:]


def _fit_conv(m: Any, _: bool) -> None:
  m.kernel_shape = shape = _shape(m.kernel)
  m.kernel_size, m.out_features = shape[:-2], shape[-1]
  if m.feature_group_count == 1:
    m.in_features = shape[-2]
  elif shape[-2] == 1:
    m.in_features = m.feature_group_count = shape[-1]


def _fit_embed(m: Any, _: bool) -> None:
  m.num_embeddings, m.features = _shape(m.embedding)


def _fit_norm(m: Any, _: bool) -> None:
  arrays = [v for v in (m.scale, m.bias, getattr(m, "mean", None)) if v is not None]
  if arrays:
    m.num_features = _shape(arrays[0])[-1]


def _fit_group_norm(m: Any, keep_groups: bool) -> None:
  arrays = [v for v in (m.scale, m.bias) if v is not None]
  if arrays and keep_groups:
    m.group_size = _shape(arrays[0])[-1] // m.num_groups
  elif arrays:
    m.num_groups = _shape(arrays[0])[-1] // m.group_size


def _fit_rms_norm(m: Any, _: bool) -> None:
  if m.scale is not None:
    m.num_features = _shape(m.scale)[-1]


def _fit_attention(m: Any, _: bool) -> None:
  query, key, out = _shape(m.query.kernel), _shape(m.key.kernel), _shape(m.out.kernel)
  m.num_heads, m.head_dim = query[-2:]
  m.qkv_features = query[-2] * query[-1]
  m.in_features, m.out_features = query[0], out[-1]
  if hasattr(m, "in_kv_features"):
    m.in_kv_features = key[0]
  if hasattr(m, "num_kv_heads"):
    m.num_kv_heads = key[-2]


def _shape(variable: Any) -> tuple[int, ...]:
  return tuple(np.shape(_variables.get(variable)))


_FIT: dict[Any, Callable[[Any, bool], None]] = {
  nnx.Linear: _fit_linear,
  nnx.LinearGeneral: _fit_general,
  nnx.Conv: _fit_conv,
  nnx.Embed: _fit_embed,
  nnx.BatchNorm: _fit_norm,
  nnx.LayerNorm: _fit_norm,
  nnx.GroupNorm: _fit_group_norm,
  nnx.RMSNorm: _fit_rms_norm,
  nnx.MultiHeadAttention: _fit_attention,
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
    flat = shape
    if isinstance(node, nnx.LinearGeneral) and path[-1] == "kernel":
      n = len(node.in_features)
      flat = (int(np.prod(shape[:n])), int(np.prod(shape[n:])))
    return parameter.default(rngs.params(), flat, dtype).reshape(shape)

  return read


def _with_optimizer(model: Any, plan: Plan, optimizer: Any, change: Callable[[Any], None]) -> None:
  """Changes a model and its optimizer's state, or, on an error, neither."""
  if optimizer is None:
    change(model)
    return
  probe = nnx.clone(model)
  change(probe)
  before, after = (nnx.state(m, optimizer.wrt) for m in (model, probe))
  state = _state.grow_state(optimizer.tx, _state_of(optimizer, before), before, after, plan)
  change(model)
  fresh = type(optimizer)(model, optimizer.tx, wrt=optimizer.wrt)
  for variable, value in zip(_opt_variables(fresh), jax.tree.leaves(state), strict=True):
    _variables.put(variable, value)
  optimizer.opt_state = fresh.opt_state


def _state_of(optimizer: Any, params: Any) -> Any:
  """The state of an NNX optimizer as its transformation knows it."""
  arrays = [_variables.get(x) for x in _opt_variables(optimizer)]
  made: Any = jax.tree.structure(jax.eval_shape(optimizer.tx.init, params))
  if made.num_leaves != len(arrays):
    raise ValueError(
      f"optimizer: expected the state for this model, {made.num_leaves} arrays, found {len(arrays)}"
    )
  return jax.tree.unflatten(made, arrays)


def _opt_variables(optimizer: Any) -> list[Any]:
  flat = jax.tree.leaves(optimizer.opt_state, is_leaf=lambda x: isinstance(x, nnx.Variable))
  # What an optimizer has masked is no array, but it is wrapped all the same.
  return [x for x in flat if isinstance(x, nnx.Variable) and hasattr(_variables.get(x), "dtype")]
