"""The gradient noise scale as a transformation that passes gradients through.

The formulas are in `statistics`; policies keep the same estimates by themselves.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _checks
from optax_cadence import _control
from optax_cadence import _window
from optax_cadence._state import is_stand_in
from optax_cadence._state import per_region
from optax_cadence._state import Regions
from optax_cadence._weights import of_leaves
from optax_cadence._weights import of_regions
from optax_cadence.confidence import policies
from optax_cadence.confidence import statistics
from optax_cadence.regions import layout as layouts
from optax_cadence.schedules.every import Every


class MeasuredGroup(NamedTuple):
  """What `noise_scale` keeps of the R regions that share a window.

  Attributes:
    sums: Sum of the gradients in the window, a tree as the group's tensors form it.
    length: Gradients in the window: int32 scalar; with weights int32 [R], those of weight above 0.
    remaining: Micro-steps until the window ends: int32 scalar.
    squares: Sum of the squared norms of its gradients: float32 [R].
    estimate: |G|² and tr Σ, smoothed over windows.
    weight: Sum of the weights of the gradients in the window: float32 [R]. None without weights.
  """

  sums: Any
  length: jax.Array
  remaining: jax.Array
  squares: jax.Array
  estimate: statistics.Estimate
  weight: jax.Array | None = None


class NoiseScaleState(NamedTuple):
  """State of `noise_scale`.

  Attributes:
    micro_step: Micro-steps done: int32 scalar.
    groups: The regions that share a window, by its length, as in a `CadenceState`.
    regions: The names of each group's regions.
  """

  micro_step: jax.Array
  groups: dict[str, MeasuredGroup]
  regions: Regions


def noise_scale(
  every: Any = 8, *, decay: float = 0.9, weighted: bool = False
) -> optax.GradientTransformationExtraArgs:
  r"""Measures :math:`|G|^2` and :math:`\operatorname{tr} \Sigma` of every region.

  Gradients pass through as they are. A window of n of them yields an unbiased estimate of both,
  which are smoothed apart from one another; their ratio :math:`\operatorname{tr} \Sigma / |G|^2` is
  the noise scale, in micro-batches. `oc.metrics` reads it. It holds one accumulator, and reads it
  only where a window ends. Inside a policy the same is measured without one more.

  Args:
    every: Length of the windows, at least 2, as for `oc.cadence`: an integer, a grid, or a
      tree prefix of such, but no policies.
    decay: Weight of the past at the end of each window, from 0 to below 1.
    weighted: Whether micro-batches are of different sizes, told by `weight` as for `oc.cadence`:
      `update(updates, state, weight=...)`. A noise scale of 1000 then is a weight of 1000 (tokens,
      say) and not so many micro-batches.

  Returns:
    A gradient transformation with a `NoiseScaleState`.

  Raises:
    ValueError: If a window is shorter than 2, a policy, or does not fit the parameters.

  References:
    McCandlish et al. 2018, An empirical model of large-batch training, arXiv:1812.06162.

  >>> import jax.numpy as jnp, optax_cadence as oc
  >>> tx = oc.noise_scale(2)
  >>> state = tx.init(jnp.zeros(1))
  >>> for g in (1.0, 3.0):  # their mean is 2, |G|² is 1 · 3, tr Σ is 2
  ...   _, state = tx.update(jnp.array([g]), state)
  >>> estimate = state.groups["2"].estimate
  >>> print(estimate.signals(), estimate.noises())
  [3.] [2.]
  """
  decay = policies.fraction("decay", decay)

  def layout_of(tree: Any) -> layouts.Layout:
    layout = layouts.layout(every, tree)
    for group in layout.groups:
      try:
        _check_window(group.every)
      except ValueError as error:
        name = layout.name(group.leaves[0]) if group.leaves else ""
        raise layouts.named(error, name) from None
    return layout

  def init_group(every: Every, n: int, sums: Any) -> MeasuredGroup:
    return MeasuredGroup(
      sums,
      jnp.zeros(per_region(n) if weighted else (), jnp.int32),
      every.first_window(),
      jnp.zeros(per_region(n), jnp.float32),
      statistics.no_estimate(n),
      jnp.zeros(per_region(n), jnp.float32) if weighted else None,
    )

  def init(params: optax.Params) -> NoiseScaleState:
    groups = {}
    if is_stand_in(params):
      known = layouts.cadences_of(every)
      if known is None:
        raise ValueError(
          "tree_map_params asks what groups noise_scale has without parameters: expected every as a"
          f" tree or by_path, found {_checks.shown(every)}; give the tree that it returns"
        )
      for name, window in known.by_name.items():
        groups[name] = init_group(window, 0, params)
      return NoiseScaleState(jnp.int32(0), groups, Regions({}))
    layout = layout_of(params)
    for group in layout.groups:
      tensors = group.take(layouts.leaves_of(params))
      sums = [jnp.zeros_like(x, _window.accumulator_dtype(x.dtype, None)) for x in tensors]
      groups[group.name] = init_group(group.every, len(sums), layout.tree(group, sums))
    return NoiseScaleState(jnp.int32(0), groups, Regions.of(names=layout.region_names()))

  def update(
    updates: optax.Updates,
    state: NoiseScaleState,
    params: Any = None,
    *,
    weight: Any = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, NoiseScaleState]:
    del params, extra_args
    layout, leaves = layout_of(updates), layouts.leaves_of(updates)
    weights = of_leaves(weight, layout, leaves) if weighted else None
    micro_step, groups = optax.safe_increment(state.micro_step), {}
    for group in layout.groups:
      old, tensors = state.groups[group.name], group.take(leaves)
      if tensors:
        heavy = None if weights is None else of_regions(weights, group)
        old = _measure(group.every, old, tensors, micro_step, decay, heavy)
      groups[group.name] = old
    return updates, NoiseScaleState(micro_step, groups, state.regions)

  return optax.GradientTransformationExtraArgs(init, update)


def _measure(
  every: Every,
  old: MeasuredGroup,
  grads: list[jax.Array],
  micro_step: jax.Array,
  decay: Any,
  weights: jax.Array | None,
) -> MeasuredGroup:
  """The state of a group after one more gradient of each of its tensors, of these weights."""
  sums, structure = jax.tree.flatten(old.sums)
  before = _window.Window(sums, old.length, None, squares=old.squares, weights=old.weight)
  window = _window.accumulate(before, grads, weights=weights)
  due = old.remaining == 1

  def estimated(estimate: statistics.Estimate, consts: Any) -> statistics.Estimate:
    sums, length, squares, weight = consts
    numbers = statistics.of(length, squares, statistics.squared_norms(sums), weight)
    return statistics.smooth(estimate, numbers, decay)

  assert window.squares is not None
  consts = window.sums, window.length, window.squares, window.weights
  return MeasuredGroup(
    jax.tree.unflatten(structure, window.sums),
    jnp.where(due, 0, window.length),
    jnp.where(due, every.window(micro_step), old.remaining - 1),
    window.squares,
    _control.maybe(due, estimated, old.estimate, consts),
    window.weights,
  )


def _check_window(every: Every) -> None:
  """Raises `ValueError` unless windows are long enough to tell noise from."""
  if every.policy is not None:
    raise ValueError(f"noise_scale expects windows of known length, found {every}")
  if every.static and every.period < 2:
    raise ValueError(f"noise_scale expects windows of at least 2 gradients, found {every}")
