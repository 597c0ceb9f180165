"""What `nnx` and `linen` share: the steps from a network to grown variables and their plan.

An edge says what its network is (`Network`), and puts the result back where it belongs: into the
live model, or beside a forward pass that goes through the gate. Arguments that are not described
here are those of the edges' functions of the same name.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths
from optax_cadence.growth import _couple
from optax_cadence.growth import _dimension
from optax_cadence.growth import _gate
from optax_cadence.growth import _graph
from optax_cadence.growth import _heads
from optax_cadence.growth import _planners
from optax_cadence.growth import _trees
from optax_cadence.growth._dimension import Axis
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._plan import float_dtype
from optax_cadence.growth._plan import Plan


class Network(NamedTuple):
  """A network as a function of its variables.

  Attributes:
    forward: `forward(variables, *inputs, **settings)`.
    variables: Nested mapping of arrays.
    inputs: What the network is called with, arrays or `jax.ShapeDtypeStruct`s; empty if that is
      not known.
    settings: Further arguments of the forward pass.
    alpha: Path of the gate.
    init: A function that gives fresh values for new entries, as for `Plan.apply`.
    notes: A function `notes(plan)` that says what `init` has to make up for it.
    defined: A function that gives the variables at the new size, as far as shapes go; None where
      they are not known beforehand.
    output: Where the network's output stands in what `forward` returns.
  """

  forward: Callable[..., Any]
  variables: Any
  inputs: Sequence[Any] = ()
  settings: Mapping[str, Any] = {}
  alpha: str = "alpha"
  init: Callable[[], Any] = dict
  notes: Callable[[Plan], tuple[str, ...]] = lambda plan: ()
  defined: Callable[[], Any] | None = None
  output: _paths.Path = ()

  def kernels(self, layers: str) -> list[str]:
    """The paths of the kernels, or embeddings, of all layers that a path or glob names."""
    return [
      _paths.join(_trees.kernel(self.variables, layer))
      for layer in _trees.layers(self.variables, layers)
    ]

  def flops(self) -> int:
    """FLOPs of a forward pass."""
    return _graph.flops(self.forward, self.variables, *self.inputs, **self.settings)


class Grown(NamedTuple):
  """A network's variables after a growth, the gate among them, and the plan."""

  variables: Any
  plan: Plan


def couple(network: Network, producer: str | Sequence[str] | Dimension, **kwargs: Any) -> Dimension:
  """As `growth.couple`, whose further arguments `kwargs` are; several producers are one dimension.

  A producer is the path of a layer, or of a leaf, or a glob for several.
  """
  if not isinstance(producer, Dimension):
    names = [producer] if isinstance(producer, str) else producer
    producer = [kernel for name in names for kernel in network.kernels(name)]
  settings = {**network.settings, **kwargs}
  units = _couple.couple(
    network.forward, network.variables, *network.inputs, producer=producer, **settings
  )
  n = len(network.output)
  outputs = (o._replace(path=o.path[n:]) for o in units.outputs if o.path[:n] == network.output)
  return dataclasses.replace(units, outputs=tuple(outputs))


def widen(
  network: Network,
  producer: str | Sequence[str] | Dimension | None,
  by: int | Sequence[int] | None,
  *,
  axis: int = -1,
  unit: int = 1,
  blocks: int = 1,
  fresh: Any = None,
  alpha: float = 0.0,
) -> Grown:
  """More units.

  A producer is the path of a layer, or of a leaf, or a glob for several; or a `Dimension`, which is
  checked if there are inputs. Without any, whatever is larger where the network is defined at its
  new size becomes larger.
  """
  if isinstance(producer, Dimension):
    units: dict[Dimension, Any] = {couple(network, producer) if network.inputs else producer: by}
  elif producer is None and network.defined is not None:
    units = _of_definition(network, network.defined())
  elif network.inputs and producer is not None:
    units = _of_producers(network, producer, by, axis=axis, unit=unit, blocks=blocks)
  else:
    raise ValueError("widen needs inputs, to find what reads the units, or consumers=[...]")
  plan = _planners.widening(network.variables, units, alpha=network.alpha)
  return grow(network, plan, fresh, alpha)


def _of_definition(network: Network, defined: Any) -> dict[Dimension, Any]:
  """The dimensions along which a definition of the network is larger, and by how much each."""
  expected = _trees.shapes(defined)
  left = {
    (path, axis): (n, m)
    for path, shape in _trees.shapes(network.variables).items()
    if len(expected.get(path, ())) == len(shape)
    for axis, (n, m) in enumerate(zip(shape, expected[path], strict=True))
    if n != m
  }
  if not left:
    raise ValueError("expected a new module that is larger than the old one, found the same shapes")
  found: dict[Dimension, Any] = {}
  while left:
    # A longer axis may hold the units of a shorter one several times.
    path, axis = min(left, key=lambda place: left[place][0])
    before, after = left[path, axis]
    name = f"{_paths.join(path)!r} grows along axis {axis} from {before} to {after}"
    if after < before:
      raise ValueError(f"{name}: expected the new module to be larger")
    try:
      units = couple(network, [_paths.join(path)], axis=axis)
    except ValueError as error:
      raise ValueError(
        f"{name} in the new module, but what units these are cannot be derived: name their"
        f" producer, and unit= or blocks= if need be. ({error})"
      ) from error
    found[units] = after - before
    for member in units.members:
      left.pop((member.path, member.axis), None)
  return found


