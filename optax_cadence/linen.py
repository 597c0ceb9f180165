"""The `TrainState` of Linen: updates in place, and whole training steps."""

from collections.abc import Callable
from typing import Any

import optax
from flax.training import train_state

from optax_cadence import _cadence
from optax_cadence import _training
from optax_cadence.report import metrics as reports
from optax_cadence.schedules.phases import Phase

__all__ = ["TrainState"]

# Parameters under this key are overwritten by their gradient, as Flax's scales of 8-bit numbers
# are; the others are then under "params".
_OVERWRITTEN = train_state.OVERWRITE_WITH_GRADIENT


class TrainState(train_state.TrainState):
  """A `TrainState` whose updates go through `tx.apply`.

  Parameters and optimizer state of regions that are not due are neither read nor written, if the
  buffers are donated: `jax.jit(fn, donate_argnums=0)`. Its fields are those of Flax's; add your
  own in a subclass, as there.

  >>> import jax, optax, optax_cadence as oc
  >>> import jax.numpy as jnp
  >>> tx = oc.cadence(optax.sgd(0.5), 2)
  >>> fn = lambda params, x: params["w"] * x
  >>> state = oc.linen.TrainState.create(apply_fn=fn, params={"w": jnp.zeros(())}, tx=tx)
  >>> @jax.jit
  ... def step(state, x, y):
  ...   return state.training_step(lambda params: (state.apply_fn(params, x) - y) ** 2)
  >>> for y in (1.0, 3.0):
  ...   state, value = step(state, 1.0, y)
  ...   print(value, state.params["w"])
  1.0 0.0
  9.0 2.0
  """

  @classmethod
  def create(
    cls,
    *,
    apply_fn: Callable[..., Any] | None,
    params: Any,
    tx: _cadence.CadenceTransformation,
    **fields: Any,
  ) -> "TrainState":
    """A state at its start.

    Args:
      apply_fn: Usually `module.apply`.
      params: The parameters.
      tx: A cadence, or an `oc.chain` that ends in one.
      **fields: Those that a subclass has.

    Raises:
      ValueError: If `tx` is no cadence.
    """
    _cadence.of(tx, "oc.linen.TrainState.create(tx=tx)")
    return super().create(apply_fn=apply_fn, params=params, tx=tx, **fields)

  def apply_gradients(
    self, *, grads: Any, phase: int | Phase | None = None, weight: Any = None, **fields: Any
  ) -> "TrainState":
    """Takes a micro-step with these gradients.

    Args:
      grads: Gradients of `params`.
      phase: As for `tx.apply`.
      weight: As for `tx.apply`.
      **fields: Fields to replace, such as `batch_stats`.

    Returns:
      The next state.

    Raises:
      ValueError: As `tx.apply` does.
    """
    params, given = _trained(self.params), _trained(grads)
    params, opt_state = self.tx.apply(params, self.opt_state, given, phase=phase, weight=weight)
    params = _with_trained(grads, params)
    return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **fields)

  def training_step(
    self,
    loss: Callable[..., Any],
    *args: Any,
    phase: int | Phase | None = None,
    weight: Any = None,
    has_aux: bool = False,
  ) -> tuple["TrainState", Any]:
    """Takes a micro-step with the gradient of a loss; see `oc.training_step`.

    Args:
      loss: `loss(params, *args)` returns a scalar; with `has_aux` a pair of that and anything else,
        such as new `batch_stats`, for `state.replace`.
      *args: Further arguments of the loss.
      phase: As for `tx.apply`.
      weight: As for `tx.apply`.
      has_aux: Whether `loss` returns a pair.

    Returns:
      The next state, and what the loss returns.

    Raises:
      ValueError: If `loss` does not return what it should, and as `tx.apply` does.
    """
    if _OVERWRITTEN in self.params:
      raise ValueError(
        f"training_step: expected parameters that are all trained, found {_OVERWRITTEN!r}, which"
        " are overwritten by their gradient; take jax.grad and apply_gradients"
      )
    step = _training.training_step(loss, self.tx, has_aux)
    params, opt_state, value = step(self.params, self.opt_state, *args, phase=phase, weight=weight)
    return self.replace(step=self.step + 1, params=params, opt_state=opt_state), value

  def flush(self) -> "TrainState":
    """The state with every window applied that is not empty; see `tx.flush`."""
    params = _trained(self.params)
    updates, opt_state = self.tx.flush(self.opt_state, params)
    params = optax.apply_updates(params, updates)
    return self.replace(params=_with_trained(self.params, params), opt_state=opt_state)

  def has_updated(self) -> dict[str, Any]:
    """Which groups fired at the last micro-step; see `oc.has_updated`."""
    return reports.has_updated(self.opt_state)

  def metrics(self, *args: Any, **options: Any) -> dict[str, Any]:
    """The values of the cadence for a logger; as `oc.metrics` of the state."""
    return reports.metrics(self.opt_state, *args, **options)


def _trained(tree: Any) -> Any:
  """What of the parameters, or of their gradients, the optimizer sees."""
  return tree["params"] if _OVERWRITTEN in tree else tree


def _with_trained(tree: Any, trained: Any) -> Any:
  """The same tree, in which that is replaced."""
  return {**tree, "params": trained} if _OVERWRITTEN in tree else trained
