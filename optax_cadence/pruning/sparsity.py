"""How sparse each leaf is to be, and how many of its units are kept then."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths
from optax_cadence.pruning import allocation as allocations
from optax_cadence.pruning.structure import Structure
from optax_cadence.schedules.by_path import ByPath

# A number, a traced scalar or a schedule, by path of a leaf.
Sparsities = dict[str, Any]


def resolve(asked: Any, structure: Structure, params: Any, leaves: Mapping[str, Any]) -> Sparsities:
  """What was asked for each leaf, before it is shared out.

  Args:
    asked: A number, a traced scalar, a schedule, a tree of these or an `oc.by_path`; None
      where the structure states it.
    structure: What is pruned together.
    params: All parameters.
    leaves: Those that are pruned, by path.

  Raises:
    ValueError: If the structure states another, or a tree does not fit the parameters.
  """
  stated = structure.stated
  if stated is not None and asked is not None and asked != stated:
    path = next(iter(leaves))
    raise ValueError(f"sparsity of {path!r}: {structure} states {stated}, found {asked!r}")
  if not is_tree(asked):
    return dict.fromkeys(leaves, asked if stated is None else stated)
  tree = asked(params) if isinstance(asked, ByPath) else asked
  given = {_paths.join(path): s for path, s in _paths.flatten_with_paths(tree)}
  everything = [_paths.join(path) for path, _ in _paths.flatten_with_paths(params)]
  for prefix in given:
    if not any(_holds(prefix, path) for path in everything):
      raise ValueError(
        f"sparsity of {prefix!r}: no parameter is there; expected a prefix of"
        f" {', '.join(map(repr, everything))}"
      )
  found = {}
  for path in leaves:
    match = [prefix for prefix in given if _holds(prefix, path)]
    if not match:
      raise ValueError(f"sparsity of {path!r}: expected a number in the tree, found none")
    found[path] = given[match[0]]
  return found


def is_tree(asked: Any) -> bool:
  """Whether leaves are asked for by name."""
  if isinstance(asked, ByPath):
    return True
  return not (asked is None or callable(asked) or jax.tree_util.all_leaves([asked]))


def _holds(prefix: str, path: str) -> bool:
  return prefix in ("", path) or path.startswith(f"{prefix}/")


def at(sparsities: Sparsities, step: jax.Array) -> Sparsities:
  """Schedules read at a micro-step."""
  return {path: s(step) if callable(s) else s for path, s in sparsities.items()}


def kept(
  now: Sparsities, shapes: Mapping[str, tuple[int, ...]], allocation: str
) -> tuple[list[list[str]], list[Any]]:
  """Which leaves are searched as one pool, and how many units each pool keeps.

  Args:
    now: A number or a traced scalar for each leaf.
    shapes: Of the units of each leaf.
    allocation: One of `allocation.NAMES`.
  """
  paths = list(shapes)
  if allocation in ("erk", "erdos_renyi"):
    one = now[paths[0]]
    shared = allocations.erdos_renyi(list(shapes.values()), one, allocation == "erk")
    now = dict(zip(paths, shared, strict=True))
  pools = [paths] if allocation == "global" else [[path] for path in paths]
  sizes = [sum(int(np.prod(shapes[path])) for path in pool) for pool in pools]
  counts = [
    size - allocations.pruned(now[pool[0]], size) for pool, size in zip(pools, sizes, strict=True)
  ]
  return pools, counts


def check(path: str, sparsity: Any, times: Any, rising: bool) -> None:
  """Raises if a sparsity that is known now is outside [0, 1], or falls where none may.

  A schedule is tried at the micro-steps that are due, as far as they are known: the first
  thousand, and a thousand more up to the end or a million.
  """
  if isinstance(sparsity, jax.core.Tracer):
    return
  values = _tried(sparsity, times) if callable(sparsity) else sparsity
  if isinstance(values, jax.core.Tracer):
    return
  values = np.asarray(values, np.float64)
  bad = values[~((values >= 0) & (values <= 1))]
  if bad.size:
    raise ValueError(f"sparsity of {path!r}: expected a number in [0, 1], found {bad.flat[0]}")
  if rising and values.ndim and (np.diff(values) < -1e-6).any():
    raise ValueError(
      f"sparsity of {path!r}: expected a schedule that does not fall while the mask holds and"
      f" nothing regrows, found a fall from {values.max():g} to {values[-1]:g}"
    )


def _tried(schedule: Any, times: Any) -> Any:
  steps = np.unique(np.concatenate([np.arange(1, 1025), np.geomspace(1024, 1e6, 1024)]))
  steps = np.minimum(steps * times.period, 2**30).astype(np.int32)
  steps = steps[(steps >= times.begin) & (steps <= (2**30 if times.end is None else times.end))]
  with jax.ensure_compile_time_eval():
    return jax.vmap(schedule)(jnp.asarray(steps)) if len(steps) else 0.0
