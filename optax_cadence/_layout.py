"""Which tensors each group trains: the regions of a whole tree, sorted by cadence.

A layout is computed while tracing, from the cadences and the shapes alone. It splits
a tree into one tree per group, in which the leaves of other groups are `MaskedNode`
(as `optax.partition` shows them) and a leaf cut into several tensors is a tuple.
"""

import dataclasses
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cadence import _paths
from optax_cadence import _regions
from optax_cadence import _schedules


class Regions(NamedTuple):
  """Stands for a leaf of which a group has regions, in a tree without a single array.

  Attributes:
    parts: An empty tuple for each of the regions.
    split: One more where the group has them as bands of which the axis is split.
  """

  parts: tuple[tuple[()], ...]
  split: tuple[tuple[()], ...] = ()


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a group: which leaf it lies in, and where."""

  leaf: int
  cut: _regions.Cut


@dataclasses.dataclass(frozen=True)
class Group:
  """All regions with one cadence; they share an instance of the inner optimizer."""

  every: _schedules.Every
  tensors: tuple[Tensor, ...]

  def take(self, leaves: Mapping[int, jax.Array]) -> list[jax.Array]:
    """This group's tensors, out of the leaves of a tree by position."""
    return [t.cut.take(leaves[t.leaf]) for t in self.tensors]

  def put(
    self, leaves: Mapping[int, jax.Array], tensors: Sequence[jax.Array]
  ) -> dict[int, jax.Array]:
    """The leaves with this group's tensors written into them."""
    leaves = dict(leaves)
    for t, tensor in zip(self.tensors, tensors, strict=True):
      leaf = leaves[t.leaf]
      leaves[t.leaf] = t.cut.put(t.cut.view(leaf), tensor).reshape(leaf.shape)
    return leaves

  @property
  def leaves(self) -> list[int]:
    """The leaves that this group has a part of."""
    return sorted({t.leaf for t in self.tensors})

  @property
  def in_pieces(self) -> bool:
    """Whether a leaf holds several of the group's tensors."""
    return len(self.leaves) < len(self.tensors)


@dataclasses.dataclass(frozen=True)
class Layout:
  """The groups of a tree."""

  treedef: Any
  paths: tuple[_paths.Path, ...]
  shapes: tuple[_regions.Shape, ...]
  groups: tuple[Group, ...]

  def name(self, leaf: int) -> str:
    """Path of a leaf as errors and tables show it."""
    return _paths.join(self.paths[leaf])

  def avals(self, dtypes: Mapping[int, Any]) -> dict[int, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the leaves, by position."""
    return {i: jax.ShapeDtypeStruct(self.shapes[i], dtype) for i, dtype in dtypes.items()}

  def tree(self, group: Group, tensors: Sequence[Any]) -> Any:
    """The tree that the group's inner optimizer sees."""
    slots: list[list[Any]] = [[] for _ in self.paths]
    for t, tensor in zip(group.tensors, tensors, strict=True):
      slots[t.leaf].append(tensor)
    one = {0: lambda _: optax.MaskedNode(), 1: lambda slot: slot[0]}
    return self.treedef.unflatten([one.get(len(slot), tuple)(slot) for slot in slots])

  def only(self, leaf: int, x: Any) -> Any:
    """A tree that has this leaf alone."""
    slots = [x if i == leaf else optax.MaskedNode() for i in range(len(self.paths))]
    return self.treedef.unflatten(slots)

  def recut(
    self, leaves: Collection[int], change: Callable[[_regions.Cut, _regions.Shape], _regions.Cut]
  ) -> "Layout":
    """The layout in which the cuts of these leaves are changed."""

    def new(t: Tensor) -> Tensor:
      return Tensor(t.leaf, change(t.cut, self.shapes[t.leaf])) if t.leaf in leaves else t

    groups = (dataclasses.replace(g, tensors=tuple(map(new, g.tensors))) for g in self.groups)
    return dataclasses.replace(self, groups=tuple(groups)) if leaves else self

  def regions(self, group: Group) -> Any:
    """The tree of a group with `Regions` for leaves, which a state can hold: it has no arrays."""
    cuts: list[list[_regions.Cut]] = [[] for _ in self.paths]
    for t in group.tensors:
      cuts[t.leaf].append(t.cut)
    return self.treedef.unflatten([_named(here) if here else optax.MaskedNode() for here in cuts])


def _named(cuts: Sequence[_regions.Cut]) -> Regions:
  split = [() for cut in cuts if isinstance(cut, _regions.SplitBands)]
  return Regions(((),) * len(cuts), tuple(split))


def leaves(tree: Any) -> dict[int, jax.Array]:
  """The leaves of a tree by position, as `Group.take` reads them."""
  return dict(enumerate(map(jnp.asarray, jax.tree.leaves(tree))))


def layout(every: Any, tree: Any) -> Layout:
  """Resolves the cadences of a tree.

  Args:
    every: A tree prefix of `tree` whose leaves are cadences, matched by key path; or
      a callable from `tree` to one.
    tree: Parameters, or gradients of the same structure; only shapes are read.

  Returns:
    The layout, groups in order of first appearance.

  Raises:
    ValueError: If a leaf has no cadence, a cadence no leaf, or one does not fit.
  """
  leaves, treedef = jax.tree.flatten(tree)
  paths = [path for path, _ in _paths.flatten_with_paths(tree)]
  cadences = _match(_called(every, tree) if callable(every) else every, paths, tree)
  groups: dict[Hashable, tuple[_schedules.Every, list[Tensor]]] = {}
  for i, (path, leaf, cadence) in enumerate(zip(paths, leaves, cadences, strict=True)):
    for one, cut in _cut(path, np.shape(leaf), cadence):
      groups.setdefault(one.key, (one, []))[1].append(Tensor(i, cut))
  return Layout(
    treedef,
    tuple(paths),
    tuple(np.shape(leaf) for leaf in leaves),
    tuple(Group(one, tuple(tensors)) for one, tensors in groups.values()),
  )


def _called(every: Callable[[Any], Any], tree: Any) -> Any:
  try:
    return every(tree)
  except TypeError as error:
    raise ValueError(
      "every, when callable, must be a function of the parameters; one schedule for the whole"
      f" tree is Every(schedule). Found {every!r}, which failed with: {error}"
    ) from error


def everys(every: Any) -> list[_schedules.Every]:
  """All cadences that occur in a tree of cadences, repeated ones too.

  Raises:
    ValueError: If one is malformed.
  """
  found = []
  for path, cadence in _paths.flatten_with_paths(every):
    found += named(
      path, lambda c: [_schedules.as_every(p) for p in _regions.periods_of(c)], cadence
    )
  return found


def _cut(
  path: _paths.Path, shape: _regions.Shape, cadence: Any
) -> list[tuple[_schedules.Every, _regions.Cut]]:
  def cut(cadence: Any) -> list[tuple[_schedules.Every, _regions.Cut]]:
    cuts = _regions.cut(cadence, shape, lambda cell: _schedules.as_every(cell).key)
    return [(_schedules.as_every(one), cut) for one, cut in cuts]

  return named(path, cut, cadence, f" of shape {shape}")


def named(path: _paths.Path, fn: Callable[[Any], Any], cadence: Any, what: str = "") -> Any:
  """Calls `fn(cadence)`; an error names the leaf that the cadence is for."""
  try:
    return fn(cadence)
  except ValueError as error:
    where = f"cadence of {_paths.join(path)!r}{what}" if path else "cadence"
    raise ValueError(f"{where}: {error}") from None


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
