"""Optimizers in wrappers, in and around the cadence, against the oracle, drawn at random."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import oracle
import pytest
from hypothesis import given
from hypothesis import Phase
from hypothesis import settings
from hypothesis import strategies as st

import optax_cadence as oc

SHAPES = {"bias": (6,), "gain": (), "kernel": (4, 6), "layers": (3, 2, 4), "mixed": (4, 5)}
STRUCTURE = jax.tree.structure(dict.fromkeys(SHAPES, 0))
STEPS = 9


@dataclasses.dataclass(frozen=True)
class Inner:
  """An optimizer, and which leaves it couples the entries of when it sees them as matrices.

  The entries of the others stay in place under a mask, so that a matrix is a matrix.
  """

  tx: optax.GradientTransformation
  coupled: frozenset[str]


ALL, NONE = frozenset(SHAPES), frozenset()


def matrices(tree):
  return jax.tree.map(lambda x: x.ndim > 1, tree)


def named(*names: str) -> Callable[[Any], Any]:
  """A mask, or a choice, by the name of the leaf that a tensor is cut out of."""
  return lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: path[0].key in names, tree)


# Decay rates are powers of two where a sign is taken, so that no rounding can turn it.
BASES: dict[str, tuple[Callable[..., Any], frozenset[str]]] = {
  "sgd": (lambda learning_rate: optax.sgd(learning_rate, momentum=0.5, nesterov=True), NONE),
  "adam": (lambda learning_rate: optax.adam(learning_rate), NONE),
  "adamw by rank": (
    lambda learning_rate: optax.adamw(learning_rate, weight_decay=0.5, mask=matrices),
    NONE,
  ),
  "adamw by name": (
    lambda learning_rate: optax.adamw(
      learning_rate, weight_decay=0.5, mask=named("bias", "layers", "mixed")
    ),
    NONE,
  ),
  "lion": (
    lambda learning_rate: optax.lion(learning_rate, 0.5, 0.75, weight_decay=0.25, mask=matrices),
    NONE,
  ),
  "rmsprop": (lambda learning_rate: optax.rmsprop(learning_rate, momentum=0.5), NONE),
  "lamb": (lambda learning_rate: optax.lamb(learning_rate, weight_decay=0.5, mask=matrices), ALL),
  "adafactor": (
    lambda learning_rate: optax.adafactor(learning_rate, min_dim_size_to_factor=2),
    ALL,
  ),
  "muon": (lambda learning_rate: optax.contrib.muon(learning_rate), ALL),
  "clipped": (
    lambda learning_rate: optax.chain(
      optax.clip_by_global_norm(0.5),
      optax.add_decayed_weights(0.25, mask=matrices),
      optax.sgd(learning_rate),
    ),
    ALL,
  ),
}

# From an inner optimizer another, in which it is wrapped.
WRAPPERS: dict[str, Callable[[Inner], Inner]] = {
  "masked": lambda x: Inner(
    optax.masked(x.tx, named("gain", "kernel", "mixed")), x.coupled & {"gain", "kernel", "mixed"}
  ),
  "partition": lambda x: Inner(
    optax.partition({True: x.tx, False: optax.adam(0.125)}, named("bias", "layers", "mixed")),
    x.coupled & {"bias", "layers", "mixed"},
  ),
  "partition by a tree": lambda x: Inner(
    optax.partition(
      {"this": x.tx, "other": optax.sgd(0.5)},
      {name: "this" if name in ("gain", "kernel") else "other" for name in SHAPES},
    ),
    x.coupled & {"gain", "kernel"},
  ),
  "chain": lambda x: Inner(
    optax.chain(optax.clip(0.75), x.tx, optax.masked(optax.scale(0.5), matrices)), x.coupled
  ),
  "apply_if_finite": lambda x: Inner(optax.apply_if_finite(x.tx, 3), ALL),
  "MultiSteps": lambda x: Inner(optax.MultiSteps(x.tx, 2).gradient_transformation(), x.coupled),
}


def pruned(x: Inner, packed: bool) -> Inner:
  where = lambda path, param: True
  return Inner(oc.prune(0.5, every=2, where=where, packed=packed, inner=x.tx), ALL)


@dataclasses.dataclass(frozen=True)
class Case:
  """What is drawn: an optimizer with its wrappers, what is around the cadence, and the rest."""

  base: str
  injected: bool
  wrappers: tuple[str, ...]
  pruned: str | None
  around: str
  accumulate: str
  skip: bool
  bad: str
  seed: int

  def inner(self) -> Inner:
    make, coupled = BASES[self.base]
    # With a rate that changes, so that a counter that goes wrong shows.
    rate = optax.linear_schedule(0.25, 0.125, 3) if self.injected else 0.125
    found = Inner((optax.inject_hyperparams(make) if self.injected else make)(rate), coupled)
    for name in self.wrappers:
      found = WRAPPERS[name](found)
    if self.pruned is not None:
      found = pruned(found, packed=self.pruned == "packed")
    return found


AROUND = ["nothing", "oc.chain", "chain", "masked", "partition", "lookahead"]


@st.composite
def cases(draw, narrow: bool = False, pruned: Sequence[str | None] = (None,)) -> Case:
  """Random cases; where `narrow`, for parameters in less than single precision."""
  # Optax's own `apply_if_finite` takes no gradients that are wider than its state.
  wrappers = sorted(WRAPPERS.keys() - ({"apply_if_finite"} if narrow else set()))
  return Case(
    draw(st.sampled_from(sorted(BASES))),
    draw(st.booleans()),
    tuple(draw(st.lists(st.sampled_from(wrappers), max_size=2, unique=True))),
    draw(st.sampled_from(pruned)),
    draw(st.sampled_from(AROUND)),
    draw(st.sampled_from(["mean", "sum", "latest"])),
    skip := draw(st.booleans()),
    # What is passed on stays in the parameters: many would leave nothing to compare.
    draw(st.sampled_from(["none", "few", "many"] if skip else ["none", "few"])),
    draw(st.integers(0, 99)),
  )


def cadences(rng: np.random.Generator, coupled: frozenset[str]) -> tuple[Any, Any]:
  """A cadence for every leaf, and the tensors it falls into."""
  draw = lambda *size: rng.choice([1, 2, 4], size).tolist()
  bias, kernel, cells, layers = draw(2), draw(2, 2), draw(3), draw(3)
  period = int(rng.choice([2, 4]))
  mask = rng.permutation(np.resize([1, 2, 4], 20)).reshape(4, 5)
  bands = (oc.channels(cells), oracle.bands((4, 6), cells, 1))
  corners = (oc.quadrants(kernel), oracle.rectangles((4, 6), kernel, (0, 1)))
  both = {
    "bias": (oc.channels(bias), oracle.bands((6,), bias, 0)),
    "gain": (oc.Every(period, period - 1), oracle.whole(period, period - 1)),
    "kernel": corners if rng.integers(2) else bands,
    "layers": (oc.stacked(layers), oracle.bands((3, 2, 4), layers, 0)),
    "mixed": (mask, oracle.entries(mask, in_place="mixed" not in coupled)),
  }
  return {k: v[0] for k, v in both.items()}, {k: v[1] for k, v in both.items()}


def random(rng: np.random.Generator, dtype: str) -> dict[str, jax.Array]:
  """Dyadic numbers, whose sums are exact in any order."""
  return {k: jnp.asarray(rng.integers(-8, 9, s) / 8.0).astype(dtype) for k, s in SHAPES.items()}


def poisoned(rng: np.random.Generator, bad: str, t: int, grads: dict[str, jax.Array]) -> Any:
  """The gradients, in which a few entries may not be finite."""
  leaves = {"none": [], "few": ["mixed"] if t == 2 else [], "many": [*SHAPES]}[bad]
  found = {k: np.array(x) for k, x in grads.items()}
  for name in leaves:
    if bad == "few" or rng.random() < 0.4:
      at = rng.integers(max(found[name].size, 1))
      found[name].reshape(-1)[at] = rng.choice([np.nan, np.inf, -np.inf])
  return {k: jnp.asarray(x) for k, x in found.items()}


LABELS = {"bias": "a", "gain": "b", "kernel": "a", "layers": "b", "mixed": "a"}
OTHER = optax.sgd(0.5, momentum=0.5)


def around(case: Case, cadence: Any, slow: Any) -> tuple[Any, Any]:
  """What is trained, and the same around the oracle.

  Args:
    case: What is drawn.
    cadence: The cadence of an inner optimizer.
    slow: The oracle of an inner optimizer.
  """
  inner = case.inner().tx
  if case.around == "nothing":
    return cadence(inner), slow(inner)
  if case.around == "oc.chain":
    return oc.chain(optax.clip(0.75), cadence(inner)), optax.chain(optax.clip(0.75), slow(inner))
  if case.around == "partition":
    wrap = lambda make: optax.partition({"a": make(inner), "b": make(OTHER)}, LABELS)
  elif case.around == "masked":
    wrap = lambda make: optax.masked(make(inner), {k: v == "a" for k, v in LABELS.items()})
  elif case.around == "chain":
    wrap = lambda make: optax.chain(optax.scale(0.5), make(inner), optax.scale(0.5))
  else:
    wrap = lambda make: optax.lookahead(make(inner), sync_period=3, slow_step_size=0.5)
  return wrap(cadence), wrap(slow)


def follow(case: Case, grad_dtype: str, param_dtype: str) -> None:
  """Micro-steps of every way, and a flush, beside the oracle.

  The state goes on from what another way has left at every micro-step, so that a state which one
  way does not keep as the others do is found at the next.
  """
  rng = np.random.default_rng(case.seed)
  every, pieces = cadences(rng, case.inner().coupled)
  _, pieces_in_place = cadences(np.random.default_rng(case.seed), NONE)
  oracles = []

  def cadence(inner):
    nonfinite = "skip" if case.skip else "propagate"
    tx = oracle.relaxed(inner)
    return oc.cadence(tx, every, accumulate=case.accumulate, nonfinite=nonfinite)

  def slow(inner):
    parts = pieces_in_place if inner is OTHER else pieces
    options = {"accumulate": case.accumulate, "skip": case.skip}
    oracles.append(oracle.Transformation(oracle.relaxed(inner), parts, **options))
    return oracles[-1].tx

  tx, peer = around(case, cadence, slow)
  params = random(rng, param_dtype)
  whole = optax.LookaheadParams.init_synced if case.around == "lookahead" else lambda x: x
  params = whole(params)
  tx, peer = tx if hasattr(tx, "apply") else oracle.relaxed(tx), oracle.relaxed(peer)
  state, expected_state = tx.init(params), peer.init(params)
  update = jax.jit(tx.update)
  static = jax.jit(tx.update, static_argnames="phase")
  apply = jax.jit(tx.apply) if hasattr(tx, "apply") else None

  # Of float32 some, as programs fuse differently, and more where matrices are multiplied many
  # times over. Of a narrower dtype a few: a moment may be rounded the other way.
  ulps = 4 if param_dtype != "float32" else 256 if case.base == "muon" else 32
  compare = lambda found, wanted: assert_close(jax.tree.leaves(found), wanted, ulps, param_dtype)
  # Optax's lookahead takes no phase. Every phase compiles, which takes long around pruning.
  static_at = () if case.around == "lookahead" or case.pruned else (3, 4)
  moved = False
  for t in range(1, STEPS + 1):
    grads = poisoned(rng, case.bad, t, random(rng, grad_dtype))
    expected, expected_state = peer.update(grads, expected_state, params)
    if t in static_at:
      updates, state = static(grads, state, params, phase=t % 4)
    elif apply is not None and t % 2:
      updates, _ = update(grads, state, params)
      after, state = apply(params, state, grads)
      compare(after, oracles[0].oracle.applied(jax.tree.leaves(params)))
    else:
      updates, state = update(grads, state, params)
    compare(updates, expected)
    moved |= any(bool(u.any()) for u in jax.tree.leaves(updates))
    with jax.numpy_dtype_promotion("standard"):
      params = optax.apply_updates(params, updates)
  assert moved
  if apply is not None:
    updates, state = jax.jit(tx.flush)(state, params)
    compare(updates, oracles[0].oracle.flush(jax.tree.leaves(params)))


def assert_close(found: Sequence[Any], expected: Any, ulps: int, of: str) -> None:
  """Within some units in the last place, of this dtype or the leaf's own, of the largest entry."""
  for x, y in zip(found, jax.tree.leaves(expected), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    tol = ulps * max(float(jnp.finfo(y.dtype).eps), float(jnp.finfo(of).eps))
    x, y = x.astype(np.float32), y.astype(np.float32)
    scale = np.abs(y).max(initial=1.0, where=np.isfinite(y))
    np.testing.assert_allclose(x, y, rtol=tol, atol=tol * scale)


# Examples are small, and every one compiles a dozen programs: one that fails is not shrunk.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]


def check(examples: int, drawn: st.SearchStrategy[Case], grads: str, params: str) -> None:
  @settings(max_examples=examples, phases=PHASES)
  @given(drawn)
  def follows(case):
    follow(case, grads, params)

  follows()


EXAMPLES = [pytest.param(1, id="few"), pytest.param(6, id="many", marks=pytest.mark.ci)]


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_stack_of_wrappers_follows_the_oracle(examples):
  check(examples, cases(), "float32", "float32")


@pytest.mark.ci
def test_pruning_around_any_stack_of_wrappers_follows_the_oracle():
  """To sort every region takes long to compile."""
  check(2, cases(pruned=["packed", "bools"]), "float32", "float32")


@pytest.mark.parametrize(
  ("grads", "examples"),
  [
    pytest.param("bfloat16", 2, id="many", marks=pytest.mark.ci),
    pytest.param("float16", 2, id="float16", marks=pytest.mark.ci),
  ],
)
def test_so_it_does_with_gradients_in_half_precision(grads, examples):
  check(examples, cases(), grads, "float32")


@pytest.mark.ci
@pytest.mark.parametrize("grads", ["bfloat16", "float32"])
def test_so_it_does_with_parameters_in_half_precision(grads):
  check(3, cases(narrow=True), grads, "bfloat16")


PLAIN = Case("adam", False, (), None, "nothing", "mean", False, "none", 0)
# Each with what is easily got wrong: what is decided by the shape of a tensor where regions are cut
# out of a matrix or lie scattered in one, and what is left out of a state in another arrangement.
KNOWN = {
  "by rank under a mask": {"base": "adamw by rank"},
  "by rank under a mask, skipped": {"base": "adamw by rank", "skip": True, "bad": "many"},
  "by rank under a mask, the latest": {"base": "adamw by rank", "accumulate": "latest"},
  "by rank under a mask, injected": {"base": "lion", "injected": True, "wrappers": ("MultiSteps",)},
  "by rank in a chain": {"base": "rmsprop", "wrappers": ("chain",), "around": "partition"},
  "pieces of a matrix, skipped": {"base": "muon", "skip": True, "bad": "many", "seed": 5},
  "finite or not": {"base": "sgd", "wrappers": ("apply_if_finite",), "skip": True, "bad": "many"},
}


@pytest.mark.parametrize(
  "changes",
  [
    pytest.param(changes, id=name, marks=[pytest.mark.ci] * (name != "by rank in a chain"))
    for name, changes in KNOWN.items()
  ],
)
def test_known_pitfalls(changes):
  follow(dataclasses.replace(PLAIN, **changes), "float32", "float32")


@pytest.mark.ci
def test_pruning_leaves_out_what_is_not_finite():
  case = dataclasses.replace(PLAIN, pruned="packed", skip=True, bad="many")
  follow(case, "float32", "float32")
