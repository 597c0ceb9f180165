"""What is rounded, and when: the inner optimizer sees the mean of a window as it was accumulated.

Everything is computed on numbers with few bits, so that sums and means are exact in float32 and
results can be compared bit for bit with those of the oracle.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax_exports
import oracle
import pytest
from states import groups

import optax_cadence as oc

SHAPE = (4, 6)
MASK = np.random.default_rng(0).permutation(np.repeat([1, 2, 4], 8)).reshape(SHAPE)
# Every kind of region, each with all periods that it can have. Windows have 1, 2 or 4 micro-steps,
# so that no mean is rounded.
KINDS = {
  "always": (1, oracle.whole(1)),
  "bands": (oc.channels([1, 2, 4]), oracle.bands(SHAPE, [1, 2, 4], -1)),
  "corners": (oc.quadrants([[1, 2], [4, 2]]), oracle.rectangles(SHAPE, [[1, 2], [4, 2]], (-2, -1))),
  "layers": (oc.stacked([4, 1, 2, 2]), oracle.bands(SHAPE, [4, 1, 2, 2], 0)),
  "mixed": (MASK, oracle.entries(MASK)),
  "offset": (oc.Every(4, offset=2), oracle.whole(4, 2)),
  "plain": (2, oracle.whole(2)),
}
EVERY = {name: every for name, (every, _) in KINDS.items()}
PIECES = [pieces for _, pieces in KINDS.values()]

# Dtypes of gradients and of parameters. Every pair compiles all ways.
WIDER, NARROW = ("bfloat16", "float32"), ("bfloat16", "bfloat16")
FEW_PAIRS = [WIDER, NARROW, ("float32", "bfloat16")]
MORE_PAIRS = [
  ("complex64", "complex64"),
  ("float16", "bfloat16"),
  ("float16", "float16"),
  ("float16", "float32"),
  ("float32", "float16"),
]


def in_ci(pairs):
  return [pytest.param(*pair, marks=pytest.mark.ci) for pair in pairs]


PAIRS = [*FEW_PAIRS, *in_ci(MORE_PAIRS)]
dtypes = pytest.mark.parametrize(("grad_dtype", "param_dtype"), PAIRS)

# An optimizer that treats entries one by one, and one that does not: under it the entries of a mask
# are vectors. Neither computes anything that float32 rounds.
ELEMENTWISE = optax.sgd(0.5, momentum=0.5)
COUPLED = optax.chain(
  optax.sgd(0.5, momentum=0.5),
  optax.stateless(lambda updates, params: jax.tree.map(lambda u: u + jnp.max(u.real), updates)),
)


def random(rng, dtype, kinds=KINDS):
  """Numbers of eleven bits, which a half precision dtype rounds to its own."""
  draw = lambda: jnp.asarray(rng.integers(-2048, 2049, SHAPE) / 1024.0).astype(dtype)
  return {name: draw() for name in kinds}


def assert_same(found, expected):
  found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
  for name, x, y in zip(KINDS, found, expected, strict=True):
    assert x.dtype == y.dtype, name
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


def assert_laid_out(found, expected):
  """The same containers with leaves of the same shapes and dtypes."""
  shapes = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.asarray(x).dtype), tree)
  assert shapes(found) == shapes(expected)


def follow(tx, inner, grad_dtype, param_dtype, transform, accumulate="mean", steps=6):
  """All ways of a micro-step, and a flush, beside the oracle; each goes on from another's state."""
  rng = np.random.default_rng(0)
  params = random(rng, param_dtype)
  slow = oracle.Oracle(oracle.relaxed(inner), list(params.values()), PIECES, accumulate)
  state = tx.init(params)
  shape = jax.tree.map(jnp.zeros_like, state)
  update, apply = transform(tx.update), transform(tx.apply)
  for t in range(1, steps + 1):
    grads = random(rng, grad_dtype)
    expected = slow.step(list(grads.values()), list(params.values()))
    after = slow.applied(list(params.values()))
    updates, by_update = update(grads, state, params)
    applied, by_apply = apply(params, state, grads)
    assert_same(updates, expected)
    assert_same(applied, after)
    ways = [by_update, by_apply]
    if t == 4:
      static = functools.partial(tx.update, phase=0), functools.partial(tx.apply, phase=0)
      updates, by_static = transform(static[0])(grads, state, params)
      applied, by_static_apply = transform(static[1])(params, state, grads)
      assert_same(updates, expected)
      assert_same(applied, after)
      ways = [by_static, by_static_apply]
    for new in ways:
      assert_laid_out(new, shape)
    params, state = applied, ways[t % 2]
  updates, state = transform(tx.flush)(state, params)
  expected = slow.flush(list(params.values()))
  assert accumulate == "latest" or any(x.any() for x in expected)
  assert_same(updates, expected)
  assert_laid_out(state, shape)


