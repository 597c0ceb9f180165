"""Whole training steps: forward and backward pass, accumulation and update.

What people feel, and not the optimizer alone. Every variant makes one update of AdamW from the same
eight micro-batches. `training_step` lets the backward pass add to the windows; the peers are what
people write with Optax.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_cadence as oc
from benchmarks import cases
from benchmarks import models
from benchmarks import peers
from benchmarks import variants
from benchmarks.sizes import Sizes
from benchmarks.targets import Target
from benchmarks.variants import Variant

PERIOD = 8
OURS, STATIC = "training_step", "training_step, static phase"
STORED, STORED_STATIC = "gradients and apply", "gradients and apply, static phase"
MULTI_STEPS = "MultiSteps"
SCANNED = "training_step in lax.scan"
SCAN, MICROBATCH = "lax.scan over micro-batches", "optax.microbatch"


def all_cases(sizes: Sizes) -> dict[str, Callable[[], cases.Case]]:
  """For each case a function that builds it, in the order in which they run."""
  wide, narrow = sizes.step_width, 3 * sizes.step_width // 4
  small, large = sizes.step_tokens
  return {
    "step-mlp-64": functools.partial(mlp, wide, 64, (0.75, 0.45, 0.15)),
    "step-mlp-512": functools.partial(mlp, narrow, 512, (0.97, 0.85, 1.0)),
    "step-mlp-layers": functools.partial(layers, wide, 64),
    "step-transformer-scanned-small": functools.partial(transformer, sizes, small, True),
    "step-transformer-scanned-large": functools.partial(transformer, sizes, large, True),
    "step-transformer-small": functools.partial(transformer, sizes, small, False),
    "step-transformer-large": functools.partial(transformer, sizes, large, False),
    "step-resnet": functools.partial(resnet, sizes),
  }


def mlp(width: int, rows: int, limits: tuple[float, float, float]) -> cases.Case:
  """Twelve layers in one leaf.

  Args:
    width: Features.
    rows: Rows of a micro-batch.
    limits: How long a step may take, beside gradients and `apply` and beside `MultiSteps`, and how
      much of the temporaries of `MultiSteps` it may have.
  """
  beside_stored, beside_peer, memory = limits
  targets = [
    Target(OURS, STORED, beside_stored),
    Target(OURS, MULTI_STEPS, beside_peer),
    Target(OURS, MULTI_STEPS, memory, measure="temp_bytes"),
    *(Target(OURS, peer, 1.0, measure="temp_bytes") for peer in (STORED, SCAN, MICROBATCH)),
  ]
  model = models.mlp(12, width, rows)
  title = f"whole step, 12 scanned layers of {width} x {width}, {rows} rows"
  return case(f"step-mlp-{rows}", title, model, targets)


def layers(width: int, rows: int) -> cases.Case:
  """The same with a period for each layer, beside gradients and `apply`."""
  model = models.mlp(12, width, rows)
  tx = oc.cadence(peers.adamw(), {"w": oc.stacked(cases.LAYERS)})
  title = f"whole step, 12 scanned layers of {width} x {width}, periods 8/4/1, {rows} rows"
  targets = [Target(OURS, STORED, 1.0), Target(OURS, STORED, 1.0, measure="temp_bytes")]
  return case("step-mlp-layers", title, model, targets, tx, cases.LAYERS)


def transformer(sizes: Sizes, shape: tuple[int, int], scanned: bool) -> cases.Case:
  """A byte-level transformer, its layers in one leaf for each kind of weight, or in many."""
  rows, length = shape
  model = models.transformer(8, sizes.step_model, rows, length, scanned)
  which = "small" if shape == sizes.step_tokens[0] else "large"
  return case(
    f"step-transformer-{'scanned-' if scanned else ''}{which}",
    f"whole step, byte-level transformer{', scanned' if scanned else ''}, {rows * length} tokens",
    model,
    [Target(OURS, STORED, 1.0, noise=True), Target(OURS, MULTI_STEPS, 1.0, noise=True)],
  )


def resnet(sizes: Sizes) -> cases.Case:
  """A small ResNet."""
  model = models.resnet(sizes.step_model // 8, sizes.step_images)
  return case(
    "step-resnet",
    f"whole step, ResNet, {sizes.step_images} images",
    model,
    [Target(OURS, STORED, 1.0, noise=True), Target(OURS, MULTI_STEPS, 1.0, noise=True)],
  )


def case(
  name: str,
  title: str,
  model: models.Model,
  targets: Sequence[Target],
  tx: Any = None,
  periods: Sequence[int] = (PERIOD,),
) -> cases.Case:
  """All ways to train a model; with a cadence that the peers cannot express, ours alone."""
  sizes = [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.params))]
  one = variants.Inputs(model.params, model.batch)
  found = []
  if tx is None:
    found = [peer(MULTI_STEPS, peers.multi_steps(PERIOD), one, model.loss), *at_once(model)]
  tx = tx or oc.cadence(peers.adamw(), PERIOD)
  by_references = functools.partial(trained, tx, model.loss)
  by_gradients = functools.partial(differentiated, tx, model.loss)
  return cases.Case(
    name,
    title,
    [
      *ours(OURS, STATIC, tx, one, by_references, periods),
      *ours(STORED, STORED_STATIC, tx, one, by_gradients, periods),
      *found,
      peer(cases.ADAMW, peers.adamw(), one, model.loss),
    ],
    [t for t in targets if t.against != MICROBATCH or hasattr(optax, "microbatch")],
    OURS,
    MULTI_STEPS if found else STORED,
    sum(sizes),
    4 * max(sizes),
    unit=model.unit,
    units=model.units,
  )


def ours(
  name: str,
  static_name: str,
  tx: Any,
  inputs: variants.Inputs,
  step: Callable[..., Any],
  periods: Sequence[int],
) -> list[Variant]:
  """Two variants of a cadence: its phase not known while compiling, and known.

  All have to arrive at the same parameters. Peers have not: AdamW makes much of how the smallest
  gradients are rounded, and they add up in another order.
  """
  init = variants.init_of(tx)
  dynamic = (functools.partial(step, None),) * PERIOD
  static = variants.static_steps(step, PERIOD, periods)
  return [
    Variant(name, "ours", inputs, init, dynamic, None, None if name == STORED else STORED),
    Variant(static_name, "ours", inputs, init, static, None, STORED),
  ]


def trained(tx: Any, loss: Any, phase: int | None, params: Any, state: Any, batch: Any) -> Any:
  """A micro-step by `training_step`."""
  return oc.training_step(loss, tx)(params, state, batch, phase=phase)[:2]


def differentiated(
  tx: Any, loss: Any, phase: int | None, params: Any, state: Any, batch: Any
) -> Any:
  """A micro-step by gradients and `apply`."""
  return tx.apply(params, state, jax.grad(loss)(params, batch), phase=phase)


def peer(name: str, tx: Any, inputs: variants.Inputs, loss: Any) -> Variant:
  """A micro-step of an Optax transformation."""
  update = peers.stepper(tx)

  def step(params: Any, state: Any, batch: Any) -> Any:
    return update(params, state, jax.grad(loss)(params, batch))

  return Variant(name, "peer", inputs, variants.init_of(tx), (step,) * PERIOD, None)


def at_once(model: models.Model) -> list[Variant]:
  """All micro-batches of an update in one program, as data that is there at once allows."""
  tx = peers.adamw()
  update = peers.stepper(tx)

  def scan(params: Any, state: Any, batches: Any) -> Any:
    def turn(total: Any, batch: Any) -> Any:
      return jax.tree.map(jnp.add, total, jax.grad(model.loss)(params, batch)), None

    total = jax.lax.scan(turn, jax.tree.map(jnp.zeros_like, params), batches)[0]
    return update(params, state, jax.tree.map(lambda x: x / PERIOD, total))

  def microbatch(params: Any, state: Any, batches: Any) -> Any:
    size = jax.tree.leaves(batches)[0].shape[0] // PERIOD
    grad = optax.microbatch(jax.grad(model.loss), 1, size)
    return update(params, state, jax.tree.map(lambda x: x / PERIOD, grad(params, batches)))

  def joined() -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), model.batches(PERIOD))

  cadence = oc.cadence(tx, PERIOD)

  def scanned(params: Any, state: Any, batches: Any) -> Any:
    def turn(carry: Any, batch: Any) -> Any:
      return trained(cadence, model.loss, None, *carry, batch), None

    return jax.lax.scan(turn, (params, state), batches)[0]

  stacked = variants.Inputs(model.params, lambda: model.batches(PERIOD))
  long = variants.Inputs(model.params, joined)
  init = variants.init_of(tx)
  found = [
    Variant(SCANNED, "ours", stacked, variants.init_of(cadence), (scanned,), None, spans=PERIOD),
    Variant(SCAN, "peer", stacked, init, (scan,), None, spans=PERIOD),
  ]
  if hasattr(optax, "microbatch"):
    found.append(Variant(MICROBATCH, "peer", long, init, (microbatch,), None, spans=PERIOD))
  return found
