"""Lets the schedules inside an optimizer count the micro-steps of the run.

Schedule states are recognised by their type; counters that belong to an optimizer
itself, such as Adam's for bias correction, are left alone.
"""

from typing import Any

import jax
import optax

_INJECTED = (optax.InjectStatefulHyperparamsState, optax.InjectHyperparamsState)


def _counts(node: Any) -> bool:
  """Whether this is the state of a schedule: it has a count and nothing besides."""
  # By name: `WrappedScheduleState` has no public one, and making one would start the backend.
  kind = type(node)
  return isinstance(node, optax.ScaleByScheduleState) or (
    kind.__name__ == "WrappedScheduleState" and kind.__module__.startswith("optax.")
  )


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
    if _counts(node):
      return node._replace(count=micro_steps.astype(node.count.dtype))
    if isinstance(node, _INJECTED):
      fields = {name: set_schedules(value, micro_steps) for name, value in node._asdict().items()}
      return type(node)(**fields | {"count": micro_steps.astype(node.count.dtype)})
    return node

  return jax.tree.map(visit, state, is_leaf=lambda x: _counts(x) or isinstance(x, _INJECTED))
