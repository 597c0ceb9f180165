"""What will change, before it does: which entries of which leaves, at what cost.

A plan is made from descriptions, prints as a table, and is applied all or nothing. A plan
that grows says where the old entries lie among the new; one that shrinks, which are kept.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths
from optax_cadence import _tables
from optax_cadence.growth import _trees
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._dimension import extended_together

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class LeafChange:
  """How one leaf changes.

  Attributes:
    path: Its path.
    before: Its shape now; None for a leaf that is added.
    after: Its shape then; None for a leaf that is removed.
    role: "incoming", "outgoing", "both", "follows", "taps", "added" or "removed".
    positions: For each axis that changes, where the entries of the smaller leaf lie in the
      larger: int arrays.
    scaled: Whether α multiplies the whole leaf (what a new residual block ends in), or, of
      stacked layers, the entries of those that are new.
    spatial: The spatial axes of a kernel that gets new taps.
    outgoing: The axes along which its new entries are weights out of new units.
    layers: Whether it grows by layers of a stack, or by a new axis of experts. No program of the
      old size is then run beside the new one: α multiplies entries, as `scaled` says.
    sources: Of such a leaf, for every position along that axis the old one that it is a copy of.
      None: new entries are fresh.
    copies_state: Whether what an optimizer keeps of new entries is a copy too.
  """

  path: _paths.Path
  before: Shape | None
  after: Shape | None
  role: str
  positions: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)
  scaled: bool = False
  spatial: tuple[int, ...] = ()
  outgoing: tuple[int, ...] = ()
  layers: bool = False
  sources: np.ndarray | None = None
  copies_state: bool = False

  @property
  def adds_axis(self) -> bool:
    """Whether the axis along which it grows is there only in the larger leaf."""
    return None not in (self.before, self.after) and len(self.before) != len(self.after)  # type: ignore[arg-type]

  @property
  def taps(self) -> tuple[int, ...]:
    """The spatial axes along which a kernel gets new taps."""
    return tuple(a for a in self.spatial if a in self.positions)

  @property
  def index(self) -> tuple[np.ndarray, ...]:
    """Where the smaller leaf lies in the larger, for `numpy`'s indexing."""
    small = min((s for s in (self.before, self.after) if s is not None), key=math.prod)
    if self.adds_axis:
      return self.inside(small)
    return np.ix_(*(self.positions.get(a, np.arange(n)) for a, n in enumerate(small)))

  def inside(self, small: Shape) -> tuple[Any, ...]:
    """Where an array of this shape lies in one that has an axis more, as `adds_axis` has it."""
    ((axis, positions),) = self.positions.items()
    return (*(slice(n) for n in small[:axis]), int(positions[0]))

  def new(self, axis: int) -> np.ndarray:
    """Positions of the new entries along an axis that grows."""
    return np.setdiff1d(np.arange((self.after or ())[axis]), self.positions[axis])


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """A change of shapes; prints as a table.

  Attributes:
    changes: One `LeafChange` per leaf that changes or is added.
    grows: Whether leaves become larger; otherwise they become smaller.
    alpha: Path of the gate in the tree, or where it would be.
    flops: Multiplications and additions of one forward pass of the traced program before and
      after; None where no program was read.
    dimensions: The dimensions that change, as they are in the smaller tree, each with the number of
      units that the larger one has more.
    gate: Whether there is a gate. Without it new entries count at once.
    moved: For each leaf that stands elsewhere in the larger tree, as when a block is put before
      others: from its path in the smaller tree to that in the larger. All other paths of a plan
      are those of the larger tree.
    notes: What else is to be known of it, in words: printed below the table.
  """

  changes: tuple[LeafChange, ...]
  grows: bool = True
  alpha: _paths.Path = ("alpha",)
  flops: tuple[int, int] | None = None
  dimensions: tuple[tuple[Dimension, int], ...] = ()
  moved: Mapping[_paths.Path, _paths.Path] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()
  gate: bool = True

  @property
  def by_path(self) -> dict[_paths.Path, LeafChange]:
    """The changes, by path."""
    return {change.path: change for change in self.changes}

  def after(self) -> list[Dimension]:
    """The dimensions as they are when the plan has been applied."""
    if not self.grows:
      return [dimension for dimension, _ in self.dimensions]
    along: dict[tuple[_paths.Path, int], list[tuple[Dimension, int, Any]]] = {}
    for dimension, more in self.dimensions:
      for member in dimension.members:
        place = member.path, member.axis
        along.setdefault(place, []).append((dimension, more, member))
    members: dict[Dimension, list[Any]] = {dimension: [] for dimension, _ in self.dimensions}
    for described in along.values():
      dimensions, numbers, old = zip(*described, strict=True)
      labels = extended_together([m.labels for m in old], [d.size for d in dimensions], numbers)
      for dimension, member, new in zip(dimensions, old, labels, strict=True):
        members[dimension].append(dataclasses.replace(member, labels=new))
    return [
      dataclasses.replace(dimension, size=dimension.size + more, members=tuple(members[dimension]))
      for dimension, more in self.dimensions
    ]

  def __add__(self, other: "Plan") -> "Plan":
    """Both changes at once, behind one gate.

    Raises:
      ValueError: If one grows and one shrinks, the gates are two, or a leaf is in both along
        the same axis or by whole layers.
    """
    if (self.grows, self.gate, self.alpha) != (other.grows, other.gate, other.alpha):
      raise ValueError("plans can be added if both grow, or both shrink, and the gate is one")
    flops = None
    if self.flops and other.flops and self.flops[0] == other.flops[0]:
      flops = (self.flops[0], self.flops[1] + other.flops[1] - self.flops[0])
    return dataclasses.replace(
      self,
      changes=joined([*self.changes, *other.changes]),
      flops=flops,
      dimensions=self.dimensions + other.dimensions,
      moved={**self.moved, **other.moved},
      notes=tuple(dict.fromkeys(self.notes + other.notes)),
    )

  def __str__(self) -> str:
    header = ("leaf", "role", "before", "after", "parameters")
    rows = [
      (_paths.join(c.path), c.role, _shown(c.before), _shown(c.after), f"{_added(c):+d}")
      for c in self.changes
    ]
    rows += [
      (f"{_paths.join(old)} -> {_paths.join(new)}", "moved", "", "", "+0")
      for old, new in self.moved.items()
    ]
    total = ("total", "", "", "", f"{sum(map(_added, self.changes)):+d}")
    lines = _tables.lines([header, *rows, total], left=len(header) - 1)
    if self.flops:
      before, after = self.flops
      lines.append(f"FLOPs of a forward pass: {before} before, {after} after ({after - before:+d})")
    if self.grows:
      for dimension, more in self.dimensions:
        lines += [output.grown(more) for output in dimension.outputs]
      lines += self.notes
      lines.append(f"gate: {_paths.join(self.alpha) if self.gate else 'none'}")
    return "\n".join(lines)

  def apply(self, variables: Any, fresh: Any = None, *, alpha: float = 0.0) -> Any:
    """Returns the tree at its new shapes; nothing of the old tree is changed.

    Args:
      variables: The tree that the plan was made for.
      fresh: Where new entries come from: a tree at the new shapes (of which only the new
        entries are read), or a function `(path, shape, dtype) -> array`. Not for a plan
        that shrinks, nor for leaves whose new entries are copies.
      alpha: The value of the gate, which is added at `self.alpha` if there is one.

    Returns:
      The new tree. Old entries are the same, bit for bit.

    Raises:
      ValueError: If a leaf is not as the plan expects, in the old tree or the fresh one, or
        if shapes are being traced.
    """
    self.check(variables, "before")
    _trees.check_concrete("apply", variables)
    leaves = _paths.by_path(variables)
    if not self.grows:
      back = {new: path for path, new in self.moved.items()}
      smaller = {c.path: _smaller(c, leaves[c.path]) for c in self.changes if c.after is not None}
      gone = {c.path for c in self.changes if c.after is None}
      kept = {p: smaller.get(p, x) for p, x in leaves.items() if p not in gone}
      return _trees.rearranged(variables, {back.get(p, p): x for p, x in kept.items()})
    old = {self.moved.get(path, path): leaf for path, leaf in leaves.items()}
    source = fresh if callable(fresh) else _reader(fresh, old)
    grown = {c.path: _grown(c, old.get(c.path), source) for c in self.changes}
    gate = {self.alpha: jnp.asarray(alpha, float_dtype(old.values()))} if self.gate else {}
    if self.gate and self.alpha in old:
      raise ValueError(
        f"{_paths.join(self.alpha)!r}: expected nothing at this path, found something"
      )
    return _trees.rearranged(variables, {**old, **grown, **gate})

  def inverse(self) -> "Plan":
    """The plan that shrinks what this one has grown: it gives back the old tree.

    Raises:
      ValueError: For a plan that shrinks.
    """
    if not self.grows:
      raise ValueError("a plan that shrinks has no inverse: what was removed is gone")
    changes = (
      dataclasses.replace(
        c, before=c.after, after=c.before, role="removed" if c.before is None else c.role
      )
      for c in self.changes
    )
    flops = self.flops and self.flops[::-1]
    return dataclasses.replace(self, changes=tuple(changes), grows=False, flops=flops, notes=())

  def check(self, variables: Any, when: str) -> None:
    """Raises `ValueError` unless the leaves have their shapes "before" or "after"."""
    shapes = _trees.shapes(variables)
    if (when == "before") == self.grows:  # the smaller tree
      shapes = {self.moved.get(path, path): shape for path, shape in shapes.items()}
    for change in self.changes:
      want, have = getattr(change, when), shapes.get(change.path)
      if have != want:
        raise ValueError(
          f"{_paths.join(change.path)!r}: the plan expected {_paths.described(want)}, found"
          f" {_paths.described(have)}"
        )


