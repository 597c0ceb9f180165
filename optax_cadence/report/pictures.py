"""Pictures: when regions are due, and how periods and noise scales moved."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import optax

from optax_cadence import _cadence
from optax_cadence import _paths
from optax_cadence.regions.layout import Layout


def plot_score(
  tx: _cadence.CadenceTransformation, params: optax.Params, steps: int, *, ax: Any = None
) -> Any:
  """Draws the score: regions down, micro-steps across, a mark where one is due.

  Args:
    tx: A cadence, or an `oc.chain` that ends in one.
    params: Parameters, or their `jax.ShapeDtypeStruct`s; of an `nnx.State` the `Param`s.
    steps: Number of micro-steps to draw.
    ax: Matplotlib axes to draw on; new ones by default.

  Returns:
    The axes.

  Raises:
    ImportError: If Matplotlib is not installed (`pip install optax_cadence[plot]`).
  """
  import matplotlib as mpl

  cadence = _cadence.of(tx, "oc.plot_score(tx, params, steps)")
  rows = _score(cadence.groups_of(_paths.parameters(params)), steps)
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


def _score(layout: Layout, steps: int) -> list[tuple[str, np.ndarray]]:
  """A label and the micro-steps that are due (bool [steps]) for every region."""
  rows = []
  for group in layout.groups:
    due = group.every.score(steps)
    rows += [(t.leaf, t.cut.start, f"{layout.name(t.leaf)}{t.cut}", due) for t in group.tensors]
  return [(label, due) for _, _, label, due in sorted(rows, key=lambda row: row[:2])]


def plot_confidence(history: Sequence[dict[str, Any]], *, axes: Any = None) -> Any:
  """Draws how the periods moved, and below, if they are measured, the noise scales.

  A period is the mean over what lies between two entries: micro-steps per update.

  Args:
    history: What `metrics` returned, from time to time, of one configuration.
    axes: Matplotlib axes to draw on, one or two; new ones by default.

  Returns:
    The axes, as an array.

  Raises:
    ValueError: If the history is empty, or of many states at once.
    ImportError: If Matplotlib is not installed (`pip install optax_cadence[plot]`).
  """
  if not history:
    raise ValueError("plot_confidence: expected metrics of at least one micro-step, found none")
  axes_of_vmap = np.shape(history[-1]["micro_step"])
  if axes_of_vmap:
    raise ValueError(
      "plot_confidence: expected metrics of one state, found those of many, of shape"
      f" {axes_of_vmap}; pick one: [jax.tree.map(lambda x: x[0], entry) for entry in history]"
    )
  curves = {"mean period (micro-steps)": _mean_periods(history)}
  scales = _curves(history, "noise_scale")
  if any(np.isfinite(values).any() for _, values in scales.values()):
    curves["noise scale (micro-batches)"] = scales
  if axes is None:
    import matplotlib.pyplot as plt

    size = (9, 1 + 3 * len(curves))
    axes = plt.subplots(len(curves), sharex=True, figsize=size, layout="constrained")[1]
  axes = np.atleast_1d(axes)
  for ax, (label, lines) in zip(axes, curves.items(), strict=False):
    for name, (times, values) in lines.items():
      shown = np.where(np.isfinite(values) & (values > 0), values, np.nan)
      ax.plot(times, shown, label=name)
    ax.set(ylabel=label)
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    if lines:
      ax.legend(frameon=False, fontsize="small")
  axes[-1].set_xlabel("micro-step")
  return axes


def _curves(history: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
  """For each region the micro-steps and the values of a key: float [N] each."""
  names = [name for name in history[-1] if name.endswith(f"/{key}")]
  curves = {}
  for name in names:
    points = [(entry["micro_step"], entry[name]) for entry in history if name in entry]
    curves[name.removesuffix(f"/{key}")] = np.array(points, float).T
  return curves


def _mean_periods(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Micro-steps per update since the entry at which the number of updates last changed."""
  periods = {}
  for name, (times, updates) in _curves(history, "updates").items():
    times, updates = np.append(0, times), np.append(0, updates)
    changed = np.append(True, np.diff(updates) > 0)
    times, updates = times[changed], updates[changed]
    periods[name] = times[1:], np.diff(times) / np.diff(updates)
  return periods
