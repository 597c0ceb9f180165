"""Growth of live NNX models, their optimizer included.

A grown model stays the object it was, of its own class, with the gate as one more parameter,
`alpha`. Its methods go through the gate (see `_nnx_gate`). After `merge` it is a plain model again,
at its new size. Arguments that several functions have are described at `widen`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_cadence import _paths
from optax_cadence.growth import _driver
from optax_cadence.growth import _gate
from optax_cadence.growth import _nnx_contents
from optax_cadence.growth import _nnx_gate
from optax_cadence.growth import _nnx_live
from optax_cadence.growth import _nnx_model
from optax_cadence.growth import _recycle
from optax_cadence.growth import _stacking
from optax_cadence.growth import _trees
from optax_cadence.growth import _vocabulary
from optax_cadence.growth._activity import Forward
from optax_cadence.growth._dimension import Axis
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._fresh import Fresh
from optax_cadence.growth._nnx_init import default_init
from optax_cadence.growth._nnx_live import Producer
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
  return _driver.couple(
    _nnx_live.network_of(model, inputs), _nnx_live.names_of(model, producer), axis=axis, **kwargs
  )


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
  network = _nnx_live.network_of(model, inputs, kwargs, rngs)
  units: Any = producer
  if consumers is not None:
    units = _nnx_live.dimension_of(model, producer, consumers, also, Axis(axis, blocks, unit))
  elif not isinstance(producer, Dimension):
    units = _nnx_live.names_of(model, producer)
  grown = _driver.widen(
    network, units, by, axis=axis, unit=unit, blocks=blocks, fresh=fresh, alpha=alpha
  )
  return _nnx_live.put(model, grown, network, optimizer, sizes=sizes)


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
  network = _nnx_live.network_of(model, inputs, kwargs, rngs)
  path, causal = _nnx_live.path_of(model, conv), getattr(conv, "padding", None) == "CAUSAL"
  grown = _driver.enlarge(network, path, kernel_size, causal=causal, fresh=fresh, alpha=alpha)
  return _nnx_live.put(model, grown, network, optimizer, sizes=sizes)


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

  `add` puts the new modules where the forward pass finds them: `lambda m: m.blocks.append(...)`, or
  `m.blocks.insert(1, ...)`. It must keep those that are there. `outgoing` are the modules, of those
  that are new, whose parameters α multiplies: the last layer of a residual block, or the norm it
  ends in. None of them: the new modules are the identity as they are (Net2Deeper,
  `identity_kernel`). With inputs FLOPs are counted and the result is checked, and, if they are
  arrays, that new modules do not count while the gate is closed. All other arguments, and what is
  returned, are as for `widen`.

  Raises:
    ValueError: If nothing is new, something is gone, the model does not run with it, or what is new
      counts although the gate is closed.
  """
  network = _nnx_live.network_of(model, inputs, kwargs)
  copy = nnx.clone(model)
  old = _nnx_model.parts(copy).variables
  add(copy)
  new = {id(variable): path for path, variable in _nnx_model.parts(copy).variables.items()}
  gone = [path for path, variable in old.items() if id(variable) not in new]
  if gone:
    raise ValueError(
      f"add took {_paths.listed(gone)} out of {type(model).__name__}: expected it to keep all"
      " modules that were there, itself and not a copy, and to put new ones beside them"
    )
  moved = {_paths.join(p): _paths.join(new[id(variable)]) for p, variable in old.items()}
  names = [_nnx_live.name_of(copy, module) for module in outgoing(copy)]
  deeper = _nnx_live.network_of(copy, inputs, kwargs)
  grown = _driver.deepen(network, deeper, outgoing=names, moved=moved, alpha=alpha)
  return _nnx_live.put(model, grown, network, optimizer, add=add)


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

  `layers` is the module inside whose variables are stacked along axis 0. `times` or `by`, `where`
  and `copy_state` are as for `growth.stacking`. `outgoing` are the modules in `layers` through
  which a layer adds to its residual stream: α multiplies what is new in them. None: there is no
  gate, and the function changes at once. New layers are copies of old ones, unless `fresh` says
  where they come from: `growth.nnx.default_init(model, rngs)`. `sizes` are new values of attributes
  that hold the number of layers: `{"depth": 6}`. With inputs the result is checked, and, if they
  are arrays, that new layers do not count while the gate is closed. All other arguments, and what
  is returned, are as for `widen`.

  Raises:
    ValueError: If new layers count although the gate is closed, or as `growth.stacking` does.
  """
  network = _nnx_live.network_of(model, inputs, kwargs)
  plan = _stacking.stacking(
    network.variables,
    _nnx_live.name_of(model, layers),
    times=times,
    by=by,
    where=where,
    outgoing=[_nnx_live.name_of(model, module) for module in outgoing],
    copy=fresh is None,
    copy_state=copy_state,
  )
  grown = _driver.grow(network, plan, {} if fresh is None else fresh, alpha)
  return _nnx_live.put(model, grown, network, optimizer, sizes=sizes)


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

  `attn` is the attention layer inside, or its path; or several, as a list or glob: "blocks/*/attn".
  `by` is how many more there are of its "heads" (with the queries that they serve, where there are
  several for a key), of the "queries" of each group, or of the entries of every head, its "size",
  as `of` says. All other arguments, and what is returned, are as for `widen`.

  Raises:
    ValueError: If the heads cannot be found or grow; it says why.
  """
  network = _nnx_live.network_of(model, inputs, kwargs, rngs)
  names = _nnx_live.names_of(model, attn)
  grown = _driver.heads(network, names, by, of, fresh=fresh, alpha=alpha)
  layers = {path for name in names for path in _trees.layers(network.variables, name)}
  refit = functools.partial(_nnx_model.fit_heads, layers=layers, of=of, plan=grown.plan)
  return _nnx_live.put(model, grown, network, optimizer, sizes=sizes, refit=refit)


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

  `by` is the number of new tokens, `embed` the `nnx.Embed` inside, `head` the layer that makes the
  logits; None for a tied one, which reads the embedding. `given` has new entries by the path of
  their leaf, `{"embed/embedding": rows}`; by default a new token is the mean of the old ones, see
  `growth.mean_tokens`. With inputs the result is checked. All other arguments, and what is
  returned, are as for `widen`; `growth.undo(model, plan)` takes it back.

  Raises:
    ValueError: As `growth.adding_tokens` does, or if the model does not run with more tokens.
  """
  network = _nnx_live.network_of(model, inputs, kwargs)
  names = [None if m is None else _nnx_live.name_of(model, m) for m in (embed, head)]
  plan = _vocabulary.adding_tokens(network.variables, by, embed=names[0] or "", head=names[1])
  fresh = _vocabulary.mean_tokens(network.variables, plan, given)
  grown = _driver.grow(network, plan, fresh)
  return _nnx_live.put(model, grown, network, optimizer, sizes=sizes)


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
  network = _nnx_live.network_of(model, inputs, kwargs)
  grown = _driver.grow(network, plan, fresh, alpha)
  _nnx_live.put(model, grown, network, optimizer, sizes)


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

  `plan` is one for the tree `nnx.variables(model)`. `take_out` takes out the modules whose leaves
  the plan removes whole, which is what the inverse of `deepen` does: `lambda m: m.blocks.pop()`.
  With inputs the result is checked. All other arguments are as for `widen`.

  Raises:
    ValueError: If the plan removes a module that is still there, or the model does not run with
      what is left.
  """
  network = _nnx_live.network_of(model, inputs, kwargs)
  tree = plan.apply(network.variables)

  def change(model: nnx.Module) -> None:
    take_out(model)
    left = _trees.shapes(variables(model)).keys() - _trees.shapes(tree).keys()
    if left:
      raise ValueError(
        f"the plan removes {_paths.listed(sorted(left))}: take the modules out with take_out="
      )
    _nnx_model.resize(model, tree, plan, sizes)

  _nnx_live.carry_out(model, plan, change, optimizer, network)


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

  _nnx_live.carry_out(model, plan, change, optimizer)


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
  if _nnx_gate.mark_of(model) is None:
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
    _nnx_gate.gate_of(model).put_back(model)
    _nnx_model.set_variables(model, tree)

  _nnx_live.carry_out(model, back, change, optimizer)


def set_alpha(model: nnx.Module, alpha: float) -> None:
  """Sets the gate of a grown model by hand."""
  _nnx_gate.gate_of(model)
  variable = getattr(model, _nnx_gate.ALPHA)
  dtype = _nnx_model.get_array(variable).dtype
  _nnx_model.set_array(variable, jnp.asarray(alpha, dtype))


def plan_of(model: nnx.Module) -> Plan:
  """The plan by which a model with a gate has grown."""
  return _nnx_gate.gate_of(model).plan


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
