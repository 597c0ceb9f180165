"""How cases are timed: compiled ahead, checked, warmed up, interleaved, over whole cycles.

Every round times every variant once, and the bandwidth too, each time starting with another one,
so that a machine that becomes slower or faster affects all alike. The host waits for the device at
the end of a cycle, not of each micro-step. What is compared is in `cases`.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
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
# In a sum of eight gradients the rounding depends on the order, which nobody promises.
TOLERANCES = {"float32": 2e-5, "bfloat16": 2**-6, "bool": 0.5}

Tick = Callable[[str], None]


class Run:
  """A variant that is compiled, with its parameters and state while it is running."""

  def __init__(self, variant: variants.Variant, grads: Any):
    self.variant, self.grads, self.carry, self.repeats = variant, grads, None, 1
    self.programs, self.build = compile_steps(variant, grads)

  def start(self) -> None:
    """Allocates the state."""
    of_runs = self.variant.inputs.of_runs
    pairs = zip(of_runs(self.variant.inputs.params()), of_runs(self.grads), strict=True)
    self.carry = [(p, self.variant.init(p, g)) for p, g in pairs]

  def stop(self) -> None:
    """Frees the state."""
    self.carry = None

  def micro_step(self, t: int, grads: Any) -> None:
    """Hands micro-step t of a cycle to the device."""
    program = self.programs[self.variant.steps[t]]
    pairs = zip(self.carry, self.variant.inputs.of_runs(grads), strict=True)
    self.carry = [program(*carry, g) for carry, g in pairs]

  def timed(self) -> float:
    """Seconds per micro-step over whole cycles."""
    start = time.perf_counter()
    for _ in range(self.repeats):
      for t in range(len(self.variant.steps)):
        self.micro_step(t, self.grads)
    jax.block_until_ready(self.carry)
    micro_steps = self.repeats * len(self.variant.steps) * self.variant.spans
    return (time.perf_counter() - start) / micro_steps

  def warm_up(self, least: float) -> None:
    """Runs a cycle, and chooses how many cycles make a timing of at least so many seconds."""
    jax.block_until_ready(self.carry)
    self.repeats = 1
    micro_steps = len(self.variant.steps) * self.variant.spans
    cycle = self.timed() * micro_steps
    if cycle < least:
      cycle = self.timed() * micro_steps
      self.repeats = max(1, round(least / cycle))

  @property
  def state_bytes(self) -> int:
    """Bytes of parameters, state and temporaries while running."""
    inputs = self.variant.inputs
    shapes = step_shapes(self.variant, self.grads)[:2]
    return inputs.copies * tree_bytes(shapes) + (self.build["temp_bytes"] or 0)


def compile_steps(variant: variants.Variant, grads: Any) -> tuple[dict[Any, Any], dict[str, Any]]:
  """Compiles every different program of a variant; also returns how long that took."""
  programs, build = {}, {"lower_s": 0.0, "compile_s": 0.0, "temp_bytes": None, "peak_bytes": None}
  shapes = step_shapes(variant, grads)
  jit = variant.jit or functools.partial(jax.jit, donate_argnums=(0, 1))
  for step in dict.fromkeys(variant.steps):
    start = time.perf_counter()
    lowered = jit(step).lower(*shapes)
    middle = time.perf_counter()
    programs[step] = lowered.compile()
    build["lower_s"] += middle - start
    build["compile_s"] += time.perf_counter() - middle
    memory = programs[step].memory_analysis()
    if memory is not None:
      build["temp_bytes"] = max(build["temp_bytes"] or 0, memory.temp_size_in_bytes)
      build["peak_bytes"] = max(build["peak_bytes"] or 0, peak_bytes(memory))
  return programs, build | {"programs": len(programs)}


def peak_bytes(memory: Any) -> int:
  """Bytes that a program has at most: arguments, temporaries, and results that replace none."""
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return memory.argument_size_in_bytes + memory.temp_size_in_bytes + results


def step_shapes(variant: variants.Variant, grads: Any) -> tuple[Any, Any, Any]:
  """Shapes of a program's arguments `(params, state, grads)`."""
  inputs = variant.inputs
  params, grads = inputs.of_runs(jax.eval_shape(inputs.params))[0], inputs.of_runs(grads)[0]
  return params, jax.eval_shape(variant.init, params, grads), grads


