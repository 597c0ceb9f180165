"""Values in parts, old entries apart from new ones, and single operations on them.

An operation that runs over grown axes is run once for each combination of old and new entries
along them, at the sizes of that combination. See `_evaluate` for whole programs.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence.growth._plan import LeafChange
from optax_cadence.programs import primitives
from optax_cadence.programs import reading

# A kernel with new taps is held as two arrays that are added: the old taps, and an array at
# the new size with zeros in their place. This stands for the axis that tells which. What the
# kernel reads is in two parts likewise where an operation of its own pads it, as Flax does for
# "CAUSAL": padded for the old kernel, and for the new one.
TAPS = -1


class Parts(NamedTuple):
  """A value in parts.

  Attributes:
    axes: The axes that have grown, ascending.
    blocks: For each combination of old (0) and new (1) along them the array.
    offset: Of a kernel, for each spatial axis: where its old taps begin among the new. Of what it
      reads, for each axis: how much more it is padded at its start.
    new: Of an integer that is not the same in the program at the new size, what it is there.
  """

  axes: tuple[int, ...]
  blocks: dict[tuple[int, ...], Any]
  offset: tuple[int, ...] = ()
  new: Any = None

  @property
  def old_and_new(self) -> tuple[Any, Any]:
    """A value that has not grown, as it is in the old program and in the new one."""
    old = self.blocks.get(())
    return old, old if self.new is None else self.new


def whole(x: Any) -> Parts:
  """A value that has not grown."""
  return Parts((), {(): x})


def empty(old: Any, new: Any) -> Parts:
  """A value without entries, which may have grown along any axis."""
  axes = tuple(a for a, (n, m) in enumerate(zip(old.shape, new.shape, strict=True)) if n != m)
  blocks = {}
  for bits in itertools.product((0, 1), repeat=len(axes)):
    shape = list(old.shape)
    for axis, bit in zip(axes, bits, strict=True):
      shape[axis] = new.shape[axis] - shape[axis] if bit else shape[axis]
    blocks[bits] = jnp.zeros(shape, old.dtype)
  return Parts(axes, blocks)


def cut(leaf: Any, change: LeafChange) -> Parts:
  """A leaf in parts: old and new entries along every axis that has grown."""
  taps = change.taps
  axes = tuple(sorted(a for a in change.positions if a not in taps))
  blocks: dict[tuple[int, ...], Any] = {(): jnp.asarray(leaf)}
  for axis in axes:
    old, new = change.positions[axis], change.new(axis)
    blocks = {
      (*bits, bit): part
      for bits, x in blocks.items()
      for bit, part in enumerate(_taken(x, old, new, axis))
    }
  if not taps:
    return Parts(axes, blocks)
  offset = tuple(int(change.positions[a][0]) if a in taps else 0 for a in change.spatial)
  middle = tuple(
    slice(int(change.positions[a][0]), int(change.positions[a][-1]) + 1)
    if a in taps
    else slice(None)
    for a in range(np.ndim(leaf))
  )
  old_taps = {(0, *bits): x[middle] for bits, x in blocks.items()}
  new_taps = {(1, *bits): x.at[middle].set(0) for bits, x in blocks.items()}
  return Parts((TAPS, *axes), {**old_taps, **new_taps}, offset)


def _taken(x: Any, old: np.ndarray, new: np.ndarray, axis: int) -> list[Any]:
  """The parts of an array at some positions along an axis, and at all others."""
  if (np.concatenate([old, new]) == np.arange(len(old) + len(new))).all():
    # Whose gradients are joined again, where those of slices would be padded and added up.
    return list(jax.lax.split(x, (len(old), len(new)), axis))
  return [
    jnp.take(x, at, axis=axis, unique_indices=True, indices_are_sorted=True, mode="clip")
    for at in (old, new)
  ]


def joined(x: Parts, positions: dict[int, np.ndarray]) -> Any:
  """The array of a value in parts, at its new size.

  Args:
    x: The value.
    positions: For each axis that has grown, where its old entries lie.
  """
  blocks = x.blocks
  for k in reversed(range(len(x.axes))):
    blocks = {
      bits[:k]: _joined_along(x.axes[k], block, blocks[(*bits[:k], 1)], positions)
      for bits, block in blocks.items()
      if not bits[k]
    }
  return blocks[()]


def _joined_along(axis: int, old: Any, new: Any, positions: dict[int, np.ndarray]) -> Any:
  both = jnp.concatenate([old, new], axis)
  if axis not in positions:
    raise ValueError(
      f"an output of shape {both.shape} has new entries along axis {axis} that no unit accounts for"
    )
  at = positions[axis]
  if (at == np.arange(old.shape[axis])).all():
    return both
  rest = np.setdiff1d(np.arange(both.shape[axis]), at)
  return jnp.take(both, np.argsort(np.concatenate([at, rest])), axis=axis)


def grown_axes(old: Any, new: Any) -> tuple[int, ...]:
  """The axes along which two variables differ."""
  before, after = reading.shape(old), reading.shape(new)
  if len(before) != len(after):
    raise ValueError(f"the programs before and after differ: shapes {before} and {after}")
  for axis, (n, m) in enumerate(zip(before, after, strict=True)):
    if m < n:
      raise ValueError(
        f"axis {axis} of a value shrinks from {before} to {after}: expected it to grow"
      )
  return tuple(a for a, (n, m) in enumerate(zip(before, after, strict=True)) if n != m)


class Combinations:
  """Along which axes an operation on values in parts combines old and new entries.

  Axes that the operation ties together have one number: it is either old or new along all of
  them. So has an axis of the results alone that has grown.

  Attributes:
    kept: The numbers of axes that the results have.
    summed: The numbers of axes that are summed over.
    result_axes: For each result the axes that have grown.
    of_operand: For (operand, axis) the number.
    of_result: For (result, axis) the number.
  """

  def __init__(self, old: Any, new: Any, operands: list[Parts]):
    self.result_axes = [grown_axes(a, b) for a, b in zip(old.outvars, new.outvars, strict=True)]
    self.of_operand: dict[tuple[int, int], int] = {}
    self.of_result: dict[tuple[int, int], int] = {}
    self.kept: list[int] = []
    self.summed: list[int] = []
    grown = {(i, a) for i, x in enumerate(operands) for a in x.axes}
    results = {(i, a) for i, axes in enumerate(self.result_axes) for a in axes}
    for tie in _ties_in_parts(old, new, grown):
      if any(pair in grown for pair in tie.operands):
        self._add(tie)
    lost = sorted(grown - self.of_operand.keys())
    if lost or self.of_result.keys() - results:
      shapes = [[reading.shape(v) for v in eqn.invars] for eqn in (old, new)]
      raise ValueError(
        f"{old.primitive.name} of shapes {shapes[0]} before and {shapes[1]} after cannot keep old"
        " and new entries apart"
        + (f" along axis {lost[0][1]} of operand {lost[0][0]}" if lost else "")
        + ": expected a sum, or an operation on each entry alone"
      )
    for pair in sorted(results - self.of_result.keys()):
      self._add(primitives.Tie((), (pair,)))

  def _add(self, tie: primitives.Tie) -> None:
    number = len(self.kept) + len(self.summed)
    (self.summed if tie.summed else self.kept).append(number)
    self.of_operand.update(dict.fromkeys(tie.operands, number))
    self.of_result.update(dict.fromkeys(tie.results, number))

  def result_bits(self, result: int, at: dict[int, int]) -> tuple[int, ...]:
    """Which part of a result a combination gives."""
    return tuple(at[self.of_result[result, a]] for a in self.result_axes[result])

  def gives(self, result: int, at: dict[int, int]) -> bool:
    """Whether a combination gives a part of a result: new entries along other axes do not."""
    own = {self.of_result[result, a] for a in self.result_axes[result]}
    return not any(bit for number, bit in at.items() if number not in own)

  def blocks(self, operands: list[Parts], at: dict[int, int]) -> list[Any]:
    """The parts of the operands that a combination takes."""
    return [
      x.blocks[tuple(at[self.of_operand[i, a]] for a in x.axes)] for i, x in enumerate(operands)
    ]


def _ties_in_parts(old: Any, new: Any, grown: set[tuple[int, int]]) -> Iterator[primitives.Tie]:
  """The ties of an operation, and those that it has for old and new entries alone.

  An operation that cuts or joins an axis does so with the old entries among themselves and the
  new ones among themselves.
  """
  name, ties = old.primitive.name, primitives.ties(old)
  if ties is None:
    raise ValueError(f"{name} cannot be run in two parts, old and new: {primitives.WANTED}")
  if name == "conv_general_dilated":
    more_groups = old.params["feature_group_count"] != new.params["feature_group_count"]
    yield from _ties_of_groups(ties, more_groups)
  else:
    yield from ties
  if name == "reshape":
    ins = grown_axes(old.invars[0], new.invars[0])
    outs = grown_axes(old.outvars[0], new.outvars[0])
    shapes = reading.shape(old.invars[0]), reading.shape(old.outvars[0])
    for before, after in primitives.reshape_groups(*shapes):
      a, b = [i for i in before if i in ins], [o for o in after if o in outs]
      if len(a) == len(b) == 1:
        yield primitives.Tie(((0, a[0]),), ((0, b[0]),))
  elif name == "split":
    axis = old.params["axis"]
    pairs = enumerate(zip(old.outvars, new.outvars, strict=True))
    pieces = tuple((i, axis) for i, (a, b) in pairs if axis in grown_axes(a, b))
    yield primitives.Tie(((0, axis),), pieces)
  elif name == "concatenate":
    axis = old.params["dimension"]
    yield primitives.Tie(tuple((i, axis) for i in range(len(old.invars))), ((0, axis),))
  elif name in _EXTREMA:
    for axis in old.params["axes"]:
      yield primitives.Tie(((0, axis),), summed=True)
  elif name == "slice":
    tied = {a for tie in ties for _, a in tie.operands}
    for pair in sorted(grown):
      if pair[1] not in tied:
        yield primitives.Tie((pair,), (pair,))
  taps = tuple(pair for pair in sorted(grown) if pair[1] == TAPS)
  if taps:
    yield primitives.Tie(taps, summed=True)


_EXTREMA = {"reduce_max": jnp.maximum, "reduce_min": jnp.minimum}


def met(eqn: Any, old: Any, new: Any, alpha: Any) -> Any:
  """What an operation that goes over an axis gives of its old entries and of its new ones.

  Args:
    eqn: The operation: a sum, or the largest or smallest entry.
    old: What it gives of the old entries.
    new: What it gives of the new ones.
    alpha: The gate, if this goes to old entries; else None.
  """
  extremum = _EXTREMA.get(eqn.primitive.name)
  if extremum is None:
    return old + (new if alpha is None else alpha.astype(new.dtype) * new)
  both = extremum(old, new)
  if alpha is None:
    return both
  if not jnp.issubdtype(old.dtype, jnp.floating):
    return jnp.where(alpha >= 1, both, old)
  # An infinity, as of what is masked, is not approached but jumped from.
  far = jnp.where(alpha > 0, both, old)
  near = jnp.isfinite(both) & jnp.isfinite(old)
  way = jnp.where(near, both, 0) - jnp.where(near, old, 0)
  return jnp.where(near, old + alpha.astype(old.dtype) * way, far)


def _ties_of_groups(ties: list[primitives.Tie], more_groups: bool) -> Iterator[primitives.Tie]:
  """The ties of a convolution that gets more groups, or else wider ones, if it has any."""
  groups = [tie for tie in ties if tie.groups > 1 and not tie.summed]
  for tie in ties:
    of_groups = tie in groups
    within = bool(groups) and not of_groups and (tie.summed or tie.results == groups[0].results)
    if not (within if more_groups else of_groups):
      yield tie


def bind(
  old: Any, new: Any, axes: Combinations, at: dict[int, int], blocks: list[Any]
) -> list[Any]:
  """Runs an operation on one combination of parts."""
  name = old.primitive.name
  if name == "concatenate":
    along = old.params["dimension"]
    if along in axes.result_axes[0] and at[axes.of_result[0, along]]:
      pairs = zip(blocks, old.invars, new.invars, strict=True)
      blocks = [x for x, a, b in pairs if reading.shape(a)[along] != reading.shape(b)[along]]
  if name == "random_bits" and any(at.values()):
    # The old entries keep their own numbers; new ones must not repeat them.
    bits = sum(bit << i for i, bit in enumerate(axes.result_bits(0, at)))
    blocks = [jax.random.fold_in(blocks[0], bits)]
  results = reading.bind(old, blocks, **_changed_parameters(old, new, axes, at))
  along = 0, old.params.get("dimension")
  if name == "iota" and at.get(axes.of_result.get(along, -1)):  # new ones are counted on
    results[0] += jnp.asarray(reading.shape(old.outvars[0])[along[1]], results[0].dtype)
  return results


def _changed_parameters(
  old: Any, new: Any, axes: Combinations, at: dict[int, int]
) -> dict[str, Any]:
  """The parameters of an operation that hold sizes, for one combination of parts."""
  name, p, q = old.primitive.name, old.params, new.params

  def sizes(before: Any, after: Any, numbers: list[int | None]) -> tuple[int, ...]:
    return tuple(
      m - n if number is not None and at[number] else n
      for n, m, number in zip(before, after, numbers, strict=True)
    )

  def of_operand(before: Any, after: Any) -> tuple[int, ...]:
    return sizes(before, after, [axes.of_operand.get((0, a)) for a in range(len(before))])

  before, after = reading.shape(old.outvars[0]), reading.shape(new.outvars[0])
  result = sizes(before, after, [axes.of_result.get((0, a)) for a in range(len(before))])
  if name in ("broadcast_in_dim", "iota", "random_bits"):
    return {"shape": result}
  if name == "reshape":
    return {"new_sizes": result}
  if name in ("gather", "dynamic_slice"):
    pairs = zip(p["slice_sizes"], q["slice_sizes"], strict=True)
    parts = of_operand(p["slice_sizes"], q["slice_sizes"])
    # One that stays takes as much of an axis, be it of old entries or new ones.
    return {
      "slice_sizes": tuple(x if n != m else n for x, (n, m) in zip(parts, pairs, strict=True))
    }
  if name == "slice":
    cut = [(0, a) for a, step in enumerate(p["strides"] or ()) if step != 1]
    if any(at[axes.of_operand[pair]] for pair in cut if pair in axes.of_operand):
      raise ValueError("an axis that grows is cut with strides: expected whole pieces of it")
    return {key: of_operand(p[key], q[key]) for key in ("start_indices", "limit_indices")}
  if name == "split":
    number = axes.of_operand.get((0, p["axis"]))
    return {"sizes": sizes(p["sizes"], q["sizes"], [number] * len(p["sizes"]))}
  if name == "conv_general_dilated":
    changed = {}
    if (1, TAPS) in axes.of_operand and at[axes.of_operand[1, TAPS]]:
      changed["padding"] = q["padding"]
    groups = p["feature_group_count"], q["feature_group_count"]
    number = axes.of_operand.get((0, p["dimension_numbers"].lhs_spec[1]))
    if groups[0] != groups[1] and number is not None and at[number]:
      changed["feature_group_count"] = groups[1] - groups[0]
    return changed
  return {}


def pads_for_taps(old: Any, new: Any, operands: list[Parts]) -> bool:
  """Whether an operation pads more at the new size, along axes that have not grown."""
  if old.primitive.name != "pad":
    return False
  pairs = enumerate(zip(old.params["padding_config"], new.params["padding_config"], strict=True))
  changed = [axis for axis, (before, after) in pairs if before != after]
  return bool(changed) and not any(axis in operands[0].axes for axis in changed)


def padded(old: Any, new: Any, x: Parts, fill: Parts) -> Parts:
  """What a kernel reads: padded for its old taps, and for all."""
  lows = [[low for low, _, _ in eqn.params["padding_config"]] for eqn in (old, new)]
  blocks = {
    (taps, *bits): reading.bind(eqn, [block, fill.blocks[()]])[0]
    for taps, eqn in enumerate((old, new))
    for bits, block in x.blocks.items()
  }
  offset = tuple(after - before for before, after in zip(*lows, strict=True))
  return Parts((TAPS, *x.axes), blocks, offset)


def passed(old: Any, operands: list[Parts]) -> Parts:
  """A kernel, or what it reads, after an operation that changes each entry alone."""
  name = old.primitive.name
  spatial = len(operands[0].offset)
  swaps = name == "transpose" and operands[0].axes == (TAPS,)  # inputs and outputs, in place
  in_place = swaps and old.params["permutation"][:spatial] == tuple(range(spatial))
  if name not in ("convert_element_type", "copy", "neg", "rev") and not in_place:
    raise ValueError(
      f"a kernel whose taps grow, or what it reads, goes through {name} before its"
      " convolution: expected it to be used as it is"
    )
  (x,) = operands
  if name == "rev":  # what was at the start is at the end: the new taps that are there count now
    smaller, larger = (next(y for bits, y in x.blocks.items() if bits[0] == b) for b in (0, 1))
    more = [larger.shape[a] - smaller.shape[a] for a in range(spatial)]
    ends = old.params["dimensions"]
    flipped = [
      n - at if a in ends else at for a, (n, at) in enumerate(zip(more, x.offset, strict=True))
    ]
    x = x._replace(offset=tuple(flipped))
  return x._replace(blocks={bits: reading.bind(old, [y])[0] for bits, y in x.blocks.items()})


def check_taps(old: Any, new: Any, x: Parts, kernel: Parts) -> None:
  """Raises `ValueError` unless old taps meet the same inputs in both convolutions."""
  if TAPS not in kernel.axes:
    raise ValueError("what a convolution reads is padded otherwise, but its kernel has not grown")
  p, q = old.params, new.params
  spatial = p["dimension_numbers"].lhs_spec[2:]
  for i, (axis, offset) in enumerate(zip(spatial, kernel.offset, strict=True)):
    need = offset * p["rhs_dilation"][i]
    more = q["padding"][i][0] - p["padding"][i][0] + (x.offset[axis] if x.offset else 0)
    if more != need:
      raise ValueError(
        f"a kernel grows along spatial axis {i} by {offset} taps at its start, for which its"
        f" convolution has to pad by {need} more, found {more}; expected padding"
        ' "SAME" (or "CAUSAL", and old taps at the end)'
      )
