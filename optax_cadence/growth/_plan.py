"""What will change, before it does: which entries of which leaves, at what cost.

A plan is made from descriptions, prints as a table, and is applied all or nothing. A plan
that grows says where the old entries lie among the new; one that shrinks, which are kept.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths
from optax_cadence import _tables
from optax_cadence.growth import _trees
from optax_cadence.growth._coupling import Contraction
from optax_cadence.growth._coupling import Dimension
from optax_cadence.growth._coupling import Member

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class LeafChange:
  """How one leaf changes.

  Attributes:
    path: Its path.
    before: Its shape now; None for a leaf that is added.
    after: Its shape then.
    role: "incoming", "outgoing", "both", "follows", "taps" or "added".
    positions: For each axis that changes, where the entries of the smaller leaf lie in the
      larger: int arrays.
    labels: For each axis that changes, the unit behind each position of the leaf before.
    scaled: Whether α multiplies the whole leaf (what a new residual block ends in).
    spatial: The spatial axes of a kernel that gets new taps.
    outgoing: The axes along which its new entries are weights out of new units.
  """

  path: _paths.Path
  before: Shape | None
  after: Shape
  role: str
  positions: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)
  labels: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)
  scaled: bool = False
  spatial: tuple[int, ...] = ()
  outgoing: tuple[int, ...] = ()

  @property
  def taps(self) -> tuple[int, ...]:
    """The spatial axes along which a kernel gets new taps."""
    return tuple(a for a in self.spatial if a in self.positions)

  @property
  def index(self) -> tuple[np.ndarray, ...]:
    """Where the smaller leaf lies in the larger, for `numpy`'s indexing."""
    small = min(self.before or self.after, self.after, key=math.prod)
    return np.ix_(*(self.positions.get(a, np.arange(n)) for a, n in enumerate(small)))


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """A change of shapes; prints as a table.

  Attributes:
    changes: One `LeafChange` per leaf that changes or is added.
    grows: Whether leaves become larger; otherwise they become smaller.
    alpha: Path of the gate in the tree.
    flops: Multiplications and additions of one forward pass of the traced program before and
      after; None where no program was read.
    dimensions: The dimensions that are widened, each with its number of new units.
  """

  changes: tuple[LeafChange, ...]
  grows: bool = True
  alpha: _paths.Path = ("alpha",)
  flops: tuple[int, int] | None = None
  dimensions: tuple[tuple[Dimension, int], ...] = ()

  @property
  def by_path(self) -> dict[_paths.Path, LeafChange]:
    """The changes, by path."""
    return {change.path: change for change in self.changes}

  def __add__(self, other: "Plan") -> "Plan":
    """Both changes at once, behind one gate.

    Raises:
      ValueError: If one grows and one shrinks, the gates are two, or a leaf is in both along
        the same axis.
    """
    if self.grows != other.grows or self.alpha != other.alpha:
      raise ValueError("plans can be added if both grow, or both shrink, and the gate is one")
    merged = self.by_path
    for change in other.changes:
      old = merged.get(change.path)
      merged[change.path] = change if old is None else _both(old, change)
    flops = None
    if self.flops and other.flops and self.flops[0] == other.flops[0]:
      flops = (self.flops[0], self.flops[1] + other.flops[1] - self.flops[0])
    dimensions = self.dimensions + other.dimensions
    return Plan(tuple(merged.values()), self.grows, self.alpha, flops, dimensions)

  def __str__(self) -> str:
    header = ("leaf", "role", "before", "after", "parameters")
    rows = [
      (_paths.join(c.path), c.role, _shown(c.before), _shown(c.after), f"{_added(c):+d}")
      for c in self.changes
    ]
    total = ("total", "", "", "", f"{sum(map(_added, self.changes)):+d}")
    lines = _tables.lines([header, *rows, total], left=len(header) - 1)
    if self.flops:
      before, after = self.flops
      lines.append(f"FLOPs of a forward pass: {before} before, {after} after ({after - before:+d})")
    if self.grows:
      lines.append(f"gate: {_paths.join(self.alpha)}")
    return "\n".join(lines)

  def apply(self, variables: Any, fresh: Any = None, *, alpha: float = 0.0) -> Any:
    """Returns the tree at its new shapes; nothing of the old tree is changed.

    Args:
      variables: The tree that the plan was made for.
      fresh: Where new entries come from: a tree at the new shapes (of which only the new
        entries are read), or a function `(path, shape, dtype) -> array`. Not for a plan
        that shrinks.
      alpha: The value of the gate, which is added at `self.alpha`.

    Returns:
      The new tree. Old entries are the same, bit for bit.

    Raises:
      ValueError: If a leaf is not as the plan expects, in the old tree or the fresh one, or
        if shapes are being traced.
    """
    self.check(variables, "before")
    _trees.check_concrete("apply", variables)
    old = _trees.leaves(variables)
    if not self.grows:
      return _trees.with_leaves(
        variables, {c.path: _trees.taken(old[c.path], c.index) for c in self.changes}
      )
    source = fresh if callable(fresh) else _reader(fresh, old)
    made = {c.path: _grown(c, old.get(c.path), source) for c in self.changes}
    result = _trees.with_leaves(variables, {p: x for p, x in made.items() if p in old})
    for path in (p for p in made if p not in old):
      result = _trees.insert(result, path, made[path])
    return _trees.insert(result, self.alpha, jnp.asarray(alpha, _alpha_dtype(old)))

  def inverse(self) -> "Plan":
    """The plan that shrinks what this one has grown: it gives back the old tree.

    Raises:
      ValueError: For a plan that shrinks or adds leaves.
    """
    if not self.grows:
      raise ValueError("a plan that shrinks has no inverse: what was removed is gone")
    added = [c.path for c in self.changes if c.before is None]
    if added:
      raise ValueError(f"{_paths.listed(added)} were added whole: remove them from the tree")
    changes = (
      dataclasses.replace(c, before=c.after, after=c.before or (), labels={}) for c in self.changes
    )
    flops = self.flops and self.flops[::-1]
    return Plan(tuple(changes), False, self.alpha, flops)

  def check(self, variables: Any, when: str, whole: bool = True) -> None:
    """Raises `ValueError` unless the leaves have their shapes "before" or "after"."""
    found = _trees.shapes(variables)
    for change in self.changes:
      want = getattr(change, when)
      have = found.get(change.path)
      if want is None and have is None:
        continue
      if have != want and (whole or have is not None):
        raise ValueError(
          f"{_paths.join(change.path)!r}: the plan expected {_expected(want)}, found"
          f" {_expected(have)}"
        )


