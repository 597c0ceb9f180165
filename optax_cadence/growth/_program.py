"""A traced program as a flat list of operations, calls and loops opened.

The values it passes on are nodes, on whose axes labels can be put: see `_spread`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from optax_cadence import _paths
from optax_cadence.growth import _trees
from optax_cadence.growth._dimension import Labels
from optax_cadence.growth._dimension import NO_UNIT
from optax_cadence.programs import primitives
from optax_cadence.programs import reading

PRODUCTS = ("dot_general", "conv_general_dilated")


@dataclasses.dataclass(eq=False)
class Node:
  """A value of the program: the labels of its axes, and the leaf it is, if it is one."""

  shape: tuple[int, ...]
  what: str = ""
  origin: _paths.Path | None = None
  fixed: bool = False
  labels: dict[int, Labels] = dataclasses.field(default_factory=dict)

  def put(self, axis: int, labels: Labels, where: str) -> bool:
    """Adds what is known of an axis; returns whether anything is new.

    Raises:
      ValueError: If a position would belong to two units.
    """
    old = self.labels.get(axis)
    if old is None:
      if (labels == NO_UNIT).all():
        return False
      if self.fixed:
        raise ValueError(
          f"{self.what} of shape {self.shape} has the units along its axis {axis} (found at"
          f" {where}): it does not grow, so expected none there; name another axis"
        )
      self.labels[axis] = labels
      return True
    if ((old != labels) & (old != NO_UNIT) & (labels != NO_UNIT)).any():
      raise ValueError(
        f"at {where}: positions along an axis of size {len(labels)} belong to two units at once"
        f" ({_shown(old)} and {_shown(labels)}); describe the units by hand, with unit= or blocks="
      )
    merged = np.where(old == NO_UNIT, labels, old)
    self.labels[axis] = merged
    return bool((merged != old).any())


def _shown(labels: Labels) -> str:
  return "[" + " ".join(map(str, labels[:6])) + (" …]" if len(labels) > 6 else "]")


class Operation(NamedTuple):
  """One operation of the flat program, run `repeat` times."""

  eqn: Any
  operands: list[Node | None]
  results: list[Node]
  repeat: int

  @property
  def flops(self) -> int:
    """Multiplications and additions, if it is a product."""
    eqn = self.eqn
    if eqn.primitive.name not in PRODUCTS:
      return 0
    left, right, result = (reading.shape(v) for v in (*eqn.invars, *eqn.outvars))
    if eqn.primitive.name == "dot_general":
      (axes, _), _ = eqn.params["dimension_numbers"]
      terms = math.prod(left[a] for a in axes)
    else:
      terms = math.prod(right) // right[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * terms * math.prod(result) * self.repeat

  def ends(self, tie: primitives.Tie) -> list[tuple[Node, int]]:
    """The axes that a tie ties."""
    pairs = [(self.operands[i], a) for i, a in tie.operands]
    pairs += [(self.results[i], a) for i, a in tie.results]
    return [(node, a) for node, a in pairs if node is not None]

  def labelled(self) -> Iterator[tuple[primitives.Tie, list[tuple[Node, int]]]]:
    """Its ties with labels, and the axes that have them."""
    for tie in primitives.ties(self.eqn) or []:
      ends = [(node, a) for node, a in self.ends(tie) if a in node.labels]
      if ends:
        yield tie, ends


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
  """The flat program.

  Attributes:
    leaves: The node of each leaf of the variables.
    outputs: The nodes of what the program returns.
    operations: In the order in which they run.
    shifts: Pairs (outside, inside) of what a loop reads or writes one slice of at a time.
    same: Pairs that stand for one value.
  """

  leaves: dict[_paths.Path, Node]
  outputs: list[Node]
  operations: list[Operation]
  shifts: list[tuple[Node, Node]]
  same: list[tuple[Node, Node]]

  def flops(self, factor: Callable[[_paths.Path], float]) -> tuple[int, int]:
    """FLOPs now, and with each product's multiplied by `factor` of the leaf that is its weight."""
    before, after = 0, 0.0
    for operation in self.operations:
      weights = [node.origin for node in operation.operands if node is not None and node.origin]
      before += operation.flops
      after += operation.flops * max(map(factor, weights), default=1.0)
    return before, round(after)


def flops(fn: Callable[..., Any], variables: Any, *args: Any, **kwargs: Any) -> int:
  """Multiplications and additions in the products of one call of `fn(variables, *args)`.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> growth.flops(lambda w, x: x @ w, jnp.ones((3, 4)), jnp.ones((5, 3)))
  120
  """
  return read(fn, variables, *args, **kwargs).flops(lambda _: 1.0)[0]


def read(fn: Callable[..., Any], variables: Any, *args: Any, **kwargs: Any) -> Graph:
  """Traces `fn` and flattens its program."""
  program, paths, _ = trace(fn, variables, *args, **kwargs)
  return flattened(program, paths)


