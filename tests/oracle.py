"""The slow, obvious implementation: tensors split by hand, gradients kept in a list.

Nothing here imports `optax_cadence`. A case gives, for each leaf, the tensors it falls
into as NumPy index expressions with a period and an offset each; the oracle then runs
one plain instance of the inner optimizer per group, on the mean of a Python list.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class Piece:
  """One tensor of a leaf: an index into it, and when it is due."""

  index: Any
  period: int
  offset: int = 0

  @property
  def label(self) -> tuple[int, int]:
    return self.period, self.offset


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


def entries(mask: np.ndarray) -> list[Piece]:
  """The entries of one period form a vector."""
  return [Piece(np.nonzero(mask == p), int(p)) for p in np.unique(mask)]


class Oracle:
  """Trains the pieces of a list of leaves, micro-step by micro-step."""

  def __init__(
    self,
    inner: optax.GradientTransformation,
    leaves: Sequence[jax.Array],
    pieces: Sequence[Sequence[Piece]],
    accumulate: str = "mean",
    **extra_args: Any,
  ):
    self.inner = optax.with_extra_args_support(inner)
    self.update_inner = jax.jit(functools.partial(self.inner.update, **extra_args))
    self.pieces = pieces
    self.accumulate = accumulate
    self.t = 0
    self.windows: dict[Any, list[Any]] = {}
    self.states = {label: self.inner.init(tree) for label, tree in self._split(leaves).items()}

  def step(self, grads: Sequence[jax.Array], params: Sequence[jax.Array]) -> list[np.ndarray]:
    """The updates of one micro-step, one array per leaf, in the gradients' dtype."""
    self.t += 1
    updates = [np.zeros(g.shape, g.dtype) for g in grads]
    params_split = self._split(params)
    for label, tree in self._split(grads).items():
      period, offset = label
      self.windows.setdefault(label, []).append(tree)
      if self.t % period == offset % period:
        self._fire(label, params_split[label], updates)
    return updates

  def flush(self, params: Sequence[jax.Array]) -> list[np.ndarray]:
    """The updates of every window that is not empty."""
    updates = [np.zeros(p.shape, p.dtype) for p in params]
    for label, tree in self._split(params).items():
      if self.windows.get(label) and self.accumulate != "latest":
        self._fire(label, tree, updates)
    return updates

  def _fire(self, label: Any, params: Any, updates: list[np.ndarray]) -> None:
    window = self.windows.pop(label)
    grads = jax.tree.map(functools.partial(_reduce, self.accumulate), *window)
    new, self.states[label] = self.update_inner(grads, self.states[label], params)
    for (i, piece), u in zip(self._pieces_of(label), new.values(), strict=True):
      updates[i][piece.index] = np.asarray(u).astype(updates[i].dtype)

  def _pieces_of(self, label: Any) -> list[tuple[int, Piece]]:
    """The pieces of a group with the numbers of their leaves."""
    return [(i, x) for i, pieces in enumerate(self.pieces) for x in pieces if x.label == label]

  def _split(self, leaves: Sequence[jax.Array]) -> dict[Any, dict[str, jax.Array]]:
    """For each group a flat dict of its tensors, sorted as they stand in the tree.

    They have numbers for names, so that groups with tensors of the same shapes share a program.
    """
    groups: dict[Any, dict[str, jax.Array]] = {}
    for leaf, pieces in zip(leaves, self.pieces, strict=True):
      for piece in pieces:
        group = groups.setdefault(piece.label, {})
        group[f"{len(group):03d}"] = jnp.asarray(np.asarray(leaf)[piece.index])
    return groups


def _reduce(how: str, *grads: jax.Array) -> jax.Array:
  if how == "latest":
    return grads[-1]
  wide = np.result_type(grads[0].dtype, np.float32)
  total = sum(np.asarray(g).astype(wide) for g in grads)
  if how == "mean":
    total = total / np.array(len(grads), total.real.dtype)
  return jnp.asarray(total).astype(grads[0].dtype)


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