def _both(one: LeafChange, two: LeafChange) -> LeafChange:
  shared = one.positions.keys() & two.positions.keys()
  if shared or one.before != two.before or one.before is None:
    raise ValueError(
      f"{_paths.join(one.path)!r} of shape {one.before} is in both plans, along axis"
      f" {sorted(shared)}: expected each axis once"
    )
  after = tuple(
    b if b != n else a for n, a, b in zip(one.before, one.after, two.after, strict=True)
  )
  role = one.role if one.role == two.role else "both"
  positions, labels = {**one.positions, **two.positions}, {**one.labels, **two.labels}
  spatial = one.spatial or two.spatial
  outgoing = one.outgoing + two.outgoing
  return LeafChange(
    one.path, one.before, after, role, positions, labels, spatial=spatial, outgoing=outgoing
  )


def _shown(shape: Shape | None) -> str:
  return "-" if shape is None else "x".join(map(str, shape)) or "scalar"


def _expected(shape: Shape | None) -> str:
  return "nothing there" if shape is None else f"shape {shape}"


def _added(change: LeafChange) -> int:
  return math.prod(change.after) - (0 if change.before is None else math.prod(change.before))


def _reader(fresh: Any, old: Mapping[_paths.Path, Any]) -> Callable[..., Any]:
  given = _trees.leaves(fresh)

  def read(path: _paths.Path, shape: Shape, dtype: Any) -> Any:
    found = given.get(path)
    if found is None or tuple(np.shape(found)) != shape:
      raise ValueError(
        f"fresh values of {_paths.join(path)!r}: expected shape {shape}, found"
        f" {_expected(None if found is None else tuple(np.shape(found)))}"
      )
    return found if path not in old else jnp.asarray(found, dtype)

  return read


