"""How things are timed: compiled ahead, checked, warmed up, interleaved, over whole cycles.

Every round times every variant once, starting with another one each time, so that a drift of
the machine hits all alike; the bandwidth is one of them. A device that runs behind the host is
waited for at the end of a cycle, not of a micro-step. What is compared is in `cases`.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import builds
from benchmarks import cases
from benchmarks import targets
from benchmarks import variants

BANDWIDTH = "x + y"
CHECKED_CYCLES = 2
# Without it the rounding of a sum of eight would be compared, which is nobody's to promise.
TOLERANCES = {"float32": 2e-5, "bfloat16": 2**-6, "bool": 0.5}

Tick = Callable[[str], None]


class Run:
  """One variant: its programs, and its arrays while it is running."""

  def __init__(self, variant: variants.Variant, grads: Any):
    self.variant, self.grads, self.carry, self.repeats = variant, grads, None, 1
    self.programs, self.build = compile_steps(variant, grads)

  def start(self) -> None:
    """Allocates the state."""
    inputs = self.variant.inputs
    params = inputs.params()
    if inputs.copies == 1:
      self.carry = (params, self.variant.init(params, self.grads))
    else:
      pairs = zip(params, self.grads, strict=True)
      self.carry = [(p, self.variant.init(p, g)) for p, g in pairs]

  def stop(self) -> None:
    """Frees the state."""
    self.carry = None

  def micro_step(self, t: int, grads: Any) -> None:
    """Hands micro-step t of a cycle to the device."""
    program = self.programs[self.variant.steps[t]]
    if self.variant.inputs.copies == 1:
      self.carry = program(*self.carry, grads)
    else:
      pairs = zip(self.carry, grads, strict=True)
      self.carry = [program(*carry, g) for carry, g in pairs]

  def timed(self) -> float:
    """Seconds per micro-step over whole cycles."""
    start = time.perf_counter()
    for _ in range(self.repeats):
      for t in range(len(self.variant.steps)):
        self.micro_step(t, self.grads)
    jax.block_until_ready(self.carry)
    return (time.perf_counter() - start) / (self.repeats * len(self.variant.steps))

  def warm_up(self, least: float) -> None:
    """One cycle; from then on as many at a time as last at least so many seconds."""
    jax.block_until_ready(self.carry)
    self.repeats = 1
    cycle = self.timed() * len(self.variant.steps)
    if cycle < least:
      cycle = self.timed() * len(self.variant.steps)
      self.repeats = max(1, round(least / cycle))

  @property
  def state_bytes(self) -> int:
    """Bytes of the state while running, temporaries included."""
    inputs = self.variant.inputs
    shapes = step_shapes(self.variant, self.grads)[:2]
    return inputs.copies * tree_bytes(shapes) + (self.build["temp_bytes"] or 0)


def compile_steps(variant: variants.Variant, grads: Any) -> tuple[dict[Any, Any], dict[str, Any]]:
  """Every different program of a variant, and what building them took."""
  programs, build = {}, {"lower_s": 0.0, "compile_s": 0.0, "temp_bytes": None}
  shapes = step_shapes(variant, grads)
  for step in dict.fromkeys(variant.steps):
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*shapes)
    middle = time.perf_counter()
    programs[step] = lowered.compile()
    build["lower_s"] += middle - start
    build["compile_s"] += time.perf_counter() - middle
    memory = programs[step].memory_analysis()
    if memory is not None:
      build["temp_bytes"] = max(build["temp_bytes"] or 0, memory.temp_size_in_bytes)
  return programs, build | {"programs": len(programs)}


def step_shapes(variant: variants.Variant, grads: Any) -> tuple[Any, Any, Any]:
  """Shapes of a program's arguments."""
  params = jax.eval_shape(variant.inputs.params)
  if variant.inputs.copies > 1:
    params, grads = params[0], grads[0]
  return params, jax.eval_shape(variant.init, params, grads), grads


