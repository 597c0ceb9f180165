"""From pruned channels to a smaller network with the same outputs.

A unit is pruned when all weights that make it are zero. What is left of it is a constant: what its
bias and norm make of zero. `follow_pruned` has these go with the weights, while the network trains;
`fold_pruned` moves the constant into the biases of the layers that read it, at any time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cadence import _control
from optax_cadence import _paths
from optax_cadence import _restart
from optax_cadence.growth import _graph
from optax_cadence.growth import _trees
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._dimension import entries
from optax_cadence.programs import primitives
from optax_cadence.programs import reading


def pruned_units(variables: Any, units: Dimension) -> jax.Array:
  """Which units are pruned: all weights that make them are zero.

  Args:
    variables: Tree of arrays.
    units: The units and who has them, as `couple` finds them.

  Returns:
    bool [units.size]: what `shrinking(variables, units, remove=...)` takes out.

  Raises:
    ValueError: If no weight of the tree makes these units.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> params = {"a": jnp.array([[0.0, 1.0], [0.0, 0.0]]), "b": jnp.ones((2, 2))}
  >>> net = lambda p, x: x @ p["a"] @ p["b"]
  >>> units = growth.couple(net, params, jnp.ones((5, 2)), producer="a")
  >>> print(growth.pruned_units(params, units))
  [ True False]
  """
  leaves = _paths.by_path(variables)
  makers = [m for m in units.members if m.role == "incoming" and m.path in leaves]
  if not makers:
    raise ValueError(
      f"expected weights that make the units among {_paths.listed(leaves)}, found the members"
      f" {_paths.listed(m.path for m in units.members)}"
    )
  alive = jnp.zeros(units.size, bool)
  for member in makers:
    leaf = leaves[member.path]
    others = tuple(i for i in range(leaf.ndim) if i != member.axis)
    # Positions without a unit go into one entry more, which is dropped.
    labels = np.where(member.labels < 0, units.size, member.labels)
    used = jnp.zeros(units.size + 1, bool).at[labels].max((leaf != 0).any(others))
    alive |= used[:-1]
  return ~alive


def follow_pruned(
  units: Dimension, inner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
  """An optimizer under which bias, norm and moments of a pruned unit go with its weights.

  When an update has made all weights of a unit zero, it makes zero too what follows the unit (its
  bias, the scale and bias of its norm), and holds it there as long as the weights are. A unit whose
  activation leaves zero as it is then is zero, and `shrink` takes it out with the same outputs.
  What the optimizer kept for the unit starts anew.

  Args:
    units: The units and who has them, as `couple` finds them for the tree that is trained.
    inner: The optimizer, with what prunes in it.

  Returns:
    The optimizer. It needs `params`, and its state is that of `inner`.
  """
  extended = optax.with_extra_args_support(inner)

  def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
    if params is None:
      raise ValueError("follow_pruned needs the parameters: expected params, found None")
    updates, state = extended.update(updates, state, params, **extra_args)
    weights = _paths.by_path(params)
    with jax.numpy_dtype_promotion("standard"):
      after = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates)
    gone, before = pruned_units(after, units), pruned_units(params, units)
    moves = _paths.by_path(updates)
    for member in units.members:
      if member.role == "follows" and member.path in weights:
        update, param = moves[member.path], weights[member.path]
        there = entries(member, gone, param.shape)
        moves[member.path] = jnp.where(there, -param.astype(update.dtype), update)
    updates = _trees.with_leaves(updates, moves)

    def restarted(state: Any, newly: jax.Array) -> Any:
      new = {path: jnp.zeros(x.shape, bool) for path, x in weights.items()}
      for member in units.members:
        if member.path in weights:
          new[member.path] |= entries(member, newly, weights[member.path].shape)
      return _restart.restarted(extended, state, after, _trees.with_leaves(params, new))

    newly = gone & ~before
    return updates, _control.maybe(newly.any(), restarted, state, newly)

  return optax.GradientTransformationExtraArgs(extended.init, update)


def fold_pruned(fn: Callable[..., Any], variables: Any, units: Dimension, *args: Any) -> Any:
  """Moves what pruned units still put out into the biases of the layers that read them.

  Their outgoing weights become zero, so that `shrinking(variables, units, remove=pruned)` takes
  them out without a change of the outputs.

  Args:
    fn: The forward pass.
    variables: Tree of arrays.
    units: The units and who has them, as `couple` finds them.
    *args: Further arguments of `fn`: the constants are read from a run on them.

  Returns:
    The tree with other outgoing weights and biases.

  Raises:
    ValueError: If what a reader makes of these units is no constant (a convolution that pads its
      input with zeros), if it has no bias, or if something else than a product with weights sums
      over the units.
  """
  if not units.folds:
    raise ValueError(
      "expected nothing but products with weights to sum over the units, found something else, as"
      " the statistics of a norm are"
    )
  gone, leaves = pruned_units(variables, units), _paths.by_path(variables)
  if not gone.any():
    return variables
  alone = {}
  for member in units.members:
    if member.role == "outgoing":
      leaf = leaves[member.path]
      alone[member.path] = jnp.where(entries(member, gone, leaf.shape), leaf, jnp.zeros_like(leaf))
  constants = _constants(fn, variables, args, alone)
  new = {path: leaves[path] - part for path, part in alone.items()}
  for path in alone:
    if path not in constants:
      raise ValueError(
        f"{_paths.join(path)!r}: expected a bias that is added to its product, into which the"
        " constant of the pruned units goes, found none"
      )
    bias, total = constants[path]
    rows = total.reshape(-1, *leaves[bias].shape)
    if not np.allclose(rows, rows[:1], rtol=1e-5, atol=1e-6):
      raise ValueError(
        f"{_paths.join(path)!r}: expected the pruned units to add a constant, found one that"
        " differs between positions (a convolution that pads its input does that to a constant);"
        " let the biases go with the weights: growth.follow_pruned"
      )
    new[bias] = new.get(bias, leaves[bias]) + rows[0].astype(leaves[bias].dtype)
  return _trees.with_leaves(variables, new)


def _constants(
  fn: Callable[..., Any], variables: Any, args: Any, alone: dict[_paths.Path, jax.Array]
) -> dict[_paths.Path, tuple[_paths.Path, jax.Array]]:
  """For each weight the bias that is added to its product, and the product of a part of the weight.

  `alone` has these parts, by the paths of the weights.
  """
  traced = _graph.trace(fn, variables, *args)
  found: dict[_paths.Path, tuple[_paths.Path, jax.Array]] = {}

  # With each value goes its kind, ("leaf", path) or ("product", path of the leaf), None for any
  # other; and the value that it would have if there were but the part of that leaf.
  def operation(eqns: reading.Eqns, operands: list[Any]) -> list[Any]:
    (eqn,) = eqns
    inner = reading.called(eqn)
    if inner is not None:
      return reading.walk([inner], operands, operation, constant)
    name, arrays = eqn.primitive.name, [x for _, x, _ in operands]
    results = reading.bind(eqn, arrays)
    kinds = [kind for kind, _, _ in operands]
    if name in primitives.REARRANGEMENTS:
      kind, _, part = operands[0]
      part = None if part is None else reading.bind(eqn, [part])[0]
      return [(kind, results[0], part)]
    if name in primitives.PRODUCTS:
      for i, (kind, _, part) in enumerate(operands):
        if part is not None and kind[0] == "leaf":
          arrays[i] = part
          return [(("product", kind[1]), results[0], reading.bind(eqn, arrays)[0])]
    if name in ("add", "add_any"):
      for (kind, _, part), other in zip(operands, kinds[::-1], strict=True):
        if part is not None and kind[0] == "product" and other is not None and other[0] == "leaf":
          found[kind[1]] = other[1], part
    return [(None, x, None) for x in results]

  def constant(numbers: tuple[Any, ...]) -> Any:
    return None, numbers[0], None

  leaves = _paths.by_path(variables).items()
  inputs: list[Any] = [(("leaf", path), x, alone.get(path)) for path, x in leaves]
  inputs += [(None, x, None) for x in traced.arrays]
  reading.walk([traced.program], inputs, operation, constant)
  return found
