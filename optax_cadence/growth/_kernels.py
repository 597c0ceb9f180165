"""Larger filters, and layers that are identities: growth that needs no coupling."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths
from optax_cadence.growth import _program
from optax_cadence.growth import _trees
from optax_cadence.growth._plan import LeafChange
from optax_cadence.growth._plan import Plan


def enlarging(
  variables: Any,
  sizes: Mapping[str, Sequence[int]],
  *,
  causal: bool = False,
  alpha: str = "alpha",
  fn: Callable[..., Any] | None = None,
  args: Sequence[Any] = (),
) -> Plan:
  """Plans larger convolution kernels: the trained taps in the middle, new ones around them.

  Args:
    variables: Tree of arrays or `jax.ShapeDtypeStruct`.
    sizes: For the path of each kernel, of shape [*spatial, in, out], its new spatial size.
    causal: Whether old taps are at the end, as padding "CAUSAL" needs it, instead of where
      "SAME" pads them.
    alpha: Path at which the gate will be.
    fn: The forward pass, to count FLOPs.
    args: Its arguments after the variables.

  Returns:
    A `Plan`.

  Raises:
    ValueError: If a kernel would become smaller, or stay as it is.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> print(growth.enlarging({"kernel": jnp.ones((3, 3, 1, 8))}, {"kernel": (5, 5)}))
  leaf    role  before   after    parameters
  kernel  taps  3x3x1x8  5x5x1x8        +128
  total                                 +128
  gate: alpha
  """
  shapes = _trees.shapes(variables)
  changes = [_taps(_trees.find(shapes, name), shapes, size, causal) for name, size in sizes.items()]
  flops = None
  if fn is not None:
    graph = _program.read(fn, variables, *args)
    growth = {c.path: math.prod(c.after or ()) / math.prod(c.before or ()) for c in changes}
    flops = graph.flops(lambda origin: growth.get(origin, 1.0))
  return Plan(tuple(changes), True, tuple(alpha.split("/")), flops)


def _taps(
  path: _paths.Path,
  shapes: Mapping[_paths.Path, tuple[int, ...]],
  size: Sequence[int],
  causal: bool,
) -> LeafChange:
  before = shapes[path]
  spatial = tuple(range(len(before) - 2))
  after = (*map(int, size), *before[-2:])
  if not spatial or len(after) != len(before):
    raise ValueError(
      f"{_paths.join(path)!r} of shape {before}: expected a kernel with as many spatial axes as"
      f" the size has numbers, found {tuple(size)}"
    )
  if any(m < n for n, m in zip(before, after, strict=True)) or after == before:
    raise ValueError(
      f"{_paths.join(path)!r} of shape {before}: expected a larger spatial size than"
      f" {before[:-2]}, found {tuple(size)}"
    )
  positions = {}
  for axis in spatial:
    n, m = before[axis], after[axis]
    start = m - n if causal else (m - 1) // 2 - (n - 1) // 2
    if m != n:
      positions[axis] = np.arange(start, start + n)
  return LeafChange(path, before, after, "taps", positions, spatial=spatial)


def deepening(
  variables: Any,
  deeper: Any,
  *,
  outgoing: Iterable[str] = (),
  alpha: str = "alpha",
  flops: tuple[int, int] | None = None,
) -> Plan:
  """Plans leaves that are new: a residual block, of which α multiplies what it ends in.

  Args:
    variables: Tree of arrays or `jax.ShapeDtypeStruct`.
    deeper: The tree with the new leaves; those of `variables` are in it unchanged in shape.
    outgoing: Paths of the new leaves, or of modules that hold them, through which the block
      adds to its residual stream: kernel and bias of its last layer, or scale and bias of
      its last norm. None: the block is the identity as it is (Net2Deeper).
    alpha: Path at which the gate will be.
    flops: Of a forward pass before and after, see `growth.flops`; shown with the plan.

  Returns:
    A `Plan`; apply it with `deeper` as the fresh values.

  Raises:
    ValueError: If nothing is new, an old leaf is missing or has another shape, or a path of
      `outgoing` is not new.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> deeper = {"head": jnp.ones(2), "block": {"kernel": jnp.ones((2, 2))}}
  >>> print(growth.deepening({"head": jnp.ones(2)}, deeper, outgoing=["block/kernel"]))
  leaf          role   before  after  parameters
  block/kernel  added  -       2x2            +4
  total                                       +4
  gate: alpha
  """
  old, new = _trees.shapes(variables), _trees.shapes(deeper)
  for path, shape in old.items():
    if new.get(path) != shape:
      raise ValueError(
        f"{_paths.join(path)!r}: expected shape {shape} in the deeper tree, found"
        f" {new.get(path, 'nothing there')}"
      )
  added = [path for path in new if path not in old]
  scaled: set[_paths.Path] = set()
  for name in outgoing:
    prefix = tuple(name.split("/"))
    under = [p for p in added if p[: len(prefix)] == prefix]
    if not under:
      raise ValueError(f"outgoing {name!r}: expected it to be new, one of {_paths.listed(added)}")
    scaled.update(under)
  if not added:
    raise ValueError("expected new leaves in the deeper tree, found none")
  changes = [LeafChange(p, None, new[p], "added", scaled=p in scaled) for p in added]
  return Plan(tuple(changes), True, tuple(alpha.split("/")), flops)


def identity_kernel(shape: Sequence[int], dtype: Any = jnp.float32) -> Any:
  """The kernel of a layer that returns its input: Net2Deeper's.

  Between a ReLU and the next layer, a layer with this kernel, no bias and a ReLU changes
  nothing, and learns from there.

  Args:
    shape: [*spatial, n, n]; dense layers have no spatial axes.
    dtype: Its dtype.

  Returns:
    Array of that shape.

  Raises:
    ValueError: If it has not as many inputs as outputs.

  References:
    Chen et al. 2015, arXiv:1511.05641.

  >>> from optax_cadence import growth
  >>> print(growth.identity_kernel((3, 2, 2))[:, 0, 0])
  [0. 1. 0.]
  """
  if len(shape) < 2 or shape[-1] != shape[-2]:
    raise ValueError(f"an identity needs as many inputs as outputs, found shape {tuple(shape)}")
  centre = tuple((n - 1) // 2 for n in shape[:-2])
  return jnp.zeros(shape, dtype).at[centre].set(jnp.eye(shape[-1], dtype=dtype))