@dtypes
def test_every_way_sees_the_mean_as_it_was_accumulated(grad_dtype, param_dtype):
  tx = oc.cadence(oracle.relaxed(ELEMENTWISE), EVERY)
  follow(tx, ELEMENTWISE, grad_dtype, param_dtype, jax.jit)


@pytest.mark.ci
@pytest.mark.parametrize(("grad_dtype", "param_dtype"), [WIDER, *in_ci([NARROW])])
def test_so_do_optimizers_that_see_vectors(grad_dtype, param_dtype):
  tx = oc.cadence(oracle.relaxed(COUPLED), EVERY)
  follow(tx, COUPLED, grad_dtype, param_dtype, jax.jit)


@pytest.mark.ci
@pytest.mark.parametrize("accumulate", ["sum", "latest"])
def test_so_do_sums_and_the_latest(accumulate):
  tx = oc.cadence(oracle.relaxed(ELEMENTWISE), EVERY, accumulate=accumulate)
  follow(tx, ELEMENTWISE, "bfloat16", "float32", jax.jit, accumulate)


@pytest.mark.parametrize(("grad_dtype", "param_dtype"), [WIDER, *in_ci([NARROW])])
def test_eager_calls_see_the_same(grad_dtype, param_dtype):
  tx = oc.cadence(oracle.relaxed(ELEMENTWISE), EVERY)
  follow(tx, ELEMENTWISE, grad_dtype, param_dtype, lambda fn: fn, steps=4)


@pytest.mark.ci
def test_skipping_rounds_no_more():
  tx = oc.cadence(oracle.relaxed(ELEMENTWISE), EVERY, nonfinite="skip")
  follow(tx, ELEMENTWISE, "bfloat16", "float32", jax.jit)


def test_double_precision_parameters_get_means_in_double_precision():
  with oracle.enable_x64():
    tx = oc.cadence(oracle.relaxed(ELEMENTWISE), EVERY)
    follow(tx, ELEMENTWISE, "float32", "float64", jax.jit)


def test_an_update_is_rounded_once():
  # A little more than half a unit in the last place of one: rounded by itself, exactly half.
  step = -(2.0**-8) * (1 + 2.0**-12)
  tx = oc.cadence(optax.sgd(1.0), EVERY)
  params = {name: jnp.ones(SHAPE, jnp.bfloat16) for name in KINDS}
  grads = {name: jnp.full(SHAPE, step) for name in KINDS}
  state, apply, start = tx.init(params), jax.jit(tx.apply), params
  for _ in range(4):
    params, state = apply(params, state, grads)
  for name in ("mixed", "bands"):
    assert float(params[name].min()) > 1.0
  once = jnp.bfloat16(1 + 2.0**-7)
  assert (params["offset"] == once).all()
  assert (start["offset"] == 1).all()


# Small, and with all that an optimizer may look at: a matrix in pieces, one under a mask, a vector.
FEW = {"bands": KINDS["corners"][0], "mixed": MASK, "plain": 2}


