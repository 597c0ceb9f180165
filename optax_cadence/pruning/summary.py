"""How sparse a network is: a table, and a picture over training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from optax_cadence import _paths
from optax_cadence import _tables
from optax_cadence.pruning import view


@dataclasses.dataclass(frozen=True)
class Summary:
  """Zeros of every pruned leaf; prints as a table.

  Attributes:
    leaves: By path (size, zeros, FLOPs of the dense leaf).
  """

  leaves: Mapping[str, tuple[int, int, float]]

  @property
  def sparsity(self) -> float:
    """Share of zeros."""
    return sum(z for _, z, _ in self.leaves.values()) / max(1, self.size)

  @property
  def size(self) -> int:
    """Weights."""
    return sum(n for n, _, _ in self.leaves.values())

  @property
  def flop_sparsity(self) -> float:
    """Share of the FLOPs that zeros save."""
    total = sum(f for _, _, f in self.leaves.values())
    return sum(f * z / max(n, 1) for n, z, f in self.leaves.values()) / max(total, 1)

  def __str__(self) -> str:
    rows = [(p, n, f"{z / max(n, 1):.2%}", f"{f:.4g}") for p, (n, z, f) in self.leaves.items()]
    rows.append(("total", self.size, f"{self.sparsity:.2%}", f"{self.flop_sparsity:.2%} saved"))
    header = ("leaf", "weights", "sparsity", "FLOPs")
    return "\n".join(_tables.lines((header, *rows), left=1))


def summary(params: Any, state: Any, *, flops: Mapping[str, float] | None = None) -> Summary:
  """Sparsity per pruned leaf and in total, weighted by FLOPs beside by weights.

  Args:
    params: Parameters.
    state: Optimizer state with a `PruneState` in it.
    flops: By path, FLOPs of the dense leaf; by default two for each weight, as in a dense
      layer. A convolution has as many times more as its output has positions.

  >>> import jax.numpy as jnp, optax_cadence as oc
  >>> from optax_cadence import pruning
  >>> tx, params = oc.prune(0.5, every=1), {"w": jnp.array([[1.0, 2.0]])}
  >>> print(pruning.summary(params, tx.init(params)))
  leaf   weights  sparsity     FLOPs
  w            2     0.00%         4
  total        2     0.00%  0.00% saved
  """
  held, found = view.find(state).masks, {}
  values = jax.tree.leaves(view.masked(params, state))
  for (path, _), x in zip(_paths.flatten_with_paths(params), values, strict=True):
    name = _paths.join(path)
    if name in held or not held:
      zeros = x.size - int(np.count_nonzero(np.asarray(x)))
      found[name] = (x.size, zeros, float((flops or {}).get(name, 2 * x.size)))
  return Summary(found)


def plot(history: Mapping[int, Summary], *, ax: Any = None) -> Any:
  """Draws sparsity over training: a line for every leaf, and the total.

  Args:
    history: Summaries by micro-step.
    ax: Matplotlib axes; new ones by default.

  Returns:
    The axes.
  """
  if ax is None:
    import matplotlib.pyplot as plt

    ax = plt.subplots(layout="constrained")[1]
  steps = sorted(history)
  for path in history[steps[0]].leaves if steps else ():
    ax.plot(steps, [history[t].leaves[path][1] / max(1, history[t].leaves[path][0]) for t in steps],
            linewidth=1, label=path)  # fmt: skip
  ax.plot(steps, [history[t].sparsity for t in steps], "k", linewidth=2, label="total")
  ax.set(xlabel="micro-step", ylabel="sparsity", ylim=(0, 1))
  ax.legend(frameon=False)
  return ax
