"""Pruning against obvious NumPy: a full sort, ties to the lower index."""

import inspect
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import orbax.checkpoint
import pytest
from flax import nnx
from flax.training import train_state
from jax import export
from matplotlib.figure import Figure
from states import groups

import optax_cadence as oc
from optax_cadence import pruning
from optax_cadence.pruning import allocation
from optax_cadence.pruning import packing as bits
from optax_cadence.pruning import selection

SPECIAL = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-40, 1, 1, -1], np.float32)

ADAM = oracle.relaxed(optax.adam(0.1))


def sorted_masks(arrays, kept):
  flat = np.concatenate([np.asarray(a, np.float32).ravel() for a in arrays])
  mask = np.zeros(flat.size, bool)
  mask[np.argsort(-flat, kind="stable")[:kept]] = True
  ends = np.cumsum([a.size for a in arrays])[:-1]
  return [m.reshape(a.shape) for m, a in zip(np.split(mask, ends), arrays, strict=True)]


def by_selection(arrays, kept):
  (found,) = selection.largest([[lambda a=a: selection.order(a) for a in arrays]], [kept])
  return [mask() for mask in found]


SHAPES = [[(7, 9), (5,)], [(0,), (1,)], [(3, 3, 4), (1, 1), (8,)], [(65, 3)]]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shapes", SHAPES)
def test_masks_equal_those_of_a_full_sort(shapes, dtype):
  rng, fn = np.random.default_rng(0), jax.jit(by_selection)
  for _ in range(8):
    half = lambda s: np.where(rng.random(s) < 0.5, rng.choice(SPECIAL, s), rng.integers(-3, 4, s))
    arrays = [jnp.asarray(half(s), dtype) for s in shapes]
    size = sum(a.size for a in arrays)
    for kept in {0, size, size // 3, min(size, 2), max(0, size - 1)}:
      found, expected = fn(arrays, jnp.int32(kept)), sorted_masks(arrays, kept)
      for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.ci
@pytest.mark.parametrize("method", [selection.COMPARE, selection.HISTOGRAM])
def test_both_ways_of_counting_give_the_masks_of_a_full_sort(method):
  rng = np.random.default_rng(1)
  arrays = [jnp.asarray(rng.integers(-2, 3, s), jnp.float32) for s in ((5000, 2), (70, 3), (9,))]
  pools = [[lambda a=a: selection.order(a) for a in arrays]]
  size = sum(a.size for a in arrays)
  cut = jax.jit(lambda kept: selection._cut(pools, kept, method))
  for kept in (0, 1, size // 3, size // 2, size - 1, size):
    threshold, (ends,) = cut(jnp.array([kept]))
    found = [
      selection._mask(keys, threshold[0], end) for keys, end in zip(pools[0], ends, strict=True)
    ]
    for a, b in zip(found, sorted_masks(arrays, kept), strict=True):
      np.testing.assert_array_equal(a, b)


NORMAL = np.random.default_rng(2).standard_normal(2**16)


@pytest.mark.parametrize(
  "x", [NORMAL, np.ones(2**16), np.round(NORMAL), np.exp(20 * NORMAL), np.arange(2**16) % 2]
)
def test_a_mask_takes_at_most_seven_reads_of_the_data_before_it_is_written(x):
  x, passes = jnp.asarray(x, jnp.float32).reshape(256, 256), []

  def keys():
    jax.debug.callback(lambda: passes.append(1))
    return selection.order(jnp.abs(x))

  def search(kept):
    low, high = (jnp.array([bound], jnp.int32) for bound in (-(2**31), 2**31 - 1))
    return selection._search([[keys]], low, high, kept, selection.COMPARE)

  for kept in (1, 6554, 65535):
    passes.clear()
    jax.block_until_ready(jax.jit(search)(jnp.array([kept])))
    jax.effects_barrier()
    assert 1 <= len(passes) <= 7
  # A histogram of 2**11 bins does it in three.
  assert selection.HISTOGRAM.ways**3 >= 2**32


@pytest.mark.usefixtures("optimized_programs")
def test_ties_are_settled_within_a_row():
  x = jax.ShapeDtypeStruct((512, 512), jnp.float32)

  def ranks(x, threshold, row):
    return selection._ranks(lambda: selection.order(jnp.abs(x)), threshold, row, (512, 512), 1)

  one = jax.ShapeDtypeStruct((), jnp.int32)
  compiled = jax.jit(ranks).lower(x, one, one).compile()
  # Nothing as large as the data is made on the way to a row of it.
  assert compiled.memory_analysis().temp_size_in_bytes < 8 * 512
  assert jax.eval_shape(ranks, x, one, one).shape == (512,)


@pytest.mark.parametrize("shape", [(16, 3), (3, 8), (3, 3, 5), (7,), (0, 4), (1, 1), ()])
def test_packing_is_undone_and_takes_a_bit_per_weight(shape):
  mask = jnp.asarray(np.random.default_rng(0).random(shape) < 0.5)
  packed = bits.pack(mask)
  assert packed.nbytes == -(-mask.size // 8) and packed.shape == bits.packed_shape(shape)
  np.testing.assert_array_equal(bits.unpack(packed, shape), mask)


@pytest.mark.parametrize("size", [1, 7, 4096, 999_983, 2**24 + 1, 2**31 - 1])
def test_traced_count_is_exact(size):
  for s in (0.0, 1e-3, 0.25, 0.5, 0.9, 1.0):
    share = round(float(np.float32(s)) * 2**24)
    expected = (share * size + 2**23) >> 24
    assert int(allocation.pruned(jnp.float32(s), size)) == expected


def best(scores, kept):
  """The mask of the best, by a full sort."""
  return sorted_masks([scores], kept)[0]


def pruned_once(x, **options):
  tx = oc.prune(every=1, **options)
  _, state = jax.jit(tx.update)({"w": x}, tx.init({"w": x}), {"w": x})
  return np.asarray(pruning.masks({"w": x}, state)["w"])


@pytest.mark.parametrize("shape", [(2, 3), (4, 1), (6,)])
def test_blocks_are_pruned_whole_the_worst_first(shape):
  x = jax.random.normal(jax.random.key(0), (8, 12))
  mask = pruned_once(x, sparsity=0.75, structure=pruning.Block(shape))
  blocks = (1,) * (2 - len(shape)) + shape
  split = lambda x: np.asarray(x).reshape(8 // blocks[0], blocks[0], 12 // blocks[1], blocks[1])
  scores = split(np.abs(x)).mean((1, 3))
  expected = best(scores, round(scores.size / 4))
  np.testing.assert_array_equal(split(mask).any((1, 3)), expected)
  np.testing.assert_array_equal(split(mask).all((1, 3)), expected)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels_are_pruned_whole_the_worst_first(axis):
  x = jax.random.normal(jax.random.key(0), (6, 4, 10))
  mask = pruned_once(x, sparsity=0.5, structure=pruning.Channel(axis))
  others = tuple(i for i in range(3) if i != axis % 3)
  scores = np.abs(x).mean(others)
  expected = best(scores, scores.size // 2)
  np.testing.assert_array_equal(mask.any(others), expected)
  np.testing.assert_array_equal(mask.all(others), expected)


def test_channels_of_all_leaves_compete():
  tx, params = oc.prune(0.5, every=1, structure=pruning.Channel(), allocation="global"), tree()
  _, state = jax.jit(tx.update)(params, tx.init(params), params)
  masks = pruning.masks(params, state)
  scores = [np.abs(params[k]["kernel"]).mean(0) for k in "ab"]
  for k, expected in zip("ab", sorted_masks(scores, 13 - round(13 / 2)), strict=True):
    np.testing.assert_array_equal(np.asarray(masks[k]["kernel"]).all(0), expected)


def test_criterion_and_structure_of_a_user():
  x = jax.random.normal(jax.random.key(0), (4, 6))
  odd = lambda param, grad: jnp.sin(3 * param)
  np.testing.assert_array_equal(
    pruned_once(x, sparsity=0.5, criterion=odd), best(np.sin(3 * np.asarray(x)), 12)
  )
  upper = lambda scores, sparsity: jnp.triu(scores > sparsity)
  expected = np.triu(np.abs(x) > 0.5)
  np.testing.assert_array_equal(pruned_once(x, sparsity=0.5, structure=upper), expected)


def test_movement_sums_up_minus_gradient_times_weight():
  tx = oc.prune(0.5, every=4, criterion=pruning.movement(), inner=optax.sgd(0.1))
  params, state, scores = tree(), tx.init(tree()), 0.0
  update = jax.jit(tx.update)
  for t in range(4):
    grads = tree(t + 1)
    scores = scores - np.asarray(grads["a"]["kernel"]) * np.asarray(params["a"]["kernel"])
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
  # Terms cancel, so it is their rounding that a sum may be off by.
  np.testing.assert_allclose(state.memory["a"]["kernel"], scores, rtol=1e-5, atol=1e-6)
  masks = pruning.masks(params, state)
  np.testing.assert_array_equal(masks["a"]["kernel"], best(state.memory["a"]["kernel"], 64))


def test_movement_of_complex_weights_is_the_change_of_the_loss():
  params = {"w": jnp.full((2, 2), 1 + 2j)}
  tx = oc.prune(0.5, every=4, criterion=pruning.movement(), inner=optax.sgd(0.1))
  _, state = tx.update(params, tx.init(params), params)
  np.testing.assert_allclose(state.memory["w"], 3.0)  # -Re (1 + 2i)²
  odd = pruning.Criterion(
    "odd", lambda p, m, k: m, True, remembers=lambda m, p, g: m.astype(p.dtype) + p * g
  )
  tx = oc.prune(0.5, every=4, criterion=odd, inner=optax.sgd(0.1))
  with pytest.raises(ValueError, match=r"real array of shape \(2, 2\), found \(2, 2\), complex64"):
    tx.update(params, tx.init(params), params)


def test_seeds_functions_and_regrowth_come_in_every_form():
  params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
  half = jax.tree_util.Partial(lambda share, t: share, 0.5)
  for tx in (
    oc.prune({"a": half, "b": 0.5}, every=1, criterion=pruning.random(np.int32(3))),
    oc.prune(0.5, every=1, hold=False, fill=pruning.Fill(0.0, 1.0, key=np.int32(3))),
  ):
    _, state = tx.update(params, tx.init(params), params)
    assert int(state.step) == 1
  np.testing.assert_array_equal(
    jax.random.key_data(pruning.random(np.int64(3)).key), jax.random.key_data(jax.random.key(3))
  )
  with pytest.raises(ValueError, match="key: expected a seed or a PRNG key, found 1.5"):
    pruning.random(1.5)
  with pytest.raises(ValueError, match=r"expected pruning.by_gradient.*found 'rigl'"):
    oc.prune(0.5, every=1, regrow="rigl", inner=optax.sgd(0.1))
  with pytest.raises(ValueError, match="regrow: fraction: expected a number .*found 'x'"):
    pruning.by_gradient(stop=4, fraction="x")


def test_saliency_is_weight_times_gradient():
  tx = oc.prune(0.5, every=1, criterion="saliency", inner=optax.sgd(0.1))
  params, grads = tree(), tree(1)
  _, state = jax.jit(tx.update)(grads, tx.init(params), params)
  scores = np.abs(params["a"]["kernel"] * grads["a"]["kernel"])
  np.testing.assert_array_equal(pruning.masks(params, state)["a"]["kernel"], best(scores, 64))


@pytest.mark.parametrize("size", [8, 10, 3, 1])
def test_n_of_m_is_exact_in_every_group(size):
  x = np.random.default_rng(1).integers(-3, 4, (5, size)).astype(np.float32)
  tx = oc.prune(every=1, structure=pruning.NM(2, 4, axis=-1))
  params = {"w": jnp.asarray(x)}
  _, state = jax.jit(tx.update)(params, tx.init(params), params)
  mask = np.asarray(pruning.masks(params, state)["w"])
  for row, kept in zip(np.abs(x), mask, strict=True):
    for i in range(0, size, 4):
      expected = np.zeros(len(row[i : i + 4]), bool)
      expected[np.argsort(-row[i : i + 4], kind="stable")[:2]] = True
      np.testing.assert_array_equal(kept[i : i + 4], expected)


def test_erk_follows_the_closed_form_and_clips():
  shapes = [(3, 3, 3, 16), (3, 3, 16, 64), (64, 10)]
  found = allocation.erdos_renyi(shapes, 0.7)
  traced = jax.jit(lambda s: jnp.stack(allocation.erdos_renyi(shapes, s)))(0.7)
  sizes, dense = np.array([np.prod(s) for s in shapes]), set()
  factors = np.array([sum(s) / np.prod(s) for s in shapes])
  while True:
    free = [i for i in range(3) if i not in dense]
    kept = 0.3 * sizes.sum() - sum(sizes[i] for i in dense)
    eps = kept / (factors[free] * sizes[free]).sum()
    over = [i for i in free if eps * factors[i] > 1]
    if not over:
      break
    dense.add(max(over, key=lambda i: factors[i]))
  expected = [0.0 if i in dense else 1 - eps * factors[i] for i in range(3)]
  assert dense
  np.testing.assert_allclose(found, expected, atol=1e-9)
  np.testing.assert_allclose(traced, expected, atol=1e-5)


@pytest.mark.ci
def test_erdos_renyi_counts_the_last_two_axes():
  shapes = [(3, 3, 8, 16), (32, 64)]
  factors = np.array([(8 + 16) / (8 * 16), (32 + 64) / (32 * 64)])
  sizes = np.array([math.prod(s) for s in shapes])
  density = 0.1 * sizes.sum() / (factors * sizes).sum() * factors
  found = allocation.erdos_renyi(shapes, 0.9, kernel=False)
  np.testing.assert_allclose(found, 1 - density, rtol=1e-12)
  tx = oc.prune(0.9, every=1, allocation="erdos_renyi")
  params = {str(i): jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes)}
  _, state = jax.jit(tx.update)(params, tx.init(params), params)
  for i, mask in enumerate(pruning.masks(params, state).values()):
    assert int((~mask).sum()) == round(found[i] * sizes[i])


def test_schedules_follow_their_formulas():
  schedule = pruning.cubic(0.9, 10, 110, initial=0.1)
  for t in range(130):
    left = 1 - min(max((t - 10) / 100, 0), 1)
    np.testing.assert_allclose(schedule(t), 0.9 + (0.1 - 0.9) * left**3, rtol=1e-5)
  every = [t for t in range(1, 30) if pruning.Times(4, begin=6, end=20).due(t)]
  assert every == [8, 12, 16, 20]
  assert [t for t in range(1, 30) if pruning.once(7).due(t)] == [7]


def tree(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
  return {"a": {"kernel": draw(16, 8), "bias": draw(8)}, "b": {"kernel": draw(7, 5)}}


def run(tx, steps, params=None):
  params = tree() if params is None else params
  state, update, after = tx.init(params), jax.jit(tx.update), []
  for t in range(steps):
    updates, state = update(tree(t + 1), state, params)
    params = optax.apply_updates(params, updates)
    after.append((params, state))
  return after


def zeros(params):
  return {k: int((params[k]["kernel"] == 0).sum()) for k in params}


@pytest.mark.ci
@pytest.mark.parametrize("inner", [ADAM, oc.cadence(ADAM, 3)])
@pytest.mark.parametrize("packed", [True, False])
def test_pruned_weights_are_zero_after_every_step(inner, packed):
  tx = optax.chain(inner, oc.prune(0.75, every=5, packed=packed))
  for t, (params, state) in enumerate(run(tx, 60), start=1):
    masks = pruning.masks(params, state)
    for k in "ab":
      assert not params[k]["kernel"][~masks[k]["kernel"]].any()
    expected = {"a": 96, "b": 26} if t >= 5 else {"a": 0, "b": 0}
    assert zeros(params) == expected
  assert params["a"]["bias"].all()


def test_global_allocation_is_exact_in_total():
  tx = oc.prune(0.9, every=1, allocation="global")
  (params, _), *_ = run(tx, 1)
  scores = [np.abs(tree()[k]["kernel"]) for k in "ab"]
  masks = sorted_masks(scores, 163 - round(0.9 * 163))
  for k, mask in zip("ab", masks, strict=True):
    np.testing.assert_array_equal(params[k]["kernel"] != 0, mask)


@pytest.mark.ci
@pytest.mark.parametrize(
  "regrow", [pruning.by_gradient(stop=50), pruning.at_random(1, fraction=0.3)]
)
def test_regrowth_keeps_sparsity_and_exchanges_weights(regrow):
  tx = oc.prune(0.5, every=4, regrow=regrow, inner=optax.sgd(0.1))
  before, moved = None, 0
  for params, state in run(tx, 40):
    masks = {k: np.asarray(m["kernel"]) for k, m in pruning.masks(params, state).items()}
    assert {k: int((~m).sum()) for k, m in masks.items()} == {"a": 64, "b": 18}
    for k in masks if before else ():
      grown, dropped = masks[k] & ~before[k], before[k] & ~masks[k]
      assert grown.sum() == dropped.sum()
      moved += grown.sum()
    before = masks
  assert moved > 100


def test_shock_zeroes_once_and_weights_come_back():
  tx = optax.chain(optax.sgd(0.1), oc.prune(0.5, every=4, hold=False, criterion=pruning.random(0)))
  found = [zeros(params) for params, _ in run(tx, 9)]
  assert [f["a"] for f in found] == [0, 0, 0, 64, 0, 0, 0, 64, 0]


def test_straight_through_leaves_weights_dense():
  tx = optax.chain(optax.sgd(0.1), oc.prune(0.5, every=1, straight_through=True))
  params, state = run(tx, 3)[-1]
  assert zeros(params) == {"a": 0, "b": 0}
  assert zeros(pruning.masked(params, state)) == {"a": 64, "b": 18}
  grads = jax.grad(lambda p: sum(map(jnp.sum, jax.tree.leaves(pruning.masked(p, state)))))(params)
  assert all((g == 1).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("clear", [True, False])
def test_moments_of_pruned_entries_are_cleared_or_kept_through_a_cadence(clear):
  cut = {"a": {"kernel": oc.quadrants([[1, 2], [2, 1]]), "bias": 1}, "b": 2}
  inner = oc.cadence(pruning.clear_moments(ADAM) if clear else ADAM, cut)
  tx = optax.chain(inner, oc.prune(0.5, every=4))
  (*_, (before, _), (after, state)) = run(tx, 5)
  assert zeros(before) == zeros(after) == {"a": 64, "b": 18}
  # At micro-step 5 the group of period 1 updates the first and the last quadrant again.
  every, *_ = groups(state[0])
  top, bottom = every.inner_state[0].mu["a"]["kernel"]
  kept = pruning.masks(after, state)["a"]["kernel"]
  grad = tree(5)["a"]["kernel"]
  for mu, rows, columns in ((top, slice(8), slice(4)), (bottom, slice(8, 16), slice(4, 8))):
    pruned = ~kept[rows, columns]
    assert pruned.any()
    # Cleared, the first moment of a pruned entry is that of its last gradient alone.
    alone = np.isclose(mu, 0.1 * grad[rows, columns], rtol=1e-5)
    assert alone[pruned].all() if clear else not alone[pruned].any()
    assert not alone[~pruned].any()


# One line for each of JaxPruner's algorithms: the table of the documentation itself.
DOCS = pathlib.Path(__file__).parents[1] / "docs" / "pruning.md"
ALGORITHMS = dict(
  re.findall(r"^\| `(\w+)` \| `([^|]+)` \| [^|]+ \|$", DOCS.read_text(), re.MULTILINE)
)


def test_all_eleven_algorithms_are_in_the_table():
  assert len(ALGORITHMS) == 11


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_algorithm_is_one_line(name):
  tx = eval(ALGORITHMS[name], {"oc": oc, "optax": optax, "pruning": pruning})
  params, state = run(tx, 4)[-1]
  if name == "no_prune":
    return
  # Not the zeros: a weight that has just grown is zero too.
  sparse = {k: int((~m["kernel"]).sum()) for k, m in pruning.masks(params, state).items()}
  total = 82 if "global" not in name else round(0.5 * 163)
  assert sum(sparse.values()) == total


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"sparsity": 1.5}, r"a/kernel.*found 1.5"),
    ({"sparsity": -0.1}, r"a/kernel"),
    ({"structure": pruning.NM(2, 4, axis=2), "sparsity": None}, r"a/kernel.*axis 2"),
    ({"structure": pruning.Channel(3)}, r"a/kernel.*axis 3"),
    ({"structure": pruning.Block((3, 3))}, r"a/kernel.*\(3, 3\)"),
    ({"where": lambda path, x: False}, r"a/kernel"),
    ({"sparsity": optax.linear_schedule(0.9, 0.1, 50)}, r"a/kernel.*does not fall"),
    ({"sparsity": {"a": 0.5}}, r"b/kernel"),
    ({"sparsity": {"a": 0.5, "b": 0.5, "c": 0.5}}, r"'c': no parameter is there"),
  ],
)
def test_bad_input_names_the_leaf(options, match):
  with pytest.raises(ValueError, match=match):
    oc.prune(**({"sparsity": 0.5, "every": 2} | options)).init(tree())


def test_criterion_that_reads_gradients_needs_inner():
  with pytest.raises(ValueError, match="inner"):
    oc.prune(0.5, every=1, criterion="saliency")


@pytest.mark.ci
def test_vmap_over_sparsities_equals_single_runs():
  def final(s):
    tx, params = oc.prune(s, every=2), tree()
    state = tx.init(params)
    body = lambda c, g: ((lambda u, st: (optax.apply_updates(c[0], u), st))(
      *tx.update(g, c[1], c[0])), None)  # fmt: skip
    grads = jax.tree.map(lambda *x: jnp.stack(x), *[tree(t) for t in range(4)])
    return jax.lax.scan(body, (params, state), grads)[0][0]

  batch, alone = jax.jit(jax.vmap(final))(jnp.array([0.0, 0.25, 1.0])), jax.jit(final)
  for i, s in enumerate((0.0, 0.25, 1.0)):
    single = alone(jnp.float32(s))
    jax.tree.map(lambda b, x, i=i: np.testing.assert_array_equal(b[i], x), batch, single)


@pytest.mark.ci
def test_nnx_optimizer_and_train_state():
  model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(
    model, optax.chain(optax.sgd(0.1), oc.prune(0.5, every=1)), wrt=nnx.Param
  )
  grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 8))) ** 2))(model)
  # The model became an argument in Flax 0.11.
  takes_model = "model" in inspect.signature(optimizer.update).parameters
  optimizer.update(*[model] * takes_model, grads)
  assert int((model.kernel[...] == 0).sum()) == 32
  tx = optax.chain(optax.sgd(0.1), oc.prune(0.5, every=1))
  state = train_state.TrainState.create(apply_fn=None, params=tree(), tx=tx)
  assert zeros(state.apply_gradients(grads=tree(1)).params) == {"a": 64, "b": 18}


