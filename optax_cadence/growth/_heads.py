"""The heads of an attention layer, found in its program.

An attention layer has two products of activations: queries with keys, and what becomes of these
with values. The axes of the first say what a head is, whatever the weights before it look like:
one matrix for queries, keys and values or three, one after the other or in turns, keys that serve
groups of queries, rotary positions. So the units are put on these axes, and followed from there to
the weights.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from optax_cadence import _paths
from optax_cadence.growth import _couple
from optax_cadence.growth import _graph
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._graph import Graph
from optax_cadence.growth._graph import Node
from optax_cadence.growth._graph import Operation
from optax_cadence.programs import primitives


class Start(NamedTuple):
  """Axes that have units to begin with.

  Attributes:
    ends: The axes.
    labels: The unit of each position along them.
  """

  ends: list[tuple[Node, int]]
  labels: np.ndarray


def couple_heads(
  fn: Callable[..., Any], variables: Any, *args: Any, attn: str, of: str = "heads", **kwargs: Any
) -> Dimension:
  """Finds every axis that must change its size together with the heads of an attention layer.

  Args:
    fn: The forward pass.
    variables: Tree of arrays or `jax.ShapeDtypeStruct`.
    *args: Further arguments of `fn`.
    attn: Path of what holds the weights of the attention layer.
    of: What the units are: "heads", with the queries that they serve where there are several
      for a key; "queries", those of each group; or the entries of a head, its "size", which are
      pairs where rotary positions turn pairs of them.
    **kwargs: Further arguments of `fn`.

  Returns:
    The `Dimension`, for `growth.widening`.

  Raises:
    ValueError: If no such units are found there; it says what was.

  >>> import jax, jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> def attention(p, x):
  ...   q, k, v = jnp.split((x @ p["qkv"]).reshape(*x.shape[:-1], 3, -1, 4), 3, axis=-3)
  ...   y = jax.nn.dot_product_attention(*(a.squeeze(-3) for a in (q, k, v)))
  ...   return y.reshape(*x.shape[:-1], -1) @ p["out"]
  >>> params = {"attn": {"qkv": jnp.ones((8, 24)), "out": jnp.ones((8, 8))}}
  >>> x = jnp.ones((1, 5, 8))
  >>> print(growth.couple_heads(lambda p, x: attention(p["attn"], x), params, x, attn="attn"))
  2 units
    attn/out axis 0: outgoing
    attn/qkv axis 1: incoming
  """
  return find(_graph.read(fn, variables, *args, **kwargs), attn, of)[0]


def find(
  graph: Graph, attn: str, of: str, fixed: set[tuple[int, int]] | None = None
) -> tuple[Dimension, int]:
  """As `couple_heads`, for a program that has been read.

  Args:
    graph: The program.
    attn: As for `couple_heads`.
    of: As for `couple_heads`.
    fixed: Axes, with the ids of their nodes, that are known to be tied to one that cannot grow;
      what is found out about the program is added.

  Returns:
    The dimension, and how many entries of a head one unit is, or else 1.
  """
  fixed = set() if fixed is None else fixed
  if of not in _STARTS:
    raise ValueError(f"of: expected one of {', '.join(map(repr, _STARTS))}, found {of!r}")
  attention = _Attention(graph, attn)
  reasons = []
  for start in _STARTS[of](attention):
    place = id(start.ends[0][0]), start.ends[0][1]
    if place in fixed:
      continue
    graph.clear()
    try:
      for node, axis in start.ends:
        node.put(axis, start.labels, "an attention layer")
      operations = _couple.spread_from(graph, [node for node, _ in start.ends])
      found = _couple.of_labels(graph, int(start.labels.max()) + 1, operations)
    except _graph.FixedAxisError as error:
      fixed.update((id(node), axis) for node in graph.labelled() for axis in node.labels)
      if of == "size":  # otherwise it is an axis of the batch, or of positions
        reasons.append(str(error))
      continue
    except ValueError as error:
      reasons.append(str(error))
      continue
    labelled = {member.path for member in found.members}
    of_queries, of_keys = (labelled & attention.behind(x) for x in attention.scores.operands[:2])
    if labelled & attention.leaves and not (of == "queries" and of_queries and of_keys):
      return found, int((start.labels == 0).sum()) if of == "size" else 1
  raise ValueError(
    f"attn {attn!r}: its queries and keys, of shapes"
    f" {[node.shape for node in attention.scores.nodes[:2]]}, have no axis that can grow as its"
    f" {of}{': ' + reasons[-1 if of == 'size' else 0] if reasons else ''}"
  )


class _Attention:
  """An attention layer in a program.

  Attributes:
    graph: The program.
    leaves: The paths of its weights.
    scores: The product of its queries with its keys.
    values: The axes of its values that are in its result.
  """

  def __init__(self, graph: Graph, name: str):
    prefix = tuple(name.split("/"))
    self.graph = graph
    self.leaves = {path for path in graph.leaves if path[: len(prefix)] == prefix}
    if not self.leaves:
      raise ValueError(f"attn {name!r}: expected one of {_paths.listed(graph.leaves)}")
    products = [operation for operation in graph.operations if self._multiplies(operation)]
    if not products:
      raise ValueError(
        f"attn {name!r}: expected a product of queries with keys that are made there, found none"
      )
    self.scores = products[0]
    self.values: list[tuple[Node, int]] = []
    scores = id(self.scores.results[0])
    for operation in products[1:]:
      of_scores = [scores in self._ancestors(node)[1] for node in operation.operands[:2]]
      if any(of_scores):
        side = of_scores.index(False) if False in of_scores else 1
        node = operation.nodes[side]
        self.values = [(node, axis) for axis in _axes(operation).free[side]]
        break

  def behind(self, node: Node | None) -> set[_paths.Path]:
    """The weights of the last products before a node, and leaves that joined after these."""
    return self._ancestors(node)[0]

  def _multiplies(self, operation: Operation) -> bool:
    """Whether an operation is a product of two activations that weights of this layer made."""
    nodes = operation.operands[:2]
    axes = primitives.product(operation.eqn)
    if axes is None or not axes.batched[0] or any(x is None or x.origin for x in nodes):
      return False
    return all(self.behind(node) & self.leaves for node in nodes)

  def _ancestors(self, node: Node | None) -> tuple[set[_paths.Path], set[int]]:
    """The weights behind a node, and the ids of the nodes on the way back to them."""
    found: set[_paths.Path] = set()
    seen: set[int] = set()
    stack = [node]
    while stack:
      node = stack.pop()
      if node is None or id(node) in seen:
        continue
      seen.add(id(node))
      maker = self.graph.maker_of.get(id(node))
      if node.origin is not None:
        found.add(node.origin)
      elif maker is None:  # it comes out of a loop or a branch
        links = [self.graph.links[i] for i in self.graph.links_of.get(id(node), ())]
        stack += [x for link in links if not isinstance(link, Operation) for x in link.nodes]
      else:
        weights = [x.origin for x in maker.operands if x is not None and x.origin is not None]
        found.update(weights)
        if not weights or maker.name not in primitives.CONTRACTIONS:
          stack += maker.operands
    return found, seen


def _axes(operation: Operation) -> primitives.Product:
  axes = primitives.product(operation.eqn)
  assert axes is not None
  return axes


def _batched(operation: Operation) -> Iterator[tuple[list[tuple[Node, int]], int]]:
  """The batch axes of a product, one of each operand, and their size."""
  left, right = operation.nodes[:2]
  for a, b in zip(*_axes(operation).batched, strict=True):
    yield [(left, a), (right, b)], left.shape[a]


def _divisors(n: int) -> list[int]:
  """The divisors of a number but for 1 and itself, from the smallest on."""
  return [g for g in range(2, n) if n % g == 0]


def _heads(attention: _Attention) -> Iterator[Start]:
  """Where heads may lie: each is a unit, or neighbours are one, which share a repeated key."""
  for ends, n in _batched(attention.scores):
    for group in [1, *_divisors(n)]:
      yield Start(ends, np.repeat(np.arange(n // group), group))


def _queries(attention: _Attention) -> Iterator[Start]:
  """Where the queries of a group may lie: along their own axis, or along that of repeated keys."""
  scores = attention.scores
  for node, free in zip(scores.nodes[:2], _axes(scores).free, strict=True):
    for axis in free:
      yield Start([(node, axis)], np.arange(node.shape[axis]))
  for ends, n in _batched(scores):
    for group in [n, *_divisors(n)[::-1]]:
      yield Start(ends, np.tile(np.arange(group), n // group))


def _sizes(attention: _Attention) -> Iterator[Start]:
  """Where the entries of a head lie: queries and keys sum over them; values have as many.

  Rotary positions turn pairs of them: neighbours, or one of each half.
  """
  left, right = attention.scores.nodes[:2]
  for a, b in zip(*_axes(attention.scores).summed, strict=True):
    n = left.shape[a]
    values = [(node, axis) for node, axis in attention.values if node.shape[axis] == n]
    if attention.values and not values:
      raise ValueError(
        f"queries have {n} entries a head and values"
        f" {[node.shape[axis] for node, axis in attention.values]}: expected as many; grow each by"
        " growth.widen"
      )
    kinds = [np.arange(n)]
    if n % 2 == 0 and n > 2:
      kinds += [np.repeat(np.arange(n // 2), 2), np.tile(np.arange(n // 2), 2)]
    for labels in kinds:
      yield Start([(left, a), (right, b), *values], labels)


_STARTS: dict[str, Callable[[_Attention], Iterator[Start]]] = {
  "heads": _heads,
  "queries": _queries,
  "size": _sizes,
}
