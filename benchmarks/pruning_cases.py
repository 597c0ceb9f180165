"""Cases about pruning: how long a mask takes, and what a mask costs between two new ones.

JaxPruner is not on the package index. It is timed too if `--jaxpruner` names a folder with its
source. The other cases are in `cases`.
"""

import dataclasses
import functools
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_cadence as oc
from benchmarks import cases
from benchmarks import floors
from benchmarks import peers
from benchmarks import variants
from benchmarks.sizes import Sizes
from benchmarks.targets import Target
from benchmarks.variants import Variant
from optax_cadence.pruning import selection

SPARSITY = 0.9
SORT = "full sort"
JAXPRUNER = "JaxPruner"
NEVER = 2**30


def all_cases(sizes: Sizes, jaxpruner: Path | None) -> dict[str, Callable[[], cases.Case]]:
  """For each case a function that builds it."""
  return {
    "prune-mask": functools.partial(one_mask, sizes.pruned, jaxpruner),
    "prune-global": functools.partial(global_masks, sizes.pruned_globally),
    "prune-held": functools.partial(held, sizes.skip, jaxpruner),
    "prune-cadence": functools.partial(held_in_cadence, sizes.skip),
  }


def one_mask(n: int, jaxpruner: Path | None) -> cases.Case:
  """The mask of the largest tenth of one matrix, by magnitude."""
  width = 2 ** round(math.log2(n) / 2)
  inputs, size = masked_inputs({"w": (width, width)}), width**2
  kept = size - round(SPARSITY * size)

  def by_selection(w: jax.Array) -> jax.Array:
    ((mask,),) = selection.largest([[lambda: selection.order(jnp.abs(w))]], [kept])
    return mask()

  def by_sorting(w: jax.Array) -> jax.Array:
    best = jnp.argsort(-jnp.abs(w).reshape(-1))[:kept]
    return jnp.zeros(size, bool).at[best].set(True).reshape(w.shape)

  ways = {"selection": ("ours", by_selection), SORT: ("peer", by_sorting)}
  if jaxpruner is not None:
    topk = load_jaxpruner(jaxpruner).mask_calculator.topk_mask_calculator
    ways[JAXPRUNER] = ("peer", lambda w: topk(jnp.abs(w), SPARSITY).astype(bool))
  peer = JAXPRUNER if jaxpruner else SORT
  return cases.Case(
    "prune-mask",
    f"a mask of {cases.human(size).upper()} weights, sparsity {SPARSITY}",
    [
      Variant(
        name,
        role,
        inputs,
        no_state,
        (remasked(functools.partial(jax.tree.map, fn)),),
        5.0 * size,
        None if name == SORT else SORT,
      )
      for name, (role, fn) in ways.items()
    ],
    [
      Target("selection", peer, 1 / 40),
      cases.temporaries("selection", {"w": (width, width)}),
    ],
    "selection",
    peer,
    size,
    4 * size,
  )


