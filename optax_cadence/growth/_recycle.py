"""Units born again: hidden units that do nothing get fresh incoming weights while a network trains.

What is common to ReDo and continual backprop: a number for each unit says how useful it is; units
that are not, and old enough, begin anew. Their incoming weights are drawn as at the start, their
outgoing ones are zero, so that the outputs do not change by what they will be, and the optimizer
knows nothing of them. The two differ in the number and in who is replaced, how often.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cadence import _control
from optax_cadence import _paths
from optax_cadence import _restart
from optax_cadence import _window
from optax_cadence._state import is_stand_in
from optax_cadence.growth import _activity
from optax_cadence.growth import _hidden
from optax_cadence.growth import _trees
from optax_cadence.growth._activity import Activity
from optax_cadence.growth._dimension import entries
from optax_cadence.growth._hidden import Layer
from optax_cadence.growth._hidden import Taker
from optax_cadence.pruning import filling


class Recycle(NamedTuple):
  """What `recycle` gives.

  Attributes:
    forward: Returns what the function returned, and beside it the activity of each hidden layer.
    transformation: The optimizer. Its `update` takes that as `activity=`.
  """

  forward: Callable[..., tuple[Any, dict[str, Activity]]]
  transformation: optax.GradientTransformationExtraArgs


class UnitsState(NamedTuple):
  """What is known of the units of one hidden layer, each array [units] or [layers, units].

  Attributes:
    utility: Decaying sum of how useful each was, float32.
    age: Micro-steps since it was born, int32.
    credit: How many units may be replaced, a part of one included: float32, one for each layer.
    replaced: How often each was replaced, int32.
    means: With `compensate`, decaying sums of its value, float32: one for each of its readers that
      has a bias.
  """

  utility: jax.Array
  age: jax.Array
  credit: jax.Array
  replaced: jax.Array
  means: tuple[jax.Array, ...] = ()


class RecycleState(NamedTuple):
  """State of the transformation of `recycle`.

  Attributes:
    micro_step: Micro-steps so far, int32.
    layers: A `UnitsState` for each hidden layer, in dicts of dicts by the names in its path.
    fresh: What is needed to draw fresh weights.
    inner_state: State of the optimizer inside.
  """

  micro_step: jax.Array
  layers: Any
  fresh: Any
  inner_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class _Rule:
  """Which units are replaced; see `recycle`."""

  utility: str
  threshold: float | None
  rate: float | None
  age: int
  every: int
  decay: float


_RULES = {
  "redo": _Rule("magnitude", threshold=0.1, rate=None, age=0, every=1000, decay=0.0),
  "contribution": _Rule("contribution", threshold=None, rate=1e-4, age=100, every=1, decay=0.99),
}


def recycle(
  fn: Callable[..., Any],
  variables: Any,
  *inputs: Any,
  inner: optax.GradientTransformation | None = None,
  utility: str = "redo",
  threshold: float | None = None,
  rate: float | None = None,
  age: int | None = None,
  every: int | None = None,
  decay: float | None = None,
  compensate: bool = False,
  init: Callable[[jax.Array], Any] | None = None,
  key: Any = 0,
  where: Callable[[str], bool] = lambda name: True,
  within: str = "",
  **kwargs: Any,
) -> Recycle:
  r"""Gives hidden units that do nothing a new life: ReDo and continual backprop on any model.

  Which weights go in and out of a unit, and where it is read behind its nonlinearity, is found in
  the program that `fn` traces (see `hidden`), so the model needs no hook and no names. A unit that
  is replaced gets fresh incoming weights, bias and norm; its outgoing weights become zero; and the
  optimizer inside forgets of all these what it kept: moments, open windows of a cadence.

  The two rules, each with what is not said otherwise:

  - `"redo"`: every 1000 micro-steps, all units whose mean absolute activation is at most
    `threshold` (0.1) of the mean over their layer.
  - `"contribution"`: at every micro-step, `rate` (1e-4) of the units older than `age` (100), those
    of the lowest utility first: a decaying mean (`decay`, 0.99) of the absolute activation times
    the sum of the absolute outgoing weights. A part of a unit is kept until it is a whole one.

  Args:
    fn: `fn(variables, *inputs)`, the forward pass or a loss.
    variables: Tree of arrays or `jax.ShapeDtypeStruct`.
    *inputs: Further arguments of `fn`: arrays, `jax.ShapeDtypeStruct`s, or trees of them.
    inner: The optimizer; without one, the transformation stands last in a chain, and moments stay.
    utility: The rule, `"redo"` or `"contribution"`.
    threshold: Only units whose utility is at most this part of their layer's mean.
    rate: Share of the units that may be replaced, of which so many are at each micro-step. None:
      all that may are.
    age: Only units that have lived for more micro-steps than this.
    every: At how many micro-steps units are looked for.
    decay: Of the decaying mean that utility is; 0 is the present micro-batch.
    compensate: Whether the biases of the layers that read a unit take up what it gave them on
      average, a mean that decays alike, when it is replaced. So outputs jump less. A reader without
      a bias takes up nothing; behind a flattened or padded convolution the mean over all positions
      is used for each. (The published algorithm has only the outgoing weights of zero. The authors'
      code has such a line for the next bias, but sets the mean to zero before.)
    init: `init(key)`, fresh parameters, of which some entries are taken. By default each leaf is
      drawn from a normal distribution with the mean and the standard deviation that it has when the
      state is made.
    key: Integer seed or PRNG key, kept in the state.
    where: Which hidden layers take part, by name.
    within: Path of the parameters, which the transformation sees, in variables that are more:
      `"params"` if they are those of a Linen module.
    **kwargs: Further arguments of `fn`.

  Returns:
    `Recycle(forward, transformation)`. `forward` is called as `fn`, also with other shapes, and
    returns `(result, activity)`; results and gradients are those of `fn`. The transformation's
    `update` needs the parameters and `activity=`. Several activities, as of micro-batches or
    devices, are averaged with `jax.tree.map`.

  Raises:
    ValueError: If there is no hidden layer, with the reason for each that is none; if an argument
      is malformed.

  References:
    Sokar et al. 2023, `The Dormant Neuron Phenomenon in Deep Reinforcement Learning
    <https://arxiv.org/abs/2302.12902>`_; Dohare et al. 2024, `Loss of Plasticity in Deep Continual
    Learning <https://doi.org/10.1038/s41586-024-07711-7>`_ (arXiv:2306.13812).

  >>> import jax, jax.numpy as jnp, optax
  >>> from optax_cadence import growth
  >>> params = {"a": jnp.array([[1.0, -1.0]]), "b": jnp.ones((2, 1))}
  >>> loss = lambda p, x: (jax.nn.relu(x @ p["a"]) @ p["b"]).mean()
  >>> forward, tx = growth.recycle(loss, params, jnp.ones((3, 1)), inner=optax.sgd(0.0), every=1)
  >>> (value, activity), grads = jax.value_and_grad(forward, has_aux=True)(params, jnp.ones((3, 1)))
  >>> updates, state = tx.update(grads, tx.init(params), params, activity=activity)
  >>> print(activity["a"].magnitude, state.layers["a"].replaced)
  [1. 0.] [0 1]
  >>> print(optax.apply_updates(params, updates)["b"].T)
  [[1. 0.]]
  """
  found = _hidden.hidden(fn, variables, *inputs, **kwargs)
  prefix = f"{within}/" if within else ""
  names = {name.removeprefix(prefix): name for name in found.layers if name.startswith(prefix)}
  layers = {name: found.layers[full] for name, full in names.items() if where(name)}
  if not layers:
    reasons = "; ".join(f"{name!r}: {reason}" for name, reason in found.left_out.items())
    raise ValueError(
      f"expected hidden layers, found {_listed(found.layers)}"
      + (", of which none are chosen" if found.layers else "")
      + f"; left out: {reasons or 'nothing'}"
    )
  settings = {"threshold": threshold, "rate": rate, "age": age, "every": every, "decay": decay}
  rule = _checked(utility, {name: x for name, x in settings.items() if x is not None})
  inside = optax.with_extra_args_support(optax.identity() if inner is None else inner)
  if not compensate:
    layers = {name: dataclasses.replace(layer, takers=()) for name, layer in layers.items()}
  elif not any(layer.takers for layer in layers.values()):
    raise ValueError(
      f"compensate: expected that a layer which reads one of {_listed(layers)} adds a bias, found"
      " none that does"
    )
  trained = {name: layer.within(within) for name, layer in layers.items()}
  recycling = _Recycling(trained, rule, inside, init, filling.Fill(0.0, 1.0, key=key))
  return Recycle(
    _activity.Forward(fn, layers),
    optax.GradientTransformationExtraArgs(recycling.init, recycling.update),
  )


def _checked(utility: str, settings: dict[str, Any]) -> _Rule:
  """The rule of that name with other settings."""
  if utility not in _RULES:
    raise ValueError(f"utility: expected one of {sorted(_RULES)}, found {utility!r}")
  rule = dataclasses.replace(_RULES[utility], **settings)
  for name, least, integer in (("age", 0, True), ("every", 1, True), ("threshold", 0, False)):
    value = getattr(rule, name)
    kinds = (int, np.integer) if integer else (int, float, np.number)
    if value is not None and (not isinstance(value, kinds) or not value >= least):
      what = "an integer" if integer else "a number"
      raise ValueError(f"{name}: expected {what} of at least {least}, found {value!r}")
  if not 0 <= rule.decay < 1:
    raise ValueError(f"decay: expected a number from 0 to below 1, found {rule.decay!r}")
  if rule.rate is not None and not 0 < rule.rate * rule.every <= 1:
    raise ValueError(
      f"rate: expected a share above 0, and at most 1 in {rule.every} micro-steps, found"
      f" {rule.rate!r}"
    )
  return rule


@dataclasses.dataclass(frozen=True, eq=False)
class _Recycling:
  """The transformation.

  Attributes:
    layers: The hidden layers.
    rule: Which units are replaced.
    inner: The optimizer inside.
    fresh: The function that gives fresh variables, if there is one.
    fill: What draws parameters else, and the key.
  """

  layers: Mapping[str, Layer]
  rule: _Rule
  inner: optax.GradientTransformationExtraArgs
  fresh: Callable[[jax.Array], Any] | None
  fill: filling.Fill

  def init(self, params: optax.Params) -> RecycleState:
    """The state for these parameters."""
    layers = _nested({name: _newborn(layer) for name, layer in self.layers.items()})
    inner_state = self.inner.init(params)
    if is_stand_in(params):
      return RecycleState(jnp.int32(0), layers, filling.stand_in(self.fill), inner_state)
    leaves = self._leaves(params)
    drawn = leaves if self.fresh is None else {}
    return RecycleState(jnp.int32(0), layers, filling.init(self.fill, drawn), inner_state)

  def update(
    self,
    updates: optax.Updates,
    state: RecycleState,
    params: optax.Params | None = None,
    *,
    activity: Mapping[str, Activity] | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, RecycleState]:
    """One micro-step of the optimizer inside, and the replacement of units after it."""
    if params is None:
      raise ValueError("recycle needs the parameters: expected params, found None")
    if activity is None or activity.keys() != self.layers.keys():
      raise ValueError(
        f"activity: expected what forward returns, for the layers {_listed(self.layers)}, found"
        f" {'none' if activity is None else _listed(activity)}: update(grads, state, params,"
        " activity=activity)"
      )
    updates, inner_state = self.inner.update(updates, state.inner_state, params, **extra_args)
    step = optax.safe_increment(state.micro_step)
    states, gone, means = {}, {}, {}
    for name, units in _by_name(state.layers).items():
      states[name], gone[name], means[name] = self._judged(name, units, activity[name], step)
    leaves = self._leaves(params)

    def replaced(carry: Any, told: Any) -> Any:
      (moves, inner_state), (gone, means) = carry, told
      after, new = self._with_fresh(state.fresh, step, leaves, gone)
      for path, gave in self._gave(leaves, gone, means).items():
        moves[path] = moves[path] + gave.astype(moves[path].dtype)
      for path, leaf in leaves.items():
        update = moves[path]
        move = after[path].astype(update.dtype) - leaf.astype(update.dtype)
        moves[path] = jnp.where(new[path], move, update)
      nothing = {path: jnp.zeros(x.shape, bool) for path, x in _paths.by_path(params).items()}
      trees = _trees.with_leaves(params, after), _trees.with_leaves(params, nothing | new)
      return moves, _restart.restarted(self.inner, inner_state, *trees)

    by_path = _paths.by_path(updates)
    biases = {taker.bias for layer in self.layers.values() for taker in layer.takers}
    changing = leaves | {path: x for path, x in _paths.by_path(params).items() if path in biases}
    wide = {path: filling.as_wide(by_path[path], leaf) for path, leaf in changing.items()}
    any_gone = jnp.stack([units.any() for units in gone.values()]).any()
    wide, inner_state = _control.maybe(any_gone, replaced, (wide, inner_state), (gone, means))
    state = RecycleState(step, _nested(states), state.fresh, inner_state)
    return _trees.with_leaves(updates, wide), state

  def restarted(self, state: RecycleState, params: optax.Params, new: optax.Params) -> RecycleState:
    """The state, where some entries of the parameters are new; see `_restart.restarted`."""
    inner_state = _restart.restarted(self.inner, state.inner_state, params, new)
    return state._replace(inner_state=inner_state)

  def _judged(
    self, name: str, units: UnitsState, activity: Activity, step: jax.Array
  ) -> tuple[UnitsState, jax.Array, tuple[jax.Array, ...]]:
    """What is known of a layer's units after a micro-step, who is replaced, and the mean values."""
    rule, now = self.rule, getattr(activity, self.rule.utility).astype(jnp.float32)
    # A micro-batch with a NaN or an infinity says nothing of a unit.
    told = jnp.isfinite(now)
    age = jnp.where(told, optax.safe_increment(units.age), units.age)

    def summed(before: jax.Array, now: jax.Array) -> jax.Array:
      return jnp.where(told, rule.decay * before + (1 - rule.decay) * now, before)

    sums = summed(units.utility, now)
    total = 1 - rule.decay ** jnp.maximum(age, 1).astype(jnp.float32)
    utility = sums / total
    values = [self._mean(name, activity, taker) for taker in self.layers[name].takers]
    means = tuple(map(summed, units.means, values))
    may = told & (age > rule.age) & (step % rule.every == 0)
    if rule.threshold is not None:
      may &= _activity.relative(utility) <= rule.threshold
    gone, credit = may, units.credit
    if rule.rate is not None:
      credit += rule.rate * rule.every * may.sum(-1).astype(jnp.float32)
      # The rank of each by utility among those that may go; equal ones in their order.
      order = jnp.argsort(jnp.where(may, utility, jnp.inf), axis=-1)
      rank = jnp.argsort(order, axis=-1).astype(jnp.float32)
      gone = may & (rank < jnp.floor(credit)[..., None])
      credit -= gone.sum(-1).astype(jnp.float32)

    def anew(x: jax.Array) -> jax.Array:
      return jnp.where(gone, jnp.zeros_like(x), x)

    replaced = units.replaced + gone.astype(jnp.int32)
    state = UnitsState(anew(sums), anew(age), credit, replaced, tuple(map(anew, means)))
    return state, gone, tuple(x / total for x in means)

  @staticmethod
  def _mean(name: str, activity: Activity, taker: Taker) -> jax.Array:
    """The mean value of a layer's units where a reader with a bias reads them."""
    if taker.name not in activity.means:
      raise ValueError(
        f"activity of {name!r}: expected the means that forward returns with compensate=True, of"
        f" {taker.name!r} among them, found {_listed(activity.means) if activity.means else 'none'}"
      )
    return activity.means[taker.name].astype(jnp.float32)

  def _gave(
    self,
    leaves: Mapping[_paths.Path, jax.Array],
    gone: Mapping[str, jax.Array],
    means: Mapping[str, tuple[jax.Array, ...]],
  ) -> dict[_paths.Path, jax.Array]:
    """By bias what the units that are replaced gave on average to what it is added to."""
    found: dict[_paths.Path, jax.Array] = {}
    for name, layer in self.layers.items():
      for taker, mean in zip(layer.takers, means[name], strict=True):
        weights = leaves[taker.weights]
        weights = weights.astype(_window.wider(weights.dtype, mean.dtype))
        mean = jnp.where(gone[name], mean, jnp.zeros_like(mean)).astype(weights.dtype)
        member = next(m for m in layer.units.members if m.path == taker.weights)
        value = entries(member, mean, weights.shape)
        others = tuple(axis for axis in range(weights.ndim) if axis not in taker.axes)
        gave = (weights * value).sum(others)
        found[taker.bias] = found[taker.bias] + gave if taker.bias in found else gave
    return found

  def _leaves(self, params: optax.Params) -> dict[_paths.Path, jax.Array]:
    """The parameters that have units.

    Raises:
      ValueError: If weights that make units, or read them, are not among them.
    """
    leaves, found = _paths.by_path(params), {}
    for layer in self.layers.values():
      for member in layer.units.members:
        shape = np.shape(leaves[member.path]) if member.path in leaves else None
        if member.role == "follows" and shape is None:  # running statistics
          continue
        if shape is None or shape[member.axis] != len(member.labels):
          raise ValueError(
            f"{_paths.join(member.path)!r}: expected {len(member.labels)} entries along axis"
            f" {member.axis} in the parameters, found"
            f" {'no such leaf' if shape is None else f'shape {shape}'}"
          )
        found[member.path] = leaves[member.path]
    return found

  def _with_fresh(
    self,
    state: filling.FillState,
    step: jax.Array,
    leaves: Mapping[_paths.Path, jax.Array],
    gone: Mapping[str, jax.Array],
  ) -> tuple[dict[_paths.Path, jax.Array], dict[_paths.Path, jax.Array]]:
    """The parameters after units have been replaced, and which of their entries are new."""
    made, read = ({path: jnp.zeros(x.shape, bool) for path, x in leaves.items()} for _ in range(2))
    for name, layer in self.layers.items():
      for member in layer.units.members:
        if member.path in leaves:
          kind = read if member.role == "outgoing" else made
          kind[member.path] |= entries(member, gone[name], leaves[member.path].shape)
    fresh = self._fresh(state, step, leaves)
    after = {}
    for path, leaf in leaves.items():
      # A weight between two replaced units is incoming and outgoing: it becomes zero.
      started = jnp.where(made[path], fresh[path].astype(leaf.dtype), leaf)
      after[path] = jnp.where(read[path], jnp.zeros_like(leaf), started)
    return after, {path: made[path] | read[path] for path in leaves}

  def _fresh(
    self, state: filling.FillState, step: jax.Array, leaves: Mapping[_paths.Path, jax.Array]
  ) -> Mapping[_paths.Path, jax.Array]:
    """Fresh parameters."""
    if self.fresh is None:
      return filling.weights(self.fill, state, step, dict(leaves))
    fresh = _paths.by_path(self.fresh(filling.key_at(self.fill, state, step)))
    for path, leaf in leaves.items():
      found = np.shape(fresh[path]) if path in fresh else None
      if found != leaf.shape:
        raise ValueError(
          f"init: expected {_paths.join(path)!r} of shape {leaf.shape} in what it returns, found"
          f" {'no such leaf' if found is None else f'shape {found}'}"
        )
    return fresh


def _newborn(layer: Layer) -> UnitsState:
  """The state of a layer all of whose units are new."""
  whole = jnp.zeros(layer.shape, jnp.int32)
  sums = whole.astype(jnp.float32)
  credit = jnp.zeros(layer.shape[:-1], jnp.float32)
  return UnitsState(sums, whole, credit, whole, (sums,) * len(layer.takers))


def _nested(states: Mapping[str, UnitsState]) -> Any:
  by_path: dict[_paths.Path, Any] = {tuple(name.split("/")): x for name, x in states.items()}
  return _paths.nested(by_path)


def _by_name(layers: Any) -> dict[str, UnitsState]:
  pairs = _paths.flatten_with_paths(layers, is_leaf=lambda x: isinstance(x, UnitsState))
  return {_paths.join(path): state for path, state in pairs}


def _listed(names: Any) -> str:
  return _paths.listed(tuple(name.split("/")) for name in names)
