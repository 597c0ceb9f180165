"""Mixtures of experts of live NNX models."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_cadence import _paths
from optax_cadence.growth import _driver
from optax_cadence.growth import _nnx_contents
from optax_cadence.growth import _nnx_live
from optax_cadence.growth import _nnx_model
from optax_cadence.growth import _trees
from optax_cadence.growth import _upcycling
from optax_cadence.growth._plan import Plan


class Router(nnx.Module):
  """The weights of a router, [features, experts]."""

  def __init__(self, *shape: int, rngs: nnx.Rngs):
    """Small random weights of a shape, as Komatsuzaki et al. have them."""
    self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))

  @property
  def weights(self) -> jax.Array:
    """Their array."""
    return _nnx_model.get_array(self.kernel)


class MixtureOfExperts(nnx.Module):
  """Experts, all of one kind, and a router that sends each token to some of them.

  See `growth.mixture_of_experts` for `top_k` and `capacity`.
  """

  def __init__(
    self, experts: nnx.Module, router: Router, *, top_k: int = 2, capacity: float | None = None
  ):
    """Makes a mixture.

    Args:
      experts: A module whose variables have a first axis of experts, as `nnx.vmap` makes it.
      router: The router.
      top_k: Number of experts for each token.
      capacity: Places of every expert; None: one for every token.
    """
    self.experts = experts
    self.router = router
    self.top_k = top_k
    self.capacity = capacity

  def __call__(self, x: Any) -> jax.Array:
    """What the experts make of tokens [..., features]."""

    def run(tokens: Any) -> Any:
      return nnx.vmap(lambda expert, x: expert(x), in_axes=(0, 0))(self.experts, tokens)

    weights = self.router.weights
    return _upcycling.mixture_of_experts(run, weights, x, top_k=self.top_k, capacity=self.capacity)

  def load_balance(self, x: Any) -> jax.Array:
    """How unevenly the experts are loaded by these tokens, see `growth.load_balance`."""
    return _upcycling.load_balance(self.router.weights, x)


def upcycle(
  model: nnx.Module,
  *inputs: Any,
  mlp: nnx.Module | Sequence[nnx.Module],
  experts: int = 8,
  top_k: int = 2,
  capacity: float | None = None,
  features: int | None = None,
  copy_state: bool = True,
  given: Mapping[str, Any] | None = None,
  rngs: nnx.Rngs | None = None,
  optimizer: nnx.Optimizer | None = None,
  **kwargs: Any,
) -> Plan:
  """Makes mixtures of experts of MLPs in a live model (arXiv:2212.05055); its outputs stay.

  Args:
    model: The model; it is changed in place, or, on an error, not at all.
    *inputs: Inputs of its forward pass; with them the result is checked.
    mlp: The module inside that becomes a mixture, or several; each reads [..., features]. It may
      be one of layers that `nnx.vmap` has stacked along axis 0.
    experts: Number of experts, each of which begins as a copy.
    top_k: Number of experts for each token, see `growth.mixture_of_experts`.
    capacity: Places of every expert; None: one for every token. With fewer, tokens that find no
      place pass by, and outputs are not what they were.
    features: Number of entries that the MLPs read; found by trying if it is not given.
    copy_state: Whether the optimizer's state is copied to all experts, or begins anew in them.
    given: Weights of routers by the path of their leaf; by default they are small and random.
    rngs: Random numbers for them.
    optimizer: The model's optimizer, whose state follows.
    **kwargs: Further arguments of the forward pass.

  Returns:
    The `Plan` that was applied; `growth.undo(model, plan)` leaves the first expert of each.

  Raises:
    ValueError: If an MLP is not inside the model, or the model does not run with it.
  """
  modules = [mlp] if isinstance(mlp, nnx.Module) else list(mlp)
  network = _nnx_live.network_of(model, inputs, kwargs)
  paths = [_nnx_live.path_of(model, module) for module in modules]
  if () in paths:
    raise ValueError("mlp: expected a module inside the model, found the model itself")
  stack = _stack(modules[0])
  features = _features(modules[0], len(stack)) if features is None else features
  plan = _upcycling.upcycling(
    network.variables,
    [_paths.join(path) for path in paths],
    experts=experts,
    features=features,
    axis=len(stack),
    copy_state=copy_state,
  )
  rngs = nnx.Rngs(0) if rngs is None else rngs
  routers = {
    (*path, "router", "kernel"): Router(*stack, features, experts, rngs=rngs).weights
    for path in paths
  }
  values = {tuple(name.split("/")): value for name, value in (given or {}).items()}
  unknown = values.keys() - routers.keys()
  if unknown:
    raise ValueError(f"given {_paths.listed(unknown)}: expected some of {_paths.listed(routers)}")
  routers |= values
  grown = _driver.grow(network, plan, lambda path, shape, dtype: jnp.asarray(routers[path]))

  def mixture(inside: nnx.Module) -> nnx.Module:
    router = Router(*stack, features, experts, rngs=nnx.Rngs(0))
    return MixtureOfExperts(inside, router, top_k=top_k, capacity=capacity)

  def add(model: nnx.Module) -> None:
    for path in paths:
      _nnx_contents.replace(model, path, mixture)

  return _nnx_live.put(model, grown, network, optimizer, add=add)


def _stack(mlp: Any) -> tuple[int, ...]:
  """The axes that the layers of an MLP have in front, as `nnx.vmap` has stacked them."""
  found = {
    tuple(node.kernel.shape[: -_nnx_model.rank(node, node.kernel)])
    for node in _nnx_model.parts(mlp).modules.values()
    if isinstance(node, nnx.Linear | nnx.LinearGeneral)
  }
  if len(found) > 1:
    raise ValueError(
      f"mlp {type(mlp).__name__}: expected layers that are stacked alike, found {found}"
    )
  return found.pop() if found else ()


def _features(mlp: Any, stacked: int) -> int:
  """The number of entries that an MLP reads: of its layers' input sizes the one on which it runs.

  Args:
    mlp: The MLP.
    stacked: How many axes its leaves have in front of their own.

  Raises:
    ValueError: If it runs on none, or several.
  """
  tree = _nnx_model.variables(mlp)
  one = {  # without the axes in front
    path: jax.eval_shape(lambda x: x[(0,) * stacked], leaf)
    for path, leaf in _paths.by_path(tree).items()
  }
  sizes = sorted({leaf.shape[-2] for leaf in one.values() if len(leaf.shape) > 1})
  network = _driver.Network(_nnx_model.forward(mlp), _trees.with_leaves(tree, one))
  found = []
  for n in sizes:
    try:
      _driver.check_runs(network._replace(inputs=[jax.ShapeDtypeStruct((1, n), "float32")]), "")
    except ValueError:
      continue
    found.append(n)
  if len(found) != 1:
    raise ValueError(
      f"mlp {type(mlp).__name__}: expected it to read one of {sizes} entries, found that it runs on"
      f" {found or 'none'}: say which with features="
    )
  return found[0]
