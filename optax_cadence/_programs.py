"""The inner optimizer of a group as a jaxpr, in which the entries of a mask are a vector.

From it follows whether the optimizer treats the entries of a tensor one by one, and what of its
state belongs to them. What is made of that is in `_shared` and `_split`.
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
    _elementwise.trace(
      update, trees[0], jax.tree.unflatten(jax.tree.structure(made), state), trees[1]
    ),
    group,
    {path: n + i for i, (path, _) in enumerate(flat)},
    None if params is None else n + len(flat),
  )


def trace_init(
  inner: Any, layout: _layout.Layout, group: _layout.Group, leaves: Mapping[int, Any]
) -> Any:
  """The jaxpr of `init` for a group's tensors."""
  return _elementwise.trace(inner.init, layout.tree(group, _tensors(group, leaves)))


def _tensors(group: _layout.Group, leaves: Mapping[int, Any]) -> list[Any]:
  return [
    vector(t.cut, leaves[t.leaf])
    if isinstance(t.cut, _regions.Entries)
    else jax.eval_shape(t.cut.take, leaves[t.leaf])
    for t in group.tensors
  ]


def moments(inner: Any, layout: _layout.Layout, leaf: int, entries: Any) -> dict[Any, int]:
  """Where the state keeps an array for the entries of a tensor, and at which place of its leaves.

  Raises:
    NotElementwiseError: If they do not start out entry by entry.
  """
  tree = layout.only(leaf, entries)
  jaxpr = _elementwise.trace(inner.init, tree)
  flat = jax.tree_util.tree_flatten_with_path(jax.eval_shape(inner.init, tree))[0]
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


def run(
  programs: Sequence[Program],
  leaf: int,
  moments: Mapping[Any, jax.Array],
  states: Sequence[Sequence[jax.Array]],
  grad: jax.Array,
  params: jax.Array | None,
  look_up: _elementwise.LookUp,
) -> list[jax.Array]:
  """Runs the updates of several groups at once, on a leaf that has entries of each.

  Args:
    programs: The updates.
    leaf: Which leaf it is.
    moments: Its moments, by where a state keeps them.
    states: All arrays of each group's state; tensors of another shape than they have in the program
      are not read.
    grad: Gradient of the leaf.
    params: Parameter.
    look_up: As in `_elementwise.run`.

  Returns:
    The update of the leaf, and its new moments.

  Raises:
    NotElementwiseError: If entries are not updated one by one.
  """
  inputs = _lanes(programs, states)
  inputs.append((tuple(p.tensor(leaf) for p in programs), grad))
  if params is not None:
    inputs.append((tuple(p.param(leaf) for p in programs), params))
  inputs += [(tuple(p.state[path] for p in programs), x) for path, x in moments.items()]
  wanted = list(zip(*(p.results(leaf, moments) for p in programs), strict=True))
  found = _elementwise.run([p.jaxpr for p in programs], inputs, wanted, look_up)
  return [_elementwise.array(x, look_up) for x in found]


def _lanes(
  programs: Sequence[Program], states: Sequence[Sequence[jax.Array]]
) -> list[tuple[_elementwise.At, _elementwise.Value]]:
  """What the states of all groups hold, each for itself."""
  found: list[dict[Any, tuple[int, jax.Array]]] = []
  for program, state in zip(programs, states, strict=True):
    avals, arrays = program.jaxpr.in_avals, zip(program.state.items(), state, strict=True)
    found.append({path: (i, x) for (path, i), x in arrays if x.shape == avals[i].shape})
  lanes: list[tuple[_elementwise.At, _elementwise.Value]] = []
  for path in found[0]:
    if all(path in held for held in found):
      at, values = zip(*(held[path] for held in found), strict=True)
      lanes.append((at, _elementwise.Lanes(values)))
  return lanes


def prove(programs: Sequence[Program], leaf: int, moments: Mapping[int, Mapping[Any, int]]) -> None:
  """Proves that no entry of a leaf goes into another, nor into another tensor.

  Args:
    programs: The updates of its groups.
    leaf: The leaf.
    moments: Where a state keeps arrays for the entries of each leaf that it may be proved of.

  Raises:
    NotElementwiseError: If it cannot be proved.
  """
  for program in programs:
    prove_alone(program, leaf, moments)

  def together(x: jax.Array) -> None:
    avals = [[p.jaxpr.in_avals[i] for i in p.state.values()] for p in programs]
    states = [[jnp.zeros(y.shape, y.dtype) for y in group] for group in avals]
    arrays = dict.fromkeys(moments[leaf], x)
    run(programs, leaf, arrays, states, x, None if programs[0].params is None else x, _spread(x))

  jax.eval_shape(together, programs[0].jaxpr.in_avals[programs[0].tensor(leaf)])


def prove_alone(program: Program, leaf: int, moments: Mapping[int, Mapping[Any, int]]) -> None:
  """The same of one group."""
  avals, n_results = program.jaxpr.in_avals, len(program.jaxpr.out_avals)
  if n_results != len(program.group.tensors) + len(program.state):
    raise _elementwise.NotElementwiseError("a state that changes its structure")
  own = program.results(leaf, moments[leaf])
  mine = {*own, *([] if program.params is None else [program.param(leaf)])}
  numbers = set(program.state.values()) - {
    program.state.get(path) for paths in moments.values() for path in paths
  }

  def value(i: int, x: jax.Array) -> _elementwise.Value:
    if i in numbers:
      return _elementwise.Lanes((jnp.zeros(avals[i].shape, avals[i].dtype),))
    return jnp.zeros_like(x, avals[i].dtype) if i in mine else _elementwise.Elsewhere()

  def alone(x: jax.Array) -> None:
    inputs = [((i,), value(i, x)) for i in range(len(avals))]
    wanted = [(i,) for i in range(n_results)]
    found = _elementwise.run([program.jaxpr], inputs, wanted, _spread(x))
    for i, result in enumerate(found):
      if i in own and program.jaxpr.out_avals[i].shape != x.shape:
        raise _elementwise.NotElementwiseError("a result of another shape")
      if i in own or isinstance(result, _elementwise.Coupled):
        _elementwise.array(result, _spread(x))
      elif isinstance(result, jax.Array):
        raise _elementwise.NotElementwiseError("a result that goes into another tensor")

  jax.eval_shape(alone, avals[own[0]])


def _spread(x: jax.Array) -> _elementwise.LookUp:
  return lambda values: jnp.full_like(x, values[0], dtype=values[0].dtype)