def settings_of_states():
  """Transformations whose states differ in their fields."""
  inner, movement = {"inner": ADAM}, {"criterion": pruning.movement()}
  return {
    "masks": oc.prune(0.5, every=2),
    "masks as bools": oc.prune(0.5, every=2, packed=False),
    "inner": oc.prune(0.5, every=2, **inner),
    "memory": oc.prune(0.5, every=2, **inner, **movement),
    "memory and bools": oc.prune(0.5, every=2, packed=False, **inner, **movement),
    "shocks": oc.prune(0.5, every=2, hold=False, **inner),
  }


@pytest.mark.parametrize("name", settings_of_states())
def test_tree_map_params_maps_what_follows_the_parameters_and_nothing_else(name):
  tx, params = settings_of_states()[name], tree()
  state = jax.jit(tx.update)(tree(1), tx.init(params), params)[1]
  map_params = optax.tree_utils.tree_map_params
  assert_same(map_params(tx, lambda x: x, state), state)
  # A label for each parameter; masks get the one that stands for the whole field.
  labels = {"a": {"kernel": "a/kernel", "bias": "a/bias"}, "b": {"kernel": "b/kernel"}}
  found = map_params(
    tx,
    lambda x, label: x if isinstance(x, optax.MaskedNode) else label,
    state,
    labels,
    transform_non_params=lambda x: "other",
    is_leaf=lambda x: isinstance(x, optax.MaskedNode),
  )
  assert found.step == "other"
  assert found.masks == ("other" if state.masks else {})
  masked = {"a": {"kernel": "a/kernel", "bias": optax.MaskedNode()}, "b": {"kernel": "b/kernel"}}
  assert found.memory == (masked if state.memory else {})
  if name.startswith(("inner", "memory", "shocks")):
    assert found.inner_state[0].mu == found.inner_state[0].nu == labels
    assert found.inner_state[0].count == "other"


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.ci
def test_names_with_slashes_are_names():
  draw = lambda i: jax.random.normal(jax.random.key(i), (4, 4))
  slashed = {"a/w": draw(0), "a": {"w": draw(1)}, "": draw(2)}
  plain = {"aw": draw(0), "a": {"w": draw(1)}, "0": draw(2)}
  sparsities = {"a/w": 0.25, "a": {"w": 0.5}, "": 0.125}

  def run_of(params, **options):
    tx = oc.prune(every=2, criterion=pruning.movement(), inner=optax.sgd(0.1), **options)
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(2):
      grads = jax.tree.map(lambda x, t=t: jnp.cos(x * (t + 1)), params)
      updates, state = update(grads, state, params)
      params = optax.apply_updates(params, updates)
    return params, state, pruning.masks(params, state)

  options = {"sparsity": 0.5, "allocation": "global"}
  params, state, masks = run_of(slashed, **options)
  other, _, expected = run_of(plain, **options)
  renamed = lambda tree: [tree["a"]["w"], *(x for key, x in tree.items() if key != "a")]
  for a, b in ((masks, expected), (params, other)):
    jax.tree.map(np.testing.assert_array_equal, renamed(a), renamed(b))
  assert_same(pruning.masks(params, pruning.with_masks(state, masks)), masks)
  params, state, masks = run_of(slashed, sparsity=sparsities)
  assert jax.tree.map(lambda m: round(float(1 - m.mean()), 3), masks) == sparsities
  # A table has room for one name each.
  found = pruning.summary(params, state, flops={"a/w": 1.0})
  assert list(found.leaves) == ["", "a/w", "a/w#2"]
  assert found.size == 3 * 16 and found.sparsity == 14 / 48
  with pytest.raises(ValueError, match="'a/w/c': no parameter is there"):
    oc.prune({"a/w": {"c": 0.5}}, every=1).init(slashed)


