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
from optax_cadence._late import late
from optax_cadence._late import ramp
from optax_cadence._learning_rate import scale_by_cadence
from optax_cadence._learning_rate import ScaleByCadenceState
from optax_cadence._metrics import metrics
from optax_cadence._metrics import plot_confidence
from optax_cadence._noise_scale import noise_scale
from optax_cadence._noise_scale import NoiseScaleState
from optax_cadence._policies import as_settled
from optax_cadence._policies import each_layer
from optax_cadence._policies import until_certain
from optax_cadence._policy import Policy
from optax_cadence._regions import channels
from optax_cadence._regions import Grid
from optax_cadence._regions import quadrants
from optax_cadence._regions import stacked
from optax_cadence._schedules import Every
from optax_cadence._state import CadenceState
from optax_cadence._state import ConfidenceState
from optax_cadence._state import GroupState
from optax_cadence._state import SharedState
from optax_cadence._statistics import Estimate
from optax_cadence._statistics import Statistics
from optax_cadence._trainable import trainable
from optax_cadence.pruning.transformation import prune

__all__ = [
  "CadenceState",
  "CadenceTransformation",
  "ConfidenceState",
  "Description",
  "Estimate",
  "Every",
  "Grid",
  "GroupState",
  "GroupSummary",
  "NoiseScaleState",
  "Policy",
  "ScaleByCadenceState",
  "SharedState",
  "Statistics",
  "as_settled",
  "by_depth",
  "by_path",
  "cadence",
  "chain",
  "channels",
  "describe",
  "each_layer",
  "forward_order",
  "growth",
  "late",
  "metrics",
  "noise_scale",
  "plot_confidence",
  "plot_score",
  "prune",
  "pruning",
  "quadrants",
  "ramp",
  "scale_by_cadence",
  "stacked",
  "trainable",
  "until_certain",
]
