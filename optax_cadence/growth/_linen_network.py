"""A Linen module as the driver of a growth sees it, and what the growth gives back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax.core import meta

from optax_cadence.growth import _driver
from optax_cadence.growth import _gate
from optax_cadence.growth import _trees
from optax_cadence.growth._driver import Network
from optax_cadence.growth._plan import Plan

# The grown variables, the forward pass, and the plan.
Grown = tuple[Any, Callable[..., Any], Plan]


def network_of(
  module: Any,
  variables: Any,
  inputs: Sequence[Any],
  settings: Mapping[str, Any],
  new: Any = None,
  rngs: Any = None,
) -> Network:
  """A module as the driver sees it; `new` and `rngs` give its new entries."""
  if "params" not in variables:
    raise ValueError(
      'expected variables as `init` returns them, {"params": …}, found the keys'
      f" {sorted(variables)}"
    )
  is_boxed = any(map(_is_boxed, jax.tree.leaves(variables, is_leaf=_is_boxed)))

  def init() -> Any:
    if rngs is None:
      raise ValueError("new entries need a source: expected rngs=, for new.init, or fresh=")
    return jax.jit(of_new)(rngs)

  def defined() -> Any:
    return jax.eval_shape(of_new, jax.random.key(0))

  def of_new(rngs: Any) -> Any:
    fresh = new.init(rngs, *inputs, **of_init(settings))
    # Where the caller has unboxed the variables (of the names of their axes), so are fresh ones.
    return fresh if is_boxed else meta.unbox(fresh)

  shapes = defined if inputs and new is not None else None
  return Network(
    forward_of(module, rngs), variables, inputs, settings, "params/alpha", init, defined=shapes
  )


def forward_of(module: Any, rngs: Any = None) -> Callable[..., Any]:
  """The forward pass as it is traced; dropout gets random numbers, be it those of `init`."""
  rngs = jax.random.key(0) if rngs is None else rngs

  def forward(variables: Any, *inputs: Any, **settings: Any) -> Any:
    return module.apply(variables, *inputs, **{"rngs": rngs, **settings})

  return forward


def _is_boxed(node: Any) -> bool:
  return isinstance(node, meta.AxisMetadata)


def of_init(settings: Mapping[str, Any]) -> dict[str, Any]:
  """The further arguments of a forward pass that `init` takes too."""
  of_apply = ("capture_intermediates", "mutable", "rngs")
  return {name: value for name, value in settings.items() if name not in of_apply}


def with_forward(old: Any, new: Any, grown: _driver.Grown, network: Network, rngs: Any) -> Grown:
  """The result of a growth, once it is known to run; the forward pass has its gate.

  Raises:
    ValueError: If the new module does not run with the grown variables, or with its units where
      they are; if the program cannot keep old and new apart; or if new layers count although the
      gate is closed.
  """
  plan, variables, name = grown.plan, grown.variables, type(new).__name__
  plain = _trees.remove(variables, plan.alpha) if plan.gate else variables
  # With `mutable`, `apply` returns a pair: the output, and the changed variables.
  output = ("0",) if network.settings.get("mutable") else ()
  resized = network._replace(forward=forward_of(new, rngs), variables=plain, output=output)
  _driver.check_layout(resized, plan, name)
  if not plan.gate:
    _driver.check_runs(resized, name)
    return variables, new.apply, plan
  traced = _gate.gated(resized.forward, plan, old=network.forward)
  _driver.check_runs(network._replace(forward=traced, variables=variables), name)
  _driver.check_closed(resized, plan)
  return variables, _gate.gated(new.apply, plan, old=old.apply), plan
