"""The gate over time: set from a schedule, learned, or one after the other."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cadence import _checks
from optax_cadence import _paths
from optax_cadence._state import is_stand_in
from optax_cadence.growth import _trees
from optax_cadence.growth._plan import Plan
from optax_cadence.growth._plan import plan_for


class PhaseInState(NamedTuple):
  """State of `phase_in`.

  Attributes:
    clock: At the gate's path the micro-steps since it came in, an int32 scalar; empty while there
      is no gate. So the count follows the gate as its moments do: it goes at the merge, and the
      next gate starts with one of its own (see `grow_state`). For
      `optax.tree_utils.tree_map_params` it is one field that follows no parameter.
    inner_state: State of the inner transformation.
  """

  clock: Any
  inner_state: optax.OptState

  @property
  def sets_parameters(self) -> bool:
    """Whether updates set parameters to a value: they are then no gradients for a cadence."""
    return True

  @property
  def micro_step(self) -> Any:
    """Micro-steps since the gate came in; 0 while there is none."""
    return next(iter(jax.tree.leaves(self.clock)), jnp.int32(0))


def phase_in(
  schedule: optax.Schedule,
  inner: optax.GradientTransformation | None = None,
  *,
  alpha: str = "alpha",
  learn_from: int | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Sets the gate to `schedule(t)` at micro-step t = 1, 2, … after it came in.

  The update of the gate is its new value minus the present one, whatever stands before in the
  chain; all other updates pass. In a tree without the gate it does nothing, so that one
  transformation serves before a growth, through it, and after the merge.

  Args:
    schedule: From micro-steps to a value, as Optax schedules: `optax.linear_schedule(0, 1, 500)`,
      `optax.cosine_decay_schedule`, or your own.
    inner: Optimizer that sees the gradients with that of the gate set to zero while the
      schedule governs. So the gate enters no global norm, and where it is never learned its
      gradient, which is nearly all that a gate costs in a step, drops out of the program. By
      default none; `phase_in` then stands last in the chain.
    alpha: Path of the gate in the parameters.
    learn_from: First micro-step at which the gate is no more set but updated like any
      parameter. None: never. 1: always.

  Returns:
    A `GradientTransformationExtraArgs` whose `update` needs the parameters.

  Raises:
    ValueError: If `update` gets no parameters, an argument is malformed, or what is at the gate's
      path is no scalar.

  >>> import jax.numpy as jnp, optax
  >>> from optax_cadence import growth
  >>> params = {"w": jnp.ones(2), "alpha": jnp.float32(0)}
  >>> tx = growth.phase_in(optax.linear_schedule(0.0, 1.0, 4), optax.sgd(0.5))
  >>> state = tx.init(params)
  >>> for _ in range(2):
  ...   updates, state = tx.update(params, state, params)
  ...   params = optax.apply_updates(params, updates)
  >>> print(params["alpha"], params["w"])
  0.5 [0.25 0.25]
  """
  if not callable(schedule):
    raise ValueError(f"schedule must be a function of micro-steps, found {schedule!r}")
  if learn_from is not None:
    learn_from = _checks.integer("learn_from", learn_from, 1, ", a micro-step")
  inside = optax.with_extra_args_support(optax.identity() if inner is None else inner)
  path = tuple(alpha.split("/"))

  def clock(count: Any) -> dict[str, Any]:
    return _trees.insert({}, path, count)

  def gate_of(params: optax.Params) -> Any:
    """The gate in the parameters; None if there is none."""
    gate: Any = _paths.by_path(params).get(path)
    if np.shape(gate) != ():
      raise ValueError(
        f"phase_in: expected the gate, a scalar, at {alpha!r}, found a parameter of shape"
        f" {np.shape(gate)}; call that parameter something else, or say where the gate is: alpha="
      )
    return gate

  def init(params: optax.Params) -> PhaseInState:
    if is_stand_in(params):  # whether the clock is empty is not known then
      return PhaseInState(jnp.int32(0), inside.init(params))
    has_gate = gate_of(params) is not None
    return PhaseInState(clock(jnp.int32(0)) if has_gate else {}, inside.init(params))

  def update(
    updates: Any, state: PhaseInState, params: Any = None, **extra_args: Any
  ) -> tuple[Any, PhaseInState]:
    if params is None:
      raise ValueError("phase_in needs the parameters: expected params, found None")
    gate = gate_of(params)
    if gate is None:
      updates, inner_state = inside.update(updates, state.inner_state, params, **extra_args)
      return updates, PhaseInState({}, inner_state)
    step = optax.safe_increment(state.micro_step)

    def while_scheduled(value: Any, otherwise: Any) -> Any:
      value = value.astype(otherwise.dtype)
      return value if learn_from is None else jnp.where(step < learn_from, value, otherwise)

    if inner is not None:
      updates = _at(updates, path, lambda g: while_scheduled(jnp.zeros_like(g), g))
    updates, inner_state = inside.update(updates, state.inner_state, params, **extra_args)
    to_target = jnp.asarray(schedule(step)).astype(gate.dtype) - gate
    updates = _at(updates, path, lambda u: while_scheduled(to_target, u))
    return updates, PhaseInState(clock(step), inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def _at(tree: Any, path: _paths.Path, fn: Callable[[Any], Any]) -> Any:
  """The tree with `fn` of the leaf at a path in its place, if there is one."""
  leaves = _paths.by_path(tree)
  return _trees.with_leaves(tree, {path: fn(leaves[path])}) if path in leaves else tree


def periods(plan: Plan, params: Any, *, old: Any, new: Any = 1) -> dict[str, Any]:
  """Cadences that slow what was there before and leave the new entries their own rhythm.

  Args:
    plan: The plan by which `params` have grown.
    params: The grown parameters, gate included.
    old: Period of the old entries: a positive integer. Very large: they are held.
    new: Period of the new entries and the gate.

  Returns:
    Nested dict of integers and integer arrays, for `oc.cadence(inner, ...)`.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> params = {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1))}
  >>> plan = growth.widening(params, growth.dimension(params, {"a": -1, "b": 0}), by=1)
  >>> params = plan.apply(params, lambda path, shape, dtype: jnp.ones(shape, dtype))
  >>> print(growth.periods(plan, params, old=4)["a"])
  [[4 4 1]]
  """
  plan = plan_for(plan, params)
  changes = plan.by_path
  cadences: dict[_paths.Path, Any] = {}
  for path, leaf in _paths.flatten_with_paths(params):
    change, value = changes.get(path), old
    if path == plan.alpha or (change is not None and change.before is None):
      value = new
    elif change is not None:
      value = np.full(np.shape(leaf), new)
      value[change.index] = old
    cadences[path] = value
  return _paths.nested(cadences)
