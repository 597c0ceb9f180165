"""Where the weights of new units come from, beside a layer's own initializer.

Each function here returns, or takes, a function `(path, shape, dtype) -> array` as
`Plan.apply` reads it: of the array only the new entries are used.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths
from optax_cadence.growth import _graph
from optax_cadence.growth import _trees
from optax_cadence.growth._dimension import extended_together
from optax_cadence.growth._plan import LeafChange
from optax_cadence.growth._plan import Plan
from optax_cadence.programs import primitives
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
  old = _paths.by_path(variables)
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
  along: dict[tuple[_paths.Path, int], list[tuple[np.ndarray, int, int, np.ndarray]]] = {}
  for dimension, more in plan.dimensions:
    chosen = rng.integers(0, dimension.size, more)
    for member in dimension.members:
      if member.role != "outgoing":
        described = member.labels, dimension.size, more, chosen
        along.setdefault((member.path, member.axis), []).append(described)
  sources = {place: _sources(*zip(*pieces, strict=True)) for place, pieces in along.items()}
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


def _sources(
  labels: Sequence[np.ndarray],
  units: Sequence[int],
  more: Sequence[int],
  chosen: Sequence[np.ndarray],
) -> np.ndarray:
  """For each position of the new axis the position of the old one to copy.

  Args:
    labels: For each dimension the unit of each old position.
    units: For each the number of old units.
    more: For each the number of new ones.
    chosen: For each the old units that those which are new copy.
  """
  extended = extended_together(labels, units, more)
  new = np.any([x >= n for x, n in zip(extended, units, strict=True)], axis=0)
  result = np.cumsum(~new) - 1  # old ones stay what they are
  for before, after, number, copied in zip(labels, extended, units, chosen, strict=True):
    for unit, source in enumerate(copied, start=number):
      at = np.flatnonzero(after == unit)  # the k-th of them copies the k-th of its source
      result[at] = np.flatnonzero(before == source)[: len(at)]
  return result


def _copied(value: Any, old: Any, change: LeafChange, axis: int, sources: np.ndarray) -> Any:
  """`value` with new entries along an axis copied from the old leaf, as far as it has them."""
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

  Raises:
    ValueError: If a path is not in the plan, or grows along several axes, or the new entries have
      another shape.
  """
  changes = {_trees.find(plan.by_path, name): value for name, value in values.items()}

  def read(path: _paths.Path, shape: tuple[int, ...], dtype: Any) -> Any:
    value = _value(fresh, path, shape, dtype)
    if path not in changes:
      return value
    axes = sorted(plan.by_path[path].positions)
    if len(axes) != 1:
      raise ValueError(
        f"new entries of {_paths.join(path)!r}: expected a leaf that grows along one axis, found"
        f" axes {axes}"
      )
    (axis,) = axes
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
  """Fresh values of a leaf, of a function or tree."""
  value = fresh(path, shape, dtype) if callable(fresh) else _paths.by_path(fresh)[path]
  return jnp.asarray(value, dtype)


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
  shapes = _trees.shapes(variables)
  before, after = _trees.find(shapes, producer), _trees.find(shapes, consumer)
  traced = _graph.trace(loss, variables, *args)
  leaves = _paths.by_path(variables)
  inputs = [*leaves.items(), *((None, x) for x in traced.arrays)]
  sizes: list[tuple[int, int]] = []  # of the virtual matrix, for each pair of products

  def run(matrix: Any) -> Any:
    """The loss with a matrix from the producer's input to the consumer's output."""
    h: Any = None  # the producer's input, once it has run

    def operation(eqns: reading.Eqns, operands: list[Any]) -> list[Any]:
      nonlocal h
      (eqn,) = eqns
      inner = reading.called(eqn)
      if inner is not None:
        return reading.walk([inner], operands, operation, constant)
      name, arrays = eqn.primitive.name, [x for _, x in operands]
      results = reading.bind(eqn, arrays)
      if name in primitives.REARRANGEMENTS:
        return [(operands[0][0], results[0])]
      if name in primitives.PRODUCTS:
        leaf, output = operands[1][0], results[0]
        if leaf == after and h is not None:
          if h.shape[:-1] != output.shape[:-1]:
            raise ValueError(
              f"the input of {producer!r} has shape {h.shape}, the output of {consumer!r}"
              f" {output.shape}: expected one shape but for their last axes"
            )
          sizes.append((h.shape[-1], output.shape[-1]))
          results = [output if matrix is None else output + h @ matrix]
        if leaf == before:
          h = arrays[0]
      return [(None, x) for x in results]

    def constant(numbers: tuple[Any, ...]) -> Any:
      return None, numbers[0]

    # With each value goes the path of the leaf whose entries it holds.
    ((_, value),) = reading.walk([traced.program], inputs, operation, constant)
    return value

  jax.eval_shape(lambda: run(None))
  if len(sizes) != 1:
    raise ValueError(
      f"expected {producer!r} and, after it, {consumer!r} in one product each, found"
      f" {len(sizes)} such pairs"
    )
  return jax.grad(run)(jnp.zeros(sizes[0], leaves[after].dtype))
