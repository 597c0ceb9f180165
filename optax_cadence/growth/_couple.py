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
from optax_cadence.programs import reading


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
  """The dimension that the labels on a program describe.

  Args:
    graph: The program.
    units: The number of units.
    operations: The operations that they go through.

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
  of_weights = all(any(node.origin for node, _ in ends) for _, ends in sums)
  extrema = any(map(_loses, operations))
  folds = of_weights and not extrema and all(m.role != "both" for m in members)
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
    if operation.name not in ("concatenate", "reshape", "slice", "split") and _loses(operation)
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
  """Raises `ValueError` unless a program has the units where a dimension says.

  Args:
    graph: The program.
    dimension: The dimension, as it is in this program.
    what: What it is called in errors.
  """
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
  """Labels the members of a dimension, and all axes of the program that run over its units.

  Args:
    graph: The program, whose nodes get the labels.
    units: The dimension.
    what: What the dimension is called in errors.

  Returns:
    The operations that the units go through.

  Raises:
    ValueError: If the units cannot be followed.
  """
  for member in units.members:
    graph.leaves[member.path].put(member.axis, member.labels, what)
  return spread_from(graph, [graph.leaves[member.path] for member in units.members])


def spread_from(graph: Graph, nodes: Sequence[Node]) -> list[Operation]:
  """Labels all axes of the program that run over the units of some nodes.

  Only what touches an axis with new labels is looked at again: in the order of the program, and
  then from its start.

  Args:
    graph: The program.
    nodes: The nodes that have labels.

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
    changed = _spread_through(link) if isinstance(link, Operation) else _spread_between(link)
    touched = {j for node in link.nodes for j in graph.links_of[id(node)]} if changed else set()
    for j in touched - waiting:
      heapq.heappush(queue, (turn if j > i else turn + 1, j))
    waiting |= touched
    seen |= touched
  links = [graph.links[i] for i in sorted(seen)]
  return [link for link in links if isinstance(link, Operation)]


def _spread_between(pair: Pair) -> bool:
  """Spreads labels between two nodes of which one lies in the other."""
  where, changed = "a loop" if pair.shift else "a branch or loop", False
  for a in range(len(pair.inner.shape)):
    changed |= _spread_among([(pair.outer, a + pair.shift), (pair.inner, a)], where)
  return changed


def _spread_through(operation: Operation) -> bool:
  """Spreads labels through an operation; returns whether any is new."""
  nodes = operation.nodes
  if not any(node.labels for node in nodes):
    return False
  where = f"{operation.name} of shapes {[node.shape for node in nodes]}"
  ties = primitives.ties(operation.eqn)
  if ties is None:
    raise ValueError(
      f"the units cannot be followed through {where}: {primitives.WANTED}; or grow by hand what"
      " lies before it"
    )
  changed = False
  for tie in ties:
    ends = operation.ends(tie)
    changed |= _spread_among(ends, where) if tie.groups == 1 else _spread_groups(tie, ends, where)
  if operation.name == "reshape" and len(nodes) == 2:
    source, target = nodes
    for ins, outs in primitives.reshape_groups(source.shape, target.shape):
      changed |= _regroup(source, ins, target, outs, where)
      changed |= _regroup(target, outs, source, ins, where)
  for whole, part, axis, at in _cuts(operation):
    if whole is not None and part is not None:
      changed |= _spread_to_part(whole, part, axis, at, where)
  return changed


def _spread_among(ends: list[tuple[Node, int]], where: str) -> bool:
  """Spreads labels among axes that run over the same units; returns whether any is new."""
  changed = False
  for (source, a), (target, b) in itertools.permutations(ends, 2):
    if a in source.labels and source.shape[a] == target.shape[b]:
      changed |= target.put(b, source.labels[a], where)
  return changed


