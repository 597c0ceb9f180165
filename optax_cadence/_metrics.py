"""What a cadence is doing, as scalars for a logger and as a picture."""

import collections
import itertools
import math
from collections.abc import Container, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _layout
from optax_cadence import _noise_scale
from optax_cadence import _paths
from optax_cadence import _statistics
from optax_cadence._state import CadenceState
from optax_cadence._state import GroupState

_STATES = (CadenceState, _noise_scale.NoiseScaleState)


def metrics(state: Any) -> dict[str, Any]:
  """The values of every cadence and `noise_scale` in an optimizer state, for any logger.

  All come from the device in one transfer. Under `jax.jit` they are scalars of the program.

  Args:
    state: State of a cadence, or of any optimizer that has one in it.

  Returns:
    A flat dict: `micro_step`, and these five for every region. A region is named by the path of its
    parameter; several in one parameter are `NAME/0`, `NAME/1`, …, in the order of the groups.

    - `NAME/period`: micro-steps of the window in force; under a policy, of the last one that
      fired (0 before the first).
    - `NAME/updates`: updates applied.
    - `NAME/skipped`: micro-batches left out by `nonfinite="skip"`.
    - `NAME/noise_scale`: tr Σ / |G|² in micro-batches, smoothed; infinite where no gradient can be
      told from the noise. From a `noise_scale` with the same region, or else from the region's
      policy; NaN where neither measures it, and before the first window.
    - `NAME/snr`: squared signal-to-noise ratio of the mean of such a window, likewise.

    A `noise_scale` with regions that no cadence has gives their `noise_scale` alone.

  Raises:
    ValueError: If there is no cadence and no `noise_scale` in it.

  >>> import jax.numpy as jnp, optax, optax_cadence as oc
  >>> tx = oc.cadence(optax.sgd(1.0), {"a": 4, "b": 2})
  >>> state = tx.init({"a": jnp.ones(2), "b": jnp.ones(2)})
  >>> found = oc.metrics(state)
  >>> {name: int(value) for name, value in found.items() if name.endswith("period")}
  {'a/period': 4, 'b/period': 2}
  """
  nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, _STATES))
  found = [node for node in nodes if isinstance(node, _STATES)]
  if not found:
    raise ValueError(f"metrics: expected a cadence in the state, found {type(state).__name__}")
  small = [(node.micro_step, list(map(_small, node.groups))) for node in found]
  traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(small))
  small = small if traced else _on_host(small)
  cadences: dict[str, dict[str, Any]] = {}
  measured: dict[str, dict[str, Any]] = {}
  for node, (_, groups) in zip(found, small, strict=True):
    rows = cadences if isinstance(node, CadenceState) else measured
    for name, row in _rows(node, groups, jnp if traced else np):
      rows[_unused(name, rows)] = row
  values = {"micro_step": small[0][0]}
  for name in dict.fromkeys([*cadences, *measured]):
    row = cadences.get(name, {}) | measured.get(name, {})
    if "period" in row:
      row["snr"] = row["period"].astype(np.float32) / row["noise_scale"]
    values |= {f"{name}/{key}": value for key, value in row.items()}
  return values


class _Group(NamedTuple):
  """What there is to read of a group; a field that it lacks is None."""

  period: Any = None
  updates: Any = None
  skipped: Any = None
  estimate: Any = None


def _small(group: GroupState | _noise_scale.MeasuredGroup) -> _Group:
  if isinstance(group, _noise_scale.MeasuredGroup):
    return _Group(estimate=group.estimate)
  estimate = None if group.confidence is None else group.confidence.estimate
  return _Group(group.period, group.updates, group.skipped, estimate)


def _on_host(tree: Any) -> Any:
  """A tree of int32 and float32 arrays as NumPy arrays, which travel as one."""
  arrays, treedef = jax.tree.flatten(tree)
  shapes = [np.shape(x) for x in arrays]
  flat = jax.device_get(_packed(arrays))
  ends = np.cumsum([math.prod(shape) for shape in shapes])
  pieces = zip(arrays, shapes, np.split(flat, ends[:-1]), strict=True)
  return jax.tree.unflatten(treedef, [y.view(x.dtype).reshape(s)[()] for x, s, y in pieces])