def flattened(program: Any, paths: list[_paths.Path]) -> Graph:
  """The flat form of a traced program whose first inputs are the leaves at `paths`."""
  graph = Graph({}, [], [], [], [])
  nodes = [
    Node(reading.shape(v), f"argument {i - len(paths)}", fixed=i >= len(paths))
    for i, v in enumerate(program.jaxpr.invars)
  ]
  for path, node in zip(paths, nodes, strict=False):
    node.origin, node.what = path, repr(_paths.join(path))
    graph.leaves[path] = node
  graph.outputs.extend(_flatten(graph, program, nodes, 1))
  return graph


def trace(
  fn: Callable[..., Any], variables: Any, *args: Any, **kwargs: Any
) -> tuple[Any, list[_paths.Path], Callable[[list[Any]], Any]]:
  """Traces `fn`.

  Returns:
    Its program; the paths of its first inputs, the leaves of the variables; and a function
    that makes what `fn` returns of the program's outputs.

  Raises:
    ValueError: If it does not run on these shapes.
  """
  leaves, structure = jax.tree.flatten(variables)
  arrays, rebuild = _trees.partition_arrays((args, kwargs))

  def flat(leaves: list[Any], arrays: list[Any]) -> list[Any]:
    args, kwargs = rebuild(arrays)
    result = fn(jax.tree.unflatten(structure, leaves), *args, **kwargs)
    outputs, made[:] = _trees.partition_arrays(result)[0], [_trees.partition_arrays(result)[1]]
    return outputs

  made: list[Any] = []
  try:
    program = jax.make_jaxpr(flat)(leaves, arrays)
  except Exception as error:  # whatever the user's function, or Flax in it, raises
    given = ", ".join(f"{np.shape(x)} {x.dtype}" for x in arrays)
    raise ValueError(
      f"the forward pass does not run on {len(leaves)} variables and arguments of shapes"
      f" {given or 'none'}: {type(error).__name__}: {error}"
    ) from error
  return program, [path for path, _ in _paths.flatten_with_paths(variables)], made[0]


def _flatten(graph: Graph, program: Any, inputs: list[Any], repeat: int) -> list[Any]:
  jaxpr, _ = reading.opened(program)
  known = {v: Node(reading.shape(v), "a constant", fixed=True) for v in jaxpr.constvars}
  known.update(zip(jaxpr.invars, inputs, strict=True))

  def at(var: Any) -> Any:
    return None if reading.is_literal(var) else known[var]

  for eqn in jaxpr.eqns:
    operands = [at(v) for v in eqn.invars]
    inner = reading.called(eqn)
    if inner is not None:
      results = _flatten(graph, inner, operands, repeat)
    else:
      results = [Node(reading.shape(v)) for v in eqn.outvars]
      special = {"scan": _flatten_scan, "cond": _flatten_cond, "while": _flatten_while}
      if eqn.primitive.name in special:
        special[eqn.primitive.name](graph, eqn, operands, results, repeat)
      else:
        _inherit_origin(eqn, operands, results)
        graph.operations.append(Operation(eqn, operands, results, repeat))
    known.update(zip(eqn.outvars, results, strict=True))
  return [at(v) or Node(reading.shape(v)) for v in jaxpr.outvars]


def _inherit_origin(eqn: Any, operands: list[Any], results: list[Node]) -> None:
  moves = ("convert_element_type", "transpose", "reshape", "copy", "broadcast_in_dim", "squeeze")
  if eqn.primitive.name in moves and operands[0] is not None:
    results[0].origin = operands[0].origin


def _flatten_scan(
  graph: Graph, eqn: Any, operands: list[Any], results: list[Node], repeat: int
) -> None:
  consts, carries = reading.scan_counts(eqn)
  jaxpr, _ = reading.opened(eqn.params["jaxpr"])
  inside: list[Any] = list(operands[: consts + carries])
  for var, outside in zip(
    jaxpr.invars[consts + carries :], operands[consts + carries :], strict=True
  ):
    node = Node(reading.shape(var))
    if outside is not None:
      node.origin = outside.origin
      graph.shifts.append((outside, node))
    inside.append(node)
  out = _flatten(graph, eqn.params["jaxpr"], inside, repeat * eqn.params["length"])
  for i, (node, result) in enumerate(zip(out, results, strict=True)):
    if i >= carries:
      graph.shifts.append((result, node))
      continue
    graph.same.append((node, result))
    if operands[consts + i] is not None:
      graph.same.append((operands[consts + i], result))


def _flatten_cond(
  graph: Graph, eqn: Any, operands: list[Any], results: list[Node], repeat: int
) -> None:
  for branch in eqn.params["branches"]:
    out = _flatten(graph, branch, operands[1:], repeat)
    graph.same.extend(zip(out, results, strict=True))


def _flatten_while(
  graph: Graph, eqn: Any, operands: list[Any], results: list[Node], repeat: int
) -> None:
  head, body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
  carry = operands[head + body :]
  _flatten(graph, eqn.params["cond_jaxpr"], operands[:head] + carry, repeat)
  out = _flatten(graph, eqn.params["body_jaxpr"], operands[head : head + body] + carry, repeat)
  for before, after, result in zip(carry, out, results, strict=True):
    graph.same.append((after, result))
    if before is not None:
      graph.same.append((before, result))
