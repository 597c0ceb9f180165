"""What sparsity the user chose for each leaf, and whether it makes sense.

How a sparsity becomes a number of units is in `allocation`.
"""

import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _checks
from optax_cadence import _paths
from optax_cadence.pruning import prefixes
from optax_cadence.pruning.schedule import Times
from optax_cadence.pruning.structure import Structure
from optax_cadence.schedules.by_path import ByPath


def by_leaf(
  sparsity: Any, structure: Structure, params: Any, leaves: Mapping[_paths.Path, Any]
) -> dict[_paths.Path, Any]:
  """The sparsity of each leaf: a number, a traced scalar or a schedule, by path.

  Args:
    sparsity: What `prune` was given: one of these, a tree of them or an `oc.by_path`; None if
      the structure implies it.
    structure: What is pruned together.
    params: All parameters.
    leaves: The leaves that are pruned, by path.

  Raises:
    ValueError: If the structure implies another sparsity, or a tree does not fit the parameters.
  """
  fixed = structure.fixed_sparsity
  if sparsity is None:
    return dict.fromkeys(leaves, fixed)
  if not is_tree(sparsity):
    asked = dict.fromkeys(leaves, sparsity)
  else:
    asked = prefixes.by_leaf("sparsity", sparsity, params, leaves)
  for path, value in asked.items():
    if fixed is None or (structure.gradual and callable(value)):
      continue
    if not isinstance(value, numbers.Real) or value != fixed:
      raise ValueError(
        f"sparsity of {_paths.join(path)!r}: {structure} states {fixed}, found"
        f" {_checks.shown(value)}"
      )
  return asked


def is_tree(sparsity: Any) -> bool:
  """Whether different leaves may have different sparsities."""
  if isinstance(sparsity, ByPath):
    return True
  return not (sparsity is None or callable(sparsity) or jax.tree_util.all_leaves([sparsity]))


def check(name: str, sparsity: Any, times: Times, may_fall: bool, implied: float | None) -> None:
  """Raises if a sparsity is not in [0, 1], or a schedule falls or ends where it must not.

  A traced sparsity is not checked, and a schedule only at some of the micro-steps at which new
  masks are due: the first thousand, and another thousand up to the end, at most a million.

  Args:
    name: The leaf, for the error.
    sparsity: A number, a traced scalar or a schedule.
    times: When new masks are due.
    may_fall: Whether weights come back when the sparsity falls.
    implied: The sparsity at which a schedule has to end; None if any will do.
  """
  if not callable(sparsity):
    _checks.number(f"sparsity of {name!r}", sparsity, 0, 1)
    return
  steps = _some_of(times)
  values = _at(sparsity, steps)
  if isinstance(values, jax.core.Tracer):
    return
  values = np.asarray(values, np.float64)
  outside = values[~((values >= 0) & (values <= 1))]
  if outside.size:
    raise ValueError(f"sparsity of {name!r}: expected a number in [0, 1], found {outside.flat[0]}")
  if not may_fall and (np.diff(values) < -1e-6).any():
    raise ValueError(
      f"sparsity of {name!r}: expected a schedule that does not fall while the mask holds and"
      f" nothing regrows, found a fall from {values.max():g} to {values[-1]:g}"
    )
  _check_end(name, sparsity, times, implied)


def _check_end(name: str, schedule: Any, times: Times, implied: float | None) -> None:
  """Raises if a schedule ends elsewhere than implied, or goes on after the last masks are made."""
  last = times.last()
  end, reached = np.asarray(_at(schedule, [_LATE, _LATE if last is None else last]), np.float64)
  if implied is not None and abs(end - implied) > 1e-6:
    raise ValueError(
      f"sparsity of {name!r}: expected a schedule that ends at the {implied:g} that the structure"
      f" states, found {end:g}"
    )
  if end - reached > 1e-6:
    raise ValueError(
      f"sparsity of {name!r}: the last masks are due at micro-step {last}, when the schedule is at"
      f" {reached:g}, and it goes on to {end:g}: expected it to end by then, or masks that are due"
      " when it has ended"
    )


# A micro-step by which every schedule has reached its end.
_LATE = 2**30


def _some_of(times: Times) -> Any:
  """Some of the micro-steps at which new masks are due."""
  last = _LATE if times.end is None else times.end
  due = np.unique(np.concatenate([np.arange(1, 1025), np.geomspace(1024, 1e6, 1024)]))
  steps = np.minimum(due * times.period, _LATE).astype(np.int32)
  steps = steps[(steps >= times.begin) & (steps <= last)]
  return steps if len(steps) else [last]


def _at(schedule: Any, steps: Any) -> Any:
  """The schedule at these micro-steps. Traced if it closes over tracers."""
  with jax.ensure_compile_time_eval():
    return jax.vmap(schedule)(jnp.asarray(steps, jnp.int32))
