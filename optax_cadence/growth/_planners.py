"""The four ways to a plan: more units, fewer units, larger filters, new layers."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths
from optax_cadence.growth import _graph
from optax_cadence.growth import _plan
from optax_cadence.growth import _trees
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._dimension import extended_together
from optax_cadence.growth._dimension import Member
from optax_cadence.growth._dimension import NO_UNIT
from optax_cadence.growth._plan import LeafChange
from optax_cadence.growth._plan import Plan
from optax_cadence.growth._plan import Shape


def widening(
  variables: Any,
  dimensions: Dimension | Mapping[Dimension, int],
  by: int | None = None,
  *,
  alpha: str = "alpha",
) -> Plan:
  """Plans more units, appended after the last.

  Args:
    variables: Tree of arrays or `jax.ShapeDtypeStruct`.
    dimensions: A `Dimension`, of `couple` or `dimension`; or several, with the number of new
      units for each.
    by: The number of new units.
    alpha: Path at which the gate will be.

  Returns:
    A `Plan`.

  Raises:
    ValueError: If a number is below 1 or a member is not as described.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
  >>> print(growth.widening(params, growth.dimension(params, {"a": -1, "b": 0}), by=2))
  leaf   role     before  after  parameters
  a      follows  3x4     3x6            +6
  b      follows  4x2     6x2            +4
  total                                 +10
  gate: alpha
  """
  numbers = dimensions if isinstance(dimensions, Mapping) else {dimensions: by}
  shapes = _trees.shapes(variables)
  along: dict[tuple[_paths.Path, int], list[tuple[Member, int, int]]] = {}
  for dimension, more in numbers.items():
    if not isinstance(more, int | np.integer) or isinstance(more, bool) or more < 1:
      raise ValueError(f"by must be a positive integer, found {more!r}")
    for member in dimension.members:
      along.setdefault((member.path, member.axis), []).append((member, dimension.size, int(more)))
  changes = _plan.joined(_widened(described, shapes) for described in along.values())
  growing: Any = tuple(numbers.items())
  return Plan(changes, True, tuple(alpha.split("/")), _flops(growing), growing)


def _widened(
  described: Sequence[tuple[Member, int, int]], shapes: Mapping[_paths.Path, Shape]
) -> LeafChange:
  """The change of a leaf along one axis, of which each dimension may have a piece.

  `described` has for each dimension its member, its units, and how many more there will be.
  """
  members, units, more = zip(*described, strict=True)
  labels = [member.labels for member in members]
  where = f"axis {members[0].axis} of {_paths.join(members[0].path)!r}"
  if len({len(x) for x in labels}) > 1 or (np.stack(labels) >= 0).sum(0).max() > 1:
    raise ValueError(
      f"{where} has positions that belong to units of two dimensions: expected each in one;"
      " widen one after the other"
    )
  roles = {member.role for member in members}
  if len(roles) > 1 and "outgoing" in roles:
    raise ValueError(
      f"{where} has units of two dimensions, one of which it makes and one it uses: expected one"
      " or the other; widen one after the other"
    )
  extended = extended_together(labels, units, more)
  old = [(x < n) for x, n in zip(extended, units, strict=True)]
  return _change(members[0], shapes, len(extended[0]), np.flatnonzero(np.all(old, axis=0)))


def shrinking(
  variables: Any, dimension: Dimension, *, keep: Any = None, remove: Any = None
) -> Plan:
  """Plans fewer units.

  Args:
    variables: Tree of arrays or `jax.ShapeDtypeStruct`.
    dimension: The units and who has them.
    keep: Which units stay: indices, or a bool mask over the units.
    remove: Which go, in place of `keep`.

  Returns:
    A `Plan`. Outputs stay the same if the outgoing weights of what is removed are zero, or
    its units always are.

  Raises:
    ValueError: If a unit is not there, or none would be left.
  """
  if (keep is None) == (remove is None):
    raise ValueError("expected either keep= or remove=, the units that stay or go")
  chosen = _chosen(keep if remove is None else remove, dimension.size)
  kept = chosen if remove is None else np.setdiff1d(np.arange(dimension.size), chosen)
  if not len(kept) or len(kept) == dimension.size:
    raise ValueError(
      f"expected some of {dimension.size} units to go and some to stay, found {len(kept)} to stay"
    )
  shapes = _trees.shapes(variables)
  changes, members = [], []
  number = np.full(dimension.size + 1, NO_UNIT)  # of each unit then; the last is of no unit
  number[kept] = np.arange(len(kept))
  for member in dimension.members:
    at = np.flatnonzero(np.isin(member.labels, kept) | (member.labels < 0))
    changes.append(_change(member, shapes, len(at), at))
    members.append(dataclasses.replace(member, labels=number[member.labels[at]]))
  smaller = dataclasses.replace(dimension, size=len(kept), members=tuple(members))
  less = dimension.size - len(kept)
  flops = _flops([(dimension, -less)])
  return Plan(_plan.joined(changes), False, flops=flops, dimensions=((smaller, less),))


def _chosen(units: Any, size: int) -> np.ndarray:
  """Indices of units, from indices or a bool mask."""
  units = np.asarray(units)
  if units.dtype == bool:
    if units.shape != (size,):
      raise ValueError(f"a mask over {size} units must have shape ({size},), found {units.shape}")
    return np.flatnonzero(units)
  if not np.issubdtype(units.dtype, np.integer) or units.ndim != 1:
    raise ValueError(
      f"expected indices of units or a bool mask, found {units.dtype} of shape {units.shape}"
    )
  if len(set(units.tolist())) != len(units) or ((units < 0) | (units >= size)).any():
    raise ValueError(f"expected distinct units from 0 to {size - 1}, found {units.tolist()}")
  return np.sort(units)


def _change(
  member: Member, shapes: Mapping[_paths.Path, Shape], size: int, at: np.ndarray
) -> LeafChange:
  """The change of a leaf along one axis to `size` positions, where `at` is what stays."""
  before = shapes.get(member.path)
  if before is None or before[member.axis] != len(member.labels):
    raise ValueError(
      f"{_paths.join(member.path)!r}: expected {len(member.labels)} entries along axis"
      f" {member.axis}, found {_paths.described(before)}"
    )
  after = (*before[: member.axis], size, *before[member.axis + 1 :])
  outgoing = (member.axis,) if member.role == "outgoing" else ()
  return LeafChange(member.path, before, after, member.role, {member.axis: at}, outgoing=outgoing)


def _flops(growing: Iterable[tuple[Dimension, int]]) -> tuple[int, int] | None:
  """FLOPs of a program now, and with so many more units of each dimension; None if not known."""
  total = None
  for dimension, more in growing:
    if dimension.contractions is None:
      return None
    now, then = 0, 0.0
    for flops, shares in dimension.contractions:
      now += flops
      then += flops * math.prod((size + more * unit) / size for size, unit in shares)
    before, after = total or (now, now)
    total = before, after + round(then) - now
  return total


def enlarging(
  variables: Any,
  sizes: Mapping[str, Sequence[int]],
  *,
  causal: bool = False,
  alpha: str = "alpha",
  fn: Callable[..., Any] | None = None,
  args: Sequence[Any] = (),
) -> Plan:
  """Plans larger convolution kernels: the trained taps in the middle, new ones around them.

  Args:
    variables: Tree of arrays or `jax.ShapeDtypeStruct`.
    sizes: For the path of each kernel, of shape [*spatial, in, out], its new spatial size.
    causal: Whether old taps are at the end, as padding "CAUSAL" needs it, instead of where
      "SAME" pads them.
    alpha: Path at which the gate will be.
    fn: The forward pass, to count FLOPs.
    args: Its arguments after the variables.

  Returns:
    A `Plan`.

  Raises:
    ValueError: If a kernel would become smaller, or stay as it is.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> print(growth.enlarging({"kernel": jnp.ones((3, 3, 1, 8))}, {"kernel": (5, 5)}))
  leaf    role  before   after    parameters
  kernel  taps  3x3x1x8  5x5x1x8        +128
  total                                 +128
  gate: alpha
  """
  shapes = _trees.shapes(variables)
  kernels = {_trees.find(shapes, name): size for name, size in sizes.items()}
  changes = [_more_taps(path, shapes[path], size, causal) for path, size in kernels.items()]
  flops = None
  if fn is not None:
    factors = {c.path: math.prod(c.after or ()) / math.prod(c.before or ()) for c in changes}
    flops = _graph.read(fn, variables, *args).flops(lambda path: factors.get(path, 1.0))
  return Plan(tuple(changes), True, tuple(alpha.split("/")), flops)


def _more_taps(path: _paths.Path, before: Shape, size: Sequence[int], causal: bool) -> LeafChange:
  """The change of a kernel to another spatial size."""
  spatial = tuple(range(len(before) - 2))
  after = (*map(int, size), *before[-2:])
  if not spatial or len(after) != len(before):
    raise ValueError(
      f"{_paths.join(path)!r} of shape {before}: expected a kernel with as many spatial axes as"
      f" the size has numbers, found {tuple(size)}"
    )
  if any(m < n for n, m in zip(before, after, strict=True)) or after == before:
    raise ValueError(
      f"{_paths.join(path)!r} of shape {before}: expected a larger spatial size than"
      f" {before[:-2]}, found {tuple(size)}"
    )
  positions = {}
  for axis in spatial:
    n, m = before[axis], after[axis]
    start = m - n if causal else (m - 1) // 2 - (n - 1) // 2
    if m != n:
      positions[axis] = np.arange(start, start + n)
  return LeafChange(path, before, after, "taps", positions, spatial=spatial)


def deepening(
  variables: Any,
  deeper: Any,
  *,
  outgoing: Iterable[str] = (),
  moved: Mapping[str, str] | None = None,
  alpha: str = "alpha",
  flops: tuple[int, int] | None = None,
) -> Plan:
  """Plans leaves that are new: a residual block, of which α multiplies what it ends in.

  Args:
    variables: Tree of arrays or `jax.ShapeDtypeStruct`.
    deeper: The tree with the new leaves; those of `variables` are in it unchanged in shape.
    outgoing: Paths of the new leaves, or of modules that hold them, through which the block
      adds to its residual stream: kernel and bias of its last layer, or scale and bias of
      its last norm. None: the block is the identity as it is (Net2Deeper).
    moved: From paths of leaves, or of modules that hold them, to those in the deeper tree, where
      they are others, as when a block is put before others. With `{"block1": "block2"}` block 1
      of the deeper tree is the new one. All other paths here are the deeper tree's.
    alpha: Path at which the gate will be.
    flops: Of a forward pass before and after, see `growth.flops`; shown with the plan.

  Returns:
    A `Plan`; apply it with `deeper` as the fresh values.

  Raises:
    ValueError: If nothing is new, an old leaf is missing or has another shape, two are moved to
      one place, or a path of `outgoing` is not new.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> deeper = {"head": jnp.ones(2), "block": {"kernel": jnp.ones((2, 2))}}
  >>> print(growth.deepening({"head": jnp.ones(2)}, deeper, outgoing=["block/kernel"]))
  leaf          role   before  after  parameters
  block/kernel  added  -       2x2            +4
  total                                       +4
  gate: alpha
  """
  before, new = _trees.shapes(variables), _trees.shapes(deeper)
  moves = _moves(before, moved or {})
  old: dict[_paths.Path, Shape] = {}
  for path, shape in before.items():
    target = moves.get(path, path)
    if target in old:
      raise ValueError(
        f"moved puts {_paths.join(path)!r} to {_paths.join(target)!r}, where another leaf stands"
        " already: say where that one goes, or choose a path that is free"
      )
    if new.get(target) != shape:
      raise ValueError(
        f"{_paths.join(target)!r}: expected shape {shape} in the deeper tree, found"
        f" {new.get(target, 'nothing there')}"
      )
    old[target] = shape
  added = [path for path in new if path not in old]
  scaled: set[_paths.Path] = set()
  for name in outgoing:
    under = _trees.under(added, name)
    if not under:
      raise ValueError(
        f"outgoing {name!r}: expected it to be new, one of {_paths.listed(added)}; if another"
        " leaf has moved away from there, say where it stands with moved="
      )
    scaled.update(under)
  if not added:
    raise ValueError("expected new leaves in the deeper tree, found none")
  changes = [LeafChange(p, None, new[p], "added", scaled=p in scaled) for p in added]
  return Plan(tuple(changes), True, tuple(alpha.split("/")), flops, moved=moves)


def _moves(old: Iterable[_paths.Path], moved: Mapping[str, str]) -> dict[_paths.Path, _paths.Path]:
  """Old and new path of every leaf that moves; `moved` names leaves or modules.

  Raises:
    ValueError: If nothing is where something is said to move from.
  """
  moves = {}
  for source, target in moved.items():
    under = _trees.under(old, source)
    if not under:
      raise ValueError(
        f"moved {source!r}: expected one of {_paths.listed(old)}, found no such leaf"
      )
    for path in under:
      moves[path] = (*target.split("/"), *path[len(source.split("/")) :])
  return {path: target for path, target in moves.items() if path != target}


def identity_kernel(shape: Sequence[int], dtype: Any = jnp.float32) -> Any:
  """The kernel of a layer that returns its input: Net2Deeper's.

  Between a ReLU and the next layer, a layer with this kernel, no bias and a ReLU changes
  nothing, and learns from there.

  Args:
    shape: [*spatial, n, n]; dense layers have no spatial axes.
    dtype: Its dtype.

  Returns:
    Array of that shape.

  Raises:
    ValueError: If it has not as many inputs as outputs.

  References:
    Chen et al. 2015, arXiv:1511.05641.

  >>> from optax_cadence import growth
  >>> print(growth.identity_kernel((3, 2, 2))[:, 0, 0])
  [0. 1. 0.]
  """
  if len(shape) < 2 or shape[-1] != shape[-2]:
    raise ValueError(f"an identity needs as many inputs as outputs, found shape {tuple(shape)}")
  centre = tuple((n - 1) // 2 for n in shape[:-2])
  return jnp.zeros(shape, dtype).at[centre].set(jnp.eye(shape[-1], dtype=dtype))
