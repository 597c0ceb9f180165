"""Cases of the wait before the first step: functions that are called once, traced or compiled.

How they are timed is in `measure`; the cases that run are in `cases`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import optax_cadence as oc
from benchmarks import peers
from benchmarks.targets import Target

PARTITION = "partition of MultiSteps"
PERIODS = (8, 4, 2, 1)


@dataclasses.dataclass(frozen=True)
class BuildVariant:
  """A program to trace or compile, or a function to call.

  Attributes:
    name: What the table calls it.
    role: `"ours"` or `"peer"`.
    make: Returns a function that JAX has not seen yet, and its arguments.
  """

  name: str
  role: str
  make: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]


@dataclasses.dataclass(frozen=True)
class BuildCase:
  """Programs whose tracing or compilation is timed.

  Attributes:
    name: For `--cases`, the JSON file and the picture.
    title: What a person reads.
    stage: `"trace"` or `"compile"`; `"call"`, for a function that does its work as it is.
    variants: The programs.
    targets: What has to be reached.
    ours: Name of the variant that stands for the case.
    peer: Name of the variant that it is compared with.
  """

  name: str
  title: str
  stage: str
  variants: Sequence[BuildVariant]
  targets: Sequence[Target]
  ours: str
  peer: str


def compilation(n: int, width: int) -> BuildCase:
  """Compilation of n leaves in four groups, in one group, and of a quarter of the leaves."""
  quarter = n // 4
  ours, peer = program_name(n, 4), f"AdamW, {n} leaves"
  return BuildCase(
    "compile",
    f"compilation, {n} leaves in four groups",
    "compile",
    [
      BuildVariant(ours, "ours", lambda: cadence_program(n, width, 4)),
      BuildVariant(program_name(n, 1), "ours", lambda: cadence_program(n, width, 1)),
      BuildVariant(program_name(quarter, 4), "ours", lambda: cadence_program(quarter, width, 4)),
      BuildVariant(peer, "peer", lambda: adamw_program(n, width)),
      BuildVariant(f"AdamW, {quarter} leaves", "peer", lambda: adamw_program(quarter, width)),
      BuildVariant(PARTITION, "peer", lambda: partition_program(n, width, 4)),
    ],
    [Target(ours, peer, 2.0)],
    ours,
    peer,
  )


def tracing(n: int, width: int) -> BuildCase:
  """Tracing n leaves, which is the part of compilation that Python does."""
  ours, four, peer = program_name(n, 1), program_name(n, 4), f"AdamW, {n} leaves"
  return BuildCase(
    "trace",
    f"tracing, {n} leaves",
    "trace",
    [
      BuildVariant(ours, "ours", lambda: cadence_program(n, width, 1)),
      BuildVariant(four, "ours", lambda: cadence_program(n, width, 4)),
      BuildVariant(peer, "peer", lambda: adamw_program(n, width)),
      BuildVariant("MultiSteps", "peer", lambda: multi_steps_program(n, width)),
    ],
    [Target(ours, peer, 3.0), Target(four, peer, 3.0)],
    four,
    peer,
  )


def cadence_program(n: int, width: int, groups: int) -> Any:
  """`apply` on n leaves in up to four groups of periods 8, 4, 2 and 1."""
  params = many(n, width)
  tx = oc.cadence(peers.adamw(), alternating(params, groups))
  return lambda *args: tx.apply(*args), arguments(tx, params)


def adamw_program(n: int, width: int) -> Any:
  """Plain AdamW on n leaves."""
  params = many(n, width)
  return peers.stepper(peers.adamw()), arguments(peers.adamw(), params)


def multi_steps_program(n: int, width: int) -> Any:
  """`optax.MultiSteps` on n leaves."""
  params, tx = many(n, width), peers.multi_steps(8)
  return peers.stepper(tx), arguments(tx, params)


def partition_program(n: int, width: int, groups: int) -> Any:
  """`optax.partition` over `MultiSteps` on n leaves."""
  params = many(n, width)
  tx = peers.partition(PERIODS[:groups], alternating(params, groups))
  return peers.stepper(tx), arguments(tx, params)


def alternating(params: dict[str, Any], groups: int) -> dict[str, int]:
  """A period for each leaf; the first few of `PERIODS` in turn."""
  return {name: PERIODS[i % groups] for i, name in enumerate(params)}


def arguments(tx: Any, params: Any) -> tuple[Any, Any, Any]:
  """The arguments `(params, state, grads)` of a step, as shapes."""
  return params, jax.eval_shape(tx.init, params), params


def program_name(n: int, groups: int) -> str:
  """What a table calls `cadence_program`."""
  return f"apply, {n} leaves in {groups} group{'s' if groups > 1 else ''}"


def many(n: int, width: int) -> dict[str, jax.ShapeDtypeStruct]:
  """n square leaves, as shapes."""
  return {f"leaf_{i:04}": jax.ShapeDtypeStruct((width, width), jnp.float32) for i in range(n)}
