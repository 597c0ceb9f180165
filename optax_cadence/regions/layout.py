"""The groups of a tree: all regions with one cadence, and which tensors of which leaves they are.

A layout is computed while tracing, from the cadences and the shapes alone. It splits
a tree into one tree per group, in which the leaves of other groups are `MaskedNode`
(as `optax.partition` shows them) and a leaf cut into several tensors is a tuple.
"""

import collections
import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cadence import _paths
from optax_cadence.regions import cuts
from optax_cadence.regions.grids import Shape
from optax_cadence.schedules import phases
from optax_cadence.schedules.every import as_every
from optax_cadence.schedules.every import Every

# A tree as a dict from the position of a leaf to its array.
Leaves = dict[int, jax.Array]


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a group: which leaf it lies in, and where."""

  leaf: int
  cut: cuts.Cut


@dataclasses.dataclass(frozen=True)
class Group:
  """All regions with one cadence; they share an instance of the inner optimizer.

  Attributes:
    name: How the state calls it.
    every: Its cadence.
    tensors: Its regions, in the order of the leaves.
    masked: Those of its regions, entries of leaves under a mask, that it trains together with
      other groups; see `entrywise.masks`. They are not among `tensors`.
  """

  name: str
  every: Every
  tensors: tuple[Tensor, ...]
  masked: tuple[Tensor, ...] = ()

  def take(self, leaves: Mapping[int, jax.Array]) -> list[jax.Array]:
    """This group's tensors, out of the leaves of a tree by position."""
    return [t.cut.take(leaves[t.leaf]) for t in self.tensors]

  @property
  def leaves(self) -> list[int]:
    """The leaves that this group has a part of."""
    return sorted({t.leaf for t in (*self.tensors, *self.masked)})

  @property
  def in_pieces(self) -> bool:
    """Whether a leaf holds several of the group's tensors."""
    return len({t.leaf for t in self.tensors}) < len(self.tensors)


@dataclasses.dataclass(frozen=True)
class Layout:
  """The groups of a tree, and the paths and shapes of its leaves.

  Attributes:
    treedef: Structure of the tree.
    paths: Path of each leaf.
    shapes: Shape of each leaf.
    groups: The groups, in order of first appearance.
    has_masks: Whether a cadence is a mask.
  """

  treedef: Any
  paths: tuple[_paths.Path, ...]
  shapes: tuple[Shape, ...]
  groups: tuple[Group, ...]
  has_masks: bool = False

  @property
  def cycle(self) -> int | None:
    """Micro-steps after which the schedule repeats; None when a period is dynamic."""
    return phases.cycle(group.every for group in self.groups)

  @property
  def scattered(self) -> bool:
    """Whether tensors lie so that an elementwise optimizer could have them in a faster way."""
    return any(
      isinstance(t.cut, cuts.Entries) or cuts.can_fold(t.cut, self.shapes[t.leaf])
      for group in self.groups
      for t in group.tensors
    )

  @property
  def masked(self) -> list[int]:
    """The leaves under a mask that their groups train together."""
    return sorted({t.leaf for group in self.groups for t in group.masked})

  def name(self, leaf: int) -> str:
    """Path of a leaf as errors and tables show it."""
    return _paths.join(self.paths[leaf])

  def tree(self, group: Group, tensors: Sequence[Any]) -> Any:
    """The tree that the group's inner optimizer sees."""
    slots: list[Any] = [optax.MaskedNode()] * len(self.paths)
    for t, tensor in zip(group.tensors, tensors, strict=True):
      before = slots[t.leaf]
      if isinstance(before, optax.MaskedNode):
        slots[t.leaf] = tensor
      else:
        slots[t.leaf] = (*(before if isinstance(before, tuple) else (before,)), tensor)
    return self.treedef.unflatten(slots)

  def region_names(self) -> dict[str, tuple[str, ...]]:
    """For every group the names of its regions, in the order of its tensors.

    A region is called by the path of its leaf; several in one leaf are numbered, in the order of
    the groups.
    """
    regions = [
      (group.name, t.leaf) for group in self.groups for t in (*group.tensors, *group.masked)
    ]
    total = collections.Counter(leaf for _, leaf in regions)
    number: collections.Counter[int] = collections.Counter()
    names: dict[str, list[str]] = {group.name: [] for group in self.groups}
    for group, leaf in regions:
      path = self.paths[leaf]
      names[group].append(_paths.join((*path, str(number[leaf])) if total[leaf] > 1 else path))
      number[leaf] += 1
    return {group: tuple(name or "params" for name in found) for group, found in names.items()}


def leaves_of(tree: Any) -> Leaves:
  """The leaves of a tree by position, as `Group.take` reads them."""
  return dict(enumerate(map(jnp.asarray, jax.tree.leaves(tree))))


