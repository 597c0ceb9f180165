"""The hidden layers of a traced program: whose weights make each unit, and where it is read.

A *hidden layer* here is a set of units that is neither an input nor an output of the network: made
by products with weights, changed by norms and activations, read by products with other weights.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from optax_cadence import _paths
from optax_cadence.growth import _couple
from optax_cadence.growth import _graph
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._dimension import Labels
from optax_cadence.growth._graph import Graph
from optax_cadence.growth._graph import Node
from optax_cadence.growth._graph import Operation
from optax_cadence.programs import primitives
from optax_cadence.programs import reading


class Read(NamedTuple):
  """A product of units with weights, at which they are read.

  Attributes:
    at: Where it stands in the program, as `Operation.at` says it.
    value: Which of its two operands holds the units; the other holds weights.
    weights: Path of these.
    axes: The axis of each operand that it sums over.
    labels: Along each of these the units.
  """

  at: tuple[int, ...]
  value: int
  weights: _paths.Path
  axes: tuple[int, int]
  labels: tuple[Labels, Labels]


class Taker(NamedTuple):
  """A bias behind a product that reads units: it can take up what they give to it on average.

  Attributes:
    name: Path of the product's weights, as `/`-joined names, in all variables.
    weights: The same in the tree that is trained.
    axes: The axes of the weights that the bias has too, in this order.
    bias: Path of the bias.
  """

  name: str
  weights: _paths.Path
  axes: tuple[int, ...]
  bias: _paths.Path


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
  """A hidden layer.

  Attributes:
    units: The units, and the leaves that have them.
    stack: If leaves hold the weights of several such layers along their first axis, which a loop
      runs one after another, how many.
    takers: The biases behind the units.
  """

  units: Dimension
  stack: int | None = None
  takers: tuple[Taker, ...] = ()

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of an array with a number for each unit."""
    return (self.units.size,) if self.stack is None else (self.stack, self.units.size)

  def within(self, prefix: str) -> "Layer":
    """The layer in the tree at a path, with those of its leaves that are there."""
    path = tuple(prefix.split("/")) if prefix else ()
    members = [
      dataclasses.replace(m, path=m.path[len(path) :])
      for m in self.units.members
      if m.path[: len(path)] == path
    ]
    takers = [
      taker._replace(weights=taker.weights[len(path) :], bias=taker.bias[len(path) :])
      for taker in self.takers
      if taker.weights[: len(path)] == taker.bias[: len(path)] == path
    ]
    units = Dimension(self.units.size, tuple(members))
    return dataclasses.replace(self, units=units, takers=tuple(takers))


@dataclasses.dataclass(frozen=True, eq=False)
class Hidden:
  """The hidden layers of a network.

  Attributes:
    layers: By the path of the first weights that make its units.
    left_out: By the path of weights, why what they make is no hidden layer.
  """

  layers: Mapping[str, Layer]
  left_out: Mapping[str, str]

  def __str__(self) -> str:
    lines = []
    for name, layer in self.layers.items():
      stacked = "" if layer.stack is None else f" in each of {layer.stack} layers"
      lines.append(f"{name}: {layer.units.size} units{stacked}")
      lines += [f"  {_paths.join(m.path)} axis {m.axis}: {m.role}" for m in layer.units.members]
    lines += [f"{name}: left out, {reason}" for name, reason in self.left_out.items()]
    return "\n".join(lines)


def hidden(fn: Callable[..., Any], variables: Any, *inputs: Any, **kwargs: Any) -> Hidden:
  """Finds the hidden layers of a network: what `recycle` gives new units.

  The program that `fn(variables, *inputs)` traces is read, not run. Left out are:

  - outputs of the network, and units that no product reads;
  - a residual stream, and the state of a recurrent network: many layers write and read it, so none
    of its entries is one unit;
  - the heads of attention and their entries, and what two activations are multiplied over;
  - weights that both make and read the units (tied embeddings);
  - units that are read inside a branch, a `while` loop or a function with a derivative of its own;
  - what cannot be followed through the program.

  Args:
    fn: The forward pass, or a loss.
    variables: Tree of arrays or `jax.ShapeDtypeStruct`.
    *inputs: Further arguments of `fn`: arrays, `jax.ShapeDtypeStruct`s, or trees of them.
    **kwargs: Further arguments of `fn`.

  Returns:
    A `Hidden`, which prints as a list.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones(4), "c": jnp.ones((4, 2))}
  >>> fn = lambda p, x: jnp.tanh(x @ p["a"] + p["b"][None]) @ p["c"]
  >>> print(growth.hidden(fn, params, jnp.ones((5, 3))))
  a: 4 units
    a axis 1: incoming
    b axis 0: follows
    c axis 0: outgoing
  c: left out, it is an output of the network
  """
  traced = _graph.trace(fn, variables, *inputs, **kwargs)
  graph = Graph(traced)
  layers: dict[str, Layer] = {}
  left_out: dict[str, str] = {}
  seen: set[tuple[int, int]] = set()
  for operation in graph.operations:
    for node, axis, axes in _made(operation):
      if (id(node), axis) in seen:
        continue
      name = _paths.join(node.origin or ()) + (f" axis {axis}" if axes > 1 else "")
      name = _paths.unused(name, layers.keys() | left_out.keys())
      node.put(axis, np.arange(node.shape[axis]), name)
      try:
        if axes > 1:
          raise _LeftOut("its weights make heads and their entries, and no single units")
        layers[name] = _layer(graph, traced.program, _couple.spread_from(graph, [node]))
      except ValueError as error:
        left_out[name] = str(error)
      seen |= {(id(labelled), a) for labelled in graph.labelled() for a in labelled.labels}
      graph.clear()
  return Hidden(layers, left_out)


