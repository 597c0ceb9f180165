"""Cases of the wait before the first step: functions that are called once, traced or compiled.

How they are timed is in `measure`; the cases that run are in `cases`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

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
  ours, peer = cadences(n, width, 4), adamw(n, width)
  labels = dict(zip(many(n, width), itertools.cycle(PERIODS), strict=False))
  return BuildCase(
    "compile",
    f"compilation, {n} leaves in four groups",
    "compile",
    [
      ours,
      cadences(n, width, 1),
      cadences(n // 4, width, 4),
      peer,
      adamw(n // 4, width),
      BuildVariant(
        PARTITION, "peer", lambda: peer_program(n, width, peers.partition(PERIODS, labels))
      ),
    ],
    [Target(ours.name, peer.name, 2.0)],
    ours.name,
    peer.name,
  )


def tracing(n: int, width: int) -> BuildCase:
  """Tracing n leaves, which is the part of compilation that Python does."""
  one, four, peer = cadences(n, width, 1), cadences(n, width, 4), adamw(n, width)
  return BuildCase(
    "trace",
    f"tracing, {n} leaves",
    "trace",
    [
      one,
      four,
      peer,
      BuildVariant("MultiSteps", "peer", lambda: peer_program(n, width, peers.multi_steps(8))),
    ],
    [Target(one.name, peer.name, 3.0), Target(four.name, peer.name, 3.0)],
    four.name,
    peer.name,
  )


def cadences(n: int, width: int, groups: int) -> BuildVariant:
  """`apply` on n leaves in up to four groups of periods 8, 4, 2 and 1."""
  name = f"apply, {n} leaves in {groups} group{'s' if groups > 1 else ''}"
  return BuildVariant(name, "ours", lambda: cadence_program(n, width, PERIODS[:groups]))


def adamw(n: int, width: int) -> BuildVariant:
  """Plain AdamW on n leaves."""
  return BuildVariant(f"AdamW, {n} leaves", "peer", lambda: peer_program(n, width, peers.adamw()))


def cadence_program(n: int, width: int, cadences: Sequence[Any]) -> Any:
  """`apply` on n leaves, which have these cadences in turn."""
  params = many(n, width)
  every = dict(zip(params, itertools.cycle(cadences), strict=False))
  tx = oc.cadence(peers.adamw(), every)
  return lambda *args: tx.apply(*args), arguments(tx, params)


def peer_program(n: int, width: int, tx: optax.GradientTransformation) -> Any:
  """An Optax transformation on n leaves."""
  return peers.stepper(tx), arguments(tx, many(n, width))


def arguments(tx: Any, params: Any) -> tuple[Any, Any, Any]:
  """The arguments `(params, state, grads)` of a step, as shapes."""
  return params, jax.eval_shape(tx.init, params), params


def many(n: int, width: int) -> dict[str, jax.ShapeDtypeStruct]:
  """n square leaves, as shapes."""
  return {f"leaf_{i:04}": jax.ShapeDtypeStruct((width, width), jnp.float32) for i in range(n)}