def _grown(change: LeafChange, old: Any, fresh: Callable[..., Any]) -> Any:
  new = fresh(change.path, change.after, None if old is None else jnp.asarray(old).dtype)
  if tuple(np.shape(new)) != change.after:
    raise ValueError(
      f"fresh values of {_paths.join(change.path)!r}: expected shape {change.after}, found"
      f" {np.shape(new)}"
    )
  new = jnp.asarray(new)
  return new if old is None else _trees.placed(new, change.index, jnp.asarray(old, new.dtype))


def _alpha_dtype(old: Mapping[_paths.Path, Any]) -> Any:
  floats = [
    x.dtype for x in map(jnp.asarray, old.values()) if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  return floats[0] if floats else jnp.float32


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
  given = dimensions if isinstance(dimensions, Mapping) else {dimensions: by}
  shapes = _trees.shapes(variables)
  found: dict[_paths.Path, LeafChange] = {}
  flops = []
  for dim, count in given.items():
    units = _positive("by", count)
    for member in dim.members:
      new = extended(member.labels, dim.size, units)
      change = _change(member, shapes, len(new), np.flatnonzero(new < dim.size))
      old = found.get(member.path)
      found[member.path] = change if old is None else _both(old, change)
    flops.append(_flops(dim.contractions, units))
  path, dims = tuple(alpha.split("/")), tuple(given.items())
  return Plan(tuple(found.values()), True, path, _total(flops), dims)  # type: ignore[arg-type]


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
  found: dict[_paths.Path, LeafChange] = {}
  for member in dimension.members:
    at = np.flatnonzero(np.isin(member.labels, kept) | (member.labels < 0))
    change = _change(member, shapes, len(at), at)
    old = found.get(member.path)
    found[member.path] = change if old is None else _both(old, change)
  flops = _flops(dimension.contractions, len(kept) - dimension.size)
  return Plan(tuple(found.values()), False, flops=flops)


def _chosen(units: Any, size: int) -> np.ndarray:
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


def _positive(name: str, value: Any) -> int:
  if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
    raise ValueError(f"{name} must be a positive integer, found {value!r}")
  return int(value)


def _change(
  member: Member, shapes: Mapping[_paths.Path, Shape], size: int, at: np.ndarray
) -> LeafChange:
  before = shapes.get(member.path)
  if before is None or before[member.axis] != len(member.labels):
    raise ValueError(
      f"{_paths.join(member.path)!r}: expected {len(member.labels)} entries along axis"
      f" {member.axis}, found {_expected(before)}"
    )
  after = (*before[: member.axis], size, *before[member.axis + 1 :])
  outgoing = (member.axis,) if member.role == "outgoing" else ()
  positions, labels = {member.axis: at}, {member.axis: member.labels}
  return LeafChange(member.path, before, after, member.role, positions, labels, outgoing=outgoing)


def extended(labels: np.ndarray, units: int, more: int) -> np.ndarray:
  """The labels along an axis to which units are added, after the last one wherever it is.

  >>> import numpy as np
  >>> from optax_cadence.growth import _plan
  >>> print(_plan.extended(np.array([0, 0, 1, 1, -1, 0, 0, 1, 1]), units=2, more=1))
  [ 0  0  1  1  2  2 -1  0  0  1  1  2  2]
  """
  pieces, start, n = [], 0, len(labels)
  while start < n:
    end = start + 1
    while end < n and labels[end] == labels[start]:
      end += 1
    pieces.append(labels[start:end])
    if labels[start] == units - 1:
      pieces.append(np.repeat(np.arange(units, units + more), end - start))
    start = end
  return np.concatenate(pieces)


def _flops(contractions: Iterable[Contraction] | None, more: int) -> tuple[int, int] | None:
  if contractions is None:
    return None
  before, after = 0, 0.0
  for flops, shares in contractions:
    before += flops
    after += flops * math.prod((size + more * unit) / size for size, unit in shares)
  return before, round(after)


def _total(flops: list[tuple[int, int] | None]) -> tuple[int, int] | None:
  known = [f for f in flops if f is not None]
  if not known or len(known) < len(flops):
    return None
  before = known[0][0]
  return before, before + sum(after - before for _, after in known)
