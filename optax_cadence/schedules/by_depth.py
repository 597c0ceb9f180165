"""`by_depth`: from the depth of a parameter in the network to its period."""

import math
from typing import Any

import jax

from optax_cadence import _checks
from optax_cadence import _paths


def by_depth(
  depth: Any, output: int = 1, input: int = 16, *, rounding: str = "power_of_two"
) -> Any:
  """Periods that change geometrically from the input of a network to its output.

  Args:
    depth: tree of whole numbers, smallest nearest the input (see `forward_order`).
    output: period at the greatest depth, and everywhere if there is only one depth.
    input: period at the smallest depth; may be below `output`.
    rounding: `"power_of_two"` takes the power of two that is nearest on a
      logarithmic scale, so that the cycle is no longer than the longest period.
      This holds for the two ends as well: 12 becomes 16. `"integer"` takes the
      nearest whole number and keeps the ends; cycles get long.

  Returns:
    Tree like `depth` with an int at each leaf.

  Raises:
    ValueError: for a period that is not a whole number from 1 up, for an unknown
      rounding, and for a depth that is not a whole number.

  >>> import optax_cadence as oc
  >>> oc.by_depth({"stem": 0, "block": [1, 2, 3], "head": 4})
  {'block': [8, 4, 2], 'head': 1, 'stem': 16}
  >>> oc.by_depth([0, 1, 2], output=9, input=1, rounding="integer")
  [1, 3, 9]
  """
  if rounding not in ("power_of_two", "integer"):
    raise ValueError(
      f"by_depth: expected rounding to be 'power_of_two' or 'integer', found {rounding!r}"
    )
  last, first = _log2_period("output", output), _log2_period("input", input)
  rows = _paths.flatten_with_paths(depth)
  names = _paths.names(path for path, _ in rows)
  depths = [
    _whole_number(leaf, f"a whole number as the depth of {name!r}")
    for name, (_, leaf) in zip(names, rows, strict=True)
  ]
  low, high = min(depths, default=0), max(depths, default=0)

  def period(d: int) -> int:
    share = (d - low) / (high - low) if high > low else 1.0
    exponent = first + (last - first) * share
    if rounding == "power_of_two":
      return 2 ** math.floor(exponent + 0.5)
    return max(1, math.floor(2**exponent + 0.5))

  return jax.tree.unflatten(jax.tree.structure(depth), map(period, depths))


def _log2_period(name: str, period: Any) -> float:
  expected = f"a whole number from 1 up as the {name} period"
  value = _whole_number(period, expected)
  if value < 1:
    raise ValueError(f"by_depth: expected {expected}, found {value}")
  return math.log2(value)


def _whole_number(value: Any, expected: str) -> int:
  number = _checks.whole(value)
  if number is None:
    raise ValueError(f"by_depth: expected {expected}, found {_checks.shown(value)}")
  return number
