"""Spreads the units of a dimension through a program.

Labels, the number of the unit behind every position of an axis, pass from one axis to all that
are tied to it, forward and backward, until nothing changes.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from optax_cadence.growth._dimension import NO_UNIT
from optax_cadence.growth._program import Graph
from optax_cadence.growth._program import Node
from optax_cadence.growth._program import Operation
from optax_cadence.programs import primitives
from optax_cadence.programs import reading


def spread(graph: Graph) -> None:
  """Spreads the labels until nothing changes."""
  changed = True
  while changed:
    changed = False
    for operation in graph.operations:
      changed |= _through(operation)
    for outside, inside in graph.shifts:
      for a in range(len(inside.shape)):
        changed |= _tie([(outside, a + 1), (inside, a)], "a loop")
    for one, other in graph.same:
      for a in range(len(one.shape)):
        changed |= _tie([(one, a), (other, a)], "a branch or loop")


def _through(operation: Operation) -> bool:
  nodes = [node for node in [*operation.operands, *operation.results] if node is not None]
  if not any(node.labels for node in nodes):
    return False
  where = f"{operation.eqn.primitive.name} of shapes {[node.shape for node in nodes]}"
  found = primitives.ties(operation.eqn)
  if found is None:
    raise ValueError(
      f"the units cannot be followed through {where}; describe the dimension by hand"
    )
  changed = False
  for tie in found:
    changed |= _tie(operation.ends(tie), where)
  if operation.eqn.primitive.name == "reshape" and len(nodes) == 2:
    changed |= _reshape(nodes[0], nodes[1], where)
  for whole, part, axis, at in _parts(operation):
    if whole is not None and part is not None:
      changed |= _cut(whole, part, axis, at, where)
  return changed


def _tie(ends: list[tuple[Node, int]], where: str) -> bool:
  """Spreads among axes that run over the same units."""
  changed = False
  for (source, a), (target, b) in itertools.permutations(ends, 2):
    if a in source.labels and source.shape[a] == target.shape[b]:
      changed |= target.put(b, source.labels[a], where)
  return changed


def _reshape(source: Node, target: Node, where: str) -> bool:
  changed = False
  for ins, outs in primitives.reshape_groups(source.shape, target.shape):
    changed |= _regroup(source, ins, target, outs, where)
    changed |= _regroup(target, outs, source, ins, where)
  return changed


def _regroup(source: Node, ins: list[int], target: Node, outs: list[int], where: str) -> bool:
  changed = False
  for a in ins:
    if a not in source.labels:
      continue
    before = [source.shape[i] for i in ins]
    after = [target.shape[o] for o in outs]
    spread = [-1 if i == a else 1 for i in ins]
    whole = np.broadcast_to(source.labels[a].reshape(spread), before).reshape(after)
    for k, o in enumerate(outs):
      first = np.moveaxis(whole, k, 0).reshape(after[k], -1)
      if (first == first[:, :1]).all() and (after[k] > 1 or whole.size == 1):
        changed |= target.put(o, first[:, 0].copy(), where)
        break
    else:
      raise ValueError(
        f"{where} cuts {source.shape[a]} positions into {tuple(after)}: expected every unit in one"
        f" piece; say which are the units with unit={after[-1]} (whole groups are added) or"
        f" blocks={after[0]} (every group grows)"
      )
  return changed


def _parts(operation: Operation) -> Iterator[tuple[Node | None, Node | None, int, np.ndarray]]:
  """What an operation cuts or joins: whole, part, the axis, and where in the whole it lies."""
  eqn, operands, results, _ = operation
  p = eqn.params
  if eqn.primitive.name == "slice":
    sizes = reading.shape(eqn.outvars[0])
    strides = p["strides"] or (1,) * len(sizes)
    for axis, (start, size, step) in enumerate(
      zip(p["start_indices"], sizes, strides, strict=True)
    ):
      yield operands[0], results[0], axis, start + step * np.arange(size)
  elif eqn.primitive.name in ("concatenate", "split"):
    joined = eqn.primitive.name == "concatenate"
    whole, parts = (results[0], operands) if joined else (operands[0], results)
    axis = p["dimension"] if joined else p["axis"]
    lengths = [reading.shape(v)[axis] for v in (eqn.invars if joined else eqn.outvars)]
    for part, size, end in zip(parts, lengths, np.cumsum(lengths), strict=True):
      yield whole, part, axis, np.arange(end - size, end)


def _cut(whole: Node, part: Node, axis: int, at: np.ndarray, where: str) -> bool:
  """Spreads between an array and a part of it."""
  changed = False
  if axis in part.labels:
    labels = np.full(whole.shape[axis], NO_UNIT)
    labels[at] = part.labels[axis]
    changed |= whole.put(axis, labels, where)
  if axis in whole.labels:
    changed |= part.put(axis, whole.labels[axis][at], where)
  return changed
