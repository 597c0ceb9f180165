"""The gradient noise scale as a transformation that passes gradients through.

The formulas are in `_statistics`; policies keep the same estimates by themselves.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _control
from optax_cadence import _layout
from optax_cadence import _policies
from optax_cadence import _schedules
from optax_cadence import _statistics
from optax_cadence import _windows


class MeasuredGroup(NamedTuple):
  """What `noise_scale` keeps of the R regions that share a window.

  Attributes:
    sums: Sum of the gradients in the window, a tree as the group's tensors form it.
    length: Gradients in the window: int32 scalar.
    remaining: Micro-steps until the window ends: int32 scalar.
    squares: Sum of the squared norms of its gradients: float32 [R].
    estimate: |G|² and tr Σ, smoothed over windows.
    regions: As in a cadence's `GroupState`.
  """

  sums: Any
  length: jax.Array
  remaining: jax.Array
  squares: jax.Array
  estimate: _statistics.Estimate
  regions: Any


class NoiseScaleState(NamedTuple):
  """State of `noise_scale`.

  Attributes:
    micro_step: Micro-steps done: int32 scalar.
    groups: The regions, by the window that they share.
  """

  micro_step: jax.Array
  groups: tuple[MeasuredGroup, ...]


def noise_scale(every: Any = 8, *, decay: float = 0.9) -> optax.GradientTransformation:
  r"""Measures :math:`|G|^2` and :math:`\operatorname{tr} \Sigma` of every region.

  Gradients pass through as they are. A window of n of them yields an unbiased estimate of both,
  which are smoothed apart from one another; their ratio :math:`\operatorname{tr} \Sigma / |G|^2` is
  the noise scale, in micro-batches. `oc.metrics` reads it. It holds one accumulator, and reads it
  only where a window ends. Inside a policy the same is measured without one more.

  Args:
    every: Length of the windows, at least 2, as for `oc.cadence`: an integer, a grid, or a
      tree prefix of such, but no policies.
    decay: Weight of the past at the end of each window, from 0 to below 1.

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
  >>> print(state.groups[0].estimate.signals(), state.groups[0].estimate.noises())
  [3.] [2.]
  """
  decay = _policies.fraction("decay", decay)

  def layout_of(tree: Any) -> _layout.Layout:
    layout = _layout.layout(every, tree)
    for group in layout.groups:
      path = layout.paths[group.leaves[0]]
      _layout.named(path, _check_window, group.every)
    return layout

  def init(params: optax.Params) -> NoiseScaleState:
    layout, groups = layout_of(params), []
    for group in layout.groups:
      tensors = group.take(_layout.leaves(params))
      sums = [jnp.zeros(x.shape, _windows.accumulator_dtype(x.dtype, None)) for x in tensors]
      groups.append(
        MeasuredGroup(
          layout.tree(group, sums),
          jnp.int32(0),
          group.every.first_window(),
          jnp.zeros(len(sums), jnp.float32),
          _statistics.no_estimate(len(sums)),
          layout.regions(group),
        )
      )
    return NoiseScaleState(jnp.int32(0), tuple(groups))

  def update(
    updates: optax.Updates, state: NoiseScaleState, params: Any = None
  ) -> tuple[optax.Updates, NoiseScaleState]:
    del params
    layout, leaves = layout_of(updates), _layout.leaves(updates)
    micro_step = optax.safe_increment(state.micro_step)
    pairs = zip(layout.groups, state.groups, strict=True)
    groups = [_measure(g.every, old, g.take(leaves), micro_step, decay) for g, old in pairs]
    return updates, NoiseScaleState(micro_step, tuple(groups))

  return optax.GradientTransformation(init, update)


def _measure(
  every: _schedules.Every,
  old: MeasuredGroup,
  grads: list[jax.Array],
  micro_step: jax.Array,
  decay: Any,
) -> MeasuredGroup:
  treedef = jax.tree.structure(old.sums)
  window = _windows.Window(jax.tree.leaves(old.sums), old.length, None, old.squares)
  window, due = _windows.add(window, grads), old.remaining == 1
  squares = jnp.asarray(window.squares)

  def estimated(estimate: _statistics.Estimate, window: Any) -> _statistics.Estimate:
    sums, length, squares = window
    found = _statistics.of(length, squares, _statistics.squared_norms(sums))
    return _statistics.smooth(estimate, found, decay)

  consts = (window.sums, window.length, squares)
  return MeasuredGroup(
    jax.tree.unflatten(treedef, window.sums),
    jnp.where(due, 0, window.length),
    jnp.where(due, every.window(micro_step), old.remaining - 1),
    squares,
    _control.maybe(due, estimated, old.estimate, consts),
    old.regions,
  )


def _check_window(every: _schedules.Every) -> None:
  if every.policy is not None:
    raise ValueError(f"noise_scale expects windows of known length, found {every}")
  if every.static and every.period < 2:
    raise ValueError(f"noise_scale expects windows of at least 2 gradients, found {every}")
