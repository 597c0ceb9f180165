"""Plans for more units, and for fewer."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from optax_cadence import _paths
from optax_cadence.growth import _trees
from optax_cadence.growth._dimension import Contraction
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._dimension import extended
from optax_cadence.growth._dimension import Member
from optax_cadence.growth._plan import expected
from optax_cadence.growth._plan import joined
from optax_cadence.growth._plan import LeafChange
from optax_cadence.growth._plan import Plan
from optax_cadence.growth._plan import Shape


def widening(
  variables: Any,
  dimensions: Dimension | Mapping[Dimension, int],
  by: int | None = None,
  *,
  alpha: str = "alpha",
) -> Plan:
  """Plans more units, appended after the last.

  Args:
    variables: Tree of arrays or `jax.ShapeDtypeStruct`.
    dimensions: A `Dimension`, of `couple` or `dimension`; or several, with the number of new
      units for each.
    by: The number of new units.
    alpha: Path at which the gate will be.

  Returns:
    A `Plan`.

  Raises:
    ValueError: If a number is below 1 or a member is not as described.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
  >>> print(growth.widening(params, growth.dimension(params, {"a": -1, "b": 0}), by=2))
  leaf   role     before  after  parameters
  a      follows  3x4     3x6            +6
  b      follows  4x2     6x2            +4
  total                                 +10
  gate: alpha
  """
  given = dimensions if isinstance(dimensions, Mapping) else {dimensions: by}
  shapes = _trees.shapes(variables)
  changes, flops = [], []
  for dim, count in given.items():
    if not isinstance(count, int | np.integer) or isinstance(count, bool) or count < 1:
      raise ValueError(f"by must be a positive integer, found {count!r}")
    for member in dim.members:
      new = extended(member.labels, dim.size, count)
      changes.append(_change(member, shapes, len(new), np.flatnonzero(new < dim.size)))
    flops.append(_flops(dim.contractions, count))
  path, dims = tuple(alpha.split("/")), tuple(given.items())
  return Plan(joined(changes), True, path, _total(flops), dims)  # type: ignore[arg-type]


def shrinking(
  variables: Any, dimension: Dimension, *, keep: Any = None, remove: Any = None
) -> Plan:
  """Plans fewer units.

  Args:
    variables: Tree of arrays or `jax.ShapeDtypeStruct`.
    dimension: The units and who has them.
    keep: Which units stay: indices, or a bool mask over the units.
    remove: Which go, in place of `keep`.

  Returns:
    A `Plan`. Outputs stay the same if the outgoing weights of what is removed are zero, or
    its units always are.

  Raises:
    ValueError: If a unit is not there, or none would be left.
  """
  if (keep is None) == (remove is None):
    raise ValueError("expected either keep= or remove=, the units that stay or go")
  chosen = _chosen(keep if remove is None else remove, dimension.size)
  kept = chosen if remove is None else np.setdiff1d(np.arange(dimension.size), chosen)
  if not len(kept) or len(kept) == dimension.size:
    raise ValueError(
      f"expected some of {dimension.size} units to go and some to stay, found {len(kept)} to stay"
    )
  shapes = _trees.shapes(variables)
  changes = []
  for member in dimension.members:
    at = np.flatnonzero(np.isin(member.labels, kept) | (member.labels < 0))
    changes.append(_change(member, shapes, len(at), at))
  flops = _flops(dimension.contractions, len(kept) - dimension.size)
  return Plan(joined(changes), False, flops=flops)


def _chosen(units: Any, size: int) -> np.ndarray:
  units = np.asarray(units)
  if units.dtype == bool:
    if units.shape != (size,):
      raise ValueError(f"a mask over {size} units must have shape ({size},), found {units.shape}")
    return np.flatnonzero(units)
  if not np.issubdtype(units.dtype, np.integer) or units.ndim != 1:
    raise ValueError(
      f"expected indices of units or a bool mask, found {units.dtype} of shape {units.shape}"
    )
  if len(set(units.tolist())) != len(units) or ((units < 0) | (units >= size)).any():
    raise ValueError(f"expected distinct units from 0 to {size - 1}, found {units.tolist()}")
  return np.sort(units)


def _change(
  member: Member, shapes: Mapping[_paths.Path, Shape], size: int, at: np.ndarray
) -> LeafChange:
  before = shapes.get(member.path)
  if before is None or before[member.axis] != len(member.labels):
    raise ValueError(
      f"{_paths.join(member.path)!r}: expected {len(member.labels)} entries along axis"
      f" {member.axis}, found {expected(before)}"
    )
  after = (*before[: member.axis], size, *before[member.axis + 1 :])
  outgoing = (member.axis,) if member.role == "outgoing" else ()
  return LeafChange(member.path, before, after, member.role, {member.axis: at}, outgoing=outgoing)


def _flops(contractions: Iterable[Contraction] | None, more: int) -> tuple[int, int] | None:
  if contractions is None:
    return None
  before, after = 0, 0.0
  for flops, shares in contractions:
    before += flops
    after += flops * math.prod((size + more * unit) / size for size, unit in shares)
  return before, round(after)


def _total(flops: list[tuple[int, int] | None]) -> tuple[int, int] | None:
  known = [f for f in flops if f is not None]
  if not known or len(known) < len(flops):
    return None
  before = known[0][0]
  return before, before + sum(after - before for _, after in known)
