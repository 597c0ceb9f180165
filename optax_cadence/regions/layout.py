"""The groups of a tree: all regions with one cadence, and which tensors of which leaves they are.

A layout is computed while tracing, from the cadences and the shapes alone. It splits
a tree into one tree per group, in which the leaves of other groups are `MaskedNode`
(as `optax.partition` shows them) and a leaf cut into several tensors is a tuple.
"""

import collections
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cadence import _checks
from optax_cadence import _paths
from optax_cadence.regions import cuts
from optax_cadence.regions import partitions
from optax_cadence.regions.cuts import Shape
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
    regions: All its regions: those under masks come last.
    leaves: The leaves that it has a part of.
    in_pieces: Whether a leaf holds several of its tensors.
  """

  name: str
  every: Every
  tensors: tuple[Tensor, ...]
  masked: tuple[Tensor, ...] = ()
  regions: tuple[Tensor, ...] = dataclasses.field(init=False)
  leaves: tuple[int, ...] = dataclasses.field(init=False)
  in_pieces: bool = dataclasses.field(init=False)

  def __post_init__(self) -> None:
    regions, leaf_of = self.tensors + self.masked, operator.attrgetter("leaf")
    leaves_of_tensors = set(map(leaf_of, self.tensors))
    object.__setattr__(self, "regions", regions)
    object.__setattr__(self, "leaves", tuple(sorted(set(map(leaf_of, regions)))))
    object.__setattr__(self, "in_pieces", len(leaves_of_tensors) < len(self.tensors))

  def take(self, leaves: Mapping[int, jax.Array]) -> list[jax.Array]:
    """This group's tensors, out of the leaves of a tree by position."""
    tensors = []
    for t in self.tensors:
      leaf = leaves[t.leaf]
      if isinstance(t.cut, cuts.Whole):
        tensors.append(leaf)
      elif isinstance(leaf, jax.ShapeDtypeStruct):
        tensors.append(jax.eval_shape(t.cut.take, leaf))
      else:
        tensors.append(cuts.read(leaf, t.cut))
    return tensors


@dataclasses.dataclass(frozen=True)
class Layout:
  """The groups of a tree, and the paths and shapes of its leaves.

  Attributes:
    treedef: Structure of the tree.
    paths: Path of each leaf.
    shapes: Shape of each leaf.
    groups: The groups, in order of first appearance.
    has_masks: Whether a cadence is a mask, or another partition that `has_entries`.
    scattered: Whether tensors lie so that an elementwise optimizer could have them in a faster way;
      see `entrywise.choice`.
    masked: The leaves under masks that their groups train together.
  """

  treedef: Any
  paths: tuple[_paths.Path, ...]
  shapes: tuple[Shape, ...]
  groups: tuple[Group, ...]
  has_masks: bool = False
  scattered: bool = False
  masked: tuple[int, ...] = ()

  @property
  def everys(self) -> dict[str, Every]:
    """The cadence of each group, by its name."""
    return {group.name: group.every for group in self.groups}

  @property
  def cycle(self) -> int | None:
    """Micro-steps after which the schedule repeats; None when a period is dynamic."""
    return phases.cycle(self.everys.values())

  @functools.cached_property
  def names(self) -> list[str]:
    """The name of each leaf."""
    return _paths.names(self.paths)

  def name(self, leaf: int) -> str:
    """The name of a leaf, as errors and tables show it."""
    return self.names[leaf]

  def tree(self, group: Group, tensors: Sequence[Any]) -> Any:
    """The tree that the group's inner optimizer sees.

    It has these in the place of the group's tensors, or of its regions, if they are as many.
    """
    regions = group.tensors if len(tensors) == len(group.tensors) else group.regions
    parts: dict[int, list[Any]] = {}
    for t, tensor in zip(regions, tensors, strict=True):
      parts.setdefault(t.leaf, []).append(tensor)
    return self.tree_of(parts)

  def tree_of(self, parts: Mapping[int, Sequence[Any]]) -> Any:
    """The tree in which each of these leaves is one tensor, or a tuple of several."""
    slots: list[Any] = [optax.MaskedNode()] * len(self.paths)
    for leaf, tensors in parts.items():
      slots[leaf] = tensors[0] if len(tensors) == 1 else tuple(tensors)
    return self.treedef.unflatten(slots)

  @property
  def folded(self) -> list[int]:
    """The leaves whose bands keep their fold."""
    tensors = (t for group in self.groups for t in group.tensors)
    return sorted({t.leaf for t in tensors if isinstance(t.cut, cuts.FoldedBands)})

  def region_names(self) -> dict[str, tuple[str, ...]]:
    """For every group the names of its regions, in the order of its tensors.

    A region is called by the name of its leaf; several in one leaf are numbered, in the order of
    the groups.
    """
    leaves = [t.leaf for group in self.groups for t in group.regions]
    total, number = collections.Counter(leaves), collections.Counter[int]()
    called = []
    for leaf in leaves:
      name = self.name(leaf)
      if total[leaf] > 1:
        name = f"{name}/{number[leaf]}" if name else f"{number[leaf]}"
        number[leaf] += 1
      called.append(name)
    # Where leaves give the same name, which has it does not depend on the groups.
    order = sorted(range(len(leaves)), key=leaves.__getitem__)
    for i, name in zip(order, _paths.distinct(called[i] for i in order), strict=True):
      called[i] = name or "params"
    names = iter(called)
    return {group.name: tuple(next(names) for _ in group.regions) for group in self.groups}


