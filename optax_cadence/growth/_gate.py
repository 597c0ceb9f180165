"""The gate: the forward pass of a grown network, with α on all that goes out of new entries."""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths
from optax_cadence.growth import _program
from optax_cadence.growth import _trees
from optax_cadence.growth._dimension import extended
from optax_cadence.growth._evaluate import Evaluator
from optax_cadence.growth._plan import LeafChange
from optax_cadence.growth._plan import Plan
from optax_cadence.growth._split import joined
from optax_cadence.growth._split import split
from optax_cadence.growth._split import whole
from optax_cadence.growth._spread import spread


def gated(
  fn: Callable[..., Any], plan: Plan, *, old: Callable[..., Any] | None = None
) -> Callable[..., Any]:
  r"""The forward pass of a network that has grown, with the gate in its variables.

  What goes from new entries to old ones is multiplied by :math:`\alpha`, and nothing else:
  in a product or convolution that sums over an axis with new units, the terms of the new
  units; in a larger kernel the new taps; in a norm over a widened axis (LayerNorm) the new
  units' part in the statistics, so that the mean is
  :math:`(\sum_{old} x + \alpha \sum_{new} x) / (n_{old} + \alpha n_{new})`. At
  :math:`\alpha = 0` the operations on old entries are those of the network as it was; at
  :math:`\alpha = 1` the result is that of `fn`.

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
  if not plan.grows:
    raise ValueError("expected a plan that grows: one that shrinks leaves no gate")
  before = fn if old is None else old

  @functools.wraps(fn)
  def forward(variables: Any, *args: Any, **kwargs: Any) -> Any:
    alpha = _alpha(variables, plan)
    variables = _trees.remove(variables, plan.alpha)
    plan.check(variables, "after")
    changed = [c for c in plan.changes if c.positions]
    if not changed:
      return fn(_scaled(variables, plan, alpha), *args, **kwargs)
    if len(changed) < len(plan.changes):
      raise ValueError(
        f"the plan adds {_paths.listed(c.path for c in plan.changes if not c.positions)} and"
        " changes shapes too: merge the gate of one growth before the next"
      )
    return _run(fn, before, plan, alpha, variables, args, kwargs)

  return forward


def _alpha(variables: Any, plan: Plan) -> Any:
  found = _trees.leaves(variables)
  if plan.alpha not in found:
    raise ValueError(f"no gate at {_paths.join(plan.alpha)!r}: apply the plan first, or call fn")
  return jnp.asarray(found[plan.alpha])


def _scaled(variables: Any, plan: Plan, alpha: Any) -> Any:
  leaves = _trees.leaves(variables)
  new = {
    c.path: leaves[c.path] * alpha.astype(leaves[c.path].dtype) for c in plan.changes if c.scaled
  }
  return _trees.with_leaves(variables, new)


def _run(fn: Any, old: Any, plan: Plan, alpha: Any, variables: Any, args: Any, kwargs: Any) -> Any:
  changes = plan.by_path
  small = _trees.with_leaves(
    variables,
    {
      path: jax.ShapeDtypeStruct(changes[path].before or (), jnp.asarray(leaf).dtype)
      for path, leaf in _trees.leaves(variables).items()
      if path in changes
    },
  )
  before, paths, _ = _program.trace(old, small, *args, **kwargs)
  try:
    after, _, rebuild = _program.trace(fn, variables, *args, **kwargs)
  except (TypeError, ValueError) as error:
    raise _does_not_run(plan, variables, error) from error
  leaves = _trees.leaves(variables)
  inputs = [split(leaves[p], changes[p]) if p in changes else whole(leaves[p]) for p in paths]
  inputs += [whole(x) for x in _trees.partition_arrays((args, kwargs))[0]]
  outputs = Evaluator(alpha).run(before, after, inputs)
  if any(x.axes for x in outputs):
    positions = _output_positions(before, paths, plan)
    outputs = [
      whole(joined(x, at)) if x.axes else x for x, at in zip(outputs, positions, strict=True)
    ]
  return rebuild([x.blocks[()] for x in outputs])


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


def _output_positions(program: Any, paths: Any, plan: Plan) -> list[dict[int, np.ndarray]]:
  """For each output and grown axis, where the old entries lie."""
  found: list[dict[int, np.ndarray]] = []
  for dimension, more in plan.dimensions:
    graph = _program.flattened(program, paths)
    for member in dimension.members:
      graph.leaves[member.path].put(member.axis, member.labels, "the plan")
    spread(graph)
    found = found or [{} for _ in graph.outputs]
    for positions, node in zip(found, graph.outputs, strict=True):
      for axis, labels in node.labels.items():
        positions[axis] = np.flatnonzero(extended(labels, dimension.size, more) < dimension.size)
  return found


def merge(variables: Any, plan: Plan | None = None, *, optimizer: Any = None) -> Any:
  """Folds the gate into the weights and removes it: what is left is the plain tree, or model.

  Args:
    variables: The grown tree, gate included; or a live NNX model, changed in place.
    plan: The plan by which the tree has grown. A live model knows its own.
    optimizer: The live model's optimizer, from whose state the gate goes.

  Returns:
    The tree at its new size; None for a live model. At α = 1 nothing but the gate changes. At
    any other value the outgoing weights of new units are multiplied by it.

  Raises:
    ValueError: If α is not 1 and cannot be folded into weights: because something else than
      a product with a weight sums over the new units (the statistics of a norm, queries
      with keys), or one weight is used both ways (a tied embedding).
  """
  flax = sys.modules.get("flax.nnx")
  if flax is not None and isinstance(variables, flax.Module):
    importlib.import_module("optax_cadence.growth.nnx").merge(variables, optimizer=optimizer)
    return None
  if plan is None:
    raise ValueError("expected the plan by which the tree has grown: growth.merge(variables, plan)")
  _trees.check_concrete("merge", variables)
  alpha = float(_alpha(variables, plan))
  variables = _trees.remove(variables, plan.alpha)
  plan.check(variables, "after")
  if alpha == 1.0:
    return variables
  if not all(dimension.folds for dimension, _ in plan.dimensions):
    raise ValueError(
      f"the gate at {_paths.join(plan.alpha)!r} is {alpha:g} and multiplies more than weights"
      " (statistics of a norm, a product of two activations, a weight used both ways): expected 1"
    )
  leaves = _trees.leaves(variables)
  folded = {c.path: leaves[c.path] * _factor(c, alpha, leaves[c.path]) for c in plan.changes}
  return _trees.with_leaves(variables, folded)


def _factor(change: LeafChange, alpha: float, leaf: Any) -> Any:
  """What the gate multiplies each entry of a leaf by."""
  if change.scaled:
    return jnp.asarray(alpha, leaf.dtype)
  factor = np.ones(leaf.shape)
  through = {axis: axis in change.outgoing or axis in change.taps for axis in change.positions}
  for axis in sorted(through, key=through.__getitem__, reverse=True):
    # What goes to new entries is not gated, wherever it comes from.
    np.moveaxis(factor, axis, 0)[change.new(axis)] = alpha if through[axis] else 1.0
  return jnp.asarray(factor, leaf.dtype)
