"""The state of a cadence: what a checkpoint holds."""

from typing import Any, NamedTuple

import jax
import optax

from optax_cadence import _statistics


class ConfidenceState(NamedTuple):
  """What a group under a policy knows of its R regions.

  Attributes:
    squares: Sum of the squared norms of the gradients in the window: float32 [R]; of no
      meaning while the window is empty. None where the policy does not read them.
    estimate: |G|² and tr Σ, smoothed over the windows until now; None likewise.
    sample: Some entries of each region's parameters, as they were before the last update; None
      where the policy does not read updates.
    policy: What the policy remembers.
  """

  squares: jax.Array | None
  estimate: _statistics.Estimate | None
  sample: tuple[jax.Array, ...] | None
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
    period: Micro-steps of the window in force; under a policy, of the last one that fired, 0
      before the first: int32 scalar.
    updates: Updates applied so far: int32 scalar.
    skipped: Micro-batches left out so far, int32 [R]. None unless `nonfinite="skip"`.
    regions: Which leaves the group has how many regions of: a tree that names them and has
      no arrays.
    confidence: What a policy goes by; None unless one decides.
  """

  inner_state: optax.OptState
  accumulators: Any
  window: jax.Array | None
  remaining: jax.Array | None
  period: jax.Array
  updates: jax.Array
  skipped: jax.Array | None
  regions: Any
  confidence: ConfidenceState | None = None


class SharedState(NamedTuple):
  """What the groups of a leaf under a mask have together, in the shape of the leaf.

  Attributes:
    inner_state: A state of the inner optimizer for this leaf alone, of which only the arrays
      are kept that have a number for each entry; the rest is in the state of each group.
    accumulators: Sum of the gradients of each entry's window, in a tree that has this leaf alone;
      of no meaning while that window is empty.
  """

  inner_state: optax.OptState
  accumulators: Any


class CadenceState(NamedTuple):
  """State of `cadence`.

  Attributes:
    micro_step: Micro-steps done: int32 scalar.
    groups: State of each group, in order of first appearance in the tree.
    shared: State of each leaf under a mask that the groups share, which they do where the inner
      optimizer is elementwise; in the groups its tensors have no entries.
  """

  micro_step: jax.Array
  groups: tuple[GroupState, ...]
  shared: tuple[SharedState, ...] = ()
