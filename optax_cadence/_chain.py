"""`optax.chain` for a cadence that stands last."""

from typing import Any

import optax

from optax_cadence._cadence import CadenceTransformation


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
  last = transforms[-1] if transforms else None
  if not isinstance(last, CadenceTransformation):
    raise ValueError(f"chain expects a cadence as the last transformation, found {last!r}")
  before = [optax.with_extra_args_support(tx) for tx in transforms[:-1]]

  def init(params: optax.Params) -> tuple[Any, ...]:
    return tuple(tx.init(params) for tx in transforms)

  def through(grads: Any, states: Any, params: Any, extra_args: Any) -> tuple[Any, list[Any]]:
    if len(states) != len(transforms):
      raise ValueError(f"expected a state of {len(transforms)} parts, found {len(states)}")
    done = []
    for tx, state in zip(before, states, strict=False):
      grads, state = tx.update(grads, state, params, **extra_args)
      done.append(state)
    return grads, done

  def update(grads: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
    grads, done = through(grads, state, params, extra_args)
    updates, last_state = last.update(grads, state[-1], params, **extra_args)
    return updates, (*done, last_state)

  def apply(
    params: Any, state: Any, grads: Any, phase: int | None = None, **extra_args: Any
  ) -> tuple[Any, Any]:
    grads, done = through(grads, state, params, extra_args)
    params, last_state = last.apply(params, state[-1], grads, phase, **extra_args)
    return params, (*done, last_state)

  def flush(state: Any, params: Any, **extra_args: Any) -> tuple[Any, Any]:
    updates, last_state = last.flush(state[-1], params, **extra_args)
    return updates, (*state[:-1], last_state)

  return CadenceTransformation(init, update, apply, flush, last.cadence)
