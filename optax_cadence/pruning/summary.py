"""How sparse a network is: a table, and a picture over training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from optax_cadence import _paths
from optax_cadence import _tables
from optax_cadence.pruning import masking
from optax_cadence.pruning import view


@dataclasses.dataclass(frozen=True)
class Summary:
  """How many weights of every pruned leaf are zero; prints as a table.

  Attributes:
    leaves: By the `/`-joined path: number of weights, number of zeros, FLOPs of the dense leaf.
  """

  leaves: Mapping[str, tuple[int, int, float]]

  @property
  def sparsity(self) -> float:
    """Share of the weights that are zero."""
    return _share(sum(zeros for _, zeros, _ in self.leaves.values()), self.size)

  @property
  def size(self) -> int:
    """Number of weights."""
    return sum(size for size, _, _ in self.leaves.values())

  @property
  def flop_sparsity(self) -> float:
    """Share of the FLOPs that zeros save."""
    total = sum(flops for _, _, flops in self.leaves.values())
    saved = sum(flops * _share(zeros, size) for size, zeros, flops in self.leaves.values())
    return _share(saved, total)

  def __str__(self) -> str:
    rows = [
      (path, size, f"{_share(zeros, size):.2%}", f"{flops:.4g}")
      for path, (size, zeros, flops) in self.leaves.items()
    ]
    rows.append(("total", self.size, f"{self.sparsity:.2%}", f"{self.flop_sparsity:.2%} saved"))
    header = ("leaf", "weights", "sparsity", "FLOPs")
    return "\n".join(_tables.lines((header, *rows), left=1))


def _share(part: float, whole: float) -> float:
  return part / max(whole, 1)


def summary(params: Any, state: Any, *, flops: Mapping[str, float] | None = None) -> Summary:
  """Sparsity of each pruned leaf and in total, of the weights and of the FLOPs.

  Args:
    params: Parameters.
    state: Optimizer state with a `PruneState` in it.
    flops: By the `/`-joined path, FLOPs of the dense leaf; by default two for each weight, as in a
      dense layer. A convolution has as many times more as its output has positions.

  >>> import jax.numpy as jnp, optax_cadence as oc
  >>> from optax_cadence import pruning
  >>> tx, params = oc.prune(0.5, every=1), {"w": jnp.array([[1.0, 2.0]])}
  >>> print(pruning.summary(params, tx.init(params)))
  leaf   weights  sparsity     FLOPs
  w            2     0.00%         4
  total        2     0.00%  0.00% saved
  """
  pruned = masking.by_path(view.find(state).masks)
  leaves: dict[str, tuple[int, int, float]] = {}
  for path, x in _paths.flatten_with_paths(view.masked(params, state)):
    # After shocks no masks are there to tell which leaves are pruned: all are shown.
    if path in pruned or not pruned:
      # Of two paths that read the same the second gets a number.
      name = _paths.unused(_paths.join(path), leaves)
      zeros = x.size - int(np.count_nonzero(np.asarray(x)))
      leaves[name] = (x.size, zeros, float((flops or {}).get(name, 2 * x.size)))
  return Summary(leaves)


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
    sizes_and_zeros = [history[t].leaves[path][:2] for t in steps]
    ax.plot(steps, [_share(z, n) for n, z in sizes_and_zeros], linewidth=1, label=path)
  ax.plot(steps, [history[t].sparsity for t in steps], "k", linewidth=2, label="total")
  ax.set(xlabel="micro-step", ylabel="sparsity", ylim=(0, 1))
  ax.legend(frameon=False)
  return ax
