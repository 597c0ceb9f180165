"""What a cadence is doing, as scalars for a logger."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _checks
from optax_cadence import _paths
from optax_cadence._state import cadence_states
from optax_cadence._state import CadenceState
from optax_cadence._state import FoundState
from optax_cadence._state import GroupState
from optax_cadence._state import State
from optax_cadence._state import states_of
from optax_cadence.confidence.noise_scale import MeasuredGroup
from optax_cadence.confidence.noise_scale import NoiseScaleState
from optax_cadence.confidence.statistics import Estimate
from optax_cadence.report.gradient_norm import GradientNormState


def metrics(state: Any, by: Literal["region", "group"] = "region") -> dict[str, Any]:
  """The values of every cadence and `noise_scale` in an optimizer state, for any logger.

  All come from the device in one transfer. Under `jax.jit` they are scalars of the program.

  Args:
    state: State of a cadence, or of any optimizer that has one in it; also the `opt_state` of an
      `nnx.Optimizer`. Of many states in one, as `jax.vmap(tx.init)` makes them, every value is an
      array with the same leading axes.
    by: `"region"`, or `"group"` for the short form.

  Returns:
    A flat dict. By group: `micro_step`, and for every group, under the name that it has in
    `oc.has_updated`,

    - `NAME/length`: micro-steps of the window in force; under a policy, of the last one that
      fired.
    - `NAME/updates`: updates applied.
    - `NAME/skipped`: micro-batches left out, in the region with the most.
    - `NAME/learning_rate`: where it is a hyperparameter of `optax.inject_hyperparams`. Then there
      is also `learning_rate`, that of the group with the most updates.
    - `NAME/gradient_norm`: of the last mean gradient, with `oc.gradient_norm` in the cadence.

    By region: `micro_step`, and these five for every region. A region is named by the path of its
    parameter; several in one parameter are `NAME/0`, `NAME/1`, …, in the order of the groups.

    - `NAME/period`: micro-steps of the window in force; under a policy, of the last one that
      fired (0 before the first).
    - `NAME/updates`: updates applied.
    - `NAME/skipped`: micro-batches left out by `nonfinite="skip"`.
    - `NAME/noise_scale`: tr Σ / |G|² in micro-batches, smoothed; infinite where no gradient can be
      told from the noise. From a `noise_scale` with the same region, or else from the region's
      policy; NaN where neither measures it, and before the first window.
    - `NAME/snr`: squared signal-to-noise ratio of the mean of such a window, likewise.

    With `weighted=True` there is `NAME/weight` too, the sum of the weights in the window, or in the
    last one where it is empty; the noise scale is then in weights, and `snr` that of a mean of so
    much weight.

    A `noise_scale` with regions that no cadence has gives their `noise_scale` alone.

  Raises:
    ValueError: If there is no cadence and no `noise_scale` in it, or, by group, no cadence.

  >>> import jax.numpy as jnp, optax, optax_cadence as oc
  >>> tx = oc.cadence(optax.sgd(1.0), {"a": 4, "b": 2})
  >>> state = tx.init({"a": jnp.ones(2), "b": jnp.ones(2)})
  >>> found = oc.metrics(state)
  >>> {name: int(value) for name, value in found.items() if name.endswith("period")}
  {'a/period': 4, 'b/period': 2}
  >>> sorted(oc.metrics(state, by="group"))[:4]
  ['2/length', '2/skipped', '2/updates', '4/length']
  """
  if by not in ("region", "group"):
    raise ValueError(f"metrics: by must be 'region' or 'group', found {_checks.shown(by)}")
  if by == "group":
    return _by_group(cadence_states(state), state)
  nodes = states_of(state, CadenceState, FoundState, NoiseScaleState)
  if not nodes:
    raise ValueError(f"metrics: expected a cadence in the state, found {type(state).__name__}")
  small, xp = _fetched(
    [(node.micro_step, {name: _small(g) for name, g in node.groups.items()}) for node in nodes]
  )
  cadences: dict[str, dict[str, Any]] = {}
  measured: dict[str, dict[str, Any]] = {}
  for node, (_, groups) in zip(nodes, small, strict=True):
    rows = cadences if isinstance(node, State) else measured
    for group, names in node.regions.names.items():
      for i, name in enumerate(names):
        # Of two cadences on one parameter the second gets a number.
        rows[_paths.unused(name, rows)] = _row(groups[group], i, xp)
  values = {"micro_step": small[0][0]}
  for name in dict.fromkeys([*cadences, *measured]):
    row = cadences.get(name, {}) | measured.get(name, {})
    if "period" in row:
      length = row.get("weight", row["period"].astype(np.float32))
      row["snr"] = length / row["noise_scale"]
    values |= {f"{name}/{key}": value for key, value in row.items()}
  return values


def _by_group(nodes: list[State], state: Any) -> dict[str, Any]:
  if not nodes:
    raise ValueError(f"metrics: expected a cadence in the state, found {_checks.shown(state)}")
  rows: dict[str, dict[str, Any]] = {}
  for node in nodes:
    for name, group in node.groups.items():
      rows[_paths.unused(name, rows)] = _row_of_group(_paths.without_variables(group))
  (micro_step, rows), xp = _fetched((nodes[0].micro_step, rows))
  values = {"micro_step": micro_step}
  rates = [row for row in rows.values() if "learning_rate" in row]
  if rates:
    most = xp.stack([row["updates"] for row in rates]).argmax(0)
    found = xp.stack([row["learning_rate"] for row in rates])
    values["learning_rate"] = xp.take_along_axis(found, most[None], 0)[0]
  return values | {f"{name}/{key}": x for name, row in rows.items() for key, x in row.items()}


def _row_of_group(group: GroupState) -> dict[str, Any]:
  none = jnp.zeros_like(group.period)
  skipped = none if group.skipped is None else group.skipped
  row = {
    "length": group.period,
    "updates": group.updates,
    "skipped": skipped.max(-1) if skipped.ndim > none.ndim else skipped,
  }

  def is_known(node: Any) -> bool:
    return isinstance(node, GradientNormState) or hasattr(node, "hyperparams")

  for node in jax.tree.leaves(group.inner_state, is_leaf=is_known):
    if isinstance(node, GradientNormState):
      row.setdefault("gradient_norm", node.norm)
    elif is_known(node) and "learning_rate" in node.hyperparams:
      rate = jnp.asarray(node.hyperparams["learning_rate"])
      row.setdefault("learning_rate", rate.astype(jnp.float32))
  return row


def has_updated(state: Any) -> dict[str, Any]:
  """Which groups fired at the last micro-step, or in a `flush` after it.

  `any(oc.has_updated(state).values())` is `optax.MultiSteps.has_updated`; under `jax.jit` it is
  `jnp.stack(list(oc.has_updated(state).values())).any()`.

  Args:
    state: As for `metrics`.

  Returns:
    For each group of every cadence in it a bool scalar, by the name of the group as the state and
    `oc.describe` have it. A group of two cadences has a number at the second. Before the first
    micro-step all are False.

  Raises:
    ValueError: If there is no cadence in the state.

  >>> import jax.numpy as jnp, optax, optax_cadence as oc
  >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
  >>> tx = oc.cadence(optax.sgd(1.0), {"a": 4, "b": 1})
  >>> updates, state = tx.update(params, tx.init(params), params)
  >>> {name: bool(fired) for name, fired in oc.has_updated(state).items()}
  {'4': False, '1': True}
  """
  nodes = cadence_states(state)
  if not nodes:
    raise ValueError(f"has_updated: expected a cadence in the state, found {_checks.shown(state)}")
  fired: dict[str, Any] = {}
  for node in nodes:
    for name, group in node.groups.items():
      fired[_paths.unused(name, fired)] = _paths.without_variables(group.fired) > 0
  return fired


class _Group(NamedTuple):
  """What there is to read of a group; a field that it lacks is None."""

  period: Any = None
  updates: Any = None
  skipped: Any = None
  estimate: Any = None
  weight: Any = None


def _small(group: GroupState | MeasuredGroup) -> _Group:
  if isinstance(group, MeasuredGroup):
    return _Group(estimate=group.estimate)
  estimate = None if group.confidence is None else group.confidence.estimate
  return _Group(group.period, group.updates, group.skipped, estimate, group.weight)


def _row(group: _Group, i: int, xp: Any) -> dict[str, Any]:
  """The values of a group's region i; regions are the last axis, before it are those of vmap."""
  row = {}
  if group.updates is not None:
    none = xp.zeros_like(group.period)[()]
    skipped = none if group.skipped is None else group.skipped[..., i]
    row = {"period": group.period, "updates": group.updates, "skipped": skipped}
    if group.weight is not None:
      row["weight"] = group.weight[..., i]
  if group.estimate is None:
    row["noise_scale"] = xp.full_like(group.period, np.nan, xp.float32)[()]
  else:
    row["noise_scale"] = _noise_scale(group.estimate, i, xp)
  return row


def _noise_scale(estimate: Estimate, i: int, xp: Any) -> Any:
  signal, noise, weight = (x[..., i] for x in estimate)
  # Rounding may leave less than no noise; the smallest number keeps its inverse finite.
  noise = xp.maximum(noise, xp.finfo(xp.float32).tiny)
  ratio = xp.where(signal > 0, noise / xp.where(signal > 0, signal, 1), xp.inf)
  return xp.where(weight > 0, ratio, xp.nan).astype(xp.float32)[()]


def _fetched(tree: Any) -> tuple[Any, Any]:
  """A tree of int32 and float32 arrays of a state, as NumPy arrays unless they are traced.

  Returns:
    The tree, without the variables of NNX; and what computes with it: `numpy` or `jax.numpy`.
  """
  tree = _paths.without_variables(tree)
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree)):
    return tree, jnp
  return _on_host(tree), np


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