# Optax's own take no gradients that are wider than their state, outside of any cadence either.
AS_WIDE_AS_THE_STATE = {
  "apply_if_finite",
  "contrib.galore",
  "contrib.mechanize",
  "contrib.scale_by_galore",
  "novograd",
  "scale_by_novograd",
}
# With moments, with several optimizers by rank, with updates in a dtype of its own, with a branch.
FAMILIES = {"adamw", "contrib.muon", "contrib.schedule_free_adamw", "novograd"}
# Where a micro-step may stand: unknown while it is traced, nothing held, all but one held.
PHASES = (None, 0, 1)
WAYS = ("update", "apply")


def dtype_cases():
  """Of the families all ways and phases with every pair of dtypes; of the others one of these each.

  Tracing all of them takes minutes. Every optimizer still meets each pair, each phase and each way,
  and any two of these meet with some optimizer.
  """
  for row, pair in enumerate(FEW_PAIRS):
    for column, name in enumerate(optax_exports.NAMES):
      if name in AS_WIDE_AS_THE_STATE and pair == ("float32", "bfloat16"):
        continue
      calls = list(itertools.product(PHASES, WAYS))
      phase, way = PHASES[(row + column) % 3], WAYS[(row + column // 3) % 2]
      of_a_family = name in FAMILIES
      yield pytest.param(
        *(name, *pair, calls if of_a_family else [(phase, way)]),
        id="-".join((name, *pair)),
        marks=[] if of_a_family and not name.startswith("contrib.") else pytest.mark.ci,
      )


@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated")
@pytest.mark.parametrize(("name", "grad_dtype", "param_dtype", "calls"), list(dtype_cases()))
def test_no_leaf_of_a_state_changes_its_dtype(name, grad_dtype, param_dtype, calls):
  """Only traced: a state that goes through `scan` has to keep its dtypes."""
  extra = optax_exports.EXTRA_ARGS.get(name, {})
  tx = oc.cadence(oracle.relaxed(optax_exports.build(name)), FEW)
  params = {name: jax.ShapeDtypeStruct(SHAPE, param_dtype) for name in FEW}
  grads = {name: jax.ShapeDtypeStruct(SHAPE, grad_dtype) for name in FEW}
  state = jax.eval_shape(tx.init, params)
  wider = oracle.wider(grad_dtype, param_dtype)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  for phase, way in calls:
    step = functools.partial(getattr(tx, way), phase=phase, **extra)
    if way == "update":
      updates, new = jax.eval_shape(step, grads, state, params)
      assert {u.dtype for u in updates.values()} == {wider}
    else:
      after, new = jax.eval_shape(step, params, state, grads)
      assert shapes(after) == shapes(params)
    assert shapes(new) == shapes(state)
  updates, new = jax.eval_shape(functools.partial(tx.flush, **extra), state, params)
  assert shapes(new) == shapes(state)


@pytest.mark.parametrize(
  ("accumulator_dtype", "value", "steps"), [("bfloat16", 1.0, 512), ("float16", 1000.0, 128)]
)
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("accumulate", ["mean", "sum"])
def test_narrow_accumulators_hold_a_running_mean(
  accumulator_dtype, value, steps, nonfinite, accumulate
):
  """The mean of equal gradients is that gradient: a sum would stop growing, or overflow."""
  half = steps // 2
  mask = np.random.default_rng(0).permutation(np.repeat([half, steps], 12)).reshape(SHAPE)
  every = {
    "bands": oc.channels([half, steps]),
    "corners": oc.quadrants([[half, steps], [steps, half]]),
    "mixed": mask,
    "plain": steps,
  }
  tx = oc.cadence(
    optax.sgd(1.0),
    every,
    accumulate=accumulate,
    accumulator_dtype=accumulator_dtype,
    nonfinite=nonfinite,
  )
  params = {name: jnp.zeros(SHAPE) for name in every}
  grads = {name: jnp.full(SHAPE, value, "float16") for name in every}
  state = tx.init(params)
  for x in jax.tree.leaves([group.accumulators for group in groups(state)]):
    assert x.dtype == accumulator_dtype
  # At the end all windows are full, and those of half the length are for the second time.
  step = lambda carry, _: (tx.apply(*carry, grads), None)
  (params, state), _ = jax.lax.scan(step, (params, state), length=steps)
  total = -value * (steps if accumulate == "sum" else 1)
  assert (params["plain"] == total).all()
  for name in ("bands", "corners", "mixed"):
    # Two windows of half the length: their sums add up to the same, their means to twice as much.
    found = np.unique(np.asarray(params[name])).tolist()
    assert found == ([total] if accumulate == "sum" else [2 * total, total]), name
  # What a flush applies is the mean, or the sum, of a window that is not full.
  step = lambda state, _: (tx.update(grads, state, params)[1], None)
  state, _ = jax.lax.scan(step, state, length=half - 1)
  updates, _ = tx.flush(state, params)
  wanted = -value * (half - 1 if accumulate == "sum" else 1)
  for name, u in updates.items():
    np.testing.assert_array_equal(np.asarray(u), np.float32(wanted), err_msg=name)


def test_what_is_left_out_does_not_weigh_in_a_running_mean():
  tx = oc.cadence(optax.sgd(1.0), 8, accumulator_dtype="bfloat16", nonfinite="skip")
  params = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
  grads = {"a": jnp.full(3, 0.75), "b": jnp.full(3, 0.75)}
  state, update = tx.init(params), jax.jit(tx.update)
  for t in range(8):
    bad = jnp.nan if t % 3 == 0 else 0.75
    updates, state = update(grads | {"b": jnp.full(3, bad)}, state, params)
  for u in updates.values():
    np.testing.assert_array_equal(u, np.float32(-0.75))


@pytest.mark.parametrize(("noise", "due"), [(0.0, 2), (4.0, 8)])
def test_a_policy_judges_the_sum_of_a_running_mean(noise, due):
  tx = oc.cadence(optax.sgd(1.0), oc.until_certain(1.0, 2, 8), accumulator_dtype="bfloat16")
  params = jnp.zeros(4)
  state, update = tx.init(params), jax.jit(tx.update)
  for t in range(1, 9):
    grads = jnp.full(4, 0.25) + noise * (-1) ** t
    updates, state = update(grads, state, params)
    if updates.any():
      break
  assert t == due


def test_random_gradients_do_not_drift_in_a_running_mean():
  tx = oc.cadence(optax.sgd(1.0), 64, accumulator_dtype="bfloat16")
  grads = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, (64, 1000)), jnp.float32)
  params = jnp.zeros(1000)
  params, _ = jax.lax.scan(
    lambda carry, g: (tx.apply(*carry, g), None), (params, tx.init(params)), grads
  )[0]
  # Each of 64 roundings is half a unit in the last place, here 1/256, at most.
  assert np.abs(np.asarray(-params) - np.asarray(grads.mean(0))).max() < 32 / 256
  assert abs(float(-params.mean()) - float(grads.mean())) < 1 / 256


