"""The cadence inside and around Optax's wrappers, and around optimizers that see whole tensors."""

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import oracle
import pytest
from small_tree import assert_close
from small_tree import assert_same_path
from small_tree import BATCHES
from small_tree import by_hand
from small_tree import cadence
from small_tree import LEAFWISE
from small_tree import PARAMS
from small_tree import relaxed
from small_tree import STEPS
from small_tree import subtree
from small_tree import trained
from small_tree import trained_by_oracle
from states import groups

import optax_cadence as oc


def test_around_injected_hyperparameters_the_schedule_counts_updates():
  schedule = optax.linear_schedule(0.5, 0.1, 4)
  inner = optax.inject_hyperparams(optax.adam)(learning_rate=schedule)
  assert_same_path(trained(cadence(inner))[0], trained_by_oracle(inner))


def test_a_learning_rate_set_by_hand_holds_for_the_next_update():
  inner = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
  tx = cadence(inner, 2)
  state = tx.init(PARAMS)
  _, state = tx.update(BATCHES[0], state, PARAMS)
  injected = groups(state)[0].inner_state
  injected.hyperparams["learning_rate"] = jnp.float32(0.25)
  updates, _ = tx.update(BATCHES[1], state, PARAMS)
  expected = jax.tree.map(lambda a, b: -0.25 * (a + b) / 2, *BATCHES[:2])
  assert_close(updates, expected)


def test_a_learning_rate_is_set_in_every_group_by_tree_set():
  tx = cadence(optax.inject_hyperparams(optax.sgd)(learning_rate=1.0), LEAFWISE)
  state = tx.init(PARAMS)
  new = optax.tree_utils.tree_set(state, learning_rate=jnp.float32(0.25))
  assert jax.tree.structure(new) == jax.tree.structure(state)
  rates = optax.tree_utils.tree_get_all_with_path(new, "learning_rate")
  assert len(rates) == len(groups(state)) > 1 and all(x == 0.25 for _, x in rates)
  updates, _ = jax.jit(tx.update)(BATCHES[0], new, PARAMS)
  assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize("static", [False, True])
def test_inside_injected_hyperparameters_the_learning_rate_is_traced(static):
  schedule = optax.linear_schedule(0.5, 0.1, 8)
  inject = lambda make: oracle.relaxed(optax.inject_hyperparams(make)(learning_rate=schedule))
  tx = inject(lambda learning_rate: oc.cadence(optax.adam(learning_rate), LEAFWISE))
  peer = inject(lambda learning_rate: by_hand(optax.adam(learning_rate)))
  state, params, found = tx.init(PARAMS), PARAMS, []
  update = jax.jit(tx.update, static_argnames="phase")
  for t, grads in enumerate(BATCHES, start=1):
    phase = {"phase": t % 4} if static else {}
    updates, state = update(grads, state, params, **phase)
    params = optax.apply_updates(params, updates)
    found.append(params)
  assert_same_path(found, trained(peer)[0])
  assert float(state.hyperparams["learning_rate"]) == schedule(STEPS - 1)


def test_a_period_can_be_an_injected_hyperparameter():
  # A number where the state is made and traced afterwards: a schedule is the same in both.
  make = lambda every: oc.cadence(optax.sgd(1.0), oc.Every(lambda _: every))
  tx = oracle.relaxed(optax.inject_hyperparams(make)(every=2))
  state, update, due = tx.init(PARAMS), jax.jit(tx.update), []
  for t, grads in enumerate(BATCHES, start=1):
    updates, state = update(grads, state, PARAMS)
    due += [t] if updates["head"].any() else []
    if t == 3:
      state.hyperparams["every"] = jnp.int32(4)  # Read when the next window begins.
  assert due == [2, 4, 8]


NAN_BATCHES = [
  jax.tree.map(lambda g, bad=(t == 5): jnp.where(bad, jnp.nan, g), grads)
  for t, grads in enumerate(BATCHES)
]


