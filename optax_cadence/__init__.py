"""Gradient accumulation in which every part of a network has its own rhythm."""

import importlib
from typing import Any, TYPE_CHECKING

from optax_cadence._cadence import cadence
from optax_cadence._cadence import CadenceTransformation
from optax_cadence._cadence import chain
from optax_cadence._state import CadenceState
from optax_cadence._state import ConfidenceState
from optax_cadence._state import FoundState
from optax_cadence._state import GroupState
from optax_cadence._state import MaskState
from optax_cadence.schedules.every import Every
from optax_cadence.schedules.phases import Phase
from optax_cadence.schedules.phases import Phases
from optax_cadence.schedules.policy import Policy

if TYPE_CHECKING:
  from optax_cadence import growth

  # Not in `__all__`, so that `import *` needs no Flax.
  from optax_cadence import linen as linen
  from optax_cadence import nnx as nnx
  from optax_cadence import pruning
  from optax_cadence._learning_rate import scale_by_cadence
  from optax_cadence._learning_rate import ScaleByCadenceState
  from optax_cadence._training import phases
  from optax_cadence._training import trainable
  from optax_cadence._training import training_step
  from optax_cadence.confidence.noise_scale import noise_scale
  from optax_cadence.confidence.noise_scale import NoiseScaleState
  from optax_cadence.confidence.policies import as_settled
  from optax_cadence.confidence.policies import each_layer
  from optax_cadence.confidence.policies import until_certain
  from optax_cadence.confidence.statistics import Estimate
  from optax_cadence.confidence.statistics import Statistics
  from optax_cadence.conversion.convert import convert
  from optax_cadence.pruning.transformation import prune
  from optax_cadence.regions.grids import channels
  from optax_cadence.regions.grids import Grid
  from optax_cadence.regions.grids import quadrants
  from optax_cadence.regions.grids import stacked
  from optax_cadence.report.describe import describe
  from optax_cadence.report.describe import Description
  from optax_cadence.report.describe import GroupSummary
  from optax_cadence.report.gradient_norm import gradient_norm
  from optax_cadence.report.gradient_norm import GradientNormState
  from optax_cadence.report.metrics import has_updated
  from optax_cadence.report.metrics import metrics
  from optax_cadence.report.pictures import plot_confidence
  from optax_cadence.report.pictures import plot_score
  from optax_cadence.schedules.by_depth import by_depth
  from optax_cadence.schedules.by_path import by_path
  from optax_cadence.schedules.forward_order import forward_order
  from optax_cadence.schedules.late import late
  from optax_cadence.schedules.late import ramp

# What `cadence` itself does not need, or needs Flax, is imported when it is first used: these
# modules, and of these modules these names.
_MODULES = ("growth", "linen", "nnx", "pruning")
_NAMES = {
  "_learning_rate": ("ScaleByCadenceState", "scale_by_cadence"),
  "_training": ("phases", "trainable", "training_step"),
  "confidence.noise_scale": ("NoiseScaleState", "noise_scale"),
  "confidence.policies": ("as_settled", "each_layer", "until_certain"),
  "confidence.statistics": ("Estimate", "Statistics"),
  "conversion.convert": ("convert",),
  "pruning.transformation": ("prune",),
  "regions.grids": ("Grid", "channels", "quadrants", "stacked"),
  "report.describe": ("Description", "GroupSummary", "describe"),
  "report.gradient_norm": ("GradientNormState", "gradient_norm"),
  "report.metrics": ("has_updated", "metrics"),
  "report.pictures": ("plot_confidence", "plot_score"),
  "schedules.by_depth": ("by_depth",),
  "schedules.by_path": ("by_path",),
  "schedules.forward_order": ("forward_order",),
  "schedules.late": ("late", "ramp"),
}


def __getattr__(name: str) -> Any:
  if name in _MODULES:
    return importlib.import_module(f"{__name__}.{name}")
  for module, names in _NAMES.items():
    if name in names:
      value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
      globals()[name] = value  # so that it is looked up once
      return value
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__, *_MODULES})


__all__ = [
  "CadenceState",
  "CadenceTransformation",
  "ConfidenceState",
  "Description",
  "Estimate",
  "Every",
  "FoundState",
  "GradientNormState",
  "Grid",
  "GroupState",
  "GroupSummary",
  "MaskState",
  "NoiseScaleState",
  "Phase",
  "Phases",
  "Policy",
  "ScaleByCadenceState",
  "Statistics",
  "as_settled",
  "by_depth",
  "by_path",
  "cadence",
  "chain",
  "channels",
  "convert",
  "describe",
  "each_layer",
  "forward_order",
  "gradient_norm",
  "growth",
  "has_updated",
  "late",
  "metrics",
  "noise_scale",
  "phases",
  "plot_confidence",
  "plot_score",
  "prune",
  "pruning",
  "quadrants",
  "ramp",
  "scale_by_cadence",
  "stacked",
  "trainable",
  "training_step",
  "until_certain",
]
