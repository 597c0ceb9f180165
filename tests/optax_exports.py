"""Every gradient transformation that Optax exports, built with plain arguments."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

_SGD = optax.sgd(0.1)


def _same_label(tree: Any) -> Any:
  return jax.tree.map(lambda _: "all", tree)


# Arguments of the constructors that need more than a learning rate.
_ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
  "adaptive_grad_clip": ((0.5,), {}),
  "add_decayed_weights": ((0.1,), {}),
  "add_noise": ((0.01, 0.55), {"key": 0}),
  "apply_every": ((2,), {}),
  "apply_if_finite": ((optax.adam(0.1), 3), {}),
  "chain": ((optax.clip(0.5), optax.adam(0.1)), {}),
  "clip": ((0.25,), {}),
  "clip_by_block_rms": ((0.5,), {}),
  "clip_by_global_norm": ((0.5,), {}),
  "conditionally_mask": ((_SGD, lambda step: step < 2), {}),
  "conditionally_transform": ((_SGD, lambda step: step < 2), {}),
  "ema": ((0.9,), {}),
  "flatten": ((optax.adam(0.1),), {}),
  "freeze": ((False,), {}),
  "lbfgs": ((0.1,), {"linesearch": None}),
  "masked": ((optax.adam(0.1), True), {}),
  "measure_with_ema": ((lambda updates: updates, 0.9), {}),
  "multi_transform": (({"all": optax.adam(0.1)}, _same_label), {}),
  "named_chain": ((("clip", optax.clip(0.5)), ("adam", optax.adam(0.1))), {}),
  "noisy_sgd": ((0.1,), {"key": 0}),
  "partition": (({"all": optax.adam(0.1)}, _same_label), {}),
  "scale": ((-0.1,), {}),
  "scale_by_schedule": ((lambda count: 1.0 / (1.0 + count),), {}),
  "selective_transform": ((optax.adam(0.1),), {"freeze_mask": False}),
  "snapshot": (("norm", lambda *_, **__: jnp.float32(1.0)), {}),
  "stateless": ((lambda updates, params: updates,), {}),
  "stateless_with_tree_map": ((lambda update, param: -0.1 * update,), {}),
  "trace": ((0.9,), {}),
  "with_extra_args_support": ((optax.adam(0.1),), {}),
  "contrib.mechanize": ((_SGD,), {}),
  "contrib.sam": ((_SGD, optax.chain(optax.contrib.normalize(), optax.sgd(0.05))), {}),
  "contrib.schedule_free": ((_SGD,), {"learning_rate": 0.1}),
  "contrib.split_real_and_imaginary": ((optax.adam(0.1),), {}),
}

# Optax itself fails on scalars here, or makes vectors of them.
NO_SCALARS = {"scale_by_distance_over_gradients", "scale_by_sm3", "sm3"}

# What `update` needs besides gradients, state and parameters.
EXTRA_ARGS: dict[str, dict[str, Any]] = {
  "polyak_sgd": {"value": jnp.float32(1.0)},
  "scale_by_polyak": {"value": jnp.float32(1.0)},
  "contrib.momo": {"value": jnp.float32(1.0)},
  "contrib.momo_adam": {"value": jnp.float32(1.0)},
  "contrib.reduce_on_plateau": {"value": jnp.float32(1.0)},
  "contrib.sophia": {"obj_fn": lambda tree: sum(jnp.sum(x**4) for x in jax.tree.leaves(tree))},
}

# Each tested elsewhere or not the inner optimizer of anything that accumulates.
EXCLUDED = {
  "contrib.differentially_private_aggregate": "takes one gradient per example, not their mean",
  "contrib.dpsgd": "takes one gradient per example, not their mean",
  "contrib.scale_by_muon": "needs to be told its dimensions; contrib.muon does that",
  "inject_hyperparams": "returns a factory; see test_wrappers",
  "inject_stateful_hyperparams": "returns a factory; see test_wrappers",
  "lookahead": "takes gradients that are not shaped like its parameters; see test_wrappers",
  "scale_by_backtracking_linesearch": "needs the objective; see test_line_searches",
  "scale_by_zoom_linesearch": "needs the objective; see test_line_searches",
}


@functools.cache
def exported() -> dict[str, Callable[..., Any]]:
  """Functions of `optax` and `optax.contrib` that return a gradient transformation."""
  found = {}
  for module, prefix in ((optax, ""), (optax.contrib, "contrib.")):
    for name, fn in inspect.getmembers(module, inspect.isfunction):
      if name.startswith("_"):
        continue
      if "GradientTransformation" in str(inspect.signature(fn).return_annotation):
        found[prefix + name] = fn
  return found


def build(name: str, **given: Any) -> optax.GradientTransformation:
  """The transformation of this name; parameters without a default get 0.1, or what is given."""
  fn, arguments = exported()[name], arguments_of(name)
  if given:
    return fn(**arguments.arguments | given)
  return fn(*arguments.args, **arguments.kwargs)


def arguments_of(name: str) -> inspect.BoundArguments:
  """What `build` calls a constructor with."""
  signature = inspect.signature(exported()[name])
  if name in _ARGUMENTS:
    args, kwargs = _ARGUMENTS[name]
    return signature.bind(*args, **kwargs)
  required = [
    p
    for p in signature.parameters.values()
    if p.default is p.empty and p.kind is not p.VAR_POSITIONAL
  ]
  assert [p.name for p in required] in ([], ["learning_rate"]), f"say how to build {name}"
  return signature.bind(*[0.1 for _ in required])


NAMES = sorted(set(exported()) - set(EXCLUDED))