def global_masks(n: int) -> cases.Case:
  """Masks of forty leaves that compete for what is kept, beside a separate mask for each."""
  width = max(8, 8 * round(math.sqrt(n / 40) / 8))
  shapes = dict.fromkeys(cases.names(40), (width, width))
  size, inputs = cases.count(shapes), masked_inputs(shapes)

  def masks(separate: bool, leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    keys = [lambda w=w: selection.order(jnp.abs(w)) for w in leaves.values()]
    pools = [[k] for k in keys] if separate else [keys]
    sizes = [sum(jax.eval_shape(k).size for k in pool) for pool in pools]
    chosen = selection.largest(pools, [n - round(SPARSITY * n) for n in sizes])
    return dict(zip(leaves, (mask() for pool in chosen for mask in pool), strict=True))

  name, peer = "over all leaves", "a mask for each leaf"
  ways = {
    name: ("ours", functools.partial(masks, False)),
    peer: ("baseline", functools.partial(masks, True)),
  }
  return cases.Case(
    "prune-global",
    f"global masks of 40 leaves, {cases.human(size).upper()} weights",
    [
      Variant(way, role, inputs, no_state, (remasked(fn),), 5.0 * size)
      for way, (role, fn) in ways.items()
    ],
    # One pool is as fast as many, and needs no array as large as all leaves together.
    [Target(name, peer, 1.1), cases.temporaries(name, shapes)],
    name,
    peer,
    size,
    cases.largest(shapes),
  )


def held(n: int, jaxpruner: Path | None) -> cases.Case:
  """AdamW at every micro-step, with a mask that stays the same."""
  shapes = cases.twelve(n)
  inputs, size = variants.inputs_of(shapes), cases.count(shapes)
  floor = size * floors.every_micro_step()
  packed = optax.chain(peers.adamw(), oc.prune(SPARSITY, every=NEVER))
  unpacked = optax.chain(peers.adamw(), oc.prune(SPARSITY, every=NEVER, packed=False))
  ways = [
    ours("pruned, mask held", packed, inputs, floor + size / 4, cases.ADAMW),
    ours("not packed", unpacked, inputs, floor + 2 * size, cases.ADAMW),
    variants.peer(cases.ADAMW, peers.adamw(), inputs, 8, floor),
  ]
  if jaxpruner is not None:
    ways.append(jaxpruner_held(load_jaxpruner(jaxpruner), inputs, floor + 2 * size))
  return cases.Case(
    "prune-held",
    f"a held mask, AdamW, {cases.human(size).upper()} parameters",
    ways,
    [Target("pruned, mask held", cases.ADAMW, 1.05)],
    "pruned, mask held",
    cases.ADAMW,
    size,
    cases.largest(shapes),
  )


def ours(
  name: str, tx: Any, inputs: variants.Inputs, floor_bytes: float, reference: str
) -> Variant:
  """A transformation of ours through `update` and `apply_updates`."""
  variant = variants.peer(name, tx, inputs, 8, floor_bytes, reference)
  return dataclasses.replace(variant, role="ours")


def held_in_cadence(n: int) -> cases.Case:
  """Period 8 through `update`, with a mask that stays the same."""
  shapes = cases.twelve(n)
  inputs, size = variants.inputs_of(shapes), cases.count(shapes)
  floor = floors.mean_bytes({8: size}, separate_updates=True)
  plain = oc.cadence(peers.adamw(), 8)
  tx = optax.chain(plain, oc.prune(SPARSITY, every=NEVER))
  name, baseline = "pruned, mask held", "not pruned"
  return cases.Case(
    "prune-cadence",
    f"a held mask, period 8, {cases.human(size).upper()} parameters",
    [
      ours(name, tx, inputs, floor + size / 4, baseline),
      variants.peer(baseline, plain, inputs, 8, floor),
    ],
    [Target(name, baseline, 1.05)],
    name,
    baseline,
    size,
    cases.largest(shapes),
  )


def masked_inputs(shapes: dict[str, tuple[int, ...]]) -> variants.Inputs:
  """Inputs of weights and masks; the masks are what all variants have to agree on."""

  def params() -> Any:
    weights = variants.waves(shapes, 0.0)
    return {"weights": weights, "mask": jax.tree.map(lambda w: jnp.zeros(w.shape, bool), weights)}

  return variants.Inputs(params, lambda: ())


def remasked(fn: Callable[[dict[str, jax.Array]], dict[str, jax.Array]]) -> Callable[..., Any]:
  """A step that replaces the masks by those that `fn` makes of the weights."""

  def step(params: Any, state: Any, grads: Any) -> Any:
    del grads
    weights = params["weights"]
    return {"weights": weights, "mask": fn(weights)}, state

  return step


def no_state(params: Any, grads: Any) -> Any:
  """The empty state of a variant that makes masks."""
  del params, grads
  return ()


def load_jaxpruner(path: Path) -> Any:
  """Imports JaxPruner from its source.

  It needs `jax.tree_map`, which newer versions of JAX have not, and ml_collections, for settings
  that are not used here.
  """
  if not hasattr(jax, "tree_map"):
    jax.tree_map = jax.tree.map
  config = types.ModuleType("ml_collections")
  config.ConfigDict = dict
  sys.modules.setdefault("ml_collections", config)
  sys.path.insert(0, str(path))
  try:
    import jaxpruner
    from jaxpruner import mask_calculator  # noqa: F401
    from jaxpruner import sparsity_distributions  # noqa: F401
  finally:
    sys.path.remove(str(path))
  return jaxpruner


def jaxpruner_held(jaxpruner: Any, inputs: variants.Inputs, floor_bytes: float) -> Variant:
  """JaxPruner's magnitude pruning, with a mask that stays the same."""
  uniform = jaxpruner.sparsity_distributions.uniform
  updater = jaxpruner.MagnitudePruning(
    sparsity_distribution_fn=functools.partial(uniform, sparsity=SPARSITY),
    scheduler=jaxpruner.OneShotSchedule(target_step=NEVER),
  )
  tx = updater.wrap_optax(peers.adamw())

  def step(params: Any, state: Any, grads: Any) -> Any:
    updates, state = tx.update(grads, state, params)
    return updater.post_gradient_update(optax.apply_updates(params, updates), state), state

  return Variant(JAXPRUNER, "peer", inputs, variants.init_of(tx), (step,) * 8, floor_bytes)
