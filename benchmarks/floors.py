"""Floors: how many bytes a micro-step has to move at the least.

For AdamW, whose two moments have the width of the parameters. A floor in seconds is these
bytes divided by the bandwidth, which `measure` measures in the same run.

`apply`, float32, per parameter:
  held micro-step   12  gradient and accumulator read, accumulator written
  one that fires    32  gradient, accumulator, parameter, two moments read; the last three written
  period 1          28  the same without an accumulator

`update` and `optax.apply_updates`, float32, per parameter. Whether the group is due is not known
while compiling. So the updates, zero or not, are written as an array; `apply_updates` reads it,
and reads and writes every parameter at every micro-step:
  held micro-step   28  the 12 above, updates written and read, parameter read and written
  one that fires    44  the 20 read above, two moments written, then the same 16
  period 1          28  always due, so that all of it can be one pass
With a static phase they are known to be zero, or are used where they are computed, so that the
floor is the same as for `apply`.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Widths(NamedTuple):
  """Bytes per parameter of each array; updates are as wide as gradients."""

  param: int = 4
  grad: int = 4
  accumulator: int = 4
  moments: int = 8


FLOAT32 = Widths()
BFLOAT16 = Widths(param=2, grad=2, accumulator=4, moments=4)


def held(widths: Widths = FLOAT32) -> int:
  """`apply`, on a micro-step at which the region is not due."""
  return widths.grad + 2 * widths.accumulator


def firing(widths: Widths = FLOAT32) -> int:
  """`apply`, on a micro-step at which the region is due."""
  return widths.accumulator + every_micro_step(widths)


def every_micro_step(widths: Widths = FLOAT32) -> int:
  """Period 1, and plain AdamW: no accumulator."""
  return widths.grad + 2 * (widths.param + widths.moments)


def held_update(widths: Widths = FLOAT32) -> int:
  """`update` and `apply_updates`, on a micro-step at which the region is not due."""
  return held(widths) + 2 * widths.grad + 2 * widths.param


def firing_update(widths: Widths = FLOAT32) -> int:
  """`update` and `apply_updates`, on a micro-step at which the region is due."""
  return firing(widths) + 2 * widths.grad + widths.param


def mean_bytes(
  entries: Mapping[int, int], widths: Widths = FLOAT32, separate_updates: bool = False
) -> float:
  """Bytes of a micro-step, on average over a cycle.

  Args:
    entries: Number of parameters of each period.
    widths: Bytes per parameter.
    separate_updates: Whether updates are an array of their own (see above).
  """
  off, on = (held_update, firing_update) if separate_updates else (held, firing)
  total = 0.0
  for period, n in entries.items():
    if period == 1:
      total += n * every_micro_step(widths)
    else:
      total += n * ((period - 1) * off(widths) + on(widths)) / period
  return total
