"""What a policy is: a cadence that decides from the gradients when its regions are due.

The policies of this package are in `confidence.policies`; when they are asked, and what they are
told, is in `confidence.deciding`. To add one, write a subclass: see the example of `Policy`.
"""

import abc
from typing import Any, TYPE_CHECKING

import jax
import jax.numpy as jnp

from optax_cadence import _checks

if TYPE_CHECKING:
  from optax_cadence.confidence.statistics import Statistics


class Policy(abc.ABC):
  """A cadence that decides, once a gradient is added to the window, whether it is enough.

  Subclasses have `due`, and, where they remember something, `init` and `fired`. They are traced:
  what depends on gradients is computed with `jax.numpy`. They are told norms of gradients for each
  region, never the gradients. An object decides for all its regions together; regions that decide
  on their own have one each.

  Attributes:
    min_period: Micro-steps that a window has at least.
    max_period: Micro-steps that a window has at most.
    reads_gradients: Whether it reads `squares` and `square` of the window, which costs one
      more reading of the gradients at every micro-step.
    place: Which layer it decides for, if it is the copy of `each_layer`; names its group.
    reads_updates: Whether `fired` reads `update` and `params`, for which a few thousand
      entries of each region are read and kept, once a window.

  >>> import jax.numpy as jnp, optax, optax_cadence as oc
  >>> class Loud(oc.Policy):  # due once the sum of the window is long enough
  ...   def due(self, window, state):
  ...     return window.square.sum() >= 9.0
  >>> tx = oc.cadence(optax.sgd(1.0), Loud(1, 8))
  >>> state = tx.init(jnp.zeros(()))
  >>> for _ in range(3):
  ...   updates, state = tx.update(jnp.ones(()), state)
  ...   print(updates)
  0.0
  0.0
  -1.0
  """

  reads_gradients = True
  reads_updates = False
  place = ""

  def __init__(self, min_period: int, max_period: int) -> None:
    min_period = _checks.integer("min_period", min_period, 1)
    max_period = _checks.integer("max_period", max_period, 1)
    if min_period > max_period:
      raise ValueError(
        f"min_period must be at most max_period, found {min_period} above {max_period}"
      )
    self.min_period, self.max_period = min_period, max_period

  def init(self) -> Any:
    """What the policy remembers before its first window: a tree of arrays or numbers.

    It is what the other methods get as `state`, and changes only when a window has fired.
    """
    return ()

  def earliest(self, state: Any) -> Any:
    """Micro-steps before `due` is asked first; a later one saves reading the accumulators."""
    del state
    return self.min_period

  @abc.abstractmethod
  def due(self, window: "Statistics", state: Any) -> bool | jax.Array:
    """Whether the window is enough: boolean scalar.

    Args:
      window: The window with the gradient of this micro-step in it: arrays of shape [R], a number
        for each of the regions that the policy decides for.
      state: What the policy remembers.
    """

  def fired(self, window: "Statistics", state: Any) -> Any:
    """What the policy remembers after a window that has fired, of the structure of `state`.

    It is cast to the dtypes of `state`.
    """
    del window
    return state

  def opens(self, state: Any) -> jax.Array:
    """`earliest` within the bounds: int32 scalar."""
    return jnp.clip(jnp.int32(self.earliest(state)), self.min_period, self.max_period)

  def __str__(self) -> str:
    return f"{type(self).__name__}({self.min_period}-{self.max_period})"
