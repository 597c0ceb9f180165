"""Bands of an axis as tensors in which it is split, where the inner optimizer does not mind.

A tensor that joins bands is slow to compute from the leaf they lie in. The optimizer does not mind
another shape if it is elementwise, and the same program on both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from optax_cadence import _elementwise
from optax_cadence import _layout
from optax_cadence import _paths
from optax_cadence import _programs
from optax_cadence import _regions
from optax_cadence._state import GroupState


def provable(
  inner: Any,
  layout: _layout.Layout,
  leaves: Mapping[int, Any],
  extra_args: Mapping[str, Any] | None = None,
) -> frozenset[int]:
  """The leaves whose bands can be split, by a proof that it makes no difference."""
  found = {t.leaf for group in layout.groups for t in group.tensors if _regular(layout, t)}
  split = layout.recut(found, _regions.split)
  try:
    for pair in zip(layout.groups, split.groups, strict=True):
      found -= _not_proved(inner, layout, pair, leaves, extra_args)
  except Exception:  # Whatever an optimizer may raise that wants other arguments than these.
    return frozenset()
  return frozenset(found)


def _not_proved(
  inner: Any,
  layout: _layout.Layout,
  pair: tuple[_layout.Group, _layout.Group],
  leaves: Mapping[int, Any],
  extra_args: Mapping[str, Any] | None,
) -> set[int]:
  """The leaves with bands in a group, joined and split, where it might make a difference."""
  both = zip(*(group.tensors for group in pair), strict=True)
  tensors = [t for t, new in both if t.cut is not new.cut]
  found = {t.leaf for t in tensors}
  if not found:
    return found
  args = leaves, leaves, None, extra_args
  joined, split = (_programs.trace(inner, layout, group, *args) for group in pair)
  inits = (_programs.trace_init(inner, layout, group, leaves) for group in pair)
  if not (_elementwise.alike(joined.jaxpr, split.jaxpr) and _elementwise.alike(*inits)):
    return found
  moments = {
    t.leaf: _programs.moments(inner, layout, t.leaf, jax.eval_shape(t.cut.take, leaves[t.leaf]))
    for t in tensors
  }
  return {i for i in found if not _elementwise.provable(_programs.prove_alone, joined, i, moments)}


def check(
  inner: Any,
  layout: _layout.Layout,
  split: Sequence[int],
  leaves: Mapping[int, Any],
  extra_args: Mapping[str, Any],
) -> None:
  """Raises `ValueError` where extra arguments make a difference that there was not without."""
  for i in set(split) - provable(inner, layout, leaves, extra_args):
    raise ValueError(
      f"update of {layout.name(i)!r}: expected an inner optimizer that treats entries one by one,"
      " as it did when the state was made, found that these extra arguments make a difference:"
      f" {', '.join(extra_args)}"
    )


def _regular(layout: _layout.Layout, tensor: _layout.Tensor) -> bool:
  return _regions.split(tensor.cut, layout.shapes[tensor.leaf]) is not tensor.cut


def leaves_of(layout: _layout.Layout, groups: Sequence[GroupState]) -> list[int]:
  """The leaves whose bands are split in a state."""
  found = set()
  for group in groups:
    rows = _paths.flatten_with_paths(group.regions, lambda x: isinstance(x, _layout.Regions))
    found |= {path for path, regions in rows if regions.split}
  return [i for i, path in enumerate(layout.paths) if path in found]
