"""Growth of Linen models: two module definitions, old and new, and paths into their variables.

What grows comes back as the grown variables, with the gate at "params/alpha"; a function to
call in place of `new.apply` until `growth.merge(variables, plan)`; and the plan, by which
`growth.grow_state` takes the optimizer's state along.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from optax_cadence import _paths
from optax_cadence.growth import _driver
from optax_cadence.growth import _gate
from optax_cadence.growth import _planners
from optax_cadence.growth import _stacking
from optax_cadence.growth import _trees
from optax_cadence.growth import _vocabulary
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._driver import Network
from optax_cadence.growth._plan import Plan

Grown = tuple[Any, Callable[..., Any], Plan]


def couple(module: Any, variables: Any, *inputs: Any, producer: str, **kwargs: Any) -> Dimension:
  """As `growth.couple`, for the path of a layer: every axis that grows with one of its own.

  Args:
    module: The module.
    variables: Its variables.
    *inputs: Its inputs, arrays or `jax.ShapeDtypeStruct`s.
    producer: Path of the layer, or leaf, that makes the units.
    **kwargs: As for `growth.couple` (`axis`, `unit`, `blocks`), or of the forward pass.

  Returns:
    The `Dimension`, for the tree `variables`.
  """
  network = _network(module, variables, inputs, {})
  return _driver.couple(network, _kernel(network, producer), **kwargs)


def widen(
  old: Any,
  new: Any,
  variables: Any,
  *inputs: Any,
  producer: str,
  by: int,
  axis: int = -1,
  unit: int = 1,
  blocks: int = 1,
  rngs: Any = None,
  fresh: Any = None,
  alpha: float = 0.0,
  **kwargs: Any,
) -> Grown:
  """Gives a module more units.

  Args:
    old: The module as it is.
    new: The same module, defined at its new size.
    variables: The variables of `old`: {"params": …, "batch_stats": …}.
    *inputs: Inputs of the module, arrays.
    producer: Path of the leaf that makes the units, or of a layer with one kernel:
      "params/Dense_0".
    by: Number of new units.
    axis: The axis of the leaf that holds the units.
    unit: Adjacent positions that make one unit.
    blocks: How often the units repeat along the axis.
    rngs: As for `new.init`, which gives the new entries; or else `fresh`.
    fresh: Where they come from instead, as for `Plan.apply`.
    alpha: Value of the gate.
    **kwargs: Further arguments of the forward pass (`train`), and of `apply` (`mutable`).

  Returns:
    The grown variables, the forward pass with its gate, and the plan.

  Raises:
    ValueError: As `growth.couple`, `growth.widening` and `Plan.apply` do.
  """
  network = _network(old, variables, inputs, kwargs, new, rngs)
  grown = _driver.widen(
    network,
    _kernel(network, producer),
    by,
    axis=axis,
    unit=unit,
    blocks=blocks,
    fresh=fresh,
    alpha=alpha,
  )
  return _with_forward(old, new, grown)


def enlarge(
  old: Any,
  new: Any,
  variables: Any,
  *inputs: Any,
  conv: str,
  kernel_size: Sequence[int],
  causal: bool = False,
  rngs: Any = None,
  fresh: Any = None,
  alpha: float = 0.0,
  **kwargs: Any,
) -> Grown:
  """Gives a convolution a larger kernel, its new taps behind a gate.

  `conv` is the path of the convolution, or of its kernel, `kernel_size` the new spatial size;
  `causal` says that its padding is "CAUSAL", so that old taps are the last ones. All other
  arguments, and what is returned, are as for `widen`.

  Raises:
    ValueError: As `growth.enlarging` and `Plan.apply` do.
  """
  network = _network(old, variables, inputs, kwargs, new, rngs)
  grown = _driver.enlarge(
    network, _kernel(network, conv), kernel_size, causal=causal, fresh=fresh, alpha=alpha
  )
  return _with_forward(old, new, grown)


def deepen(
  old: Any,
  new: Any,
  variables: Any,
  *inputs: Any,
  outgoing: Iterable[str] = (),
  moved: Mapping[str, str] | None = None,
  rngs: Any = None,
  fresh: Any = None,
  alpha: float = 0.0,
  **kwargs: Any,
) -> Grown:
  """Adds layers, what they add to the residual stream behind a gate.

  `outgoing` are the paths of those new layers, or leaves, that α multiplies: the last of a
  residual block. None: the new layers are the identity as they are (Net2Deeper). `moved` says which
  old layers have another name in `new`: with `{"params/block_1": "params/block_2"}` the block put
  before them is the new one, and weights, moments and windows go with the old. Without it a layer
  is the one that has its name. All other arguments, and what is returned, are as for `widen`.

  Raises:
    ValueError: If what is new counts although the gate is closed, or as `growth.deepening` does.
  """
  network = _network(old, variables, inputs, kwargs, new, rngs)
  deeper = _network(new, network.init() if fresh is None else fresh, inputs, kwargs)
  grown = _driver.deepen(network, deeper, outgoing=outgoing, moved=moved, alpha=alpha)
  _driver.check_closed(_check_new(new, grown, inputs, kwargs), grown)
  return _with_forward(old, new, grown)


def stack(
  old: Any,
  new: Any,
  variables: Any,
  *inputs: Any,
  layers: str,
  times: int | None = None,
  by: int | None = None,
  where: str | int = "end",
  outgoing: Iterable[str] = (),
  copy_state: bool | None = None,
  rngs: Any = None,
  fresh: Any = None,
  alpha: float = 0.0,
  **kwargs: Any,
) -> Grown:
  """Adds layers to a stack that `nn.scan` or `nn.vmap` has made along axis 0.

  `layers` is the path of the stack, "params/blocks". `times` or `by`, `where`, `outgoing` (layers
  through which a layer adds to its residual stream: α multiplies what is new in them; none: no
  gate) and `copy_state` are as for `growth.stacking`. New layers are copies of old ones, unless
  `rngs` or `fresh` say where they come from. All other arguments, and what is returned, are as for
  `widen`; without a gate the forward pass is `new.apply`.

  Raises:
    ValueError: If `new` does not run with more layers, if these count although the gate is closed,
      or as `growth.stacking` does.
  """
  network = _network(old, variables, inputs, kwargs, new, rngs)
  copies = rngs is None and fresh is None
  # What a stack has in other collections, such as running statistics, is at the same path there.
  inside = tuple(layers.split("/"))[1:]
  others = {
    _paths.join((path[0], *inside))
    for path in _trees.shapes(variables)
    if path[1 : 1 + len(inside)] == inside and inside
  }
  plan = _stacking.stacking(
    variables,
    [layers, *sorted(others - {layers})],
    times=times,
    by=by,
    where=where,
    outgoing=outgoing,
    copy=copies,
    copy_state=copy_state,
    alpha=network.alpha,
  )
  grown = _driver.grow(network, plan, {} if copies else fresh, alpha)
  _driver.check_closed(_check_new(new, grown, inputs, kwargs), grown)
  return _with_forward(old, new, grown)


def heads(
  old: Any,
  new: Any,
  variables: Any,
  *inputs: Any,
  attn: str,
  by: int,
  of: str = "heads",
  rngs: Any = None,
  fresh: Any = None,
  alpha: float = 0.0,
  **kwargs: Any,
) -> Grown:
  """Gives an attention layer more heads, or larger ones, behind a gate.

  `attn` is the path of the layer, "params/attention"; `by` how many more there are of its "heads"
  (with the queries that they serve), of the "queries" of each group, or of the entries of a head,
  its "size", as `of` says. All other arguments, and what is returned, are as for `widen`.

  Raises:
    ValueError: As `growth.couple_heads`, `growth.widening` and `Plan.apply` do.
  """
  network = _network(old, variables, inputs, kwargs, new, rngs)
  grown = _driver.heads(network, attn, by, of, fresh=fresh, alpha=alpha)
  _check_new(new, grown, inputs, kwargs)
  return _with_forward(old, new, grown)


def vocabulary(
  new: Any,
  variables: Any,
  *inputs: Any,
  by: int,
  embed: str,
  head: str | None = None,
  given: Mapping[str, Any] | None = None,
  **kwargs: Any,
) -> Grown:
  """Adds tokens after the last one. Logits of old ones stay; there is no gate.

  Args:
    new: The module, defined with more tokens.
    variables: The variables of the old one.
    *inputs: Inputs of the module.
    by: Number of new tokens.
    embed: Path of the `nn.Embed`, "params/embed".
    head: Path of the layer that makes the logits; None for a tied one.
    given: New entries by the path of their leaf. By default a new token is the mean of the old
      ones, see `growth.mean_tokens`.
    **kwargs: Further arguments of the forward pass.

  Returns:
    The grown variables, `new.apply`, and the plan.

  Raises:
    ValueError: If `new` does not run with them, or as `growth.adding_tokens` does.
  """
  network = _network(new, variables, inputs, kwargs)
  plan = _vocabulary.adding_tokens(variables, by, embed=embed, head=head, alpha=network.alpha)
  grown = _driver.grow(network, plan, _vocabulary.mean_tokens(variables, plan, given))
  _check_new(new, grown, inputs, kwargs)
  return grown.variables, new.apply, plan


def _check_new(
  new: Any, grown: _driver.Grown, inputs: Sequence[Any], settings: Mapping[str, Any]
) -> Network:
  """The new module with the grown variables, without their gate.

  Raises:
    ValueError: If it does not run.
  """
  variables = grown.variables
  if grown.plan.gate:
    variables = _trees.remove(variables, grown.plan.alpha)
  network = _network(new, variables, inputs, settings)
  _driver.check_runs(network, type(new).__name__)
  # With `mutable` the output stands before what has changed.
  return network._replace(output=("0",) if settings.get("mutable") else ())


def shrink(
  old: Any,
  new: Any,
  variables: Any,
  *inputs: Any,
  producer: str,
  keep: Any = None,
  remove: Any = None,
  axis: int = -1,
  unit: int = 1,
  blocks: int = 1,
  **kwargs: Any,
) -> tuple[Any, Plan]:
  """Removes units, such as those that a channel mask has pruned.

  `keep` says which units stay: indices, or a bool mask over the units; or `remove`, which go. `new`
  is the module at its smaller size. All other arguments are as for `widen`.

  Returns:
    The smaller variables, for `new`, and the plan.

  Raises:
    ValueError: If `new` does not run with what is left, or as `growth.shrinking` does.
  """
  network = _network(old, variables, inputs, kwargs)
  name = _kernel(network, producer)
  units = _driver.couple(network, name, axis=axis, unit=unit, blocks=blocks)
  plan = _planners.shrinking(variables, units, keep=keep, remove=remove)
  smaller = plan.apply(variables)
  _driver.check_runs(_network(new, smaller, inputs, kwargs), type(new).__name__)
  return smaller, plan


def _network(
  module: Any,
  variables: Any,
  inputs: Sequence[Any],
  settings: Mapping[str, Any],
  new: Any = None,
  rngs: Any = None,
) -> Network:
  """A module as the driver sees it; `new` and `rngs` give its new entries."""

  def init() -> Any:
    if rngs is None:
      raise ValueError("new entries need a source: expected rngs=, for new.init, or fresh=")
    of_init = {name: value for name, value in settings.items() if name != "mutable"}
    return jax.jit(lambda rngs: new.init(rngs, *inputs, **of_init))(rngs)

  return Network(module.apply, variables, inputs, settings, "params/alpha", init)


def _kernel(network: Network, name: str) -> str:
  """The path of the kernel of a layer, or of a leaf, that was named."""
  if "params" not in network.variables:
    raise ValueError(
      'expected variables as `init` returns them, {"params": …}, found the keys'
      f" {sorted(network.variables)}"
    )
  return network.kernel(tuple(name.split("/")))


def _with_forward(old: Any, new: Any, grown: _driver.Grown) -> Grown:
  """The result of a growth: the variables, the forward pass with its gate, and the plan."""
  if not grown.plan.gate:
    return grown.variables, new.apply, grown.plan
  return grown.variables, _gate.gated(new.apply, grown.plan, old=old.apply), grown.plan
