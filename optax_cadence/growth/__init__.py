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
from optax_cadence.growth._heads import couple_heads
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
from optax_cadence.growth._stacking import stacking
from optax_cadence.growth._state import grow_state
from optax_cadence.growth._upcycling import load_balance
from optax_cadence.growth._upcycling import mixture_of_experts
from optax_cadence.growth._upcycling import upcycling
from optax_cadence.growth._vocabulary import adding_tokens
from optax_cadence.growth._vocabulary import mean_tokens

# The modules that import Flax, and what of them is public here.
_FLAX: dict[str, tuple[str, ...]] = {
  "ckconv": ("CKConv", "to_continuous"),
  "linen": (),
  "moe": ("MixtureOfExperts", "upcycle"),
  "nnx": ("deepen", "enlarge", "heads", "shrink", "stack", "vocabulary", "widen"),
}


def __getattr__(name: str) -> Any:
  for module, names in _FLAX.items():
    if name == module or name in names:
      found = importlib.import_module(f"{__name__}.{module}")
      return found if name == module else getattr(found, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_live(variables: Any) -> bool:
  """Whether something is a live NNX model; without importing Flax for it."""
  flax = sys.modules.get("flax.nnx")
  return flax is not None and isinstance(variables, flax.Module)


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
  if _is_live(variables):
    importlib.import_module(f"{__name__}.nnx").merge(variables, optimizer=optimizer)
    return None
  if plan is None:
    raise ValueError("expected the plan by which the tree has grown: growth.merge(variables, plan)")
  return _gate.merge(variables, plan)


def undo(variables: Any, plan: Plan | None = None, **kwargs: Any) -> Any:
  """Takes a growth back, whatever α is, and whether or not its gate is merged.

  What comes back is the tree as it was before: its structure, paths and shapes, with the entries
  that were there, as they stand now. What these have learned since they keep; what new entries
  have learned is gone. So where nothing was trained since it is the old tree bit for bit, and
  where α was held at 0 it is, but for rounding, what training without the growth would have made
  of it. At another α the outputs jump, as what new entries gave is missing.

  The optimizer's state goes back by `growth.grow_state` with `plan.inverse()`: for a live model,
  give its optimizer.

  Args:
    variables: The grown tree, with or without the gate; or a live NNX model, changed in place.
    plan: The plan by which it has grown. A live model with a gate knows its own.
    **kwargs: For a live model, as for `growth.nnx.undo`: its `optimizer`, whose state goes back
      too, and, without a gate, `take_out` and `sizes`.

  Returns:
    The tree as it was; None for a live model.

  Raises:
    ValueError: If the tree is not as the plan has left it, or the plan is one that shrinks.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> params = {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1))}
  >>> plan = growth.widening(params, growth.dimension(params, {"a": -1, "b": 0}), by=1)
  >>> grown = plan.apply(params, lambda path, shape, dtype: jnp.zeros(shape, dtype), alpha=0.5)
  >>> print(growth.undo(grown, plan))
  {'a': Array([[1., 1.]], dtype=float32), 'b': Array([[1.],
         [1.]], dtype=float32)}
  """
  if _is_live(variables):
    importlib.import_module(f"{__name__}.nnx").undo(variables, plan, **kwargs)
    return None
  if plan is None:
    raise ValueError("expected the plan by which the tree has grown: growth.undo(variables, plan)")
  return _gate.undo(variables, plan)


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
  "adding_tokens",
  "copies",
  "couple",
  "couple_heads",
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
  "load_balance",
  "mean_tokens",
  "merge",
  "mixture_of_experts",
  "outer_product",
  "periods",
  "phase_in",
  "pruned_units",
  "recycle",
  "shrinking",
  "stacking",
  "undo",
  "upcycling",
  "widening",
]
