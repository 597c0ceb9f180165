"""Growth of Linen models: two module definitions, old and new, and paths into their variables.

What grows comes back as the grown variables, with the gate at "params/alpha"; a function to
call in place of `new.apply` until `growth.merge(variables, plan)`; and the plan, by which
`growth.grow_state` takes the optimizer's state along.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_cadence.growth import _driver
from optax_cadence.growth import _gate
from optax_cadence.growth import _planners
from optax_cadence.growth import _recycle
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._driver import Network
from optax_cadence.growth._plan import Plan
from optax_cadence.growth._recycle import Recycle

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
    ValueError: As `growth.deepening` does.
  """
  network = _network(old, variables, inputs, kwargs, new, rngs)
  deeper = _network(new, network.init() if fresh is None else fresh, inputs, kwargs)
  grown = _driver.deepen(network, deeper, outgoing=outgoing, moved=moved, alpha=alpha)
  return _with_forward(old, new, grown)


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


def recycle(
  module: Any,
  variables: Any,
  *inputs: Any,
  init: Callable[[jax.Array], Any] | None = None,
  **settings: Any,
) -> Recycle:
  """As `growth.recycle`, for a module: fresh weights come from its own initializers.

  Args:
    module: The module.
    variables: Its variables.
    *inputs: Its inputs, arrays or `jax.ShapeDtypeStruct`s.
    init: `init(key)`, fresh parameters; by default those of `module.init`.
    **settings: As for `growth.recycle` (`inner`, `utility`, `rate` and so on), or of `apply`
      (`rngs`, `mutable`) and the forward pass (`train`).

  Returns:
    `Recycle(forward, transformation)`. `forward(variables, *inputs)` takes what `module.apply`
    does, and returns `(result, activity)`. The transformation is for `variables["params"]`.
  """
  of_recycle = inspect.signature(_recycle.recycle).parameters
  of_call = {name: value for name, value in settings.items() if name not in of_recycle}

  def fresh(key: jax.Array) -> Any:
    names = ["params", *(of_call.get("rngs") or {})]
    rngs = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
    flags = {name: value for name, value in of_call.items() if name not in ("mutable", "rngs")}
    return module.init(rngs, *zeros, **flags)["params"]

  settings["init"] = fresh if init is None else init
  return _recycle.recycle(module.apply, variables, *inputs, within="params", **settings)


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
  return grown.variables, _gate.gated(new.apply, grown.plan, old=old.apply), grown.plan