@jax.jit
def _packed(arrays: list[jax.Array]) -> jax.Array:
  """The bits of int32 and float32 arrays, one after another: int32 vector."""
  bits = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in arrays]
  return jnp.concatenate([x.reshape(-1) for x in bits])


def _rows(node: Any, groups: list[_Group], xp: Any) -> Iterator[tuple[str, dict[str, Any]]]:
  """Name and values of every region of a cadence or `noise_scale`."""
  for names, group in zip(_names(node), groups, strict=True):
    for i, name in enumerate(names):
      noise_scale = xp.float32(np.nan)
      if group.estimate is not None:
        noise_scale = _noise_scale_of(group.estimate, i, xp)
      row = {"noise_scale": noise_scale}
      if group.updates is not None:
        skipped = xp.int32(0) if group.skipped is None else group.skipped[i]
        row = {"period": group.period, "updates": group.updates, "skipped": skipped} | row
      yield name, row


def _unused(name: str, names: Container[str]) -> str:
  """The name, with a number where there is one like it: of two cadences on one parameter."""
  numbered = (f"{name}#{i}" for i in itertools.count(2))
  return next(x for x in itertools.chain([name], numbered) if x not in names)


def _noise_scale_of(estimate: _statistics.Estimate, i: int, xp: Any) -> Any:
  signal, noise, weight = estimate.signal[i], estimate.noise[i], estimate.weight[i]
  # Rounding may leave less than no noise; the smallest number keeps its inverse finite.
  noise = xp.maximum(noise, xp.finfo(xp.float32).tiny)
  ratio = xp.where(signal > 0, noise / xp.where(signal > 0, signal, 1), xp.inf)
  return xp.where(weight > 0, ratio, xp.nan).astype(xp.float32)[()]


def _names(node: Any) -> list[list[str]]:
  """A name for every region of every group."""

  def is_leaf(x: Any) -> bool:
    return isinstance(x, _layout.Regions)

  found = [_paths.flatten_with_paths(group.regions, is_leaf) for group in node.groups]
  totals: collections.Counter[_paths.Path] = collections.Counter()
  for group in found:
    totals.update({path: len(regions.parts) for path, regions in group})
  numbers = {path: itertools.count() for path in totals}

  def name(path: _paths.Path) -> str:
    number = (str(next(numbers[path])),) if totals[path] > 1 else ()
    return _paths.join((*path, *number)) or "params"

  return [[name(path) for path, regions in group for _ in regions.parts] for group in found]


def plot_confidence(history: Sequence[dict[str, Any]], *, axes: Any = None) -> Any:
  """Draws how the periods moved, and below, if they are measured, the noise scales.

  A period is the mean over what lies between two entries: micro-steps per update.

  Args:
    history: What `metrics` returned, from time to time.
    axes: Matplotlib axes to draw on, one or two; new ones by default.

  Returns:
    The axes, as an array.

  Raises:
    ValueError: If the history is empty.
    ImportError: If Matplotlib is not installed (`pip install optax_cadence[plot]`).
  """
  if not history:
    raise ValueError("plot_confidence: expected metrics of at least one micro-step, found none")
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
  found = {}
  for name in names:
    points = [(entry["micro_step"], entry[name]) for entry in history if name in entry]
    found[name.removesuffix(f"/{key}")] = np.array(points, float).T
  return found


def _mean_periods(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Micro-steps per update since the entry at which the number of updates last changed."""
  found = {}
  for name, (times, updates) in _curves(history, "updates").items():
    times, updates = np.append(0, times), np.append(0, updates)
    changed = np.append(True, np.diff(updates) > 0)
    times, updates = times[changed], updates[changed]
    found[name] = times[1:], np.diff(times) / np.diff(updates)
  return found
