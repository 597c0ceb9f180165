"""Leaves under a random mask: when their groups share one state, and what that changes.

That the updates are those of the oracle, shared or not, `test_cadence` and `test_optimizers` show
too: both draw masks.
"""

import functools
import re

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from states import groups
from states import mask_moments
from states import mask_states
from states import masked_leaves

import optax_cadence as oc

SHAPE = (6, 10)
RNG = np.random.default_rng(0)
MASK = 2 ** RNG.integers(0, 3, SHAPE)
OTHER = 2 ** RNG.integers(1, 4, SHAPE)
# Two masks with groups in common, which further leaves belong to as well.
EVERY = {"bias": 4, "first": MASK, "head": oc.channels([1, 2]), "second": OTHER}
PIECES = [
  oracle.whole(4),
  oracle.entries(MASK, in_place=True),
  oracle.bands((6,), [1, 2], 0),
  oracle.entries(OTHER, in_place=True),
]


def random(rng, dtype=jnp.float32):
  """A tree of dyadic numbers, whose sums are exact in any order."""
  shapes = {"bias": (), "first": SHAPE, "head": (6,), "second": SHAPE}
  return {k: jnp.asarray(rng.integers(-8, 9, s) / 8.0, dtype) for k, s in shapes.items()}


def cadence(inner, every=None, **options):
  return oc.cadence(oracle.relaxed(inner), EVERY if every is None else every, **options)


def assert_close(found, expected):
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6)


def assert_same(found, expected):
  """The same parameters and state, but for sums, which have no meaning where a window is empty."""

  def without_sums(state):
    return [x._replace(accumulators=None) for x in (*groups(state), *mask_states(state))]

  assert_close((found[0], without_sums(found[1])), (expected[0], without_sums(expected[1])))


SHARED = {
  "adam": optax.adam(0.1),
  "adamw with a schedule": optax.adamw(optax.cosine_decay_schedule(0.1, 20)),
  "clipped by value": optax.chain(optax.clip(0.5), optax.sgd(0.1, momentum=0.9, nesterov=True)),
  "lion": optax.lion(0.1),
  "rmsprop": optax.rmsprop(0.1, centered=True),
  "adagrad": optax.adagrad(0.1),
  "no state at all": optax.sgd(0.1),
  "masked by rank": optax.adamw(0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
  "injected": optax.inject_hyperparams(optax.adamw)(0.1),
  "partition": optax.partition(
    {0: optax.adam(0.1), 1: optax.sgd(0.1)}, lambda p: jax.tree.map(lambda x: min(x.ndim, 1), p)
  ),
  "compiled by itself": optax.GradientTransformation(
    optax.adam(0.1).init, jax.jit(optax.adam(0.1).update)
  ),
  "vectors apart": optax.partition(
    {True: optax.adam(0.1), False: optax.lamb(0.1)},
    lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
  ),
  "a branch on a counter": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
  "a program that goes by the shape": optax.stateless(
    lambda u, params: jax.tree.map(lambda x: -x if x.size % 2 else x / 2, u)
  ),
  "selected": optax.stateless(
    lambda u, params: jax.tree.map(lambda x: jnp.where(x > 0, x, jnp.tanh(x)), u)
  ),
  "a rate that goes by the length": optax.stateless(
    lambda updates, params: jax.tree.map(lambda u: u / max(1, u.size), updates)
  ),
}
APART = {
  "norm of all": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
  "norm of each": optax.lamb(0.1),
  "root mean square": optax.adafactor(0.1),
  "noise": optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)),
  "matrices": optax.partition(
    {True: optax.lamb(0.1), False: optax.adam(0.1)},
    lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
  ),
  "neighbours": optax.stateless(lambda u, params: jax.tree.map(lambda x: jnp.roll(x, 1), u)),
  "order": optax.stateless(lambda u, params: jax.tree.map(jnp.cumsum, u)),
  "a branch": optax.stateless(
    lambda u, params: jax.tree.map(lambda x: jax.lax.cond(x.sum() > 0, jnp.negative, jnp.abs, x), u)
  ),
  "positions": optax.stateless(
    lambda u, params: jax.tree.map(lambda x: x * jnp.linspace(0, 1, x.size).reshape(x.shape), u)
  ),
}


# To the proof they are as Adam is.
ALIKE = {
  "adagrad",
  "adamw with a schedule",
  "clipped by value",
  "compiled by itself",
  "lion",
  "rmsprop",
}


