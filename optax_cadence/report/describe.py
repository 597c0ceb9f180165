"""What a person wants to see before a run: a table of the groups."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from optax_cadence import _cadence
from optax_cadence import _paths
from optax_cadence import _tables
from optax_cadence import _training
from optax_cadence.regions.layout import Group
from optax_cadence.regions.layout import Layout


@dataclasses.dataclass(frozen=True)
class GroupSummary:
  """One row of a `Description`.

  Attributes:
    period: The cadence, as text.
    leaves: Paths of the leaves that the group has a part of.
    parameters: Number of entries.
    effective_batch: Examples behind each update; None when the period is dynamic.
    accumulator_bytes: Bytes of the group's accumulators.
    share: Updates per micro-step, at most 1; None when the period is dynamic.
  """

  period: str
  leaves: tuple[str, ...]
  parameters: int
  effective_batch: int | None
  accumulator_bytes: int
  share: float | None


@dataclasses.dataclass(frozen=True)
class Description:
  """The groups of a cadence; prints as a table.

  Attributes:
    groups: One summary per group that has parameters, in order of first appearance.
    cycle: Micro-steps after which the schedule repeats, or None.
    masks: For the path of each leaf whose mask no grid expresses, why its entries are not
      trained by one pass for all periods, which is faster; None where they are.
    stored: For the path of each leaf that accumulates, but to whose windows the backward pass of
      `training_step` cannot add: why it stores the gradient.
  """

  groups: tuple[GroupSummary, ...]
  cycle: int | None
  masks: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
  stored: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def __str__(self) -> str:
    header = ("period", "leaves", "parameters", "effective batch", "accumulators", "updates/step")
    rows = [_row(g) for g in self.groups]
    total = (
      "total",
      "",
      sum(g.parameters for g in self.groups),
      "",
      _bytes(sum(g.accumulator_bytes for g in self.groups)),
      "",
    )
    cycle = "dynamic" if self.cycle is None else f"{self.cycle} micro-steps"
    masks = [
      f"mask of {name}: one pass for all periods, as the optimizer treats entries one by one"
      if reason is None
      else f"mask of {name}: a vector for each period, because of {reason}"
      for name, reason in self.masks.items()
    ]
    stored = [
      f"training_step stores the gradient of {_listed(leaves)}: {reason}"
      for reason, leaves in _by_reason(self.stored).items()
    ]
    table = _tables.lines((header, *rows, total), left=2)
    return "\n".join([*table, f"cycle: {cycle}", *masks, *stored])


def describe(
  tx: _cadence.CadenceTransformation, params: optax.Params, *, microbatch: int = 1
) -> Description:
  """Summarises the groups that a cadence makes of these parameters.

  Args:
    tx: A cadence, or an `oc.chain` that ends in one.
    params: Parameters, or their `jax.ShapeDtypeStruct`s; nothing is computed. Of an `nnx.State`
      the `Param`s alone are.
    microbatch: Examples per micro-step, for the column of effective batches.

  Returns:
    A `Description`.

  >>> import jax.numpy as jnp, optax, optax_cadence as oc
  >>> tx = oc.cadence(optax.adam(1e-3), {"body": 8, "head": 1})
  >>> params = {"body": jnp.zeros((100, 100)), "head": jnp.zeros((100, 10))}
  >>> print(oc.describe(tx, params, microbatch=32))
  period  leaves  parameters  effective batch  accumulators  updates/step
  8       body         10000              256       40.0 kB         12.5%
  1       head          1000               32           0 B        100.0%
  total                11000                        40.0 kB
  cycle: 8 micro-steps...
  """
  cadence, params = _cadence.of(tx, "oc.describe(tx, params)"), _paths.parameters(params)
  layout, reasons = cadence.lay_out(params)
  dtypes = [jax.dtypes.result_type(leaf) for leaf in jax.tree.leaves(params)]
  groups = tuple(
    _summary(cadence, layout, group, dtypes, microbatch) for group in layout.groups if group.leaves
  )
  stored = _training.why_stored(cadence, layout, dtypes)
  if _cadence.chain_of(tx) is not None:
    stored = dict.fromkeys(stored, "transformations before the cadence")
  return Description(
    groups,
    layout.cycle,
    {layout.name(i): x for i, x in reasons.items()},
    {layout.name(i): stored[i] or "" for i in sorted(stored) if stored[i] is not None},
  )


def _summary(
  cadence: _cadence.Cadence,
  layout: Layout,
  group: Group,
  dtypes: list[Any],
  microbatch: int,
) -> GroupSummary:
  sizes, accumulators = 0, 0
  for t in group.regions:
    size = t.cut.size(layout.shapes[t.leaf])
    sizes += size
    if cadence.accumulates(group.every) or t in group.masked:
      accumulators += size * cadence.sum_dtype(dtypes[t.leaf]).itemsize
  period = group.every.period if group.every.static else None
  batches = period if cadence.accumulate != "latest" else 1
  return GroupSummary(
    period=str(group.every),
    leaves=tuple(layout.name(i) for i in group.leaves),
    parameters=sizes,
    effective_batch=None if batches is None else batches * microbatch,
    accumulator_bytes=accumulators,
    share=None if period is None else 1 / period,
  )


def _row(group: GroupSummary) -> tuple[Any, ...]:
  return (
    group.period,
    _listed(group.leaves),
    group.parameters,
    "varies" if group.effective_batch is None else group.effective_batch,
    _bytes(group.accumulator_bytes),
    "varies" if group.share is None else f"{group.share:.1%}",
  )


def _listed(leaves: Sequence[str]) -> str:
  names = ", ".join(leaves)
  return names if len(names) <= 40 else f"{leaves[0]}, … ({len(leaves)})"


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
  leaves: dict[str, list[str]] = {}
  for leaf, reason in reasons.items():
    leaves.setdefault(reason, []).append(leaf)
  return leaves


def _bytes(n: float) -> str:
  for unit in ("B", "kB", "MB", "GB"):
    if n < 1000:
      return f"{n:.1f} {unit}" if unit != "B" else f"{n} B"
    n /= 1000
  return f"{n:.1f} TB"
