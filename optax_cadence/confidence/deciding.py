"""How a policy decides within a micro-step: what it is told, when it is asked, what it remembers.

The step (`_step`) imports this only for groups under a policy.
"""

import dataclasses
import functools
from typing import Any, TYPE_CHECKING

import jax
import jax.numpy as jnp

from optax_cadence import _checks
from optax_cadence import _control
from optax_cadence import _window
from optax_cadence._state import ConfidenceState
from optax_cadence._state import GroupState
from optax_cadence._state import per_region
from optax_cadence._window import Window
from optax_cadence.confidence import sample
from optax_cadence.confidence import statistics
from optax_cadence.regions.layout import Group
from optax_cadence.regions.layout import Leaves
from optax_cadence.schedules.policy import Policy

if TYPE_CHECKING:
  from optax_cadence._step import Call

# Of the estimates that a policy's group keeps for whoever looks at them, per window.
_DECAY = 0.9


def init(policy: Policy, tensors: Any, regions: int) -> ConfidenceState:
  """What a group under a policy knows before the first gradient.

  Args:
    policy: The policy.
    tensors: The tree of the group's tensors.
    regions: How many there are.
  """
  n, memory = regions, jax.tree.map(jnp.asarray, policy.init())
  return ConfidenceState(
    squares=jnp.zeros(per_region(n), jnp.float32) if policy.reads_gradients else None,
    estimate=statistics.no_estimate(n) if policy.reads_gradients else None,
    sample=jax.tree.map(sample.nothing_seen, tensors) if policy.reads_updates else None,
    policy=_control.cast_like(memory, memory),
  )


@dataclasses.dataclass(frozen=True)
class Decision:
  """What a policy has decided at a micro-step.

  Attributes:
    policy: The policy.
    state: The group's state before the micro-step, but with a new sample of the parameters if the
      policy reads updates.
    window: The group's window.
    statistics: What the policy was told.
    due: Whether the group is due.
    fires: The same; but where the policy reads updates, known only after the parameters have been
      looked at, or XLA would keep them for it in a copy.
  """

  policy: Policy
  state: GroupState
  window: Window
  statistics: statistics.Statistics
  due: jax.Array
  fires: jax.Array

  def learned(self, new: GroupState) -> GroupState:
    """The group's state with what the policy learns of a window that has fired."""
    assert new.confidence is not None
    _, estimate, seen, memory = new.confidence
    unchanged = self.state.period, estimate, memory
    if estimate is not None:
      estimate = statistics.smooth(estimate, self.statistics, _DECAY)
    memory = _remembered(self.policy, self.policy.fired(self.statistics, memory), memory)
    changed = _elapsed(self.policy, self.state), estimate, memory
    choose = functools.partial(jnp.where, self.due)
    period, estimate, memory = jax.tree.map(choose, changed, unchanged)
    confidence = ConfidenceState(self.window.squares, estimate, seen, memory)
    return new._replace(period=period, confidence=confidence)


def decide(
  call: "Call", group: Group, state: GroupState, window: Window, targets: Leaves
) -> Decision:
  """Asks the group's policy whether its window is enough."""
  policy, confidence = group.every.policy, state.confidence
  assert policy is not None
  assert confidence is not None
  asked = _elapsed(policy, state) >= policy.opens(confidence.policy)
  known = _statistics(asked, window)._replace(extra_args=call.extra_args)
  due = (state.remaining == 1) | (asked & _answer(policy, policy.due(known, confidence.policy)))
  decision = Decision(policy, state, window, known, due, due)
  return decision if confidence.sample is None else _look(decision, call, group, targets)


def _answer(policy: Policy, due: Any) -> bool | jax.Array:
  """What `due` has returned, if it is a boolean scalar."""
  is_bool = isinstance(due, bool) or jnp.dtype(bool) == getattr(due, "dtype", None)
  if not is_bool or jnp.shape(due):
    raise ValueError(
      f"{policy}: due must return a boolean scalar, as window.square.sum() > 1 is, found"
      f" {_checks.shown(due)}"
    )
  return due


def _remembered(policy: Policy, new: Any, old: Any) -> Any:
  """What `fired` has returned, in the dtypes of what `init` returned."""

  def inexact(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)

  def fits(x: Any, y: Any) -> bool:
    return jnp.shape(x) == jnp.shape(y) and (inexact(y) or not inexact(x))

  def described(tree: Any) -> Any:
    return jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree)

  structure: Any = jax.tree.structure(old)
  same = structure == jax.tree.structure(new)
  if not (same and jax.tree.all(jax.tree.map(fits, new, old))):
    raise ValueError(
      f"{policy}: fired must return a tree as init does, of the same shapes and kinds of numbers:"
      f" expected {described(old)}, found {described(new)}"
    )
  return _control.cast_like(new, old)


def _elapsed(policy: Policy, state: GroupState) -> Any:
  """Micro-steps of the window, this one included."""
  assert state.remaining is not None
  return policy.max_period - state.remaining + 1


def _statistics(asked: jax.Array, window: Window) -> statistics.Statistics:
  """Statistics of a window; its sum is read only where there is something to decide."""
  unknown = jnp.full(len(window.sums), jnp.nan, jnp.float32)
  if window.squares is None:
    return statistics.of(window.length, unknown, unknown, window.weights)

  def read(_: Any, consts: Any) -> jax.Array:
    sums, length, weights = consts
    total = Window(sums, length, None, weights=weights)
    as_read = []
    for i, x in enumerate(total.sums):
      as_read.append(total.reduced(i, _window.wider(x.dtype, jnp.float32), as_sum=True))
    return statistics.squared_norms(as_read)

  consts = window.sums, window.length, window.weights
  square = _control.maybe(asked, read, jnp.zeros_like(unknown), consts)
  return statistics.of(window.length, window.squares, square, window.weights)


def _look(decision: Decision, call: "Call", group: Group, targets: Leaves) -> Decision:
  """The decision, with how far the parameters have moved if the group is about to fire."""
  state, known = decision.state, decision.statistics
  params = targets if call.in_place else call.params
  if params is None:
    raise ValueError(f"{group.every}: a policy that reads updates needs params, found None")
  assert state.confidence is not None

  def look(carry: Any, params: Leaves) -> Any:
    return *sample.distances(carry[0], group.take(params)), jnp.array(True)

  samples, structure = jax.tree.flatten(state.confidence.sample)
  carry = samples, jnp.stack([known.update, known.params]), jnp.array(False)
  consts = {i: params[i] for i in group.leaves}
  about_to_fire = decision.due & (decision.window.length > 0).any()
  samples, (update, norm), fires = _control.maybe(about_to_fire, look, carry, consts)
  seen = jax.tree.unflatten(structure, samples)
  return dataclasses.replace(
    decision,
    state=state._replace(confidence=state.confidence._replace(sample=seen)),
    statistics=known._replace(update=update, params=norm),
    fires=fires,
  )