def leaves_of(tree: Any) -> Leaves:
  """The leaves of a tree by position, as `Group.take` reads them."""
  leaves: dict[int, Any] = {}
  for i, x in enumerate(jax.tree.leaves(tree)):
    # `init` may be given shapes alone.
    leaves[i] = x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)
  return leaves


def with_leaves(tree: Any, leaves: Leaves) -> Any:
  """The tree with these leaves, in order, in the place of its own."""
  return jax.tree.unflatten(jax.tree.structure(tree), leaves.values())


class Cadences(NamedTuple):
  """All cadences that `every` has.

  Attributes:
    by_path: What stands at each path of `every`: an `Every`, or a `Partition` of them. None for a
      function of the parameters.
    everys: Every cadence in them, by its key.
    names: The name of its group, by its key.
    has_masks: Whether there is a mask, or another partition that `has_entries`.
  """

  by_path: dict[_paths.Path, Any] | None
  everys: dict[Hashable, Every]
  names: dict[Hashable, str]
  has_masks: bool

  @property
  def by_name(self) -> dict[str, Every]:
    """Every cadence, by the name of its group."""
    return {self.names[key]: every for key, every in self.everys.items()}


def cadences_of(every: Any) -> Cadences | None:
  """All cadences that `every` has, whatever the parameters.

  Returns:
    The cadences; None for a function of the parameters that does not say what it may return, as
    `by_path` does in its attribute `cadences`.

  Raises:
    ValueError: If one is malformed.
  """
  by_path: dict[_paths.Path, Any] | None = None
  if callable(every):
    if getattr(every, "cadences", None) is None:
      return None
    given: list[tuple[_paths.Path, str, Any]] = [((), place, c) for place, c in every.cadences]
  else:
    by_path = _paths.by_path(every)
    given = [
      (path, place, cadence)
      for (path, cadence), place in zip(by_path.items(), _paths.names(by_path), strict=True)
    ]
  everys: dict[Hashable, Every] = {}
  places: dict[Hashable, str] = {}
  has_masks = False
  for path, place, cadence in given:
    try:
      partition = partitions.as_partition(cadence)
      resolved = as_every(cadence) if partition is None else partition.map(as_every)
    except ValueError as error:
      if by_path is None:
        return None  # with parameters the error can say which one it is for
      raise named(error, place) from None
    if by_path is not None:
      by_path[path] = resolved
    has_masks |= partition is not None and partition.has_entries
    for cell in [resolved] if isinstance(resolved, Every) else _mapped(resolved, place):
      everys.setdefault(cell.key, cell)
      places.setdefault(cell.key, place)
  return Cadences(by_path, everys, _group_names(everys, places), has_masks)


def _mapped(partition: partitions.Partition, place: str) -> list[Every]:
  """The cadences of a partition, after `map` has put an `Every` in place of each."""
  cells = partition.cells
  if not (cells and all(isinstance(cell, Every) for cell in cells)):
    raise named(
      f"{type(partition).__name__}.map(fn) must return the partition with fn(cadence) for every"
      f" cadence, found cells {_checks.shown(cells)}",
      place,
    )
  return cells


def _group_names(
  everys: Mapping[Hashable, Every], places: Mapping[Hashable, str]
) -> dict[Hashable, str]:
  """A name for the group of each cadence, by its key.

  It is what the cadence is called: "8", "8 (offset 3)", "until_certain(1.0, 2-64)". Of several
  cadences called the same, such as two policies, it says also where they are given. It does not
  depend on the order of the groups.
  """
  called = collections.Counter(every.name for every in everys.values())
  names: dict[Hashable, str] = {}
  for key, every in everys.items():
    name, place = every.name, places[key]
    name = f"{name} of {place}" if called[name] > 1 and place else name
    names[key] = _paths.unused(name, names.values())
  return names


