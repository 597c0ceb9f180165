"""The gate: the forward pass of a grown network, with α on all that goes out of new entries."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths
from optax_cadence.growth import _couple
from optax_cadence.growth import _graph
from optax_cadence.growth import _trees
from optax_cadence.growth import _values
from optax_cadence.growth._dimension import extended_together
from optax_cadence.growth._evaluate import Evaluator
from optax_cadence.growth._plan import LeafChange
from optax_cadence.growth._plan import Plan


def gated(
  fn: Callable[..., Any], plan: Plan, *, old: Callable[..., Any] | None = None
) -> Callable[..., Any]:
  r"""The forward pass of a network that has grown, with the gate in its variables.

  What goes from new entries to old ones is multiplied by :math:`\alpha`, and nothing else:
  in a product or convolution that sums over an axis with new units, the terms of the new
  units; in a larger kernel the new taps; in a norm over a widened axis (LayerNorm) the new
  units' part in the statistics, so that the mean is
  :math:`(\sum_{old} x + \alpha \sum_{new} x) / (n_{old} + \alpha n_{new})`. At
  :math:`\alpha = 0` old entries are those of the network as it was, but for the order in which a
  larger sum is added up; at :math:`\alpha = 1` the result is that of `fn`.

  Args:
    fn: `fn(variables, *args, **kwargs)`, the forward pass at the new size.
    plan: The plan by which the variables have grown.
    old: The forward pass at the old size; `fn` itself by default, for functions that read
      all sizes from their arrays. (Linen: `old_model.apply`.)

  Returns:
    A function like `fn` of variables that hold the gate too. It may be transformed by
    `jax.jit`, `jax.grad` and so on, and traces `fn` and `old` when it is.

  Raises:
    ValueError: When called, if the variables are not those of the plan, or the program
      cannot keep old and new entries apart.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
  >>> fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
  >>> x = jnp.ones((1, 3))
  >>> units = growth.couple(fn, params, x, producer="a")
  >>> plan = growth.widening(params, units, by=2)
  >>> grown = plan.apply(params, lambda path, shape, dtype: jnp.full(shape, 0.5, dtype))
  >>> forward = growth.gated(fn, plan)
  >>> at_one = {**grown, "alpha": jnp.float32(1)}
  >>> print(*(y.round(2) for y in (fn(params, x), forward(grown, x), forward(at_one, x))))
  [[3.98 3.98]] [[3.98 3.98]] [[4.89 4.89]]
  """
  if not plan.grows or not plan.gate:
    raise ValueError(
      "expected a plan that grows behind a gate, found one"
      f" {'without a gate: call the network as it is' if plan.grows else 'that shrinks'}"
    )
  before = fn if old is None else old

  @functools.wraps(fn)
  def forward(variables: Any, *args: Any, **kwargs: Any) -> Any:
    alpha, variables = _without_gate(variables, plan)
    changed = [c for c in plan.changes if c.positions and not c.layers]
    if not changed:
      leaves = _paths.by_path(variables)
      scaled = {c.path: _scaled(c, leaves[c.path], alpha) for c in plan.changes if c.scaled}
      return fn(_trees.with_leaves(variables, scaled), *args, **kwargs)
    if len(changed) < len(plan.changes):
      raise ValueError(
        f"the plan adds {_paths.listed(c.path for c in plan.changes if c not in changed)} and"
        " changes shapes too: merge the gate of one growth before the next"
      )
    return _run(fn, before, plan, alpha, variables, args, kwargs)

  return forward


def _scaled(change: LeafChange, leaf: Any, alpha: Any) -> Any:
  """A leaf of which α multiplies all, or the entries of new layers."""
  factor = alpha.astype(leaf.dtype)
  if change.positions:
    is_new = np.isin(np.arange(len(leaf)), change.new(0)).reshape(-1, *[1] * (leaf.ndim - 1))
    factor = jnp.where(is_new, factor, jnp.ones((), leaf.dtype))
  return leaf * factor


def _without_gate(variables: Any, plan: Plan) -> tuple[Any, Any]:
  """The gate's value, and the other variables."""
  leaves = _paths.by_path(variables)
  if plan.alpha not in leaves:
    raise ValueError(f"no gate at {_paths.join(plan.alpha)!r}: apply the plan first, or call fn")
  variables = _trees.remove(variables, plan.alpha)
  plan.check(variables, "after")
  return jnp.asarray(leaves[plan.alpha]), variables


