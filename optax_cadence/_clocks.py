"""Which clock a learning-rate schedule inside the inner optimizer reads.

Schedule states are recognised by their type; counters that belong to an optimizer
itself, such as Adam's for bias correction, are left alone.
"""

from typing import Any

import jax
import optax

_WrappedScheduleState = type(optax.schedules.WrappedSchedule(lambda count: count).init())
_INJECTED = (optax.InjectStatefulHyperparamsState, optax.InjectHyperparamsState)
_COUNTING = (optax.ScaleByScheduleState, _WrappedScheduleState)


def set_schedules(state: optax.OptState, micro_steps: jax.Array) -> optax.OptState:
  """Sets every schedule in an optimizer state to the micro-steps done.

  Args:
    state: State of any optimizer. Set are the counters of `ScaleByScheduleState` (every
      learning rate given as a schedule) and of `inject_hyperparams`.
    micro_steps: int32 scalar.

  Returns:
    The state, with nothing else changed.
  """

  def visit(node: Any) -> Any:
    if isinstance(node, _COUNTING):
      return node._replace(count=_like(micro_steps, node.count))
    if isinstance(node, _INJECTED):
      fields = {name: set_schedules(value, micro_steps) for name, value in node._asdict().items()}
      return type(node)(**fields | {"count": _like(micro_steps, node.count)})
    return node

  return jax.tree.map(visit, state, is_leaf=lambda x: isinstance(x, (*_COUNTING, *_INJECTED)))


def _like(count: jax.Array, old: jax.Array) -> jax.Array:
  return count.astype(old.dtype)
