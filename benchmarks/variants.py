"""What a variant is: arrays to start from, and the micro-steps of a cycle as functions.

Builders make the variants that most cases share. What is compared with what is in `cases`,
how it is timed in `measure`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_cadence as oc
from benchmarks import floors
from benchmarks import peers


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
  """Parameters and gradients in one arrangement.

  Attributes:
    params: Makes fresh parameters; they will be donated.
    grads: Makes gradients, shared by all variants with these inputs.
    restore: Parameters in this arrangement as the tree that all variants are compared in.
    copies: How many runs of a single program make a micro-step; where there are several,
      `params` and `grads` make lists.
  """

  params: Callable[[], Any]
  grads: Callable[[], Any]
  restore: Callable[[Any], Any] = lambda params: params
  copies: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
  """One way to do the work of a case.

  Attributes:
    name: What the table calls it.
    role: `"ours"`, `"peer"` or `"baseline"`.
    inputs: What it starts from.
    init: `init(params, grads) -> state`.
    steps: One function `step(params, state, grads) -> params, state` for each micro-step
      of a cycle; the same object where the program is the same.
    floor_bytes: Bytes that a micro-step has to move, on average over the cycle.
    reference: Name of the variant that has to arrive at the same parameters; None where
      there is none.
    held: One of `steps` of which the bytes that it accesses are compared with
      `held_bytes`.
    held_bytes: Bytes that a held micro-step has to move.
  """

  name: str
  role: str
  inputs: Inputs
  init: Callable[[Any, Any], Any]
  steps: Sequence[Callable[[Any, Any, Any], Any]]
  floor_bytes: float
  reference: str | None = None
  held: Callable[..., Any] | None = None
  held_bytes: float = 0.0


def inputs_of(shapes: Any, dtype: Any = jnp.float32) -> Inputs:
  """Parameters and gradients of a tree of shapes."""
  return Inputs(lambda: waves(shapes, 0.0, dtype), lambda: waves(shapes, 0.5, dtype))


def waves(shapes: Any, seed: float, dtype: Any = jnp.float32) -> Any:
  """A tree of arrays that differ from entry to entry, quicker made than random ones."""
  leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
  return treedef.unflatten([_wave(shape, seed + i, dtype) for i, shape in enumerate(leaves)])


@functools.partial(jax.jit, static_argnums=(0, 2))
def _wave(shape: tuple[int, ...], seed: jax.Array, dtype: Any) -> jax.Array:
  angle = jnp.full(shape, seed, jnp.float32)
  for axis, rate in zip(range(len(shape)), (1.7, 0.9, 2.3), strict=False):
    angle += rate * jax.lax.broadcasted_iota(jnp.int32, shape, axis).astype(jnp.float32)
  return (0.02 * jnp.sin(angle)).astype(dtype)


def split_inputs(whole: Inputs, masks: dict[str, np.ndarray]) -> Inputs:
  """Every leaf split by hand into one vector per period.

  For AdamW, to which the shape of a tensor is nothing, this is the best that can be
  done without regions: every group contiguous, and no cost for joining them.

  Args:
    whole: Inputs whose trees are dicts of leaves.
    masks: For each leaf a period per entry, of its shape.
  """
  at = {name: _positions(mask) for name, mask in masks.items()}

  def split(tree: Any) -> Any:
    flat = {name: leaf.reshape(-1) for name, leaf in tree.items()}
    return {name: {str(p): flat[name][i] for p, i in at[name].items()} for name in flat}

  def restore(tree: Any) -> Any:
    leaves = {}
    for name, parts in tree.items():
      leaf = np.empty(masks[name].size, np.float32)
      for period, index in at[name].items():
        leaf[index] = np.asarray(parts[str(period)])
      leaves[name] = leaf.reshape(masks[name].shape)
    return leaves

  return Inputs(lambda: split(whole.params()), lambda: split(whole.grads()), restore)


def _positions(mask: np.ndarray) -> dict[int, np.ndarray]:
  flat = mask.reshape(-1)
  return {int(p): np.flatnonzero(flat == p).astype(np.int32) for p in np.unique(flat)}


def entries_of(masks: dict[str, np.ndarray]) -> dict[int, int]:
  """Entries by period."""
  entries: dict[int, int] = {}
  for mask in masks.values():
    for period, n in zip(*np.unique(mask, return_counts=True), strict=True):
      entries[int(period)] = entries.get(int(period), 0) + int(n)
  return entries


def ours(
  name: str,
  tx: oc.CadenceTransformation,
  inputs: Inputs,
  entries: dict[int, int],
  reference: str | None,
  *,
  path: str = "apply",
  widths: floors.Widths = floors.FLOAT32,
  role: str = "ours",
) -> list[Variant]:
  """A cadence with dynamic and with static phase, as two variants."""
  step = _apply_step if path == "apply" else _update_step
  cycle, init = int(np.lcm.reduce(list(entries))), lambda params, _: tx.init(params)
  dynamic = functools.partial(step, tx, None)
  static = static_steps(functools.partial(step, tx), cycle, entries)
  floor = floors.mean_bytes(entries, widths, separate_updates=path != "apply")
  static_floor = floors.mean_bytes(entries, widths)
  may_hold = path == "apply" and 1 not in entries
  return [
    Variant(name, role, inputs, init, (dynamic,) * cycle, floor, reference),
    Variant(
      f"{name}, static phase",
      role,
      inputs,
      init,
      static,
      static_floor,
      reference,
      held=static[0] if may_hold else None,
      held_bytes=floors.held(widths) * sum(entries.values()),
    ),
  ]


def static_steps(
  step: Callable[..., Any], cycle: int, periods: Any
) -> tuple[Callable[..., Any], ...]:
  """`step(phase, …)` for each micro-step; phases with the same groups due share a program."""
  programs: dict[tuple[bool, ...], Callable[..., Any]] = {}
  steps = []
  for t in range(1, cycle + 1):
    due = tuple(t % period == 0 for period in periods)
    steps.append(programs.setdefault(due, functools.partial(step, t % cycle)))
  return tuple(steps)


def peer(
  name: str,
  tx: optax.GradientTransformation,
  inputs: Inputs,
  cycle: int,
  floor_bytes: float,
  reference: str | None = None,
) -> Variant:
  """An Optax transformation through `update` and `apply_updates` in one program."""
  steps = (peers.stepper(tx),) * cycle
  return Variant(
    name, "peer", inputs, lambda params, _: tx.init(params), steps, floor_bytes, reference
  )


def _apply_step(tx: Any, phase: int | None, params: Any, state: Any, grads: Any) -> Any:
  return tx.apply(params, state, grads, phase=phase)


def _update_step(tx: Any, phase: int | None, params: Any, state: Any, grads: Any) -> Any:
  updates, state = tx.update(grads, state, params, phase=phase)
  return optax.apply_updates(params, updates), state