class _LeftOut(ValueError):
  """Why units are no hidden layer."""


def _made(operation: Operation) -> Iterator[tuple[Node, int, int]]:
  """Of a product: its weights, each of their axes that makes units, and how many such axes."""
  product = primitives.product(operation.eqn)
  if product is None:
    return
  values, weights = _sides(operation)
  if len(weights) == len(values) == 1:
    (side,) = weights
    node = operation.operands[side]
    assert node is not None
    for axis in product.free[side]:
      yield node, axis, len(product.free[side])


def _sides(operation: Operation) -> tuple[list[int], list[int]]:
  """The operands of a product that are activations, and those that are weights."""
  pairs = [(i, node) for i, node in enumerate(operation.operands[:2]) if node is not None]
  weights = [i for i, node in pairs if node.origin is not None]
  return [i for i, _ in pairs if i not in weights], weights


def _layer(graph: Graph, program: Any, operations: Sequence[Operation]) -> Layer:
  """The hidden layer whose units are on the graph.

  Raises:
    ValueError: If they are none.
  """
  size = 1 + max(int(x.max()) for node in graph.labelled() for x in node.labels.values())
  members = tuple(_couple.members_of(graph, size, operations))
  if list(_couple.outputs_of(graph, members)):
    raise _LeftOut("it is an output of the network")
  reads = list(reads_of(operations))
  if not reads:
    raise _LeftOut("no product with weights reads its units")
  if _is_stream(graph, operations, reads):
    raise _LeftOut(
      "many layers write and read its entries: a residual stream, or a recurrent state"
    )
  if any(member.role == "both" for member in members):
    raise _LeftOut("the same weights make its units and read them, as a tied embedding does")
  loops = [_loops(program, read.at) for read in reads]
  stack = _stack(graph, loops)
  readers = [operation for operation in operations if operation.at in {read.at for read in reads}]
  takers = {taker.name: taker for reader in readers if (taker := _taker(graph, reader, stack))}
  return Layer(Dimension(size, members), stack, tuple(takers.values()))


def reads_of(operations: Sequence[Operation]) -> Iterator[Read]:
  """The products that take in the units which are on the graph.

  Raises:
    ValueError: If two activations are multiplied over them.
  """
  for operation in operations:
    if operation.name in primitives.PRODUCTS:
      for tie, ends in operation.labelled():
        if not tie.summed:
          continue
        values, weights = _sides(operation)
        product = primitives.product(operation.eqn)
        if product is not None and product.batched[0] and weights:
          raise _LeftOut("its layers are stacked, and vmap runs them: recycle inside that vmap")
        if len(ends) != 2 or len(values) != 1 or len(weights) != 1:
          raise _LeftOut("two activations are multiplied over its units, as queries with keys")
        (left, a), (right, b) = ends
        path = [left, right][weights[0]].origin or ()
        labels = left.labels[a], right.labels[b]
        yield Read(operation.at, values[0], path, (a, b), labels)


def _loops(program: Any, at: Sequence[int]) -> int:
  """How many loops an operation is inside, if numbers can be taken out of all that it is inside.

  Raises:
    ValueError: If they cannot, as out of a branch.
  """
  loops = 0
  for i in at[:-1]:
    eqn = reading.opened(program)[0].eqns[i]
    if is_closed(eqn):
      raise _LeftOut(
        f"its units are read inside {eqn.primitive.name}, from which no number can be taken out"
      )
    loops += eqn.primitive.name == "scan"
    program = inside(eqn)
  return loops


def is_closed(eqn: Any) -> bool:
  """Whether an operation runs programs from which no further results can be taken."""
  name = eqn.primitive.name
  return name in ("cond", "while", "shard_map") or name.startswith("custom_")


