"""`oc.convert`: training goes on in mid-window, under another cadence or out of `MultiSteps`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import small_tree
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

import optax_cadence as oc

PARAMS, BATCHES = small_tree.PARAMS, small_tree.BATCHES


def adam():
  return oracle.relaxed(optax.adamw(0.1))


RANDOM = np.where(np.random.default_rng(0).random((4, 6)) < 0.5, 4, 8)


def everywhere(cadence, kernel=None):
  """One cadence for the small tree, but for the kernel."""
  return {
    "body": {"bias": cadence, "kernel": cadence if kernel is None else kernel},
    "head": cadence,
  }


@functools.cache
def programs(tx):
  return jax.jit(tx.update)


def run(tx, params, state, start, stop):
  """Parameters and state after the batches from `start` to `stop`."""
  for grads in BATCHES[start:stop]:
    # `MultiSteps` itself relies on JAX's ordinary promotion rules.
    with jax.numpy_dtype_promotion("standard"):
      updates, state = programs(tx)(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def assert_same(found, expected):
  """Equal to the bit, in structure too."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


MULTI = optax.MultiSteps(adam(), 4)
FOUR = oc.cadence(adam(), everywhere(4))
GRADED = oc.cadence(adam(), everywhere(4, 2))
LATER = oc.cadence(adam(), everywhere(oc.Every(4, offset=3)))
CUT = oc.cadence(adam(), everywhere(4, oc.quadrants([[4, 8], [8, 4]])))
BANDS = oc.cadence(adam(), everywhere(4, oc.channels([4, 8, 4], axis=1)))
MASKED = oc.cadence(adam(), everywhere(4, RANDOM))
SCHEDULED = oc.cadence(adam(), everywhere(oc.Every(lambda _: 4)))
FIXED_POLICY = oc.cadence(adam(), everywhere(oc.until_certain(1.0, 4, 4)))
SKIPS = oc.cadence(adam(), everywhere(4), nonfinite="skip")
WEIGHTED = oc.cadence(adam(), everywhere(4), weighted=True)


@pytest.mark.parametrize(
  ("old", "new", "t"),
  [
    (FOUR, SCHEDULED, 6),
    (SCHEDULED, FOUR, 6),
    (FOUR, FIXED_POLICY, 6),
    (FIXED_POLICY, FOUR, 7),
    (FOUR, SKIPS, 5),
    (SKIPS, FOUR, 5),
    (FOUR, CUT, 3),
    (FOUR, MASKED, 2),
    (MASKED, CUT, 3),
    (FOUR, LATER, 2),
    (FOUR, GRADED, 1),
    (MULTI, GRADED, 1),
    (MULTI, FOUR, 6),
    (FOUR, MULTI, 6),
  ],
)
def test_goes_on_as_if_it_had_begun_so(old, new, t):
  params, state = run(old, PARAMS, old.init(PARAMS), 0, t)
  state = oc.convert(state, old, params, to=new)
  expected = run(new, PARAMS, new.init(PARAMS), 0, t)
  assert jax.tree.structure(state) == jax.tree.structure(expected[1])
  kinds = [[jax.typeof(x) for x in jax.tree.leaves(tree)] for tree in (state, expected[1])]
  assert kinds[0] == kinds[1]
  params, state = run(new, params, state, t, len(BATCHES))
  expected = run(new, *expected, t, len(BATCHES))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), params, expected[0]
  )
  if not isinstance(new, optax.MultiSteps):
    assert int(state.micro_step) == len(BATCHES)
    for name, group in expected[1].groups.items():
      found = state.groups[name]
      assert [found.remaining, found.period, found.updates, found.fired] == [
        group.remaining,
        group.period,
        group.updates,
        group.fired,
      ]


@pytest.mark.parametrize("t", [3, 4, 6])
@pytest.mark.parametrize("other", [CUT, BANDS, MASKED, LATER, SCHEDULED, SKIPS, GRADED])
def test_there_and_back_is_the_same_to_the_bit(other, t):
  params, state = run(FOUR, PARAMS, FOUR.init(PARAMS), 0, t)
  there = oc.convert(state, FOUR, params, to=other)
  assert jax.tree.structure(there) == jax.tree.structure(other.init(params))
  assert_same(oc.convert(there, other, params, to=FOUR), state)


