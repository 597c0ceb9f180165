"""Builders: from names or depths to a cadence for every parameter.

Nothing here knows what a cadence is: `by_path` hands on whatever it was given,
`by_depth` returns plain integers. What the periods mean is decided elsewhere.
"""

import dataclasses
import fnmatch
import math
import operator
from collections.abc import Mapping
from typing import Any

import jax
import optax

from optax_cadence import _paths


def by_path(cadences: Mapping[str, Any], default: Any = None) -> "ByPath":
  """Gives every parameter the cadence of the first pattern that matches its path.

  A pattern is a glob for `fnmatch.fnmatchcase`, so `*` also crosses `/`. It
  matches a whole `/`-joined path, or the part of it before any `/`: `"stem"`
  covers `stem/conv/kernel` and `stem/conv/bias`, but not `stem2/kernel`.

  Args:
    cadences: from pattern to cadence; earlier patterns take precedence.
    default: cadence of the leaves that no pattern matches; None means that there
      has to be a pattern for every leaf.

  Returns:
    A callable from parameters to a tree of the same structure with a cadence at
    each leaf. It raises `ValueError` for a leaf without a cadence, and for a
    pattern that matches no leaf, since that is a misspelling. The latter is not
    checked where the tree holds `None` or `optax.MaskedNode` (a part is masked
    away, and the pattern may be meant for it) or holds nothing.

  Raises:
    ValueError: if `cadences` is not a mapping from strings.

  >>> import jax.numpy as jnp, optax_cadence as oc
  >>> params = {"stem": {"w": jnp.ones(3), "b": jnp.ones(3)}, "head": jnp.ones(3)}
  >>> oc.by_path({"*/b": 1, "stem": 8}, default=2)(params)
  {'head': 2, 'stem': {'b': 1, 'w': 8}}
  """
  if not isinstance(cadences, Mapping) or not all(isinstance(p, str) for p in cadences):
    raise ValueError(f"by_path: expected a mapping from patterns to cadences, found {cadences!r}")
  return ByPath(dict(cadences), default)


# Without generated equality, which would compare the cadences (arrays, tracers) themselves.
@dataclasses.dataclass(frozen=True, eq=False)
class ByPath:
  """What `by_path` returns: call it with parameters for a tree of cadences."""

  cadences: Mapping[str, Any]
  default: Any = None

  def __call__(self, params: Any) -> Any:
    paths = [path for path, _ in _paths.flatten_with_paths(params)]
    if paths and not _has_masked_parts(params):
      self._check_every_pattern_matches(paths)
    return jax.tree.unflatten(jax.tree.structure(params), map(self._cadence_of, paths))

  def _cadence_of(self, path: _paths.Path) -> Any:
    for pattern, cadence in self.cadences.items():
      if _matches(pattern, path):
        return cadence
    if self.default is None:
      raise ValueError(
        f"by_path: no pattern matches the parameter {_paths.join(path)!r} and there is no default; "
        f"expected a match by one of {list(self.cadences)}"
      )
    return self.default

  def _check_every_pattern_matches(self, paths: list[_paths.Path]) -> None:
    for pattern in self.cadences:
      if not any(_matches(pattern, path) for path in paths):
        raise ValueError(
          f"by_path: the pattern '{pattern}' matches no parameter; expected it to match "
          f"one of {_paths.listed(paths)} or what stands before a '/' in it"
        )


def _matches(pattern: str, path: _paths.Path) -> bool:
  prefixes = (_paths.join(path[:n]) for n in range(1, len(path) + 1)) if path else [""]
  return any(fnmatch.fnmatchcase(prefix, pattern.removesuffix("/")) for prefix in prefixes)


def _has_masked_parts(params: Any) -> bool:
  def masked(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)

  return any(masked(leaf) for leaf in jax.tree_util.tree_leaves(params, is_leaf=masked))


def by_depth(
  depth: Any, output: int = 1, input: int = 16, *, rounding: str = "power_of_two"
) -> Any:
  """Periods that change geometrically from the input of a network to its output.

  Args:
    depth: tree of whole numbers, smallest nearest the input (see `forward_order`).
    output: period at the greatest depth, and everywhere if there is only one depth.
    input: period at the smallest depth; may be below `output`.
    rounding: `"power_of_two"` takes the power of two that is nearest on a
      logarithmic scale, so that the cycle is no longer than the longest period.
      This holds for the two ends as well: 12 becomes 16. `"integer"` takes the
      nearest whole number and keeps the ends; cycles get long.

  Returns:
    Tree like `depth` with an int at each leaf.

  Raises:
    ValueError: for a period that is not a whole number from 1 up, for an unknown
      rounding, and for a depth that is not a whole number.

  >>> import optax_cadence as oc
  >>> oc.by_depth({"stem": 0, "block": [1, 2, 3], "head": 4})
  {'block': [8, 4, 2], 'head': 1, 'stem': 16}
  >>> oc.by_depth([0, 1, 2], output=9, input=1, rounding="integer")
  [1, 3, 9]
  """
  if rounding not in ("power_of_two", "integer"):
    raise ValueError(
      f"by_depth: expected rounding to be 'power_of_two' or 'integer', found {rounding!r}"
    )
  last, first = _log2_period("output", output), _log2_period("input", input)
  depths = [
    _whole_number(leaf, f"a whole number as the depth of '{_paths.join(path)}'")
    for path, leaf in _paths.flatten_with_paths(depth)
  ]
  low, high = min(depths, default=0), max(depths, default=0)

  def period(d: int) -> int:
    share = (d - low) / (high - low) if high > low else 1.0
    exponent = first + (last - first) * share
    if rounding == "power_of_two":
      return 2 ** math.floor(exponent + 0.5)
    return max(1, math.floor(2**exponent + 0.5))

  return jax.tree.unflatten(jax.tree.structure(depth), map(period, depths))


def _log2_period(name: str, period: Any) -> float:
  expected = f"a whole number from 1 up as the {name} period"
  value = _whole_number(period, expected)
  if value < 1:
    raise ValueError(f"by_depth: expected {expected}, found {value}")
  return math.log2(value)


def _whole_number(value: Any, expected: str) -> int:
  try:
    if isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", "") == "b":
      raise TypeError("a truth value counts nothing")
    return operator.index(value)
  except TypeError:
    raise ValueError(f"by_depth: expected {expected}, found {value!r}") from None
