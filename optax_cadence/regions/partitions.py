"""What every kind of region has in common: a leaf is cut into tensors, each with a cadence.

To add a kind of region, write a subclass of `Partition`, in a file beside this one or in your own
code (`docs/inside.md` has an example), and, if its tensors lie otherwise than those in `cuts`, a
class with the methods of `Cut`.
"""

import abc
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np

from optax_cadence.regions.cuts import Cut
from optax_cadence.regions.cuts import Shape


class Partition(abc.ABC):
  """A way to cut a leaf into tensors, each with a cadence; an object of it stands in `every`.

  Cadences are kept as they are given: `map` is called once to put an `Every` in place of each,
  which also says what is wrong with it.

  Attributes:
    has_entries: Whether it cuts leaves into one `Entries` for each cadence, as a mask does. A state
      then has a place where all of them are trained in one pass, if the optimizer allows it.
  """

  has_entries = False

  @property
  @abc.abstractmethod
  def cells(self) -> list[Any]:
    """Every cadence that may occur, whatever the shape of the leaf; repeated ones too."""

  @abc.abstractmethod
  def map(self, fn: Callable[[Any], Any]) -> "Partition":
    """The same partition with `fn(cadence)` in place of every cadence."""

  @abc.abstractmethod
  def cut(self, shape: Shape, key: Callable[[Any], Hashable]) -> list[tuple[Any, Cut]]:
    """Cuts a leaf of this shape into tensors that hold each of its entries once.

    Args:
      shape: Shape of the leaf.
      key: From a cadence to the key of its group. Tensors of equal keys share a group, so that it
        pays to join them into one where that is cheap to read (`Bands`).

    Returns:
      A cadence, one of `cells`, and a cut for each tensor; those of one cadence are of one class.
      Groups are made in this order.

    Raises:
      ValueError: If the partition does not fit the shape; the parameter's path is put before it.
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
