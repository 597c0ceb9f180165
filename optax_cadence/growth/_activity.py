"""The forward pass that returns, beside its result, what its hidden units did.

The traced program is run as it is, but for numbers that are taken of what its products read. Only
what has such a product inside, a call or a loop, is opened.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths
from optax_cadence import _window
from optax_cadence.growth import _couple
from optax_cadence.growth import _graph
from optax_cadence.growth import _hidden
from optax_cadence.growth._dimension import Labels
from optax_cadence.growth._hidden import Layer
from optax_cadence.growth._hidden import Read
from optax_cadence.programs import reading


class Activity(NamedTuple):
  """What the units of a hidden layer did, on average over a batch and all positions in it.

  Units are taken where they are read: behind the nonlinearity, and behind what else lies between,
  such as a norm or dropout. Where they are read at several places, each number is the sum.

  Attributes:
    magnitude: The absolute value of each unit: float32 [units], or [layers, units] of layers that
      are stacked.
    contribution: The absolute value, times the sum of the absolute values of its outgoing weights.
    means: The value itself, by the path of weights that read it; of those only behind which a bias
      takes it up when the unit is replaced (`compensate` of `recycle`).
  """

  magnitude: jax.Array
  contribution: jax.Array
  means: Mapping[str, jax.Array] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Forward:
  """A function that returns the result of another and, beside it, the activity of hidden layers.

  Attributes:
    fn: The other function: `fn(variables, *args, **kwargs)`.
    layers: The layers, by name.
  """

  fn: Callable[..., Any]
  layers: Mapping[str, Layer]

  def __call__(self, variables: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Activity]]:
    """Traces the other function and runs its program; see `_Run`."""
    traced = _graph.trace(self.fn, variables, *args, **kwargs)
    graph = _graph.Graph(traced)
    reads: dict[tuple[int, ...], list[tuple[str, Read]]] = {}
    for name, layer in self.layers.items():
      for read in _hidden.reads_of(_couple.spread(graph, layer.units, name)):
        reads.setdefault(read.at, []).append((name, read))
      graph.clear()
    run = _Run(self.layers, reads)
    outputs, found = run(traced.program, [*jax.tree.leaves(variables), *traced.arrays])
    times = collections.Counter(
      (name, _paths.join(read.weights)) for pairs in reads.values() for name, read in pairs
    )
    for name, activity in found.items():
      means = {weights: x / times[name, weights] for weights, x in activity.means.items()}
      found[name] = activity._replace(means=means)
    return traced.rebuild(outputs), {name: found[name] for name in self.layers}


class _Run:
  """Runs a program and finds the activity of layers."""

  def __init__(
    self, layers: Mapping[str, Layer], reads: Mapping[tuple[int, ...], Sequence[tuple[str, Read]]]
  ):
    self.layers, self.reads = layers, reads
    self.opened = {at[:n] for at in reads for n in range(len(at))}

  def __call__(
    self, program: Any, inputs: Sequence[Any], at: tuple[int, ...] = ()
  ) -> tuple[list[Any], dict[str, Activity]]:
    """The outputs of the program that stands at `at`, and the activity of layers read in it."""
    found: dict[str, Activity] = {}
    numbers = itertools.count()

    def operation(eqns: reading.Eqns, operands: list[Any]) -> list[Any]:
      (eqn,), here = eqns, (*at, next(numbers))
      for name, read in self.reads.get(here, ()):
        self._add(found, name, _activity(read, operands, self.layers[name]))
      if here not in self.opened:
        return reading.bind(eqn, operands)
      outputs, inside = self._open(eqn, operands, here)
      for name, activity in inside.items():
        self._add(found, name, activity)
      return outputs

    return reading.walk([program], inputs, operation, lambda numbers: numbers[0]), found

  @staticmethod
  def _add(found: dict[str, Activity], name: str, activity: Activity) -> None:
    if name in found:
      before = found[name]
      means = dict(before.means)
      for weights, x in activity.means.items():
        means[weights] = means[weights] + x if weights in means else x
      activity = Activity(
        before.magnitude + activity.magnitude, before.contribution + activity.contribution, means
      )
    found[name] = activity

  def _open(
    self, eqn: Any, operands: list[Any], at: tuple[int, ...]
  ) -> tuple[list[Any], dict[str, Activity]]:
    """The outputs of a call or loop, and the activity of layers read in it."""
    name, p, program = eqn.primitive.name, eqn.params, _hidden.inside(eqn)
    if name.startswith(("remat", "checkpoint")):
      run = functools.partial(self, program, at=at)
      return jax.checkpoint(run, policy=p["policy"], prevent_cse=p["prevent_cse"])(operands)
    if name != "scan":
      return self(program, operands, at)
    consts, carried, scanned = reading.scan_operands(eqn, operands)

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], Any]:
      outputs, found = self(program, [*consts, *carry, *xs], at)
      return outputs[: len(carry)], (outputs[len(carry) :], found)

    settings = {name: p[name] for name in ("length", "reverse", "unroll")}
    carry, (stacked, found) = jax.lax.scan(step, carried, scanned, **settings)
    for layer in found:
      if self.layers[layer].stack is None:
        found[layer] = jax.tree.map(lambda x: x.mean(0), found[layer])
    return [*carry, *stacked], found


def _activity(read: Read, operands: Sequence[Any], layer: Layer) -> Activity:
  """What the units of a layer did that a product reads."""
  units, arrays, others = layer.units.size, [], []
  for operand, axis in zip(operands, read.axes, strict=False):
    x = jax.lax.stop_gradient(operand)
    arrays.append(x.astype(_window.wider(x.dtype, jnp.float32)))
    others.append(tuple(a for a in range(x.ndim) if a != axis))
  of_value, of_weights = read.value, 1 - read.value
  value = jnp.abs(arrays[of_value]).mean(others[of_value])
  weight = jnp.abs(arrays[of_weights]).sum(others[of_weights])
  values, weights = read.labels[of_value], read.labels[of_weights]
  positions = _per_unit(jnp.ones_like(value), values, units)
  magnitude = _per_unit(value, values, units) / positions
  if np.array_equal(values, weights):
    contribution = _per_unit(value * weight, values, units)
  else:
    contribution = magnitude * _per_unit(weight, weights, units)
  means, name = {}, _paths.join(read.weights)
  if name in {taker.name for taker in layer.takers}:
    mean = arrays[of_value].mean(others[of_value])
    means[name] = _per_unit(mean, values, units) / positions
  return Activity(magnitude, contribution, means)


def _per_unit(x: jax.Array, labels: Labels, units: int) -> jax.Array:
  """For each unit the sum over its positions."""
  if np.array_equal(labels, np.arange(units)):
    return x
  # Positions without a unit go into one entry more, which is dropped.
  labels = np.where(labels < 0, units, labels)
  return jnp.zeros(units + 1, x.dtype).at[labels].add(x)[:-1]


def dormant(activity: Mapping[str, Activity], threshold: float = 0.0) -> dict[str, jax.Array]:
  r"""Which units are dormant: their magnitude is at most a small part of their layer's mean.

  Args:
    activity: What the forward pass of `recycle` returns beside its result.
    threshold: That part, :math:`\tau` of ReDo. At 0, units that were zero for the whole batch.

  Returns:
    By layer, bool [units].

  References:
    Sokar et al. 2023, arXiv:2302.12902.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> activity = growth.Activity(jnp.array([0.01, 1.0, 2.0]), jnp.zeros(3))
  >>> print(growth.dormant({"a": activity}, threshold=0.1)["a"])
  [ True False False]
  """
  return {name: relative(a.magnitude) <= threshold for name, a in activity.items()}


def relative(x: jax.Array) -> jax.Array:
  """A number for each unit over their mean in the layer: 0 throughout where that is 0."""
  mean = x.mean(-1, keepdims=True)
  return x / jnp.where(mean > 0, mean, jnp.ones_like(mean))
