"""Growth of Linen models: two module definitions, old and new, and a path."""

from collections.abc import Callable
from typing import Any

from optax_cadence import _paths
from optax_cadence.growth import _coupling
from optax_cadence.growth import _gate
from optax_cadence.growth import _plan
from optax_cadence.growth import _trees
from optax_cadence.growth._plan import Plan

ALPHA = "params/alpha"


def widen(
  old: Any,
  new: Any,
  variables: Any,
  *inputs: Any,
  producer: str,
  by: int,
  rngs: Any,
  axis: int = -1,
  unit: int = 1,
  blocks: int = 1,
  alpha: float = 0.0,
  **kwargs: Any,
) -> tuple[Any, Callable[..., Any], Plan]:
  """Widens the variables of a Linen module.

  Args:
    old: The module as it is.
    new: The same module defined at the new size; its `init` gives the new entries.
    variables: The variables of `old`: {"params": …, "batch_stats": …}.
    *inputs: Inputs of the module, arrays.
    producer: Path of the kernel or embedding that makes the units, or of the layer that has
      just one: "params/Dense_0".
    by: Number of new units.
    rngs: As for `new.init`.
    axis: The axis of that leaf that holds the units.
    unit: Adjacent positions that make one unit.
    blocks: How often the units repeat along the axis.
    alpha: Value of the gate, which is added at "params/alpha".
    **kwargs: Further arguments of `old.apply` while it is traced (`train`, `mutable`).

  Returns:
    The grown variables; a function to call in place of `new.apply` until the merge; the plan.

  Raises:
    ValueError: As `growth.couple`, `growth.widening` and `Plan.apply` do.
  """
  name = _kernel(variables, producer)
  dimension = _coupling.couple(
    old.apply, variables, *inputs, producer=name, axis=axis, unit=unit, blocks=blocks, **kwargs
  )
  plan = _plan.widening(variables, dimension, by, alpha=ALPHA)
  fresh = new.init(rngs, *inputs)
  grown = plan.apply(variables, fresh, alpha=alpha)
  return grown, _gate.gated(new.apply, plan, old=old.apply), plan


def _kernel(variables: Any, name: str) -> str:
  """The one leaf with two axes or more at, or under, a path."""
  prefix = tuple(name.split("/"))
  under = {p: s for p, s in _trees.shapes(variables).items() if p[: len(prefix)] == prefix}
  found = _trees.largest(under)
  if len(found) != 1:
    raise ValueError(
      f"producer {name!r}: expected one kernel there, found {_paths.listed(found or under)}"
    )
  return _paths.join(found[0])