def joined(changes: Iterable[LeafChange]) -> tuple[LeafChange, ...]:
  """One change for each leaf: those along several axes of it become one.

  Raises:
    ValueError: If two changes of a leaf are along the same axis, or one is by whole layers.
  """
  by_path: dict[_paths.Path, LeafChange] = {}
  for change in changes:
    other = by_path.get(change.path)
    if other is not None:
      if other.layers or change.layers:
        raise ValueError(
          f"{_paths.join(other.path)!r} is in both plans, and in one of them grows by whole layers:"
          " expected one plan at a time, the next when the gate of the first is merged"
        )
      shared = other.positions.keys() & change.positions.keys()
      if shared or other.before != change.before or other.before is None:
        raise ValueError(
          f"{_paths.join(other.path)!r} of shape {other.before} is in both plans, along axis"
          f" {sorted(shared)}: expected each axis once"
        )
      sizes = zip(other.before, other.after or (), change.after or (), strict=True)
      change = dataclasses.replace(
        other,
        after=tuple(m if m != n else k for n, k, m in sizes),
        role=other.role if other.role == change.role else "both",
        positions={**other.positions, **change.positions},
        spatial=other.spatial or change.spatial,
        outgoing=other.outgoing + change.outgoing,
      )
    by_path[change.path] = change
  return tuple(by_path.values())


