"""The state of a cadence: what a checkpoint holds."""

from typing import Any, NamedTuple

import jax
import optax

from optax_cadence import _statistics


class ConfidenceState(NamedTuple):
  """What a group under a policy knows of its R regions.

  Attributes:
    squares: Sum of the squared norms of the gradients in the window: float32 [R]; of no
      meaning while the window is empty.
    estimate: |G|² and tr Σ, smoothed over the windows until now.
    period: Micro-steps of the last window that fired, 0 before the first: int32 scalar.
    policy: What the policy remembers.
  """

  squares: jax.Array
  estimate: _statistics.Estimate
  period: jax.Array
  policy: Any


class GroupState(NamedTuple):
  """State of one group; a field that the group does not need is None.

  Attributes:
    inner_state: State of the group's instance of the inner optimizer.
    accumulators: Sum of the gradients in the window, in the tree that the inner
      optimizer sees; of no meaning while the window is empty. None for period 1 and for
      `accumulate="latest"`.
    window: Micro-steps in the window so far: int32 scalar, or int32 [R] with one for each
      of the group's R regions under `nonfinite="skip"`. None without accumulators.
    remaining: Micro-steps until the group is due, under a policy at the latest: int32
      scalar. None for period 1.
    updates: Updates applied so far: int32 scalar.
    skipped: Micro-batches left out so far, int32 [R]. None unless `nonfinite="skip"`.
    confidence: Statistics of the gradients; None unless a policy decides.
  """

  inner_state: optax.OptState
  accumulators: Any
  window: jax.Array | None
  remaining: jax.Array | None
  updates: jax.Array
  skipped: jax.Array | None
  confidence: ConfidenceState | None = None


class CadenceState(NamedTuple):
  """State of `cadence`.

  Attributes:
    micro_step: Micro-steps done: int32 scalar.
    groups: State of each group, in order of first appearance in the tree.
  """

  micro_step: jax.Array
  groups: tuple[GroupState, ...]
