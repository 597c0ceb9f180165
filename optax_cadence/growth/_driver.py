"""What `nnx` and `linen` share: from a network and a wish to grown variables and their plan.

An edge says what its network is (`Network`), and puts the result back where it belongs: into the
live model, or beside a forward pass that goes through the gate. The arguments of both edges that
have a name from here mean what is said here.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths
from optax_cadence.growth import _couple
from optax_cadence.growth import _gate
from optax_cadence.growth import _graph
from optax_cadence.growth import _heads
from optax_cadence.growth import _planners
from optax_cadence.growth import _trees
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._plan import Plan


class Network(NamedTuple):
  """A network as a function of its variables.

  Attributes:
    forward: `forward(variables, *inputs, **settings)`.
    variables: Nested mapping of arrays.
    inputs: What the network is called with, arrays or `jax.ShapeDtypeStruct`s; empty if that is
      not known.
    settings: Further arguments of the forward pass.
    alpha: Path of the gate.
    init: A function that gives fresh values for new entries, as for `Plan.apply`.
    output: Where the network's output stands in what `forward` returns.
  """

  forward: Callable[..., Any]
  variables: Any
  inputs: Sequence[Any] = ()
  settings: Mapping[str, Any] = {}
  alpha: str = "alpha"
  init: Callable[[], Any] = dict
  output: _paths.Path = ()

  def kernel(self, layer: _paths.Path) -> str:
    """The path of a layer's kernel, or embedding."""
    return _paths.join(_trees.kernel(self.variables, layer))

  def flops(self) -> int:
    """FLOPs of a forward pass."""
    return _graph.flops(self.forward, self.variables, *self.inputs, **self.settings)


class Grown(NamedTuple):
  """A network's variables after a growth, the gate among them, and the plan."""

  variables: Any
  plan: Plan


def couple(network: Network, producer: str | Dimension, **kwargs: Any) -> Dimension:
  """As `growth.couple`, whose further arguments `kwargs` are."""
  settings = {**network.settings, **kwargs}
  units = _couple.couple(
    network.forward, network.variables, *network.inputs, producer=producer, **settings
  )
  n = len(network.output)
  outputs = (o._replace(path=o.path[n:]) for o in units.outputs if o.path[:n] == network.output)
  return dataclasses.replace(units, outputs=tuple(outputs))


def widen(
  network: Network,
  producer: str | Dimension,
  by: int,
  *,
  axis: int = -1,
  unit: int = 1,
  blocks: int = 1,
  fresh: Any = None,
  alpha: float = 0.0,
) -> Grown:
  """More units.

  Args:
    network: The network.
    producer: Path of the kernel (or embedding) that makes the units, or a `Dimension`, which is
      checked if there are inputs.
    by: Number of new units.
    axis: The axis of the producer's kernel that holds the units.
    unit: Adjacent positions that make one unit.
    blocks: How often the units repeat along the axis: for the groups of a norm that grow.
    fresh: Where new entries come from, as for `Plan.apply`; by default from `network.init`.
    alpha: Value of the gate.
  """
  if network.inputs:
    units = couple(network, producer, axis=axis, unit=unit, blocks=blocks)
  elif isinstance(producer, Dimension):
    units = producer
  else:
    raise ValueError("widen needs inputs, to find what reads the units, or consumers=[...]")
  plan = _planners.widening(network.variables, units, by, alpha=network.alpha)
  return grow(network, plan, fresh, alpha)


def enlarge(
  network: Network,
  conv: str,
  kernel_size: Sequence[int],
  *,
  causal: bool = False,
  fresh: Any = None,
  alpha: float = 0.0,
) -> Grown:
  """A larger kernel.

  Args:
    network: The network.
    conv: Path of the kernel.
    kernel_size: Its new spatial size.
    causal: Whether its padding is "CAUSAL": old taps are then the last ones.
    fresh: See `widen`.
    alpha: See `widen`.
  """
  plan = _planners.enlarging(
    network.variables,
    {conv: kernel_size},
    causal=causal,
    alpha=network.alpha,
    fn=functools.partial(network.forward, **network.settings) if network.inputs else None,
    args=network.inputs,
  )
  return grow(network, plan, fresh, alpha)


