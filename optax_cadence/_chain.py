"""`optax.chain` for a cadence that stands last."""

from typing import Any

import optax

from optax_cadence._cadence import Cadence
from optax_cadence._cadence import CadenceTransformation
from optax_cadence._cadence import check_transformation
from optax_cadence._cadence import of


def chain(*transforms: optax.GradientTransformation) -> CadenceTransformation:
  """`optax.chain` that keeps `apply`, `flush` and `cycle` of the cadence that stands last.

  Args:
    *transforms: Gradient transformations, of which the last is a cadence.

  Returns:
    A `CadenceTransformation` whose state is the tuple of the states, as in Optax.

  Raises:
    ValueError: If the last transformation is not a cadence.

  >>> import optax, optax_cadence as oc
  >>> tx = oc.chain(optax.clip_by_global_norm(1.0), oc.cadence(optax.adam(1e-3), 8))
  >>> tx.cycle
  8
  """
  self = Chain(*transforms)
  return CadenceTransformation(self.init, self.update)


class Chain:
  """The functions that make the transformation."""

  def __init__(self, *transforms: optax.GradientTransformation) -> None:
    last = transforms[-1] if transforms else None
    if not isinstance(last, CadenceTransformation):
      raise ValueError(f"chain expects a cadence as the last transformation, found {last!r}")
    for tx in transforms:
      check_transformation("each transformation in chain", tx)
    self.before = [optax.with_extra_args_support(tx) for tx in transforms[:-1]]
    self.last = last

  @property
  def cadence(self) -> Cadence:
    """The cadence that stands last."""
    return of(self.last)

  def init(self, params: optax.Params) -> tuple[Any, ...]:
    return tuple(tx.init(params) for tx in [*self.before, self.last])

  def update(
    self, grads: Any, state: Any, params: Any = None, **extra_args: Any
  ) -> tuple[Any, tuple[Any, ...]]:
    grads, done = self._through(grads, state, params, extra_args)
    updates, last_state = self.last.update(grads, state[-1], params, **extra_args)
    return updates, (*done, last_state)

  def apply(
    self, params: Any, state: Any, grads: Any, phase: int | None = None, **extra_args: Any
  ) -> tuple[Any, tuple[Any, ...]]:
    grads, done = self._through(grads, state, params, extra_args)
    params, last_state = self.last.apply(params, state[-1], grads, phase, **extra_args)
    return params, (*done, last_state)

  def flush(self, state: Any, params: Any, **extra_args: Any) -> tuple[Any, tuple[Any, ...]]:
    self._check(state)
    updates, last_state = self.last.flush(state[-1], params, **extra_args)
    return updates, (*state[:-1], last_state)

  def _through(
    self, grads: Any, states: Any, params: Any, extra_args: dict[str, Any]
  ) -> tuple[Any, list[Any]]:
    self._check(states)
    done = []
    for tx, state in zip(self.before, states, strict=False):
      grads, state = tx.update(grads, state, params, **extra_args)
      done.append(state)
    return grads, done

  def _check(self, states: Any) -> None:
    n = len(self.before) + 1
    if type(states) is not tuple or len(states) != n:
      found = f"{len(states)} states" if type(states) is tuple else type(states).__name__
      raise ValueError(f"state of chain: expected a tuple of {n} states, found {found}")
