"""How sparse a network is: a table, and a picture over training."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths
from optax_cadence import _tables
from optax_cadence.pruning import view


class Leaf(NamedTuple):
  """What a leaf holds.

  Attributes:
    size: Number of weights.
    zeros: How many are zero.
    flops: FLOPs of the dense leaf.
    masked: How many its mask prunes; None for a leaf without a mask.
    stray: How many its mask prunes that are not zero.
  """

  size: int
  zeros: int
  flops: float
  masked: int | None = None
  stray: int = 0


@dataclasses.dataclass(frozen=True)
class Summary:
  """How many weights are zero, and how many the masks prune; prints as a table.

  Zeros are counted in the parameters. Where masks prune weights that are not zero, the table says
  so.

  Attributes:
    leaves: By the `/`-joined path, every leaf.
  """

  leaves: Mapping[str, Leaf]

  @property
  def pruned(self) -> Mapping[str, Leaf]:
    """The leaves with a mask; all of them if none has one, as after shocks."""
    masked = {path: leaf for path, leaf in self.leaves.items() if leaf.masked is not None}
    return masked or self.leaves

  @property
  def sparsity(self) -> float:
    """Share of the weights of the pruned leaves that is zero."""
    return _share(sum(leaf.zeros for leaf in self.pruned.values()), self.size)

  @property
  def size(self) -> int:
    """Number of weights of the pruned leaves."""
    return sum(leaf.size for leaf in self.pruned.values())

  @property
  def flop_sparsity(self) -> float:
    """Share of the FLOPs of the pruned leaves that zeros save."""
    leaves = self.pruned.values()
    saved = sum(leaf.flops * _share(leaf.zeros, leaf.size) for leaf in leaves)
    return _share(saved, sum(leaf.flops for leaf in leaves))

  @property
  def overall(self) -> float:
    """Share of all weights that is zero, those of leaves that are not pruned included."""
    leaves = self.leaves.values()
    return _share(sum(leaf.zeros for leaf in leaves), sum(leaf.size for leaf in leaves))

  @property
  def stray(self) -> int:
    """Number of weights that masks prune and that are not zero."""
    return sum(leaf.stray for leaf in self.leaves.values())

  def __str__(self) -> str:
    rows = [
      (
        path,
        leaf.size,
        f"{_share(leaf.zeros, leaf.size):.2%}",
        "-" if leaf.masked is None else f"{_share(leaf.masked, leaf.size):.2%}",
        f"{leaf.flops:.4g}" if path in self.pruned else "-",
      )
      for path, leaf in self.leaves.items()
    ]
    masked = sum(leaf.masked or 0 for leaf in self.leaves.values())
    any_mask = any(leaf.masked is not None for leaf in self.leaves.values())
    of_masks = f"{_share(masked, self.size):.2%}" if any_mask else "-"
    saved = f"{self.flop_sparsity:.2%} saved"
    rows.append(("pruned leaves", self.size, f"{self.sparsity:.2%}", of_masks, saved))
    if len(self.pruned) < len(self.leaves):
      size = sum(leaf.size for leaf in self.leaves.values())
      rows.append(("all leaves", size, f"{self.overall:.2%}", "", ""))
    header = ("leaf", "weights", "zeros", "masked", "FLOPs")
    lines = _tables.lines((header, *rows), left=1)
    if self.stray:
      where = [path for path, leaf in self.leaves.items() if leaf.stray]
      lines += [
        f"{self.stray} weights that masks prune are not zero, in {', '.join(where[:4])}"
        + (", …" if len(where) > 4 else ""),
        "prune must stand last in its chain; weights under straight_through, averages (EMA) and",
        "parameters for evaluation are to be read through pruning.masked(params, state)",
      ]
    return "\n".join(lines)


def _share(part: float, whole: float) -> float:
  return part / max(whole, 1)


def summary(params: Any, state: Any, *, flops: Mapping[str, float] | None = None) -> Summary:
  """How sparse the parameters are: each leaf, and all together.

  Args:
    params: The parameters, in which zeros are counted: those that are trained, or others of the
      same shapes, as an average of them.
    state: Optimizer state with that of a `prune` in it, or of several.
    flops: By the `/`-joined path, FLOPs of the dense leaf; by default two for each weight, as in a
      dense layer. A convolution has as many times more as its output has positions.

  Raises:
    ValueError: If `flops` names no leaf, or the parameters are not those of the state.

  >>> import jax.numpy as jnp, optax, optax_cadence as oc
  >>> from optax_cadence import pruning
  >>> tx, params = oc.prune(0.5, every=1), {"w": jnp.array([[1.0, 2.0]]), "bias": jnp.ones(2)}
  >>> updates, state = tx.update(params, tx.init(params), params)
  >>> print(pruning.summary(optax.apply_updates(params, updates), state))
  leaf           weights   zeros  masked         FLOPs
  bias                 2   0.00%       -             -
  w                    2  50.00%  50.00%             4
  pruned leaves        2  50.00%  50.00%  50.00% saved
  all leaves           4  25.00%
  """
  masks = view.by_path(params, state)
  leaves: dict[str, Leaf] = {}
  for path, x in _paths.flatten_with_paths(params):
    if not jax.dtypes.issubdtype(jnp.result_type(x), np.number):
      continue  # a random key, say
    # Of two paths that read the same the second gets a number.
    name = _paths.unused(_paths.join(path), leaves)
    is_zero = np.asarray(x) == 0
    cost = float((flops or {}).get(name, 2 * is_zero.size))
    leaf = Leaf(is_zero.size, int(is_zero.sum()), cost)
    if path in masks:
      pruned = ~np.asarray(masks[path])
      leaf = leaf._replace(masked=int(pruned.sum()), stray=int((pruned & ~is_zero).sum()))
    leaves[name] = leaf
  for name in flops or ():
    if name not in leaves:
      raise ValueError(f"flops: expected names among {', '.join(leaves)}, found {name!r}")
  return Summary(leaves)


def plot(history: Mapping[int, Summary], *, ax: Any = None) -> Any:
  """Draws sparsity over training: a line for every pruned leaf, and the total behind them.

  Leaves that are as sparse as one another, as under a uniform allocation, share a line, whose
  dashes take turns in their colors.

  Args:
    history: Summaries by micro-step.
    ax: Matplotlib axes; new ones by default.

  Returns:
    The axes.
  """
  import matplotlib as mpl

  if ax is None:
    import matplotlib.pyplot as plt

    ax = plt.subplots(layout="constrained")[1]
  steps = sorted(history)
  names = list(history[steps[0]].pruned) if steps else []
  curves = [[_share(*history[t].leaves[name][1::-1]) for t in steps] for name in names]
  sharing = _groups_of_near(curves)
  colors = mpl.colormaps["tab10" if len(names) <= 10 else "turbo"]
  for i, (name, curve) in enumerate(zip(names, curves, strict=True)):
    group = next(group for group in sharing if i in group)
    line = {"color": colors(i if len(names) <= 10 else i / (len(names) - 1)), "linewidth": 1.5}
    if len(group) > 1:
      # Dashes as long as the gaps that the others leave for them, each beginning where one ends.
      line["linestyle"] = (-_DASH * group.index(i), (_DASH, _DASH * (len(group) - 1)))
      line["dash_capstyle"] = "butt"
    ax.plot(steps, curve, label=name, **line)
  total = [history[t].sparsity for t in steps]
  ax.plot(steps, total, "k", linewidth=5, alpha=0.25, zorder=1, label="total")
  ax.set(xlabel="micro-step", ylabel="sparsity", ylim=(-0.02, 1.02))
  for handle in ax.legend(frameon=False).legend_handles:
    handle.set_linestyle("-")  # of dashes there might be none within its length
  return ax


_DASH = 5  # line widths


def _groups_of_near(curves: list[list[float]]) -> list[list[int]]:
  """The positions of the curves, in groups that cannot be told apart in a picture."""
  groups: list[list[int]] = []
  for i, curve in enumerate(curves):
    for group in groups:
      if np.abs(np.subtract(curves[group[0]], curve)).max() < 0.01:
        group.append(i)
        break
    else:
      groups.append([i])
  return groups
