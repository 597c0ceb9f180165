"""Which micro-step a schedule inside the inner optimizer reads."""

import jax
import jax.numpy as jnp
import optax
import oracle
import pytest
from small_tree import assert_close
from small_tree import assert_identical
from small_tree import BATCHES
from small_tree import cadence
from small_tree import PARAMS
from small_tree import STEPS
from small_tree import subtree
from small_tree import trained
from states import groups

import optax_cadence as oc

SCHEDULE = optax.linear_schedule(1.0, 0.0, 16)  # Dyadic at every whole number.


@pytest.mark.parametrize("injected", [False, True], ids=["schedule", "inject_hyperparams"])
def test_clock_of_micro_steps_leaves_period_one_as_the_plain_optimizer(injected):
  make = optax.inject_hyperparams(optax.adam) if injected else optax.adam
  inner = oracle.relaxed(make(learning_rate=SCHEDULE))
  tx = oc.cadence(inner, {"body": 4, "head": 1}, clock="micro_steps")
  params, state = PARAMS, tx.init(PARAMS)
  head, plain = {"head": PARAMS["head"]}, inner.init({"head": PARAMS["head"]})
  plain_update, update = jax.jit(inner.update), jax.jit(tx.update)
  for grads in BATCHES:
    updates, state = update(grads, state, params)
    expected, plain = plain_update({"head": grads["head"]}, plain, head)
    assert_identical(updates["head"], expected["head"])
    params = optax.apply_updates(params, updates)
    head = optax.apply_updates(head, expected)
  assert_identical(jax.tree.leaves(groups(state)[1].inner_state), jax.tree.leaves(plain))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("clock", ["updates", "micro_steps"])
@pytest.mark.parametrize("injected", [False, True], ids=["schedule", "inject_hyperparams"])
def test_clock_decides_where_a_slow_group_reads_its_schedule(injected, clock, static):
  make = optax.inject_hyperparams(optax.sgd) if injected else optax.sgd
  tx = cadence(make(learning_rate=SCHEDULE), {"body": 4, "head": 1}, clock=clock)
  state = tx.init(PARAMS)
  update = jax.jit(tx.update, static_argnames="phase")
  for t, grads in enumerate(BATCHES, start=1):
    phase = {"phase": t % 4} if static else {}
    updates, state = update(grads, state, PARAMS, **phase)
    count = t - 1 if clock == "micro_steps" else t // 4 - 1
    window = [g["body"]["bias"] for g in BATCHES[max(t - 4, 0) : t]]
    expected = -SCHEDULE(count) * sum(window) / 4 if t % 4 == 0 else jnp.zeros(6)
    assert_close(updates["body"]["bias"], expected)
    assert_close(updates["head"], -SCHEDULE(t - 1) * grads["head"])
  # One micro-step after the second window: a flush reads the schedule where training stands.
  updates, _ = tx.flush(state, PARAMS)
  rate = SCHEDULE(STEPS - 1) if clock == "micro_steps" else SCHEDULE(2)
  assert_close(updates["body"]["bias"], -rate * BATCHES[-1]["body"]["bias"])


@pytest.mark.parametrize("injected", [False, True], ids=["schedule", "inject_hyperparams"])
def test_clock_of_micro_steps_leaves_the_count_of_adam_alone(injected):
  make = optax.inject_hyperparams(optax.adam) if injected else optax.adam
  tx = cadence(make(learning_rate=SCHEDULE), {"body": 4, "head": 1}, clock="micro_steps")
  _, state = trained(tx)
  counts = [int(s.count) for s in subtree(state, optax.ScaleByAdamState)]
  assert counts == [2, 9]
  kind = type(groups(state)[0].inner_state) if injected else optax.ScaleByScheduleState
  clocks = [int(s.count) for s in subtree(state, kind)]
  assert clocks == [8, 9]


def test_clock_of_micro_steps_under_a_schedule_of_periods():
  growing = lambda done: jnp.where(done < 3, 1, 3)  # Due at 1, 2, 3, 6, 9.
  tx = cadence(optax.sgd(SCHEDULE), oc.Every(growing), clock="micro_steps")
  state, update, start = tx.init(PARAMS), jax.jit(tx.update), 0
  for t, grads in enumerate(BATCHES, start=1):
    updates, state = update(grads, state, PARAMS)
    if t in (1, 2, 3, 6, 9):
      mean = sum(g["head"] for g in BATCHES[start:t]) / (t - start)
      assert_close(updates["head"], -SCHEDULE(t - 1) * mean)
      start = t
    else:
      assert not updates["head"].any()
