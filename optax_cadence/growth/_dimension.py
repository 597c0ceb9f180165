"""A dimension: one set of units, and the axes of leaves that have an entry for each of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths
from optax_cadence.growth import _trees

Labels = np.ndarray
NO_UNIT = -1  # the label of a position that belongs to no unit of the dimension


class Axis(NamedTuple):
  """How an axis holds the units of a dimension: `outer` times all units, each `inner` long.

  A dense layer after the flattening of 4 × 4 pixels has `Axis(0, outer=16)`; a projection to
  heads of 8 entries that is one matrix has `Axis(-1, inner=8)`.

  Attributes:
    axis: The axis; negative ones count from the last.
    outer: How often the units repeat.
    inner: Adjacent positions that one unit has.
  """

  axis: int
  outer: int = 1
  inner: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
  """An axis of a leaf that has positions for the units of a dimension.

  Attributes:
    path: Path of the leaf.
    axis: The axis, counted from the first.
    labels: For each position along it the unit that it belongs to, or -1: int [size].
    role: "incoming" (its entries make the units), "outgoing" (they use them), "both" (a
      tied embedding), or "follows" (biases, norms, running statistics).
  """

  path: _paths.Path
  axis: int
  labels: Labels
  role: str


class Contraction(NamedTuple):
  """A matrix product or convolution: what its cost depends on.

  Attributes:
    flops: Multiplications and additions of one call, at the present size.
    shares: For each of its axes that runs over the dimension, its positions in all and per unit.
  """

  flops: int
  shares: tuple[tuple[int, int], ...]


class Output(NamedTuple):
  """An output of a program that has an entry, or several, for every unit: it grows with them.

  Attributes:
    path: Where it stands in what the program returns.
    axis: The axis, counted from the first.
    size: Its positions in all.
    unit: Its positions per unit.
  """

  path: _paths.Path
  axis: int
  size: int
  unit: int

  def __str__(self) -> str:
    name = f"output {_paths.join(self.path)!r}" if self.path else "the output"
    return f"{name} axis {self.axis}"

  def grown(self, more: int) -> str:
    """What becomes of it with some more units, in words."""
    return f"{self} grows from {self.size} to {self.size + more * self.unit}"


@dataclasses.dataclass(frozen=True, eq=False)
class Dimension:
  """Units that several leaves share.

  Attributes:
    size: Number of units.
    members: The axes that hold them.
    contractions: The products of the program; None where no program was read.
    folds: Whether nothing but products with weights, each used in this way alone, sums over
      the units, so that a gate can be folded into those weights.
    outputs: The outputs of the program that carry the units themselves.
    regroups: Whether the program turns an axis that has them into several, or several into one,
      which a network may do in another way at its new size.
  """

  size: int
  members: tuple[Member, ...]
  contractions: tuple[Contraction, ...] | None = None
  folds: bool = False
  outputs: tuple[Output, ...] = ()
  regroups: bool = False

  def __str__(self) -> str:
    lines = [f"{self.size} units"]
    lines += [f"  {_paths.join(m.path)} axis {m.axis}: {m.role}" for m in self.members]
    lines += [f"  {output}" for output in self.outputs]
    return "\n".join(lines)


def dimension(variables: Any, members: Mapping[str, Any]) -> Dimension:
  """Describes by hand which axes share units.

  Args:
    variables: Tree of arrays or `jax.ShapeDtypeStruct`.
    members: For the path of each leaf its axis: an integer, an `Axis`, or a list of them.

  Returns:
    The `Dimension`; which members are outgoing is left to the program that runs them.

  Raises:
    ValueError: If a path or axis is not there, or the sizes do not agree.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
  >>> print(growth.dimension(params, {"a": -1, "b": 0}))
  4 units
    a axis 1: follows
    b axis 0: follows
  """
  shapes = _trees.shapes(variables)
  axes: list[Member] = []
  units: list[int] = []
  for name, axis_or_axes in members.items():
    path = _trees.find(shapes, name)
    for axis in axis_or_axes if isinstance(axis_or_axes, list) else [axis_or_axes]:
      number, outer, inner = axis if isinstance(axis, Axis) else Axis(axis)
      units.append(_count(path, shapes[path], Axis(number, outer, inner)))
      labels = np.tile(np.repeat(np.arange(units[-1]), inner), outer)
      axes.append(Member(path, number % len(shapes[path]), labels, "follows"))
  if len(set(units)) != 1:
    pairs = zip(axes, units, strict=True)
    listed = ", ".join(f"{_paths.join(m.path)!r} of shape {shapes[m.path]}: {n}" for m, n in pairs)
    raise ValueError(f"the axes of a dimension must hold as many units, found {listed}")
  return Dimension(units[0], tuple(axes))


def _count(path: _paths.Path, shape: tuple[int, ...], axis: Axis) -> int:
  """How many units an axis holds."""
  number, outer, inner = axis
  if not -len(shape) <= number < len(shape):
    raise ValueError(f"{_paths.join(path)!r} of shape {shape} has no axis {number}")
  size = shape[number]
  if outer < 1 or inner < 1 or size % (outer * inner):
    raise ValueError(
      f"{_paths.join(path)!r} of shape {shape}: axis {number} of size {size} cannot hold units"
      f" {outer} times, {inner} long each"
    )
  return size // (outer * inner)


def extended_together(
  labels: Sequence[Labels], units: Sequence[int], more: Sequence[int]
) -> list[Labels]:
  """The labels of several dimensions along one axis, at which each is given more units.

  These stand behind its last unit, wherever that is. Of each dimension the arguments have its
  labels along the axis, the number of its units, and how many more it gets.

  >>> import numpy as np
  >>> from optax_cadence.growth import _dimension
  >>> labels = np.array([0, 1, -1, -1]), np.array([-1, -1, 0, 1])
  >>> print(*_dimension.extended_together(labels, units=[2, 2], more=[1, 2]))
  [ 0  1  2 -1 -1 -1 -1] [-1 -1 -1  0  1  2  3]
  >>> print(*_dimension.extended_together([np.array([0, 0, 1, 1, -1, 0, 1])], [2], [1]))
  [ 0  0  1  1  2  2 -1  0  1  2]
  """
  together = np.stack(labels)
  pieces, start, n = [], 0, together.shape[1]
  while start < n:
    end = start + 1
    while end < n and (together[:, end] == together[:, start]).all():
      end += 1
    pieces.append(together[:, start:end])
    for i, (number, new) in enumerate(zip(units, more, strict=True)):
      if together[i, start] == number - 1:
        added = np.full((len(labels), new * (end - start)), NO_UNIT)
        added[i] = np.repeat(np.arange(number, number + new), end - start)
        pieces.append(added)
    start = end
  return list(np.concatenate(pieces, axis=1))


def entries(member: Member, units: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """For each entry of a member what is said of its unit; 0, or False, where it has none.

  Args:
    member: The member.
    units: Of every unit whether something is so, or a number: [units], or [layers, units] where
      layers are stacked along the first axis.
    shape: The shape of its leaf.
  """
  labels = np.where(member.labels < 0, units.shape[-1], member.labels)
  nowhere = jnp.zeros((*units.shape[:-1], 1), units.dtype)
  along = jnp.concatenate([units, nowhere], -1)[..., labels]
  axes = {member.axis, *range(units.ndim - 1)}
  along = along.reshape([n if i in axes else 1 for i, n in enumerate(shape)])
  return jnp.broadcast_to(along, shape)