def _run(fn: Any, old: Any, plan: Plan, alpha: Any, variables: Any, args: Any, kwargs: Any) -> Any:
  """Runs the forward pass at the new size, beside the program of that at the old one."""
  leaves, changes = _paths.by_path(variables), plan.by_path
  small = {
    path: _trees.smaller(leaves[path], change.before or ()) for path, change in changes.items()
  }
  before = _graph.trace(old, _trees.with_leaves(variables, small), *args, **kwargs)
  try:
    after = _graph.trace(fn, variables, *args, **kwargs)
  except ValueError as error:
    raise _does_not_run(plan, variables, error) from error
  inputs = [
    _values.ordered(leaves[path], changes[path]) if path in changes else _values.Value(leaves[path])
    for path in after.paths
  ]
  inputs += map(_values.Value, after.arrays)
  counts = all(dimension.contractions is not None for dimension, _ in plan.dimensions)
  outputs = Evaluator(alpha, counts).run([before.program, after.program], inputs)
  for x in outputs:
    if x.new is not None:
      raise ValueError(
        f"an output is the integer {x.array} at the old size and {x.new} at the new one:"
        " expected one for both, as there is none between them"
      )
  if any(x.old for x in outputs):
    positions = _output_positions(before, plan)
    return after.rebuild(
      [_values.in_place(x, at) for x, at in zip(outputs, positions, strict=True)]
    )
  return after.rebuild([x.array for x in outputs])


def _does_not_run(plan: Plan, variables: Any, error: Exception) -> ValueError:
  """What may be missing in a description that was never checked against a program."""
  sizes = {c.before[a] for c in plan.changes if c.before for a in c.positions}
  left = [
    f"{_paths.join(path)!r} of shape {shape}"
    for path, shape in _trees.shapes(variables).items()
    if path not in plan.by_path and sizes & set(shape)
  ]
  return ValueError(
    "the network runs at its old size, but not at its new one. A shared dimension may lack a"
    f" member: of the same size as what has grown {', '.join(left) or 'no other leaf'} stayed."
    " Describe all members, or give inputs, so that they are found and checked before anything"
    f" changes; shrinking by plan.inverse() gives back the old network. ({error})"
  )


def _output_positions(traced: _graph.Traced, plan: Plan) -> list[dict[int, np.ndarray]]:
  """For each output and grown axis, where the old entries lie."""
  graphs = []
  for dimension, _ in plan.dimensions:
    graphs.append(_graph.Graph(traced))
    _couple.spread(graphs[-1], dimension, "the plan")
  positions: list[dict[int, np.ndarray]] = []
  for nodes in zip(*(graph.outputs for graph in graphs), strict=True):
    positions.append({})
    for axis in range(len(nodes[0].shape)):
      described = [
        (node.labels[axis], dimension.size, more)
        for node, (dimension, more) in zip(nodes, plan.dimensions, strict=True)
        if axis in node.labels
      ]
      if described:
        labels, units, more = zip(*described, strict=True)
        pairs = zip(extended_together(labels, units, more), units, strict=True)
        positions[-1][axis] = np.flatnonzero(np.all([x < n for x, n in pairs], axis=0))
  return positions


def merge(variables: Any, plan: Plan) -> Any:
  """Folds the gate into the weights of a tree and removes it; see `growth.merge`."""
  _trees.check_concrete("merge", variables)
  gate, variables = _without_gate(variables, plan)
  alpha = float(gate)
  if alpha == 1.0:
    return variables
  if not all(dimension.folds for dimension, _ in plan.dimensions):
    raise ValueError(
      f"the gate at {_paths.join(plan.alpha)!r} is {alpha:g} and multiplies more than weights"
      " (statistics of a norm, a product of two activations, a weight used both ways): expected 1"
    )
  leaves = _paths.by_path(variables)
  folded = {
    c.path: leaves[c.path] * _factor(c, alpha, leaves[c.path])
    for c in plan.changes
    if c.scaled or not c.layers
  }
  return _trees.with_leaves(variables, folded)


def undo(variables: Any, plan: Plan) -> Any:
  """The tree as it was before it grew; see `growth.undo`."""
  if plan.gate and plan.alpha in _paths.by_path(variables):
    variables = _trees.remove(variables, plan.alpha)
  return plan.inverse().apply(variables)


def _factor(change: LeafChange, alpha: float, leaf: Any) -> Any:
  """What the gate multiplies each entry of a leaf by."""
  if change.scaled:
    return _scaled(change, jnp.ones_like(leaf), jnp.asarray(alpha))
  factor = np.ones(leaf.shape)
  through = {axis: axis in change.outgoing or axis in change.taps for axis in change.positions}
  for axis in sorted(through, key=through.__getitem__, reverse=True):
    # What goes to new entries is not gated, wherever it comes from.
    np.moveaxis(factor, axis, 0)[change.new(axis)] = alpha if through[axis] else 1.0
  return jnp.asarray(factor, leaf.dtype)
