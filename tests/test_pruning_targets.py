"""Sparsities are reached or refused, scores are ranked as they are, and nonsense is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cadence as oc
from optax_cadence import pruning
from optax_cadence.pruning import selection

pytestmark = pytest.mark.ci


def tree(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
  return {"a": {"kernel": draw(16, 8), "bias": draw(8)}, "c": {"kernel": draw(7, 5)}}


RISING = optax.linear_schedule(0.0, 0.9, 20)


@pytest.mark.parametrize(
  "every",
  [
    pruning.Times(7, end=20),
    pruning.Times(5, end=19),
    pruning.once(10),
    lambda t: (t % 7 == 0) & (t <= 20),
  ],
)
def test_a_schedule_that_goes_on_after_the_last_masks_is_an_error(every):
  with pytest.raises(ValueError, match="'a/kernel': the last masks are due .* goes on to 0.9"):
    oc.prune(RISING, every=every).init(tree())


@pytest.mark.parametrize(
  "every",
  [
    7,
    pruning.Times(7, end=21),
    pruning.Times(5, end=24),
    pruning.once(20),
    lambda t: t % 7 == 0,
    lambda t: (t == 3) | (t == 23),
  ],
)
def test_any_other_reaches_its_target(every):
  params = tree()
  tx = optax.chain(optax.sgd(0.0), oc.prune(RISING, every=every))
  state, update = tx.init(params), jax.jit(tx.update)
  for _ in range(28):
    updates, state = update(params, state, params)
    params = optax.apply_updates(params, updates)
  assert abs(pruning.summary(params, state).sparsity - 0.9) < 1 / 163


def test_where_times_are_not_known_while_tracing_nothing_is_said():
  oc.prune(RISING, every=lambda t: int(t) in (3, 4)).init(tree())
  jax.jit(lambda last: oc.prune(RISING, every=lambda t: t <= last).init(tree()))(5)


def test_a_schedule_towards_n_of_m_has_to_end_there():
  tx = oc.prune(RISING, every=1, structure=pruning.NM(2, 4))
  with pytest.raises(ValueError, match="'a/kernel': expected a schedule that ends at the 0.5"):
    tx.init(tree())


def close_scores(dtype=np.float64):
  """Differences that float32 does not have, around 1, where the order is all that tells."""
  return 1 + 1e-12 * np.random.default_rng(0).permutation(48).reshape(6, 8).astype(dtype)


def wide_numbers():
  """Switches float64 on."""
  return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()


def mask_of_close_scores(**options):
  with wide_numbers():
    params = {"kernel": jnp.asarray(close_scores())}
    if options.get("allocation") == "global":
      params["narrow"] = {"kernel": jnp.ones((4, 4), jnp.float32)}  # the lowest of all
    tx = oc.prune(every=1, **options)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    return np.asarray(pruning.masks(params, state)["kernel"])


@pytest.mark.parametrize(
  ("options", "kept"),
  [({}, 24), ({"allocation": "global"}, 32), ({"structure": pruning.Block((1, 1))}, 24)],
)
def test_float64_is_ranked_as_float64(options, kept):
  scores = close_scores()
  mask = mask_of_close_scores(sparsity=0.5, **options)
  np.testing.assert_array_equal(mask, scores >= np.sort(scores.ravel())[-kept])


def test_float64_is_ranked_as_float64_within_a_group():
  mask = mask_of_close_scores(structure=pruning.NM(1, 2))
  pairs = close_scores().reshape(3, 2, 8)
  np.testing.assert_array_equal(mask.reshape(3, 2, 8), pairs == pairs.max(1, keepdims=True))


@pytest.mark.parametrize("method", [selection.COMPARE, selection.HISTOGRAM])
def test_wide_keys_are_those_of_a_full_sort(method):
  special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 5e-324, -5e-324, 1, 1 + 1e-15, -1e300])
  with wide_numbers():
    x = jnp.asarray(np.random.default_rng(1).choice(special, (40, 3)), jnp.float64)
    pools = [[lambda: selection.order(x)]]
    cut = jax.jit(lambda kept: selection._cut(pools, kept, method))
    for kept in (0, 1, 30, 60, 119, 120):
      threshold, ((end,),) = cut(jnp.array([kept], jnp.int32))
      found = selection._mask(pools[0][0], threshold[0], end)
      expected = np.zeros(x.size, bool)
      expected[np.argsort(-np.asarray(x).ravel(), kind="stable")[:kept]] = True
      np.testing.assert_array_equal(np.asarray(found).ravel(), expected)
    integers = jnp.array([-(2**63), 2**63 - 1, 2**40, 2**40 + 1])
    assert (np.argsort(selection.order(integers)) == np.argsort(integers)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_does_not_enter_the_memory(bad):
  tx = oc.prune(0.5, every=8, criterion=pruning.movement(), inner=oc.cadence(optax.sgd(0.0), 1))
  params, expected = tree(), np.zeros((16, 8))
  state, update = tx.init(params), jax.jit(tx.update)
  for t in range(3):
    grads = tree(t + 1)
    if t == 1:
      grads["a"]["kernel"] = grads["a"]["kernel"].at[:8].set(bad)
    terms = np.asarray(-grads["a"]["kernel"] * params["a"]["kernel"])
    expected += np.where(np.isfinite(terms), terms, 0)
    _, state = update(grads, state, params)
  np.testing.assert_allclose(state.memory["a"]["kernel"], expected, rtol=1e-5, atol=1e-6)


def test_the_memory_of_float64_is_float64():
  with wide_numbers():
    tx = oc.prune(0.5, every=8, criterion=pruning.movement(), inner=optax.sgd(0.1))
    params = {"kernel": jnp.ones((2, 2), jnp.float64)}
    _, state = tx.update({"kernel": jnp.full((2, 2), 1e-12)}, tx.init(params), params)
    _, state = tx.update({"kernel": jnp.full((2, 2), 1.0)}, state, params)
    assert state.memory["kernel"].dtype == jnp.float64
    np.testing.assert_allclose(state.memory["kernel"] + 1, -1e-12, rtol=1e-3)


@pytest.mark.parametrize(
  ("make", "match"),
  [
    (lambda: oc.prune("0.5", every=1), "sparsity: expected a number.*'0.5'"),
    (lambda: oc.prune(True, every=1), "sparsity: expected a number.*True"),
    (lambda: oc.prune(0.5, every=True), "every: expected an integer.*True"),
    (lambda: oc.prune(0.5, every=2.5), "every: expected an integer.*2.5"),
    (lambda: oc.prune(0.5, every=0), "every: the period must be .*found 0"),
    (lambda: oc.prune(0.5, every=1, inner=0.1), "inner: expected a gradient trans.*found 0.1"),
    (lambda: oc.prune(0.5, every=1, where="kernel"), "where: expected a function.*'kernel'"),
    (lambda: oc.prune(0.5, every=1, stacked=True), "stacked: expected a function.*True"),
    (lambda: pruning.Times(2.5), "every: the period must be an integer.*2.5"),
    (lambda: pruning.Times(7, end=5), "every: expected a multiple of the period 7.*no micro-step"),
    (lambda: pruning.Times(7, begin=8, end=13), "every: expected a multiple of the period 7"),
    (lambda: pruning.once(0), "once: at must be an integer of at least 1, found 0"),
    (lambda: pruning.once("10"), "once: at must be an integer.*'10'"),
    (lambda: pruning.every_epoch(100, 0), "every_epoch: batch_size must be .*found 0"),
    (lambda: pruning.every_epoch(0, 10), "every_epoch: examples must be .*found 0"),
    (lambda: pruning.every_epoch(9, 10, drop_last=True), "every_epoch: .*found 9 examples"),
    (lambda: pruning.cubic("0.9", 0, 10), r"cubic: final: expected a number in \[0, 1\].*'0.9'"),
    (lambda: pruning.cubic(0.9, 0, 10, initial=-1), "cubic: initial: .*-1"),
    (lambda: pruning.cubic(0.9, 0, 10.5), "cubic: end must be an integer.*10.5"),
  ],
)
def test_nonsense_names_the_argument(make, match):
  with pytest.raises(ValueError, match=match):
    make()


@pytest.mark.parametrize(
  ("sparsity", "match"),
  [
    ({"a": "0.5", "c": 0.5}, "'a/kernel': expected a number.*'0.5'"),
    ({"a": True, "c": 0.5}, "'a/kernel': expected a number.*True"),
    ({"a": np.array([0.5, 0.5]), "c": 0.5}, r"'a/kernel': expected a number.*shape \(2,\)"),
    (float("nan"), "'a/kernel': expected a number.*nan"),
    (1j, "'a/kernel': expected a number.*1j"),
  ],
)
def test_a_sparsity_that_is_no_number_names_the_leaf(sparsity, match):
  with pytest.raises(ValueError, match=match):
    oc.prune(sparsity, every=1).init(tree())


@pytest.mark.parametrize("sparsity", [1, np.float32(0.5), np.array(0.5), jnp.bfloat16(0.5)])
def test_numbers_of_any_kind_are_sparsities(sparsity):
  oc.prune(sparsity, every=np.int64(1)).init(tree())


def reads(param, grad):
  return jnp.abs(param * grad)


@pytest.mark.parametrize("criterion", [reads, pruning.Criterion("mine", lambda p, g, k: p * g)])
def test_a_criterion_that_reads_the_gradient_needs_inner(criterion):
  name = getattr(criterion, "name", "reads")
  with pytest.raises(ValueError, match=f"criterion {name}: reads the gradient.*inner=None"):
    oc.prune(0.5, every=1, criterion=criterion).init(tree())
  oc.prune(0.5, every=1, criterion=criterion, inner=optax.sgd(0.1)).init(tree())


def test_a_criterion_may_do_without_gradients_and_one_that_fails_says_why():
  either = lambda param, grad: jnp.abs(param) if grad is None else jnp.abs(grad)
  oc.prune(0.5, every=1, criterion=either).init(tree())
  broken = lambda param, grad: param.no_such_thing
  with pytest.raises(AttributeError, match="no_such_thing"):
    oc.prune(0.5, every=1, criterion=broken).init(tree())
