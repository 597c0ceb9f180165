"""Gradient accumulation in which every part of a network has its own rhythm."""

from optax_cadence import growth
from optax_cadence import pruning
from optax_cadence._builders import by_depth
from optax_cadence._builders import by_path
from optax_cadence._cadence import cadence
from optax_cadence._cadence import CadenceTransformation
from optax_cadence._chain import chain
from optax_cadence._describe import describe
from optax_cadence._describe import Description
from optax_cadence._describe import GroupSummary
from optax_cadence._describe import plot_score
from optax_cadence._forward_order import forward_order
from optax_cadence._regions import channels
from optax_cadence._regions import Grid
from optax_cadence._regions import quadrants
from optax_cadence._regions import stacked
from optax_cadence._schedules import Every
from optax_cadence._state import CadenceState
from optax_cadence._state import GroupState
from optax_cadence._trainable import trainable
from optax_cadence.pruning.transformation import prune

__all__ = [
  "CadenceState",
  "CadenceTransformation",
  "Description",
  "Every",
  "Grid",
  "GroupState",
  "GroupSummary",
  "by_depth",
  "by_path",
  "cadence",
  "chain",
  "channels",
  "describe",
  "forward_order",
  "growth",
  "plot_score",
  "prune",
  "pruning",
  "quadrants",
  "stacked",
  "trainable",
]
