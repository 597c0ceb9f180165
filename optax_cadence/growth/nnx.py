"""Growth of live NNX models, their optimizer included.

A grown model stays the object it was, of its own class, with the gate as one more parameter,
`alpha`. Its methods go through the gate (see `_nnx_gate`). After `merge` it is a plain model again,
at its new size.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_cadence import _paths
from optax_cadence.growth import _dimension
from optax_cadence.growth import _driver
from optax_cadence.growth import _gate
from optax_cadence.growth import _nnx_gate
from optax_cadence.growth import _nnx_model
from optax_cadence.growth import _state
from optax_cadence.growth import _trees
from optax_cadence.growth._dimension import Axis
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._driver import Network
from optax_cadence.growth._fresh import Fresh
from optax_cadence.growth._nnx_model import default_init
from optax_cadence.growth._nnx_model import forward
from optax_cadence.growth._nnx_model import variables
from optax_cadence.growth._plan import Plan

__all__ = [
  "call",
  "couple",
  "deepen",
  "default_init",
  "enlarge",
  "forward",
  "grow",
  "merge",
  "plan_of",
  "set_alpha",
  "shrink",
  "variables",
  "widen",
]


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
  network = _network(model, inputs)
  return _driver.couple(network, network.kernel(_path(model, producer)), axis=axis, **kwargs)


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
  network = _network(model, inputs, rngs)
  units: Any = producer
  if not isinstance(producer, Dimension):
    if consumers is not None:
      units = _described(model, producer, consumers, also, Axis(axis, blocks, unit))
    else:
      units = network.kernel(_path(model, producer))
  grown = _driver.widen(
    network, units, by, axis=axis, unit=unit, blocks=blocks, fresh=fresh, alpha=alpha
  )
  return _put(model, grown, inputs, optimizer, keep_groups=blocks > 1)


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

  `conv` is the `nnx.Conv` inside, `kernel_size` its new spatial size. With inputs, FLOPs are
  counted and the result is checked. All other arguments, and what is returned, are as for `widen`.

  Raises:
    ValueError: If the kernel would become smaller, or its padding does not keep the taps.
  """
  network = _network(model, inputs, rngs)
  grown = _driver.enlarge(
    network,
    network.kernel(_path(model, conv)),
    kernel_size,
    causal=getattr(conv, "padding", None) == "CAUSAL",
    fresh=fresh,
    alpha=alpha,
  )
  return _put(model, grown, inputs, optimizer)