def _of_producers(
  network: Network, producer: str | Sequence[str], by: Any, *, axis: int, unit: int, blocks: int
) -> dict[Dimension, Any]:
  """The dimensions of some producers, each with its number of new units.

  Those of as many units that get as many new ones are one dimension, whether the program ties
  them or not: it is followed through the program once.
  """
  names = [producer] if isinstance(producer, str) else list(producer)
  numbers = list(by) if isinstance(by, Sequence) else [by] * len(names)
  if len(numbers) != len(names) or not names:
    raise ValueError(
      f"by: expected a number of new units, or one for each of {len(names)} producers, found {by}"
    )
  alike: dict[tuple[int, Any], dict[str, Any]] = {}
  for name, more in zip(names, numbers, strict=True):
    for kernel in network.kernels(name):
      units = _dimension.dimension(network.variables, {kernel: Axis(axis, blocks, unit)})
      alike.setdefault((units.size, more), {})[kernel] = units.members[0]
  found: dict[Dimension, Any] = {}
  known: dict[tuple[_paths.Path, int], Any] = {}  # the number of each axis in those
  for (_, more), members in alike.items():
    new = []
    for kernel, member in members.items():
      other = known.get((member.path, member.axis))
      if other is None:
        new.append(kernel)
      elif other != more:
        raise ValueError(
          f"producer {kernel!r} has units of a dimension that gets {other} new ones, and would get"
          f" {more}: expected one number"
        )
    if new:
      units = couple(network, new, axis=axis, unit=unit, blocks=blocks)
      if units.outputs:  # then one of them may be read by nothing
        for kernel in new:
          couple(network, [kernel], axis=axis, unit=unit, blocks=blocks)
      found[units] = more
      known.update(((member.path, member.axis), more) for member in units.members)
  return found


def enlarge(
  network: Network,
  conv: _paths.Path,
  kernel_size: Sequence[int],
  *,
  causal: bool = False,
  fresh: Any = None,
  alpha: float = 0.0,
) -> Grown:
  """A larger kernel; `conv` is its path, or that of its layer."""
  plan = _planners.enlarging(
    network.variables,
    {_paths.join(_trees.kernel(network.variables, conv)): kernel_size},
    causal=causal,
    alpha=network.alpha,
    fn=functools.partial(network.forward, **network.settings) if network.inputs else None,
    args=network.inputs,
  )
  return grow(network, plan, fresh, alpha)


def deepen(
  network: Network,
  deeper: Network,
  *,
  outgoing: Iterable[str] = (),
  moved: Mapping[str, str] | None = None,
  alpha: float = 0.0,
) -> Grown:
  """More layers; the variables of `deeper` have fresh values for them.

  `outgoing` are paths of new layers, or leaves, `moved` is as for `growth.deepening`.
  """
  flops = (network.flops(), deeper.flops()) if network.inputs else None
  plan = _planners.deepening(
    network.variables,
    deeper.variables,
    outgoing=outgoing,
    moved=moved,
    alpha=network.alpha,
    flops=flops,
  )
  return grow(network, plan, deeper.variables, alpha)


def grow(network: Network, plan: Plan, fresh: Any = None, alpha: float = 0.0) -> Grown:
  """Applies a plan; by default new entries come from `network.init`."""
  made = None
  if fresh is None:
    fresh = made = network.init()
    plan = dataclasses.replace(plan, notes=network.notes(plan))
  if network.defined is not None:
    defined = network.defined() if made is None else made
    _check_defined(network.variables, defined, plan)
  return Grown(plan.apply(network.variables, fresh, alpha=alpha), plan)


def _check_defined(variables: Any, defined: Any, plan: Plan) -> None:
  """Raises `ValueError` unless a plan leads to the shapes of a definition at the new size."""
  shapes = {plan.moved.get(path, path): shape for path, shape in _trees.shapes(variables).items()}
  shapes.update((change.path, change.after or ()) for change in plan.changes)
  expected = _trees.shapes(defined)
  wrong = [
    f"{_paths.join(path)!r} {expected[path]}, but {shape} by the plan"
    for path, shape in shapes.items()
    if path in expected and expected[path] != shape
  ]
  if wrong:
    listed = "; ".join(wrong[:8] + ["…"] * (len(wrong) > 8))
    raise ValueError(
      "the new module has another size than the plan, so nothing was changed. It has the shapes"
      f" {listed}. Expected the same: where the new module is larger, name what makes those units"
      " too (a producer for each layer, or a glob), and by how many; where it is smaller, it lacks"
      " what grows along"
    )


