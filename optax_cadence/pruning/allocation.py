"""How a sparsity is shared out: what density each leaf has."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NAMES = ("uniform", "erdos_renyi", "erk", "global")


def erdos_renyi(shapes: Sequence[tuple[int, ...]], sparsity: Any, kernel: bool = True) -> list[Any]:
  r"""Sparsities of Erdős–Rényi(-kernel): density :math:`\min(1, ε Σ_d n_d / Π_d n_d)`.

  The factor ε makes the total what was asked for (Mocanu et al. 2018, arXiv:1707.04780;
  with kernels Evci et al. 2020, arXiv:1911.11134). Leaves that would be denser than 1 are
  dense, in order of their factor.

  Args:
    shapes: Shapes of the leaves.
    sparsity: Of all of them together; may be traced.
    kernel: Whether all axes count (ERK) or only the last two.

  >>> from optax_cadence.pruning import allocation
  >>> [round(float(s), 3) for s in allocation.erdos_renyi([(4, 4), (100, 100)], 0.9)]
  [0.0, 0.901]
  """
  xp: Any = jnp if isinstance(sparsity, jax.Array) else np
  sizes = np.array([math.prod(s) for s in shapes], np.float64)
  sides = [s if kernel else s[-2:] for s in shapes]
  factors = np.array([sum(s) / max(math.prod(s), 1) for s in sides], np.float64)
  order = np.argsort(-factors, kind="stable")
  n, f = sizes[order], factors[order]
  dense_before = np.concatenate([[0.0], np.cumsum(n)[:-1]])
  weight = np.cumsum((f * n)[::-1])[::-1]
  dtype = jnp.float32 if xp is jnp else np.float64
  kept = (1 - sparsity) * dtype(sizes.sum())
  scale = (kept - xp.asarray(dense_before, dtype)) / xp.asarray(np.maximum(weight, 1e-30), dtype)
  # The first number of dense leaves with which no other leaf would be denser than 1.
  valid = scale * xp.asarray(f, dtype) <= 1 + 1e-6
  eps = scale[xp.argmax(valid)]
  density = xp.where(valid.any(), xp.clip(eps * xp.asarray(factors, dtype), 0, 1), 1)
  return [1 - density[i] for i in range(len(shapes))]


def pruned(sparsity: Any, size: int) -> Any:
  """How many of `size` units a sparsity prunes, to the nearest, halves to even."""
  if not isinstance(sparsity, jax.Array):
    return round(float(sparsity) * size)
  # In integers: a float32 has not the digits for more than 2**24 weights.
  share = jnp.rint(jnp.clip(sparsity.astype(jnp.float32), 0, 1) * 2**24).astype(jnp.uint32)
  low, high = jnp.uint32(size & 0xFFF), size >> 12
  # share * size / 2**24, with the size in pieces of 12 bits.
  total, rest = jnp.uint32(0), jnp.uint32(0)
  first, second = jnp.uint32(high & 0xFFF), jnp.uint32(high >> 12)
  top, bottom = share >> 12, share & jnp.uint32(0xFFF)
  total += second * share
  total += first * top
  rest += first * bottom + low * top
  total += rest >> 12
  rest = ((rest & jnp.uint32(0xFFF)) << 12) + low * bottom
  total += (rest + jnp.uint32(2**23)) >> 24
  return total.astype(jnp.int32)
