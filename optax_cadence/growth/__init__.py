"""Growing a network while it trains: new capacity behind one gate.

The core works on any tree of arrays. `growth.nnx` and `growth.linen` are its edges to Flax,
imported when they are first used; `widen`, `deepen`, `enlarge` and `shrink`, which change live
models, and `CKConv` and `to_continuous` are NNX's. `merge` ends a growth of all three.
"""

import importlib
from typing import Any

from optax_cadence.growth._coupling import couple
from optax_cadence.growth._dimension import Axis
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._dimension import dimension
from optax_cadence.growth._dimension import Member
from optax_cadence.growth._fresh import copies
from optax_cadence.growth._fresh import given
from optax_cadence.growth._fresh import gradmax
from optax_cadence.growth._fresh import outer_product
from optax_cadence.growth._gate import gated
from optax_cadence.growth._gate import merge
from optax_cadence.growth._kernels import deepening
from optax_cadence.growth._kernels import enlarging
from optax_cadence.growth._kernels import identity_kernel
from optax_cadence.growth._phase_in import periods
from optax_cadence.growth._phase_in import phase_in
from optax_cadence.growth._phase_in import PhaseInState
from optax_cadence.growth._plan import LeafChange
from optax_cadence.growth._plan import Plan
from optax_cadence.growth._program import flops
from optax_cadence.growth._state import grow_state
from optax_cadence.growth._widening import shrinking
from optax_cadence.growth._widening import widening

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


__all__ = [
  "Axis",
  "Dimension",
  "LeafChange",
  "Member",
  "PhaseInState",
  "Plan",
  "copies",
  "couple",
  "deepening",
  "dimension",
  "enlarging",
  "flops",
  "gated",
  "given",
  "gradmax",
  "grow_state",
  "identity_kernel",
  "merge",
  "outer_product",
  "periods",
  "phase_in",
  "shrinking",
  "widening",
]