def layout(every: Any, tree: Any, known: Cadences | None = None) -> Layout:
  """Resolves the cadences of a tree.

  Args:
    every: A tree prefix of `tree` whose leaves are cadences, matched by key path; or
      a callable from `tree` to one.
    tree: Parameters, or gradients of the same structure; only shapes are read.
    known: What `cadences_of(every)` returns.

  Returns:
    The layout, groups in order of first appearance. A cadence that no leaf of this tree has,
    as where a part of it is masked away, has a group without tensors: so a state has the same
    groups whatever part of the tree it is for.

  Raises:
    ValueError: If a leaf has no cadence, a cadence no leaf, or one does not fit.
  """
  rows = _paths.flatten_with_paths(tree)
  paths, leaves = zip(*rows, strict=True) if rows else ((), ())
  shapes = tuple(map(np.shape, leaves))
  resolved = known
  if known is None or known.by_path is None:
    resolved = cadences_of(_called(every, tree) if callable(every) else every)
    known = known or resolved
  assert known is not None
  assert resolved is not None
  scattered = False
  tensors: dict[Hashable, list[Tensor]] = {}
  for i, cadence in enumerate(_match(resolved, paths, tree)):
    if isinstance(cadence, Every):
      tensors.setdefault(cadence.key, []).append(Tensor(i, cuts.Whole()))
      continue
    try:
      parts = cadence.cut(shapes[i], operator.attrgetter("key"))
    except ValueError as error:
      raise named(error, _paths.names(paths)[i], f" of shape {shapes[i]}") from None
    for cell, cut in parts:
      tensors.setdefault(cell.key, []).append(Tensor(i, cut))
      scattered |= isinstance(cut, cuts.Entries) or cuts.can_fold(cut, shapes[i])
  groups = []
  for key in dict.fromkeys([*tensors, *known.everys]):
    if key not in known.names:
      raise named(
        "expected one that was listed beforehand, in the cells of a partition or the attribute"
        " cadences of a function, found another",
        _paths.names(paths)[tensors[key][0].leaf],
      )
    cadence = known.everys.get(key) or resolved.everys[key]
    groups.append(Group(known.names[key], cadence, tuple(tensors.get(key, ()))))
  treedef = jax.tree.structure(tree)
  return Layout(treedef, paths, shapes, tuple(groups), known.has_masks, scattered)


def check_cuts(layout: Layout) -> None:
  """Raises `ValueError` if a partition does not keep to what `Partition.cut` has to return."""
  sizes = [0] * len(layout.shapes)
  for group in layout.groups:
    kinds: dict[int, type] = {}
    for t in group.tensors:
      shape, kind = layout.shapes[t.leaf], type(t.cut)
      sizes[t.leaf] += t.cut.size(shape)
      first = kinds.setdefault(t.leaf, kind)
      if first is not kind:
        raise named(
          f"expected cuts of one class for the cadence {group.name}, found {first.__name__} and"
          f" {kind.__name__}",
          layout.name(t.leaf),
          f" of shape {shape}",
        )
  for i, (size, shape) in enumerate(zip(sizes, layout.shapes, strict=True)):
    if size != math.prod(shape):
      raise named(
        f"expected tensors that hold each of its {math.prod(shape)} entries once, found tensors of"
        f" {size} entries",
        layout.name(i),
        f" of shape {shape}",
      )


def _called(every: Callable[[Any], Any], tree: Any) -> Any:
  """The cadences that a function of the parameters returns, or a function that it returns."""
  try:
    found = every(tree)
  except TypeError as error:
    raise ValueError(
      "every, when callable, must be a function of the parameters; one schedule for the whole"
      f" tree is Every(schedule). Found {_checks.shown(every)}, which failed with: {error}"
    ) from error
  return _called(found, tree) if callable(found) else found


def named(error: Exception | str, name: str, what: str = "") -> ValueError:
  """An error that says which leaf the cadence is for."""
  where = f"cadence of {name!r}{what}" if name else "cadence"
  return ValueError(f"{where}: {error}")


def _match(cadences: Cadences, paths: Sequence[_paths.Path], tree: Any) -> list[Any]:
  """The cadence of each path: the one that is given for a prefix of it."""
  given, used, result = cadences.by_path, set(), []
  assert given is not None
  for i, path in enumerate(paths):
    prefix = _paths.prefix_of(path, given)
    if prefix is None:
      name = repr(_paths.names(paths)[i]) if path else "the parameter"
      raise ValueError(
        f"no cadence for {name}: expected every to be a prefix of the parameters, found"
        f" cadences for {_paths.listed(given)}{_on_lists(path, given)}"
      )
    used.add(prefix)
    result.append(given[prefix])
  for i, path in enumerate(given):
    if path and path not in used and not _is_masked(path, tree):
      name = _paths.names(given)[i]
      raise ValueError(
        f"cadence of {name!r}: no parameter is there; expected a prefix of {_paths.listed(paths)}"
      )
  return result


def _on_lists(path: _paths.Path, given: Iterable[_paths.Path]) -> str:
  """A hint for the error, where a list of cadences stands at or above a parameter without one."""
  for other in given:
    n = len(other) - 1
    if other and other[-1] == "0" and path[:n] == other[:n]:
      return (
        "; a list or tuple is a part of the tree: periods for the bands of an axis are"
        " oc.channels([...]), an offset is oc.Every(period, offset)"
      )
  return ""


def _is_masked(path: _paths.Path, tree: Any) -> bool:
  """Whether a path lies in, or holds nothing but, subtrees that have no leaves."""
  empty = _paths.flatten_with_paths(tree, is_leaf=_is_empty)
  holes = [p for p, node in empty if _is_empty(node)]
  return any(path[: len(p)] == p or p[: len(path)] == path for p in holes)


def _is_empty(node: Any) -> bool:
  return node is None or isinstance(node, optax.MaskedNode)
