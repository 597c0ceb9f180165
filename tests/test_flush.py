"""The end of training: every window that is not empty is applied."""

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
from small_tree import PIECES
from small_tree import STEPS
from small_tree import trained
from states import groups

import optax_cadence as oc


def assert_nothing_happened(state, flushed):
  """A flush that found nothing says so, and leaves the rest as it was."""
  assert not any(oc.has_updated(flushed).values())
  groups = {
    name: group._replace(fired=state.groups[name].fired) for name, group in flushed.groups.items()
  }
  assert_identical(flushed._replace(groups=groups), state)


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_flush_at_every_point_of_a_cycle_loses_nothing(nonfinite):
  tx = cadence(optax.sgd(1.0), accumulate="sum", nonfinite=nonfinite)
  apply, flush = jax.jit(tx.apply), jax.jit(tx.flush)
  total = lambda batches: [
    sum(leaves, start=jnp.zeros_like(p))
    for p, *leaves in zip(*map(jax.tree.leaves, [PARAMS, *batches]), strict=True)
  ]
  expected = lambda batches: [
    p - g for p, g in zip(jax.tree.leaves(PARAMS), total(batches), strict=True)
  ]
  for stop in range(STEPS + 1):
    params, state = PARAMS, tx.init(PARAMS)
    for grads in BATCHES[:stop]:
      params, state = apply(params, state, grads)
    updates, state = flush(state, params)
    params = optax.apply_updates(params, updates)
    assert_identical(jax.tree.leaves(params), expected(BATCHES[:stop]))
    again, same = flush(state, params)
    assert not any(u.any() for u in jax.tree.leaves(again))
    assert_nothing_happened(state, same)
    # Training goes on, on the same grid.
    for t in range(stop + 1, STEPS + 1):
      before, (params, state) = params, apply(params, state, BATCHES[t - 1])
      moved = [
        bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (before, params)), strict=True)
      ]
      assert moved == [t % 4 == 3, True, t % 2 == 0]
    updates, _ = flush(state, params)
    assert_identical(jax.tree.leaves(optax.apply_updates(params, updates)), expected(BATCHES))


def test_flush_applies_the_mean_of_what_is_there():
  tx = cadence(optax.adamw(0.1))
  apply, flush = jax.jit(tx.apply), jax.jit(tx.flush)
  for stop in range(5):
    leaves = jax.tree.leaves(PARAMS)
    slow = oracle.Oracle(oracle.relaxed(optax.adamw(0.1)), leaves, PIECES)
    params, state = PARAMS, tx.init(PARAMS)
    for t, grads in enumerate(BATCHES):
      if t == stop:
        updates, after = flush(state, params)
        params = optax.apply_updates(params, updates)
        leaves = optax.apply_updates(leaves, slow.flush(leaves))
        assert_close(params, leaves)
        for old, new in zip(groups(state), groups(after), strict=True):
          if old.window is None or not old.window.any():
            assert_identical(new.inner_state, old.inner_state)
        state = after
      params, state = apply(params, state, grads)
      leaves = optax.apply_updates(leaves, slow.step(jax.tree.leaves(grads), leaves))
      assert_close(params, leaves)


def test_flush_of_the_latest_gradient_is_a_no_op():
  tx = cadence(optax.adamw(0.1), accumulate="latest")
  _, state = trained(tx)
  updates, after = tx.flush(state, PARAMS)
  assert not any(u.any() for u in jax.tree.leaves(updates))
  assert_nothing_happened(state, after)


def test_flush_under_a_schedule_of_periods_keeps_to_the_grid():
  growing = lambda done: jnp.where(done < 4, 2, 3)  # Due at 2, 4, 7, 10.
  tx = cadence(optax.sgd(1.0), oc.Every(growing), accumulate="sum")
  apply = jax.jit(tx.apply)
  params, state = PARAMS, tx.init(PARAMS)
  for t, grads in enumerate(BATCHES, start=1):
    before, (params, state) = params, apply(params, state, grads)
    assert bool((params["head"] != before["head"]).any()) == (t in (2, 4, 7))
    if t in (1, 5):
      updates, state = tx.flush(state, params)
      params = optax.apply_updates(params, updates)
  updates, _ = tx.flush(state, params)
  params = optax.apply_updates(params, updates)
  expected = PARAMS["head"] - sum(grads["head"] for grads in BATCHES)
  assert_identical(params["head"], expected)
