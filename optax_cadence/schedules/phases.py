"""The cycle of static periods, and the phase of a micro-step: which groups are due at it."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from optax_cadence import _checks
from optax_cadence.schedules.every import Every


@dataclasses.dataclass(frozen=True)
class Phase:
  """Which groups are due at a micro-step, as `oc.phases` gives it.

  Two are equal if the same groups are due. As a static argument of `jax.jit` one program so serves
  every micro-step at which these are.

  Attributes:
    due: The names of the groups that are due.
  """

  due: frozenset[str]


class Phases(Iterator[Phase]):
  """The phases of all micro-steps from one on, without an end.

  Attributes:
    cycle: Micro-steps after which they repeat.
    programs: How many different ones there are: as many programs are compiled.
  """

  def __init__(self, everys: Mapping[str, Every], start: int):
    self.cycle = _length(everys.values())
    self._of = [_at(t, everys) for t in range(self.cycle)]
    self._steps = itertools.count(start)
    self.programs = len(set(self._of))

  def __next__(self) -> Phase:
    return self._of[next(self._steps) % self.cycle]

  def __repr__(self) -> str:
    return f"Phases(programs={self.programs}, cycle={self.cycle})"


def cycle(everys: Iterable[Every]) -> int | None:
  """Least common multiple of the periods; None when one of them is dynamic."""
  periods = []
  for every in everys:
    if not every.static:
      return None
    periods.append(every.period)
  return math.lcm(*periods)


def checked(phase: Any, everys: Mapping[str, Every], micro_step: Any = None) -> Phase:
  """The phase that a user gives, a `Phase` or t modulo the cycle.

  Args:
    phase: The phase.
    everys: The cadence of each group, by name.
    micro_step: Micro-steps done before, as in the state; not looked at where it is traced.

  Raises:
    ValueError: If it is traced, outside the cycle, of other groups, not that of the micro-step that
      comes next, or if there is no cycle.
  """
  if isinstance(phase, jax.core.Tracer):
    raise ValueError(
      "phase must be an oc.Phase or a Python int that is known while tracing, found a traced value;"
      ' mark it static with jax.jit(..., static_argnames="phase")'
    )
  length = _length(everys.values(), f"phase={phase}")
  if isinstance(phase, Phase):
    if not phase.due <= everys.keys():
      raise ValueError(
        f"phase: expected some of the groups {_listed(everys)}, found {_listed(phase.due)}; a phase"
        " goes with the cadences that oc.phases was given"
      )
  else:
    number = _checks.integer("phase", phase)
    if not 0 <= number < length:
      raise ValueError(
        f"phase must be t modulo the cycle, at least 0 and below {length}, found {number}"
      )
    phase = _at(number, everys)
  if micro_step is not None and not isinstance(micro_step, jax.core.Tracer):
    for t in np.unique(np.asarray(micro_step)):
      expected = _at(int(t) + 1, everys)
      if phase != expected:
        raise ValueError(
          f"phase: expected that of micro-step {t + 1}, which the state is at, where"
          f" {_listed(expected.due)} are due, found one where {_listed(phase.due)} are;"
          " oc.phases(tx, params, state) counts from the state"
        )
  return phase


def _at(t: int, everys: Mapping[str, Every]) -> Phase:
  return Phase(frozenset(name for name, every in everys.items() if every.due(t)))


def _length(everys: Iterable[Every], given: str = "oc.phases") -> int:
  length = cycle(everys)
  if length is None:
    raise ValueError(
      f"{given} needs a static cycle, but a period is a schedule, traced or a policy's; leave phase"
      " out"
    )
  return length


def _listed(names: Iterable[str]) -> str:
  return ", ".join(map(repr, sorted(names))) or "no groups"