def plan_for(plan: Plan, params: Any) -> Plan:
  """The plan with the paths that `params` has, be they all variables or a part of them.

  A plan for Linen's variables says "params/…", where an optimizer sees what is below.
  """
  prefix = plan.alpha[:-1]
  n = len(prefix)
  if not prefix or any(path[:n] == prefix for path in _trees.shapes(params)):
    return plan
  changes = (dataclasses.replace(c, path=c.path[n:]) for c in plan.changes if c.path[:n] == prefix)
  moved = {a[n:]: b[n:] for a, b in plan.moved.items() if a[:n] == prefix}
  return dataclasses.replace(plan, changes=tuple(changes), alpha=plan.alpha[n:], moved=moved)


def _shown(shape: Shape | None) -> str:
  return "-" if shape is None else "x".join(map(str, shape)) or "scalar"


def _added(change: LeafChange) -> int:
  before, after = (0 if s is None else math.prod(s) for s in (change.before, change.after))
  return after - before


def _reader(fresh: Any, old: Mapping[_paths.Path, Any]) -> Callable[..., Any]:
  """Fresh values of a tree, as a function `(path, shape, dtype) -> array`."""
  leaves = _paths.by_path(fresh)

  def read(path: _paths.Path, shape: Shape, dtype: Any) -> Any:
    leaf = leaves.get(path)
    if leaf is None or tuple(np.shape(leaf)) != shape:
      raise ValueError(
        f"fresh values of {_paths.join(path)!r}: expected shape {shape}, found"
        f" {_paths.described(None if leaf is None else tuple(np.shape(leaf)))}"
      )
    return leaf if path not in old else jnp.asarray(leaf, dtype)

  return read


