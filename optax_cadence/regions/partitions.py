"""What every kind of region has in common: a leaf is cut into tensors, each with a cadence.

To add a kind of region, write a subclass of `Partition` in a file beside this one, and, if its
tensors lie otherwise than those in `cuts`, a class with the methods of `Cut`.
"""

import abc
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np

from optax_cadence.regions.cuts import Cut
from optax_cadence.regions.cuts import Shape


class Partition(abc.ABC):
  """A way to cut a leaf into tensors, each with a cadence."""

  @property
  @abc.abstractmethod
  def cells(self) -> list[Any]:
    """Every cadence that occurs, repeated ones too."""

  @abc.abstractmethod
  def map(self, fn: Callable[[Any], Any]) -> "Partition":
    """The same partition with `fn(cadence)` in place of every cadence."""

  @abc.abstractmethod
  def cut(self, shape: Shape, key: Callable[[Any], Hashable]) -> list[tuple[Any, Cut]]:
    """Cuts a leaf of this shape.

    Args:
      shape: Shape of the leaf.
      key: From a cadence to the key of its group; tensors of equal keys share a group.

    Returns:
      A cadence and a cut for each tensor, in order of first appearance.

    Raises:
      ValueError: If the partition does not fit the shape.
    """


def is_mask(cadence: Any) -> bool:
  """Whether this is an array of periods, one for each entry."""
  return isinstance(cadence, np.ndarray | jax.Array) and cadence.ndim > 0


def as_partition(cadence: Any) -> Partition | None:
  """The partition that a cadence asks for; None where it is one cadence for the whole leaf."""
  if is_mask(cadence):
    from optax_cadence.regions.mask import Mask

    return Mask(cadence)
  return cadence if isinstance(cadence, Partition) else None
