"""Larger steps for larger batches: updates scaled by the length of their window.

The cadence sets the lengths, through the method `with_window` of the state: see
`_window.told`.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _paths


class ScaleByCadenceState(NamedTuple):
  """State of `scale_by_cadence`.

  Attributes:
    lengths: Gradients in the window of each tensor: a tree of int32 scalars, set by the
      cadence around it.
  """

  lengths: Any

  def with_window(self, lengths: Any) -> "ScaleByCadenceState":
    """The state with the lengths of the windows: an int32 scalar, or a tree of them."""
    paths = [path for path, _ in _paths.flatten_with_paths(self.lengths)]
    known = _paths.by_path(lengths)
    if () in known:
      known = dict.fromkeys(paths, known[()])
    if not known.keys() >= set(paths):
      raise ValueError(
        f"scale_by_cadence: expected tensors of the cadence, {_paths.listed(known)},"
        f" found {_paths.listed(paths)}; put it where the tree is that of the parameters"
      )
    structure = jax.tree.structure(self.lengths)
    return ScaleByCadenceState(jax.tree.unflatten(structure, [known[path] for path in paths]))


def scale_by_cadence(
  rule: Literal["sqrt", "linear"] = "sqrt", *, base: float = 1
) -> optax.GradientTransformation:
  """Scales updates by the length of their window, or the square root of it.

  It stands inside a cadence, last in the chain of the inner optimizer:
  `oc.cadence(optax.chain(optax.adam(1e-3), oc.scale_by_cadence()), every)`. What counts is the
  number of gradients that are in the window: a first window cut short by an offset, micro-batches
  left out and a flush included. Outside of a cadence every window is one gradient long.

  Args:
    rule: `"sqrt"` for optimizers that normalize, such as Adam; `"linear"` for SGD.
    base: The length for which the learning rate was chosen, where nothing is scaled.

  Returns:
    A gradient transformation.

  Raises:
    ValueError: If the rule is unknown or the base not above 0.

  References:
    Linear, for SGD: Goyal et al. 2017, Accurate, large minibatch SGD, arXiv:1706.02677.
    Square root, for Adam: Malladi et al. 2022, On the SDEs and scaling rules for adaptive
    gradient algorithms, arXiv:2205.10287.

  >>> import jax.numpy as jnp, optax, optax_cadence as oc
  >>> tx = oc.cadence(optax.chain(optax.sgd(1.0), oc.scale_by_cadence("linear")), 4)
  >>> state = tx.init(jnp.zeros(()))
  >>> for _ in range(4):
  ...   updates, state = tx.update(jnp.ones(()), state)
  >>> print(updates)
  -4.0
  """
  if rule not in ("sqrt", "linear"):
    raise ValueError(f"rule must be 'sqrt' or 'linear', found {rule!r}")
  if isinstance(base, bool) or not isinstance(base, int | float) or not base > 0:
    raise ValueError(f"base must be a number above 0, found {base!r}")

  def init(params: optax.Params) -> ScaleByCadenceState:
    return ScaleByCadenceState(jax.tree.map(lambda _: jnp.int32(1), params))

  def update(
    updates: optax.Updates, state: ScaleByCadenceState, params: Any = None
  ) -> tuple[optax.Updates, ScaleByCadenceState]:
    del params

    def scale(x: jax.Array, length: jax.Array) -> jax.Array:
      share = length.astype(jnp.float32) / base
      return x * (share if rule == "linear" else jnp.sqrt(share)).astype(x.dtype)

    return jax.tree.map(scale, updates, state.lengths), state

  return optax.GradientTransformation(init, update)
