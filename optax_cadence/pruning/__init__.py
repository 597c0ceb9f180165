"""Pruning and shocks in mid-training: the choices of `optax_cadence.prune`.

Modules, in the order in which data flows through them:

  prunable, kernels       which leaves are pruned: by their names, or by the program
  structure, criterion    what is pruned together, and how weights are scored: one class or
                          function each, and how to add another
  schedule, sparsity      when new masks are due, and how sparse each leaf is to be
  allocation              how many units each leaf keeps
  selection               which units these are
  regrowth                which pruned weights come back
  masking, packing        new masks, when they are due, and how they are stored
  filling                 what a shock leaves behind
  optimizing              what an optimizer inside sees of all this
  transformation          what a mask does to an update: `prune`
  shocks                  whole leaves that begin anew, as one-liners
  view, summary, moments  what reads the masks, or goes by the zeros that they leave
"""

from optax_cadence.pruning.allocation import erdos_renyi
from optax_cadence.pruning.criterion import Criterion
from optax_cadence.pruning.criterion import movement
from optax_cadence.pruning.criterion import random
from optax_cadence.pruning.filling import Fill
from optax_cadence.pruning.kernels import contraction_axes
from optax_cadence.pruning.kernels import Kernel
from optax_cadence.pruning.kernels import Kernels
from optax_cadence.pruning.kernels import kernels
from optax_cadence.pruning.moments import clear_moments
from optax_cadence.pruning.prunable import prunable
from optax_cadence.pruning.regrowth import at_random
from optax_cadence.pruning.regrowth import by_gradient
from optax_cadence.pruning.regrowth import Regrowth
from optax_cadence.pruning.schedule import cubic
from optax_cadence.pruning.schedule import every_epoch
from optax_cadence.pruning.schedule import once
from optax_cadence.pruning.schedule import Times
from optax_cadence.pruning.shocks import reset
from optax_cadence.pruning.shocks import shrink_and_perturb
from optax_cadence.pruning.structure import Block
from optax_cadence.pruning.structure import Channel
from optax_cadence.pruning.structure import NM
from optax_cadence.pruning.structure import Unstructured
from optax_cadence.pruning.summary import plot
from optax_cadence.pruning.summary import Summary
from optax_cadence.pruning.summary import summary
from optax_cadence.pruning.transformation import prune
from optax_cadence.pruning.transformation import PruneState
from optax_cadence.pruning.view import masked
from optax_cadence.pruning.view import masks
from optax_cadence.pruning.view import with_masks

__all__ = [
  "NM",
  "Block",
  "Channel",
  "Criterion",
  "Fill",
  "Kernel",
  "Kernels",
  "PruneState",
  "Regrowth",
  "Summary",
  "Times",
  "Unstructured",
  "at_random",
  "by_gradient",
  "clear_moments",
  "contraction_axes",
  "cubic",
  "erdos_renyi",
  "every_epoch",
  "kernels",
  "masked",
  "masks",
  "movement",
  "once",
  "plot",
  "prunable",
  "prune",
  "random",
  "reset",
  "shrink_and_perturb",
  "summary",
  "with_masks",
]
