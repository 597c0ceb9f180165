"""More layers along the axis on which a model has stacked its layers.

A model that makes its layers by `vmap` and runs them by `scan` has one leaf for all its layers, and
reads their number from its arrays. So the program needs no change, and depth is one more axis
that grows. New layers are copies of old ones (depthwise stacking, Du et al. 2024,
arXiv:2405.15319), or fresh.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths
from optax_cadence.growth import _trees
from optax_cadence.growth._plan import LeafChange
from optax_cadence.growth._plan import Plan

WHERE = ("end", "middle", "between")


def stacking(
  variables: Any,
  layers: str | Sequence[str],
  *,
  times: int | None = None,
  by: int | None = None,
  where: str | int = "end",
  outgoing: Iterable[str] = (),
  copy: bool = True,
  copy_state: bool | None = None,
  alpha: str = "alpha",
  flops: tuple[int, int] | None = None,
) -> Plan:
  """Plans more layers along axis 0 of all leaves of a stack.

  Args:
    variables: Tree of arrays or `jax.ShapeDtypeStruct`.
    layers: Path of what holds the stacked leaves, or several for one stack: of its parameters and
      of its running statistics.
    times: By how much the number of layers is multiplied; or else `by`.
    by: Number of new layers.
    where: Where the new layers stand: at the "end", in the "middle", "between" the old ones (so
      that each is followed by as many new ones), or before the old layer of this number.
    outgoing: Paths of those leaves, or of layers that hold them, whose new entries α multiplies:
      through which a layer adds to its residual stream. At α = 0 the output is then what it was.
      None of them: there is no gate, and new layers count at once.
    copy: Whether new layers are copies, of as many old layers as there are new ones: of those right
      before them, going round from the first to the last. (Between the old ones, of the one before
      each.) So doubling at the end or in the middle repeats the whole stack. Otherwise they are
      fresh. Random keys are never the same, and integers are always copied.
    copy_state: Whether what an optimizer keeps of new layers is copied with them: moments, open
      windows, masks. By default it is without a gate, where a copy begins as what it is a copy of.
      Otherwise it is as `init` makes it, as what a gate holds back has other gradients.
    alpha: Path at which the gate will be.
    flops: Of a forward pass before and after, see `growth.flops`; shown with the plan.

  Returns:
    A `Plan`. Copies need no fresh values.

  Raises:
    ValueError: If the leaves do not have as many layers, or an argument is malformed.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> params = {"blocks": {"up": jnp.arange(3.0)}, "head": jnp.ones(2)}
  >>> plan = growth.stacking(params, "blocks", times=2)
  >>> print(plan.apply(params)["blocks"]["up"])
  [0. 1. 2. 0. 1. 2.]
  >>> print(growth.stacking(params, "blocks", by=1, where=1).apply(params)["blocks"]["up"])
  [0. 0. 1. 2.]
  """
  stack = _stacked(variables, layers)
  first, *_ = stack.values()
  old = int(first.shape[0])
  positions, sources = _order(old, _number(old, times, by), where)
  names = list(outgoing)
  scaled: set[_paths.Path] = set()
  for name in names:
    under = [path for path in _trees.under(stack, name) if _is_float(stack[path])]
    if not under:
      raise ValueError(f"outgoing {name!r}: expected one of the layers, {_paths.listed(stack)}")
    scaled.update(under)
  follows = not names if copy_state is None else copy_state
  changes = [
    LeafChange(
      path,
      tuple(leaf.shape),
      (len(sources), *leaf.shape[1:]),
      "layers",
      {0: positions},
      scaled=path in scaled,
      layers=True,
      sources=sources if copy or not _is_float(leaf) else None,
      copies_state=copy and follows,
    )
    for path, leaf in stack.items()
  ]
  return Plan(tuple(changes), True, tuple(alpha.split("/")), flops, gate=bool(names))


def _stacked(variables: Any, layers: str | Sequence[str]) -> dict[_paths.Path, Any]:
  """The leaves of a stack, by path, which all have as many layers."""
  leaves = _paths.by_path(variables)
  stack: dict[_paths.Path, Any] = {}
  for name in [layers] if isinstance(layers, str) else layers:
    under = _trees.under(leaves, name)
    if not under:
      raise ValueError(f"layers {name!r}: expected one of {_paths.listed(leaves)}")
    stack.update((path, leaves[path]) for path in under)
  floats = {path: np.shape(leaf) for path, leaf in stack.items() if _is_float(leaf)}
  sizes = {shape[:1] for shape in floats.values()}
  if len(sizes) != 1 or () in sizes:
    listed = ", ".join(f"{_paths.join(path)!r} of shape {shape}" for path, shape in floats.items())
    raise ValueError(
      f"layers {layers!r}: expected leaves with as many layers along axis 0, as `vmap` stacks them,"
      f" found {listed or 'no weights'}"
    )
  # Random keys and counters may be one for all layers.
  return {path: leaf for path, leaf in stack.items() if np.shape(leaf)[:1] in sizes}


def _number(old: int, times: int | None, by: int | None) -> int:
  """The number of new layers."""
  if (times is None) == (by is None):
    raise ValueError("expected either times=, which multiplies the layers, or by=, which adds some")
  new = by if times is None else old * (times - 1)
  if not isinstance(new, int | np.integer) or isinstance(new, bool) or new < 1:
    wanted = "by= of 1 or more" if times is None else "times= of 2 or more"
    raise ValueError(f"expected {wanted}, found {by if times is None else times!r}")
  return int(new)


def _order(old: int, new: int, where: str | int) -> tuple[np.ndarray, np.ndarray]:
  """The positions of old layers among all, and for each position the old layer that it copies."""
  if where == "between":
    if new % old:
      raise ValueError(
        f"between {old} layers: expected as many new ones after each, found {new} in all"
      )
    each = new // old + 1
    return np.arange(old) * each, np.repeat(np.arange(old), each)
  at = {"end": old, "middle": old // 2}.get(where, where) if isinstance(where, str) else where
  if isinstance(at, str | bool) or not 0 <= at <= old:
    raise ValueError(
      f"where: expected one of {', '.join(map(repr, WHERE))}, or a number from 0 to {old}, found"
      f" {where!r}"
    )
  copies = (at - new + np.arange(new)) % old
  sources = np.concatenate([np.arange(at), copies, np.arange(at, old)])
  return np.concatenate([np.arange(at), np.arange(at, old) + new]), sources


def _is_float(leaf: Any) -> bool:
  return bool(jnp.issubdtype(leaf.dtype, jnp.floating))
