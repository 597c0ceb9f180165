"""When a region is due: periods, offsets and schedules.

An `Every` says when; which part of a leaf it is for is said by a `Partition`. Static ones
(integers) are known while tracing; dynamic ones (schedules, traced integers) are read at the start
of a window; a policy decides while the window is open.
"""

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _checks
from optax_cadence.schedules.policy import Policy


@dataclasses.dataclass(frozen=True, eq=False)
class Every:
  """Due every `period` micro-steps.

  Attributes:
    period: An integer of at least 1, of Python, NumPy or JAX; or a schedule,
      `micro_steps_done -> period`, read at the start of each window (below 1 counts as 1,
      fractions are rounded); or a traced integer scalar, so that `jax.vmap` sweeps periods in
      one program; or a `Policy`, which decides while the window is open.
    offset: Due when t ≡ offset (mod period); the first window is then that long.
      Only for integer periods.
    static: Whether the period is known while tracing.
    always: Whether every micro-step is due, as is known while tracing.
    policy: The policy that decides, if one does.
    key: Regions whose cadences have equal keys share a group.

  Raises:
    ValueError: If the period is below 1 or the offset outside `[0, period)`.

  >>> import optax_cadence as oc
  >>> oc.Every(8, offset=3)
  Every(period=8, offset=3)
  """

  period: Any
  offset: int = 0
  static: bool = dataclasses.field(init=False, repr=False)
  always: bool = dataclasses.field(init=False, repr=False)
  policy: Policy | None = dataclasses.field(init=False, repr=False)
  key: Hashable = dataclasses.field(init=False, repr=False)

  def __post_init__(self) -> None:
    policy = self.period if isinstance(self.period, Policy) else None
    if isinstance(self.period, jax.core.Tracer) and self.period.ndim == 0:
      if not jnp.issubdtype(self.period.dtype, jnp.integer):
        raise ValueError(f"a period must be an integer, found dtype {self.period.dtype}")
    elif not callable(self.period) and policy is None:
      others = ", a schedule or a traced integer"
      if isinstance(self.period, list | tuple):
        others += " (periods for the bands of an axis are oc.channels([...]))"
      object.__setattr__(self, "period", _checks.integer("a period", self.period, 1, others))
    object.__setattr__(self, "offset", _checks.integer("an offset", self.offset))
    static = isinstance(self.period, int)
    if static and not 0 <= self.offset < self.period:
      raise ValueError(
        f"an offset must be at least 0 and below the period {self.period}, found {self.offset}"
      )
    if not static and self.offset:
      raise ValueError(
        f"an offset needs an integer period, found {self.offset} beside a"
        " schedule, a traced period or a policy"
      )
    known = {
      "static": static,
      "always": static and self.period == 1,
      "policy": policy,
      "key": (self.period, self.offset) if static else id(self.period),
    }
    for name, value in known.items():
      object.__setattr__(self, name, value)

  @property
  def name(self) -> str:
    """How the state calls the group of this cadence."""
    place = "" if self.policy is None else self.policy.place
    return f"{self} of {place}" if place else str(self)

  def due(self, t: int) -> bool:
    """Whether micro-step t (1, 2, …, or its phase) is due; for static periods."""
    return (t - self.offset) % self.period == 0

  def first_window(self) -> jax.Array:
    """Length of the first window: int32 scalar."""
    return jnp.int32(self.offset) if self.offset else self.window(jnp.int32(0))

  def window(self, micro_steps: jax.Array) -> jax.Array:
    """Length of the window that begins after this many micro-steps: int32 scalar.

    Under a policy it is the most that it can be.
    """
    if self.policy is not None:
      return jnp.int32(self.policy.max_period)
    if self.static:
      return jnp.int32(self.period)
    found = self.period(micro_steps) if callable(self.period) else self.period
    try:
      period = jnp.asarray(found)
    except (TypeError, ValueError):
      raise ValueError(
        f"a schedule must give a scalar period, found {_checks.shown(found)}"
      ) from None
    if period.ndim:
      raise ValueError(f"a schedule must give a scalar period, found shape {period.shape}")
    if not jnp.issubdtype(period.dtype, jnp.integer):
      if not jnp.issubdtype(period.dtype, jnp.floating):
        raise ValueError(f"a schedule must give a number as period, found dtype {period.dtype}")
      period = jnp.rint(period)
    return jnp.maximum(period.astype(jnp.int32), 1)

  def score(self, steps: int) -> np.ndarray:
    """Which of the first `steps` micro-steps are due: bool [steps]; not under a trace."""
    if self.policy is not None:
      raise ValueError(f"{self} decides while training: when it is due is not known before")
    due = np.zeros(steps, bool)
    t = int(self.first_window())
    while t <= steps:
      due[t - 1] = True
      t += int(self.window(jnp.int32(t)))
    return due

  def __str__(self) -> str:
    if self.static:
      return f"{self.period}" + (f" (offset {self.offset})" if self.offset else "")
    if self.policy is not None:
      return str(self.policy)
    if not callable(self.period):
      return "traced"
    return getattr(self.period, "__name__", type(self.period).__name__)


def as_every(cadence: Any) -> Every:
  """The `Every` that an integer, a schedule or a traced integer stands for.

  Raises:
    ValueError: If it is none of these.
  """
  return cadence if isinstance(cadence, Every) else Every(cadence)
