"""Growth of live NNX models, their optimizer included.

A grown model stays the object it was, of its own class, with the gate as one more parameter,
`alpha`. Its methods go through the gate (see `_nnx_gate`). After `merge` it is a plain model again,
at its new size.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_cadence import _paths
from optax_cadence.growth import _dimension
from optax_cadence.growth import _driver
from optax_cadence.growth import _gate
from optax_cadence.growth import _nnx_contents
from optax_cadence.growth import _nnx_gate
from optax_cadence.growth import _nnx_init
from optax_cadence.growth import _nnx_model
from optax_cadence.growth import _recycle
from optax_cadence.growth import _stacking
from optax_cadence.growth import _state
from optax_cadence.growth import _trees
from optax_cadence.growth import _vocabulary
from optax_cadence.growth._activity import Forward
from optax_cadence.growth._dimension import Axis
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._driver import Network
from optax_cadence.growth._fresh import Fresh
from optax_cadence.growth._nnx_init import default_init
from optax_cadence.growth._nnx_model import forward
from optax_cadence.growth._nnx_model import variables
from optax_cadence.growth._plan import Plan
from optax_cadence.growth._recycle import Recycle

__all__ = [
  "call",
  "couple",
  "deepen",
  "default_init",
  "enlarge",
  "forward",
  "grow",
  "heads",
  "merge",
  "plan_of",
  "recycle",
  "set_alpha",
  "shrink",
  "stack",
  "undo",
  "variables",
  "vocabulary",
  "widen",
]


# What makes the units: a module of the model, or a path or glob of such.
Producer = nnx.Module | str


def couple(
  model: nnx.Module,
  *inputs: Any,
  producer: Producer | Sequence[Producer],
  axis: int = -1,
  **kwargs: Any,
) -> Dimension:
  """As `growth.couple`, for a module of a live model: every axis that grows with one of its own.

  Args:
    model: The model.
    *inputs: Inputs of its forward pass, arrays or `jax.ShapeDtypeStruct`s.
    producer: The module inside whose kernel (or embedding) has the units along `axis`, or its
      path, or a glob; several of as many units are one dimension.
    axis: The axis of that leaf.
    **kwargs: As for `growth.couple`, or further arguments of the forward pass.

  Returns:
    The `Dimension`, for the tree `nnx.variables(model)`.
  """
  return _driver.couple(_network(model, inputs), _paths_of(model, producer), axis=axis, **kwargs)


def widen(
  model: nnx.Module,
  *inputs: Any,
  by: int | Sequence[int],
  producer: Producer | Dimension | Sequence[Producer],
  consumers: Sequence[nnx.Module] | None = None,
  also: Sequence[nnx.Module] = (),
  axis: int = -1,
  unit: int = 1,
  blocks: int = 1,
  fresh: Fresh | None = None,
  rngs: nnx.Rngs | jax.Array | None = None,
  optimizer: nnx.Optimizer | None = None,
  alpha: float = 0.0,
  sizes: Mapping[str, Any] | None = None,
  **kwargs: Any,
) -> Plan:
  """Gives a live model more units behind a gate.

  Args:
    model: The model; it is changed in place, or, on an error, not at all.
    *inputs: Inputs of its forward pass, arrays or `jax.ShapeDtypeStruct`s. With them, all
      that must grow along is found and checked.
    by: Number of new units, of each producer; or a list, a number for each that is named.
    producer: The module whose kernel (or embedding) makes the units, or its path; or several, as
      a list or as a glob, "blocks/*/up"; or a `Dimension`.
    consumers: The modules whose kernels read them. Needed without `inputs`.
    also: Modules in between that have a number per unit (norms). With `consumers`.
    axis: The axis of the producer's kernel that holds the units.
    unit: Adjacent positions that make one unit.
    blocks: How often the units repeat along the axis: for the groups of a norm that grow.
    fresh: Where new entries come from; by default see `default_init`.
    rngs: Random numbers for those initializers, and for the forward pass if that takes `rngs` too.
    optimizer: The model's optimizer, whose state follows.
    alpha: Value of the gate.
    sizes: New values of attributes of your own classes that hold a size, by name or by path, a glob
      perhaps: `{"num_heads": 6}`; or of a config that they hold, `{"config": larger}`. (Flax's
      layers are told.)
    **kwargs: Further arguments of the forward pass (`train=True`).

  Returns:
    The `Plan` that was applied.

  Raises:
    ValueError: If something does not fit; it names the path, the shapes, what is missing.
  """
  network = _network(model, inputs, kwargs, rngs)
  units: Any = producer
  if consumers is not None:
    units = _described(model, producer, consumers, also, Axis(axis, blocks, unit))
  elif not isinstance(producer, Dimension):
    units = _paths_of(model, producer)
  grown = _driver.widen(
    network, units, by, axis=axis, unit=unit, blocks=blocks, fresh=fresh, alpha=alpha
  )
  return _put(model, grown, network, optimizer, sizes=sizes)


def enlarge(
  model: nnx.Module,
  *inputs: Any,
  conv: nnx.Module,
  kernel_size: Sequence[int],
  fresh: Fresh | None = None,
  rngs: nnx.Rngs | jax.Array | None = None,
  optimizer: nnx.Optimizer | None = None,
  alpha: float = 0.0,
  sizes: Mapping[str, Any] | None = None,
  **kwargs: Any,
) -> Plan:
  """Gives a convolution of a live model a larger kernel, its new taps behind a gate.

  `conv` is the `nnx.Conv` inside, `kernel_size` its new spatial size. With inputs, FLOPs are
  counted and the result is checked. All other arguments, and what is returned, are as for `widen`.

  Raises:
    ValueError: If the kernel would become smaller, or its padding does not keep the taps.
  """
  network = _network(model, inputs, kwargs, rngs)
  grown = _driver.enlarge(
    network,
    network.kernel(_path(model, conv)),
    kernel_size,
    causal=getattr(conv, "padding", None) == "CAUSAL",
    fresh=fresh,
    alpha=alpha,
  )
  return _put(model, grown, network, optimizer, sizes=sizes)


def deepen(
  model: nnx.Module,
  add: Callable[[Any], None],
  *inputs: Any,
  outgoing: Callable[[Any], Sequence[nnx.Module]] = lambda model: (),
  optimizer: nnx.Optimizer | None = None,
  alpha: float = 0.0,
  **kwargs: Any,
) -> Plan:
  """Adds modules to a live model, what they add to its residual stream behind a gate.

  What is new is told by the modules themselves and not by their paths: a block put before others
  is the new one, and theirs go with their weights, moments and windows.

  Args:
    model: The model; it is changed in place, or, on an error, not at all.
    add: Puts the new modules where the forward pass finds them: `lambda m: m.blocks.append(...)`,
      or `m.blocks.insert(1, ...)`. It must keep those that are there.
    *inputs: Inputs of its forward pass. With them FLOPs are counted and the result is checked, and,
      if they are arrays, that new modules do not count while the gate is closed.
    outgoing: The modules, of those that are new, whose parameters α multiplies: the last
      layer of a residual block, or the norm it ends in. None of them: the new modules are
      the identity as they are (Net2Deeper, `identity_kernel`).
    optimizer: The model's optimizer, whose state follows.
    alpha: Value of the gate.
    **kwargs: Further arguments of the forward pass.

  Returns:
    The `Plan` that was applied.

  Raises:
    ValueError: If nothing is new, something is gone, the model does not run with it, or what is new
      counts although the gate is closed.
  """
  network = _network(model, inputs, kwargs)
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
  deeper = _network(copy, inputs, kwargs)
  grown = _driver.deepen(network, deeper, outgoing=names, moved=moved, alpha=alpha)
  return _put(model, grown, network, optimizer, add=add)


def stack(
  model: nnx.Module,
  *inputs: Any,
  layers: nnx.Module,
  times: int | None = None,
  by: int | None = None,
  where: str | int = "end",
  outgoing: Sequence[nnx.Module] = (),
  fresh: Fresh | None = None,
  copy_state: bool | None = None,
  sizes: Mapping[str, Any] | None = None,
  optimizer: nnx.Optimizer | None = None,
  alpha: float = 0.0,
  **kwargs: Any,
) -> Plan:
  """Gives a live model more layers in a stack that `nnx.vmap` has made.

  Args:
    model: The model; it is changed in place, or, on an error, not at all.
    *inputs: Inputs of its forward pass. With them the result is checked, and, if they are arrays,
      that new layers do not count while the gate is closed.
    layers: The module inside whose variables are stacked along axis 0.
    times: By how much the number of layers is multiplied; or else `by`.
    by: Number of new layers.
    where: Where they stand, see `growth.stacking`.
    outgoing: The modules in `layers` through which a layer adds to its residual stream: α
      multiplies what is new in them. None: there is no gate, and the function changes at once.
    fresh: Where new layers come from, such as `growth.nnx.default_init(model, rngs)`. By default
      they are copies of old ones.
    copy_state: Whether the optimizer's state is copied with the layers, see `growth.stacking`.
    sizes: New values of attributes that hold the number of layers, as for `widen`: `{"depth": 6}`.
    optimizer: The model's optimizer, whose state follows.
    alpha: Value of the gate.
    **kwargs: Further arguments of the forward pass.

  Returns:
    The `Plan` that was applied.

  Raises:
    ValueError: If something does not fit; it names the path, the shapes, what is missing.
  """
  network = _network(model, inputs, kwargs)
  plan = _stacking.stacking(
    network.variables,
    _paths.join(_path(model, layers)),
    times=times,
    by=by,
    where=where,
    outgoing=[_paths.join(_path(model, module)) for module in outgoing],
    copy=fresh is None,
    copy_state=copy_state,
  )
  grown = _driver.grow(network, plan, {} if fresh is None else fresh, alpha)
  return _put(model, grown, network, optimizer, sizes=sizes)


def heads(
  model: nnx.Module,
  *inputs: Any,
  attn: Producer | Sequence[Producer],
  by: int,
  of: str = "heads",
  sizes: Mapping[str, Any] | None = None,
  fresh: Fresh | None = None,
  rngs: nnx.Rngs | None = None,
  optimizer: nnx.Optimizer | None = None,
  alpha: float = 0.0,
  **kwargs: Any,
) -> Plan:
  """Gives attention layers of a live model more heads, or larger ones, behind one gate.

  They are found in the program, whether or not the layer is Flax's. Attributes of a layer of your
  own that hold their number or size follow if their names say it (`num_heads`, `n_kv_heads`,
  `head_dim`, `qkv_features`); others are set by `sizes`. What comes out is checked.

  Args:
    model: The model; it is changed in place, or, on an error, not at all.
    *inputs: Inputs of its forward pass, arrays or `jax.ShapeDtypeStruct`s.
    attn: The attention layer inside, or its path; or several, as a list or glob: "blocks/*/attn".
    by: How many more for each.
    of: What is added: "heads", with the queries that they serve where there are several for a
      key; "queries", to each group; or entries to every head, its "size".
    sizes: New values of attributes of your own classes, as for `widen`.
    fresh: Where new entries come from, as for `widen`.
    rngs: Random numbers for the initializers, as for `widen`.
    optimizer: The model's optimizer, whose state follows.
    alpha: Value of the gate.
    **kwargs: Further arguments of the forward pass.

  Returns:
    The `Plan` that was applied.

  Raises:
    ValueError: If the heads cannot be found or grow; it says why.
  """
  network = _network(model, inputs, kwargs, rngs)
  names = _paths_of(model, attn)
  grown = _driver.heads(network, names, by, of, fresh=fresh, alpha=alpha)
  layers = {path for name in names for path in _trees.layers(network.variables, name)}

  def refit(model: nnx.Module) -> None:
    for path, node in nnx.iter_graph(model):
      if tuple(map(str, path)) in layers:
        _nnx_model.fit_heads(node, tuple(map(str, path)), of, grown.plan)

  return _put(model, grown, network, optimizer, sizes=sizes, refit=refit)


def vocabulary(
  model: nnx.Module,
  *inputs: Any,
  by: int,
  embed: nnx.Module,
  head: nnx.Module | None = None,
  given: Mapping[str, Any] | None = None,
  sizes: Mapping[str, Any] | None = None,
  optimizer: nnx.Optimizer | None = None,
  **kwargs: Any,
) -> Plan:
  """Gives a live model more tokens, after the last one. Logits of old ones stay; there is no gate.

  Args:
    model: The model; it is changed in place, or, on an error, not at all.
    *inputs: Inputs of its forward pass; with them the result is checked.
    by: Number of new tokens.
    embed: The `nnx.Embed` inside.
    head: The layer that makes the logits; None for a tied one, which reads the embedding.
    given: New entries by the path of their leaf, `{"embed/embedding": rows}`. By default a new
      token is the mean of the old ones, see `growth.mean_tokens`.
    sizes: New values of attributes that hold the number of tokens, as for `widen`.
    optimizer: The model's optimizer, whose state follows.
    **kwargs: Further arguments of the forward pass.

  Returns:
    The `Plan` that was applied; `growth.undo(model, plan)` takes it back.

  Raises:
    ValueError: If something does not fit; it names the path, the shapes, what is missing.
  """
  network = _network(model, inputs, kwargs)
  names = [None if m is None else _paths.join(_path(model, m)) for m in (embed, head)]
  plan = _vocabulary.adding_tokens(network.variables, by, embed=names[0] or "", head=names[1])
  fresh = _vocabulary.mean_tokens(network.variables, plan, given)
  grown = _driver.grow(network, plan, fresh)
  return _put(model, grown, network, optimizer, sizes=sizes)


def grow(
  model: nnx.Module,
  plan: Plan,
  fresh: Any,
  *,
  inputs: Sequence[Any] = (),
  optimizer: nnx.Optimizer | None = None,
  alpha: float = 0.0,
  sizes: Mapping[str, Any] | None = None,
  **kwargs: Any,
) -> None:
  """Applies a plan for the tree `nnx.variables(model)` to the live model.

  `plan` is one of `growth.widening` or `growth.enlarging`, or a sum of them. All other arguments
  are as for `widen`.
  """
  network = _network(model, inputs, kwargs)
  grown = _driver.grow(network, plan, fresh, alpha)
  _put(model, grown, network, optimizer, sizes)


def shrink(
  model: nnx.Module,
  plan: Plan,
  *inputs: Any,
  take_out: Callable[[Any], Any] = lambda model: None,
  optimizer: nnx.Optimizer | None = None,
  sizes: Mapping[str, Any] | None = None,
  **kwargs: Any,
) -> None:
  """Applies a plan of `growth.shrinking`, or `plan.inverse()`, to a live model.

  Args:
    model: The model; it is changed in place, or, on an error, not at all.
    plan: A plan for the tree `nnx.variables(model)`.
    *inputs: Inputs of the forward pass, to check the result.
    take_out: Takes out the modules whose leaves the plan removes whole, which is what the
      inverse of `deepen` does: `lambda m: m.blocks.pop()`.
    optimizer: The model's optimizer, whose state follows.
    sizes: As for `widen`.
    **kwargs: Further arguments of the forward pass.
  """
  network = _network(model, inputs, kwargs)
  tree = plan.apply(network.variables)

  def change(model: nnx.Module) -> None:
    take_out(model)
    left = _trees.shapes(variables(model)).keys() - _trees.shapes(tree).keys()
    if left:
      raise ValueError(
        f"the plan removes {_paths.listed(sorted(left))}: take the modules out with take_out="
      )
    _nnx_model.set_variables(model, tree)
    _nnx_model.fit(model, plan)
    _nnx_model.set_sizes(model, sizes)
    _nnx_model.pad_for_taps(model, plan)

  _change(model, plan, change, change, network, optimizer)


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

  _change(model, plan, change, change, None, optimizer)


def undo(
  model: nnx.Module,
  plan: Plan | None = None,
  *,
  take_out: Callable[[Any], Any] = lambda model: None,
  sizes: Mapping[str, Any] | None = None,
  optimizer: nnx.Optimizer | None = None,
) -> None:
  """Takes the growth of a live model back, whatever α is; see `growth.undo`.

  Args:
    model: The grown model; it is changed in place, or, on an error, not at all. Modules that were
      there before stay the objects that they are.
    plan: The plan by which it has grown. A model with a gate knows its own, and all else that was
      changed.
    take_out: Without a gate, takes out modules that were added, as for `shrink`.
    sizes: Without a gate, attributes to set, as for the growth, with the values of before.
    optimizer: The model's optimizer, whose state goes back too.

  Raises:
    ValueError: If there is no gate and no plan, or the model is not as the plan has left it.
  """
  mark = _nnx_gate.mark_of(model)
  if mark is None:
    if plan is None:
      raise ValueError(
        f"{type(model).__name__} has no gate, which would know the growth: expected plan=, by which"
        " it has grown"
      )
    grown = plan

    def back_to_old(model: nnx.Module) -> None:
      _nnx_contents.unwrap(model, grown)
      take_out(model)

    shrink(model, plan.inverse(), take_out=back_to_old, sizes=sizes, optimizer=optimizer)
    return
  plan = plan_of(model)
  back = plan.inverse()
  tree = back.apply(_trees.remove(variables(model), plan.alpha))

  def change(model: nnx.Module) -> None:
    gate = _nnx_gate.mark_of(model)
    assert isinstance(gate, _nnx_gate.Gate)
    gate.put_back(model)
    _nnx_model.set_variables(model, tree)

  _change(model, back, change, change, None, optimizer)


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


def recycle(
  model: nnx.Module, *inputs: Any, method: Callable[..., Any] | None = None, **settings: Any
) -> Recycle:
  """As `growth.recycle`, for a live model.

  Args:
    model: The model.
    *inputs: Inputs of its forward pass, arrays or `jax.ShapeDtypeStruct`s.
    method: What is called in place of the forward pass: `method(model, *inputs)`, a method of the
      class or any function, such as the loss.
    **settings: As for `growth.recycle`: `inner`, `utility`, `rate` and so on.

  Returns:
    `Recycle(forward, transformation)`. `forward(model, *inputs)` returns `(result, activity)` and
    changes the variables of the model that its forward pass does. The transformation is for
    `nnx.Optimizer`, whose `update` takes `activity=`.
  """
  fn = type(model).__call__ if method is None else method
  what = getattr(fn, "__qualname__", "the function")
  of_model = _nnx_gate.Call(model, what, fn, inputs, {})
  found: Any = _recycle.recycle(of_model.function(), *of_model.arguments(), **settings)

  def forward(model: nnx.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    of_model = _nnx_gate.Call(model, what, fn, args, kwargs)
    run = Forward(of_model.function(), found.forward.layers)
    result, activity = run(*of_model.arguments())
    return of_model.finish(result), activity

  return Recycle(forward, found.transformation)


def _network(
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


def _paths_of(model: nnx.Module, producer: Producer | Sequence[Producer]) -> list[str]:
  """The paths, or globs, of modules that were named."""
  named = [producer] if isinstance(producer, str | nnx.Module) else list(producer)
  return [x if isinstance(x, str) else _paths.join(_path(model, x)) for x in named]


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
    alpha = _trees.leaves(tree)[plan.alpha]
    tree = _trees.remove(tree, plan.alpha)

  def resize(model: nnx.Module) -> tuple[dict[Any, Any], Any]:
    """Puts in what is new; returns what had to follow, as it was: attributes, and contents."""
    held = _nnx_contents.snapshot(model)
    add(model)
    contents = _nnx_contents.changes(held, model)
    _nnx_model.set_variables(model, tree)
    before = _nnx_gate.attributes(model)
    _nnx_model.fit(model, plan)
    refit(model)
    _nnx_model.set_sizes(model, sizes)
    _nnx_model.pad_for_taps(model, plan)
    return _nnx_gate.changed(before, _nnx_gate.attributes(model)), contents

  def change(model: nnx.Module) -> None:
    before, contents = resize(model)
    if plan.gate:
      _nnx_gate.attach(model, plan, alpha, before, contents)

  _change(model, plan, change, resize, network, optimizer)
  return plan


def _change(
  model: nnx.Module,
  plan: Plan,
  change: Callable[[Any], Any],
  resize: Callable[[Any], Any],
  network: Network | None,
  optimizer: nnx.Optimizer | None,
) -> None:
  """Changes a model and its optimizer's state, or, on an error, neither.

  Args:
    model: The model.
    plan: The plan by which it changes.
    change: Changes a model, gate included.
    resize: Changes it without a gate.
    network: The model as it was, with the inputs on which the changed one has to run.
    optimizer: The model's optimizer.
  """
  changed = nnx.clone(model)
  change(changed)
  if network is not None:
    name, hint = type(model).__name__, _nnx_model.sizes_to_name(model, plan)
    gated = network._replace(forward=forward(changed), variables=variables(changed))
    regroups = any(dimension.regroups for dimension, _ in plan.dimensions)
    if regroups or any(leaf.scaled for leaf in plan.changes):
      plain = nnx.clone(model)
      resize(plain)
      resized = network._replace(forward=forward(plain), variables=variables(plain))
      _driver.check_layout(resized, plan, name, hint)
      _driver.check_runs(gated, name, hint)
      _driver.check_closed(resized, plan)
    else:
      _driver.check_runs(gated, name, hint)
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