@pytest.mark.parametrize("t", [2, 4])  # halves are exact
def test_multi_steps_and_back_is_the_same_to_the_bit(t):
  params, state = run(MULTI, PARAMS, MULTI.init(PARAMS), 0, t)
  there = oc.convert(state, MULTI, params, to=CUT)
  back = oc.convert(there, CUT, params, to=MULTI.gradient_transformation())
  assert_same(back, state)


def test_from_cut_to_cut_every_entry_keeps_its_own():
  params, state = run(CUT, PARAMS, CUT.init(PARAMS), 0, 9)
  there = oc.convert(state, CUT, params, to=MASKED, counters="most")
  back = oc.convert(there, MASKED, params, to=CUT, counters="most")
  for name, group in state.groups.items():
    assert_same(back.groups[name].inner_state[0].mu, group.inner_state[0].mu)
    assert_same(back.groups[name].accumulators, group.accumulators)
    assert np.isfinite(jax.tree.leaves(group.accumulators)[0]).all()


KERNELS = (
  4,
  oc.Every(4, offset=3),
  oc.Every(lambda _: 4),
  oc.until_certain(1.0, 2, 6),
  oc.quadrants([[2, 4], [4, 8]]),
  oc.channels([2, 4, 8]),
  oc.channels([2, 4, 2, 4, 2, 4]),
  oc.stacked([4, 4, 2, 8]),
  RANDOM,
  np.where(RANDOM == 4, 2, 4),
)


@pytest.mark.ci
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
  old=st.sampled_from(KERNELS),
  new=st.sampled_from(KERNELS),
  n=st.integers(0, 3),
  seed=st.integers(0, 99),
)
def test_every_entry_keeps_its_own(old, new, n, seed):
  """In a state of random numbers, with as many micro-steps in each window."""
  first, second = (oc.cadence(adam(), everywhere(4, kernel)) for kernel in (old, new))
  rng = np.random.default_rng(seed)
  state = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype) if x.ndim else x, first.init(PARAMS)
  )
  groups = {name: g._replace(window=jnp.int32(n)) for name, g in state.groups.items()}
  state = state._replace(groups=groups)
  there = oc.convert(state, first, PARAMS, to=second)
  back = oc.convert(there, second, PARAMS, to=first)
  kept = [
    [(g.inner_state, g.accumulators, g.window) for g in s.groups.values()] + [s.masks]
    for s in (back, state._replace(groups=dict(sorted(groups.items()))))
  ]
  assert_same(*kept)
  total = [sum(float(jnp.abs(x).sum()) for x in moments(s)) for s in (state, there)]
  np.testing.assert_allclose(total[1], total[0], rtol=1e-5)


def moments(state):
  """All arrays of a state that have entries of parameters."""
  parts = [(g.inner_state, g.accumulators) for g in state.groups.values()]
  return [x for x in jax.tree.leaves((parts, state.masks)) if x.ndim]


def test_counters_that_differ_are_an_error_or_a_choice():
  params, state = run(GRADED, PARAMS, GRADED.init(PARAMS), 0, 8)
  with pytest.raises(ValueError, match="'4'.*'2'.*applied 2 and 4 updates.*counters='most'"):
    oc.convert(state, GRADED, params, to=FOUR)
  for counters, count in (("most", 4), ("least", 2)):
    found = oc.convert(state, GRADED, params, to=FOUR, counters=counters).groups["4"]
    assert found.updates == count
    assert found.inner_state[0].count == count
    assert_same(
      found.inner_state[0].mu["body"]["kernel"],
      state.groups["2"].inner_state[0].mu["body"]["kernel"],
    )