def _spread_groups(tie: primitives.Tie, ends: list[tuple[Node, int]], where: str) -> bool:
  """Spreads labels among axes that are cut into groups, as those of a grouped convolution are."""
  changed = False
  for (source, a), (target, b) in itertools.permutations(ends, 2):
    if a not in source.labels:
      continue
    labels, size = source.labels[a], target.shape[b]
    if tie.summed and (source, a) == ends[1]:
      changed |= target.put(b, np.tile(labels, tie.groups), where)
      continue
    pieces = labels.reshape(tie.groups, -1)
    alike = (pieces == pieces[:1]).all()  # the units lie in every piece
    if tie.summed and alike:
      changed |= target.put(b, pieces[0].copy(), where)
    elif not tie.summed and (pieces == pieces[:, :1]).all():
      changed |= target.put(b, np.repeat(pieces[:, 0], size // tie.groups), where)
    elif not tie.summed and not alike:
      raise ValueError(
        f"{where} is in {tie.groups} groups of {pieces.shape[1]} positions: expected every unit to"
        f" be a whole group, unit={pieces.shape[1]} (more groups), or to lie in all of them,"
        f" blocks={tie.groups} (wider ones)"
      )
  return changed


def _regroup(source: Node, ins: list[int], target: Node, outs: list[int], where: str) -> bool:
  """Spreads labels through a reshape that makes the axes `outs` of the axes `ins`."""
  changed = False
  for a in ins:
    if a not in source.labels:
      continue
    before = [source.shape[i] for i in ins]
    after = [target.shape[o] for o in outs]
    along_a = source.labels[a].reshape([-1 if i == a else 1 for i in ins])
    labels = np.broadcast_to(along_a, before).reshape(after)  # of every entry
    # A single unit has an axis of size 1; further ones are put in front of it to broadcast.
    order = list(enumerate(outs))
    for k, o in order if labels.size > 1 else order[::-1]:
      rows = np.moveaxis(labels, k, 0).reshape(after[k], -1)
      if (rows == rows[:, :1]).all() and (after[k] > 1 or labels.size == 1):
        changed |= target.put(o, rows[:, 0].copy(), where)
        break
    else:
      raise ValueError(
        f"{where} cuts {source.shape[a]} positions into {tuple(after)}: expected every unit in one"
        f" piece; say which are the units with unit={after[-1]} (whole groups are added) or"
        f" blocks={after[0]} (every group grows)"
      )
  return changed


def _cuts(operation: Operation) -> Iterator[tuple[Node | None, Node | None, int, np.ndarray]]:
  """Of a slice, split or concatenate: the whole, a part, the axis, and where it lies along it."""
  eqn, operands, results = operation.eqn, operation.operands, operation.results
  p = eqn.params
  if operation.name == "slice":
    sizes = reading.shape(eqn.outvars[0])
    strides = p["strides"] or (1,) * len(sizes)
    for axis, (start, size, step) in enumerate(
      zip(p["start_indices"], sizes, strides, strict=True)
    ):
      yield operands[0], results[0], axis, start + step * np.arange(size)
  elif operation.name in ("concatenate", "split"):
    joined = operation.name == "concatenate"
    whole, parts = (results[0], operands) if joined else (operands[0], results)
    axis = p["dimension"] if joined else p["axis"]
    lengths = [reading.shape(v)[axis] for v in (eqn.invars if joined else eqn.outvars)]
    for part, size, end in zip(parts, lengths, np.cumsum(lengths), strict=True):
      yield whole, part, axis, np.arange(end - size, end)


def _spread_to_part(whole: Node, part: Node, axis: int, at: np.ndarray, where: str) -> bool:
  """Spreads labels from an array to a part of it, and back."""
  changed = False
  if axis in part.labels:
    labels = np.full(whole.shape[axis], NO_UNIT)
    labels[at] = part.labels[axis]
    changed |= whole.put(axis, labels, where)
  if axis in whole.labels:
    changed |= part.put(axis, whole.labels[axis][at], where)
  return changed
