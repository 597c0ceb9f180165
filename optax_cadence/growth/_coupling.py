"""Which axes of which leaves run over the same units: read from the traced program.

A *dimension* is one set of units (neurons, channels, heads, entries of the residual
stream) with all its members: the axes of leaves that have an entry, or several, for every
unit. The program is turned into a flat list of operations; labels, the number of the unit
behind every position of an axis, spread from one axis to all that are tied to it, forward
and backward, until nothing changes (as the dependency graph of Torch-Pruning does,
arXiv:2301.12900). Nothing here changes a parameter.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from optax_cadence import _paths
from optax_cadence.growth import _ties
from optax_cadence.growth import _trees

Labels = np.ndarray
_PRODUCTS = ("dot_general", "conv_general_dilated")
_NONE = -1  # the label of a position that belongs to no unit of the dimension


class Axis(NamedTuple):
  """How an axis holds the units of a dimension: `outer` times all units, each `inner` long.

  A dense layer after the flattening of 4 × 4 pixels has `Axis(0, outer=16)`; a projection to
  heads of 8 entries that is one matrix has `Axis(-1, inner=8)`.

  Attributes:
    axis: The axis; negative ones count from the last.
    outer: How often the units repeat.
    inner: Adjacent positions that one unit has.
  """

  axis: int
  outer: int = 1
  inner: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
  """An axis of a leaf that has positions for the units of a dimension.

  Attributes:
    path: Path of the leaf.
    axis: The axis, counted from the first.
    labels: For each position along it the unit that it belongs to, or -1: int [size].
    role: "incoming" (its entries make the units), "outgoing" (they use them), "both" (a
      tied embedding), or "follows" (biases, norms, running statistics).
  """

  path: _paths.Path
  axis: int
  labels: Labels
  role: str


class Contraction(NamedTuple):
  """A matrix product or convolution: what its cost depends on.

  Attributes:
    flops: Multiplications and additions of one call, at the present size.
    shares: How the dimension enters: for each of its axes the positions in all and per unit.
  """

  flops: int
  shares: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Dimension:
  """Units that several leaves share.

  Attributes:
    size: Number of units.
    members: The axes that hold them.
    contractions: The products of the program; None where no program was read.
    folds: Whether nothing but products with weights, each used in this way alone, sums over
      the units, so that a gate can be folded into those weights.
  """

  size: int
  members: tuple[Member, ...]
  contractions: tuple[Contraction, ...] | None = None
  folds: bool = False

  def __str__(self) -> str:
    lines = [f"{self.size} units"]
    lines += [f"  {_paths.join(m.path)} axis {m.axis}: {m.role}" for m in self.members]
    return "\n".join(lines)


def dimension(variables: Any, members: Mapping[str, Any]) -> Dimension:
  """Describes by hand which axes share units.

  Args:
    variables: Tree of arrays or `jax.ShapeDtypeStruct`.
    members: For the path of each leaf its axis: an integer, an `Axis`, or a list of them.

  Returns:
    The `Dimension`; which members are outgoing is left to the program that runs them.

  Raises:
    ValueError: If a path or axis is not there, or the sizes do not agree.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
  >>> print(growth.dimension(params, {"a": -1, "b": 0}))
  4 units
    a axis 1: follows
    b axis 0: follows
  """
  shapes = _trees.shapes(variables)
  found: list[tuple[_paths.Path, Axis, int]] = []
  for name, given in members.items():
    path = _trees.find(shapes, name)
    for axis in given if isinstance(given, list) else [given]:
      axis = axis if isinstance(axis, Axis) else Axis(axis)
      found.append((path, *_units(path, shapes[path], axis)))
  sizes = {size for _, _, size in found}
  if len(sizes) != 1:
    listed = ", ".join(f"{_paths.join(p)!r} of shape {shapes[p]}: {n}" for p, _, n in found)
    raise ValueError(f"the axes of a dimension must hold as many units, found {listed}")
  made = [Member(p, a.axis, _labels(n, a), "follows") for p, a, n in found]
  return Dimension(sizes.pop(), tuple(made))


def _units(path: _paths.Path, shape: tuple[int, ...], axis: Axis) -> tuple[Axis, int]:
  number, outer, inner = axis
  if not -len(shape) <= number < len(shape):
    raise ValueError(f"{_paths.join(path)!r} of shape {shape} has no axis {number}")
  size = shape[number]
  if outer < 1 or inner < 1 or size % (outer * inner):
    raise ValueError(
      f"{_paths.join(path)!r} of shape {shape}: axis {number} of size {size} cannot hold units"
      f" {outer} times, {inner} long each"
    )
  return Axis(number % len(shape), outer, inner), size // (outer * inner)


def _labels(units: int, axis: Axis) -> Labels:
  return np.tile(np.repeat(np.arange(units), axis.inner), axis.outer)


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
  graph.spread()
  members = tuple(graph.members(given.size))
  if producer is given:
    _check_complete(given, members, shapes)
  if not graph.used():
    names = _paths.listed(m.path for m in members)
    raise ValueError(
      f"nothing uses the units of {names}: no product sums over them, so widening would change"
      " the output"
    )
  return Dimension(given.size, members, graph.contractions(), graph.folds())


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
      if (labels == _NONE).all():
        return False
      if self.fixed:
        raise ValueError(
          f"{self.what} of shape {self.shape} has the units along its axis {axis} (found at"
          f" {where}): it does not grow, so expected none there; name another axis"
        )
      self.labels[axis] = labels
      return True
    if ((old != labels) & (old != _NONE) & (labels != _NONE)).any():
      raise ValueError(
        f"at {where}: positions along an axis of size {len(labels)} belong to two units at once"
        f" ({_shown(old)} and {_shown(labels)}); describe the units by hand, with unit= or blocks="
      )
    merged = np.where(old == _NONE, labels, old)
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

  def spread(self) -> None:
    """Spreads the labels until nothing changes."""
    changed = True
    while changed:
      changed = False
      for operation in self.operations:
        changed |= _spread(operation)
      for outside, inside in self.shifts:
        changed |= _tie(
          [(outside, a + 1) for a in range(len(inside.shape))],
          [(inside, a) for a in range(len(inside.shape))],
          "a loop",
        )
      for one, other in self.same:
        changed |= _tie(
          [(one, a) for a in range(len(one.shape))],
          [(other, a) for a in range(len(one.shape))],
          "a branch or loop",
        )

  def members(self, units: int) -> list[Member]:
    """The axes of leaves that have labels."""
    roles = self._roles()
    found = []
    for path, node in self.leaves.items():
      for axis, labels in sorted(node.labels.items()):
        _check_regular(path, labels, units)
        found.append(Member(path, axis, labels, roles.get((path, axis), "follows")))
    return found

  def used(self) -> bool:
    """Whether a product sums over the units."""
    return any(
      tie.summed and any(_has(operands[i], a) for i, a in tie.operands)
      for eqn, operands, _, _ in self.operations
      if eqn.primitive.name in _PRODUCTS
      for tie in _ties.ties(eqn) or []
    )

  def folds(self) -> bool:
    """Whether only products with weights sum over the units, and those weights do no more."""
    for eqn, operands, _, _ in self.operations:
      for tie in _ties.ties(eqn) or []:
        ends = [(operands[i], a) for i, a in tie.operands]
        nodes = [node for node, a in ends if node is not None and a in node.labels]
        if tie.summed and nodes and not any(node.origin for node in nodes):
          return False
    return "both" not in self._roles().values()

  def _roles(self) -> dict[tuple[_paths.Path, int], str]:
    found: dict[tuple[_paths.Path, int], set[str]] = {}
    for eqn, operands, _, _ in self.operations:
      if eqn.primitive.name not in (*_PRODUCTS, "gather"):
        continue
      for tie in _ties.ties(eqn) or []:
        for i, axis in tie.operands:
          node = operands[i]
          if node is not None and node.origin is not None and axis in node.labels:
            role = "outgoing" if tie.summed else "incoming"
            for a in _axes_like(self.leaves[node.origin], node.labels[axis]):
              found.setdefault((node.origin, a), set()).add(role)
    return {key: roles.pop() if len(roles) == 1 else "both" for key, roles in found.items()}

  def flops(self, factor: Callable[[Any], float]) -> tuple[int, int]:
    """FLOPs now, and with each product's multiplied by `factor` of the leaf that is its weight."""
    before, after = 0, 0.0
    for eqn, operands, _, repeat in self.operations:
      flops = _flops(eqn) * repeat
      weights = [node.origin for node in operands if node is not None and node.origin]
      before += flops
      after += flops * max([factor(w) for w in weights], default=1.0)
    return before, round(after)

  def contractions(self) -> tuple[Contraction, ...]:
    """What the products cost, and how that depends on the number of units."""
    found = []
    for eqn, operands, results, repeat in self.operations:
      flops = _flops(eqn)
      if flops:
        axes = {}
        for tie in _ties.ties(eqn) or []:
          nodes = [(operands[i], a) for i, a in tie.operands] + [
            (results[i], a) for i, a in tie.results
          ]
          for node, a in nodes:
            if node is not None and a in node.labels:
              axes[tie] = (len(node.labels[a]), int((node.labels[a] == 0).sum()))
        found.append(Contraction(flops * repeat, tuple(axes.values())))
    return tuple(found)