def inside(eqn: Any) -> Any:
  """The program in a call or scan."""
  return eqn.params["jaxpr"] if eqn.primitive.name == "scan" else reading.called(eqn)


def _is_stream(graph: Graph, operations: Sequence[Operation], reads: Sequence[Read]) -> bool:
  """Whether units are a residual stream: several products write them, add up, and are read."""
  writes = sum(
    any(axis in node.labels for node, axis, _ in _made(operation)) for operation in operations
  )
  by_place = {operation.at: operation for operation in operations}
  values = {id(_source(graph, by_place[read.at].operands[read.value])) for read in reads}
  adds = any(
    operation.name in ("add", "add_any")
    and all(node is not None and node.labels and not node.origin for node in operation.operands)
    for operation in operations
  )
  return writes > 1 and len(values) > 1 and adds


def _source(graph: Graph, node: Any) -> Node:
  """What a node was before it was rearranged."""
  while id(node) in graph.maker_of:
    maker = graph.maker_of[id(node)]
    if maker.name not in primitives.REARRANGEMENTS or maker.operands[0] is None:
      break
    node = maker.operands[0]
  return node


def _stack(graph: Graph, loops: Sequence[int]) -> int | None:
  """How many layers are stacked in the leaves that have the units on the graph; None: not at all.

  Raises:
    ValueError: If that is so of some leaves only.
  """
  sliced = {id(pair.outer) for pair in graph.slices if pair.inner.labels}
  leaves = [leaf for leaf in graph.leaves.values() if leaf.labels]
  stacked = [leaf.shape[0] for leaf in leaves if id(leaf) in sliced]
  if not stacked:
    return None
  if len(stacked) < len(leaves) or len(set(stacked)) > 1 or set(loops) != {1}:
    raise _LeftOut("its layers are stacked in some leaves and not in others, or in several loops")
  return stacked[0]


def _taker(graph: Graph, reader: Operation, stack: int | None) -> Taker | None:
  """The bias that is added to a product of units with weights; None if that is not plain.

  It is where the weights are a leaf as it is, the last axes of the product are theirs, and a leaf
  with just these axes is added.
  """
  product, weights = primitives.product(reader.eqn), reader.operands[1]
  if product is None or weights is None or weights.origin is None or product.batched[1]:
    return None
  if reader.name == "conv_general_dilated":
    params = reader.eqn.params
    features = params["dimension_numbers"].out_spec[1]
    if params["feature_group_count"] > 1 or features != len(reader.results[0].shape) - 1:
      return None
  elif reader.name != "dot_general":
    return None
  axes = product.free[1]
  of_weights = _as_it_is(graph, weights, stack, weights.shape)
  sizes = tuple(weights.shape[axis] for axis in axes)
  biases = [_as_it_is(graph, node, stack, sizes) for node in _added(graph, reader.results[0])]
  if of_weights is None or len(biases) != 1 or biases[0] is None:
    return None
  shift = 0 if stack is None else 1
  axes = (*range(shift), *(axis + shift for axis in axes))
  return Taker(_paths.join(of_weights), of_weights, axes, biases[0])


def _as_it_is(
  graph: Graph, node: Node, stack: int | None, shape: tuple[int, ...]
) -> _paths.Path | None:
  """The path of the leaf of this shape that a node is, but for its dtype and further first axes.

  With `stack` it is a leaf of so many, one of which a loop reads at each turn.
  """
  while id(node) in graph.maker_of:
    maker = graph.maker_of[id(node)]
    source = maker.operands[0]
    if source is None or maker.name not in primitives.REARRANGEMENTS - {"transpose"}:
      return None
    first = next((i for i, n in enumerate(source.shape) if n > 1), len(source.shape))
    kept = len(source.shape) - first
    last = tuple(range(len(node.shape)))[len(node.shape) - kept :]
    dims = maker.eqn.params.get("broadcast_dimensions", last)
    if (
      tuple(node.shape[i] for i in last) != source.shape[first:] or dims[len(dims) - kept :] != last
    ):
      return None
    node = source
  path = node.origin
  if path is None or node.shape != shape:
    return None
  leaf = graph.leaves[path]
  return path if leaf.shape == (shape if stack is None else (stack, *shape)) else None


def _added(graph: Graph, node: Node) -> Iterator[Node]:
  """The leaves that are added to a value."""
  for i in graph.links_of[id(node)]:
    link = graph.links[i]
    if isinstance(link, Operation) and any(operand is node for operand in link.operands):
      if link.name == "convert_element_type":
        yield from _added(graph, link.results[0])
      elif link.name in ("add", "add_any"):
        others = (other for other in link.operands if other is not None and other is not node)
        yield from (other for other in others if other.origin is not None)