@pytest.mark.parametrize("narrow", ["gradients", "accumulators", "parameters"])
def test_floats_of_eight_bits(narrow):
  """JAX promotes none of them; what is computed with them is computed in a wider dtype."""
  eight = "float8_e4m3fn"
  every = {"bands": oc.quadrants([[1, 2], [2, 1]]), "mixed": MASK, "plain": 2}
  tx = oc.cadence(
    optax.sgd(0.5),
    every,
    accumulator_dtype=eight if narrow == "accumulators" else None,
    nonfinite="skip",
  )
  params = {k: jnp.ones(SHAPE, eight if narrow == "parameters" else "float32") for k in every}
  grads = {k: jnp.full(SHAPE, 0.5, eight if narrow == "gradients" else "float32") for k in every}
  state, apply, expected = tx.init(params), jax.jit(tx.apply), params
  for _ in range(2):
    updates, _ = tx.update(grads, state, params)
    assert {u.dtype for u in updates.values()} == {jnp.dtype("float32")}
    params, state = apply(params, state, grads)
  for name, x in params.items():
    assert x.dtype == expected[name].dtype
    found = np.unique(np.asarray(x).astype(np.float32)).tolist()
    assert found == {"bands": [0.5, 0.75], "mixed": [0.5, 0.75, 1.0], "plain": [0.75]}[name]