def deepen(
  network: Network,
  deeper: Network,
  *,
  outgoing: Iterable[str] = (),
  moved: Mapping[str, str] | None = None,
  alpha: float = 0.0,
) -> Grown:
  """More layers.

  Args:
    network: The network.
    deeper: The network with the new layers, whose variables have the fresh values.
    outgoing: Paths of the new layers, or leaves, that α multiplies: the last of a residual
      block, or the norm it ends in. None: they are the identity as they are (Net2Deeper).
    moved: From old paths to new ones, as for `growth.deepening`.
    alpha: Value of the gate.
  """
  flops = (network.flops(), deeper.flops()) if network.inputs else None
  plan = _planners.deepening(
    network.variables,
    deeper.variables,
    outgoing=outgoing,
    moved=moved,
    alpha=network.alpha,
    flops=flops,
  )
  return grow(network, plan, deeper.variables, alpha)


def grow(network: Network, plan: Plan, fresh: Any = None, alpha: float = 0.0) -> Grown:
  """Applies a plan; `fresh` and `alpha` as in `widen`."""
  fresh = network.init() if fresh is None else fresh
  return Grown(plan.apply(network.variables, fresh, alpha=alpha), plan)


def check_runs(network: Network, name: str) -> None:
  """Raises `ValueError` unless a network runs at its new size, if it is known on what."""
  if not network.inputs:
    return
  try:
    _graph.trace(network.forward, network.variables, *network.inputs, **network.settings)
  except ValueError as error:
    raise ValueError(
      f"{name} does not run at its new size, so nothing was changed. A shared dimension may lack"
      f" a member, or a module keep its size in an attribute of its own. ({error})"
    ) from error


def heads(
  network: Network,
  attn: str,
  by: int,
  of: str,
  *,
  fresh: Any = None,
  alpha: float = 0.0,
) -> Grown:
  """More heads, queries of each group, or entries of a head.

  Args:
    network: The network, with inputs.
    attn: Path of the attention layer.
    by: Their number.
    of: See `growth.couple_heads`.
    fresh: See `widen`.
    alpha: See `widen`.
  """
  units, entries = find_heads(network, attn, of)
  if not isinstance(by, int) or isinstance(by, bool) or by < 1 or by % entries:
    raise ValueError(
      f"by: expected a positive integer{f' that {entries} divides' if entries > 1 else ''}, found"
      f" {by!r}"
    )
  plan = _planners.widening(network.variables, units, by // entries, alpha=network.alpha)
  return grow(network, plan, fresh, alpha)


def find_heads(network: Network, attn: str, of: str) -> tuple[Dimension, int]:
  """The units of an attention layer, and how many entries of a head one is."""
  if not network.inputs:
    raise ValueError("heads are found in the program: expected inputs of the forward pass")
  return _heads.find(
    network.forward, network.variables, *network.inputs, attn=attn, of=of, **network.settings
  )


def check_closed(larger: Network, grown: Grown) -> None:
  """Raises `ValueError` if new layers count although the gate is closed.

  The output must be the same whatever their weights are. Nothing is looked at if α multiplies none
  of them, or if it is not known on which arrays the network runs.

  Args:
    larger: The network at its new size, without its gate.
    grown: The grown variables and their plan.
  """
  plan, inputs = grown.plan, larger.inputs
  known = inputs and not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(inputs))
  if not known or not any(change.scaled for change in plan.changes):
    return
  gated = _gate.gated(larger.forward, plan)
  leaves = _trees.leaves(grown.variables)
  closed = {plan.alpha: jnp.zeros_like(leaves[plan.alpha])}
  others = dict(closed)
  for change in plan.changes:
    leaf = leaves[change.path]
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      at = change.new(0) if change.layers else ...
      others[change.path] = leaf.at[at].add(jnp.asarray(0.5, leaf.dtype))

  @jax.jit
  def run(variables: Any) -> list[Any]:
    found = _trees.leaves(gated(variables, *inputs, **larger.settings))
    n = len(larger.output)
    return [x for path, x in found.items() if path[:n] == larger.output]

  first, second = (run(_trees.with_leaves(grown.variables, x)) for x in (closed, others))
  if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, second, strict=True)):
    raise ValueError(
      "outgoing: with the gate closed the output still depends on the new layers, so nothing was"
      " changed. Expected all layers through which they add to a residual stream, and that they do"
      " nothing else to it, as x + f(norm(x)) does; without outgoing= new layers count at once"
    )
