"""Growth of Linen models: two module definitions, old and new, and paths into their variables.

What grows comes back as the grown variables, with the gate at "params/alpha"; a function to
call in place of `new.apply` until `growth.merge(variables, plan)`; and the plan, by which
`growth.grow_state` takes the optimizer's state along.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from optax_cadence import _paths
from optax_cadence.growth import _coupling
from optax_cadence.growth import _gate
from optax_cadence.growth import _kernels
from optax_cadence.growth import _program
from optax_cadence.growth import _trees
from optax_cadence.growth import _widening
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._plan import Plan

ALPHA = "params/alpha"
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
  name = _kernel(variables, producer)
  return _coupling.couple(module.apply, variables, *inputs, producer=name, **kwargs)


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
  units = couple(
    old, variables, *inputs, producer=producer, axis=axis, unit=unit, blocks=blocks, **kwargs
  )
  plan = _widening.widening(variables, units, by, alpha=ALPHA)
  return _grown(old, new, variables, plan, fresh or _init(new, inputs, rngs, kwargs), alpha)


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

  Args:
    old: See `widen`, as for all that is not said here.
    new: The same module, defined with the larger kernel.
    variables: The variables of `old`.
    *inputs: Inputs of the module, arrays.
    conv: Path of the convolution, or of its kernel.
    kernel_size: Its new spatial size.
    causal: Whether its padding is "CAUSAL": old taps are then the last ones.
    rngs: As for `new.init`, which gives the new entries; or else `fresh`.
    fresh: Where they come from instead, as for `Plan.apply`.
    alpha: Value of the gate.
    **kwargs: Further arguments of the forward pass (`train`), and of `apply` (`mutable`).

  Returns:
    The grown variables, the forward pass with its gate, and the plan.

  Raises:
    ValueError: As `growth.enlarging` and `Plan.apply` do.
  """
  name = _kernel(variables, conv)
  fn = functools.partial(old.apply, **kwargs)
  plan = _kernels.enlarging(
    variables, {name: kernel_size}, causal=causal, alpha=ALPHA, fn=fn, args=inputs
  )
  return _grown(old, new, variables, plan, fresh or _init(new, inputs, rngs, kwargs), alpha)


def deepen(
  old: Any,
  new: Any,
  variables: Any,
  *inputs: Any,
  outgoing: Iterable[str] = (),
  rngs: Any = None,
  fresh: Any = None,
  alpha: float = 0.0,
  **kwargs: Any,
) -> Grown:
  """Adds layers, what they add to the residual stream behind a gate.

  Args:
    old: See `widen`, as for all that is not said here.
    new: The module with more layers.
    variables: The variables of `old`.
    *inputs: Inputs of the module, arrays.
    outgoing: Paths of those new layers, or leaves, that α multiplies: the last of a residual
      block. None: they are the identity as they are (Net2Deeper).
    rngs: As for `new.init`, which gives the new entries; or else `fresh`.
    fresh: Where they come from instead, as for `Plan.apply`.
    alpha: Value of the gate.
    **kwargs: Further arguments of the forward pass (`train`), and of `apply` (`mutable`).

  Returns:
    The grown variables, the forward pass with its gate, and the plan.

  Raises:
    ValueError: As `growth.deepening` does.
  """
  deeper = fresh or _init(new, inputs, rngs, kwargs)
  flops = (
    _program.flops(old.apply, variables, *inputs, **kwargs),
    _program.flops(new.apply, deeper, *inputs, **kwargs),
  )
  plan = _kernels.deepening(variables, deeper, outgoing=outgoing, alpha=ALPHA, flops=flops)
  return _grown(old, new, variables, plan, deeper, alpha)


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

  Args:
    old: The module as it is.
    new: The same module, defined at its smaller size.
    variables: The variables of `old`.
    *inputs: Inputs of the module, arrays.
    producer: See `widen`, as for `axis`, `unit`, `blocks` and further arguments.
    keep: Which units stay: indices, or a bool mask over the units.
    remove: Which go, in place of `keep`.
    axis: See `widen`.
    unit: See `widen`.
    blocks: See `widen`.
    **kwargs: See `widen`.

  Returns:
    The smaller variables, for `new`, and the plan.

  Raises:
    ValueError: If `new` does not run with what is left, or as `growth.shrinking` does.
  """
  units = couple(
    old, variables, *inputs, producer=producer, axis=axis, unit=unit, blocks=blocks, **kwargs
  )
  plan = _widening.shrinking(variables, units, keep=keep, remove=remove)
  smaller = plan.apply(variables)
  _program.trace(new.apply, smaller, *inputs, **kwargs)
  return smaller, plan


def _kernel(variables: Any, name: str) -> str:
  if "params" not in variables:
    raise ValueError(
      'expected variables as `init` returns them, {"params": …}, found the keys'
      f" {sorted(variables)}"
    )
  return _paths.join(_trees.kernel(variables, tuple(name.split("/"))))


def _grown(old: Any, new: Any, variables: Any, plan: Plan, fresh: Any, alpha: float) -> Grown:
  grown = plan.apply(variables, fresh, alpha=alpha)
  return grown, _gate.gated(new.apply, plan, old=old.apply), plan


def _init(new: Any, inputs: Sequence[Any], rngs: Any, kwargs: Mapping[str, Any]) -> Any:
  if rngs is None:
    raise ValueError("new entries need a source: expected rngs=, for new.init, or fresh=")
  settings = {name: value for name, value in kwargs.items() if name != "mutable"}
  return jax.jit(lambda rngs: new.init(rngs, *inputs, **settings))(rngs)
