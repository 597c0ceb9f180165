"""Which leaves are kernels, and what each of their axes is for, read from the traced program.

The program of the forward pass is walked, and of every value is known whether it depends on the
data; if not, of which leaves it is made, and which of their axes run along each of its own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from optax_cadence import _paths
from optax_cadence.programs import primitives
from optax_cadence.programs import reading


class Kernel(NamedTuple):
  """The axes of a leaf that is multiplied with data, by what the product does with them.

  Attributes:
    contraction: The axes that the product sums over: inputs.
    output: The axes that are in its result: outputs. Those in neither are spatial, or stacked.
    stacked: Whether axis 0 holds a stack of such kernels, as `nn.scan` and `nn.vmap` make it.
  """

  contraction: tuple[int, ...]
  output: tuple[int, ...]
  stacked: bool = False


class Kernels(dict[str, Kernel]):
  """The kernels of a program by their `/`-joined path: what `kernels` returns.

  It is a `where` of `prune`, which then also knows which leaves hold layers that are stacked.
  """

  def __repr__(self) -> str:
    return f"Kernels({super().__repr__()})"

  def __call__(self, path: str, param: Any) -> bool:
    """Whether a leaf is a kernel."""
    del param
    return path in self

  def stacked(self, path: str, param: Any) -> bool:
    """Whether a leaf is a kernel that holds layers stacked on axis 0."""
    del param
    return path in self and self[path].stacked


def kernels(fn: Callable[..., Any], params: Any, *args: Any) -> Kernels:
  r"""The leaves that enter a product or convolution with data, read from a traced program.

  The program that `fn(params, *args)` traces is read, not run. Names play no part. Data is what is
  computed from `args`. What is computed from parameters and constants alone (casts, reshapes,
  weight normalization, a constant mask, :math:`W + AB`) still is a weight: a leaf counts by the
  axes that it has in the product in the end. An embedding that is looked up is no kernel; one
  that is also multiplied with, to get logits, is. Of a leaf that is used in several ways the first
  counts.

  Args:
    fn: The forward pass; it may return any tree.
    params: Tree of arrays or `jax.ShapeDtypeStruct`.
    *args: Further arguments of `fn`, trees of arrays or `jax.ShapeDtypeStruct`. They are data:
      let `fn` close over flags and masks.

  Returns:
    A mapping from the path of each of them to a `Kernel`, its axes; it is a `where` of `prune`.

  >>> import jax.numpy as jnp, optax_cadence as oc
  >>> from optax_cadence import pruning
  >>> params = {"query": jnp.ones((8, 2, 4)), "scale": jnp.ones((1, 8)), "table": jnp.ones((9, 8))}
  >>> def fn(p, ids):
  ...   return jnp.einsum("bd,dhk->bhk", p["table"][ids] * p["scale"], p["query"])
  >>> found = pruning.kernels(fn, params, jnp.arange(3))
  >>> found
  Kernels({'query': Kernel(contraction=(0,), output=(1, 2), stacked=False)})
  >>> tx = oc.prune(0.5, every=1, where=found)
  """
  names = _paths.names(path for path, _ in _paths.flatten_with_paths(params))
  found = _read(fn, params, *args)
  return Kernels({name: found[i] for i, name in enumerate(names) if i in found})


def contraction_axes(fn: Callable[..., Any], params: Any, *args: Any) -> Any:
  """The axes of every leaf that products sum over, for the `axis` of `NM`.

  Hardware that multiplies with N of M weights wants its groups along them: axis -2 of the kernel
  of a dense layer or convolution, axis 0 of that of queries (d, heads, k), and axes (0, 1) of
  the output projection of attention.

  Args:
    fn: The forward pass, as in `kernels`.
    params: Tree of arrays or `jax.ShapeDtypeStruct`.
    *args: Further arguments of `fn`.

  Returns:
    A tree like `params` with a tuple of axes for each leaf, empty for one that is no kernel.

  >>> import jax, jax.numpy as jnp, optax_cadence as oc
  >>> from optax_cadence import pruning
  >>> params = {"out": jnp.ones((2, 4, 8)), "bias": jnp.ones(8)}
  >>> def fn(p, x):
  ...   return jnp.einsum("bhk,hkd->bd", x, p["out"]) + p["bias"][None]
  >>> axes = pruning.contraction_axes(fn, params, jnp.ones((3, 2, 4)))
  >>> axes
  {'bias': (), 'out': (0, 1)}
  >>> tx = oc.prune(every=1, structure=pruning.NM(2, 4, axis=axes))
  """
  leaves, structure = jax.tree.flatten(params)
  found = _read(fn, params, *args)
  axes = [found[i].contraction if i in found else () for i in range(len(leaves))]
  return jax.tree.unflatten(structure, axes)


def _read(fn: Callable[..., Any], params: Any, *args: Any) -> dict[int, Kernel]:
  """The kernels by the position of the leaf."""
  program = reading.trace(fn, params, *args)
  shapes = [jax.numpy.shape(leaf) for leaf in jax.tree.leaves(params)]
  weights = [
    _Value(False, {i: tuple(frozenset([a]) for a in range(len(shape)))})
    for i, shape in enumerate(shapes)
  ]
  data = [_DATA] * (len(program.jaxpr.invars) - len(weights))
  reader = _Reader(shapes)
  reader.run(program, weights + data)
  found = {**reader.among_weights, **reader.with_data}
  for leaf, inner in reader.among_weights.items():
    # In x @ (a @ b), what the inner product sums over is the output of a.
    kernel = found[leaf]
    output = {*kernel.output, *inner.contraction}.difference(kernel.contraction)
    found[leaf] = kernel._replace(output=tuple(sorted(output)))
  return found


# For each axis of a value the axes of a leaf that run along it.
Axes = tuple[frozenset[int], ...]


class _Value(NamedTuple):
  """What is known of a variable.

  Attributes:
    data: Whether it depends on data.
    leaves: If not, the leaves of which it is made, each with its axes; a constant has none.
  """

  data: bool
  leaves: Mapping[int, Axes]


_DATA = _Value(True, {})
_CONSTANT = _Value(False, {})


class _Reader(reading.Reader):
  """Reads a program and collects the kernels, by the position of the leaf.

  Attributes:
    shapes: The shape of each leaf.
    with_data: Those that are multiplied with data.
    among_weights: Those that are multiplied with other weights, as the factors of a low rank are.
  """

  def __init__(self, shapes: list[tuple[int, ...]]) -> None:
    self.shapes = shapes
    self.with_data: dict[int, Kernel] = {}
    self.among_weights: dict[int, Kernel] = {}

  def constant(self, numbers: tuple[Any, ...]) -> _Value:
    return _CONSTANT

  def operation(self, eqn: Any, inputs: list[_Value]) -> list[_Value]:
    product = primitives.product(eqn)
    if product is not None:
      self._note(product, inputs)
    if any(value.data for value in inputs):
      return [_DATA] * len(eqn.outvars)
    if product is not None and not all(value.leaves for value in inputs[:2]):
      # A weight times a constant matrix is a layer on that constant.
      return [_DATA if any(value.leaves for value in inputs) else _CONSTANT]
    return [_passed_on(eqn, inputs, i) for i in range(len(eqn.outvars))]

  def _note(self, product: primitives.Product, inputs: list[_Value]) -> None:
    """Notes which leaves are the weights in a product."""
    for side in (0, 1):
      value, other = inputs[side], inputs[1 - side]
      # A factor or shift along some axes, as of a norm, is no kernel.
      most = max((_count(axes) for axes in value.leaves.values()), default=0)
      for leaf, axes in value.leaves.items():
        along = [_union(axes[a] for a in where[side]) for where in product]
        summed, batched, free = along
        if not summed or _count(axes) < most:
          continue
        at_axis_0 = self.shapes[leaf][0] > 1 and 0 not in _union(axes)
        kernel = Kernel(
          tuple(sorted(summed)), tuple(sorted(free - summed)), 0 in batched or at_axis_0
        )
        found = self.among_weights if other.leaves else self.with_data
        found.setdefault(leaf, kernel)

  def joined(self, values: Sequence[_Value]) -> _Value:
    """What is known of a variable that is one of several values."""
    if any(value.data for value in values):
      return _DATA
    leaves: dict[int, Axes] = {}
    for value in values:
      for leaf, axes in value.leaves.items():
        leaves[leaf] = _merged(leaves.get(leaf, axes), axes)
    return _Value(False, leaves)

  def sliced(self, value: _Value) -> _Value:
    return _Value(value.data, {i: axes[1:] for i, axes in value.leaves.items()})

  def stacked(self, value: _Value) -> _Value:
    nowhere: frozenset[int] = frozenset()
    return _Value(value.data, {i: (nowhere, *axes) for i, axes in value.leaves.items()})

  def loop(self, step: Callable[..., list[_Value]], carry: list[_Value]) -> list[_Value]:
    """Runs the body until an iteration tells nothing new of what is carried."""
    while True:
      outputs = step(carry)
      joined = [self.joined(pair) for pair in zip(carry, outputs[: len(carry)], strict=True)]
      if joined == carry:
        return outputs
      carry = joined


def _passed_on(eqn: Any, inputs: list[_Value], result: int) -> _Value:
  """What is known of a result of an operation on weights and constants."""
  shape = reading.shape(eqn.outvars[result])
  leaves: dict[int, Axes] = {}
  for operand, value in enumerate(inputs):
    if value.leaves:
      sources = _sources(eqn, operand, result)
      for leaf, axes in value.leaves.items():
        moved = tuple(_union(axes[a] for a in sources[r]) for r in range(len(shape)))
        leaves[leaf] = _merged(leaves.get(leaf, moved), moved)
  covered = [any(axes[r] for axes in leaves.values()) for r in range(len(shape))]
  constants = any(
    not value.leaves and reading.shape(v) for value, v in zip(inputs, eqn.invars, strict=True)
  )
  if constants and any(n > 1 and not c for n, c in zip(shape, covered, strict=True)):
    # A constant array that weights only scale: what it is multiplied with is a layer on it.
    return _DATA if leaves else _CONSTANT
  return _Value(False, leaves)


def _sources(eqn: Any, operand: int, result: int) -> list[list[int]]:
  """For each axis of a result, the axes of an operand that run along it."""
  source, target = reading.shape(eqn.invars[operand]), reading.shape(eqn.outvars[result])
  sources: list[list[int]] = [[] for _ in target]
  if eqn.primitive.name == "reshape":
    for ins, outs in primitives.reshape_groups(source, target):
      for r in outs:
        sources[r] += ins
  elif eqn.primitive.name in primitives.PARTS and len(source) == len(target):
    for axis, (before, after) in enumerate(zip(source, target, strict=True)):
      if after > 1 or before == 1:
        sources[axis].append(axis)
  else:
    for tie in primitives.ties(eqn) or []:
      axes = [a for i, a in tie.operands if i == operand]
      # What is repeated along an axis, its own being of size 1, does not run along it.
      for r in [r for i, r in tie.results if i == result]:
        sources[r] += [a for a in axes if source[a] == target[r]]
  return sources


def _merged(axes: Axes, others: Axes) -> Axes:
  """For each axis of a value, all axes of a leaf that run along it in one way or the other."""
  return tuple(a | b for a, b in zip(axes, others, strict=True))


def _union(sets: Iterable[frozenset[int]]) -> frozenset[int]:
  return frozenset().union(*sets)


def _count(axes: Axes) -> int:
  """How many axes of a value a leaf runs along."""
  return sum(map(bool, axes))
