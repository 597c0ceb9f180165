"""Micro-batches that count by a weight: tokens, or what an expert saw."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from test_cadence import assert_close
from test_cadence import DTYPES
from test_cadence import EXAMPLES
from test_cadence import in_use
from test_cadence import INNERS
from test_cadence import leaves
from test_cadence import nest
from test_cadence import random_like

import optax_cadence as oc

WEIGHTS = (0, 0.5, 1, 3, 9)


def follow_the_oracle(tree, inner, accumulate, nonfinite, seed):
  """A cycle and a half of `update`, `apply` and static `phase`, then a flush."""
  rng = np.random.default_rng(seed)
  options = {"accumulate": accumulate, "nonfinite": nonfinite, "weighted": True}
  tx = oc.cadence(inner, nest([leaf.cadence for leaf in tree]), **options)
  params = nest([random_like(rng, leaf) for leaf in tree])
  pieces = [leaf.pieces for leaf in tree]
  skip = nonfinite == "skip"
  slow = oracle.Oracle(inner, jax.tree.leaves(params), pieces, accumulate, skip=skip)
  state = tx.init(params)
  update, apply = jax.jit(tx.update), jax.jit(tx.apply)
  static = jax.jit(tx.update, static_argnames="phase")
  for t in range(1, tx.cycle + tx.cycle // 2 + 2):
    weights = [float(rng.choice(WEIGHTS)) for _ in tree]
    grads = [random_like(rng, leaf) for leaf in tree]
    for i, weight in enumerate(weights):
      # Of no weight, or left out, anything may be in it.
      if grads[i].size and (weight == 0 or (skip and rng.random() < 0.2)):
        grads[i] = grads[i].at[(0,) * grads[i].ndim].set(jnp.nan)
    grads, weight = nest(grads), nest(list(map(jnp.float32, weights)))
    expected = slow.step(jax.tree.leaves(grads), jax.tree.leaves(params), weights)
    updates, new = update(grads, state, params, weight=weight)
    applied = apply(params, state, grads, weight=weight)
    if t in (1, tx.cycle):
      phased = static(grads, state, params, weight=weight, phase=t % tx.cycle)
      jax.tree.map(assert_close, (phased[0], in_use(phased[1])), (updates, in_use(new)))
    state, params = new, optax.apply_updates(params, updates)
    for found, want in zip(jax.tree.leaves(updates), expected, strict=True):
      assert_close(found, want)
    jax.tree.map(assert_close, (applied[0], in_use(applied[1])), (params, in_use(state)))
  flushed, _ = jax.jit(tx.flush)(state, params)
  for found, want in zip(
    jax.tree.leaves(flushed), slow.flush(jax.tree.leaves(params)), strict=True
  ):
    assert_close(found, want)


@pytest.mark.ci
@pytest.mark.parametrize("examples", EXAMPLES)
def test_every_way_follows_the_oracle(examples):
  @settings(max_examples=examples)
  @given(
    st.lists(leaves(DTYPES), min_size=1, max_size=3),
    st.sampled_from(sorted(INNERS)),
    st.sampled_from(["mean", "sum", "latest"]),
    st.sampled_from(["propagate", "skip"]),
    st.integers(0, 99),
  )
  def check(tree, inner, accumulate, nonfinite, seed):
    follow_the_oracle(tree, oracle.relaxed(INNERS[inner]()), accumulate, nonfinite, seed)

  check()


PARAMS = {"a": jnp.ones(3), "b": jnp.ones((4, 4))}


def descent(every=2, **options):
  return oc.cadence(optax.sgd(1.0), every, weighted=True, **options)


def test_the_mean_of_two_micro_batches_is_that_of_their_tokens():
  """One of 1 token and one of 9: each gradient is the mean of its own tokens."""
  tokens = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
  tx = descent()
  state = tx.init(PARAMS["a"])
  for batch in (tokens[:1], tokens[1:]):
    updates, state = tx.update(jnp.asarray(batch.mean(0)), state, weight=len(batch))
  np.testing.assert_allclose(updates, -tokens.mean(0), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_running_mean_is_weighted(dtype):
  tx = descent(4, accumulator_dtype=dtype)
  params = jnp.zeros(2)
  state = tx.init(params)
  for weight, x in ((3.0, 2.0), (0.0, np.nan), (1.0, 6.0), (4.0, 5.0)):
    updates, state = tx.update(jnp.full(2, x), state, params, weight=weight)
  np.testing.assert_array_equal(updates, jnp.full(2, -4.0))


def test_a_window_without_weight_does_not_fire():
  tx = oc.cadence(oracle.relaxed(optax.adam(0.1)), {"a": 2, "b": 1}, weighted=True)
  state = tx.init(PARAMS)
  for _ in range(2):
    updates, state = tx.update(PARAMS, state, PARAMS, weight={"a": 0, "b": 1})
  assert not updates["a"].any() and updates["b"].any()
  assert {name: int(g.updates) for name, g in state.groups.items()} == {"2": 0, "1": 2}
  assert {name: bool(x) for name, x in oc.has_updated(state).items()} == {"2": False, "1": True}
  assert int(state.groups["2"].inner_state[0].count) == 0


def test_a_micro_batch_of_no_weight_is_not_counted_as_left_out():
  tx = descent(2, nonfinite="skip")
  bad = jax.tree.map(lambda p: p * jnp.nan, PARAMS)
  _, state = tx.update(bad, tx.init(PARAMS), PARAMS, weight={"a": 0, "b": 2})
  assert state.groups["2"].skipped.tolist() == [0, 1]


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_a_weight_that_is_not_a_number_counts_as_such_a_gradient_does(nonfinite):
  tx = descent(2, nonfinite=nonfinite)
  loss = lambda params: jnp.vdot(params["a"], params["a"]) + jnp.vdot(params["b"], params["b"])
  step, apply = jax.jit(oc.training_step(loss, tx)), jax.jit(tx.apply)
  fast = slow = PARAMS, tx.init(PARAMS)
  for weight in (jnp.nan, 2.0, 1.0, 3.0):
    *fast, _ = step(*fast, weight=weight)
    slow = apply(*slow, jax.grad(loss)(slow[0]), weight=weight)
  jax.tree.map(np.testing.assert_array_equal, tuple(fast), slow)
  params, state = slow
  assert np.isnan(params["a"]).all() == (nonfinite == "propagate")
  if nonfinite == "skip":
    assert state.groups["2"].skipped.tolist() == [1, 1]


def test_weights_follow_a_chain_a_partition_and_a_wrapper():
  def chained(tx):
    return oc.chain(oc.noise_scale(2, weighted=True), optax.clip(10.0), tx)

  def partitioned(tx):
    return optax.partition({"x": tx, "y": optax.sgd(1.0)}, {"a": "x", "b": "y"})

  for wrap in (chained, partitioned, lambda tx: optax.masked(tx, {"a": True, "b": False})):
    tx = wrap(descent())
    state = tx.init(PARAMS)
    for x, weight in ((1.0, 1), (2.0, 3)):
      grads = jax.tree.map(lambda p, x=x: x * p, PARAMS)
      updates, state = tx.update(grads, state, PARAMS, weight=weight)
    np.testing.assert_allclose(updates["a"], -1.75)


def test_one_program_for_all_weights():
  tx, traces = descent(), []

  @jax.jit
  def step(params, state, weight):
    traces.append(weight)
    return tx.apply(params, state, PARAMS, weight=weight)

  run = PARAMS, tx.init(PARAMS)
  for weight in (1.0, 2.5, 0.0):
    run = step(*run, weight)
  assert len(traces) == 1


def test_training_step_takes_a_weight():
  tx = descent()

  def loss(params, x):
    return (params["a"] * x).sum() + (params["b"] ** 2).sum()

  step, apply = jax.jit(oc.training_step(loss, tx)), jax.jit(tx.apply)
  fast = slow = PARAMS, tx.init(PARAMS)
  for x, weight in ((1.0, 1.0), (np.nan, 0.0), (2.0, 3.0), (5.0, 2.0)):
    x = jnp.full(3, x)
    *fast, _ = step(*fast, x, weight=weight)
    slow = apply(*slow, jax.grad(loss)(slow[0], x), weight=weight)
  jax.tree.map(np.testing.assert_array_equal, tuple(fast), slow)


STACK = {"in": jnp.ones((3, 5)) / 4, "layers": jnp.ones((4, 5, 5)) / 4, "out": jnp.ones(5)}
EVERY = {
  "one period": 2,
  "an unused layer of period 1": {"in": 1, "layers": 2, "out": 4},
  "layers with a period each": {"in": 2, "layers": oc.stacked([4, 2, 2, 1]), "out": 2},
}


def scanned(params, x, tokens=1.0):
  """A mean over tokens: not a number where there are none."""
  h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ params["in"], params["layers"])
  return (h @ params["out"] / tokens).sum() ** 2


@pytest.mark.parametrize("by_leaf", [pytest.param(False, marks=pytest.mark.ci), True])
@pytest.mark.parametrize("every", EVERY.values(), ids=EVERY)
def test_the_backward_pass_adds_a_multiple(every, by_leaf):
  tx, rng = oc.cadence(optax.sgd(0.1), every, weighted=True), np.random.default_rng(0)
  step, apply = jax.jit(oc.training_step(scanned, tx)), jax.jit(tx.apply)
  grad = jax.jit(jax.value_and_grad(scanned))
  fast = slow = STACK, tx.init(STACK)
  for weight in (0.0, 2.0, 3.0, 0.0, 5.0, 1.0, 0.0, 0.0, 4.0):
    x = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    tokens = jnp.float32(weight)
    weights = {name: 2 * weight if name == "in" else weight for name in STACK}
    given = weights if by_leaf else weight
    *fast, value = step(*fast, x, tokens, weight=given)
    expected, grads = grad(slow[0], x, tokens)
    slow = apply(*slow, grads, weight=given)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name in STACK:
      np.testing.assert_allclose(fast[0][name], slow[0][name], rtol=1e-5, atol=1e-6)
  for name, group in slow[1].groups.items():
    np.testing.assert_array_equal(fast[1].groups[name].window, group.window)
    np.testing.assert_array_equal(fast[1].groups[name].updates, group.updates)


def test_a_weight_saves_the_gradient_too():
  """Of the layers that are scanned there is none in the program of a held micro-step."""
  layers = {"layers": jnp.ones((16, 48, 48))}

  def loss(params, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])[0].sum()

  tx = oc.cadence(optax.sgd(0.1), 4, weighted=True)
  args = layers, tx.init(layers)

  def held(step):
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*args, jnp.ones((4, 48)), 2.0).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  step = oc.training_step(loss, tx)
  fused = held(lambda p, s, x, w: step(p, s, x, weight=w, phase=1))
  apart = held(lambda p, s, x, w: tx.apply(p, s, jax.grad(loss)(p, x), weight=w, phase=1))
  if jax.__version_info__ >= (0, 10):
    assert fused < apart - 0.9 * layers["layers"].nbytes


def draws(key, sizes, mean, covariance):
  """Gradients of micro-batches of these sizes, each the mean of so many samples."""
  noise = jax.random.normal(key, (len(sizes), mean.size)) * jnp.sqrt(covariance)[None]
  return mean[None] + noise / jnp.sqrt(jnp.asarray(sizes, jnp.float32))[:, None]


SIZES = (1, 9, 4, 0, 2)


@pytest.mark.parametrize("measure", ["noise_scale", "policy"])
def test_estimates_are_those_of_one_sample_and_unbiased(measure):
  """4000 windows of micro-batches of different sizes: |G|² and tr Σ in the mean."""
  mean, covariance = jnp.array([0.5, -1.0, 0.25]), jnp.array([1.0, 2.0, 0.5])

  def window(key):
    if measure == "policy":
      tx = oc.cadence(optax.sgd(1.0), oc.until_certain(1e9, 5, 5), weighted=True)
    else:
      tx = oc.noise_scale(5, decay=0.0, weighted=True)
    state = tx.init(mean)

    def step(state, batch):
      grad, weight = batch
      grad = jnp.where(weight > 0, grad, jnp.nan)
      return tx.update(grad, state, mean, weight=weight)[1], None

    batches = draws(key, SIZES, mean, covariance), jnp.asarray(SIZES, jnp.float32)
    state, _ = jax.lax.scan(step, state, batches)
    (group,) = state.groups.values()
    estimate = group.estimate if measure == "noise_scale" else group.confidence.estimate
    return estimate.signals(), estimate.noises()

  signals, noises = jax.jit(jax.vmap(window))(jax.random.split(jax.random.key(0), 4000))
  for found, want in ((signals, (mean**2).sum()), (noises, covariance.sum())):
    error = float(found.std() / np.sqrt(len(found)))
    assert abs(float(found.mean() - want)) < 4 * error
    assert error < 0.05 * want


def test_metrics_are_in_weights():
  tx = oc.cadence(optax.sgd(1.0), oc.until_certain(1e9, 2, 2), weighted=True)
  state = tx.init(PARAMS["a"])
  for x, weight in ((1.0, 2), (2.0, 6)):
    _, state = tx.update(jnp.array([x, 0.0, 1.0]), state, PARAMS["a"], weight=weight)
  found = oc.metrics(state)
  names = {name.split("/")[-1] for name in found}
  assert "weight" in names
  (weight,) = (x for name, x in found.items() if name.endswith("weight"))
  (snr,) = (x for name, x in found.items() if name.endswith("snr"))
  (scale,) = (x for name, x in found.items() if name.endswith("noise_scale"))
  assert float(weight) == 8.0
  np.testing.assert_allclose(snr, 8.0 / scale)


UPDATE = ("update", lambda params, state: (params, state, params))
APPLY = ("apply", lambda params, state: (params, state, params))


@pytest.mark.parametrize(("call", "order"), [UPDATE, APPLY])
@pytest.mark.parametrize(
  ("weight", "message"),
  [
    (None, r"weighted=True: expected weight="),
    ("much", "weight: expected a scalar, a real number, found 'much'"),
    (True, "weight: expected a scalar, a real number, found True"),
    (-1.0, "weight: expected a finite number of at least 0, found -1"),
    (np.inf, "weight: expected a finite number of at least 0, found inf"),
    (jnp.ones(2), r"weight: expected a scalar, a real number, found an array of shape \(2,\)"),
    ({"a": 1.0}, "found none for 'b' among 'a'"),
    ({"a": 1.0, "b": 1.0, "c": 2.0}, "weight of 'c': no parameter is there"),
    ({"a": {"x": 1.0}, "b": 1.0}, "found none for 'a'"),
  ],
)
def test_errors(call, order, weight, message):
  tx = descent()
  with pytest.raises(ValueError, match=message):
    getattr(tx, call)(*order(PARAMS, tx.init(PARAMS)), weight=weight)


@pytest.mark.parametrize(("call", "order"), [UPDATE, APPLY])
def test_a_weight_is_never_swallowed(call, order):
  tx = oc.chain(optax.clip(1.0), oc.cadence(optax.sgd(1.0), 2))
  run = functools.partial(getattr(tx, call), *order(PARAMS, tx.init(PARAMS)))
  with pytest.raises(ValueError, match="expected none without .*weighted=True"):
    run(weight=2.0)


def test_a_state_without_weights_is_refused():
  state = oc.cadence(optax.sgd(1.0), 2).init(PARAMS)
  with pytest.raises(ValueError, match="expected weight, found none.*weighted"):
    descent().update(PARAMS, state, PARAMS, weight=1.0)
