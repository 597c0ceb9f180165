"""Which axes of which leaves run over the same units: read from the traced program.

A *dimension* is one set of units (neurons, channels, heads, entries of the residual
stream) with all its members: the axes of leaves that have an entry, or several, for every
unit (as in the dependency graph of Torch-Pruning, arXiv:2301.12900). Nothing here changes a
parameter.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from optax_cadence import _paths
from optax_cadence.growth import _trees
from optax_cadence.growth._dimension import Axis
from optax_cadence.growth._dimension import Contraction
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._dimension import dimension
from optax_cadence.growth._dimension import Labels
from optax_cadence.growth._dimension import Member
from optax_cadence.growth._program import Graph
from optax_cadence.growth._program import Node
from optax_cadence.growth._program import Operation
from optax_cadence.growth._program import PRODUCTS
from optax_cadence.growth._program import read
from optax_cadence.growth._spread import spread


def couple(
  fn: Callable[..., Any],
  variables: Any,
  *args: Any,
  producer: str | Sequence[str] | Dimension,
  axis: int = -1,
  unit: int = 1,
  blocks: int = 1,
  **kwargs: Any,
) -> Dimension:
  """Finds every axis that must change its size together with one of `producer`.

  The program that `fn(variables, *args)` traces is read, not run. Names play no part.

  Args:
    fn: The forward pass.
    variables: Tree of arrays or `jax.ShapeDtypeStruct`: the parameters, and whatever else
      changes its shape with them (running statistics).
    *args: Further arguments of `fn`: arrays, `jax.ShapeDtypeStruct`s, or trees of them.
      Whatever is no array is passed as it is.
    producer: Path of a leaf whose `axis` holds the units; several where the program does not
      tie them; or a `Dimension` made by hand, which is then checked.
    axis: The axis of `producer`.
    unit: Adjacent positions that make one unit (the entries of a head, of a norm group).
    blocks: How often the units repeat along the axis (groups of a norm that all grow).
    **kwargs: Further arguments of `fn`.

  Returns:
    The `Dimension`.

  Raises:
    ValueError: If the axis cannot be followed through the program, or ends in its input: it
      says where. If a `Dimension` made by hand lacks a member: it names it.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones(4), "c": jnp.ones((4, 2))}
  >>> fn = lambda p, x: jnp.tanh(x @ p["a"] + p["b"][None]) @ p["c"]
  >>> print(growth.couple(fn, params, jnp.ones((5, 3)), producer="a"))
  4 units
    a axis 1: incoming
    b axis 0: follows
    c axis 0: outgoing
  """
  shapes = _trees.shapes(variables)
  if isinstance(producer, Dimension):
    given = producer
  else:
    seeds = [producer] if isinstance(producer, str) else list(producer)
    given = dimension(variables, {name: Axis(axis, blocks, unit) for name in seeds})
  graph = read(fn, variables, *args, **kwargs)
  for member in given.members:
    graph.leaves[member.path].put(member.axis, member.labels, "the description")
  spread(graph)
  members = tuple(_members(graph, given.size))
  if producer is given:
    _check_complete(given, members, shapes)
  sums = list(_summed(graph))
  if not any(operation.eqn.primitive.name in PRODUCTS for operation, _ in sums):
    names = _paths.listed(m.path for m in members)
    raise ValueError(
      f"nothing uses the units of {names}: no product sums over them, so widening would change"
      " the output"
    )
  of_weights = all(any(node.origin for node in nodes) for _, nodes in sums)
  folds = of_weights and all(m.role != "both" for m in members)
  return Dimension(given.size, members, tuple(_contractions(graph)), folds)


def _check_complete(
  given: Dimension, members: Iterable[Member], shapes: Mapping[_paths.Path, tuple[int, ...]]
) -> None:
  named = {(m.path, m.axis) for m in given.members}
  for m in members:
    if (m.path, m.axis) not in named:
      raise ValueError(
        f"the description lacks {_paths.join(m.path)!r} of shape {shapes[m.path]}: its axis"
        f" {m.axis} shares units with {_paths.listed(g.path for g in given.members)}"
      )


def _members(graph: Graph, units: int) -> Iterator[Member]:
  roles = _roles(graph)
  for path, node in graph.leaves.items():
    for axis, labels in sorted(node.labels.items()):
      if units == 1 and (labels == 0).sum() > 1:
        raise ValueError(
          f"{_paths.join(path)!r} has {len(labels)} positions for a single unit: how a second one"
          " would lie among them cannot be derived; expected at least two units"
        )
      yield Member(path, axis, labels, roles.get((path, axis), "follows"))


def _roles(graph: Graph) -> dict[tuple[_paths.Path, int], str]:
  found: dict[tuple[_paths.Path, int], set[str]] = {}
  for operation in graph.operations:
    if operation.eqn.primitive.name in (*PRODUCTS, "gather"):
      for tie, ends in operation.labelled():
        for node, axis in ends:
          if node.origin is not None:
            for a in _axes_like(graph.leaves[node.origin], node.labels[axis]):
              role = "outgoing" if tie.summed else "incoming"
              found.setdefault((node.origin, a), set()).add(role)
  return {key: roles.pop() if len(roles) == 1 else "both" for key, roles in found.items()}


def _axes_like(leaf: Node, labels: Labels) -> list[int]:
  same = [a for a, own in leaf.labels.items() if len(own) == len(labels)]
  return same or list(leaf.labels)


def _summed(graph: Graph) -> Iterator[tuple[Operation, list[Node]]]:
  """The operations that sum over units, with those of their operands that have them."""
  for operation in graph.operations:
    for tie, ends in operation.labelled():
      if tie.summed:
        yield operation, [node for node, _ in ends]


def _contractions(graph: Graph) -> Iterator[Contraction]:
  for operation in graph.operations:
    if flops := operation.flops:
      axes = [node.labels[a] for _, ends in operation.labelled() for node, a in ends[-1:]]
      yield Contraction(flops, tuple((len(labels), int((labels == 0).sum())) for labels in axes))