@pytest.mark.parametrize(
  "inner",
  [
    pytest.param(inner, id=name, marks=[pytest.mark.ci] * (name in ALIKE))
    for name, inner in SHARED.items()
  ],
)
def test_groups_share_what_is_updated_entry_by_entry(inner):
  assert masked_leaves(cadence(inner).init(random(RNG))) == 2
  follow(inner, ways=())


@pytest.mark.parametrize(
  "inner",
  [
    pytest.param(inner, id=name, marks=[] if name in ("injected", "partition") else pytest.mark.ci)
    for name, inner in SHARED.items()
  ],
)
def test_apply_gives_the_same_parameters_and_state(inner):
  follow(inner)


@pytest.mark.parametrize("inner", APART.values(), ids=APART)
def test_groups_are_apart_where_entries_are_not(inner):
  assert masked_leaves(cadence(inner).init(random(RNG))) == 0


def follow(inner, steps=9, seed=0, ways=("apply",), **options):
  """Micro-steps of `update` beside the oracle, and of `apply` and static phases beside those."""
  rng, tx = np.random.default_rng(seed), cadence(inner, **options)
  params = random(rng)
  slow = oracle.Oracle(
    oracle.relaxed(inner),
    list(params.values()),
    PIECES,
    options.get("accumulate", "mean"),
    skip=options.get("nonfinite") == "skip",
  )
  state, update, apply = tx.init(params), jax.jit(tx.update), jax.jit(tx.apply)
  static = jax.jit(tx.apply, static_argnames="phase")
  for t in range(1, steps + 1):
    grads = random(rng)
    expected = slow.step(list(grads.values()), list(params.values()))
    updates, new = update(grads, state, params)
    after = optax.apply_updates(params, updates), new
    if "apply" in ways:
      assert_same(apply(params, state, grads), after)
    if "static" in ways and t % 8 < 3:
      assert_same(static(params, state, grads, phase=t % 8), after)
    assert_close(list(updates.values()), expected)
    params, state = after
  return tx, params, state, slow


def test_sums_follow_the_oracle():
  follow(optax.adamw(0.1), ways=(), accumulate="sum")


@pytest.mark.parametrize("accumulate", ["mean", pytest.param("sum", marks=pytest.mark.ci)])
def test_static_phases_give_the_same_state(accumulate):
  follow(optax.adamw(0.1), ways=("apply", "static"), accumulate=accumulate)


def test_flush_applies_what_is_there():
  for steps in (3, 8):
    tx, params, state, slow = follow(optax.adam(0.1), steps, ways=())
    updates, flushed = jax.jit(tx.flush)(state, params)
    assert_close(list(updates.values()), slow.flush(list(params.values())))
    again, _ = tx.flush(flushed, params)
    assert not any(u.any() for u in again.values())


def test_moments_and_parameters_of_entries_that_are_not_due_are_bit_for_bit_what_they_were():
  tx, rng = cadence(optax.adamw(0.1)), np.random.default_rng(1)
  params, state = random(rng), None
  state, update = tx.init(params), jax.jit(tx.update)
  for t in range(1, 9):
    updates, new = update(random(rng), state, params)
    held = t % MASK != 0
    assert not np.asarray(updates["first"])[held].any()
    moments = [mask_moments(s, "first") for s in (state, new)]
    for before, after in zip(*moments, strict=True):
      np.testing.assert_array_equal(np.asarray(before)[held], np.asarray(after)[held])
      assert (np.asarray(before) != np.asarray(after))[~held].any()
    state = new


def test_a_nan_stays_in_the_windows_it_came_in():
  tx, rng = cadence(optax.sgd(0.1)), np.random.default_rng(2)
  params = random(rng)
  state, update = tx.init(params), jax.jit(tx.update)
  for t in range(1, 9):
    grads = random(rng)
    if t == 3:
      grads["first"] = jnp.full(SHAPE, jnp.nan)
    updates, state = update(grads, state, params)
    bad = (t % MASK == 0) & (t - MASK < 3) & (t >= 3)
    np.testing.assert_array_equal(np.isnan(updates["first"]), bad)


