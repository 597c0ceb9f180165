"""Whether an optimizer treats the entries of a tensor one by one, read off its traced program.

The answer is None, or the reason why not. The program is that of one update of a group, which sees
a leaf under a mask whole; it also says what of the optimizer's state belongs to its entries.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cadence import _inner
from optax_cadence.entrywise import lanes
from optax_cadence.programs import reading
from optax_cadence.regions.layout import Group
from optax_cadence.regions.layout import Layout

# What an optimizer may raise that wants other arguments than gradients, state and parameters.
REFUSALS = (TypeError, ValueError, KeyError, AttributeError, AssertionError, NotImplementedError)


class Program(NamedTuple):
  """An update of the inner optimizer.

  Attributes:
    program: Takes gradients, state and parameters, gives updates and the new state.
    leaves: The leaf of each gradient, in order.
    state: Position of every array of the state, among arguments as among results, by key path.
    params: Position of the first parameter among the arguments; None where there are none.
  """

  program: Any
  leaves: tuple[int, ...]
  state: dict[Any, int]
  params: int | None

  def tensor(self, leaf: int) -> int:
    """Position of the gradient and the update of a leaf that the group has one tensor of."""
    return self.leaves.index(leaf)

  def own(self, leaf: int, moments: Iterable[Any]) -> list[int]:
    """Positions of the update and of the moments of a leaf, among results as among arguments."""
    return [self.tensor(leaf), *(self.state[path] for path in moments)]

  def param(self, leaf: int) -> list[int]:
    """Position of its parameter; none where there are none."""
    return [] if self.params is None else [self.params + self.tensor(leaf)]


def shapes_of(group: Group, layout: Layout, dtypes: Sequence[Any]) -> dict[int, list[Any]]:
  """Shape and dtype of the tensors that a group has of each leaf; one under a mask is whole."""
  leaves: Any = {i: jax.ShapeDtypeStruct(layout.shapes[i], dtypes[i]) for i in group.leaves}
  found: dict[int, list[Any]] = {t.leaf: [leaves[t.leaf]] for t in group.masked}
  for t, x in zip(group.tensors, group.take(leaves), strict=True):
    found.setdefault(t.leaf, []).append(x)
  return found


def trace(
  inner: optax.GradientTransformationExtraArgs,
  layout: Layout,
  group: Group,
  dtypes: Sequence[Any],
  extra_args: Mapping[str, Any] | None = None,
  with_params: bool = True,
) -> Program:
  """Traces an update of a group, from a state as `init` makes it.

  The dtypes are those in which the optimizer gets gradients and parameters of all leaves.
  """
  tensors = shapes_of(group, layout, dtypes)
  grads = layout.tree_of(tensors)
  params = grads if with_params else None
  flat, structure = jax.tree_util.tree_flatten_with_path(jax.eval_shape(inner.init, grads))
  avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in flat]

  def update(grads: Any, state: Any, params: Any) -> Any:
    return inner.update(grads, state, params, **extra_args or {})

  leaves = tuple(leaf for leaf, parts in sorted(tensors.items()) for _ in parts)
  return Program(
    reading.traced(update, grads, jax.tree.unflatten(structure, avals), params),
    leaves,
    {path: len(leaves) + i for i, (path, _) in enumerate(flat)},
    None if params is None else len(leaves) + len(flat),
  )


def moments(inner: Any, layout: Layout, leaf: int, entries: Any) -> dict[Any, int] | str:
  """Where the state keeps an array for the entries of a leaf, of this shape and dtype.

  Returns:
    For the key path of each such array its place among the leaves of the state; or the reason why
    they do not start out entry by entry.
  """
  tree = layout.tree_of({leaf: [entries]})
  program = reading.traced(inner.init, tree)
  flat = jax.tree_util.tree_flatten_with_path(jax.eval_shape(inner.init, tree))[0]

  def look(x: jax.Array) -> dict[Any, int] | str:
    found: dict[Any, int] = {}
    values = lanes.run([program], [x], _spread(x))
    for i, ((path, y), value) in enumerate(zip(flat, values, strict=True)):
      if isinstance(value, lanes.Coupled):
        return value.by
      if not isinstance(value, lanes.Lanes) or (value.spread and y.shape == entries.shape):
        found[path] = i
    return found

  return _of_traced(look, entries)


def coupled_in(program: Program, leaf: int, moments: Mapping[int, Mapping[Any, int]]) -> str | None:
  """Why the entries of a leaf are not treated one by one in the update of one group.

  In the way is an entry that goes into another, or into another tensor. The state keeps its arrays
  for the entries of each leaf that is asked about in `moments`.
  """
  arguments, results = program.program.in_avals, program.program.out_avals
  if len(results) != len(program.leaves) + len(program.state):
    return "a state that changes its structure"
  own = program.own(leaf, moments[leaf])
  entries = {*own, *program.param(leaf)}
  held = {program.state.get(path) for paths in moments.values() for path in paths}
  numbers = set(program.state.values()) - held

  def look(x: jax.Array) -> str | None:
    inputs: list[lanes.Value] = []
    for i, aval in enumerate(arguments):
      if i in numbers:
        inputs.append(lanes.Lanes((jnp.zeros(aval.shape, aval.dtype),)))
      else:
        inputs.append(jnp.zeros_like(x, aval.dtype) if i in entries else lanes.Elsewhere())
    for i, result in enumerate(lanes.run([program.program], inputs, _spread(x))):
      value = lanes.as_array(result, _spread(x)) if i in own else result
      if isinstance(value, lanes.Coupled):
        return value.by
      if i in own and results[i].shape != x.shape:
        return "a result of another shape"
      if i not in own and isinstance(result, jax.Array):
        return "a result that goes into another tensor"
    return None

  return _of_traced(look, arguments[own[0]])


def coupled(
  programs: Sequence[Program], leaf: int, moments: Mapping[int, Mapping[Any, int]]
) -> str | None:
  """Why the entries of a leaf are not treated one by one in the updates of its groups, run as one.

  Arguments and result are as in `coupled_in`; there is a program for each group.
  """
  for program in programs:
    reason = coupled_in(program, leaf, moments)
    if reason is not None:
      return reason

  def look(x: jax.Array) -> str | None:
    states = []
    for program in programs:
      avals = program.program.in_avals
      states.append(
        {p: jnp.zeros(avals[i].shape, avals[i].dtype) for p, i in program.state.items()}
      )
    params = None if programs[0].params is None else x
    result = run(programs, leaf, dict.fromkeys(moments[leaf], x), states, x, params, _spread(x))
    return result if isinstance(result, str) else None

  return _of_traced(look, programs[0].program.in_avals[programs[0].tensor(leaf)])


def run(
  programs: Sequence[Program],
  leaf: int,
  moments: Mapping[Any, jax.Array],
  states: Sequence[Mapping[Any, jax.Array]],
  grad: jax.Array,
  param: jax.Array | None,
  look_up: lanes.LookUp,
) -> list[jax.Array] | str:
  """Runs the updates of several groups at once, on a leaf that has entries of each.

  Args:
    programs: The updates.
    leaf: Which leaf it is.
    moments: Its moments, by where a state keeps them.
    states: The arrays of each group's state, by where it keeps them.
    grad: Gradient of the leaf.
    param: The parameter, where there are any.
    look_up: As in `lanes.run`.

  Returns:
    The update of the leaf, and its new moments; or why its entries are not updated one by one.
  """
  # What another group has not, or in another shape, belongs to other tensors.
  numbers = []
  for path in programs[0].state:
    shapes = {np.shape(state[path]) if path in state else None for state in states}
    if path not in moments and len(shapes) == 1 and None not in shapes:
      numbers.append(path)
  first, own = programs[0], programs[0].own(leaf, moments)
  avals = first.program.in_avals
  inputs: list[lanes.Value] = []
  for path in numbers:
    values = (_inner.as_dtype(state[path], avals[first.state[path]]) for state in states)
    inputs.append(lanes.Lanes(tuple(values)))
  arrays = [grad, *moments.values(), *([] if param is None else [param])]
  for x, i in zip(arrays, [*own, *first.param(leaf)], strict=True):
    inputs.append(_inner.as_dtype(x, avals[i]))
  parts = []
  for program in programs:
    own = program.own(leaf, moments)
    arguments = [*(program.state[path] for path in numbers), *own, *program.param(leaf)]
    parts.append(reading.part(program.program, arguments, own))
  try:
    results = lanes.run(parts, inputs, look_up)
  except reading.DifferentProgramsError:
    return "an operation that differs from group to group"
  entries = []
  for result in results:
    array = lanes.as_array(result, look_up)
    if isinstance(array, lanes.Coupled):
      return array.by
    entries.append(array)
  return entries


def alike(program: Any, other: Any) -> bool:
  """Whether two programs are the same but for the shapes of arrays."""
  pairs = dict(zip(program.jaxpr.invars, other.jaxpr.invars, strict=True))
  consts = zip(
    program.jaxpr.constvars, other.jaxpr.constvars, program.consts, other.consts, strict=False
  )
  pairs |= {v: w for v, w, x, y in consts if x is y}

  def match(a: Any, b: Any) -> bool:
    if reading.is_literal(a) and reading.is_literal(b):
      return _equal(reading.literal(a), reading.literal(b))
    return not reading.is_literal(a) and pairs.get(a) is b

  def params(eqn: Any) -> dict[str, Any]:
    shape = ("shape", "broadcast_dimensions") if eqn.primitive.name == "broadcast_in_dim" else ()
    return {name: x for name, x in eqn.params.items() if name not in shape}

  try:
    reading.check_same_operations([program.jaxpr, other.jaxpr])
  except reading.DifferentProgramsError:
    return False
  for e, f in zip(program.jaxpr.eqns, other.jaxpr.eqns, strict=True):
    if params(e) != params(f) or not all(map(match, e.invars, f.invars)):
      return False
    pairs |= zip(e.outvars, f.outvars, strict=True)
  return all(map(match, program.jaxpr.outvars, other.jaxpr.outvars))


def _equal(x: Any, y: Any) -> bool:
  return bool(x.dtype == y.dtype and (x == y).all())


def _of_traced(look: Callable[[jax.Array], Any], x: Any) -> Any:
  """What a function finds out by operations on an array of this kind, none of which is run."""
  found = []
  jax.eval_shape(lambda x: found.append(look(x)), x)
  return found[0]


def _spread(x: jax.Array) -> lanes.LookUp:
  return lambda values: jnp.full_like(x, values[0], dtype=values[0].dtype)
