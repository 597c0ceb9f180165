"""A live NNX model as a tree and a function of it, and the class that it has while it grows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_cadence import _paths
from optax_cadence.growth import _gate
from optax_cadence.growth import _nnx_layers
from optax_cadence.growth import _trees
from optax_cadence.growth._plan import Plan

ALPHA = "alpha"


def variables(model: nnx.Module) -> dict[str, Any]:
  """All variables of a model as a nested dict of arrays: the tree that its plans are for."""
  return nnx.to_pure_dict(nnx.state(model))


def replace(model: nnx.Module, tree: Any) -> None:
  """Puts the arrays of such a tree into the model."""
  nnx.update(model, _filled(nnx.state(model), tree))


def forward(model: nnx.Module) -> Callable[..., Any]:
  """The forward pass as a function of `variables(model)`; it returns what changes too."""
  graphdef, state = nnx.split(model)
  return lambda tree, *args, **kwargs: _call(
    nnx.merge(graphdef, _filled(state, tree)), args, kwargs
  )


def _call(model: nnx.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
  return model(*args, **kwargs), nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))


def _filled(state: Any, tree: Any) -> Any:
  """The state with the arrays of a nested dict."""
  values = _trees.leaves(tree)
  paths = [path for path, _ in _paths.flatten_with_paths(state)]
  return jax.tree.unflatten(jax.tree.structure(state), [values[path] for path in paths])


class Growth:
  """What the class of a model with a gate knows: its old class, how it has grown."""

  def __init__(self, base: type, plan: Plan, keep_groups: bool):
    self.base, self.plan, self.keep_groups = base, plan, keep_groups


def growth_of(model: nnx.Module) -> Growth | None:
  """How a model has grown; None for one without a gate."""
  return getattr(type(model), "_growth", None)


def close(model: nnx.Module, plan: Plan, alpha: float, keep_groups: bool = False) -> None:
  """Attaches the gate to a model whose arrays have grown."""
  base = type(model)
  dtypes = [x.dtype for x in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))]
  dtype = next((d for d in dtypes if jnp.issubdtype(d, jnp.floating)), jnp.float32)
  setattr(model, ALPHA, nnx.Param(jnp.asarray(alpha, dtype)))
  body = {"__call__": _gated_call, "__module__": base.__module__, "__qualname__": base.__qualname__}
  metaclass: Any = type(base)
  cls = metaclass(base.__name__, (base,), body)
  cls._growth = Growth(base, plan, keep_groups)
  object.__setattr__(model, "__class__", cls)


def open_(model: nnx.Module, tree: Any) -> None:
  """Takes the gate away: the model has its old class again, and the arrays of a merged tree."""
  growth = growth_of(model)
  assert growth is not None
  object.__setattr__(model, "__class__", growth.base)
  delattr(model, ALPHA)
  replace(model, tree)


def _gated_call(self: Any, *args: Any, **kwargs: Any) -> Any:
  """The forward pass of a grown model, through its gate."""
  cls = type(self)
  growth: Growth = cls._growth
  object.__setattr__(self, "__class__", growth.base)
  try:
    graphdef, state = nnx.split(self)
  finally:
    object.__setattr__(self, "__class__", cls)
  tree = nnx.to_pure_dict(state)

  def run(small: bool) -> Callable[..., Any]:
    def fn(arrays: Any, *args: Any, **kwargs: Any) -> Any:
      model = nnx.merge(graphdef, _filled(state, {**arrays, ALPHA: tree[ALPHA]}))
      if small:
        _nnx_layers.fit(model, growth.keep_groups)
      return _call(model, args, kwargs)

    return fn

  output, changed = _gate.gated(run(False), growth.plan, old=run(True))(tree, *args, **kwargs)
  if jax.tree.leaves(changed):
    nnx.update(self, _filled(nnx.state(self, nnx.Not(nnx.Param)), changed))
  return output
