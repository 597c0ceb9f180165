"""Where the weights of new units come from, beside a layer's own initializer.

Each function here returns, or takes, a function `(path, shape, dtype) -> array` as
`Plan.apply` reads it: of the array only the new entries are used.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths
from optax_cadence.growth import _program
from optax_cadence.growth import _trees
from optax_cadence.growth._dimension import extended
from optax_cadence.growth._plan import LeafChange
from optax_cadence.growth._plan import Plan
from optax_cadence.programs import reading

Fresh = Callable[[_paths.Path, tuple[int, ...], Any], Any]


def copies(variables: Any, plan: Plan, fresh: Any, key: jax.Array, *, noise: float = 0.01) -> Fresh:
  """New units that are noisy copies of old ones: Net2Wider's incoming weights.

  Args:
    variables: The tree before it grows.
    plan: The plan that will be applied.
    fresh: Where outgoing weights come from: a tree at the new shapes, or a function.
    key: Random key: which units are copied, and the noise.
    noise: Standard deviation of the noise on weights, relative to that of the leaf.

  Returns:
    Fresh values for `plan.apply`. All leaves of a dimension copy the same units; running
    statistics and norms are copied without noise.

  References:
    Chen et al. 2015, arXiv:1511.05641.
  """
  old = _trees.leaves(variables)
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
  sources = {}
  for dimension, more in plan.dimensions:
    chosen = rng.integers(0, dimension.size, more)
    for member in dimension.members:
      if member.role != "outgoing":
        new = extended(member.labels, dimension.size, more)
        sources[member.path, member.axis] = _sources(member.labels, new, dimension.size, chosen)
  changes = plan.by_path

  def read(path: _paths.Path, shape: tuple[int, ...], dtype: Any) -> Any:
    value = _value(fresh, path, shape, dtype)
    for axis in (a for a in changes[path].positions if (path, a) in sources):
      if path in old:
        value = _copied(value, old[path], changes[path], axis, sources[path, axis])
        if changes[path].role in ("incoming", "both"):
          mixed = jax.random.fold_in(key, zlib.crc32(_paths.join(path).encode()))
          value = value + noise * jnp.std(old[path]) * jax.random.normal(mixed, shape, value.dtype)
    return value

  return read


def _sources(labels: np.ndarray, new: np.ndarray, units: int, chosen: np.ndarray) -> np.ndarray:
  """For each position of the new axis the position of the old one to copy."""
  result = np.zeros(len(new), int)
  seen = np.zeros(len(new), int)
  count: dict[int, int] = {}
  for i, label in enumerate(new):  # the k-th position of a unit copies the k-th of its source
    count[label] = count.get(label, -1) + 1
    seen[i] = count[label]
  places = {u: np.flatnonzero(labels == u) for u in set(labels.tolist())}
  for i, label in enumerate(new):
    source = int(chosen[label - units]) if label >= units else int(label)
    result[i] = places[source][seen[i]]
  return result


def _copied(value: Any, old: Any, change: LeafChange, axis: int, sources: np.ndarray) -> Any:
  """`value` with the new entries along an axis copied from the old leaf, where that reaches."""
  taken = jnp.take(jnp.asarray(old), sources, axis=axis)
  at = [np.arange(n) for n in taken.shape]
  for a, p in change.positions.items():
    if a != axis:
      at[a] = p
  return jnp.asarray(value).at[np.ix_(*at)].set(taken)


def given(plan: Plan, fresh: Any, values: Mapping[str, Any]) -> Fresh:
  """Fresh values of which some are given, such as the outgoing weights of `gradmax`.

  Args:
    plan: The plan that will be applied.
    fresh: Where all others come from: a tree at the new shapes, or a function.
    values: For the path of a leaf its new entries along the one axis that grows: an array of
      the leaf's shape with as many entries there as are new, or a number.

  Returns:
    Fresh values for `plan.apply`.
  """
  changes = {_trees.find(plan.by_path, name): value for name, value in values.items()}

  def read(path: _paths.Path, shape: tuple[int, ...], dtype: Any) -> Any:
    value = _value(fresh, path, shape, dtype)
    if path not in changes:
      return value
    (axis,) = plan.by_path[path].positions
    rest = [np.arange(n) for n in shape]
    rest[axis] = plan.by_path[path].new(axis)
    new = jnp.asarray(changes[path], value.dtype)
    target = tuple(map(len, rest))
    if new.shape not in ((), target):
      raise ValueError(
        f"new entries of {_paths.join(path)!r}: expected shape {target}, found {new.shape}"
      )
    return value.at[np.ix_(*rest)].set(new)

  return read


def _value(fresh: Any, path: _paths.Path, shape: tuple[int, ...], dtype: Any) -> Any:
  found = fresh(path, shape, dtype) if callable(fresh) else _trees.leaves(fresh)[path]
  return jnp.asarray(found, dtype)


def gradmax(outer: Any, units: int, norm: float = 1.0) -> jax.Array:
  r"""Outgoing weights for which the incoming ones of new units get the largest gradient.

  For units whose incoming weights are zero, the gradient of those is :math:`f'(0)\, M W^T` with
  :math:`M = \sum h\, \delta^T`, the outer product of the layer's input and the gradient at the
  output of the next. Its norm is largest for the leading right singular vectors of M.

  Args:
    outer: M, [inputs, outputs], of `outer_product`, added up over as many batches as you like.
    units: Number of new units.
    norm: Norm of each unit's outgoing weights.

  Returns:
    W, [units, outputs]. With incoming weights of zero the output is that of the old network
    at any α, if the activation maps zero to zero. One whose derivative at zero is zero
    (`jax.nn.relu`) needs incoming weights that are a little off.

  Raises:
    ValueError: If there are more units than M has singular values.

  References:
    Evci et al. 2022, arXiv:2201.05125.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> print(abs(growth.gradmax(jnp.diag(jnp.array([1.0, 3.0, 2.0])), units=1)))
  [[0. 1. 0.]]
  """
  outer = jnp.asarray(outer)
  if outer.ndim != 2 or not 1 <= units <= min(outer.shape):
    raise ValueError(
      f"expected an outer product [inputs, outputs] with at least {units} of each, found shape"
      f" {outer.shape}"
    )
  _, _, right = jnp.linalg.svd(outer, full_matrices=False)
  return norm * right[:units]


def outer_product(
  loss: Callable[..., Any], variables: Any, *args: Any, producer: str, consumer: str
) -> jax.Array:
  """The outer product that `gradmax` takes: the gradient of a virtual matrix past the units.

  Args:
    loss: `loss(variables, *args)`, a scalar.
    variables: Tree of arrays.
    *args: Its further arguments.
    producer: Path of the kernel whose units will be more.
    consumer: Path of the kernel that reads them.

  Returns:
    Array [inputs of the producer, outputs of the consumer]. For convolutions it is that of
    the central taps.

  Raises:
    ValueError: If the input of one and the output of the other do not lie side by side.
  """
  names = [_trees.find(_trees.shapes(variables), name) for name in (producer, consumer)]
  program, paths, _ = _program.trace(loss, variables, *args)
  values = [*_trees.leaves(variables).values(), *_trees.partition_arrays((args, {}))[0]]
  sizes: list[tuple[int, int]] = []

  def run(probe: Any) -> Any:
    walk = _Probe(names[0], names[1], probe, sizes)
    origins = [*paths, *([None] * (len(values) - len(paths)))]
    return walk.run(program, list(zip(values, origins, strict=True)))[0][0]

  jax.eval_shape(lambda: run(None))
  if len(sizes) != 1:
    raise ValueError(
      f"expected {producer!r} and, after it, {consumer!r} in one product each, found"
      f" {len(sizes)} such pairs"
    )
  return jax.grad(run)(jnp.zeros(sizes[0], _trees.leaves(variables)[names[1]].dtype))


class _Probe:
  """Runs a program with a matrix from the input of one product to the output of another."""

  def __init__(self, producer: Any, consumer: Any, probe: Any, sizes: list[tuple[int, int]]):
    self.producer, self.consumer, self.probe, self.sizes = producer, consumer, probe, sizes
    self.before: Any = None

  def run(self, program: Any, inputs: list[Any]) -> list[Any]:
    jaxpr, consts = reading.opened(program)
    known = {v: (c, None) for v, c in zip(jaxpr.constvars, consts, strict=True)}
    known.update(zip(jaxpr.invars, inputs, strict=True))

    def read(var: Any) -> Any:
      return (var.val, None) if reading.is_literal(var) else known[var]

    for eqn in jaxpr.eqns:
      operands = [read(v) for v in eqn.invars]
      inner = reading.called(eqn)
      if inner is not None:
        results = self.run(inner, operands)
      else:
        results = [(y, None) for y in reading.bind(eqn, [x for x, _ in operands])]
        if eqn.primitive.name in ("convert_element_type", "copy", "transpose", "reshape"):
          results = [(results[0][0], operands[0][1])]
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
          results = [(self._product(operands, results[0][0]), None)]
      known.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]

  def _product(self, operands: list[Any], output: Any) -> Any:
    (x, _), (_, origin) = operands[0], operands[1]
    if origin == self.consumer and self.before is not None:
      h = self.before
      if h.shape[:-1] != output.shape[:-1]:
        raise ValueError(
          f"the input of {_paths.join(self.producer)!r} has shape {h.shape}, the output of"
          f" {_paths.join(self.consumer)!r} {output.shape}: expected one shape but for their last"
          " axes"
        )
      if self.probe is None:
        self.sizes.append((h.shape[-1], output.shape[-1]))
      else:
        output = output + h @ self.probe
    if origin == self.producer:
      self.before = x
    return output
