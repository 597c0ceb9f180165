"""Periods that take hold late in training, as schedules for a whole tree of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cadence import _checks
from optax_cadence import _paths
from optax_cadence.regions.partitions import as_partition
from optax_cadence.schedules.every import as_every
from optax_cadence.schedules.every import Every


def late(begin: int, every: Any, *, before: int = 1) -> "Scheduled":
  """One period for everything until micro-step `begin`, and `every` from then on.

  A window that is open then is finished first: no gradient is lost or counted twice.

  Args:
    begin: Micro-steps until the change, at least 0.
    every: A tree prefix of the parameters with integers or grids of integers, or a function
      from parameters to one, such as `by_path` and `by_depth` give.
    before: The period until then.

  Returns:
    A function of the parameters, to stand for `every`.

  Raises:
    ValueError: If a number is out of range, or a cadence no integer or grid of integers.

  >>> import jax.numpy as jnp, optax, optax_cadence as oc
  >>> tx = oc.cadence(optax.sgd(1.0), oc.late(4, {"body": 4, "head": 1}, before=2))
  """
  begin = _checks.integer("begin", begin, 0)
  before = _checks.integer("before", before, 1)
  return Scheduled(
    every,
    lambda period: optax.join_schedules(
      [optax.constant_schedule(before), optax.constant_schedule(period)], [begin]
    ),
  )


def ramp(begin: int, end: int, every: Any, *, before: int = 1) -> "Scheduled":
  """Every period grows, or falls, from `before` to its own: by equal factors in equal times.

  Args:
    begin: Micro-step up to which all periods are `before`.
    end: Micro-step from which on they are what `every` says.
    every: As in `late`.
    before: The period to begin with.

  Returns:
    A function of the parameters, to stand for `every`.

  Raises:
    ValueError: As `late` does, or if `end` is not after `begin`.

  >>> import jax.numpy as jnp, optax, optax_cadence as oc
  >>> tx = oc.cadence(optax.sgd(1.0), oc.ramp(1000, 5000, {"body": 16, "head": 1}))
  """
  begin = _checks.integer("begin", begin, 0)
  end = _checks.integer("end", end, begin + 1)
  before = _checks.integer("before", before, 1)

  def schedule(period: int) -> Any:
    exponent = optax.linear_schedule(
      float(np.log2(before)), float(np.log2(period)), end - begin, begin
    )
    return lambda micro_steps: jnp.exp2(exponent(micro_steps))

  return Scheduled(every, schedule)


@dataclasses.dataclass(frozen=True, eq=False)
class Scheduled:
  """What `late` and `ramp` return: call it with parameters for a tree of schedules.

  Attributes:
    every: The periods in the end, as `late` takes them.
    begins: `begins(period) -> schedule`: the schedule of a region whose period is that in the end.
    made: The cadences so far; equal periods share one.
  """

  every: Any
  begins: Callable[[int], Any]
  made: dict[int, Every] = dataclasses.field(default_factory=dict)

  def __call__(self, params: Any) -> Any:
    return jax.tree.map(self._cadence, self.every(params) if callable(self.every) else self.every)

  @property
  def cadences(self) -> list[tuple[str, Any]] | None:
    """Every cadence that a parameter may get, with its place; None if `every` does not say."""
    if callable(self.every):
      given = getattr(self.every, "cadences", None)
    else:
      rows = _paths.flatten_with_paths(self.every)
      places = _paths.names(path for path, _ in rows)
      given = [(place, cadence) for place, (_, cadence) in zip(places, rows, strict=True)]
    return given and [(place, self._cadence(cadence)) for place, cadence in given]

  def _cadence(self, cadence: Any) -> Any:
    """The cadence of a leaf, with a schedule for each period."""
    partition = as_partition(cadence)
    return self._every(cadence) if partition is None else partition.map(self._every)

  def _every(self, period: Any) -> Every:
    wanted = as_every(period)
    if not wanted.static or wanted.offset:
      raise ValueError(f"late and ramp expect integer periods, found {wanted}")
    if wanted.period not in self.made:
      schedule = self.begins(wanted.period)
      schedule.__name__ = f"schedule to {wanted.period}"
      self.made[wanted.period] = Every(schedule)
    return self.made[wanted.period]