def check_layout(network: Network, plan: Plan, name: str, hint: str = "") -> None:
  """Raises `ValueError` unless a network has its units where a plan has put them.

  It may run all the same, if it cuts an axis into heads or groups by a number that is not read
  from an array: into wider ones, where more of them were added.

  Args:
    network: The network at its new size, without a gate.
    plan: The plan.
    name: What the network is called in errors.
    hint: What may be the reason.
  """
  dimensions = [dimension for dimension in plan.after() if dimension.regroups]
  if not network.inputs or not dimensions:
    return
  try:
    graph = _graph.read(network.forward, network.variables, *network.inputs, **network.settings)
    for dimension in dimensions:
      graph.clear()
      _couple.check_layout(graph, dimension, "the dimension")
  except ValueError as error:
    where = " with its units where they were"
    raise ValueError(_does_not_run(name, where, hint, error)) from error


def check_runs(network: Network, name: str, hint: str = "") -> None:
  """Raises `ValueError` unless a network runs at its new size; arguments as in `check_layout`."""
  if not network.inputs:
    return
  try:
    _graph.trace(network.forward, network.variables, *network.inputs, **network.settings)
  except ValueError as error:
    raise ValueError(_does_not_run(name, "", hint, error)) from error


def _does_not_run(name: str, where: str, hint: str, error: ValueError) -> str:
  hint = hint or (
    "A shared dimension may lack a member, or a module keep its size in an attribute of its own"
  )
  return f"{name} does not run at its new size{where}, so nothing was changed. {hint}. ({error})"


def heads(
  network: Network,
  attn: Iterable[str],
  by: int,
  of: str,
  *,
  fresh: Any = None,
  alpha: float = 0.0,
) -> Grown:
  """More heads, queries of each group, or entries of a head, as `of` says.

  `attn` are paths of attention layers, or globs.
  """
  if not network.inputs:
    raise ValueError("heads are found in the program: expected inputs of the forward pass")
  found: dict[Dimension, int] = {}
  known: set[tuple[_paths.Path, int]] = set()
  fixed: set[tuple[int, int]] = set()
  graph = _graph.read(network.forward, network.variables, *network.inputs, **network.settings)
  for path in (path for name in attn for path in _trees.layers(network.variables, name)):
    units, entries = _heads.find(graph, _paths.join(path), of, fixed)
    if not isinstance(by, int | np.integer) or isinstance(by, bool) or by < 1 or by % entries:
      raise ValueError(
        f"by: expected a positive integer{f' that {entries} divides' if entries > 1 else ''}, found"
        f" {by!r}"
      )
    members = {(member.path, member.axis) for member in units.members}
    if not members & known:  # layers may share positions, and then their heads
      found[units] = by // entries
    known |= members
  plan = _planners.widening(network.variables, found, alpha=network.alpha)
  return grow(network, plan, fresh, alpha)


def check_closed(larger: Network, plan: Plan) -> None:
  """Raises `ValueError` if new layers count although the gate is closed.

  The output must be the same whatever their weights are. Nothing is looked at if α multiplies none
  of them, or if it is not known on which arrays the network runs.

  Args:
    larger: The network at its new size, without its gate.
    plan: The plan by which it has grown.
  """
  inputs, arguments = larger.inputs, jax.tree.leaves((larger.inputs, larger.settings))
  known = inputs and not any(isinstance(x, jax.ShapeDtypeStruct) for x in arguments)
  if not known or not plan.grows or not any(change.scaled for change in plan.changes):
    return
  gated = _gate.gated(larger.forward, plan)
  leaves = _paths.by_path(larger.variables)
  others = {}
  for change in plan.changes:
    leaf = leaves[change.path]
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      at = change.new(0) if change.layers else ...
      others[change.path] = leaf.at[at].add(jnp.asarray(0.5, leaf.dtype))

  @jax.jit
  def run(variables: Any) -> list[Any]:
    found = _paths.by_path(gated(variables, *inputs, **larger.settings))
    n = len(larger.output)
    return [x for path, x in found.items() if path[:n] == larger.output]

  closed = _trees.insert(larger.variables, plan.alpha, jnp.zeros((), float_dtype(leaves.values())))
  first, second = run(closed), run(_trees.with_leaves(closed, others))
  if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, second, strict=True)):
    raise ValueError(
      "outgoing: with the gate closed the output still depends on the new layers, so nothing was"
      " changed. Expected all layers through which they add to a residual stream, and that they do"
      " nothing else to it, as x + f(norm(x)) does; without outgoing= new layers count at once"
    )