def test_a_static_phase_stays_right():
  params, state = run(MULTI, PARAMS, MULTI.init(PARAMS), 0, 5)
  state = oc.convert(state, MULTI, params, to=GRADED)
  phases = oc.phases(GRADED, params, state)
  step = jax.jit(GRADED.update, static_argnames="phase")
  fired = []
  for grads in BATCHES[5:9]:
    _, state = step(grads, state, params, phase=next(phases))
    fired.append({name for name, x in oc.has_updated(state).items() if x})
  assert fired == [{"2"}, set(), {"2", "4"}, set()]


def test_the_new_state_can_be_donated():
  params, state = run(FOUR, PARAMS, FOUR.init(PARAMS), 0, 5)
  state = oc.convert(state, FOUR, params, to=CUT)  # one counter in two groups
  pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
  assert len(set(pointers)) == len(pointers)


def test_weights_are_carried_where_they_count():
  state = WEIGHTED.init(PARAMS)
  for grads, weight in zip(BATCHES[:2], (1.0, 3.0), strict=True):
    _, state = WEIGHTED.update(grads, state, PARAMS, weight=weight)
  assert_same(oc.convert(state, WEIGHTED, PARAMS, to=WEIGHTED), state)
  with pytest.raises(ValueError, match="body/bias.*2 micro-steps of weight 4.0.*flush"):
    oc.convert(state, WEIGHTED, PARAMS, to=FOUR)
  _, state = run(FOUR, PARAMS, FOUR.init(PARAMS), 0, 3)
  found = oc.convert(state, FOUR, PARAMS, to=WEIGHTED).groups["4"]
  np.testing.assert_array_equal(found.weight, [3.0, 3.0, 3.0])
  np.testing.assert_array_equal(found.window, [3, 3, 3])


def test_schedules_keep_their_clock():
  def inner():
    return optax.sgd(optax.linear_schedule(1.0, 0.0, 100))

  by_steps = oc.cadence(inner(), everywhere(4, 2), clock="micro_steps")
  by_updates = oc.cadence(inner(), everywhere(4, 2))
  params, state = run(by_steps, PARAMS, by_steps.init(PARAMS), 0, 8)
  found = oc.convert(state, by_steps, params, to=by_updates)
  counts = {name: int(group.inner_state[1].count) for name, group in found.groups.items()}
  assert counts == {"4": 2, "2": 4}
  one = oc.cadence(inner(), everywhere(4), clock="micro_steps")
  merged = oc.convert(state, by_steps, params, to=one, counters="most")
  assert_same(run(one, params, merged, 8, 9)[1].micro_step, jnp.int32(9))


def test_inner_as_a_function_of_the_window():
  def inner(n):
    return oracle.relaxed(optax.inject_hyperparams(optax.adam)(learning_rate=0.1 * n))

  old, new = oc.cadence(inner, everywhere(4)), oc.cadence(inner, everywhere(4, 2))
  params, state = run(old, PARAMS, old.init(PARAMS), 0, 5)
  found = oc.convert(state, old, params, to=new)
  rates = {n: float(g.inner_state.hyperparams["learning_rate"]) for n, g in found.groups.items()}
  assert rates == pytest.approx({"4": 0.4, "2": 0.2})
  assert found.groups["2"].inner_state.inner_state[0].count == 1
  assert_same(oc.convert(found, new, params, to=old), state)


def test_whatever_an_optimizer_keeps_goes_with_an_unchanged_region():
  def inner():
    return optax.chain(optax.adafactor(0.1, min_dim_size_to_factor=2), oc.scale_by_cadence())

  old, new = oc.cadence(inner(), everywhere(4)), oc.cadence(inner(), everywhere(2, 4))
  params, state = run(old, PARAMS, old.init(PARAMS), 0, 5)
  found = oc.convert(state, old, params, to=new)
  assert_same(oc.convert(found, new, params, to=old), state)
  cut = oc.cadence(inner(), everywhere(4, oc.quadrants([[4, 2], [2, 4]])))
  with pytest.raises(ValueError, match=r"v_row.*body.*kernel.*group '4'.*body/kernel/0"):
    oc.convert(state, old, params, to=cut)


