"""Kernels that get larger, on their way into a convolution.

Old taps and new ones are two arrays that are added (see `TAPS`). So is what they read, where an
operation of its own pads it, as Flax does for "CAUSAL": once for the old kernel, once for the new.
"""

from typing import Any

from optax_cadence.growth._split import Split
from optax_cadence.growth._split import TAPS
from optax_cadence.programs import reading


def passed(old: Any, operands: list[Split]) -> Split:
  """A kernel, or what it reads, after an operation that changes each entry alone."""
  if old.primitive.name not in ("convert_element_type", "copy", "neg"):
    raise ValueError(
      f"a kernel whose taps grow, or what it reads, goes through {old.primitive.name} before its"
      " convolution: expected it to be used as it is"
    )
  (x,) = operands
  return Split(x.axes, {at: reading.bind(old, [y])[0] for at, y in x.blocks.items()}, x.offset)


def pads_for_taps(old: Any, new: Any, operands: list[Split]) -> bool:
  """Whether an operation pads more at the new size, along axes that have not grown."""
  if old.primitive.name != "pad":
    return False
  pairs = enumerate(zip(old.params["padding_config"], new.params["padding_config"], strict=True))
  changed = [axis for axis, (one, two) in pairs if one != two]
  return bool(changed) and not any(axis in operands[0].axes for axis in changed)


def padded(old: Any, new: Any, x: Split, fill: Split) -> Split:
  """What a kernel reads: padded for its old taps, and for all."""
  lows = [[low for low, _, _ in eqn.params["padding_config"]] for eqn in (old, new)]
  blocks = {
    (taps, *bits): reading.bind(eqn, [block, fill.blocks[()]])[0]
    for taps, eqn in enumerate((old, new))
    for bits, block in x.blocks.items()
  }
  offset = tuple(higher - low for low, higher in zip(*lows, strict=True))
  return Split((TAPS, *x.axes), blocks, offset)


def check_taps(old: Any, new: Any, x: Split, kernel: Split) -> None:
  """Raises `ValueError` unless old taps meet the same inputs in both convolutions."""
  if TAPS not in kernel.axes:
    raise ValueError("what a convolution reads is padded otherwise, but its kernel has not grown")
  p, q = old.params, new.params
  for i, (axis, offset) in enumerate(
    zip(p["dimension_numbers"].lhs_spec[2:], kernel.offset, strict=True)
  ):
    need = offset * p["rhs_dilation"][i]
    more = q["padding"][i][0] - p["padding"][i][0] + (x.offset[axis] if x.offset else 0)
    if more != need:
      raise ValueError(
        f"a kernel grows along spatial axis {i} by {offset} taps at its start, for which its"
        f" convolution has to pad by {need} more, found {more}; expected padding"
        ' "SAME" (or "CAUSAL", and old taps at the end)'
      )
