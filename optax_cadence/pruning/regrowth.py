"""Which pruned weights come back: those with the largest gradients, or random ones."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from optax_cadence import _checks
from optax_cadence.pruning import criterion as criteria


@dataclasses.dataclass(frozen=True, eq=False)
class Regrowth:
  """How pruned weights come back: as many as the criterion of `prune` drops.

  Attributes:
    grow: The criterion by which pruned weights are chosen to come back.
    first: The criterion by which the first mask is drawn, when the state is made.
    fraction: Share of the kept weights that is exchanged, at the start.
    stop: Micro-step at which the share has fallen to 0, along a cosine; None keeps it constant.
    skip_step: Whether weights are exchanged in place of an update: the optimizer then neither sees
      the gradients of that micro-step nor moves any parameter.
  """

  grow: criteria.Criterion
  first: criteria.Criterion
  fraction: float = 0.3
  stop: int | None = None
  skip_step: bool = False

  def __post_init__(self) -> None:
    _checks.number("regrow: fraction", self.fraction, 0, 1)

  def share(self, t: Any) -> Any:
    """Share of the kept weights that is exchanged at micro-step t."""
    if self.stop is None:
      return jnp.float32(self.fraction)
    angle = jnp.pi * jnp.minimum(t.astype(jnp.float32) / self.stop, 1.0)
    return self.fraction / 2 * (1 + jnp.cos(angle))


def by_gradient(
  *, stop: int | None, fraction: float = 0.3, key: Any = 0, skip_step: bool = True
) -> Regrowth:
  """RigL: weights come back where the gradient is largest.

  A weight that was dropped at the same micro-step may come back, and is then as it was.

  Args:
    stop: Micro-step at which the share of exchanged weights has fallen to 0, along a cosine; None
      keeps it constant.
    fraction: That share at the start.
    key: Seed or PRNG key of the first mask.
    skip_step: Whether weights are exchanged in place of an update, as in the paper's algorithm.

  References:
    Evci et al. 2020, `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_

  >>> from optax_cadence import pruning
  >>> pruning.by_gradient(stop=1000).grow.name
  'gradient'
  """
  return Regrowth(criteria.GRADIENT, criteria.random(key), fraction, stop, skip_step)


def at_random(
  key: Any = 0, *, fraction: float = 0.3, stop: int | None = None, skip_step: bool = False
) -> Regrowth:
  """SET: weights come back at random.

  Args:
    key: Seed or PRNG key of the first mask and of the weights that come back.
    fraction: Share of the kept weights that is exchanged.
    stop: Micro-step at which that share has fallen to 0, along a cosine; None keeps it constant.
    skip_step: Whether weights are exchanged in place of an update. In the paper they are exchanged
      between two of them, and so here the update of that micro-step trains the new ones already.

  References:
    Mocanu et al. 2018, `Scalable training of artificial neural networks with adaptive sparse
    connectivity <https://arxiv.org/abs/1707.04780>`_

  >>> from optax_cadence import pruning
  >>> pruning.at_random(0).fraction
  0.3
  """
  return Regrowth(criteria.random(key), criteria.random(key), fraction, stop, skip_step)
