"""The slow, obvious implementation: tensors split by hand, gradients kept in a list.

Nothing here imports `optax_cadence`. A case gives, for each leaf, the tensors it falls
into as NumPy index expressions with a period and an offset each; the oracle then runs
one plain instance of the inner optimizer per group, on the mean of a Python list.

Gradients are widened to float32, or the parameter's dtype where that is wider, before anything
else is done with them, and nothing is rounded before it is asked for.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class Piece:
  """One tensor of a leaf: an index into it, and when it is due.

  Where `in_place` the tensor has the shape of the leaf, and zeros at all other entries.
  """

  index: Any
  period: int
  offset: int = 0
  in_place: bool = False

  @property
  def label(self) -> tuple[int, int]:
    return self.period, self.offset

  def take(self, leaf: Any) -> np.ndarray:
    leaf = np.asarray(leaf)
    if not self.in_place:
      return leaf[self.index]
    alone = np.zeros_like(leaf)
    alone[self.index] = leaf[self.index]
    return alone

  def put(self, leaf: np.ndarray, tensor: Any) -> None:
    tensor = np.asarray(tensor)
    leaf[self.index] = tensor[self.index] if self.in_place else tensor


def whole(period: int, offset: int = 0) -> list[Piece]:
  return [Piece(..., period, offset)]


def bands(shape: tuple[int, ...], periods: Sequence[int], axis: int) -> list[Piece]:
  """Bands of one axis that share a period are one tensor, joined in order."""
  axis %= len(shape)
  parts = np.array_split(np.arange(shape[axis]), len(periods))
  joined: dict[int, list[np.ndarray]] = {}
  for period, part in zip(periods, parts, strict=True):
    joined.setdefault(period, []).append(part)
  return [
    Piece((slice(None),) * axis + (np.concatenate(parts),), period)
    for period, parts in joined.items()
  ]


def rectangles(shape: tuple[int, ...], periods: Any, axes: Sequence[int]) -> list[Piece]:
  """Over several axes each rectangle is a tensor."""
  periods = np.array(periods)
  parts = [np.array_split(np.arange(shape[a]), n) for a, n in zip(axes, periods.shape, strict=True)]
  pieces = []
  for cell in np.ndindex(*periods.shape):
    along = [np.arange(n) for n in shape]
    for axis, i, part in zip(axes, cell, parts, strict=True):
      along[axis] = part[i]
    pieces.append(Piece(np.ix_(*along), int(periods[cell])))
  return pieces


def entries(mask: np.ndarray, in_place: bool = False) -> list[Piece]:
  """The entries of one period form a vector, or stay in place for an elementwise optimizer."""
  return [Piece(np.nonzero(mask == p), int(p), 0, in_place) for p in np.unique(mask)]


class Oracle:
  """Trains the pieces of a list of leaves, micro-step by micro-step.

  Args:
    inner: The optimizer that every group has an instance of.
    leaves: The parameters.
    pieces: What each of them falls into.
    accumulate: "mean", "sum" or "latest".
    skip: Whether a piece leaves out gradients that are not finite.
    structure: Tree that the optimizer finds its tensors in, each leaf a tuple of them. Without it
      they have numbers for names, so that groups with tensors of the same shapes share a program.
    **extra_args: Extra arguments of the optimizer.
  """

  def __init__(
    self,
    inner: optax.GradientTransformation,
    leaves: Sequence[jax.Array],
    pieces: Sequence[Sequence[Piece]],
    accumulate: str = "mean",
    *,
    skip: bool = False,
    structure: Any = None,
    **extra_args: Any,
  ):
    self.inner = optax.with_extra_args_support(inner)
    self.update_inner = jax.jit(functools.partial(self.inner.update, **extra_args))
    self.accumulate, self.skip, self.structure = accumulate, skip, structure
    self.n_leaves = len(pieces)
    self.groups: dict[Any, list[tuple[int, Piece]]] = {}
    for i, parts in enumerate(pieces):
      for piece in parts:
        self.groups.setdefault(piece.label, []).append((i, piece))
    self.t = 0
    # The gradients of each piece in its window, with their weights; how many it has left out.
    self.windows: dict[Any, list[list[tuple[np.ndarray, Any]]]] = {}
    self.skipped = {label: [0] * len(group) for label, group in self.groups.items()}
    self.states = {
      label: self.inner.init(self._tree(label, self._take(label, leaves))) for label in self.groups
    }

  def step(
    self,
    grads: Sequence[jax.Array],
    params: Sequence[jax.Array],
    weights: Sequence[float] | None = None,
  ) -> list[np.ndarray]:
    """The updates of one micro-step, one array per leaf, in its gradient's dtype or a wider one.

    With weights, one for each leaf, means are weighted, and worked out in 64 bits.
    `exact` has them as they are before they are rounded to that.
    """
    self.t += 1
    self.exact = [np.zeros(p.shape, wide(p.dtype)) for p in params]
    for label, group in self.groups.items():
      windows = self.windows.setdefault(label, [[] for _ in group])
      for n, (i, piece) in enumerate(group):
        grad = piece.take(np.asarray(grads[i]).astype(wide(params[i].dtype)))
        if self.accumulate == "latest":
          windows[n].clear()
        weight = None if weights is None else weights[i]
        if weight == 0:
          continue
        if not self.skip or np.isfinite(grad).all():
          windows[n].append((grad, weight))
        else:
          self.skipped[label][n] += 1
      period, offset = label
      if self.t % period == offset % period:
        self._fire(label, params)
    with np.errstate(over="ignore"):
      return [
        x.astype(wider(g.dtype, p.dtype)) for x, g, p in zip(self.exact, grads, params, strict=True)
      ]

  def flush(self, params: Sequence[jax.Array]) -> list[np.ndarray]:
    """The updates of every window that is not empty, in the parameters' dtypes."""
    self.exact = [np.zeros(p.shape, wide(p.dtype)) for p in params]
    if self.accumulate != "latest":
      for label in list(self.windows):
        self._fire(label, params)
    return [x.astype(p.dtype) for x, p in zip(self.exact, params, strict=True)]

  def applied(self, params: Sequence[jax.Array]) -> list[np.ndarray]:
    """The parameters with the updates of the last micro-step, rounded once."""
    return [
      (np.asarray(p).astype(x.dtype) + x).astype(p.dtype)
      for p, x in zip(params, self.exact, strict=True)
    ]

  def _fire(self, label: Any, params: Sequence[jax.Array]) -> None:
    windows, group, old = self.windows.pop(label), self.groups[label], self.states[label]
    if not any(windows):
      return
    before = self._take(label, params)
    grads = [
      _reduce(self.accumulate, window) if window else np.zeros(p.shape, wide(p.dtype))
      for window, p in zip(windows, before, strict=True)
    ]
    updates, new = self.update_inner(self._tree(label, grads), old, self._tree(label, before))
    self.states[label] = self._kept(label, windows, old, new)
    for (i, piece), window, u in zip(group, windows, jax.tree.leaves(updates), strict=True):
      if window:
        piece.put(self.exact[i], u)

  def _kept(self, label: Any, windows: Sequence[Any], old: Any, new: Any) -> Any:
    """The new state in the dtypes of the old; what is of pieces with an empty window is as it was.

    A part of a state is of a piece if its path ends with the piece's.
    """
    numbers = self._tree(label, list(range(len(windows))))
    idle = [
      _joined(path)
      for path, n in jax.tree_util.tree_flatten_with_path(numbers)[0]
      if not windows[n]
    ]

    def keep(path: Any, a: Any, b: Any) -> Any:
      if any(_joined(path).endswith(name) for name in idle):
        return a
      a, b = jnp.asarray(a), jnp.asarray(b)
      return b if a.dtype == b.dtype else b.astype(a.dtype)

    return jax.tree_util.tree_map_with_path(keep, old, new)

  def _take(self, label: Any, leaves: Sequence[jax.Array]) -> list[np.ndarray]:
    return [piece.take(leaves[i]) for i, piece in self.groups[label]]

  def _tree(self, label: Any, tensors: Sequence[Any]) -> Any:
    """The tensors of a group as the optimizer sees them, in the order of the leaves."""
    tensors = [jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in tensors]
    if self.structure is None:
      return {f"{n:03d}": x for n, x in enumerate(tensors)}
    parts: list[list[Any]] = [[] for _ in range(self.n_leaves)]
    for (i, _), x in zip(self.groups[label], tensors, strict=True):
      parts[i].append(x)
    return jax.tree.unflatten(self.structure, list(map(tuple, parts)))


