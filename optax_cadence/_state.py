"""The state of a cadence: what a checkpoint holds."""

from typing import Any, NamedTuple

import jax
import optax


class GroupState(NamedTuple):
  """State of one group; a field that the group does not need is None.

  Attributes:
    inner_state: State of the group's instance of the inner optimizer.
    accumulators: Sum of the gradients in the window, in the tree that the inner
      optimizer sees; of no meaning while the window is empty. None for period 1 and for
      `accumulate="latest"`.
    window: Micro-steps in the window so far: int32 scalar, or int32 [R] with one for each
      of the group's R regions under `nonfinite="skip"`. None without accumulators.
    remaining: Micro-steps until the group is due: int32 scalar. None for period 1.
    updates: Updates applied so far: int32 scalar.
    skipped: Micro-batches left out so far, int32 [R]. None unless `nonfinite="skip"`.
  """

  inner_state: optax.OptState
  accumulators: Any
  window: jax.Array | None
  remaining: jax.Array | None
  updates: jax.Array
  skipped: jax.Array | None


class CadenceState(NamedTuple):
  """State of `cadence`.

  Attributes:
    micro_step: Micro-steps done: int32 scalar.
    groups: State of each group, in order of first appearance in the tree.
  """

  micro_step: jax.Array
  groups: tuple[GroupState, ...]
