"""A traced program as a flat list of operations, in which calls and loops are opened.

The values between operations are nodes. `_couple` puts labels on their axes to find out which
axes grow together; the products among the operations give the FLOPs of a forward pass.
"""

import collections
import dataclasses
import functools
import itertools
import math
import sys
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


class FixedAxisError(ValueError):
  """Units were followed to an axis that cannot grow: of an argument, or of a constant."""


@dataclasses.dataclass(eq=False)
class Node:
  """A value of the program.

  Attributes:
    shape: Its shape.
    what: What it is called in errors.
    origin: Path of the leaf of the variables whose entries it holds, if it is one.
    fixed: Whether it cannot grow, as arguments and constants cannot.
    labels: For each axis that has units, the unit of every position along it.
  """

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
        raise FixedAxisError(
          f"{self.what} of shape {self.shape} has the units along its axis {axis} (found at"
          f" {where}): it does not grow, so expected none there; name another axis, or pass it"
          " among the variables"
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
  """One operation of the flat program.

  Attributes:
    eqn: The operation as it stands in the program.
    operands: A node for each operand; None for a scalar constant.
    results: A node for each result.
    repeat: How often it runs, more than once inside a scan.
    at: Where it stands: its number in its program, after those of what that program is inside.
  """

  eqn: Any
  operands: list[Node | None]
  results: list[Node]
  repeat: int
  at: tuple[int, ...]

  @property
  def name(self) -> str:
    """The name of its primitive."""
    return self.eqn.primitive.name

  @property
  def nodes(self) -> list[Node]:
    """Its operands and results."""
    return [node for node in (*self.operands, *self.results) if node is not None]

  @property
  def where(self) -> str:
    """What it is called in errors."""
    return f"{self.name} of shapes {[node.shape for node in self.nodes]}"

  @property
  def flops(self) -> int:
    """Multiplications and additions, if it is a product."""
    if self.name not in primitives.PRODUCTS:
      return 0
    left, right, result = (reading.shape(v) for v in (*self.eqn.invars, *self.eqn.outvars))
    numbers = self.eqn.params["dimension_numbers"]
    if self.name == "dot_general":
      terms = math.prod(left[a] for a in numbers[0][0])
    else:
      terms = math.prod(right) // right[numbers.rhs_spec[0]]
    return 2 * terms * math.prod(result) * self.repeat

  def ends(self, tie: primitives.Tie) -> list[tuple[Node, int]]:
    """The axes that a tie ties."""
    pairs = [(self.operands[i], a) for i, a in tie.operands]
    pairs += [(self.results[i], a) for i, a in tie.results]
    return [(node, a) for node, a in pairs if node is not None]

  def labelled(self) -> Iterator[tuple[primitives.Tie, list[tuple[Node, int]]]]:
    """Its ties that have labels, and the axes that have them."""
    ties = primitives.ties(self.eqn) or []
    for groups in [tie for tie in ties if tie.groups > 1 and not tie.summed]:
      # The units are groups, or they lie in every group.
      whole = all(self._in_pieces(groups.groups, *end) for end in self.ends(groups))
      ties = primitives.of_groups(ties, whole)
    for tie in ties:
      ends = [(node, a) for node, a in self.ends(tie) if a in node.labels]
      if ends:
        yield tie, ends

  @staticmethod
  def _in_pieces(groups: int, node: Node, axis: int) -> bool:
    """Whether the units along an axis are whole pieces of it."""
    if axis not in node.labels:
      return False
    pieces = node.labels[axis].reshape(groups, -1)
    return bool((pieces == pieces[:, :1]).all())


class Pair(NamedTuple):
  """Two nodes of which one lies in the other.

  Attributes:
    outer: What has all axes.
    inner: The same, or a slice of it that a loop reads or writes.
    shift: How many axes the outer one has in front of those of the inner one.
  """

  outer: Node
  inner: Node
  shift: int

  @property
  def nodes(self) -> list[Node]:
    """Both."""
    return [self.outer, self.inner]

  @property
  def where(self) -> str:
    """What it is called in errors."""
    return "a loop" if self.shift else "a branch or loop"


class Graph:
  """The flat form of a traced program.

  Attributes:
    leaves: The node of each leaf of the variables.
    outputs: The nodes of what the program returns.
    output_paths: Where each of them stands in it.
    operations: In the order in which they run.
    slices: Pairs of what a scan reads or writes one slice of at a time.
    same: Pairs that stand for one value.
  """

  def __init__(self, traced: "Traced"):
    """Flattens a program."""
    program, paths, self.output_paths = traced.program, traced.paths, traced.outputs
    self.operations: list[Operation] = []
    self.slices: list[Pair] = []
    self.same: list[Pair] = []
    shapes = [reading.shape(var) for var in reading.opened(program)[0].invars]
    named = zip(paths, shapes, strict=False)  # the arguments come after the leaves
    nodes = [Node(shape, repr(_paths.join(path)), path) for path, shape in named]
    self.leaves = dict(zip(paths, nodes, strict=True))
    arguments = enumerate(shapes[len(paths) :])
    nodes += [Node(shape, f"argument {i}", fixed=True) for i, shape in arguments]
    self.outputs = [node or Node(()) for node in self._flatten(program, nodes, 1, ())]

  def flops(self, factor: Callable[[_paths.Path], float] = lambda path: 1.0) -> tuple[int, int]:
    """FLOPs now, and with each product's multiplied by `factor` of the leaf that is its weight."""
    before, after = 0, 0.0
    for operation in self.operations:
      weights = [node.origin for node in operation.operands if node is not None and node.origin]
      before += operation.flops
      after += operation.flops * max(map(factor, weights), default=1.0)
    return before, round(after)

  @functools.cached_property
  def links(self) -> list[Operation | Pair]:
    """All that ties axes of some nodes to each other, in the order in which it is looked at."""
    return [*self.operations, *self.slices, *self.same]

  @functools.cached_property
  def links_of(self) -> dict[int, list[int]]:
    """For the id of each node the numbers of the links that have it."""
    found: dict[int, list[int]] = collections.defaultdict(list)
    for i, link in enumerate(self.links):
      for node in {id(node) for node in link.nodes}:
        found[node].append(i)
    return found

  @functools.cached_property
  def maker_of(self) -> dict[int, Operation]:
    """For the id of each node that is a result the operation."""
    return {id(node): operation for operation in self.operations for node in operation.results}

  def labelled(self) -> list[Node]:
    """The nodes that have labels."""
    return [node for node in self._nodes.values() if node.labels]

  def clear(self) -> None:
    """Takes all labels off."""
    for node in self.labelled():
      node.labels.clear()

  @functools.cached_property
  def _nodes(self) -> dict[int, Node]:
    return {id(node): node for link in self.links for node in link.nodes}

  def _flatten(
    self, program: Any, inputs: list[Any], repeat: int, at: tuple[int, ...]
  ) -> list[Any]:
    """The nodes of a program's results; adds its operations, which run `repeat` times."""
    numbers = itertools.count()

    def operation(eqns: reading.Eqns, operands: list[Any]) -> list[Any]:
      (eqn,), here = eqns, (*at, next(numbers))
      if reading.is_empty(eqn):
        return [Node(reading.shape(v)) for v in eqn.outvars]
      name, inner = eqn.primitive.name, reading.called(eqn)
      if inner is not None:
        return self._flatten(inner, operands, repeat, here)
      if name == "custom_linear_solve":
        inner, taken = reading.solver(eqn)
        return self._flatten(inner, [operands[i] for i in taken], repeat, here)
      results = [Node(reading.shape(v)) for v in eqn.outvars]
      if name == "scan":
        self._flatten_scan(eqn, operands, results, repeat, here)
      elif name == "cond":
        for i, branch in enumerate(eqn.params["branches"]):
          self._add_same(self._flatten(branch, operands[1:], repeat, (*here, i)), results)
      elif name == "while":
        self._flatten_while(eqn, operands, results, repeat, here)
      else:
        if name in primitives.REARRANGEMENTS and operands[0] is not None:
          results[0].origin = operands[0].origin
        self.operations.append(Operation(eqn, operands, results, repeat, here))
      return results

    def constant(numbers: tuple[Any, ...]) -> Node | None:
      shape = np.shape(numbers[0])
      return Node(shape, "a constant", fixed=0 not in shape) if shape else None

    return reading.walk([program], inputs, operation, constant)

  def _flatten_scan(
    self, eqn: Any, operands: list[Any], results: list[Node], repeat: int, at: tuple[int, ...]
  ) -> None:
    consts, carry, xs = reading.scan_operands(eqn, operands)
    slices = [Node(x.shape[1:], origin=x.origin) for x in xs]
    self.slices += [Pair(x, node, 1) for x, node in zip(xs, slices, strict=True)]
    inside, times = [*consts, *carry, *slices], repeat * eqn.params["length"]
    outputs, n = self._flatten(eqn.params["jaxpr"], inside, times, at), len(carry)
    self._add_same(outputs[:n], results[:n])
    self._add_same(carry, results[:n])
    pairs = zip(results[n:], outputs[n:], strict=True)
    self.slices += [Pair(result, node, 1) for result, node in pairs if node is not None]

  def _flatten_while(
    self, eqn: Any, operands: list[Any], results: list[Node], repeat: int, at: tuple[int, ...]
  ) -> None:
    of_head, of_body, carry = reading.while_operands(eqn, operands)
    self._flatten(eqn.params["cond_jaxpr"], of_head + carry, repeat, (*at, 0))
    outputs = self._flatten(eqn.params["body_jaxpr"], of_body + carry, repeat, (*at, 1))
    self._add_same(outputs, results)
    self._add_same(carry, results)

  def _add_same(self, nodes: list[Any], others: list[Node]) -> None:
    pairs = zip(nodes, others, strict=True)
    self.same += [Pair(node, other, 0) for node, other in pairs if node is not None]


def flops(fn: Callable[..., Any], variables: Any, *args: Any, **kwargs: Any) -> int:
  """Multiplications and additions in the products of one call of `fn(variables, *args)`.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> growth.flops(lambda w, x: x @ w, jnp.ones((3, 4)), jnp.ones((5, 3)))
  120
  """
  return read(fn, variables, *args, **kwargs).flops()[0]


def read(fn: Callable[..., Any], variables: Any, *args: Any, **kwargs: Any) -> Graph:
  """Traces `fn` and flattens its program."""
  return Graph(trace(fn, variables, *args, **kwargs))


class Traced(NamedTuple):
  """A traced function.

  Attributes:
    program: Its program.
    paths: Paths of the program's first arguments, the leaves of the variables.
    arrays: The arrays among its further arguments, which are the rest of the program's.
    rebuild: A function that turns the program's outputs into what the function returns.
    outputs: Where each of those outputs stands in it.
  """

  program: Any
  paths: list[_paths.Path]
  arrays: list[Any]
  rebuild: Callable[[list[Any]], Any]
  outputs: list[_paths.Path]


def trace(fn: Callable[..., Any], variables: Any, *args: Any, **kwargs: Any) -> Traced:
  """Traces `fn(variables, *args, **kwargs)`.

  Raises:
    ValueError: If it does not run on these shapes.
  """
  leaves, structure = jax.tree.flatten(variables)
  arrays, rebuild = _trees.partition_arrays((args, kwargs))
  rebuilds: list[tuple[Callable[[list[Any]], Any], list[_paths.Path]]] = []

  def flat(leaves: list[Any], arrays: list[Any]) -> list[Any]:
    args, kwargs = rebuild(arrays)
    result = fn(jax.tree.unflatten(structure, leaves), *args, **kwargs)
    outputs, rebuild_result = _trees.partition_arrays(result)
    at = [path for path, x in _paths.flatten_with_paths(result) if _trees.is_array(x)]
    rebuilds.append((rebuild_result, at))
    return outputs

  try:
    program = jax.make_jaxpr(flat)(leaves, arrays)
  except _forward_errors() as error:
    given = ", ".join(f"{np.shape(x)} {x.dtype}" for x in arrays)
    raise ValueError(
      f"the forward pass does not run on {len(leaves)} variables and arguments of shapes"
      f" {given or 'none'}: {type(error).__name__}: {error}"
    ) from error
  paths = [path for path, _ in _paths.flatten_with_paths(variables)]
  return Traced(program, paths, arrays, *rebuilds[-1])


def _forward_errors() -> tuple[type[Exception], ...]:
  """What a forward pass raises that does not fit its arguments.

  Flax's errors have no base of Python's own; they are known only where Flax is imported.
  """
  flax = sys.modules.get("flax.errors")
  errors = (ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError)
  return (*errors, TypeError, ValueError, *([flax.FlaxError] if flax is not None else []))