def tree_bytes(tree: Any) -> int:
  """Bytes of all arrays of a tree."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bandwidth_variant(entries: int) -> variants.Variant:
  """Measures the bandwidth: `x + y` into the memory of x moves twelve bytes an entry."""
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

  Raises:
    Mismatch: If a variant computes something else than its reference.
  """
  inputs = dict.fromkeys(variant.inputs for variant in case.variants)
  grads = {x: jax.block_until_ready(x.grads()) for x in inputs}
  runs: list[Run] = []
  failed: dict[str, str] = {}
  for variant in case.variants:
    with noting_memory(failed, variant.name):
      runs.append(Run(variant, grads[variant.inputs]))
    tick(f"{case.name}: compiled {variant.name}")
  errors = check(case, runs, failed, tick)
  timed = [run for run in runs if run.variant.name not in failed]
  meter = bandwidth_variant(bandwidth)
  timed.append(Run(meter, meter.inputs.grads()))
  together = sum(run.state_bytes for run in timed)
  together += tree_bytes(list({id(run.grads): run.grads for run in timed}.values()))
  samples = interleave(timed, rounds, least, together <= 0.6 * memory, failed, case.name, tick)
  return summary(case, timed, samples, errors, failed)


@contextlib.contextmanager
def noting_memory(failed: dict[str, str], name: str) -> Iterator[None]:
  """Where the device has not enough memory for a variant, notes that and goes on."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error) and "ut of memory" not in str(error):
      raise
    failed[name] = "out of memory"


class Mismatch(Exception):
  """A variant does not arrive at the parameters of its reference."""


def check(
  case: cases.Case, runs: Sequence[Run], failed: dict[str, str], tick: Tick
) -> dict[str, float]:
  """Compares each variant with its reference: the parameters after two whole cycles.

  Returns:
    For each variant that has a reference, its largest error as a share of what rounding
    is allowed.

  Raises:
    Mismatch: If one is larger than that.
  """
  references = {run.variant.reference for run in runs}
  order = sorted(runs, key=lambda run: run.variant.name not in references)
  expected, errors = {}, {}
  for run in order:
    name, reference = run.variant.name, run.variant.reference
    if name in references or reference in expected:
      params = None
      with noting_memory(failed, name):
        params = trained(run)
      run.stop()
      if params is not None and reference in expected:
        errors[name] = worst(params, expected[reference])
        if not errors[name] <= 1.0:  # NaN is an error too
          raise Mismatch(
            f"{case.name}: {name} differs from {reference} by {errors[name]:.3g} times what"
            " rounding allows"
          )
      if params is not None and name in references:
        expected[name] = params
    tick(f"{case.name}: checked {name}")
  return errors


def trained(run: Run) -> Any:
  """Parameters after two cycles, with other gradients at each micro-step."""
  run.start()
  for t in range(CHECKED_CYCLES * len(run.variant.steps)):
    run.micro_step(t % len(run.variant.steps), scaled(run.grads, 1.0 + (3 * t) % 7 / 2))
  inputs, params = run.variant.inputs, [params for params, _ in run.carry]
  return jax.block_until_ready(inputs.restore(params[0] if inputs.copies == 1 else params))


@jax.jit
def scaled(grads: Any, factor: float) -> Any:
  """Gradients of another micro-step: a positive multiple, so that their sum is never near 0."""

  def scale(x: jax.Array) -> jax.Array:
    return x * factor.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x

  return jax.tree.map(scale, grads)


def worst(params: Any, expected: Any) -> float:
  """The largest difference of two trees, as a share of what rounding is allowed."""
  errors = jax.tree.leaves(jax.tree.map(_worst_of_leaf, params, expected))
  return float(np.max([float(error) for error in errors]))


@jax.jit
def _worst_of_leaf(param: jax.Array, expected: jax.Array) -> jax.Array:
  tolerance = TOLERANCES[str(expected.dtype)]
  param, expected = param.astype(jnp.float32), expected.astype(jnp.float32)
  # Parameters are around 0.02, and the updates of small ones are as large as those of others.
  allowed = tolerance * jnp.maximum(jnp.abs(expected), 0.01)
  return jnp.max(jnp.abs(param - expected) / allowed)


def interleave(
  runs: Sequence[Run],
  rounds: int,
  least: float,
  resident: bool,
  failed: dict[str, str],
  label: str,
  tick: Tick,
) -> dict[str, list[float]]:
  """Times every run once a round.

  Args:
    runs: What is timed.
    rounds: How often.
    least: Seconds that a timing should last at least.
    resident: Whether all runs keep their arrays on the device between two timings.
    failed: Where variants that the device has no memory for are noted.
    label: What progress is reported under.
    tick: Called with what was done.

  Returns:
    Seconds per micro-step in each round, by name of the variant.
  """
  samples: dict[str, list[float]] = {run.variant.name: [] for run in runs}
  for i in range(rounds):
    start = i % len(runs)
    for run in [*runs[start:], *runs[:start]]:
      name = run.variant.name
      if name not in failed:
        with noting_memory(failed, name):
          samples[name].append(sample(run, least))
      if not resident or name in failed:
        run.stop()
      tick(f"{label}: round {i + 1} of {rounds}, {name}")
  for run in runs:
    run.stop()
  return {name: taken for name, taken in samples.items() if name not in failed}


def sample(run: Run, least: float) -> float:
  """Times a run once; starts it and warms it up first if necessary."""
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
  assert meter.variant.floor_bytes is not None
  bandwidth = meter.variant.floor_bytes / float(np.median(samples[BANDWIDTH]))
  rows = []
  for run in runs:
    variant = run.variant
    if variant.name in samples and variant is not meter.variant:
      row = statistics(samples[variant.name]) | run.build
      row |= {"name": variant.name, "role": variant.role, "error": errors.get(variant.name)}
      if variant.floor_bytes is not None:
        row |= floor_of(row, variant.floor_bytes, bandwidth) | held_bytes(run)
      if case.unit is not None:
        row["per_s"] = 1e3 * case.units / row["median_ms"]
      rows.append(row)
  if case.blend and {case.blend.held, case.blend.firing} <= samples.keys():
    rows.append(blended(case.blend, samples, bandwidth))
  missing = [{"name": name, "failed": reason} for name, reason in failed.items()]
  return finished(case, rows, missing) | {
    "unit": "ms per micro-step",
    "per_s_of": case.unit,
    "parameters": case.parameters,
    "largest_leaf_bytes": case.largest_leaf,
    "bandwidth_gb_s": bandwidth / 1e9,
    "bandwidth": statistics(samples[BANDWIDTH]),
  }


def finished(case: Any, rows: list[dict[str, Any]], missing: Any) -> dict[str, Any]:
  """The part of the results that all kinds of cases have."""
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
  """The floor of a variant, and how many times that its time is."""
  floor_ms = 1e3 * floor_bytes / bandwidth
  return {
    "floor_bytes": floor_bytes,
    "floor_ms": floor_ms,
    "ratio_floor": row["median_ms"] / floor_ms,
  }


def held_bytes(run: Run) -> dict[str, Any]:
  """Bytes that the compiled held micro-step accesses, over those that it has to."""
  if run.variant.held is None:
    return {}
  cost = run.programs[run.variant.held].cost_analysis()
  cost = cost[0] if isinstance(cost, list) else cost
  accessed = (cost or {}).get("bytes accessed")
  return {"ratio_held_bytes": accessed / run.variant.held_bytes} if accessed else {}


def blended(
  blend: cases.Blend, samples: dict[str, list[float]], bandwidth: float
) -> dict[str, Any]:
  """The row of a baseline that is computed from two variants, round by round."""
  held, firing = np.array(samples[blend.held]), np.array(samples[blend.firing])
  row = statistics(((1 - blend.share) * held + blend.share * firing).tolist())
  row |= {"name": blend.name, "role": "baseline", "error": None}
  return row | floor_of(row, blend.floor_bytes, bandwidth)


def run_build_case(case: builds.BuildCase, rounds: int, tick: Tick) -> dict[str, Any]:
  """Times how long it takes to trace or to compile the programs of a case, once each a round."""
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
  """Seconds to trace a new program or, without the time to trace it, to compile it; or to call."""
  fn, arguments = variant.make()
  if stage == "call":
    start = time.perf_counter()
    jax.block_until_ready(fn(*arguments))
    return time.perf_counter() - start
  jitted = jax.jit(fn, donate_argnums=(0, 1))
  start = time.perf_counter()
  if stage == "trace":
    jitted.trace(*arguments)
    return time.perf_counter() - start
  lowered = jitted.lower(*arguments)
  start = time.perf_counter()
  lowered.compile()
  return time.perf_counter() - start
