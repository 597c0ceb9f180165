"""Policies against a slow oracle, in every transformation of JAX, and at the edges."""

import copy
import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from states import groups

import optax_cadence as oc
from optax_cadence import growth

PARAMS = {"a": jnp.ones((4, 6)), "b": jnp.ones(5)}


def gradients(steps, seed=0, mu=0.3, params=PARAMS):
  """A tree of gradients with a leading axis of micro-steps."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda p: jnp.asarray(mu + rng.normal(size=(steps, *p.shape)), jnp.float32), params
  )


def run(tx, grads, params=PARAMS):
  """Parameters and state after every micro-step, stacked."""

  def step(carry, g):
    carry = tx.apply(*carry, g)
    return carry, carry

  carry = params, tx.init(params)
  return jax.jit(lambda carry: jax.lax.scan(step, carry, grads)[1])(carry)


def assert_equal(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def slow_until_certain(grads, snr, low, high):
  """Micro-steps at which one region fires, from a Python list of its gradients."""
  window, fired = [], []
  for t, g in enumerate(np.asarray(grads, np.float64).reshape(len(grads), -1), 1):
    window.append(g)
    n = len(window)
    certain = False
    if n > 1:
      s1, s2 = sum((g**2).sum() for g in window), (sum(window) ** 2).sum()
      signal, noise = (s2 - s1) / (n * (n - 1)), (s1 - s2 / n) / (n - 1)
      certain = signal > 0 and n * signal >= snr * noise
    if n == high or (n >= low and certain):
      fired.append(t)
      window = []
  return fired


def fired(updates):
  return (np.flatnonzero(np.diff(np.asarray(updates), prepend=0)) + 1).tolist()


def test_until_certain_is_the_slow_decision():
  grads = gradients(200, mu=0.25)
  policies = {name: oc.until_certain(1.0, 3, 40) for name in PARAMS}
  _, state = run(oc.cadence(optax.sgd(1.0), policies), grads)
  for name, group in zip(PARAMS, groups(state), strict=True):
    expected = slow_until_certain(grads[name], 1.0, 3, 40)
    assert fired(group.updates) == expected
    assert len(set(np.diff(expected))) > 3


def test_parameters_follow_the_oracle_at_the_micro_steps_that_fire():
  inner, grads = oracle.relaxed(optax.adamw(0.1)), gradients(60, mu=0.6)
  policy = oc.until_certain(2.0, 2, 20)
  params, state = run(oc.cadence(inner, policy), grads)
  ends = fired(groups(state)[0].updates)
  mine, inner_state, start, update = PARAMS, inner.init(PARAMS), 0, jax.jit(inner.update)
  for end in ends:
    mean = jax.tree.map(lambda g, start=start, end=end: g[start:end].mean(0), grads)
    updates, inner_state = update(mean, inner_state, mine)
    mine, start = optax.apply_updates(mine, updates), end
    held = jax.tree.map(lambda p, end=end: p[end - 1], params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), held, mine)
  assert len(ends) > 3


class Fixed(oc.Policy):
  """A third policy: its answer is constant."""

  def __init__(self, period):
    super().__init__(1, 100)
    self.period = period

  def due(self, window, state):
    return window.length[0] >= self.period


@functools.cache
def run_with(cadence, nonfinite):
  """A run in which a cadence has whole leaves and parts of one, beside others."""
  every = {"a": oc.quadrants([[cadence, 1], [cadence, 2]]), "b": cadence}
  inner = oracle.relaxed(optax.adamw(0.1))
  return run(oc.cadence(inner, every, nonfinite=nonfinite), gradients(20))


@pytest.mark.parametrize("policy", [Fixed(4), oc.until_certain(1.0, 4, 4), oc.as_settled(4, 4)])
@pytest.mark.parametrize("nonfinite", ["propagate", pytest.param("skip", marks=pytest.mark.ci)])
def test_a_constant_policy_is_the_fixed_cadence_bit_for_bit(policy, nonfinite):
  found, expected = run_with(policy, nonfinite), run_with(4, nonfinite)
  assert_equal(found[0], expected[0])
  for mine, theirs in zip(groups(found[1]), groups(expected[1]), strict=True):
    assert_equal(mine.inner_state, theirs.inner_state)
    assert_equal(mine.updates, theirs.updates)


def test_one_object_is_one_group_and_a_copy_for_each_layer_is_one_each():
  params = {"x": {"w": jnp.ones(2), "b": jnp.ones(1)}, "y": {"w": jnp.ones(2)}}
  policy = oc.until_certain(1.0, 2, 8)
  count = lambda every: len(groups(oc.cadence(optax.sgd(1.0), every).init(params)))
  assert count(policy) == 1
  assert count({"x": policy, "y": oc.until_certain(1.0, 2, 8)}) == 2
  assert count(oc.each_layer(policy)) == 2
  assert count(lambda params: jax.tree.map(lambda _: oc.until_certain(1.0, 2, 8), params)) == 3


def test_vmap_over_snr_is_every_one_alone():
  grads, ratios = gradients(40), [0.1, 0.7, 8.0]

  def final(snr):
    every = {"a": oc.until_certain(snr, 2, 16), "b": oc.as_settled(2, 16)}
    return run(oc.cadence(optax.sgd(0.1 * snr), every), grads)

  swept, alone = jax.jit(jax.vmap(final))(jnp.array(ratios)), jax.jit(final)
  counts = []
  for i, snr in enumerate(ratios):
    params, state = alone(snr)
    counts.append(int(groups(state)[0].updates[-1]))
    for mine, theirs in zip(groups(swept[1]), groups(state), strict=True):
      np.testing.assert_array_equal(mine.updates[i], theirs.updates)
    jax.tree.map(
      lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-6), swept[0], params
    )
  assert counts[0] > counts[1] > counts[2]


def test_a_checkpoint_in_mid_window_resumes_bit_for_bit(tmp_path):
  checkpoint = pytest.importorskip("orbax.checkpoint")
  every = {"a": oc.channels([oc.until_certain(4.0, 2, 16), 4]), "b": oc.as_settled(2, 16)}
  tx, grads = oc.cadence(oracle.relaxed(optax.adam(0.1)), every), gradients(30)
  step = jax.jit(tx.apply)
  carry = PARAMS, tx.init(PARAMS)
  at = lambda t: jax.tree.map(lambda g: g[t], grads)
  for t in range(30):
    if t == 14:
      assert all(group.window > 0 for group in groups(carry[1]))
      with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "saved", carry)
        saver.wait_until_finished()
        other = saver.restore(tmp_path / "saved", jax.tree.map(jnp.zeros_like, carry))
    carry = step(*carry, at(t))
    if t >= 14:
      other = step(*other, at(t))
  assert_equal(carry, other)


def test_as_settled_follows_growth_without_taking_it_for_an_update():
  params = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 8))}
  tx, step = oc.cadence(optax.sgd(0.01), oc.as_settled(2, 8)), {}
  carry = params, tx.init(params)
  plan = growth.widening(params, growth.dimension(params, {"a": -1, "b": 0}), by=64)
  for t in range(16):
    if t == 8:
      old, state = carry
      grown = plan.apply(old, lambda path, shape, dtype: jnp.full(shape, 9.0, dtype))
      carry = grown, growth.grow_state(tx, state, old, grown, plan)
      assert_equal(groups(carry[1])[0].confidence.policy, groups(state)[0].confidence.policy)
    apply = step.setdefault(t < 8, jax.jit(tx.apply))
    carry = apply(*carry, jax.tree.map(jnp.ones_like, carry[0]))
  # Updates are a hundredth of what stood at 1, and less of what stands at 9.
  policy = groups(carry[1])[0].confidence.policy
  assert 0.01 < policy.peak < 0.011 and 0.001 < policy.size / policy.weight < policy.peak


class Remembers(oc.Policy):
  """Alternates between two lengths."""

  def init(self):
    return {"long": jnp.array(False)}

  def due(self, window, state):
    return window.length[0] >= jnp.where(state["long"], 5, 2)

  def fired(self, window, state):
    return {"long": ~state["long"]}


def test_a_policy_of_ones_own_remembers():
  _, state = run(oc.cadence(optax.sgd(1.0), Remembers(1, 10)), gradients(14))
  assert fired(groups(state)[0].updates) == [2, 7, 9, 14]
  assert groups(state)[0].period[-1] == 5


def test_as_settled_slows_down_as_the_gradient_fades():
  fade = 0.9 ** jnp.arange(400.0)
  grads = {"a": jnp.broadcast_to(fade[:, None, None], (400, 4, 6)), "b": gradients(400)["b"] + 3}
  every = {"a": oc.as_settled(2, 32), "b": oc.as_settled(2, 32)}
  _, state = run(oc.cadence(optax.sgd(0.1), every), grads, PARAMS | {"b": jnp.full(5, 1000.0)})
  gaps = [np.diff(fired(group.updates)) for group in groups(state)]
  assert gaps[0][0] == 2 and gaps[0][-1] > 20 and (np.diff(gaps[0]) >= 0).all()
  assert gaps[1].max() <= 4


# ------------------------------------------------------------------------------ degenerate


@pytest.mark.parametrize(
  ("value", "expected"),
  [(0.0, [16, 32]), (1.0, list(range(3, 33, 3))), (jnp.nan, [16, 32])],
  ids=["zero", "constant", "nan"],
)
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_degenerate_gradients_have_the_documented_answer(value, expected, nonfinite):
  grads = jax.tree.map(lambda p: jnp.full((32, *p.shape), value), PARAMS)
  tx = oc.cadence(optax.sgd(0.1), oc.until_certain(1.0, 3, 16), nonfinite=nonfinite)
  _, state = run(tx, grads)
  if nonfinite == "skip" and np.isnan(value):
    expected = []
  assert fired(groups(state)[0].updates) == expected
  confidence = jax.tree.map(lambda x: x[-1], groups(state)[0].confidence)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(confidence.estimate))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(confidence.policy))


@pytest.mark.parametrize("value", [0.0, jnp.nan])
def test_as_settled_keeps_its_first_period_while_nothing_can_be_told(value):
  grads = jax.tree.map(lambda p: jnp.full((8, *p.shape), value), PARAMS)
  _, state = run(oc.cadence(optax.sgd(0.1), oc.as_settled(2, 16)), grads)
  assert fired(groups(state)[0].updates) == [2, 4, 6, 8]
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(groups(state)[0].confidence.policy))


def test_updates_are_told_from_a_sample_of_large_regions():
  params = {"a": jnp.full((300, 200), 2.0), "b": jnp.full((7,), 2.0, jnp.bfloat16)}
  tx = oc.cadence(optax.sgd(1.0), oc.as_settled(1, 1))
  grads = jax.tree.map(lambda p: jnp.full((2, *p.shape), 0.5, p.dtype), params)
  _, state = run(tx, grads, params)
  confidence = jax.tree.map(lambda x: x[-1], groups(state)[0].confidence)
  assert 2048 <= confidence.sample[0].size <= 4096 and confidence.sample[1].size == 7
  # What stood at 2 moved by 0.5; only the second window knows what the first has moved.
  np.testing.assert_allclose(confidence.policy.size / confidence.policy.weight, 0.25, rtol=1e-6)


def test_a_nan_is_forgotten_with_its_window():
  grads = gradients(40)
  grads["b"] = grads["b"].at[2].set(jnp.nan)
  for policy in (oc.until_certain(0.5, 2, 8), oc.as_settled(8, 16)):
    tx = oc.cadence(optax.chain(optax.zero_nans(), optax.sgd(0.1)), {"a": 1, "b": policy})
    _, state = run(tx, grads)
    group = groups(state)[1]
    assert fired(group.updates)[0] == 8
    assert all(np.isfinite(x[-1]).all() for x in jax.tree.leaves(group.confidence))
    learned = group.confidence.policy or group.confidence.estimate
    assert (np.asarray(learned.weight[-1]) > 0).all()


@pytest.mark.parametrize("policy", [oc.until_certain(1.0, 1, 1), Fixed(1)])
def test_a_single_microbatch_tells_no_noise(policy):
  tx = oc.cadence(optax.sgd(1.0), policy)
  _, state = run(tx, gradients(5))
  confidence = jax.tree.map(lambda x: x[-1], groups(state)[0].confidence)
  assert fired(groups(state)[0].updates) == [1, 2, 3, 4, 5]
  assert not any(x.any() for x in confidence.estimate)
  found = oc.metrics(jax.tree.map(lambda x: x[-1], state))
  assert np.isnan(found["a/noise_scale"]) and np.isnan(found["a/snr"])


def test_skipped_microbatches_do_not_count_but_their_micro_steps_do():
  grads = gradients(12)
  grads["a"] = grads["a"].at[1::2].set(jnp.inf)
  tx = oc.cadence(optax.sgd(0.1), oc.until_certain(1e9, 2, 6), nonfinite="skip")
  params, state = run(tx, grads)
  group = groups(state)[0]
  assert fired(group.updates) == [6, 12]
  np.testing.assert_array_equal(group.window[4], [3, 5])
  np.testing.assert_allclose(
    group.confidence.squares[4, 0], (grads["a"][0:5:2] ** 2).sum(), rtol=1e-5
  )
  assert np.isfinite(params["a"]).all()


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: oc.until_certain(0.0, 2, 8), "snr must be a number above 0, found 0.0"),
    (lambda: oc.until_certain("x", 2, 8), "snr must be a number above 0, found 'x'"),
    (lambda: oc.until_certain(1.0, 9, 8), "min_period must be at most max_period, found 9 above 8"),
    (lambda: oc.until_certain(1.0, 0, 8), "min_period must be an integer of at least 1, found 0"),
    (lambda: oc.until_certain(1.0, 2, 8.5), "max_period must be an integer .* found 8.5"),
    (lambda: oc.as_settled(2, 8, decay=1.0), "decay must be at least 0 and below 1, found 1.0"),
    (lambda: oc.each_layer(8), "each_layer expects a policy, found 8"),
    (lambda: oc.scale_by_cadence("cubic"), "rule must be 'sqrt' or 'linear', found 'cubic'"),
    (lambda: oc.scale_by_cadence(base=0), "base must be a number above 0, found 0"),
    (lambda: oc.late(-1, 4), "begin must be an integer of at least 0, found -1"),
    (lambda: oc.ramp(5, 5, 4), "end must be an integer of at least 6, found 5"),
    (lambda: oc.late(4, lambda p: Fixed(2))(PARAMS), "expect integer periods, found Fixed"),
    (lambda: oc.noise_scale(decay=-1), "decay must be at least 0 and below 1, found -1"),
    (
      lambda: oc.noise_scale({"a": 2, "b": 1}).init(PARAMS),
      "cadence of 'b': noise_scale expects windows of at least 2 gradients, found 1",
    ),
    (
      lambda: oc.noise_scale({"a": Fixed(2), "b": 2}).init(PARAMS),
      "cadence of 'a': noise_scale expects windows of known length, found Fixed",
    ),
    (lambda: oc.metrics(optax.EmptyState()), "expected a cadence in the state, found EmptyState"),
    (lambda: oc.plot_confidence([]), "expected metrics of at least one micro-step, found none"),
  ],
)
def test_bad_input_says_what_was_found_and_what_was_expected(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_a_policy_that_reads_updates_needs_the_parameters():
  tx = oc.cadence(optax.sgd(1.0), {"a": oc.as_settled(1, 8), "b": 2})
  with pytest.raises(ValueError, match=r"as_settled\(1-8\): .* needs params, found None"):
    tx.update(PARAMS, tx.init(PARAMS))


def test_a_policy_needs_the_sum_of_its_window():
  with pytest.raises(ValueError, match=r'until_certain\(1.0, 2-8\): .* found "latest"'):
    oc.cadence(optax.sgd(1.0), {"a": 2, "b": oc.until_certain(1.0, 2, 8)}, accumulate="latest")


def test_a_policy_has_no_phase_and_no_score():
  tx = oc.cadence(optax.sgd(1.0), oc.until_certain(1.0, 2, 8))
  assert tx.cycle is None
  with pytest.raises(ValueError, match="a policy's"):
    tx.update(PARAMS, tx.init(PARAMS), phase=0)
  with pytest.raises(ValueError, match="decides while training"):
    oc.plot_score(tx, PARAMS, 4)


def test_a_state_without_the_statistics_is_refused():
  fixed, tx = oc.cadence(optax.sgd(1.0), 4), oc.cadence(optax.sgd(1.0), Fixed(4))
  with pytest.raises(ValueError, match="state: expected 1 groups"):
    tx.update(PARAMS, fixed.init(PARAMS))


# ---------------------------------------------------------------------------------- flush


def test_flush_applies_what_is_there_and_opens_a_new_window():
  tx, grads = oc.cadence(optax.sgd(1.0), oc.until_certain(1e9, 2, 8)), gradients(3)
  params, state = jax.tree.map(lambda x: x[-1], run(tx, grads))
  updates, state = jax.jit(tx.flush)(state, params)
  jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -g.mean(0), rtol=1e-5), updates, grads)
  assert groups(state)[0].window == 0 and groups(state)[0].updates == 1
  _, state = jax.jit(tx.update)(jax.tree.map(lambda g: g[0], grads), state, params)
  np.testing.assert_allclose(groups(state)[0].confidence.squares[1], (grads["b"][0] ** 2).sum())


@dataclasses.dataclass
class Program:
  """What is copied and branched in a compiled micro-step."""

  text: str

  def copies(self, size):
    return [x for x in self.text.splitlines() if " copy(" in x and f"f32[{size}" in x]


@pytest.mark.usefixtures("optimized_programs")
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("policy", [oc.until_certain(1.0, 2, 8), oc.as_settled(2, 8)], ids=str)
def test_measuring_copies_no_parameter_moment_or_accumulator(policy, measured):
  params = {"w": jnp.ones((96, 96)), "v": jnp.ones((96, 96))}
  tx = oc.cadence(oracle.relaxed(optax.adamw(0.1)), policy)
  tx = oc.chain(oc.noise_scale(4), tx) if measured else tx
  step = jax.jit(tx.apply, donate_argnums=(0, 1))
  compiled = step.lower(params, tx.init(params), params).compile()
  assert Program(compiled.as_text()).copies(96) == []


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_policies_lower_for_accelerators(platform):
  every = {"a": oc.channels([oc.until_certain(1.0, 2, 8), 2]), "b": oc.as_settled(2, 8)}
  tx = oc.chain(
    oc.noise_scale(4), oc.cadence(oracle.relaxed(optax.adam(0.1)), every, nonfinite="skip")
  )
  exported = jax.export.export(jax.jit(tx.apply), platforms=[platform])
  assert exported(PARAMS, tx.init(PARAMS), PARAMS).platforms == (platform,)


def test_branches_grow_with_groups_and_not_with_leaves():
  def branches(every, leaves):
    params = {f"{i}": jnp.ones(3) for i in range(leaves)}
    tx = oc.cadence(optax.sgd(0.1), every)
    return str(jax.make_jaxpr(tx.apply)(params, tx.init(params), params)).count("while[")

  for policy in (oc.until_certain(1.0, 2, 8), oc.as_settled(2, 8)):
    one = branches(policy, 2)
    assert one == branches(policy, 12) > 0
    apart = lambda params, policy=policy: {name: copy.copy(policy) for name in params}
    assert branches(apart, 3) == 3 * one


def test_one_trace_serves_every_micro_step():
  tx, traces = oc.cadence(optax.sgd(1.0), oc.each_layer(oc.until_certain(1.0, 2, 8))), []

  @jax.jit
  def step(params, state, grads):
    traces.append(1)
    return tx.apply(params, state, grads)

  carry = PARAMS, tx.init(PARAMS)
  for _ in range(5):
    carry = step(*carry, PARAMS)
  assert len(traces) == 1
