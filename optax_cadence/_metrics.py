"""What a cadence is doing, as scalars for a logger and as a picture."""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    A flat dict: `micro_step`, and for each region, named by its parameter's path (or by its
    group's number, where the state does not hold it):

    - `NAME/period`: micro-steps of the window in force; under a policy, of the last one that
      fired (0 before the first). Not for groups with `nonfinite="skip"` or
      `accumulate="latest"` without a policy, whose state does not tell.
    - `NAME/updates`: updates applied; `NAME/skipped`: micro-batches left out, if any can be.
    - `NAME/noise_scale`: tr Σ / |G|² in micro-batches, smoothed; infinite where no gradient can be
      told from the noise, NaN before the first window. Where it is measured.
    - `NAME/snr`: squared signal-to-noise ratio of a window's mean, likewise. Under a policy.

  Raises:
    ValueError: If there is no cadence and no `noise_scale` in it.

  >>> import jax.numpy as jnp, optax, optax_cadence as oc
  >>> tx = oc.cadence(optax.sgd(1.0), {"a": 4, "b": 2})
  >>> state = tx.init({"a": jnp.ones(2), "b": jnp.ones(2)})
  >>> sorted(oc.metrics(state))
  ['a/period', 'a/updates', 'b/period', 'b/updates', 'micro_step']
  """
  nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, _STATES))
  found = [node for node in nodes if isinstance(node, _STATES)]
  if not found:
    raise ValueError(f"metrics: expected a cadence in the state, found {type(state).__name__}")
  names = _names(found)
  small = [node._replace(groups=tuple(map(_small, node.groups))) for node in found]
  traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(small))
  small = small if traced else jax.device_get(small)
  groups = [group for node in small for group in node.groups]
  values: dict[str, Any] = {"micro_step": small[0].micro_step}
  for regions, group in zip(names, groups, strict=True):
    for i, name in enumerate(regions):
      values |= {f"{name}/{key}": value for key, value in _region(group, i, jnp if traced else np)}
  return values


def _small(group: Any) -> Any:
  """The group without what is as large as parameters."""
  if isinstance(group, GroupState):
    return group._replace(inner_state=None, accumulators=None)
  return group._replace(sums=None)


def _region(group: Any, i: int, xp: Any) -> Iterator[tuple[str, Any]]:
  """Names and values of region i."""
  if not isinstance(group, GroupState):
    yield "noise_scale", _noise_scale_of(group.estimate, i, xp)
    return
  confidence = group.confidence
  if confidence is not None:
    yield "period", confidence.period
  elif group.remaining is None:
    yield "period", xp.int32(1)
  elif group.window is not None and group.skipped is None:
    yield "period", group.window + group.remaining
  yield "updates", group.updates
  if group.skipped is not None:
    yield "skipped", group.skipped[i]
  if confidence is not None:
    yield "noise_scale", _noise_scale_of(confidence.estimate, i, xp)
    yield "snr", confidence.period.astype(xp.float32) / _noise_scale_of(confidence.estimate, i, xp)


def _noise_scale_of(estimate: _statistics.Estimate, i: int, xp: Any) -> Any:
  signal, noise, weight = estimate.signal[i], estimate.noise[i], estimate.weight[i]
  # Rounding may leave less than no noise; the smallest number keeps its inverse finite.
  noise = xp.maximum(noise, xp.finfo(xp.float32).tiny)
  ratio = xp.where(signal > 0, noise / xp.where(signal > 0, signal, 1), xp.inf)
  return xp.where(weight > 0, ratio, xp.nan).astype(xp.float32)[()]


def _names(states: Sequence[Any]) -> list[list[str]]:
  """A name for every region of every group; those that occur twice get their group's number."""
  found = []
  for state in states:
    for g, group in enumerate(state.groups):
      tree = group.accumulators if isinstance(group, GroupState) else group.sums
      paths = [_paths.join(path) for path, _ in _paths.flatten_with_paths(tree)]
      found.append([path or "params" for path in paths] or [f"group_{g}"])
  counts = collections.Counter(name for regions in found for name in regions)
  return [
    [f"{name}#{g}" if counts[name] > 1 else name for name in regions]
    for g, regions in enumerate(found)
  ]


def plot_confidence(history: Sequence[dict[str, Any]], *, axes: Any = None) -> Any:
  """Draws how the periods moved, and the noise scales where they are measured.

  A period is the mean over what lies between two entries: micro-steps per update.

  Args:
    history: What `metrics` returned, from time to time.
    axes: Two Matplotlib axes to draw on; new ones by default.

  Returns:
    The axes.

  Raises:
    ValueError: If the history is empty.
    ImportError: If Matplotlib is not installed (`pip install optax_cadence[plot]`).
  """
  if not history:
    raise ValueError("plot_confidence: expected metrics of at least one micro-step, found none")
  if axes is None:
    import matplotlib.pyplot as plt

    axes = plt.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained")[1]
  labels = "mean period (micro-steps)", "noise scale (micro-batches)"
  curves = _mean_periods(history), _curves(history, "noise_scale")
  for ax, label, lines in zip(axes, labels, curves, strict=True):
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
