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
from optax_cadence._state import State
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
  """The layout of a new state, and for each leaf under a mask why it is not trained by one pass.

  The dtypes are those in which the optimizer gets the mean of each leaf, here and below.
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


def as_in_state(
  inner: Inner,
  layout: Layout,
  state: State,
  dtypes: Sequence[Any],
  extra_args: Mapping[str, Any],
) -> Layout:
  """The layout that a state was made with.

  Raises:
    ValueError: If the state has entries of a leaf that is under no mask here, or where extra
      arguments make a difference to bands that keep their fold.
  """
  masked = state.regions.masked
  known = {layout.paths[leaf]: leaf for leaf in _under_masks(layout)}
  if not known.keys() >= masked.keys():
    raise ValueError(
      f"state: expected leaves under masks to be {_paths.listed(known)}, found"
      f" {_paths.listed(masked)}; a state goes with the cadences it was made for"
    )
  joined, folded = _with_masked(layout, [known[path] for path in masked]), state.regions.folded
  layout = _folded(joined, [i for i, path in enumerate(layout.paths) if path in folded])
  if extra_args and layout.folded:
    unaffected = _leaves_to_fold(inner, joined, dtypes, extra_args)
    for leaf in sorted(set(layout.folded) - unaffected):
      raise ValueError(
        f"update of {layout.name(leaf)!r}: expected an inner optimizer that treats entries one by"
        " one, as it did when the state was made, found that these extra arguments make a"
        f" difference: {', '.join(extra_args)}"
      )
  return layout


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
  if not leaves:
    return layout

  def folded(t: Tensor) -> Tensor:
    if t.leaf not in leaves or not cuts.can_fold(t.cut, layout.shapes[t.leaf]):
      return t
    assert isinstance(t.cut, cuts.Bands)
    return Tensor(t.leaf, cuts.FoldedBands(t.cut.axis, t.cut.intervals))

  groups = []
  for group in layout.groups:
    groups.append(dataclasses.replace(group, tensors=tuple(map(folded, group.tensors))))
  return dataclasses.replace(layout, groups=tuple(groups))


def _leaves_to_fold(
  inner: Inner,
  layout: Layout,
  dtypes: Sequence[Any],
  extra_args: Mapping[str, Any] | None = None,
) -> set[int]:
  """The leaves whose bands can keep their fold, as it makes no difference to the optimizer."""
  folded = _folded(layout, range(len(layout.paths)))
  candidates, refused = set(folded.folded), set[int]()
  try:
    for pair in zip(layout.groups, folded.groups, strict=True):
      refused |= _leaves_that_notice(inner, layout, pair, candidates, dtypes, extra_args)
  except proof.REFUSALS:
    return set()
  return candidates - refused


def _leaves_that_notice(
  inners: Inner,
  layout: Layout,
  pair: tuple[Group, Group],
  candidates: Collection[int],
  dtypes: Sequence[Any],
  extra_args: Mapping[str, Any] | None,
) -> set[int]:
  """The leaves with bands in a group, joined and folded, that the optimizer might treat otherwise.

  It does not if it runs the same program on both, and that treats their entries one by one.
  """
  leaves = set(pair[0].leaves).intersection(candidates)
  if not leaves:
    return leaves
  inner = inners.of(pair[0].every)
  shapes = [proof.shapes_of(group, layout, dtypes) for group in pair]
  inits = [reading.traced(inner.init, layout.tree_of(tensors)) for tensors in shapes]
  updates = [proof.trace(inner, layout, group, dtypes, extra_args) for group in pair]
  if not (proof.alike(updates[0].program, updates[1].program) and proof.alike(*inits)):
    return leaves
  moments: dict[int, Mapping[Any, int]] = {}
  for leaf in leaves:
    (tensor,) = shapes[0][leaf]
    found = proof.moments(inner, layout, leaf, tensor)
    if not isinstance(found, str):
      moments[leaf] = found
  return {x for x in leaves if x not in moments or proof.coupled_in(updates[0], x, moments)}