def deepen(
  model: nnx.Module,
  add: Callable[[Any], None],
  *inputs: Any,
  outgoing: Callable[[Any], Sequence[nnx.Module]] = lambda model: (),
  optimizer: nnx.Optimizer | None = None,
  alpha: float = 0.0,
) -> Plan:
  """Adds modules to a live model, what they add to its residual stream behind a gate.

  What is new is told by the modules themselves and not by their paths: a block put before others
  is the new one, and theirs go with their weights, moments and windows.

  Args:
    model: The model; it is changed in place, or, on an error, not at all.
    add: Puts the new modules where the forward pass finds them: `lambda m: m.blocks.append(...)`,
      or `m.blocks.insert(1, ...)`. It must keep those that are there.
    *inputs: Inputs of its forward pass; with them FLOPs are counted and the result checked.
    outgoing: The modules, of those that are new, whose parameters α multiplies: the last
      layer of a residual block, or the norm it ends in. None of them: the new modules are
      the identity as they are (Net2Deeper, `identity_kernel`).
    optimizer: The model's optimizer, whose state follows.
    alpha: Value of the gate.

  Returns:
    The `Plan` that was applied.

  Raises:
    ValueError: If nothing is new, something is gone, or the model does not run with it.
  """
  network = _network(model, inputs)
  copy = nnx.clone(model)
  old = _nnx_model.paths_of_variables(copy)
  add(copy)
  new = {id(variable): path for variable, path in _nnx_model.paths_of_variables(copy)}
  gone = [path for variable, path in old if id(variable) not in new]
  if gone:
    raise ValueError(
      f"add took {_paths.listed(gone)} out of {type(model).__name__}: expected it to keep all"
      " modules that were there, itself and not a copy, and to put new ones beside them"
    )
  moved = {_paths.join(path): _paths.join(new[id(variable)]) for variable, path in old}
  names = [_paths.join(_path(copy, module)) for module in outgoing(copy)]
  deeper = _network(copy, inputs)
  grown = _driver.deepen(network, deeper, outgoing=names, moved=moved, alpha=alpha)
  return _put(model, grown, inputs, optimizer, add=add)


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

  `plan` is one of `growth.widening` or `growth.enlarging`, or a sum of them; `keep_groups` says
  that the groups of a `GroupNorm` get wider, instead of more. All other arguments are as for
  `widen`.
  """
  grown = _driver.grow(_network(model), plan, fresh, alpha)
  _put(model, grown, inputs, optimizer, keep_groups)


def shrink(
  model: nnx.Module,
  plan: Plan,
  *inputs: Any,
  take_out: Callable[[Any], Any] = lambda model: None,
  optimizer: nnx.Optimizer | None = None,
  keep_groups: bool = False,
) -> None:
  """Applies a plan of `growth.shrinking`, or `plan.inverse()`, to a live model.

  Args:
    model: The model; it is changed in place, or, on an error, not at all.
    plan: A plan for the tree `nnx.variables(model)`.
    *inputs: Inputs of the forward pass, to check the result.
    take_out: Takes out the modules whose leaves the plan removes whole, which is what the
      inverse of `deepen` does: `lambda m: m.blocks.pop()`.
    optimizer: The model's optimizer, whose state follows.
    keep_groups: Whether the groups of a `GroupNorm` get narrower, instead of fewer.
  """
  tree = plan.apply(_network(model).variables)

  def change(model: nnx.Module) -> None:
    take_out(model)
    left = _trees.shapes(variables(model)).keys() - _trees.shapes(tree).keys()
    if left:
      raise ValueError(
        f"the plan removes {_paths.listed(sorted(left))}: take the modules out with take_out="
      )
    _nnx_model.set_variables(model, tree)
    _nnx_model.fit(model, keep_groups)
    _nnx_model.pad_for_taps(model, plan)

  _change(model, plan, change, inputs, optimizer)


def merge(model: nnx.Module, *, optimizer: nnx.Optimizer | None = None) -> None:
  """Folds the gate into the weights: the model is a plain one of its own class again.

  Args:
    model: The grown model; it is changed in place.
    optimizer: Its optimizer, from whose state the gate goes.

  Raises:
    ValueError: If there is no gate, or it is not 1 and cannot be folded; see `growth.merge`.
  """
  plan = plan_of(model)
  tree = _gate.merge(variables(model), plan)

  def change(model: nnx.Module) -> None:
    _nnx_gate.detach(model)
    _nnx_model.set_variables(model, tree)

  _change(model, plan, change, (), optimizer)


def set_alpha(model: nnx.Module, alpha: float) -> None:
  """Sets the gate of a grown model by hand."""
  plan_of(model)
  variable = getattr(model, _nnx_gate.ALPHA)
  dtype = _nnx_model.get_array(variable).dtype
  _nnx_model.set_array(variable, jnp.asarray(alpha, dtype))


def plan_of(model: nnx.Module) -> Plan:
  """The plan by which a model with a gate has grown."""
  gate = _nnx_gate.mark_of(model)
  if not isinstance(gate, _nnx_gate.Gate):
    raise ValueError(f"{type(model).__name__} has no gate: it has not grown, or is merged already")
  return gate.plan


def call(fn: Callable[..., Any], model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
  """`fn(model, *args, **kwargs)`, through the gate if the model has one.

  For what is no method of the model: `growth.nnx.call(lambda m, x: m.head(m.body(x)), model, x)`.
  It may change variables, as running statistics are, but no other attributes.
  """
  mark = _nnx_gate.mark_of(model)
  if mark is None:
    return fn(model, *args, **kwargs)
  return mark.call(model, getattr(fn, "__name__", "the function"), fn, args, kwargs)


def _network(
  model: nnx.Module, inputs: Sequence[Any] = (), rngs: nnx.Rngs | None = None
) -> Network:
  """A model without a gate, as the driver sees it."""
  name = type(model).__name__
  if _nnx_gate.mark_of(model) is not None:
    raise ValueError(f"{name} has a gate already: merge it before the next growth")
  if hasattr(model, _nnx_gate.ALPHA):
    raise ValueError(f"{name} has an attribute 'alpha', where the gate would be")
  tree = variables(model)
  _trees.check_concrete("growth", tree)
  init = functools.partial(default_init, model, rngs)
  return Network(forward(model), tree, inputs, init=init, output=("0",))


def _path(model: nnx.Module, module: Any) -> _paths.Path:
  """The path of a module inside the model."""
  for path, node in nnx.iter_graph(model):
    if node is module:
      return tuple(map(str, path))
  raise ValueError(
    f"expected a module inside {type(model).__name__}, such as model.layer, found"
    f" {module if isinstance(module, str) else type(module).__name__!r}"
  )


def _described(
  model: nnx.Module, producer: Any, consumers: Sequence[Any], also: Sequence[Any], axis: Axis
) -> Dimension:
  """The dimension between modules that were named."""
  tree = variables(model)
  shapes = _trees.shapes(tree)
  kernel = _trees.kernel(tree, _path(model, producer))
  members: dict[str, Any] = {_paths.join(kernel): axis}
  size = shapes[kernel][axis.axis]
  bias = (*kernel[:-1], "bias")
  if bias in shapes:
    ndim = len(shapes[kernel])
    from_end = axis.axis if axis.axis < 0 else axis.axis - ndim
    if -from_end <= len(shapes[bias]):
      members[_paths.join(bias)] = axis._replace(axis=from_end)
  for module in consumers:
    path = _trees.kernel(tree, _path(model, module))
    number = 0 if isinstance(module, nnx.LinearGeneral) else -2
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


def _put(
  model: nnx.Module,
  grown: _driver.Grown,
  inputs: Sequence[Any],
  optimizer: nnx.Optimizer | None,
  keep_groups: bool = False,
  add: Callable[[Any], None] = lambda model: None,
) -> Plan:
  """Puts grown variables into a live model, and attaches its gate.

  Args:
    model: The model.
    grown: Its grown variables and the plan.
    inputs: Inputs of the forward pass, to check the result.
    optimizer: The model's optimizer, whose state follows.
    keep_groups: Whether the groups of a `GroupNorm` get wider, instead of more.
    add: Puts new modules into the model.

  Returns:
    The plan.
  """
  plan = grown.plan
  alpha = _trees.leaves(grown.variables)[plan.alpha]
  tree = _trees.remove(grown.variables, plan.alpha)

  def change(model: nnx.Module) -> None:
    add(model)
    _nnx_model.set_variables(model, tree)
    sizes = _nnx_gate.attributes(model)
    _nnx_model.fit(model, keep_groups)
    _nnx_model.pad_for_taps(model, plan)
    before = _nnx_gate.changed(sizes, _nnx_gate.attributes(model))
    _nnx_gate.attach(model, plan, alpha, before)

  _change(model, plan, change, inputs, optimizer)
  return plan


def _change(
  model: nnx.Module,
  plan: Plan,
  change: Callable[[Any], None],
  inputs: Sequence[Any],
  optimizer: nnx.Optimizer | None,
) -> None:
  """Changes a model and its optimizer's state, or, on an error, neither."""
  changed = nnx.clone(model)
  change(changed)
  _driver.check_runs(Network(forward(changed), variables(changed), inputs), type(model).__name__)
  if optimizer is None:
    change(model)
    return
  before, after = (nnx.state(m, optimizer.wrt) for m in (model, changed))
  has_gate = _nnx_gate.mark_of(changed) is not None
  if has_gate and plan.alpha not in _trees.leaves(after):
    raise ValueError(
      f"optimizer: its wrt, {optimizer.wrt}, leaves out the gate {_paths.join(plan.alpha)!r}, which"
      " so would never open: expected one that takes it in, such as nnx.Any(..., nnx.PathContains"
      f"({_paths.join(plan.alpha)!r})), for the gradients too"
    )
  old_arrays = _paths.arrays(optimizer.opt_state)
  structure: Any = jax.tree.structure(jax.eval_shape(optimizer.tx.init, before))
  if structure.num_leaves != len(old_arrays):
    raise ValueError(
      f"optimizer: expected the state for this model, {structure.num_leaves} arrays, found"
      f" {len(old_arrays)}"
    )
  old_state = jax.tree.unflatten(structure, old_arrays)
  state = _state.grow_state(optimizer.tx, old_state, before, after, plan)
  change(model)
  fresh = type(optimizer)(model, optimizer.tx, wrt=optimizer.wrt)
  _paths.set_arrays(fresh.opt_state, jax.tree.leaves(state))
  optimizer.opt_state = fresh.opt_state
