"""The cycle of static periods, and the phase of a micro-step within it."""

import math
from collections.abc import Iterable
from typing import Any

import jax

from optax_cadence import _checks
from optax_cadence.schedules.every import Every


def cycle(everys: Iterable[Every]) -> int | None:
  """Least common multiple of the periods; None when one of them is dynamic."""
  periods = []
  for every in everys:
    if not every.static:
      return None
    periods.append(every.period)
  return math.lcm(*periods)


def checked_phase(phase: Any, length: int | None) -> int:
  """A phase as a Python int.

  Raises:
    ValueError: If it is traced, outside the cycle, or there is no cycle.
  """
  if length is None:
    raise ValueError(
      f"phase={phase} needs a static cycle, but a period is a schedule, traced or a policy's;"
      " leave phase out"
    )
  if isinstance(phase, jax.core.Tracer):
    raise ValueError(
      "phase must be a Python int that is known while tracing, found a traced value;"
      ' mark it static with jax.jit(..., static_argnames="phase")'
    )
  phase = _checks.integer("phase", phase)
  if not 0 <= phase < length:
    raise ValueError(
      f"phase must be t modulo the cycle, at least 0 and below {length}, found {phase}"
    )
  return phase
