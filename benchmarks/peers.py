"""The peers: what a user of Optax would write without this library.

Each is a plain Optax transformation; how it is timed is in `measure`.
"""

from collections.abc import Iterable
from typing import Any

import optax


def adamw() -> optax.GradientTransformation:
  """The optimizer inside every variant."""
  return optax.adamw(1e-3)


def multi_steps(period: int, **options: Any) -> optax.GradientTransformation:
  """`optax.MultiSteps` over AdamW."""
  return optax.MultiSteps(adamw(), period, **options).gradient_transformation()


def apply_every(period: int) -> optax.GradientTransformation:
  """AdamW, whose updates `optax.apply_every` sums up and passes on every `period` micro-steps.

  It computes something else, since the moments see every gradient, and is there for its time.
  """
  return optax.chain(adamw(), optax.apply_every(period))


def partition(periods: Iterable[int], labels: Any) -> optax.GradientTransformation:
  """`optax.partition` over `MultiSteps`; plain AdamW where the period is 1.

  Args:
    periods: The periods that occur.
    labels: Tree prefix of the parameters with a period at each leaf.
  """
  transforms = {p: adamw() if p == 1 else multi_steps(p) for p in periods}
  return optax.partition(transforms, labels)


def stepper(tx: optax.GradientTransformation) -> Any:
  """A micro-step: arguments in the order of the results, so that both can be donated."""

  def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return step
