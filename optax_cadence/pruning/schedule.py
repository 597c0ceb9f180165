"""Functions of the micro-step: when new masks are due, and how sparse they are then."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _checks


@dataclasses.dataclass(frozen=True)
class Times:
  """Due every `period` micro-steps t = 1, 2, … from `begin` to `end`, both included.

  >>> from optax_cadence import pruning
  >>> [t for t in range(1, 10) if pruning.Times(2, begin=3, end=7).due(t)]
  [4, 6]
  """

  period: int
  begin: int = 1
  end: int | None = None

  def __post_init__(self) -> None:
    _checks.integer("every: the period", self.period, 1)
    _checks.integer("every: begin", self.begin)
    if self.end is None:
      return
    _checks.integer("every: end", self.end)
    if self.end - self.end % self.period < max(self.begin, 1):
      raise ValueError(
        f"every: expected a multiple of the period {self.period} from begin {self.begin} to end"
        f" {self.end}, found none: no micro-step is due"
      )

  def due(self, t: Any) -> Any:
    """Whether new masks are due at micro-step t; a Python bool if that is always so."""
    if self.period == 1 and self.begin <= 1 and self.end is None:
      return True
    due = (t % self.period == 0) & (t >= self.begin)
    return due if self.end is None else due & (t <= self.end)

  def last(self) -> int | None:
    """The last micro-step at which new masks are due; None if there is none, or it is not known."""
    return None if self.end is None else self.end - self.end % self.period

  def from_the_start(self) -> Any:
    """Whether masks that need no update are made with the state: unless `begin` is later."""
    return self.begin <= 1


def once(at: int) -> Times:
  """Due at micro-step `at` and never again.

  >>> from optax_cadence import pruning
  >>> pruning.once(5).due(5), pruning.once(5).due(10)
  (True, False)
  """
  at = _checks.integer("once: at", at, 1)
  return Times(at, at, at)


def every_epoch(examples: int, batch_size: int, *, drop_last: bool = False) -> Times:
  """Due at the end of every epoch.

  Args:
    examples: Number of examples in the training set.
    batch_size: Examples in a micro-batch.
    drop_last: Whether an epoch leaves out a last micro-batch that is not full.

  >>> from optax_cadence import pruning
  >>> pruning.every_epoch(50_000, 128).period
  391
  """
  examples = _checks.integer("every_epoch: examples", examples, 1)
  batch_size = _checks.integer("every_epoch: batch_size", batch_size, 1)
  if drop_last and examples < batch_size:
    raise ValueError(
      f"every_epoch: expected at least one full micro-batch with drop_last, found {examples}"
      f" examples and a batch_size of {batch_size}"
    )
  return Times(examples // batch_size if drop_last else -(-examples // batch_size))


@dataclasses.dataclass(frozen=True)
class _ByFunction(Times):
  """Due where a user's function `micro_step -> bool` says so."""

  period: int = 1
  function: Callable[[Any], Any] = bool

  def due(self, t: Any) -> Any:
    return self.function(t)

  def last(self) -> int | None:
    """See `Times`; a function that is due after micro-step 2**15 is taken to go on for ever."""
    t = np.arange(1, 2**16 + 1, dtype=np.int32)
    try:
      with jax.ensure_compile_time_eval():
        due = jax.vmap(self.function)(t)
    except jax.errors.JAXTypeError:
      return None  # The function cannot be traced.
    if isinstance(due, jax.core.Tracer):
      return None
    steps = np.flatnonzero(np.asarray(due)) + 1
    return int(steps[-1]) if len(steps) and steps[-1] <= 2**15 else None

  def from_the_start(self) -> Any:
    """See `Times`; the function is asked for micro-step 0."""
    return self.function(jnp.int32(0))


def as_times(every: Any) -> Times:
  """The times that the user gave: as such, as a period or as a function `micro_step -> bool`."""
  if isinstance(every, Times):
    return every
  if isinstance(every, int | np.integer) and not isinstance(every, bool):
    return Times(int(every))
  if callable(every):
    return _ByFunction(function=every)
  raise ValueError(f"every: expected an integer, pruning.Times or a function, found {every!r}")


def cubic(final: Any, begin: int, end: int, *, initial: float = 0.0) -> Callable[[Any], jax.Array]:
  r"""A sparsity that rises fast at first: :math:`s_f + (s_i - s_f)(1 - (t - t_0)/(t_1 - t_0))^3`.

  Args:
    final: Sparsity :math:`s_f` from micro-step `end` on.
    begin: Micro-step :math:`t_0` at which it starts to rise.
    end: Micro-step :math:`t_1` at which it has risen.
    initial: Sparsity :math:`s_i` up to `begin`.

  Returns:
    A schedule `micro_step -> sparsity`.

  References:
    Zhu and Gupta 2017, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_

  >>> from optax_cadence import pruning
  >>> float(pruning.cubic(0.5, begin=0, end=10)(5))
  0.4375
  """
  _checks.number("cubic: final", final, 0, 1)
  _checks.number("cubic: initial", initial, 0, 1)
  _checks.integer("cubic: begin", begin)
  _checks.integer("cubic: end", end)
  if end <= begin:
    raise ValueError(f"cubic: expected an end after {begin}, found {end}")

  def schedule(t: Any) -> jax.Array:
    left = 1 - jnp.clip((jnp.asarray(t, jnp.float32) - begin) / (end - begin), 0.0, 1.0)
    return jnp.asarray(final + (initial - final) * left**3, jnp.float32)

  return schedule