@pytest.mark.ci
def test_masks_follow_new_shapes():
  params, state = run(oc.prune(0.5, every=pruning.once(1)), 1)[-1]
  pad = lambda x, v: jnp.pad(x, [(0, 3)] * x.ndim, constant_values=v)
  state = pruning.with_masks(
    state, jax.tree.map(lambda m: pad(m, True), pruning.masks(params, state))
  )
  wide = jax.tree.map(lambda p: pad(p, 1.0), params)
  updates, _ = jax.jit(oc.prune(0.5, every=pruning.once(1)).update)(wide, state, wide)
  assert zeros(optax.apply_updates(wide, updates)) == {"a": 64, "b": 18}


@pytest.mark.usefixtures("optimized_programs")
def test_held_step_copies_no_leaf():
  tx, params = oc.prune(0.5, every=4), {"w": jnp.ones((256, 256))}

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  args = params, tx.init(params), params
  text = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile().as_text()
  assert not [line for line in text.splitlines() if "f32[256,256]" in line and " copy(" in line]


@pytest.mark.ci
def test_checkpoint_resumes_exactly(tmp_path):
  tx = oc.prune(0.5, every=2, regrow=pruning.at_random(0), inner=optax.sgd(0.1))
  update, kept = jax.jit(tx.update), run(tx, 3)[-1]
  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", kept)
    checkpointer.wait_until_finished()
    resumed = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: kept))
  for t in range(3):
    steps = [update(tree(t), state, params) for params, state in (kept, resumed)]
    kept, resumed = (
      (optax.apply_updates(params, updates), state)
      for (updates, state), (params, _) in zip(steps, (kept, resumed), strict=True)
    )
  jax.tree.map(np.testing.assert_array_equal, kept, resumed)


