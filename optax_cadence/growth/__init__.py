"""Growing a network while it trains: new capacity behind one gate.

The core works on any tree of arrays. `growth.nnx` and `growth.linen` are its edges to Flax,
imported when they are first used; `widen`, `deepen`, `enlarge` and `shrink`, which change live
models, and `CKConv` and `to_continuous` are NNX's. `merge` ends a growth of all three.
"""

import importlib
import sys
from typing import Any

from optax_cadence.growth import _gate
from optax_cadence.growth._activity import Activity
from optax_cadence.growth._activity import dormant
from optax_cadence.growth._couple import couple
from optax_cadence.growth._dimension import Axis
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._dimension import dimension
from optax_cadence.growth._dimension import Member
from optax_cadence.growth._fresh import copies
from optax_cadence.growth._fresh import given
from optax_cadence.growth._fresh import gradmax
from optax_cadence.growth._fresh import outer_product
from optax_cadence.growth._gate import gated
from optax_cadence.growth._graph import flops
from optax_cadence.growth._hidden import Hidden
from optax_cadence.growth._hidden import hidden
from optax_cadence.growth._phase_in import periods
from optax_cadence.growth._phase_in import phase_in
from optax_cadence.growth._phase_in import PhaseInState
from optax_cadence.growth._plan import LeafChange
from optax_cadence.growth._plan import Plan
from optax_cadence.growth._planners import deepening
from optax_cadence.growth._planners import enlarging
from optax_cadence.growth._planners import identity_kernel
from optax_cadence.growth._planners import shrinking
from optax_cadence.growth._planners import widening
from optax_cadence.growth._pruned import fold_pruned
from optax_cadence.growth._pruned import follow_pruned
from optax_cadence.growth._pruned import pruned_units
from optax_cadence.growth._recycle import Recycle
from optax_cadence.growth._recycle import recycle
from optax_cadence.growth._recycle import RecycleState
from optax_cadence.growth._state import grow_state

_FLAX = {
  "CKConv": "ckconv",
  "deepen": "nnx",
  "enlarge": "nnx",
  "shrink": "nnx",
  "to_continuous": "ckconv",
  "widen": "nnx",
}


def __getattr__(name: str) -> Any:
  if name in ("ckconv", "linen", "nnx"):
    return importlib.import_module(f"{__name__}.{name}")
  if name in _FLAX:
    return getattr(importlib.import_module(f"{__name__}.{_FLAX[name]}"), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def merge(variables: Any, plan: Plan | None = None, *, optimizer: Any = None) -> Any:
  """Folds the gate into the weights and removes it: what is left is the plain tree, or model.

  Args:
    variables: The grown tree, gate included; or a live NNX model, changed in place.
    plan: The plan by which the tree has grown. A live model knows its own.
    optimizer: The live model's optimizer, from whose state the gate goes.

  Returns:
    The tree at its new size; None for a live model. At α = 1 nothing but the gate changes. At
    any other value the outgoing weights of new units are multiplied by it.

  Raises:
    ValueError: If α is not 1 and cannot be folded into weights: because something else than
      a product with a weight sums over the new units (the statistics of a norm, queries
      with keys), or one weight is used both ways (a tied embedding).
  """
  flax = sys.modules.get("flax.nnx")
  if flax is not None and isinstance(variables, flax.Module):
    importlib.import_module(f"{__name__}.nnx").merge(variables, optimizer=optimizer)
    return None
  if plan is None:
    raise ValueError("expected the plan by which the tree has grown: growth.merge(variables, plan)")
  return _gate.merge(variables, plan)


__all__ = [
  "Activity",
  "Axis",
  "Dimension",
  "Hidden",
  "LeafChange",
  "Member",
  "PhaseInState",
  "Plan",
  "Recycle",
  "RecycleState",
  "copies",
  "couple",
  "deepening",
  "dimension",
  "dormant",
  "enlarging",
  "flops",
  "fold_pruned",
  "follow_pruned",
  "gated",
  "given",
  "gradmax",
  "grow_state",
  "hidden",
  "identity_kernel",
  "merge",
  "outer_product",
  "periods",
  "phase_in",
  "pruned_units",
  "recycle",
  "shrinking",
  "widening",
]
