"""Shocks that begin anew: whole leaves reset, or shrunk and perturbed."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from optax_cadence.pruning import filling
from optax_cadence.pruning.structure import Structure
from optax_cadence.pruning.transformation import prune


class _Everything(Structure):
  """Whole leaves: prunes every weight, with no scores to compare."""

  makes_mask: ClassVar[bool] = True

  def mask(self, scores: jax.Array, sparsity: Any, allowed: jax.Array) -> jax.Array:
    return jnp.zeros(scores.shape, bool)


def reset(
  where: Callable[[str, Any], bool],
  every: Any,
  *,
  fill: Any = "init",
  restart: bool | None = None,
  inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Begins whole leaves anew from time to time, such as the last layers of a network.

  Stands where `prune` stands: last in a chain, or around an optimizer, which then forgets what it
  knew of these leaves.

  Args:
    where: Which leaves: `(path, param) -> bool`, of the `/`-joined path.
    every: When: an integer, `pruning.Times`, `once`, `every_epoch`, or a function.
    fill: What they begin anew with, as in `prune`.
    restart: Whether the optimizer forgets; by default it does if there is one.
    inner: An optimizer.

  Returns:
    A `GradientTransformationExtraArgs` with state `PruneState`.

  References:
    Nikishin et al. 2022, `The Primacy Bias in Deep Reinforcement Learning
    <https://arxiv.org/abs/2205.07802>`_

  >>> import jax.numpy as jnp, optax
  >>> from optax_cadence import pruning
  >>> tx = pruning.reset(lambda path, _: path == "head", every=1, fill="zero")
  >>> params = {"body": jnp.ones(2), "head": jnp.ones(2)}
  >>> updates, _ = tx.update(params, tx.init(params), params)
  >>> print(optax.apply_updates(params, updates)["head"])
  [0. 0.]
  """
  return prune(
    1.0,
    every=every,
    structure=_Everything(),
    hold=False,
    fill=fill,
    restart=restart,
    where=where,
    inner=inner,
  )


def shrink_and_perturb(
  shrink: float,
  perturb: float,
  *,
  every: Any,
  where: Callable[[str, Any], bool] | None = None,
  initializer: Any = None,
  key: Any = 0,
  restart: bool | None = None,
  inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Makes of every parameter, from time to time, less of itself and a little that is fresh.

  θ becomes `shrink` θ + `perturb` times a freshly initialized parameter, which keeps what the
  network has learned and gives it back its gradients. It stands where `prune` stands.

  Args:
    shrink: How much of a parameter stays.
    perturb: How much of a fresh one is added.
    every: When: an integer, `pruning.Times`, `once`, `every_epoch`, or a function.
    where: Which leaves, `(path, param) -> bool`; by default all that hold real numbers.
    initializer: What draws fresh parameters, as in `pruning.Fill`.
    key: Seed or PRNG key.
    restart: Whether the optimizer forgets what it knew of them; by default it does if there is one.
    inner: An optimizer.

  Returns:
    A `GradientTransformationExtraArgs` with state `PruneState`.

  References:
    Ash and Adams 2019, `On Warm-Starting Neural Network Training
    <https://arxiv.org/abs/1910.08475>`_

  >>> import jax.numpy as jnp, optax
  >>> from optax_cadence import pruning
  >>> tx = pruning.shrink_and_perturb(0.5, 0.0, every=1)
  >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
  >>> updates, _ = tx.update(params, tx.init(params), params)
  >>> print(optax.apply_updates(params, updates)["bias"])
  [0.5 0.5]
  """
  return reset(
    _is_real if where is None else where,
    every,
    fill=filling.Fill(shrink, perturb, initializer, key),
    restart=restart,
    inner=inner,
  )


def _is_real(path: str, param: Any) -> bool:
  return jnp.issubdtype(param.dtype, jnp.floating)