def test_histogram_compiles_for_a_gpu():
  tx, params = oc.prune(0.5, every=2, allocation="global"), tree()
  args = params, tx.init(params), params
  exported = export.export(jax.jit(tx.update), platforms=["cuda", "tpu"])(*args)
  assert "scatter" in exported.mlir_module()


def test_plot_draws_every_leaf_and_the_total():
  tx = optax.chain(optax.sgd(0.1), oc.prune(pruning.cubic(0.75, 0, 4), every=1))
  history = {t: pruning.summary(*found) for t, found in enumerate(run(tx, 6), start=1)}
  ax = pruning.plot(history, ax=Figure().subplots())
  lines = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
  assert set(lines) == {"a/kernel", "b/kernel", "total"}
  np.testing.assert_allclose(lines["total"], [s.sparsity for s in history.values()])
  assert lines["a/kernel"][-1] == 0.75


SHARDED = r"""
import re, jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np, optax_cadence as oc
mesh = Mesh(np.array(jax.devices()), ("d",))
params = {f"w{i}": jax.random.normal(jax.random.key(i), (64, 32)) for i in range(3)}
sharded = jax.device_put(params, NamedSharding(mesh, P("d", None)))
tx = oc.prune(0.9, every=2, allocation="global")
update = jax.jit(tx.update)
state = tx.init(sharded)
for _ in range(2):
  updates, state = update(sharded, state, sharded)
other = tx.init(params)
for _ in range(2):
  expected, other = update(params, other, params)
assert all((a == b).all() for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected)))
text = update.lower(sharded, state, sharded).compile().as_text()
pattern = r"= ([^=\n]*) (all-[a-z]+|collective-[a-z]+)(?:-start)?[(]"
for result, kind in re.findall(pattern, text):
  print(kind, result)
"""


@pytest.mark.ci
def test_global_allocation_gathers_no_sharded_leaf():
  root = pathlib.Path(__file__).parents[1]
  flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", SHARDED],
    cwd=root,
    env=os.environ | flags,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  found = [line.split(" ", 1) for line in done.stdout.splitlines()]
  assert found
  for kind, result in found:
    entries = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", result)]
    # Counts, or a row; a gather only of the counts of the 64 rows. A leaf has 2048 entries.
    assert max(entries, default=1) <= 64 and kind in ("all-reduce", "all-gather")
  # For each of the three leaves at most two passes, a row, and four sums to settle ties; newer
  # compilers join those of all leaves.
  assert len(found) <= 3 * 7