def _has(node: Node | None, axis: int) -> bool:
  return node is not None and axis in node.labels


def _axes_like(leaf: Node, labels: Labels) -> list[int]:
  same = [a for a, own in leaf.labels.items() if len(own) == len(labels)]
  return same or list(leaf.labels)


def _check_regular(path: _paths.Path, labels: Labels, units: int) -> None:
  if units == 1 and (labels == 0).sum() > 1:
    raise ValueError(
      f"{_paths.join(path)!r} has {len(labels)} positions for a single unit: how a second one"
      " would lie among them cannot be derived; expected at least two units"
    )


def _flops(eqn: Any) -> int:
  name = eqn.primitive.name
  size = int(np.prod(_ties.shape(eqn.outvars[0]), dtype=np.int64)) if eqn.outvars else 0
  if name == "dot_general":
    (axes, _), _ = eqn.params["dimension_numbers"]
    return 2 * size * int(np.prod([_ties.shape(eqn.invars[0])[a] for a in axes], dtype=np.int64))
  if name == "conv_general_dilated":
    out = eqn.params["dimension_numbers"][1][0]
    kernel = _ties.shape(eqn.invars[1])
    return 2 * size * int(np.prod(kernel, dtype=np.int64)) // kernel[out]
  return 0


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
    Node(_ties.shape(v), f"argument {i - len(paths)}", fixed=i >= len(paths))
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
  """
  leaves, structure = jax.tree.flatten(variables)
  arrays, rebuild = _trees.partition_arrays((args, kwargs))

  def flat(leaves: list[Any], arrays: list[Any]) -> list[Any]:
    args, kwargs = rebuild(arrays)
    result = fn(jax.tree.unflatten(structure, leaves), *args, **kwargs)
    outputs, made[:] = _trees.partition_arrays(result)[0], [_trees.partition_arrays(result)[1]]
    return outputs

  made: list[Any] = []
  program = jax.make_jaxpr(flat)(leaves, arrays)
  return program, [path for path, _ in _paths.flatten_with_paths(variables)], made[0]


def _flatten(graph: Graph, program: Any, inputs: list[Any], repeat: int) -> list[Any]:
  jaxpr, _ = _ties.opened(program)
  known = {v: Node(_ties.shape(v), "a constant", fixed=True) for v in jaxpr.constvars}
  known.update(zip(jaxpr.invars, inputs, strict=True))

  def at(var: Any) -> Any:
    return None if _ties.is_literal(var) else known[var]

  for eqn in jaxpr.eqns:
    operands = [at(v) for v in eqn.invars]
    inner = _ties.inlined(eqn)
    if inner is not None:
      results = _flatten(graph, inner, operands, repeat)
    else:
      results = [Node(_ties.shape(v)) for v in eqn.outvars]
      special = {"scan": _flatten_scan, "cond": _flatten_cond, "while": _flatten_while}
      if eqn.primitive.name in special:
        special[eqn.primitive.name](graph, eqn, operands, results, repeat)
      else:
        _inherit_origin(eqn, operands, results)
        graph.operations.append(Operation(eqn, operands, results, repeat))
    known.update(zip(eqn.outvars, results, strict=True))
  return [at(v) or Node(_ties.shape(v)) for v in jaxpr.outvars]


def _inherit_origin(eqn: Any, operands: list[Any], results: list[Node]) -> None:
  moves = ("convert_element_type", "transpose", "reshape", "copy", "broadcast_in_dim", "squeeze")
  if eqn.primitive.name in moves and operands[0] is not None:
    results[0].origin = operands[0].origin


def _flatten_scan(
  graph: Graph, eqn: Any, operands: list[Any], results: list[Node], repeat: int
) -> None:
  consts, carries = _ties.scan_counts(eqn)
  jaxpr, _ = _ties.opened(eqn.params["jaxpr"])
  inside: list[Any] = list(operands[: consts + carries])
  for var, outside in zip(
    jaxpr.invars[consts + carries :], operands[consts + carries :], strict=True
  ):
    node = Node(_ties.shape(var))
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


def _spread(operation: Operation) -> bool:
  eqn, operands, results, _ = operation
  if not any(node is not None and node.labels for node in [*operands, *results]):
    return False
  where = f"{eqn.primitive.name} of shapes {[n.shape for n in [*operands, *results] if n]}"
  found = _ties.ties(eqn)
  if found is None:
    raise ValueError(
      f"the units cannot be followed through {where}; describe the dimension by hand"
    )
  changed = False
  for tie in found:
    ends = [(operands[i], a) for i, a in tie.operands] + [(results[i], a) for i, a in tie.results]
    known = [(node, a) for node, a in ends if node is not None]
    changed |= _tie(known, known, where)
  rule = {"reshape": _spread_reshape, "concatenate": _spread_concatenate, "split": _spread_split}
  if eqn.primitive.name in rule:
    changed |= rule[eqn.primitive.name](operation, where)
  elif eqn.primitive.name == "slice":
    changed |= _spread_slice(operation, where)
  return changed


def _tie(ones: list[tuple[Node, int]], others: list[tuple[Node, int]], where: str) -> bool:
  """Spreads among all ends (if the lists are one) or pairwise between two lists."""
  changed = False
  pairs = (
    [(a, b) for a in ones for b in ones if a is not b]
    if ones is others
    else [pair for a, b in zip(ones, others, strict=True) for pair in ((a, b), (b, a))]
  )
  for (source, a), (target, b) in pairs:
    if a in source.labels and source.shape[a] == target.shape[b]:
      changed |= target.put(b, source.labels[a], where)
  return changed


def _spread_reshape(operation: Operation, where: str) -> bool:
  source, target = operation.operands[0], operation.results[0]
  if source is None:
    return False
  changed = False
  for ins, outs in _ties.reshape_groups(source.shape, target.shape):
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


def _spread_concatenate(operation: Operation, where: str) -> bool:
  axis, out = operation.eqn.params["dimension"], operation.results[0]
  sizes = [_ties.shape(v)[axis] for v in operation.eqn.invars]
  return _parts(out, operation.operands, sizes, axis, where)


def _spread_split(operation: Operation, where: str) -> bool:
  whole = operation.operands[0]
  params = operation.eqn.params
  if whole is None:
    return False
  return _parts(whole, operation.results, params["sizes"], params["axis"], where)


def _parts(whole: Node, parts: Sequence[Node | None], sizes: Any, axis: int, where: str) -> bool:
  changed, ends = False, np.cumsum(sizes)
  for part, size, end in zip(parts, sizes, ends, strict=True):
    if part is None:
      continue
    if axis in part.labels:
      labels = np.full(whole.shape[axis], _NONE)
      labels[end - size : end] = part.labels[axis]
      changed |= whole.put(axis, labels, where)
    if axis in whole.labels:
      changed |= part.put(axis, whole.labels[axis][end - size : end], where)
  return changed


def _spread_slice(operation: Operation, where: str) -> bool:
  source, target, p = operation.operands[0], operation.results[0], operation.eqn.params
  if source is None:
    return False
  changed = False
  for axis, (start, size) in enumerate(zip(p["start_indices"], target.shape, strict=True)):
    stride = (p["strides"] or (1,) * len(target.shape))[axis]
    at = start + stride * np.arange(size)
    if axis in source.labels:
      changed |= target.put(axis, source.labels[axis][at], where)
    if axis in target.labels:
      labels = np.full(source.shape[axis], _NONE)
      labels[at] = target.labels[axis]
      changed |= source.put(axis, labels, where)
  return changed
