"""How a sparsity is shared out over the leaves: how many units each of them keeps.

`pools` is what pruning calls, and the place to add an allocation.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths

NAMES = ("uniform", "erdos_renyi", "erk", "global")


def pools(
  allocation: str,
  sparsities: Mapping[_paths.Path, Any],
  shapes: Mapping[_paths.Path, tuple[int, ...]],
) -> tuple[list[list[_paths.Path]], list[Any]]:
  """Which leaves compete for the same units, and how many units each such pool keeps.

  Args:
    allocation: One of `NAMES`. Under `"global"` all leaves are one pool; otherwise each leaf is
      a pool of its own.
    sparsities: By path, a number or a traced scalar. Only `"uniform"` allows different ones.
    shapes: By path, the shape in which the units of a leaf are scored.

  Returns:
    The paths of each pool, and for each pool an int or a traced int32.
  """
  paths = list(shapes)
  if allocation in ("erk", "erdos_renyi"):
    total = sparsities[paths[0]]
    shared = erdos_renyi(list(shapes.values()), total, kernel=allocation == "erk")
    sparsities = dict(zip(paths, shared, strict=True))
  pools = [paths] if allocation == "global" else [[path] for path in paths]
  sizes = [sum(math.prod(shapes[path]) for path in pool) for pool in pools]
  kept = [size - pruned(sparsities[pool[0]], size) for pool, size in zip(pools, sizes, strict=True)]
  return pools, kept


def erdos_renyi(shapes: Sequence[tuple[int, ...]], sparsity: Any, kernel: bool = True) -> list[Any]:
  r"""Sparsities of Erdős–Rényi(-kernel): density :math:`\min(1, ε Σ_d n_d / Π_d n_d)`.

  The factor ε is chosen such that the total is what was asked for. Leaves that would be denser
  than 1 are dense, and the others get less.

  Args:
    shapes: Shapes of the leaves.
    sparsity: Of all of them together; may be traced.
    kernel: Whether all axes count (ERK) or only the last two.

  Returns:
    A sparsity for each leaf; traced if `sparsity` is.

  References:
    Mocanu et al. 2018, `Scalable training of artificial neural networks with adaptive sparse
    connectivity <https://arxiv.org/abs/1707.04780>`_

    With kernels: Evci et al. 2020, `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_

  >>> from optax_cadence.pruning import allocation
  >>> [round(float(s), 3) for s in allocation.erdos_renyi([(4, 4), (100, 100)], 0.9)]
  [0.0, 0.901]
  """
  xp: Any = jnp if isinstance(sparsity, jax.Array) else np
  dtype = jnp.float32 if xp is jnp else np.float64
  sizes = np.array([math.prod(shape) for shape in shapes], np.float64)
  sides = [shape if kernel else shape[-2:] for shape in shapes]
  factors = np.array([sum(side) / max(math.prod(side), 1) for side in sides], np.float64)
  # The larger its factor, the sooner a leaf is dense. For 0, 1, 2, … dense leaves: the units in
  # them, what is left for the others, and the ε at which these come to the right total.
  order = np.argsort(-factors, kind="stable")
  sorted_sizes, sorted_factors = sizes[order], factors[order]
  in_dense = np.concatenate([[0.0], np.cumsum(sorted_sizes)[:-1]])
  weight_of_rest = np.cumsum((sorted_factors * sorted_sizes)[::-1])[::-1]
  kept = (1 - sparsity) * dtype(sizes.sum())
  left = kept - xp.asarray(in_dense, dtype)
  epsilons = left / xp.asarray(np.maximum(weight_of_rest, 1e-30), dtype)
  # The first number of dense leaves with which no other leaf would be denser than 1.
  valid = epsilons * xp.asarray(sorted_factors, dtype) <= 1 + 1e-6
  epsilon = epsilons[xp.argmax(valid)]
  density = xp.where(valid.any(), xp.clip(epsilon * xp.asarray(factors, dtype), 0, 1), 1)
  return [1 - density[i] for i in range(len(shapes))]


def pruned(sparsity: Any, size: int) -> Any:
  """How many of `size` units a sparsity prunes: rounded to the nearest, halves to even.

  A traced sparsity is first rounded to a multiple of 2**-24, and halves go up.
  """
  if not isinstance(sparsity, jax.Array):
    return round(float(sparsity) * size)
  # share * size / 2**24 in 32-bit integers, since a float32 has no digits for more than 2**24
  # weights. Both factors are cut into pieces of 12 bits (`share` may be 2**24 itself).
  share = jnp.rint(jnp.clip(sparsity.astype(jnp.float32), 0, 1) * 2**24).astype(jnp.uint32)
  share_high, share_low = share >> 12, share & jnp.uint32(0xFFF)
  low, middle, high = jnp.uint32(size & 0xFFF), jnp.uint32(size >> 12 & 0xFFF), size >> 24
  total = jnp.uint32(high) * share + middle * share_high
  rest = middle * share_low + low * share_high  # in units of 2**-12
  total += rest >> 12
  rest = ((rest & jnp.uint32(0xFFF)) << 12) + low * share_low  # in units of 2**-24
  total += (rest + jnp.uint32(2**23)) >> 24
  return total.astype(jnp.int32)
