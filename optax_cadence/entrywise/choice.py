"""Which leaves are trained entry by entry: chosen at `init`, and told by the state from then on.

Leaves under masks are trained by one pass for all periods, in place of a vector for each; regular
bands of an axis keep their fold, in place of being joined.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from optax_cadence import _paths
from optax_cadence._inner import Inner
from optax_cadence._state import CadenceState
from optax_cadence.entrywise import proof
from optax_cadence.programs import reading
from optax_cadence.regions import cuts
from optax_cadence.regions.layout import Group
from optax_cadence.regions.layout import Layout
from optax_cadence.regions.layout import Tensor

# Groups of one leaf that a code of one bit each can tell apart.
MAX_GROUPS = 32

# Why a leaf under a mask is not trained by one pass, by its position; None where it is.
Reasons = dict[int, str | None]


def choose(inner: Inner, layout: Layout, dtypes: Sequence[Any]) -> tuple[Layout, Reasons]:
  """The layout of a new state.

  Args:
    inner: The inner optimizer.
    layout: The groups of the parameters.
    dtypes: Dtypes in which it gets the mean of each leaf.

  Returns:
    The layout, and for each leaf under a mask why it is not trained by one pass.
  """
  reasons = mask_reasons(inner, layout, dtypes)
  layout = _with_masked(layout, [i for i, reason in reasons.items() if reason is None])
  return _folded(layout, _leaves_to_fold(inner, layout, dtypes)), reasons


def mask_reasons(inner: Inner, layout: Layout, dtypes: Sequence[Any]) -> Reasons:
  """Why the entries of a leaf under a mask cannot be trained by one pass; None where they can."""
  groups = _under_masks(layout)
  reasons: Reasons = {
    leaf: f"more than {MAX_GROUPS} periods" if len(names) > MAX_GROUPS else None
    for leaf, names in groups.items()
  }
  while True:
    # One that falls into vectors after all is another leaf to the optimizer than it was here.
    refused = _refused(inner, layout, dtypes, [i for i, x in reasons.items() if x is None])
    if not refused:
      return reasons
    reasons |= refused


def _refused(
  inner: Inner, layout: Layout, dtypes: Sequence[Any], leaves: Sequence[int]
) -> dict[int, str]:
  """Which of these leaves cannot be trained by one pass if the others are, each with the reason."""
  refused: dict[int, str] = {}
  moments: dict[int, Mapping[Any, int]] = {}
  groups, layout = _under_masks(layout), _with_masked(layout, leaves)
  try:
    for leaf in leaves:
      entries = jax.ShapeDtypeStruct(layout.shapes[leaf], dtypes[leaf])
      found = proof.moments(inner.any, layout, leaf, entries)
      if isinstance(found, str):
        refused[leaf] = f"{found} in its init"
      else:
        moments[leaf] = found
    needed = {name for leaf in moments for name in groups[leaf]}
    programs = {
      group.name: proof.trace(inner.of(group.every), layout, group, dtypes)
      for group in layout.groups
      if group.name in needed
    }
  except proof.REFUSALS as error:
    return dict.fromkeys(leaves, f"an update that needs more than gradients ({error})")
  for leaf, paths in moments.items():
    updates = [programs[name] for name in groups[leaf]]
    if any(path not in update.state for path in paths for update in updates):
      refused[leaf] = "an optimizer that differs from period to period"
      continue
    reason = proof.coupled(updates, leaf, moments)
    if reason is not None:
      refused[leaf] = reason
  return refused


def as_in_state(layout: Layout, state: CadenceState) -> Layout:
  """The layout that a state was made with.

  Raises:
    ValueError: If the state has entries of a leaf that is under no mask here.
  """
  masked = state.regions.masked
  known = {layout.paths[leaf]: leaf for leaf in _under_masks(layout)}
  if not known.keys() >= masked.keys():
    raise ValueError(
      f"state: expected leaves under masks to be {_paths.listed(known)}, found"
      f" {_paths.listed(masked)}; a state goes with the cadences it was made for"
    )
  layout = _with_masked(layout, [known[path] for path in masked])
  folded = state.regions.folded
  return _folded(layout, [i for i, path in enumerate(layout.paths) if path in folded])


def check_extra_args(
  inner: Inner, layout: Layout, dtypes: Sequence[Any], extra_args: Mapping[str, Any]
) -> None:
  """Raises `ValueError` where extra arguments make a difference to bands that keep their fold."""
  folded = {
    t.leaf for group in layout.groups for t in group.tensors if isinstance(t.cut, cuts.FoldedBands)
  }
  if not (folded and extra_args):
    return
  for leaf in folded - _leaves_to_fold(inner, _unfolded(layout), dtypes, extra_args):
    raise ValueError(
      f"update of {layout.name(leaf)!r}: expected an inner optimizer that treats entries one by"
      " one, as it did when the state was made, found that these extra arguments make a difference:"
      f" {', '.join(extra_args)}"
    )


def _under_masks(layout: Layout) -> dict[int, list[str]]:
  """The leaves that fall into a vector of entries for each group, with the names of the groups."""
  found: dict[int, list[str]] = {}
  others: set[int] = set()
  for group in layout.groups:
    for t in group.tensors:
      names = found.setdefault(t.leaf, [])
      if not isinstance(t.cut, cuts.Entries) or group.name in names:
        others.add(t.leaf)
      names.append(group.name)
  return {leaf: names for leaf, names in found.items() if layout.has_masks and leaf not in others}


def _with_masked(layout: Layout, leaves: Collection[int]) -> Layout:
  """The layout in which groups have the entries of these leaves together."""
  if not leaves:
    return layout
  groups = []
  for group in layout.groups:
    masked = tuple(t for t in group.tensors if t.leaf in leaves)
    tensors = tuple(t for t in group.tensors if t.leaf not in leaves)
    groups.append(dataclasses.replace(group, tensors=tensors, masked=masked))
  return dataclasses.replace(layout, groups=tuple(groups), masked=tuple(sorted(leaves)))


def _folded(layout: Layout, leaves: Collection[int]) -> Layout:
  """The layout in which the bands of these leaves keep their fold."""

  def fold(t: Tensor) -> Tensor:
    if t.leaf not in leaves or not cuts.can_fold(t.cut, layout.shapes[t.leaf]):
      return t
    assert isinstance(t.cut, cuts.Bands)
    return Tensor(t.leaf, cuts.FoldedBands(t.cut.axis, t.cut.intervals))

  return _with_tensors(layout, fold) if leaves else layout


def _unfolded(layout: Layout) -> Layout:
  """The layout in which bands are joined."""

  def join(t: Tensor) -> Tensor:
    if not isinstance(t.cut, cuts.FoldedBands):
      return t
    return Tensor(t.leaf, cuts.Bands(t.cut.axis, t.cut.intervals))

  return _with_tensors(layout, join)


def _with_tensors(layout: Layout, change: Any) -> Layout:
  """The layout with every tensor changed by a function."""
  groups = (
    dataclasses.replace(group, tensors=tuple(map(change, group.tensors))) for group in layout.groups
  )
  return dataclasses.replace(layout, groups=tuple(groups))


def _leaves_to_fold(
  inner: Inner,
  layout: Layout,
  dtypes: Sequence[Any],
  extra_args: Mapping[str, Any] | None = None,
) -> set[int]:
  """The leaves whose bands can keep their fold, as it makes no difference to the optimizer."""
  candidates = {
    t.leaf
    for group in layout.groups
    for t in group.tensors
    if cuts.can_fold(t.cut, layout.shapes[t.leaf])
  }
  folded = _folded(layout, candidates)
  refused: set[int] = set()
  try:
    for joined, kept in zip(layout.groups, folded.groups, strict=True):
      pair = (layout, joined), (folded, kept)
      refused |= _leaves_that_notice(inner, pair, candidates, dtypes, extra_args)
  except proof.REFUSALS:
    return set()
  return candidates - refused


def _leaves_that_notice(
  inners: Inner,
  pair: tuple[tuple[Layout, Group], tuple[Layout, Group]],
  candidates: Collection[int],
  dtypes: Sequence[Any],
  extra_args: Mapping[str, Any] | None,
) -> set[int]:
  """The leaves with bands in a group, joined and folded, that the optimizer might treat otherwise.

  It does not if it runs the same program on both, and that treats their entries one by one.
  """
  layout, group = pair[0]
  mine = {t.leaf: t for t in group.tensors if t.leaf in candidates}
  if not mine:
    return set()
  programs, inits = [], []
  for one_layout, one_group in pair:
    inner = inners.of(one_group.every)
    programs.append(proof.trace(inner, one_layout, one_group, dtypes, extra_args))
    tensors = proof.tree_of(one_layout, proof.shapes_of(one_group, one_layout, dtypes))
    inits.append(reading.traced(inner.init, tensors))
  if not (proof.alike(programs[0].program, programs[1].program) and proof.alike(*inits)):
    return set(mine)
  moments = {}
  for leaf in mine:
    (tensor,) = proof.shapes_of(group, layout, dtypes)[leaf]
    moments[leaf] = proof.moments(inners.of(group.every), layout, leaf, tensor)
  noticed = {leaf for leaf, found in moments.items() if isinstance(found, str)}
  known = {leaf: found for leaf, found in moments.items() if not isinstance(found, str)}
  return noticed | {leaf for leaf in known if proof.coupled_in(programs[0], leaf, known)}
