"""Variants: one way each to do the work of a case, and functions that make the common ones.

Which variants make a case is in `cases`, and how they are timed in `measure`.
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
  """Functions that make the parameters and gradients of a variant.

  Attributes:
    params: Makes fresh parameters; they will be donated.
    grads: Makes gradients, shared by all variants with these inputs.
    restore: Makes of these parameters the tree that is compared with that of other variants.
    copies: How often a program runs in a micro-step. If more than once, `params` and `grads`
      make lists with an entry for each run, and `restore` is given such a list.
  """

  params: Callable[[], Any]
  grads: Callable[[], Any]
  restore: Callable[[Any], Any] = lambda params: params
  copies: int = 1

  def of_runs(self, tree: Any) -> list[Any]:
    """What each run of the program in a micro-step has of parameters or gradients."""
    return [tree] if self.copies == 1 else tree


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
  """One way to do the work of a case.

  Attributes:
    name: What the table calls it.
    role: `"ours"`, `"peer"` or `"baseline"`.
    inputs: Its parameters and gradients.
    init: `init(params, grads) -> state`.
    steps: One function `step(params, state, grads) -> params, state` for each micro-step
      of a cycle; the same object where the program is the same.
    floor_bytes: Bytes that a micro-step has to move, on average over the cycle; None where more
      than that decides.
    reference: Name of the variant that has to arrive at the same parameters, if any.
    held: One of `steps`; the bytes that it accesses are compared with `held_bytes`.
    held_bytes: Bytes that a held micro-step has to move.
    spans: How many micro-steps one of `steps` does.
    jit: What compiles a step, if not `jax.jit` does: with `lower` and `compile`.
  """

  name: str
  role: str
  inputs: Inputs
  init: Callable[[Any, Any], Any]
  steps: Sequence[Callable[[Any, Any, Any], Any]]
  floor_bytes: float | None
  reference: str | None = None
  held: Callable[..., Any] | None = None
  held_bytes: float = 0.0
  spans: int = 1
  jit: Callable[..., Any] | None = None


def inputs_of(shapes: Any, dtype: Any = jnp.float32) -> Inputs:
  """Parameters and gradients of a tree of shapes."""
  return Inputs(lambda: waves(shapes, 0.0, dtype), lambda: waves(shapes, 0.5, dtype))


def waves(shapes: Any, seed: float, dtype: Any = jnp.float32) -> Any:
  """A tree of arrays that differ from entry to entry; quicker to make than random ones."""
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

  AdamW does not depend on the shape of a tensor. So this is the best that can be done without
  regions: every group is contiguous, and joining them costs nothing.

  Args:
    whole: Inputs whose trees are dicts of leaves.
    masks: For each leaf a period per entry, of its shape.
  """
  positions = {name: _positions(mask) for name, mask in masks.items()}

  def split(tree: Any) -> Any:
    flat = {name: leaf.reshape(-1) for name, leaf in tree.items()}
    return {name: {str(p): flat[name][i] for p, i in positions[name].items()} for name in flat}

  def restore(tree: Any) -> Any:
    leaves = {}
    for name, parts in tree.items():
      leaf = np.empty(masks[name].size, np.float32)
      for period, index in positions[name].items():
        leaf[index] = np.asarray(parts[str(period)])
      leaves[name] = leaf.reshape(masks[name].shape)
    return leaves

  return Inputs(lambda: split(whole.params()), lambda: split(whole.grads()), restore)


def _positions(mask: np.ndarray) -> dict[int, np.ndarray]:
  """For each period the positions of its entries in the flat mask."""
  flat = mask.reshape(-1)
  return {int(p): np.flatnonzero(flat == p).astype(np.int32) for p in np.unique(flat)}


def entries_of(masks: dict[str, np.ndarray]) -> dict[int, int]:
  """Number of entries of each period, in all leaves together."""
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
  """Two variants of a cadence: its phase not known while compiling, and known (static).

  Args:
    name: Name of the first; the second adds to it.
    tx: The cadence.
    inputs: Parameters and gradients.
    entries: Number of parameters of each period.
    reference: Name of the variant that has to arrive at the same parameters.
    path: `"apply"`, or `"update"` followed by `optax.apply_updates`.
    widths: Bytes per parameter of each array.
    role: `"ours"` or `"baseline"`.
  """
  step = _apply_step if path == "apply" else _update_step
  cycle, init = int(np.lcm.reduce(list(entries))), init_of(tx)
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
  """`step(phase, …)` for each micro-step of a cycle.

  Micro-steps at which the same periods are due share a function, and so a program.
  """
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
  return Variant(name, "peer", inputs, init_of(tx), steps, floor_bytes, reference)


def init_of(tx: Any) -> Callable[[Any, Any], Any]:
  """The `init` of a variant that trains with a transformation."""
  return lambda params, _: tx.init(params)


def _apply_step(tx: Any, phase: int | None, params: Any, state: Any, grads: Any) -> Any:
  return tx.apply(params, state, grads, phase=phase)


def _update_step(tx: Any, phase: int | None, params: Any, state: Any, grads: Any) -> Any:
  updates, state = tx.update(grads, state, params, phase=phase)
  return optax.apply_updates(params, updates), state