def tree_bytes(tree: Any) -> int:
  """Bytes of all arrays of a tree."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bandwidth_variant(entries: int) -> variants.Variant:
  """A donated `x + y`: twelve bytes an entry."""
  inputs = variants.inputs_of((entries,))

  def step(x: jax.Array, state: Any, y: jax.Array) -> Any:
    return x + y, state

  return variants.Variant(
    BANDWIDTH, "bandwidth", inputs, lambda *_: (), (step,) * 4, 12.0 * entries
  )


def run_case(
  case: cases.Case, bandwidth: int, rounds: int, least: float, memory: int, tick: Tick
) -> dict[str, Any]:
  """Builds, checks and times a case.

  Args:
    case: The case.
    bandwidth: Entries of the arrays that the bandwidth is measured with.
    rounds: How often each variant is timed.
    least: Seconds that a timing should last at least.
    memory: Bytes on the device; decides whether all variants stay there.
    tick: Called with what was done, for a progress bar.

  Returns:
    The results, as the JSON file holds them.
  """
  grads = {v.inputs: None for v in case.variants}
  grads = {inputs: jax.block_until_ready(inputs.grads()) for inputs in grads}
  runs, failed = {}, {}
  for variant in case.variants:
    attempt(failed, variant.name, lambda v=variant: runs.update({v: Run(v, grads[v.inputs])}))
    tick(f"{case.name}: compiled {variant.name}")
  live = [run for variant, run in runs.items() if variant.name not in failed]
  errors = check(case, live, failed, tick)
  timed = [run for run in live if run.variant.name not in failed]
  meter = bandwidth_variant(bandwidth)
  timed.append(Run(meter, meter.inputs.grads()))
  together = sum(run.state_bytes for run in timed)
  together += tree_bytes(list({id(run.grads): run.grads for run in timed}.values()))
  samples = interleave(timed, rounds, least, together <= 0.6 * memory, failed, case.name, tick)
  return summary(case, timed, samples, errors, failed)


def attempt(failed: dict[str, str], name: str, fn: Callable[[], Any]) -> Any:
  """Calls `fn`; notes a variant that the device has no memory for, and goes on."""
  try:
    return fn()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error) and "ut of memory" not in str(error):
      raise
    failed[name] = "out of memory"
    return None


class Mismatch(Exception):
  """A variant does not arrive at the parameters of its peer."""


def check(
  case: cases.Case, runs: Sequence[Run], failed: dict[str, str], tick: Tick
) -> dict[str, float]:
  """Compares the parameters after two whole cycles; the gradients change all the time.

  Returns:
    For each variant that has a reference, its largest error as a share of what rounding
    is allowed.

  Raises:
    Mismatch: If one is larger than that.
  """
  references = {run.variant.reference for run in runs}
  order = sorted(runs, key=lambda run: run.variant.name not in references)
  arrived, errors = {}, {}
  for run in order:
    name, reference = run.variant.name, run.variant.reference
    if name in references or reference in arrived:
      found = attempt(failed, name, lambda run=run: arrive(run))
      run.stop()
      if found is not None and reference in arrived:
        errors[name] = worst(found, arrived[reference])
        if not errors[name] <= 1.0:
          raise Mismatch(
            f"{case.name}: {name} differs from {reference} by {errors[name]:.3g} times what"
            " rounding allows"
          )
      if found is not None and name in references:
        arrived[name] = found
    tick(f"{case.name}: checked {name}")
  return errors


def arrive(run: Run) -> Any:
  """Parameters after two cycles."""
  run.start()
  for t in range(CHECKED_CYCLES * len(run.variant.steps)):
    run.micro_step(t % len(run.variant.steps), scaled(run.grads, 1.0 + (3 * t) % 7 / 2))
  carry = run.carry
  params = carry[0] if run.variant.inputs.copies == 1 else [params for params, _ in carry]
  return jax.block_until_ready(run.variant.inputs.restore(params))


@jax.jit
def scaled(grads: Any, factor: float) -> Any:
  """Gradients of another micro-step: all in proportion, so that none nearly cancel."""

  def scale(x: jax.Array) -> jax.Array:
    return x * factor.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x

  return jax.tree.map(scale, grads)


def worst(found: Any, expected: Any) -> float:
  """The largest difference, as a share of what rounding is allowed."""
  errors = jax.tree.leaves(jax.tree.map(_worst, found, expected))
  return float(np.max([float(error) for error in errors]))


@jax.jit
def _worst(found: jax.Array, expected: jax.Array) -> jax.Array:
  tolerance = TOLERANCES[str(expected.dtype)]
  found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
  # Parameters are about 0.02 wide; a smaller one moves by as much as they do.
  allowed = tolerance * jnp.maximum(jnp.abs(expected), 0.01)
  return jnp.max(jnp.abs(found - expected) / allowed)


def interleave(
  runs: Sequence[Run],
  rounds: int,
  least: float,
  resident: bool,
  failed: dict[str, str],
  label: str,
  tick: Tick,
) -> dict[str, list[float]]:
  """Times every run once a round; seconds per micro-step by name of the variant."""
  samples: dict[str, list[float]] = {run.variant.name: [] for run in runs}
  for i in range(rounds):
    start = i % len(runs)
    for run in [*runs[start:], *runs[:start]]:
      name = run.variant.name
      if name not in failed:
        attempt(failed, name, lambda run=run: samples[run.variant.name].append(sample(run, least)))
      if not resident or name in failed:
        run.stop()
      tick(f"{label}: round {i + 1} of {rounds}, {name}")
  for run in runs:
    run.stop()
  return {name: taken for name, taken in samples.items() if name not in failed}


def sample(run: Run, least: float) -> float:
  """One timing, warmed up if the run has just started."""
  if run.carry is None:
    run.start()
    run.warm_up(least)
  return run.timed()


def summary(
  case: cases.Case,
  runs: Sequence[Run],
  samples: dict[str, list[float]],
  errors: dict[str, float],
  failed: dict[str, str],
) -> dict[str, Any]:
  """The results of a case, as the JSON file holds them."""
  meter = next(run for run in runs if run.variant.name == BANDWIDTH)
  bandwidth = meter.variant.floor_bytes / float(np.median(samples[BANDWIDTH]))
  rows = []
  for run in runs:
    variant = run.variant
    if variant.name in samples and variant is not meter.variant:
      row = statistics(samples[variant.name]) | run.build
      row |= {"name": variant.name, "role": variant.role, "error": errors.get(variant.name)}
      row |= floor_of(row, variant.floor_bytes, bandwidth) | held_bytes(run)
      rows.append(row)
  if case.blend and {case.blend.held, case.blend.firing} <= samples.keys():
    rows.append(blended(case.blend, samples, bandwidth))
  missing = [{"name": name, "failed": why} for name, why in failed.items()]
  return finished(case, rows, missing) | {
    "unit": "ms per micro-step",
    "parameters": case.parameters,
    "largest_leaf_bytes": case.largest_leaf,
    "bandwidth_gb_s": bandwidth / 1e9,
    "bandwidth": statistics(samples[BANDWIDTH]),
  }


def finished(case: Any, rows: list[dict[str, Any]], missing: Any) -> dict[str, Any]:
  """What all kinds of cases have in common."""
  by_name = {row["name"]: row for row in rows}
  peer = by_name.get(case.peer)
  for row in rows:
    row["ratio_peer"] = row["median_ms"] / peer["median_ms"] if peer else None
  return {
    "name": case.name,
    "title": case.title,
    "ours": case.ours,
    "peer": case.peer,
    "variants": rows,
    "failed": missing,
    "targets": [targets.evaluate(target, by_name) for target in case.targets],
  }


def statistics(samples: Sequence[float]) -> dict[str, Any]:
  """Median and quartiles, in milliseconds."""
  milliseconds = [1e3 * s for s in samples]
  q1, median, q3 = np.percentile(milliseconds, [25, 50, 75])
  return {
    "median_ms": float(median),
    "q1_ms": float(q1),
    "q3_ms": float(q3),
    "samples_ms": milliseconds,
  }


def floor_of(row: dict[str, Any], floor_bytes: float, bandwidth: float) -> dict[str, Any]:
  """The floor of a variant, and how close it comes."""
  floor_ms = 1e3 * floor_bytes / bandwidth
  return {
    "floor_bytes": floor_bytes,
    "floor_ms": floor_ms,
    "ratio_floor": row["median_ms"] / floor_ms,
  }


def held_bytes(run: Run) -> dict[str, Any]:
  """What the compiled held micro-step accesses, over what it has to."""
  if run.variant.held is None:
    return {}
  cost = run.programs[run.variant.held].cost_analysis()
  cost = cost[0] if isinstance(cost, list) else cost
  accessed = (cost or {}).get("bytes accessed")
  return {"ratio_held_bytes": accessed / run.variant.held_bytes} if accessed else {}


def blended(
  blend: cases.Blend, samples: dict[str, list[float]], bandwidth: float
) -> dict[str, Any]:
  """A baseline computed from two variants, round by round."""
  held, firing = np.array(samples[blend.held]), np.array(samples[blend.firing])
  row = statistics(((1 - blend.share) * held + blend.share * firing).tolist())
  row |= {"name": blend.name, "role": "baseline", "error": None}
  return row | floor_of(row, blend.floor_bytes, bandwidth)


def run_build_case(case: builds.BuildCase, rounds: int, tick: Tick) -> dict[str, Any]:
  """Traces or compiles every program of a case once a round."""
  samples: dict[str, list[float]] = {variant.name: [] for variant in case.variants}
  build_time(case.variants[0], case.stage)  # imports and caches of the first program ever built
  for i in range(rounds):
    start = i % len(case.variants)
    for variant in [*case.variants[start:], *case.variants[:start]]:
      samples[variant.name].append(build_time(variant, case.stage))
      tick(f"{case.name}: round {i + 1} of {rounds}, {variant.name}")
  rows = [
    statistics(samples[variant.name]) | {"name": variant.name, "role": variant.role}
    for variant in case.variants
  ]
  return finished(case, rows, []) | {"unit": f"ms to {case.stage}"}


def build_time(variant: builds.BuildVariant, stage: str) -> float:
  """Seconds to trace, or, once traced, to compile a program that nobody has seen before."""
  fn, arguments = variant.make()
  jitted = jax.jit(fn, donate_argnums=(0, 1))
  start = time.perf_counter()
  if stage == "trace":
    jitted.trace(*arguments)
    return time.perf_counter() - start
  lowered = jitted.lower(*arguments)
  start = time.perf_counter()
  lowered.compile()
  return time.perf_counter() - start
