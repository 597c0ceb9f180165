"""What a person wants to see before a run: a table of the groups, a picture of the score."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax

from optax_cadence import _cadence
from optax_cadence import _layout
from optax_cadence import _regions
from optax_cadence import _tables


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
    groups: One summary per group, in the order of the state.
    cycle: Micro-steps after which the schedule repeats, or None.
  """

  groups: tuple[GroupSummary, ...]
  cycle: int | None

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
    return "\n".join([*_tables.lines((header, *rows, total), left=2), f"cycle: {cycle}"])


def describe(
  tx: _cadence.CadenceTransformation, params: optax.Params, *, microbatch: int = 1
) -> Description:
  """Summarises the groups that a cadence makes of these parameters.

  Args:
    tx: A cadence, or an `oc.chain` that ends in one.
    params: Parameters, or their `jax.ShapeDtypeStruct`s; nothing is computed.
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
  cycle: 8 micro-steps
  """
  cadence = _cadence.of(tx)
  layout = cadence.layout(params)
  dtypes = [jax.dtypes.result_type(leaf) for leaf in jax.tree.leaves(params)]
  groups = tuple(_summary(cadence, layout, g, dtypes, microbatch) for g in layout.groups)
  return Description(groups, tx.cycle)


def plot_score(
  tx: _cadence.CadenceTransformation, params: optax.Params, steps: int, *, ax: Any = None
) -> Any:
  """Draws the score: regions down, micro-steps across, a mark where one is due.

  Args:
    tx: A cadence, or an `oc.chain` that ends in one.
    params: Parameters, or their `jax.ShapeDtypeStruct`s.
    steps: Number of micro-steps to draw.
    ax: Matplotlib axes to draw on; new ones by default.

  Returns:
    The axes.

  Raises:
    ImportError: If Matplotlib is not installed (`pip install optax_cadence[plot]`).
  """
  import matplotlib as mpl

  rows = _score(_cadence.of(tx).layout(params), steps)
  if ax is None:
    import matplotlib.pyplot as plt

    size = (min(4 + 0.12 * steps, 16), min(1.2 + 0.24 * len(rows), 24))
    ax = plt.subplots(figsize=size, layout="constrained")[1]
  for y, (_, due) in enumerate(rows):
    # The same shade for the same rhythm in every picture: dark for 1, pale from 64 on.
    slowness = min(np.log2(1 / max(due.mean(), 1e-9)), 6) / 6
    marks = [(t + 0.6, 0.8) for t in np.flatnonzero(due)]
    color = mpl.colormaps["viridis"](0.1 + 0.8 * slowness)
    ax.broken_barh(marks, (y - 0.36, 0.72), facecolors=[color], linewidth=0)
  ax.set_yticks(range(len(rows)), [label for label, _ in rows])
  ax.set(xlim=(0.4, steps + 0.6), ylim=(len(rows) - 0.4, -0.6), xlabel="micro-step")
  ax.xaxis.get_major_locator().set_params(integer=True)
  ax.tick_params(axis="y", length=0)
  ax.spines[["top", "right", "left"]].set_visible(False)
  return ax


def _summary(
  cadence: _cadence.Cadence,
  layout: _layout.Layout,
  group: _layout.Group,
  dtypes: list[Any],
  microbatch: int,
) -> GroupSummary:
  sizes = [t.cut.size(layout.shapes[t.leaf]) for t in group.tensors]
  widths = [
    cadence.sum_dtype(dtypes[t.leaf]).itemsize
    if cadence.accumulates(group.every) or isinstance(t.cut, _regions.SharedEntries)
    else 0
    for t in group.tensors
  ]
  period = group.every.period if group.every.static else None
  batches = period if cadence.accumulate != "latest" else 1
  return GroupSummary(
    period=str(group.every),
    leaves=tuple(layout.name(i) for i in group.leaves),
    parameters=sum(sizes),
    effective_batch=None if batches is None else batches * microbatch,
    accumulator_bytes=int(np.dot(sizes, widths)),
    share=None if period is None else 1 / period,
  )


def _row(group: GroupSummary) -> tuple[Any, ...]:
  names = ", ".join(group.leaves)
  if len(names) > 40:
    names = f"{group.leaves[0]}, … ({len(group.leaves)})"
  return (
    group.period,
    names,
    group.parameters,
    "varies" if group.effective_batch is None else group.effective_batch,
    _bytes(group.accumulator_bytes),
    "varies" if group.share is None else f"{group.share:.1%}",
  )


def _bytes(n: float) -> str:
  for unit in ("B", "kB", "MB", "GB"):
    if n < 1000:
      return f"{n:.1f} {unit}" if unit != "B" else f"{n} B"
    n /= 1000
  return f"{n:.1f} TB"


def _score(layout: _layout.Layout, steps: int) -> list[tuple[str, np.ndarray]]:
  """A label and the micro-steps that are due (bool [steps]) for every region."""
  rows = []
  for group in layout.groups:
    due = group.every.score(steps)
    rows += [(t.leaf, t.cut.start, f"{layout.name(t.leaf)}{t.cut}", due) for t in group.tensors]
  return [(label, due) for _, _, label, due in sorted(rows, key=lambda row: row[:2])]