def test_a_policy_goes_on_where_its_region_is_the_same():
  policy = oc.until_certain(1.0, 2, 6)
  old = oc.cadence(adam(), everywhere(policy, 4))
  params, state = run(old, PARAMS, old.init(PARAMS), 0, 6)
  assert_same(oc.convert(state, old, params, to=old), state)
  fresh = oc.cadence(adam(), everywhere(oc.until_certain(1.0, 2, 6), 4))
  found = oc.convert(state, old, params, to=fresh)
  assert_same(jax.tree.leaves(found), jax.tree.leaves(state))
  params, state = run(FOUR, PARAMS, FOUR.init(PARAMS), 0, 2)
  found = oc.convert(state, FOUR, params, to=fresh)
  (name,) = found.groups.keys() - {"4"}
  assert np.isnan(found.groups[name].confidence.squares).all()
  assert found.groups[name].remaining == 4
  found = run(fresh, params, found, 2, 6)[1].groups[name]
  assert found.updates == 1
  assert found.period == 6
  np.testing.assert_array_equal(found.confidence.estimate.weight, [0, 0])


def test_chains_and_single_arrays():
  old = oc.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), oc.cadence(adam(), 4))
  new = oc.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), oc.cadence(adam(), 2))
  w = jnp.ones((2, 4))
  _, state = old.update(w, old.init(w), w)
  found = oc.convert(state, old, w, to=new)
  assert_same(found[1], state[1])
  assert found[2].groups["2"].window == 1
  assert_same(oc.convert(found, new, w, to=old), state)
  with pytest.raises(ValueError, match="same transformations before"):
    oc.convert(state, old, w, to=oc.cadence(adam(), 2))
  bands = oc.cadence(adam(), oc.channels([2, 4]))
  found = oc.convert(state[2], old_cadence := oc.cadence(adam(), 4), w, to=bands)
  assert found.groups["2"].inner_state[0].mu.shape == (2, 2)
  assert_same(oc.convert(found, bands, w, to=old_cadence), state[2])


@pytest.mark.parametrize(
  ("to", "says"),
  [
    (oc.cadence(adam(), everywhere(4, 1)), "body/kernel.*group '1'.*3 micro-steps.*flush"),
    (oc.cadence(adam(), 4, accumulate="latest"), "body/bias.*3 micro-steps.*flush"),
    (oc.cadence(adam(), 4, accumulator_dtype=jnp.bfloat16), "float32.*bfloat16.*flush"),
    (optax.MultiSteps(adam(), 2), "3 micro-steps, expected fewer than the 2.*flush"),
    (oc.cadence(optax.sgd(0.1, momentum=0.9), 4), "same optimizer in tx and in to"),
    (adam(), "expected a cadence.*as to"),
  ],
)
def test_what_cannot_be_carried_is_an_error(to, says):
  params, state = run(FOUR, PARAMS, FOUR.init(PARAMS), 0, 3)
  with pytest.raises(ValueError, match=says):
    oc.convert(state, FOUR, params, to=to)


def test_windows_of_different_lengths_have_no_group_without_skipping():
  bad = jax.tree.map(lambda g: g * jnp.nan, BATCHES[0])
  bad = {**BATCHES[0], "head": bad["head"]}
  state = SKIPS.init(PARAMS)
  for grads in (BATCHES[0], bad):
    _, state = SKIPS.update(grads, state, PARAMS)
  with pytest.raises(ValueError, match="'head'.*1 micro-steps, expected 2.*'body/kernel'.*flush"):
    oc.convert(state, SKIPS, PARAMS, to=FOUR)
  apart = oc.cadence(adam(), {"body": 4, "head": 2})
  found = oc.convert(state, SKIPS, PARAMS, to=apart)
  assert [int(found.groups[name].window) for name in ("4", "2")] == [2, 1]


def test_is_called_on_arrays():
  with pytest.raises(ValueError, match="outside of jax.jit"):
    jax.jit(lambda s: oc.convert(s, FOUR, PARAMS, to=GRADED))(FOUR.init(PARAMS))
  with pytest.raises(ValueError, match="expected the state of tx"):
    oc.convert(MULTI.init(PARAMS), FOUR, PARAMS, to=GRADED)