class Transformation:
  """The oracle as Optax calls it, to stand inside a wrapper that runs eagerly.

  Args:
    inner: The optimizer that every group has an instance of.
    pieces: What each leaf of a flat dict falls into. Leaves may be missing, or masked away.
    **options: As `Oracle` takes them.

  Attributes:
    tx: The transformation. Its state is empty: what there is to remember is in `oracle`.
    oracle: The oracle of the parameters that `tx.init` has seen last.
  """

  oracle: Oracle

  def __init__(
    self,
    inner: optax.GradientTransformation,
    pieces: Mapping[str, Sequence[Piece]],
    **options: Any,
  ):
    self.inner, self.pieces, self.options = inner, pieces, options
    self.tx = optax.GradientTransformation(self._init, self._update)

  def _init(self, params: Any) -> Any:
    leaves, structure = jax.tree.flatten(params)
    pieces = [self.pieces[name] for name in sorted(params) if jax.tree.leaves(params[name])]
    self.oracle = Oracle(self.inner, leaves, pieces, structure=structure, **self.options)
    return optax.EmptyState()

  def _update(self, grads: Any, state: Any, params: Any = None) -> Any:
    leaves, structure = jax.tree.flatten(grads)
    updates = self.oracle.step(leaves, jax.tree.leaves(params))
    return jax.tree.unflatten(structure, list(map(jnp.asarray, updates))), state


