"""Whole training steps in NNX and in Linen, beside `optax.MultiSteps` in the same framework.

A live model is trained through `nnx.jit`, with what that costs at every call; beside it stand the
same step without NNX, a call of `nnx.jit` that does nothing, and `nnx.cached_partial`, which spares
most of that.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training import train_state

import optax_cadence as oc
from benchmarks import cases
from benchmarks import flax_models
from benchmarks import models
from benchmarks import peers
from benchmarks.sizes import Sizes
from benchmarks.targets import Target
from benchmarks.variants import Inputs
from benchmarks.variants import Variant

PERIOD = 8
OURS, STORED, MULTI_STEPS = "training_step", "gradients and apply", "MultiSteps"
CACHED = "training_step, nnx.cached_partial"
PLAIN, NOTHING = "training_step without NNX", "nnx.jit of nothing"


def all_cases(sizes: Sizes) -> dict[str, Callable[[], cases.Case]]:
  """For each case a function that builds it, in the order in which they run."""
  small, _ = sizes.step_tokens
  scanned, layers = (functools.partial(transformer, sizes, small, x) for x in (True, False))
  found = {}
  for framework, make in (("nnx", nnx_case), ("linen", linen_case)):
    for name, model in (
      ("transformer-scanned", scanned),
      ("transformer", layers),
      ("resnet", functools.partial(resnet, sizes)),
    ):
      found[f"step-{framework}-{name}"] = functools.partial(make, f"step-{framework}-{name}", model)
  return found


def transformer(sizes: Sizes, shape: tuple[int, int], scanned: bool) -> Any:
  """A byte-level transformer: its modules, batches, and what they are."""
  rows, length = shape
  data = models.transformer(8, sizes.step_model, rows, length, scanned)
  arguments = 8, sizes.step_model, length, scanned

  def split(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    return tokens[:, :-1], tokens[:, 1:]

  live = functools.partial(flax_models.NnxTransformer, *arguments)
  title = f"byte-level transformer{', scanned' if scanned else ''}, {rows * length} tokens"
  return live, flax_models.LinenTransformer(*arguments), data, split, title


def resnet(sizes: Sizes) -> Any:
  """A small ResNet with norms over the batch."""
  width = sizes.step_model // 8
  data = models.resnet(width, sizes.step_images)
  live = functools.partial(flax_models.NnxResNet, width)
  title = f"ResNet with BatchNorm, {sizes.step_images} images"
  return live, flax_models.LinenResNet(width), data, lambda batch: (batch["x"], batch["y"]), title


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The loss of every model."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Live:
  """A micro-step of a live model through `nnx.jit`, called as a program of `jax.jit` is."""

  def __init__(self, step: Callable[..., Any]):
    self.step = nnx.jit(step, donate_argnums=(0, 1))

  def lower(self, *shapes: Any) -> "Live":
    self.program = self.step.lower(*shapes)
    return self

  def compile(self) -> "Live":
    self.program = self.program.compile()
    return self

  def memory_analysis(self) -> Any:
    return getattr(self.program, "compiled", self.program).memory_analysis()

  def __call__(self, model: Any, optimizer: Any, batch: Any) -> tuple[Any, Any]:
    self.program(model, optimizer, batch)
    return model, optimizer


class Cached:
  """The same through `nnx.cached_partial`, which takes the model apart once, at its first call."""

  def __init__(self, step: Callable[..., Any]):
    self.step, self.model = nnx.jit(step, donate_argnums=(0, 1)), None

  def lower(self, *shapes: Any) -> "Cached":
    del shapes
    return self

  def compile(self) -> "Cached":
    return self

  def memory_analysis(self) -> None:
    return None

  def __call__(self, model: Any, optimizer: Any, batch: Any) -> tuple[Any, Any]:
    if self.model is not model:
      self.model, self.program = model, nnx.cached_partial(self.step, model, optimizer)
    self.program(batch)
    return model, optimizer


def nnx_case(name: str, made: Callable[[], Any]) -> cases.Case:
  """A live model."""
  live, _, data, split, title = made()
  tx, peer = oc.cadence(peers.adamw(), PERIOD), peers.multi_steps(PERIOD)

  def loss(model: Any, batch: Any) -> jax.Array:
    x, y = split(batch)
    return cross_entropy(model(x), y)

  def trained(model: Any, optimizer: Any, batch: Any) -> None:
    optimizer.training_step(model, loss, batch)

  def differentiated(model: Any, optimizer: Any, batch: Any) -> None:
    optimizer.update(model, nnx.grad(loss)(model, batch))

  def nothing(model: Any, optimizer: Any, batch: Any) -> None:
    del model, optimizer, batch

  def model() -> Any:
    return live(rngs=nnx.Rngs(0))

  structure = nnx.graphdef(nnx.eval_shape(model))

  def plain_params() -> Any:
    _, params, others = nnx.split(model(), nnx.Param, ...)
    return {"params": nnx.to_pure_dict(params), "others": nnx.to_pure_dict(others)}

  templates = nnx.eval_shape(lambda: nnx.split(model(), nnx.Param, ...)[1:])

  def plain_loss(params: Any, others: Any, batch: Any) -> Any:
    states = [jax.tree.map(lambda x: x, template) for template in templates]
    for state, values in zip(states, (params, others), strict=True):
      nnx.replace_by_pure_dict(state, values)
    copy = nnx.merge(structure, *states)
    value = loss(copy, batch)
    return value, nnx.to_pure_dict(nnx.state(copy, nnx.Not(nnx.Param)))

  plain_step = oc.training_step(plain_loss, tx, has_aux=True)

  def plain(params: Any, state: Any, batch: Any) -> Any:
    new, state, (_, others) = plain_step(params["params"], state, params["others"], batch)
    return {"params": new, "others": others}, state

  def params_of(model: Any) -> Any:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))

  of_model = Inputs(model, data.batch, restore=params_of)
  of_arrays = Inputs(plain_params, data.batch, restore=lambda params: params["params"])

  def ours(model: Any, _: Any) -> Any:
    return oc.nnx.Optimizer(model, tx)

  def of_flax(model: Any, _: Any) -> Any:
    return nnx.Optimizer(model, peer, wrt=nnx.Param)

  def through_nnx(
    name: str, role: str, init: Any, step: Any, reference: str | None = None, jit: Any = Live
  ) -> Variant:
    return Variant(name, role, of_model, init, (step,) * PERIOD, None, reference, jit=jit)

  def init_plain(params: Any, _: Any) -> Any:
    return tx.init(params["params"])

  return case(
    name,
    f"whole step in NNX, {title}",
    data,
    plain_params,
    [
      through_nnx(OURS, "ours", ours, trained, STORED),
      through_nnx(CACHED, "ours", ours, trained, STORED, Cached),
      through_nnx(STORED, "ours", ours, differentiated),
      through_nnx(MULTI_STEPS, "peer", of_flax, differentiated),
      Variant(PLAIN, "ours", of_arrays, init_plain, (plain,) * PERIOD, None, STORED),
      through_nnx(NOTHING, "baseline", ours, nothing),
    ],
    [Target(CACHED, PLAIN, 1.05, noise=True)],
  )


def linen_case(name: str, made: Callable[[], Any]) -> cases.Case:
  """A `TrainState` of Linen."""
  _, net, data, split, title = made()
  tx, peer = oc.cadence(peers.adamw(), PERIOD), peers.multi_steps(PERIOD)

  class Ours(oc.linen.TrainState):
    batch_stats: Any

  class OfFlax(train_state.TrainState):
    batch_stats: Any

  def state(kind: Any, tx: Any) -> Any:
    variables = dict(net.init(jax.random.key(0), split(data.batch())[0]))
    params, stats = variables.pop("params"), variables.pop("batch_stats", {})
    state = kind.create(apply_fn=net.apply, params=params, tx=tx, batch_stats=stats)
    return state.replace(step=jnp.zeros((), jnp.int32))

  def loss(params: Any, state: Any, batch: Any) -> Any:
    x, y = split(batch)
    variables = {"params": params, "batch_stats": state.batch_stats}
    logits, changed = state.apply_fn(variables, x, mutable=["batch_stats"])
    return cross_entropy(logits, y), changed.get("batch_stats", state.batch_stats)

  def trained(state: Any, nothing: Any, batch: Any) -> Any:
    new, (_, stats) = state.training_step(loss, state, batch, has_aux=True)
    return new.replace(batch_stats=stats), nothing

  def differentiated(state: Any, nothing: Any, batch: Any) -> Any:
    grads, stats = jax.grad(loss, has_aux=True)(state.params, state, batch)
    return state.apply_gradients(grads=grads, batch_stats=stats), nothing

  def variant(
    name: str, role: str, kind: Any, tx: Any, step: Any, reference: str | None = None
  ) -> Variant:
    inputs = Inputs(
      functools.partial(state, kind, tx), data.batch, restore=lambda state: state.params
    )
    return Variant(name, role, inputs, lambda *_: (), (step,) * PERIOD, None, reference)

  return case(
    name,
    f"whole step in Linen, {title}",
    data,
    lambda: state(Ours, tx).params,
    [
      variant(OURS, "ours", Ours, tx, trained, STORED),
      variant(STORED, "ours", Ours, tx, differentiated),
      variant(MULTI_STEPS, "peer", OfFlax, peer, differentiated),
    ],
    [],
  )


def case(
  name: str,
  title: str,
  data: models.Model,
  params: Callable[[], Any],
  found: list[Variant],
  targets: list[Target],
) -> cases.Case:
  """All ways to train a model in a framework."""
  sizes = [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(params))]
  return cases.Case(
    name,
    title,
    found,
    [
      Target(OURS, STORED, 1.0, noise=True),
      Target(OURS, MULTI_STEPS, 1.0, noise=True),
      *targets,
    ],
    OURS,
    MULTI_STEPS,
    sum(sizes),
    4 * max(sizes),
    unit=data.unit,
    units=data.units,
  )