def layout(every: Any, tree: Any, known: "Sequence[Given] | None" = None) -> Layout:
  """Resolves the cadences of a tree.

  Args:
    every: A tree prefix of `tree` whose leaves are cadences, matched by key path; or
      a callable from `tree` to one.
    tree: Parameters, or gradients of the same structure; only shapes are read.
    known: What `declared(every)` returns.

  Returns:
    The layout, groups in order of first appearance. A cadence that no leaf of this tree has,
    as where a part of it is masked away, has a group without tensors: so a state has the same
    groups whatever part of the tree it is for.

  Raises:
    ValueError: If a leaf has no cadence, a cadence no leaf, or one does not fit.
  """
  leaves, treedef = jax.tree.flatten(tree)
  paths = [path for path, _ in _paths.flatten_with_paths(tree)]
  given = _called(every, tree) if callable(every) else every
  everys: dict[Hashable, Every] = {}
  tensors: dict[Hashable, list[Tensor]] = {}
  cadences = _match(given, paths, tree)
  for i, (path, leaf, cadence) in enumerate(zip(paths, leaves, cadences, strict=True)):
    for cell, cut in _cut(path, np.shape(leaf), cadence):
      cell_every = as_every(cell)
      everys.setdefault(cell_every.key, cell_every)
      tensors.setdefault(cell_every.key, []).append(Tensor(i, cut))
  known = declared(given) if known is None else known
  assert known is not None
  names = group_names(known)
  for absent in known:
    everys.setdefault(absent.every.key, absent.every)
  return Layout(
    treedef,
    tuple(paths),
    tuple(np.shape(leaf) for leaf in leaves),
    tuple(Group(names[key], e, tuple(tensors.get(key, ()))) for key, e in everys.items()),
    any(cell.of_mask for cell in known),
  )


class Given(NamedTuple):
  """A cadence as it stands in `every`.

  Attributes:
    place: Where: a path, or a pattern.
    every: The cadence.
    of_mask: Whether it is the period of some entries of a mask.
  """

  place: str
  every: Every
  of_mask: bool


def declared(every: Any) -> list[Given] | None:
  """All cadences that `every` has, whatever the parameters, repeated ones too.

  Returns:
    The cadences; None for a function of the parameters that does not say what it may return, as
    `by_path` does in its attribute `cadences`.

  Raises:
    ValueError: If one is malformed.
  """
  if callable(every):
    cadences = getattr(every, "cadences", None)
    if cadences is None:
      return None
    given: list[tuple[_paths.Path, str, Any]] = [((), place, c) for place, c in cadences]
  else:
    rows = _paths.flatten_with_paths(every)
    given = [(path, _paths.join(path), cadence) for path, cadence in rows]
  cells = []
  for path, place, cadence in given:
    with naming(path):
      mask = cuts.is_mask(cadence)
      cells += [Given(place, as_every(period), mask) for period in cuts.periods_of(cadence)]
  return cells


def group_names(given: Sequence[Given]) -> dict[Hashable, str]:
  """A name for the group of each cadence, by its key.

  It is what the cadence is called: "8", "8 (offset 3)", "until_certain(1.0, 2-64)". Of several
  cadences called the same, such as two policies, it says also where they are given. It does not
  depend on the order of the groups.
  """
  first: dict[Hashable, Given] = {}
  for cell in given:
    first.setdefault(cell.every.key, cell)
  called = collections.Counter(cell.every.name for cell in first.values())
  names: dict[Hashable, str] = {}
  for key, (place, every, _) in first.items():
    name = f"{every.name} of {place}" if called[every.name] > 1 and place else every.name
    names[key] = _paths.unused(name, names.values())
  return names


def _called(every: Callable[[Any], Any], tree: Any) -> Any:
  try:
    return every(tree)
  except TypeError as error:
    raise ValueError(
      "every, when callable, must be a function of the parameters; one schedule for the whole"
      f" tree is Every(schedule). Found {every!r}, which failed with: {error}"
    ) from error


def _cut(path: _paths.Path, shape: Shape, cadence: Any) -> list[tuple[Any, cuts.Cut]]:
  """The cuts of a leaf, each with its cadence."""
  with naming(path, f" of shape {shape}"):
    if not (isinstance(cadence, cuts.Grid) or cuts.is_mask(cadence)):
      return [(as_every(cadence), cuts.Whole())]
    return cuts.cut(cadence, shape, lambda cell: as_every(cell).key)


class naming:
  """Lets an error that is raised inside say which leaf the cadence is for."""

  def __init__(self, path: _paths.Path, what: str = "") -> None:
    self.where = f"cadence of {_paths.join(path)!r}{what}" if path else "cadence"

  def __enter__(self) -> None: ...

  def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
    if isinstance(error, ValueError):
      raise ValueError(f"{self.where}: {error}") from None


def _match(every: Any, paths: list[_paths.Path], tree: Any) -> list[Any]:
  """The cadence of each path: the leaf of `every` whose path is a prefix of it."""
  given = dict(_paths.flatten_with_paths(every))
  used, cadences = set(), []
  for path in paths:
    prefix = next((path[:n] for n in range(len(path) + 1) if path[:n] in given), None)
    if prefix is None:
      raise ValueError(
        f"no cadence for {_paths.join(path)!r}: expected every to be a prefix of the"
        f" parameters, found cadences for {_paths.listed(given)}"
      )
    used.add(prefix)
    cadences.append(given[prefix])
  for path in given.keys() - used - {()}:
    if not _is_masked(path, tree):
      raise ValueError(
        f"cadence of {_paths.join(path)!r}: no parameter is there; expected a prefix of"
        f" {_paths.listed(paths)}"
      )
  return cadences


def _is_masked(path: _paths.Path, tree: Any) -> bool:
  """Whether a path lies in, or holds nothing but, subtrees that have no leaves."""
  empty = _paths.flatten_with_paths(tree, is_leaf=_is_empty)
  holes = [p for p, node in empty if _is_empty(node)]
  return any(path[: len(p)] == p or p[: len(path)] == path for p in holes)


def _is_empty(node: Any) -> bool:
  return node is None or isinstance(node, optax.MaskedNode)
