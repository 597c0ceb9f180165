"""Cases about policies: what one costs beside the fixed cadence of the same mean period.

How cases are timed is in `measure`; the other cases are in `cases`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

import optax_cadence as oc
from benchmarks import builds
from benchmarks import cases
from benchmarks import floors
from benchmarks import peers
from benchmarks import variants
from benchmarks.sizes import Sizes
from benchmarks.targets import Target

PERIOD = 8
LAYERS = 12


def all_cases(sizes: Sizes) -> dict[str, Callable[[], Any]]:
  """For each case a function that builds it."""
  return {
    "policy": functools.partial(overhead, sizes.skip),
    "policy-compile": functools.partial(compilation, sizes.compiled_width),
  }


class Asked(oc.Policy):
  """Due every `PERIOD` micro-steps, and asked at others too, to see what asking costs."""

  def due(self, window: oc.Statistics, state: Any) -> jax.Array:
    del state
    return window.length.max() >= PERIOD


def overhead(n: int) -> Any:
  """Policies that turn out to fire every eight micro-steps, beside the fixed period 8."""
  shapes = cases.twelve(n)
  inputs, entries, fixed = variants.inputs_of(shapes), {PERIOD: cases.count(shapes)}, "period 8"

  def dynamic(name: str, every: Any, role: str = "ours") -> variants.Variant:
    tx = oc.cadence(peers.adamw(), every)
    reference = None if role == "baseline" else fixed
    return variants.ours(name, tx, inputs, entries, reference, role=role)[0]

  # All gradients of the benchmark are the same: without noise `until_certain` is due as soon as
  # it is asked.
  policies = {
    "until_certain, asked once": oc.until_certain(1.0, PERIOD, 8 * PERIOD),
    "asked from the middle on": Asked(PERIOD // 2, 8 * PERIOD),
    "asked at every micro-step": Asked(1, 8 * PERIOD),
    "as_settled": oc.as_settled(PERIOD, PERIOD),
  }
  first = next(iter(policies))
  floor = floors.mean_bytes(entries)
  return cases.Case(
    "policy",
    f"a policy, 12 leaves, {cases.human(n).upper()} parameters",
    [
      *(dynamic(name, policy) for name, policy in policies.items()),
      dynamic(fixed, PERIOD, "baseline"),
      variants.peer("MultiSteps", peers.multi_steps(PERIOD), inputs, PERIOD, floor, fixed),
    ],
    [*(Target(name, fixed, 1.3) for name in policies), cases.temporaries(first, shapes)],
    first,
    fixed,
    cases.count(shapes),
    cases.largest(shapes),
  )


def compilation(width: int) -> builds.BuildCase:
  """Twelve layers with a policy each, beside twelve fixed periods."""
  ours, fixed = "a policy per layer", "a period per layer"

  def policies() -> Any:
    each = [oc.until_certain(1.0, 2, 64) for _ in range(LAYERS)]
    return builds.cadence_program(LAYERS, width, each)

  def periods() -> Any:
    return builds.cadence_program(LAYERS, width, range(2, 2 + LAYERS))

  return builds.BuildCase(
    "policy-compile",
    "compilation, 12 layers in 12 groups",
    "compile",
    [
      builds.BuildVariant(ours, "ours", policies),
      builds.BuildVariant(fixed, "peer", periods),
    ],
    [Target(ours, fixed, 2.0)],
    ours,
    fixed,
  )