@pytest.mark.parametrize(
  "n", [8, 9, *(pytest.param(n, marks=pytest.mark.ci) for n in (17, 32, 33))]
)
def test_any_number_of_groups(n):
  periods = np.arange(60).reshape(SHAPE) % n + 1
  rng = np.random.default_rng(3)
  inner, params = oracle.relaxed(optax.adam(0.1)), [jnp.ones(SHAPE)]
  tx, slow = oc.cadence(inner, [periods]), oracle.Oracle(inner, params, [oracle.entries(periods)])
  state, update = tx.init(params), jax.jit(tx.update)
  assert masked_leaves(state) == (n <= 32)
  for _ in range(5):
    grads = [jnp.asarray(rng.integers(-8, 9, SHAPE) / 8.0, jnp.float32)]
    updates, state = update(grads, state, params)
    assert_close(updates, slow.step(grads, params))


@pytest.mark.parametrize("n", [32, 33])
def test_at_most_32_groups_share(n):
  tx = cadence(optax.adam(0.1), [np.arange(60).reshape(SHAPE) % n + 1])
  assert masked_leaves(jax.eval_shape(tx.init, [jnp.ones(SHAPE)])) == (n <= 32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
def test_other_dtypes(dtype):
  rng, inner = np.random.default_rng(4), oracle.relaxed(optax.sgd(0.5, momentum=0.5))
  params = random(rng, dtype)
  tx, slow = cadence(inner), oracle.Oracle(inner, list(params.values()), PIECES)
  state, update = tx.init(params), jax.jit(tx.update)
  assert masked_leaves(state) == 2
  wide = jnp.complex64 if dtype == "complex64" else jnp.float32
  assert jax.tree.leaves(state.masks.accumulators)[0].dtype == wide
  for _ in range(4):
    grads = random(rng, dtype)
    expected = slow.step(list(grads.values()), list(params.values()))
    updates, state = update(grads, state, params)
    for found, want in zip(updates.values(), expected, strict=True):
      assert found.dtype == want.dtype
      np.testing.assert_allclose(
        np.asarray(found, wide), np.asarray(want, wide), rtol=4 * float(jnp.finfo(dtype).eps)
      )


@pytest.mark.parametrize("clock", ["updates", "micro_steps"])
def test_the_clock_of_each_group(clock):
  inner = optax.sgd(optax.linear_schedule(1.0, 0.0, 16))
  tx, params = cadence(inner, clock=clock), random(RNG)
  state, ones = tx.init(params), jax.tree.map(jnp.ones_like, params)
  assert masked_leaves(state) == 2
  update = jax.jit(tx.update)
  for _ in range(8):
    updates, state = update(ones, state, params)
  done = 8 // MASK - 1 if clock == "updates" else 7
  np.testing.assert_allclose(updates["first"], -(1 - done / 16), rtol=1e-6)


def test_scale_by_cadence_sees_the_window_of_each_entry():
  tx, params = cadence(optax.chain(optax.sgd(1.0), oc.scale_by_cadence("linear"))), random(RNG)
  state, ones = tx.init(params), jax.tree.map(jnp.ones_like, params)
  assert masked_leaves(state) == 2
  update = jax.jit(tx.update)
  for _ in range(8):
    updates, state = update(ones, state, params)
  np.testing.assert_array_equal(updates["first"], -MASK)


def test_a_learning_rate_set_by_hand_holds_for_its_group():
  tx = cadence(optax.inject_hyperparams(optax.sgd)(1.0), {"w": MASK})
  params = {"w": jnp.ones(SHAPE)}
  state, update = tx.init(params), jax.jit(tx.update)
  slow = groups(state)[2]
  assert int(slow.period) == 4
  slow.inner_state.hyperparams["learning_rate"] = jnp.float32(3.0)
  for _ in range(4):
    updates, state = update(params, state, params)
  np.testing.assert_array_equal(updates["w"], np.where(MASK == 4, -3.0, -1.0))


@pytest.mark.parametrize("options", [{"accumulate": "latest"}, {"nonfinite": "skip"}], ids=str)
def test_the_latest_gradient_and_skipped_ones_follow_the_oracle(options):
  inner = optax.adamw(0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
  tx, _, _, _ = follow(inner, **options)
  assert masked_leaves(tx.init(random(RNG))) == 2


def test_entries_of_a_group_with_a_nan_are_left_out():
  tx, rng = cadence(optax.adam(0.1), nonfinite="skip"), np.random.default_rng(7)
  params = random(rng)
  state, update = tx.init(params), jax.jit(tx.update)
  slow = oracle.Oracle(oracle.relaxed(optax.adam(0.1)), list(params.values()), PIECES, skip=True)
  for t in range(1, 9):
    grads = random(rng)
    if t in (2, 5):
      grads["first"] = grads["first"].at[2, 3].set(jnp.nan)
    updates, state = update(grads, state, params)
    assert_close(list(updates.values()), slow.step(list(grads.values()), list(params.values())))
  skipped = {
    k: int(v) for k, v in oc.metrics(state).items() if k.startswith("first/") and "skip" in k
  }
  assert sorted(skipped.values()) == [0, 0, 2]


# Around the cadence.


def test_metrics_and_tables_are_those_of_the_regions():
  tx, params = cadence(optax.adam(0.1)), random(RNG)
  state = tx.init(params)
  found = oc.metrics(state)
  assert [int(found[f"first/{i}/period"]) for i in range(3)] == [4, 1, 2]
  held = sum(x.nbytes for s in (*groups(state), *mask_states(state)) for x in accumulators(s))
  description = oc.describe(tx, params)
  assert sum(g.accumulator_bytes for g in description.groups) == held
  assert sum(g.parameters for g in description.groups) == 2 * MASK.size + 7


def accumulators(state):
  return jax.tree.leaves(state.accumulators)


def test_tree_map_params_reaches_moments_and_accumulators():
  tx, params = cadence(optax.adamw(0.1)), random(RNG)
  state = tx.init(params)
  marked = optax.tree_utils.tree_map_params(
    tx, lambda x: jnp.full_like(x, 7), state, transform_non_params=lambda x: x
  )
  for s in mask_states(marked):  # of two leaves
    arrays = jax.tree.leaves(s)
    assert len(arrays) == 6 and all((x == 7).all() for x in arrays)


def test_a_saved_state_resumes_bit_for_bit():
  tx, params, state, _ = follow(optax.adamw(0.1), 5, ways=())
  restored = flax.serialization.from_bytes(tx.init(params), flax.serialization.to_bytes(state))
  grads = random(np.random.default_rng(5))
  for x, y in zip(
    jax.tree.leaves(jax.jit(tx.update)(grads, state, params)),
    jax.tree.leaves(jax.jit(tx.update)(grads, restored, params)),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)


def trained(inner):
  """The parameters after four micro-steps."""
  tx, params = cadence(inner), random(np.random.default_rng(6))
  batches = [random(np.random.default_rng(seed)) for seed in range(4)]

  def step(carry, grads):
    params, state = carry
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *batches)
  return jax.lax.scan(step, (params, tx.init(params)), stacked)[0][0]


def test_vmap_over_learning_rates():
  train, rates = lambda rate: trained(optax.adam(rate)), jnp.array([0.1, 0.2])
  batched, alone = jax.jit(jax.vmap(train))(rates), jax.jit(train)
  for i, rate in enumerate(rates):
    assert_close(jax.tree.map(lambda x, i=i: x[i], batched), alone(rate))


def test_gradients_reach_the_learning_rate():
  @jax.jit
  def loss(rate):
    return sum(jnp.sum(p**2) for p in trained(optax.sgd(rate, momentum=0.5)).values())

  slope = jax.jit(jax.grad(loss))(0.1)
  numeric = (loss(0.11) - loss(0.09)) / 0.02
  np.testing.assert_allclose(slope, numeric, rtol=1e-3)


def test_moments_are_sharded_as_the_parameter_is():
  mesh = jax.make_mesh((1,), ("x",))
  sharding = NamedSharding(mesh, PartitionSpec("x"))
  params = {"w": jax.device_put(jnp.ones(SHAPE), sharding)}
  state = cadence(optax.adam(0.1), {"w": MASK}).init(params)
  for x in jax.tree.leaves(mask_states(state)):
    assert x.sharding.is_equivalent_to(sharding, 2)


# What is told where it cannot be.


def test_a_state_of_another_mask():
  params = {"v": jnp.ones(SHAPE), "w": jnp.ones(SHAPE)}
  state = cadence(optax.adam(0.1), {"v": 1, "w": MASK}).init(params)
  other = cadence(optax.adam(0.1), {"v": MASK, "w": 1})
  with pytest.raises(ValueError, match=r"masks to be 'v', found 'w'"):
    other.update(params, state, params)


def test_an_optimizer_that_extra_arguments_couple():
  def update(updates, state, params=None, *, couple=False, **extra_args):
    del params, extra_args
    return jax.tree.map(lambda u: u * u.sum() if couple else u, updates), state

  inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
  tx, params = cadence(inner), random(RNG)
  state = tx.init(params)
  assert masked_leaves(state) == 2
  tx.update(params, state, params, unused=1)
  with pytest.raises(ValueError, match=r"'first': expected .* one by one.*found reduce_sum"):
    tx.update(params, state, params, couple=True)


# The compiled program.

WIDTH = 96
LARGE = re.compile(rf"\[(?:{WIDTH * WIDTH}|{WIDTH},{WIDTH})\]")


@functools.cache
def program(phase, periods=(1, 2, 4, 8)):
  mask = np.array(periods)[np.random.default_rng(0).integers(0, 4, (WIDTH, WIDTH))]
  params, tx = {"w": jnp.ones((WIDTH, WIDTH))}, cadence(optax.adamw(0.1), {"w": mask})
  step = jax.jit(tx.apply, static_argnames="phase", donate_argnums=(0, 1))
  return step.lower(params, tx.init(params), params, phase=phase).compile()


def large(compiled, opcode):
  """Instructions that yield an array of the size of the leaf."""
  lines = compiled.as_text().splitlines()
  return [x for x in lines if f" {opcode}(" in x and LARGE.search(x.split(f" {opcode}(")[0])]


@pytest.mark.usefixtures("optimized_programs")
@pytest.mark.parametrize("phase", [None, 0, 1, 2])
def test_one_pass_without_indices_copies_or_temporaries(phase):
  compiled = program(phase)
  for opcode in ("gather", "scatter", "copy", "dynamic-slice"):
    assert large(compiled, opcode) == []
  assert compiled.memory_analysis().temp_size_in_bytes < 2048
  # One byte an entry, and no comparison worked out beforehand.
  assert {re.search(r"= (\w+)\[", x)[1] for x in large(compiled, "constant")} == {"u8"}


@pytest.mark.usefixtures("optimized_programs")
def test_a_held_micro_step_reaches_neither_parameters_nor_moments():
  compiled = program(1, (2, 4, 8, 16))
  assert len(large(compiled, "fusion")) <= 1
  assert compiled.cost_analysis()["bytes accessed"] <= 1.01 * (12 + 1) * WIDTH**2


def test_a_flush_under_a_limit_takes_counts_of_some_groups_and_weights_of_others():
  """A group of period 1 has no accumulators and so no weights, the others have."""
  mask = np.array([[1, 2, 3], [3, 1, 2]])
  tx = oc.cadence(optax.sgd(1.0), mask, weighted=True, clip_norm=10.0)
  params = jnp.zeros((2, 3))
  _, state = tx.update(jnp.ones((2, 3)), tx.init(params), params, weight=2.0)
  for flush in (tx.flush, jax.jit(tx.flush)):
    np.testing.assert_array_equal(flush(state, params)[0], -1.0 * (mask > 1))


def test_skipping_finds_the_state_of_leaves_in_pieces_beside_entries_with_a_count_each():
  def init(params):
    return jax.tree.map(lambda _: jnp.int32(0), params)

  def update(grads, counts, params=None):
    counts = jax.tree.map(lambda n: n + 1, counts)
    return jax.tree.map(lambda g, n: -g * n.astype(g.dtype), grads, counts), counts

  every = {"cells": oc.quadrants([[1, 2], [2, 1]]), "mixed": np.array([[1, 2, 2], [2, 1, 2]])}
  tx = oc.cadence(optax.GradientTransformation(init, update), every, nonfinite="skip")
  params = {"cells": jnp.zeros((2, 2)), "mixed": jnp.zeros((2, 3))}
  state, step = tx.init(params), jax.jit(tx.update)
  assert state.masks.accumulators is not None
  for t in range(1, 5):
    grads = jax.tree.map(jnp.ones_like, params)
    grads["cells"] = grads["cells"].at[0, 1].set(jnp.nan if t < 3 else 1.0)
    updates, state = step(grads, state, params)
  np.testing.assert_array_equal(updates["cells"], [[-4.0, -1.0], [-2.0, -4.0]])
  np.testing.assert_array_equal(updates["mixed"], [[-4.0, -2, -2], [-2, -4, -2]])
