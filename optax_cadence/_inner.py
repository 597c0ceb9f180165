"""The inner optimizer of each group, and its state, matched to the tensors of the group.

The state is restored where a framework has rebuilt it, and explained where it belongs to other
parameters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _checks
from optax_cadence import _paths
from optax_cadence.schedules.every import Every

_EXPECTED = (
  "inner must be an optax.GradientTransformation, or a function of a window's length that returns"
  " one"
)


class Inner:
  """The inner optimizer of each group: the same one, or what a function of the window gives.

  Attributes:
    any: One of them, for what does not depend on the length: the structure of a state.
    follows_window: Whether it is a function of the window's length.
  """

  def __init__(self, given: optax.GradientTransformation | Callable[[Any], Any]):
    self._make: Any = given
    self.follows_window = not is_transformation(given)
    if not self.follows_window:
      self.any = optax.with_extra_args_support(given)
      return
    of_optax = getattr(getattr(given, "func", given), "__module__", None) or ""
    if not callable(given) or of_optax.split(".")[0] == "optax":
      raise ValueError(f"{_EXPECTED}, found {_checks.shown(given)}")
    self.any = self._made(1)

  def of(self, every: Every, length: Any = None) -> optax.GradientTransformationExtraArgs:
    """The inner optimizer of a group with this cadence; of a static one the period is the length.

    Else the length is the micro-steps in the window: int32 scalar, or one for each region, of which
    the most count. None where it makes no difference.
    """
    if not self.follows_window or (length is None and not every.static):
      return self.any
    n = every.period if every.static else jnp.max(jnp.asarray(length))
    return self._made(n)

  def _made(self, n: Any) -> optax.GradientTransformationExtraArgs:
    made = self._make(n)
    if not is_transformation(made):
      raise ValueError(
        f"{_EXPECTED}, found a function that returns {_checks.shown(made)} for {_checks.shown(n)}"
      )
    return optax.with_extra_args_support(made)


def is_transformation(tx: Any) -> bool:
  """Whether this is a gradient transformation."""
  return hasattr(tx, "init") and hasattr(tx, "update")


def check_state(
  inner: optax.GradientTransformation, state: optax.OptState, tensors: Any, error: Exception
) -> None:
  """Raises `ValueError`, from the error of an update, if the state is that of other tensors."""
  difference = _paths.mismatch(jax.eval_shape(inner.init, tensors), state)
  if difference is not None:
    raise ValueError(
      f"state of the inner optimizer, {difference} (a state goes with the parameters and cadences"
      " it was made for)"
    ) from error


def widened(
  inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  """The inner optimizer, given gradients that are wider than its parameters.

  It runs as it would for parameters in the gradients' dtype. Whoever keeps the new state rounds it
  to the dtypes that `init` gave it.
  """

  def update(grads: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
    state = jax.tree.map(as_dtype, state, jax.eval_shape(inner.init, grads))
    if params is not None:
      params = jax.tree.map(as_dtype, params, grads)
    return inner.update(grads, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(inner.init, update)


def as_dtype(x: Any, like: Any) -> Any:
  """The array in the dtype of another, where both are numbers with a fraction."""
  both = all(jnp.issubdtype(y.dtype, jnp.inexact) for y in (x, like))
  return x.astype(like.dtype) if both else x


def for_no_leaves(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """The inner optimizer of a group that trains nothing: it may not take a tree without leaves."""

  def init(params: Any) -> Any:
    try:
      return inner.init(params)
    except (TypeError, ValueError, IndexError):
      return optax.EmptyState()

  return optax.GradientTransformation(init, inner.update)


def restored(inner: optax.GradientTransformation, state: Any, tensors: Any) -> optax.OptState:
  """The state in the containers that `init` makes.

  `nnx.Optimizer` turns a tuple below a parameter, as a leaf cut into several tensors is,
  into containers of its own.
  """
  return like(state, jax.eval_shape(inner.init, tensors))


def like(state: optax.OptState, containers: Any) -> Any:
  """The arrays of a state in the containers of another."""
  return jax.tree.unflatten(jax.tree.structure(containers), jax.tree.leaves(state))


def filled(inner: optax.GradientTransformation, state: optax.OptState, tensors: Any) -> Any:
  """Which leaves of a state belong to tensors whose window is not empty.

  What stands in a tree like the parameters, as `tree_map_params` finds them, goes with the tensor
  in whose place it is. A field that is one leaf for `tree_map_params` and in truth a tree, as the
  masks of `prune` are, goes by the paths in it. The rest belongs to no tensor, and goes with any
  that is not empty.

  Args:
    inner: The inner optimizer.
    state: Its state.
    tensors: Tree of bool scalars, one per tensor of the group: whether its window is not empty.

  Raises:
    ValueError: If the state does not follow the parameters.
  """
  flags = _paths.by_path(tensors)
  any_filled = jnp.stack(list(flags.values())).any()

  def in_place(part: Any) -> Any:
    return jax.tree.map(lambda flag, x: jax.tree.map(lambda _: flag, x), tensors, part)

  def by_path(part: Any) -> Any:
    if jax.tree_util.all_leaves([part]):
      return any_filled
    paths = [path for path, _ in _paths.flatten_with_paths(part)]
    strange = [path for path in paths if path not in flags]
    if strange:
      raise ValueError(
        f"it keeps {_paths.listed(strange)} where its parameters are {_paths.listed(flags)}"
      )
    return jax.tree.unflatten(jax.tree.structure(part), [flags[path] for path in paths])

  what = 'leaving out micro-batches (nonfinite="skip", skip=... or weighted=True)'
  return mapped(what, inner, state, in_place, by_path)


def mapped(
  what: str,
  inner: optax.GradientTransformation,
  state: optax.OptState,
  like_params: Callable[[Any], Any],
  others: Callable[[Any], Any],
) -> Any:
  """A state of which each tree like the parameters is mapped as a whole, and apart from the rest.

  Raises:
    ValueError: For `what`, if the state does not follow the parameters.
  """
  try:
    return optax.tree_utils.tree_map_params(
      inner, like_params, state, transform_non_params=others, is_leaf=lambda _: True
    )
  except (TypeError, ValueError, AttributeError) as error:
    raise ValueError(
      f"{what}: expected an inner optimizer whose state follows the parameters, as"
      f" optax.tree_utils.tree_map_params understands it, found {type(state).__name__}: {error}"
    ) from error
