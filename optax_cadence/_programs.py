"""The inner optimizer of a group as a jaxpr, in which the entries of a mask are a vector.

From it follows whether the optimizer treats these entries one by one, and what of its state
belongs to them. How they are then updated is in `_shared`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _elementwise
from optax_cadence import _layout
from optax_cadence import _regions


class Program(NamedTuple):
  """An update of the inner optimizer.

  Attributes:
    jaxpr: A function of gradients, state and parameters, that gives updates and new state.
    group: The group that it updates.
    state: Position of every array of the state, among arguments as among results.
    params: Position of the first parameter among the arguments; None where there are none.
  """

  jaxpr: Any
  group: _layout.Group
  state: dict[Any, int]
  params: int | None

  def tensor(self, leaf: int) -> int:
    """Position of the gradient and the update of a leaf that the group has one tensor of."""
    return [t.leaf for t in self.group.tensors].index(leaf)

  def param(self, leaf: int) -> int:
    """Position of its parameter."""
    assert self.params is not None
    return self.params + self.tensor(leaf)

  def results(self, leaf: int, moments: Iterable[Any]) -> list[int]:
    """Positions of the update and of the new moments of a leaf."""
    return [self.tensor(leaf), *(self.state[path] for path in moments)]


def vector(cut: _regions.Entries, leaf: Any) -> jax.ShapeDtypeStruct:
  """Shape and dtype of the entries of a group."""
  return jax.ShapeDtypeStruct((cut.indices.size,), leaf.dtype)


def trace(
  inner: optax.GradientTransformationExtraArgs,
  layout: _layout.Layout,
  group: _layout.Group,
  grads: Mapping[int, Any],
  params: Mapping[int, Any] | None,
  dtypes: Sequence[Any] | None = None,
  extra_args: Mapping[str, Any] | None = None,
) -> Program:
  """Traces an update.

  Args:
    inner: The inner optimizer.
    layout: Groups of the tree.
    group: The group.
    grads: Shapes and dtypes of the gradients of all leaves.
    params: The same of the parameters, if there are any.
    dtypes: Dtypes of the arrays of the group's state; by default as `init` makes them.
    extra_args: Extra arguments for the inner optimizer.

  Returns:
    The program.
  """
  trees = [None if x is None else layout.tree(group, _tensors(group, x)) for x in (grads, params)]
  made = jax.eval_shape(inner.init, trees[0] if params is None else trees[1])
  flat = jax.tree_util.tree_flatten_with_path(made)[0]
  found = [x.dtype for _, x in flat] if dtypes is None else dtypes
  state = [jax.ShapeDtypeStruct(x.shape, d) for (_, x), d in zip(flat, found, strict=True)]

  def update(grads: Any, state: Any, params: Any) -> Any:
    return inner.update(grads, state, params, **extra_args or {})

  n = len(group.tensors)
  return Program(
    jax.make_jaxpr(update)(trees[0], jax.tree.unflatten(jax.tree.structure(made), state), trees[1]),
    group,
    {path: n + i for i, (path, _) in enumerate(flat)},
    None if params is None else n + len(flat),
  )


def _tensors(group: _layout.Group, leaves: Mapping[int, Any]) -> list[Any]:
  return [
    vector(t.cut, leaves[t.leaf])
    if isinstance(t.cut, _regions.Entries)
    else jax.eval_shape(t.cut.take, leaves[t.leaf])
    for t in group.tensors
  ]


def moments(inner: Any, layout: _layout.Layout, leaf: int, entries: Any) -> dict[Any, int]:
  """Where the state keeps an array for the entries of a leaf, and at which place of its leaves.

  Raises:
    NotElementwiseError: If they do not start out entry by entry.
  """
  jaxpr, made = jax.make_jaxpr(inner.init, return_shape=True)(layout.only(leaf, entries))
  flat = jax.tree_util.tree_flatten_with_path(made)[0]
  found: dict[Any, int] = {}

  def prove(x: jax.Array) -> None:
    values = _elementwise.run([jaxpr], [((0,), x)], [(i,) for i in range(len(flat))], _spread(x))
    for i, ((path, y), value) in enumerate(zip(flat, values, strict=True)):
      if isinstance(value, _elementwise.Coupled):
        raise _elementwise.NotElementwiseError(value.by)
      if not isinstance(value, _elementwise.Lanes) or (value.spread and y.shape == entries.shape):
        found[path] = i

  jax.eval_shape(prove, entries)
  return found


def prove(program: Program, leaf: int, moments: Mapping[int, Mapping[Any, int]]) -> None:
  """Proves that no entry of a leaf goes into another, nor into another tensor.

  Args:
    program: An update of a group.
    leaf: The leaf.
    moments: Where the state keeps arrays for the entries of each leaf under a mask.

  Raises:
    NotElementwiseError: If it cannot be proved.
  """
  avals = program.jaxpr.in_avals
  own = program.results(leaf, moments[leaf])
  others = {program.state.get(path) for i, paths in moments.items() if i != leaf for path in paths}
  others |= set(range(len(program.group.tensors)))
  mine = {*own, None if program.params is None else program.params + own[0]}
  n_results = len(program.jaxpr.out_avals)
  if n_results != len(program.group.tensors) + len(program.state):
    raise _elementwise.NotElementwiseError("a state that changes its structure")

  def value(i: int, x: jax.Array) -> _elementwise.Value:
    if i in mine:
      return jnp.zeros_like(x, avals[i].dtype)
    in_params = program.params is not None and i >= program.params
    if i in others or in_params:
      return _elementwise.Elsewhere()
    return _elementwise.Lanes((jnp.zeros(avals[i].shape, avals[i].dtype),))

  def run(x: jax.Array) -> None:
    inputs = [((i,), value(i, x)) for i in range(len(avals))]
    results = [(i,) for i in range(n_results)]
    found = _elementwise.run([program.jaxpr], inputs, results, _spread(x))
    for i, result in enumerate(found):
      _check(result, i in own, program.jaxpr.out_avals[i].shape == avals[own[0]].shape)

  jax.eval_shape(run, avals[own[0]])


def _check(result: _elementwise.Value, own: bool, fits: bool) -> None:
  """Raises unless a result of the entries is of them alone, and any other has none of them."""
  if isinstance(result, _elementwise.Coupled):
    raise _elementwise.NotElementwiseError(result.by)
  if own and not fits:
    raise _elementwise.NotElementwiseError("a result of another shape")
  if isinstance(result, _elementwise.Elsewhere if own else jax.Array):
    raise _elementwise.NotElementwiseError("a result of several tensors")


def _spread(x: jax.Array) -> _elementwise.LookUp:
  return lambda values: jnp.full_like(x, values[0], dtype=values[0].dtype)
