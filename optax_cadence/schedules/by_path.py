"""`by_path`: from the names of parameters to a value for each of them.

It hands on whatever it was given: cadences here, sparsities in `pruning`.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from optax_cadence import _checks
from optax_cadence import _paths


def by_path(cadences: Mapping[str, Any], default: Any = None) -> "ByPath":
  """Gives every parameter the cadence of the first pattern that matches its path.

  A pattern is a glob for `fnmatch.fnmatchcase`, so `*` also crosses `/`. It
  matches a whole `/`-joined path, or the part of it before any `/`: `"stem"`
  covers `stem/conv/kernel` and `stem/conv/bias`, but not `stem2/kernel`. Of two paths that read
  the same, `{"a": {"b": x}, "a/b": y}`, the second in the order of the tree is also called `a/b#2`.

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
    raise ValueError(
      f"by_path: expected a mapping from patterns to cadences, found {_checks.shown(cadences)}"
    )
  return ByPath(dict(cadences), default)


# Without generated equality, which would compare the cadences (arrays, tracers) themselves.
@dataclasses.dataclass(frozen=True, eq=False)
class ByPath:
  """What `by_path` returns: call it with parameters for a tree of cadences."""

  patterns: Mapping[str, Any]
  default: Any = None

  @property
  def cadences(self) -> list[tuple[str, Any]]:
    """Every cadence that a parameter may get, each with its pattern."""
    return [*self.patterns.items(), *([] if self.default is None else [("", self.default)])]

  def map(self, fn: Callable[[Any], Any]) -> "ByPath":
    """The same patterns with another cadence for each."""
    default = None if self.default is None else fn(self.default)
    return ByPath({pattern: fn(c) for pattern, c in self.patterns.items()}, default)

  def __call__(self, params: Any) -> Any:
    paths = [path for path, _ in _paths.flatten_with_paths(params)]
    names = _paths.names(paths)
    if paths and not _has_masked_parts(params):
      self._check_every_pattern_matches(paths, names)
    return jax.tree.unflatten(jax.tree.structure(params), map(self._cadence_of, paths, names))

  def _cadence_of(self, path: _paths.Path, name: str) -> Any:
    for pattern, cadence in self.patterns.items():
      if _matches(pattern, path, name):
        return cadence
    if self.default is None:
      raise ValueError(
        f"by_path: no pattern matches the parameter {name!r} and there is no default; "
        f"expected a match by one of {list(self.patterns)}"
      )
    return self.default

  def _check_every_pattern_matches(self, paths: list[_paths.Path], names: list[str]) -> None:
    for pattern in self.patterns:
      if not any(map(functools.partial(_matches, pattern), paths, names)):
        raise ValueError(
          f"by_path: the pattern '{pattern}' matches no parameter; expected it to match "
          f"one of {_paths.listed(paths)} or what stands before a '/' in it"
        )


def _matches(pattern: str, path: _paths.Path, name: str) -> bool:
  # Slashes within a key, as Haiku has them, are slashes too.
  parts = _paths.join(path).split("/")
  prefixes = ("/".join(parts[:n]) for n in range(1, len(parts) + 1))
  return any(fnmatch.fnmatchcase(x, pattern.removesuffix("/")) for x in (*prefixes, name))


def _has_masked_parts(params: Any) -> bool:
  def masked(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)

  return any(masked(leaf) for leaf in jax.tree_util.tree_leaves(params, is_leaf=masked))
