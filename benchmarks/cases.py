"""What is measured: the cases, their variants, and the targets they have to reach.

A case says what is compared with what. How variants are built is in `variants`, how they are
timed in `measure`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_cadence as oc
from benchmarks import builds
from benchmarks import control
from benchmarks import floors
from benchmarks import peers
from benchmarks import variants
from benchmarks.sizes import Sizes
from benchmarks.targets import Target
from benchmarks.variants import Variant

PERIODS = (1, 2, 4, 8)
LAYERS = (8,) * 4 + (4,) * 4 + (1,) * 4
ADAMW = "AdamW at every micro-step"
PARTITION = builds.PARTITION
SAME_MEAN = "one leaf, same mean"


@dataclasses.dataclass(frozen=True)
class Blend:
  """A baseline computed from two variants: a weighted mean of their times.

  Attributes:
    name: What the table calls it.
    held: Name of the variant that never fires.
    firing: Name of the variant that always fires.
    share: Weight of the firing one; the held one has the rest.
    floor_bytes: Bytes that such a micro-step has to move.
  """

  name: str
  held: str
  firing: str
  share: float
  floor_bytes: float


@dataclasses.dataclass(frozen=True)
class Case:
  """Variants that do the same work, timed beside each other.

  Attributes:
    name: For `--cases`, the JSON file and the picture.
    title: What a person reads.
    variants: What is timed.
    targets: What has to be reached.
    ours: Name of the variant that stands for the case.
    peer: Name of the variant that it is compared with.
    parameters: How many there are.
    largest_leaf: Bytes of the largest.
    blend: A baseline made of two of the variants.
    unit: What a micro-batch is a number of; None where there is none.
    units: How many.
  """

  name: str
  title: str
  variants: Sequence[Variant]
  targets: Sequence[Target]
  ours: str
  peer: str
  parameters: int
  largest_leaf: int
  blend: Blend | None = None
  unit: str | None = None
  units: int = 0


def all_cases(sizes: Sizes, accelerator: bool) -> dict[str, Callable[[], Case | builds.BuildCase]]:
  """For each case a function that builds it, in the order in which they run."""
  cases = {f"uniform-{human(n)}": functools.partial(uniform, n, accelerator) for n in sizes.uniform}
  return cases | {
    "bfloat16": functools.partial(uniform, sizes.bfloat16, accelerator, jnp.bfloat16),
    "layers": functools.partial(layers, sizes.layer, accelerator),
    "quadrants": functools.partial(quadrants, sizes.matrix),
    "bands-last": functools.partial(bands, sizes.matrix, -1),
    "bands-first": functools.partial(bands, sizes.matrix, 0),
    "mask": functools.partial(mask, sizes.matrix),
    "stacked": functools.partial(stacked, sizes.layer),
    "nonfinite-uniform": functools.partial(nonfinite, "uniform", (8,) * 12, sizes.skip),
    "nonfinite-layers": functools.partial(nonfinite, "layers", LAYERS, sizes.skip),
    "vmap": functools.partial(vmap, sizes.configuration, sizes.configurations),
    "control": functools.partial(control_flow, sizes.control),
    "compile": functools.partial(builds.compilation, sizes.compiled_leaves, sizes.compiled_width),
    "trace": functools.partial(builds.tracing, sizes.traced_leaves, sizes.compiled_width),
  }


def uniform(n: int, accelerator: bool, dtype: Any = jnp.float32) -> Case:
  """Period 8 everywhere, twelve leaves, through `apply` and through `update`.

  Args:
    n: Parameters.
    accelerator: Whether the device is a GPU or TPU, for which the targets differ.
    dtype: Of parameters and gradients: float32, or bfloat16 with accumulators in float32.
  """
  full = dtype == jnp.float32
  widths = floors.FLOAT32 if full else floors.BFLOAT16
  shapes = twelve(n)
  entries, peer = {8: count(shapes)}, "MultiSteps"
  floor = floors.mean_bytes(entries, widths)
  tx, inputs = oc.cadence(peers.adamw(), 8), variants.inputs_of(shapes, dtype)
  apply_every = variants.peer("apply_every", peers.apply_every(8), inputs, 8, floor)
  return Case(
    f"uniform-{human(n)}" if full else "bfloat16",
    f"{'' if full else 'bfloat16, '}period 8, 12 leaves, {human(n).upper()} parameters",
    [
      *variants.ours("apply", tx, inputs, entries, peer, widths=widths),
      *variants.ours("update", tx, inputs, entries, peer, path="update", widths=widths),
      variants.peer(peer, peers.multi_steps(8), inputs, 8, floor),
      *([apply_every] if full else []),
      every_micro_step(inputs, count(shapes), widths),
    ],
    [
      *apply_targets(peer, 0.10, accelerator),
      *([] if accelerator else [Target("update", peer, 0.20)]),
      not_slower("apply"),
      not_slower("update"),
      Target("apply, static phase", "held bytes", 1.001),
      temporaries("apply", shapes, widths.accumulator),
      update_temporaries(shapes, widths.grad, widths.accumulator),
    ],
    "apply",
    peer,
    count(shapes),
    largest(shapes, widths.param),
  )


def layers(width: int, accelerator: bool) -> Case:
  """Twelve layers, four each of periods 8, 4 and 1."""
  shapes = dict.fromkeys(names(12), (width, width))
  every = dict(zip(shapes, LAYERS, strict=True))
  entries, inputs = dict.fromkeys((8, 4, 1), 4 * width**2), variants.inputs_of(shapes)
  tx = oc.cadence(peers.adamw(), every)
  partition = peers.partition(entries, every)
  return Case(
    "layers",
    f"12 layers of {width} x {width}, periods 8/4/1",
    [
      *variants.ours("apply", tx, inputs, entries, PARTITION),
      variants.peer(PARTITION, partition, inputs, 8, floors.mean_bytes(entries)),
      every_micro_step(inputs, count(shapes)),
    ],
    [
      *apply_targets(PARTITION, 0.12, accelerator),
      not_slower("apply"),
      temporaries("apply", shapes),
    ],
    "apply",
    PARTITION,
    count(shapes),
    largest(shapes),
  )


def quadrants(width: int) -> Case:
  """Four quadrants of a matrix."""
  half = np.arange(width) >= (width + 1) // 2
  periods = np.array(PERIODS).reshape(2, 2)
  return regions(
    "quadrants",
    f"quadrants 1/2/4/8 of {width} x {width}",
    oc.quadrants(periods.tolist()),
    periods[half[:, None].astype(int), half[None, :].astype(int)],
    1.3,
  )


def bands(width: int, axis: int) -> Case:
  """64 bands of one axis with four interleaved periods."""
  which = "last" if axis == -1 else "first"
  periods = list(PERIODS) * 16
  sizes = [len(part) for part in np.array_split(np.arange(width), len(periods))]
  along = np.repeat(periods, sizes)
  mask = along[None, :] if axis == -1 else along[:, None]
  return regions(
    f"bands-{which}",
    f"64 bands 1/2/4/8 of the {which} axis of {width} x {width}",
    oc.channels(periods, axis=axis),
    np.broadcast_to(mask, (width, width)),
    2.0,
  )


def mask(width: int) -> Case:
  """A random period for every entry."""
  chosen = np.random.default_rng(0).integers(0, 4, (width, width), np.uint8)
  mask = np.array(PERIODS, np.int32)[chosen]
  return regions("mask", f"random mask 1/2/4/8 of {width} x {width}", mask, mask, 3.0)


def regions(name: str, title: str, every: Any, mask: np.ndarray, limit: float) -> Case:
  """Regions of one matrix, beside the same matrix as one leaf.

  The baseline is one leaf of period 8 with a static phase. Its held and its firing micro-steps
  are timed separately; their weighted mean updates as many entries per micro-step as the regions
  do on average.

  Args:
    name: Name of the case.
    title: Title of the case.
    every: The cadence of the matrix.
    mask: The period of each of its entries.
    limit: How much slower than the baseline it may be.
  """
  shapes, masks = {"w": mask.shape}, {"w": mask}
  inputs, entries = variants.inputs_of(shapes), variants.entries_of(masks)
  split = variants.split_inputs(inputs, masks)
  floor, n = floors.mean_bytes(entries), mask.size
  labels = {"w": {str(p): p for p in entries}}
  share = sum(k / period for period, k in entries.items()) / n
  held, firing = one_leaf(inputs, n)
  blended = n * ((1 - share) * floors.held() + share * floors.firing())
  return Case(
    name,
    title,
    [
      *variants.ours("apply", oc.cadence(peers.adamw(), {"w": every}), inputs, entries, PARTITION),
      variants.peer(PARTITION, peers.partition(entries, labels), split, 8, floor),
      held,
      firing,
    ],
    [
      Target("apply", SAME_MEAN, limit),
      not_slower("apply"),
      temporaries("apply", shapes),
    ],
    "apply",
    PARTITION,
    n,
    largest(shapes),
    Blend(SAME_MEAN, held.name, firing.name, share, blended),
  )


def one_leaf(inputs: variants.Inputs, n: int) -> tuple[Variant, Variant]:
  """One leaf that never fires, and one that always does; both run programs of period 8."""
  tx = oc.cadence(peers.adamw(), 8)
  held, firing = variants.ours("one leaf", tx, inputs, {8: n}, None, role="baseline")[1].steps[-2:]
  common = "baseline", inputs, variants.init_of(tx)
  return (
    Variant("one leaf, held", *common, (held,) * 8, n * floors.held()),
    Variant("one leaf, firing", *common, (firing,) * 8, n * floors.firing()),
  )


def stacked(width: int) -> Case:
  """Twelve layers stacked in one leaf, beside the same layers as leaves."""
  stack, apart = {"w": (12, width, width)}, dict.fromkeys(names(12), (width, width))
  masks = {"w": np.broadcast_to(np.array(LAYERS, np.int32)[:, None, None], stack["w"])}
  inputs, entries = variants.inputs_of(stack), variants.entries_of(masks)
  separate = separate_inputs(inputs, list(apart))
  every = dict(zip(apart, LAYERS, strict=True))
  baseline = "twelve leaves"
  return Case(
    "stacked",
    f"12 stacked layers of {width} x {width}, periods 8/4/1",
    [
      *variants.ours(
        "apply", oc.cadence(peers.adamw(), {"w": oc.stacked(LAYERS)}), inputs, entries, PARTITION
      ),
      variants.ours(
        baseline, oc.cadence(peers.adamw(), every), separate, entries, PARTITION, role="baseline"
      )[0],
      variants.peer(
        PARTITION, peers.partition(entries, every), separate, 8, floors.mean_bytes(entries)
      ),
    ],
    [
      Target("apply", baseline, 1.3),
      not_slower("apply"),
      temporaries("apply", stack),
    ],
    "apply",
    PARTITION,
    count(stack),
    largest(stack),
  )


def separate_inputs(inputs: variants.Inputs, leaves: list[str]) -> variants.Inputs:
  """The layers of one stacked leaf as leaves."""

  def split(tree: Any) -> Any:
    return dict(zip(leaves, tree["w"], strict=True))

  def restore(tree: Any) -> Any:
    return {"w": jnp.stack(list(tree.values()))}

  return variants.Inputs(lambda: split(inputs.params()), lambda: split(inputs.grads()), restore)


def nonfinite(what: str, periods: Sequence[int], n: int) -> Case:
  """`nonfinite="skip"` beside `"propagate"`, where every gradient is finite."""
  shapes = twelve(n)
  inputs, every = variants.inputs_of(shapes), dict(zip(shapes, periods, strict=True))
  size = count(shapes) // 12
  entries = {p: size * periods.count(p) for p in dict.fromkeys(periods)}
  skip = oc.cadence(peers.adamw(), every, nonfinite="skip")
  propagate = oc.cadence(peers.adamw(), every)
  if len(entries) == 1:
    peer = "MultiSteps, skip_not_finite"
    peer_tx = peers.multi_steps(8, should_skip_update_fn=optax.skip_not_finite)
  else:
    peer, peer_tx = PARTITION, peers.partition(entries, every)
  return Case(
    f"nonfinite-{what}",
    f'nonfinite="skip", periods {"/".join(map(str, entries))}, {human(n).upper()} parameters',
    [
      *variants.ours("skip", skip, inputs, entries, peer),
      variants.ours("propagate", propagate, inputs, entries, peer, role="baseline")[0],
      variants.peer(peer, peer_tx, inputs, 8, floors.mean_bytes(entries)),
    ],
    [
      Target("skip", "propagate", 1.3),
      not_slower("skip"),
      temporaries("skip", shapes),
    ],
    "skip",
    peer,
    count(shapes),
    largest(shapes),
  )


def vmap(n: int, configurations: int) -> Case:
  """Many configurations in one program with traced periods, beside one run for each."""
  width = 2 ** (int(math.log2(n)) // 2)
  shapes, single = (configurations, width, n // width), "single runs"
  periods = jnp.array([PERIODS[i % 4] for i in range(configurations)], jnp.int32)
  entries = {p: int((periods == p).sum()) * n for p in PERIODS}

  def init(params: Any, grads: Any) -> Any:
    return oc.cadence(peers.adamw(), grads["period"]).init(params)

  def step(params: Any, state: Any, grads: Any) -> Any:
    return oc.cadence(peers.adamw(), grads["period"]).apply(params, state, grads["grads"])

  def params() -> Any:
    return variants.waves({"w": shapes}, 0.0)

  def grads() -> Any:
    return {"grads": variants.waves({"w": shapes}, 0.5), "period": periods}

  def unstacked(tree: Any) -> list[Any]:
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(configurations)]

  def restore(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)

  batched = variants.Inputs(params, grads)
  alone = variants.Inputs(
    lambda: unstacked(params()), lambda: unstacked(grads()), restore, configurations
  )
  floor = floors.mean_bytes(entries)
  return Case(
    "vmap",
    f"vmap over {configurations} configurations of {human(n).upper()} parameters",
    [
      Variant("vmap", "ours", batched, jax.vmap(init), (jax.vmap(step),) * 8, floor, single),
      # Compiled, so that the period is traced as it is in a step, and not a number.
      Variant(single, "baseline", alone, jax.jit(init), (step,) * 8, floor),
    ],
    [Target("vmap", single, 1.0)],
    "vmap",
    single,
    configurations * n,
    4 * configurations * n,
  )


def control_flow(n: int) -> Case:
  """Four ways to write the branch that fires when a window ends."""
  shapes = twelve(n)
  inputs, peer = variants.inputs_of(shapes), "MultiSteps"
  floor, tx = floors.mean_bytes({8: count(shapes)}), peers.adamw()

  def init(params: Any, grads: Any) -> Any:
    del grads
    return control.init(tx, params)

  def static(phase: int, *args: Any) -> Any:
    return control.stepper(tx, 8, "static", phase)(*args)

  steps = {kind: (control.stepper(tx, 8, kind),) * 8 for kind in control.KINDS}
  steps["static phase"] = variants.static_steps(static, 8, [8])
  return Case(
    "control",
    f"kinds of branch, period 8, 12 leaves, {human(n).upper()} parameters",
    [
      *(Variant(kind, "ours", inputs, init, cycle, floor, peer) for kind, cycle in steps.items()),
      variants.peer(peer, peers.multi_steps(8), inputs, 8, floor),
    ],
    [],
    "while_loop",
    peer,
    count(shapes),
    largest(shapes),
  )


def every_micro_step(
  inputs: variants.Inputs, n: int, widths: floors.Widths = floors.FLOAT32
) -> Variant:
  """Plain AdamW at every micro-step: it computes something else, and is there for its time."""
  floor = n * floors.every_micro_step(widths)
  return variants.peer(ADAMW, peers.adamw(), inputs, 8, floor)


def apply_targets(peer: str, limit: float, accelerator: bool) -> list[Target]:
  """What `apply` has to reach, on a CPU and on an accelerator."""
  if accelerator:
    return [Target("apply", "floor", 1.15), Target("apply", peer, 0.35)]
  return [Target("apply", "floor", 1.3), Target("apply", peer, limit)]


def not_slower(name: str) -> Target:
  """The variant with a static phase is no slower than the one without."""
  return Target(f"{name}, static phase", name, 1.0, noise=True)


def temporaries(name: str, shapes: Any, width: int = 4) -> Target:
  """Temporaries are no larger than the largest leaf."""
  return Target(name, "temporaries", 1.0, allowance=largest(shapes, width))


def update_temporaries(shapes: Any, width: int = 4, largest_width: int = 4) -> Target:
  """The same for `update`; between it and `apply_updates` the updates are temporaries too."""
  allowance = width * count(shapes) + largest(shapes, largest_width)
  allowed = "updates and the largest leaf"
  return Target("update", "temporaries", 1.0, allowance=allowance, allowed=allowed)


def twelve(n: int) -> dict[str, tuple[int, int]]:
  """Twelve square leaves of n parameters together, the width a multiple of eight."""
  width = max(8, 8 * round(math.sqrt(n / 12) / 8))
  return dict.fromkeys(names(12), (width, width))


def names(n: int) -> list[str]:
  """Names of layers, in order."""
  return [f"layer_{i:04}" for i in range(n)]


def count(shapes: dict[str, tuple[int, ...]]) -> int:
  """Parameters of a tree of shapes."""
  return sum(map(math.prod, shapes.values()))


def largest(shapes: dict[str, tuple[int, ...]], width: int = 4) -> int:
  """Bytes of the largest leaf."""
  return width * max(map(math.prod, shapes.values()))


def human(n: int) -> str:
  """A number of parameters in three digits: 12m for twelve million."""
  for unit, size in (("b", 1e9), ("m", 1e6), ("k", 1e3)):
    if n >= size:
      return f"{n / size:.3g}{unit}"
  return str(n)