def _grown(change: LeafChange, old: Any, fresh: Callable[..., Any]) -> Any:
  """A leaf at its new shape."""
  if change.sources is not None:
    return copied(change, old)
  new = fresh(change.path, change.after, None if old is None else jnp.asarray(old).dtype)
  if tuple(np.shape(new)) != change.after:
    raise ValueError(
      f"fresh values of {_paths.join(change.path)!r}: expected shape {change.after}, found"
      f" {np.shape(new)}"
    )
  if old is None:
    return jnp.asarray(new)
  old = jnp.asarray(old)
  # Fresh values may be on other devices than the old ones: they are cast on the host.
  new = np.asarray(new).astype(old.dtype)
  return _trees.placed(new, change.index, old, repr(_paths.join(change.path)))


def copied(change: LeafChange, old: Any, axis: int | None = None) -> Any:
  """What a leaf becomes, or what an optimizer keeps for it, whose new entries are copies of old.

  It lies on devices as the old one does. A random key gets another one in place of a copy.

  Args:
    change: The change, which has `sources`.
    old: The leaf, or what follows it and has the same axis, or lacks the same.
    axis: The axis; None: that of the leaf.

  Raises:
    ValueError: If the new size cannot be divided among the devices.
  """
  assert change.sources is not None
  old = jnp.asarray(old)
  axis = next(iter(change.positions)) if axis is None else axis
  is_key = jax.dtypes.issubdtype(old.dtype, jax.dtypes.prng_key)
  data = np.asarray(jax.random.key_data(old) if is_key else old)
  data = np.expand_dims(data, axis) if change.adds_axis else data
  value = np.take(data, change.sources, axis)
  if is_key:
    impl = jax.random.key_impl(old)
    for i in np.setdiff1d(np.arange(value.shape[axis]), change.positions[axis]).tolist():
      at = (*[slice(None)] * axis, i)
      keys = jax.random.wrap_key_data(jnp.asarray(value[at]), impl=impl)
      folded = jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys.reshape(-1))
      value[at] = jax.random.key_data(folded).reshape(value[at].shape)
    return jax.random.wrap_key_data(jnp.asarray(value), impl=impl)
  return _trees.like(value, old, repr(_paths.join(change.path)), axis=axis)


def _smaller(change: LeafChange, leaf: Any) -> Any:
  """A leaf at its new shape, which is smaller."""
  if not change.positions:
    return leaf
  what = repr(_paths.join(change.path))
  return _trees.taken(leaf, change.index, what, axis=next(iter(change.positions)))


def float_dtype(arrays: Iterable[Any]) -> Any:
  """The dtype of the first floating-point array, which the gate gets too."""
  dtypes = (jnp.asarray(x).dtype for x in arrays)
  return next((d for d in dtypes if jnp.issubdtype(d, jnp.floating)), jnp.float32)
