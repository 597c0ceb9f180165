"""Which axes of which leaves run over the same units: read from the traced program.

A *dimension* is one set of units (neurons, channels, heads, entries of the residual
stream) with all its members: the axes of leaves that have an entry, or several, for every
unit (as in the dependency graph of Torch-Pruning, arXiv:2301.12900). Every axis of the program
gets labels, the number of the unit behind each of its positions; they pass from one axis to all
that are tied to it, forward and backward, until nothing changes. No parameter is changed here.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from optax_cadence import _paths
from optax_cadence.growth import _graph
from optax_cadence.growth._dimension import Axis
from optax_cadence.growth._dimension import Contraction
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._dimension import dimension
from optax_cadence.growth._dimension import Member
from optax_cadence.growth._dimension import NO_UNIT
from optax_cadence.growth._dimension import Output
from optax_cadence.growth._graph import Graph
from optax_cadence.growth._graph import Node
from optax_cadence.growth._graph import Operation
from optax_cadence.growth._graph import Pair
from optax_cadence.programs import primitives


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
  if isinstance(producer, Dimension):
    described = producer
  else:
    names = [producer] if isinstance(producer, str) else list(producer)
    described = dimension(variables, {name: Axis(axis, blocks, unit) for name in names})
  graph = _graph.read(fn, variables, *args, **kwargs)
  operations = spread(graph, described, "the description")
  found = of_labels(graph, described.size, operations)
  if producer is described:
    _check_complete(described, found.members, graph)
  return found


def of_labels(graph: Graph, units: int, operations: Sequence[Operation]) -> Dimension:
  """The dimension that labels of so many units describe, which go through some operations.

  Raises:
    ValueError: If no product sums over them.
  """
  members = tuple(members_of(graph, units, operations))
  sums = [
    (operation, ends)
    for operation in operations
    for tie, ends in operation.labelled()
    if tie.summed
  ]
  outputs = tuple(outputs_of(graph, members))
  # A sum alone may be the statistics of a norm, after which the units are still there.
  products = any(primitives.product(operation.eqn) for operation, _ in sums)
  if not sums or (outputs and not products):
    raise ValueError(
      f"nothing uses the units of {_paths.listed(m.path for m in members)}: no product sums over"
      f" them, so widening would change the output{_ends(graph)}"
    )
  folds = (
    all(any(node.origin for node, _ in ends) for _, ends in sums)
    and all(m.role != "both" for m in members)
    and not any(map(_loses, operations))
  )
  for operation in operations:
    _check_counts(operation, units)
  contractions = tuple(_contractions(graph))
  regroups = any(map(_regroups, operations))
  return Dimension(units, members, contractions, folds, outputs, regroups)


def _ends(graph: Graph) -> str:
  """The operations behind which units cannot be followed, in words for an error."""
  ends = [
    f"{operation.name} of shapes {[node.shape for node in operation.operands if node is not None]}"
    for operation in graph.operations
    if _loses(operation)
  ]
  ends += [
    f"a loop over the first axis of shape {pair.outer.shape}"
    for pair in graph.slices
    if 0 in pair.outer.labels
  ]
  found = list(dict.fromkeys(ends))
  return f". They end in {', '.join(found[:3])}" if found else ""


def _loses(operation: Operation) -> bool:
  """Whether an operation ends units: it has them along an axis that it ties to no other (sort)."""
  if operation.name in ("concatenate", "reshape", "slice", "split"):
    return False
  tied = {end for tie in primitives.ties(operation.eqn) or [] for end in tie.operands}
  return any(
    (i, axis) not in tied
    for i, node in enumerate(operation.operands)
    if node is not None
    for axis in node.labels
  )


def _check_counts(operation: Operation, units: int) -> None:
  """Raises `ValueError` if a program counts along units where new ones do not come last."""
  along = operation.eqn.params.get("dimension")
  if operation.name == "iota" and along in operation.results[0].labels:
    labels = operation.results[0].labels[along]
    last = labels == units - 1
    if not (last[-1] and (np.diff(last.astype(int)) >= 0).all()):
      raise ValueError(
        f"the program counts along an axis of size {len(labels)} (iota) on which new units would"
        " not come behind all old ones, so that those would have other numbers than before:"
        " expected it not to; keep the numbers in a variable"
      )


def _regroups(operation: Operation) -> bool:
  """Whether an operation is a reshape that merges axes with labels, or splits one."""
  if operation.name != "reshape" or operation.operands[0] is None:
    return False
  source, target = operation.operands[0], operation.results[0]
  return any(
    any(a in source.labels for a in ins)
    and sum(source.shape[a] > 1 for a in ins) + sum(target.shape[a] > 1 for a in outs) > 2
    for ins, outs in primitives.reshape_groups(source.shape, target.shape)
  )


def check_layout(graph: Graph, dimension: Dimension, what: str) -> None:
  """Raises `ValueError` unless a program has the units of `what` where the dimension says."""
  spread(graph, dimension, what)
  expected = {(m.path, m.axis): m.labels for m in dimension.members}
  for path, leaf in graph.leaves.items():
    for axis, labels in leaf.labels.items():
      if (path, axis) not in expected or (expected[path, axis] != labels).any():
        raise ValueError(f"{_paths.join(path)!r} of shape {leaf.shape} has other units of {what}")


def _check_complete(described: Dimension, members: Sequence[Member], graph: Graph) -> None:
  """Raises `ValueError` if the program has members that a description lacks."""
  named = {(m.path, m.axis) for m in described.members}
  for m in members:
    if (m.path, m.axis) not in named:
      raise ValueError(
        f"the description lacks {_paths.join(m.path)!r} of shape {graph.leaves[m.path].shape}: its"
        f" axis {m.axis} shares units with {_paths.listed(d.path for d in described.members)}"
      )


def members_of(graph: Graph, units: int, operations: Iterable[Operation]) -> Iterator[Member]:
  """The axes of leaves that have units, and what operations do with them."""
  roles = _roles(graph, operations)
  for path, leaf in graph.leaves.items():
    for axis, labels in sorted(leaf.labels.items()):
      if units == 1 and (labels == 0).sum() > 1:
        raise ValueError(
          f"{_paths.join(path)!r} has {len(labels)} positions for a single unit: how a second one"
          " would lie among them cannot be derived; expected at least two units"
        )
      yield Member(path, axis, labels, roles.get((path, axis), "follows"))


def _roles(graph: Graph, operations: Iterable[Operation]) -> dict[tuple[_paths.Path, int], str]:
  """For axes of leaves whether products sum over them ("outgoing") or not ("incoming")."""
  roles: dict[tuple[_paths.Path, int], set[str]] = {}
  for operation in operations:
    if primitives.product(operation.eqn) or operation.name == "gather":
      for tie, ends in operation.labelled():
        for node, axis in ends:
          if node.origin is None:
            continue
          # The weight may have been transposed or reshaped on its way into the product.
          leaf, size = graph.leaves[node.origin], len(node.labels[axis])
          axes = [a for a, labels in leaf.labels.items() if len(labels) == size]
          for a in axes or leaf.labels:
            role = "outgoing" if tie.summed else "incoming"
            roles.setdefault((node.origin, a), set()).add(role)
  return {key: names.pop() if len(names) == 1 else "both" for key, names in roles.items()}


def _contractions(graph: Graph) -> Iterator[Contraction]:
  for operation in graph.operations:
    if flops := operation.flops:
      axes = [node.labels[a] for _, ends in operation.labelled() for node, a in ends[-1:]]
      yield Contraction(flops, tuple((len(labels), int((labels == 0).sum())) for labels in axes))


def outputs_of(graph: Graph, members: Sequence[Member]) -> Iterator[Output]:
  """The outputs that have units, without updated variables (running statistics) among them."""
  variables = {_paths.join(m.path) for m in members}
  for path, node in zip(graph.output_paths, graph.outputs, strict=True):
    if any(_paths.join(path[i:]) in variables for i in range(len(path))):
      continue
    for axis, labels in sorted(node.labels.items()):
      yield Output(path, axis, len(labels), int((labels == 0).sum()))


def spread(graph: Graph, units: Dimension, what: str) -> list[Operation]:
  """As `spread_from`, from the members of a dimension, which errors call `what`."""
  for member in units.members:
    graph.leaves[member.path].put(member.axis, member.labels, what)
  return spread_from(graph, [graph.leaves[member.path] for member in units.members])


def spread_from(graph: Graph, nodes: Sequence[Node]) -> list[Operation]:
  """Labels all axes of the program that run over the units of some nodes.

  Only what touches an axis with new labels is looked at again: in the order of the program, and
  then from its start.

  Returns:
    The operations that the units go through, in the order of the program.

  Raises:
    ValueError: If the units cannot be followed.
  """
  waiting = {i for node in nodes for i in graph.links_of[id(node)]}
  seen = set(waiting)
  queue = [(0, i) for i in sorted(waiting)]
  while queue:
    turn, i = heapq.heappop(queue)
    waiting.discard(i)
    link = graph.links[i]
    changed = _spread_along(link)
    touched = {j for node in link.nodes for j in graph.links_of[id(node)]} if changed else set()
    for j in touched - waiting:
      heapq.heappush(queue, (turn if j > i else turn + 1, j))
    waiting |= touched
    seen |= touched
  links = [graph.links[i] for i in sorted(seen)]
  return [link for link in links if isinstance(link, Operation)]


def _spread_along(link: Operation | Pair) -> bool:
  """Spreads labels along a link; returns whether any is new."""
  if not any(node.labels for node in link.nodes):
    return False
  where, changed = link.where, False
  for node, axis, labels in _known(link, where):
    changed |= node.put(axis, labels, where)
  return changed


# What is known of the labels along an axis of a node.
Known = tuple[Node, int, np.ndarray]


def _known(link: Operation | Pair, where: str) -> Iterator[Known]:
  """What the labels of a link say of its axes; later ones may follow from those put before."""
  if isinstance(link, Pair):
    for a in range(len(link.inner.shape)):
      yield from _known_among([(link.outer, a + link.shift), (link.inner, a)])
    return
  ties = primitives.ties(link.eqn)
  if ties is None:
    raise ValueError(
      f"the units cannot be followed through {where}: {primitives.WANTED}; or grow by hand what"
      " lies before it"
    )
  for tie in ties:
    ends = link.ends(tie)
    yield from _known_among(ends) if tie.groups == 1 else _known_of_groups(tie, ends, where)
  if link.name == "reshape" and len(link.nodes) == 2:
    source, target = link.nodes
    for ins, outs in primitives.reshape_groups(source.shape, target.shape):
      yield from _known_of_reshape(source, ins, target, outs, where)
      yield from _known_of_reshape(target, outs, source, ins, where)
  for whole, part, axis, at in _cuts(link):
    if axis in part.labels:
      labels = np.full(whole.shape[axis], NO_UNIT)
      labels[at] = part.labels[axis]
      yield whole, axis, labels
    if axis in whole.labels:
      yield part, axis, whole.labels[axis][at]


def _known_among(ends: list[tuple[Node, int]]) -> Iterator[Known]:
  """What is known of axes that run over the same units."""
  for (source, a), (target, b) in itertools.permutations(ends, 2):
    if a in source.labels and source.shape[a] == target.shape[b]:
      yield target, b, source.labels[a]


def _known_of_groups(
  tie: primitives.Tie, ends: list[tuple[Node, int]], where: str
) -> Iterator[Known]:
  """What is known of axes that are cut into groups, as those of a grouped convolution are."""
  for (source, a), (target, b) in itertools.permutations(ends, 2):
    if a not in source.labels:
      continue
    labels, size = source.labels[a], target.shape[b]
    if tie.summed and (source, a) == ends[1]:
      yield target, b, np.tile(labels, tie.groups)
      continue
    pieces = labels.reshape(tie.groups, -1)
    alike = (pieces == pieces[:1]).all()  # the units lie in every piece
    if tie.summed and alike:
      yield target, b, pieces[0].copy()
    elif not tie.summed and (pieces == pieces[:, :1]).all():
      yield target, b, np.repeat(pieces[:, 0], size // tie.groups)
    elif not tie.summed and not alike:
      raise ValueError(
        f"{where} is in {tie.groups} groups of {pieces.shape[1]} positions: expected every unit to"
        f" be a whole group, unit={pieces.shape[1]} (more groups), or to lie in all of them,"
        f" blocks={tie.groups} (wider ones)"
      )


def _known_of_reshape(
  source: Node, ins: list[int], target: Node, outs: list[int], where: str
) -> Iterator[Known]:
  """What is known of the axes `outs`, which a reshape makes of the axes `ins`."""
  before, after = [source.shape[i] for i in ins], [target.shape[o] for o in outs]
  for a in ins:
    if a not in source.labels:
      continue
    along_a = source.labels[a].reshape([-1 if i == a else 1 for i in ins])
    labels = np.broadcast_to(along_a, before).reshape(after)  # of every entry
    # A single unit has an axis of size 1; further ones are put in front of it to broadcast.
    order = list(enumerate(outs))
    for k, o in order if labels.size > 1 else order[::-1]:
      rows = np.moveaxis(labels, k, 0).reshape(after[k], -1)
      if (rows == rows[:, :1]).all() and (after[k] > 1 or labels.size == 1):
        yield target, o, rows[:, 0].copy()
        break
    else:
      raise ValueError(
        f"{where} cuts {source.shape[a]} positions into {tuple(after)}: expected every unit in one"
        f" piece; say which are the units with unit={after[-1]} (whole groups are added) or"
        f" blocks={after[0]} (every group grows)"
      )


def _cuts(operation: Operation) -> Iterator[tuple[Node, Node, int, np.ndarray]]:
  """Of a slice, split or concatenate: the whole, a part, the axis, and where it lies along it."""
  operands: Any = operation.operands
  results, p = operation.results, operation.eqn.params
  if operation.name == "slice":
    (whole,), (part,) = operands, results
    for axis, start in enumerate(p["start_indices"]):
      step = p["strides"][axis] if p["strides"] else 1
      yield whole, part, axis, start + step * np.arange(part.shape[axis])
  elif operation.name in ("concatenate", "split"):
    joined = operation.name == "concatenate"
    whole, parts = (results[0], operands) if joined else (operands[0], results)
    axis = p["dimension"] if joined else p["axis"]
    ends = np.cumsum([part.shape[axis] for part in parts])
    for part, end in zip(parts, ends, strict=True):
      yield whole, part, axis, np.arange(end - part.shape[axis], end)
