"""Periods that take hold late in training, as schedules for a whole tree of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cadence import _regions
from optax_cadence import _schedules


def late(begin: int, every: Any, *, before: int = 1) -> Callable[[Any], Any]:
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
  _check("begin", begin, 0)
  _check("before", before, 1)
  return _scheduled(
    every,
    lambda period: optax.join_schedules(
      [optax.constant_schedule(before), optax.constant_schedule(period)], [begin]
    ),
  )


def ramp(begin: int, end: int, every: Any, *, before: int = 1) -> Callable[[Any], Any]:
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
  _check("begin", begin, 0)
  _check("end", end, begin + 1)
  _check("before", before, 1)

  def schedule(period: int) -> Any:
    exponent = optax.linear_schedule(
      float(np.log2(before)), float(np.log2(period)), end - begin, begin
    )
    return lambda micro_steps: jnp.exp2(exponent(micro_steps))

  return _scheduled(every, schedule)


def _scheduled(every: Any, schedule: Callable[[int], Any]) -> Callable[[Any], Any]:
  """`every` with a schedule for each period; equal periods share one."""

  def of_params(params: Any) -> Any:
    made: dict[int, _schedules.Every] = {}

    def one(period: Any) -> _schedules.Every:
      found = _schedules.as_every(period)
      if not found.static or found.offset:
        raise ValueError(f"late and ramp expect integer periods, found {found}")
      if found.period not in made:
        made[found.period] = _schedules.Every(schedule(found.period))
      return made[found.period]

    def leaf(cadence: Any) -> Any:
      if isinstance(cadence, _regions.Grid):
        cells = np.empty(cadence.periods.shape, object)
        cells.flat[:] = [one(cell) for cell in cadence.periods.flat]
        return _regions.Grid(cells.tolist(), cadence.axes, cadence.one_each)
      return one(cadence)

    return jax.tree.map(leaf, every(params) if callable(every) else every)

  return of_params


def _check(name: str, value: Any, least: int) -> None:
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    raise ValueError(f"{name} must be an integer of at least {least}, found {value!r}")