def test_around_apply_if_finite_a_window_with_a_nan_is_not_applied():
  inner = optax.apply_if_finite(optax.adam(0.1), 3)
  found, state = trained(cadence(inner), batches=NAN_BATCHES)
  assert_same_path(found, trained_by_oracle(inner, batches=NAN_BATCHES))
  assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found))
  counts = [int(s.total_notfinite) for s in subtree(state, optax.ApplyIfFiniteState)]
  assert counts == [1, 1, 1]


def test_inside_apply_if_finite_a_micro_step_with_a_nan_is_none_at_all():
  tx = optax.apply_if_finite(cadence(optax.adam(0.1)), 3)
  found, state = trained(tx, batches=NAN_BATCHES)
  clean = BATCHES[:5] + BATCHES[6:]
  expected = trained_by_oracle(optax.adam(0.1), batches=clean)
  assert_same_path(found, [*expected[:5], expected[4], *expected[5:]])
  assert int(state.inner_state.micro_step) == STEPS - 1


def test_inside_lookahead():
  around = lambda fast: oracle.relaxed(optax.lookahead(fast, sync_period=3, slow_step_size=0.5))
  start = optax.LookaheadParams.init_synced(PARAMS)
  batches = BATCHES
  found, _ = trained(around(oc.cadence(optax.sgd(0.5, momentum=0.5), LEAFWISE)), start, batches)
  expected, _ = trained(around(by_hand(optax.sgd(0.5, momentum=0.5))), start, batches)
  assert_same_path(found, expected)


@pytest.mark.parametrize("every", [2, LEAFWISE, {"fast": 2, "slow": 4}])
def test_around_lookahead_is_an_error_that_says_what_to_use_instead(every):
  tx = oc.cadence(optax.lookahead(optax.sgd(0.5), sync_period=3, slow_step_size=0.5), every)
  params = optax.LookaheadParams.init_synced(PARAMS)
  with pytest.raises(ValueError, match="lookahead"):
    tx.update(BATCHES[0], tx.init(params), params)


def test_around_schedule_free_adamw():
  inner = optax.contrib.schedule_free_adamw(0.1, warmup_steps=2, weight_decay=0.1)
  # Each step takes a difference of weighted means divided by b1, so rounding grows along the way.
  assert_same_path(trained(cadence(inner))[0], trained_by_oracle(inner), ulps=64)


def test_inside_schedule_free_the_average_goes_on_in_every_micro_step():
  around = lambda base: oracle.relaxed(optax.contrib.schedule_free(base, 0.1, b1=0.9))
  found, state = trained(around(oc.cadence(optax.adam(0.1, b1=0.0), LEAFWISE)))
  expected, peer = trained(around(by_hand(optax.adam(0.1, b1=0.0))))
  assert_same_path(found, expected, ulps=64)  # As above.
  evaluate = optax.contrib.schedule_free_eval_params
  with relaxed():
    assert_close(evaluate(state, found[-1]), evaluate(peer, expected[-1]), ulps=64)


def test_around_muon_each_quadrant_is_a_matrix():
  inner = optax.contrib.muon(0.1)
  # Newton-Schulz multiplies matrices, whose sums XLA orders as it likes in each program.
  assert_same_path(trained(cadence(inner))[0], trained_by_oracle(inner), ulps=256)


def test_extra_arguments_reach_the_inner_optimizer():
  inner = optax.polyak_sgd(max_learning_rate=0.5)
  expected = trained_by_oracle(inner, value=jnp.float32(0.75))
  assert_same_path(trained(cadence(inner), value=jnp.float32(0.75))[0], expected)
  tx = oc.chain(optax.clip(8.0), cadence(inner))
  apply, carry, found = jax.jit(tx.apply), (PARAMS, tx.init(PARAMS)), []
  for grads in BATCHES:
    carry = apply(*carry, grads, value=jnp.float32(0.75))
    found.append(carry[0])
  assert_same_path(found, expected)
  updates, _ = tx.flush(carry[1], carry[0], value=jnp.float32(0.75))
  assert any(bool(u.any()) for u in jax.tree.leaves(updates))