def wider(a: Any, b: Any) -> np.dtype:
  """The dtype that holds all values of both."""
  with jax.numpy_dtype_promotion("standard"):
    return jnp.promote_types(a, b)


def wide(dtype: Any) -> np.dtype:
  return wider(dtype, jnp.float32)


def _reduce(how: str, window: Sequence[tuple[np.ndarray, Any]]) -> np.ndarray:
  grads, weights = zip(*window, strict=True)
  if how == "latest":
    return grads[-1]
  if weights[0] is not None:
    widest = np.complex128 if np.iscomplexobj(grads[0]) else np.float64
    total = sum(w * g.astype(widest) for g, w in window)
    return (total / sum(weights) if how == "mean" else total).astype(grads[0].dtype)
  with np.errstate(invalid="ignore"):
    total = np.asarray(sum(grads[1:], start=grads[0]))
  return total / np.array(len(grads), total.real.dtype) if how == "mean" else total


def _joined(path: Any) -> str:
  return "".join(f"/{getattr(k, 'key', getattr(k, 'idx', getattr(k, 'name', k)))}" for k in path)


def relaxed(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """`tx` with JAX's ordinary promotion rules, which Optax relies on, inside strict tests."""
  tx = optax.with_extra_args_support(tx)

  def wrap(fn: Any) -> Any:
    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
      with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return fn(*args, **kwargs)

    return call

  return optax.GradientTransformationExtraArgs(wrap(tx.init), wrap(tx.update))


def enable_x64() -> Any:
  """Context in which float64 is float64, under the name that this JAX has for it."""
  return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()
