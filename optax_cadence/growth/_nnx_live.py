"""A live NNX model as the driver of a growth sees it, and the way back into the model."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from optax_cadence import _paths
from optax_cadence.growth import _dimension
from optax_cadence.growth import _driver
from optax_cadence.growth import _nnx_contents
from optax_cadence.growth import _nnx_gate
from optax_cadence.growth import _nnx_init
from optax_cadence.growth import _nnx_model
from optax_cadence.growth import _state
from optax_cadence.growth import _trees
from optax_cadence.growth._dimension import Axis
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._driver import Network
from optax_cadence.growth._nnx_init import default_init
from optax_cadence.growth._nnx_model import forward
from optax_cadence.growth._nnx_model import variables
from optax_cadence.growth._plan import Plan

# What makes units: a module of the model, or a path or glob of such.
Producer = nnx.Module | str


def network_of(
  model: nnx.Module,
  inputs: Sequence[Any] = (),
  settings: Mapping[str, Any] | None = None,
  rngs: nnx.Rngs | jax.Array | None = None,
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
  notes = functools.partial(_nnx_init.notes, model)
  settings = dict(settings or {})
  if inputs and "rngs" not in settings and "rngs" in inspect.signature(model.__call__).parameters:
    settings["rngs"] = rngs
  return Network(forward(model), tree, inputs, settings, init=init, notes=notes, output=("0",))


def names_of(model: nnx.Module, producer: Producer | Sequence[Producer]) -> list[str]:
  """The paths, or globs, of modules that were named."""
  named = [producer] if isinstance(producer, str | nnx.Module) else list(producer)
  return [x if isinstance(x, str) else name_of(model, x) for x in named]


def name_of(model: nnx.Module, module: Any) -> str:
  """The path of a module inside the model, as `/`-joined names."""
  return _paths.join(path_of(model, module))


def path_of(model: nnx.Module, module: Any) -> _paths.Path:
  """The path of a module inside the model."""
  for path, node in nnx.iter_graph(model):
    if node is module:
      return tuple(map(str, path))
  raise ValueError(
    f"expected a module inside {type(model).__name__}, such as model.layer, found"
    f" {module if isinstance(module, str) else type(module).__name__!r}"
  )


def dimension_of(
  model: nnx.Module, producer: Any, consumers: Sequence[Any], also: Sequence[Any], axis: Axis
) -> Dimension:
  """The dimension between modules that were named."""
  tree = variables(model)
  shapes = _trees.shapes(tree)
  kernel = _trees.kernel(tree, path_of(model, producer))
  members: dict[str, Any] = {_paths.join(kernel): axis}
  size = shapes[kernel][axis.axis]
  bias = (*kernel[:-1], "bias")
  if bias in shapes:
    ndim = len(shapes[kernel])
    from_end = axis.axis if axis.axis < 0 else axis.axis - ndim
    if -from_end <= len(shapes[bias]):
      members[_paths.join(bias)] = axis._replace(axis=from_end)
  for module in consumers:
    path = _trees.kernel(tree, path_of(model, module))
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
    prefix = path_of(model, module)
    under = _trees.shapes(nnx.to_pure_dict(nnx.state(module)))
    members.update({_paths.join(prefix + p): axis._replace(axis=-1) for p, s in under.items() if s})
  return _dimension.dimension(tree, members)


def put(
  model: nnx.Module,
  grown: _driver.Grown,
  network: Network,
  optimizer: nnx.Optimizer | None,
  sizes: Mapping[str, Any] | None = None,
  add: Callable[[Any], None] = lambda model: None,
  refit: Callable[[Any], None] = lambda model: None,
) -> Plan:
  """Puts grown variables into a live model, and attaches its gate if the plan has one.

  Args:
    model: The model.
    grown: Its grown variables and the plan.
    network: The model as it was, with its inputs, to check the result.
    optimizer: The model's optimizer, whose state follows.
    sizes: New values of attributes of the user's own classes.
    add: Puts new modules into the model.
    refit: Sets other attributes of the user's own classes that repeat sizes.

  Returns:
    The plan.
  """
  plan, tree, alpha = grown.plan, grown.variables, None
  if plan.gate:
    alpha = _paths.by_path(tree)[plan.alpha]
    tree = _trees.remove(tree, plan.alpha)

  def resize(model: nnx.Module) -> tuple[dict[Any, Any], Any]:
    """Brings the model to its new size; returns attributes and contents that changed, as before."""
    held = _nnx_contents.snapshot(model)
    add(model)
    contents = _nnx_contents.changes(held, model)
    modules = _nnx_model.parts(model).modules
    before = _nnx_model.attributes(modules)
    _nnx_model.resize(model, tree, plan, sizes, refit)
    return _nnx_gate.changed(before, _nnx_model.attributes(modules)), contents

  def change(model: nnx.Module) -> None:
    before, contents = resize(model)
    if plan.gate:
      _nnx_gate.attach(model, plan, alpha, before, contents)

  carry_out(model, plan, change, optimizer, network, resize)
  return plan


def carry_out(
  model: nnx.Module,
  plan: Plan,
  change: Callable[[Any], Any],
  optimizer: nnx.Optimizer | None,
  network: Network | None = None,
  resize: Callable[[Any], Any] | None = None,
) -> None:
  """Changes a model and its optimizer's state, or, on an error, neither.

  Args:
    model: The model.
    plan: The plan by which it changes.
    change: Changes a model.
    optimizer: The model's optimizer.
    network: The model as it was, with the inputs on which the changed one has to run.
    resize: Changes a model as `change` does, but attaches no gate; None where that attaches none.
  """
  changed = nnx.clone(model)
  change(changed)
  if network is not None:
    name, hint = type(model).__name__, _nnx_model.sizes_to_name(model, plan)
    gated = network._replace(forward=forward(changed), variables=variables(changed))
    regroups = any(dimension.regroups for dimension, _ in plan.dimensions)
    if regroups or any(leaf.scaled for leaf in plan.changes):
      plain = nnx.clone(model)
      (resize or change)(plain)
      resized = network._replace(forward=forward(plain), variables=variables(plain))
      _driver.check_layout(resized, plan, name, hint)
      _driver.check_runs(gated, name, hint)
      _driver.check_closed(resized, plan)
    else:
      _driver.check_runs(gated, name, hint)
  if optimizer is None:
    change(model)
    return
  state = _opt_state_of(optimizer, model, changed, plan)
  change(model)
  fresh = type(optimizer)(model, optimizer.tx, wrt=optimizer.wrt)
  _paths.set_arrays(fresh.opt_state, jax.tree.leaves(state))
  optimizer.opt_state = fresh.opt_state


def _opt_state_of(
  optimizer: nnx.Optimizer, model: nnx.Module, changed: nnx.Module, plan: Plan
) -> Any:
  """The state of an optimizer for a model that has changed by a plan."""
  before, after = (nnx.state(m, optimizer.wrt) for m in (model, changed))
  has_gate = _nnx_gate.mark_of(changed) is not None
  if has_gate and plan.alpha not in _paths.by_path(after):
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
  return _state.grow_state(optimizer.tx, old_state, before, after, plan)
