"""Gradients that are not finite: skipped region by region, or passed on to their own window."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from small_tree import assert_close
from small_tree import assert_identical
from small_tree import BATCHES
from small_tree import cadence
from small_tree import LEAFWISE
from small_tree import PARAMS
from small_tree import PIECES
from states import groups


def poison(batches, where):
  """The batches with entries set: from micro-step to pairs of a path and a value."""
  batches = [jax.tree.map(np.array, grads) for grads in batches]
  for t, spots in where.items():
    for (name, index), value in spots:
      leaf = batches[t - 1]["head"] if name == "head" else batches[t - 1]["body"][name]
      leaf[index] = value
  return [jax.tree.map(jnp.asarray, grads) for grads in batches]


NAN, INF = float("nan"), float("inf")
FAST, RIGHT, LEFT, CORNER = (0, 0), (1, 5), (3, 0), (3, 5)  # One entry in each quadrant.
BAD = {
  1: [(("bias", 0), INF)],
  2: [(("bias", 1), NAN), (("kernel", FAST), NAN)],
  # The first window of the bias is now empty.
  3: [(("bias", 2), -INF), (("kernel", LEFT), NAN)],
  # So is the second of one quadrant of period 2.
  4: [(("kernel", LEFT), NAN), (("head", 0), NAN)],
  # And the third of everything with period 2.
  5: [(("head", 1), NAN), (("kernel", RIGHT), NAN), (("kernel", LEFT), INF)],
  6: [(("head", 1), NAN), (("kernel", RIGHT), NAN), (("kernel", LEFT), INF)],
  # Nothing of period 1 is left here.
  7: [(("kernel", FAST), NAN), (("kernel", CORNER), INF)],
}
# Groups stand in order of appearance: the bias; the kernel's 1 and 2; the head is with the 2.
SKIPPED = [[3], [2, 1], [2, 4, 3]]


def skip_by_loop(inner, batches):
  """Updates of every micro-step: a window and an instance of the inner optimizer per tensor."""
  inner, params = oracle.relaxed(inner), jax.tree.leaves(PARAMS)
  tensors = [(i, p) for i, pieces in enumerate(PIECES) for p in pieces]
  states = [inner.init(params[i][p.index]) for i, p in tensors]
  windows = [[] for _ in tensors]
  for t, grads in enumerate(batches, start=1):
    leaves = list(map(np.asarray, jax.tree.leaves(grads)))
    updates = [np.zeros_like(leaf) for leaf in leaves]
    for n, (i, p) in enumerate(tensors):
      if np.isfinite(leaves[i][p.index]).all():
        windows[n].append(leaves[i][p.index])
      if t % p.period == p.offset and windows[n]:
        mean = jnp.asarray(sum(windows[n]) / np.float32(len(windows[n])))
        update, states[n] = inner.update(mean, states[n], params[i][p.index])
        updates[i][p.index] = update
        windows[n] = []
      elif t % p.period == p.offset:
        windows[n] = []
    yield updates


@pytest.mark.parametrize("how", ["update", "apply", "static apply"])
def test_skip_leaves_out_a_bad_batch_region_by_region(how):
  inner = optax.sgd(0.5, momentum=0.5)
  tx = cadence(inner, nonfinite="skip")
  batches = poison(BATCHES, BAD)
  params, state = PARAMS, tx.init(PARAMS)
  leaves = jax.tree.leaves(PARAMS)
  apply = jax.jit(tx.apply, static_argnames="phase")
  update = jax.jit(tx.update, static_argnames="phase")
  for t, expected in enumerate(skip_by_loop(inner, batches), start=1):
    phase = t % 4 if how.startswith("static") else None
    leaves = optax.apply_updates(leaves, expected)
    if how.endswith("apply"):
      params, state = apply(params, state, batches[t - 1], phase=phase)
    else:
      updates, state = update(batches[t - 1], state, params, phase=phase)
      for found, want in zip(jax.tree.leaves(updates), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(found) == 0, want == 0)
      params = optax.apply_updates(params, updates)
    assert_close(params, leaves)
  assert [group.skipped.tolist() for group in groups(state)] == SKIPPED


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_skip_an_empty_window_leaves_the_inner_state_bit_for_bit(static):
  tx = cadence(optax.adamw(0.1), nonfinite="skip")
  update = jax.jit(tx.update, static_argnames="phase")
  batches, states = poison(BATCHES, BAD), [tx.init(PARAMS)]
  for t, grads in enumerate(batches, start=1):
    phase = t % 4 if static else None
    states.append(update(grads, states[-1], PARAMS, phase=phase)[1])
  inner = lambda t, group: groups(states[t])[group].inner_state
  # Every window of the group is empty when it is due: nothing moves, the counter neither.
  assert_identical(inner(3, 0), inner(0, 0))
  assert_identical(inner(7, 1), inner(6, 1))
  assert_identical(inner(6, 2), inner(4, 2))
  # One of the windows is empty, beside others that fire.
  for old, new, empty, fired in [
    (inner(1, 1), inner(2, 1), 0, 1),
    (inner(2, 2), inner(4, 2), 1, 0),
  ]:
    assert int(new[0].count) == int(old[0].count) + 1
    for name in ("mu", "nu"):
      before = getattr(old[0], name)["body"]["kernel"]
      after = getattr(new[0], name)["body"]["kernel"]
      assert_identical(after[empty], before[empty])
      assert bool((after[fired] != before[fired]).any())


@pytest.mark.parametrize(
  ("accumulate", "static"), [("mean", False), ("mean", True), ("sum", False), ("latest", False)]
)
def test_skip_nothing_but_bad_batches_change_counters_alone(accumulate, static):
  tx = cadence(optax.adamw(0.1), LEAFWISE, accumulate=accumulate, nonfinite="skip")
  apply = jax.jit(tx.apply, static_argnames="phase")
  carry = PARAMS, tx.init(PARAMS)
  for t, grads in enumerate(BATCHES[:4], start=1):
    carry = apply(*carry, grads, phase=t % 4 if static else None)
  start, bad = carry, jax.tree.map(lambda g: jnp.full_like(g, NAN), PARAMS)
  for t in range(5, 13):
    carry = apply(*carry, bad, phase=t % 4 if static else None)
  inner = lambda carry: [group.inner_state for group in groups(carry[1])]
  assert_identical((carry[0], inner(carry)), (start[0], inner(start)))
  assert [group.skipped.tolist() for group in groups(carry[1])] == [[8], [8], [8]]
  # The next good batches train as ever.
  before = carry[0]
  for t in range(13, 17):
    carry = apply(*carry, BATCHES[0], phase=t % 4 if static else None)
  for a, b in zip(*map(jax.tree.leaves, (carry[0], before)), strict=True):
    assert bool(jnp.isfinite(a).all() and (a != b).any())


def test_skip_flush_applies_what_is_finite():
  tx = cadence(optax.sgd(1.0), accumulate="sum", nonfinite="skip")
  apply, flush = jax.jit(tx.apply), jax.jit(tx.flush)
  batches = poison(BATCHES, BAD)
  carry = PARAMS, tx.init(PARAMS)
  for grads in batches:
    carry = apply(*carry, grads)
  updates, state = flush(carry[1], carry[0])
  found = optax.apply_updates(carry[0], updates)
  kept = [np.zeros_like(x) for x in jax.tree.leaves(PARAMS)]
  for grads in batches:
    for i, leaf in enumerate(map(np.asarray, jax.tree.leaves(grads))):
      for p in PIECES[i]:
        if np.isfinite(leaf[p.index]).all():
          kept[i][p.index] += leaf[p.index]
  expected = [p - k for p, k in zip(jax.tree.leaves(PARAMS), kept, strict=True)]
  assert_identical(jax.tree.leaves(found), expected)
  assert all(not group.window.any() for group in groups(state) if group.window is not None)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_propagate_reaches_the_update_of_its_own_window_and_no_other(static):
  tx = cadence(optax.sgd(1.0))
  update = jax.jit(tx.update, static_argnames="phase")
  for bad in (NAN, INF):
    spots = [(("bias", 0), bad), (("kernel", RIGHT), bad), (("kernel", FAST), bad)]
    batches = poison(BATCHES, {2: spots})
    state, clean = tx.init(PARAMS), oracle.Oracle(optax.sgd(1.0), jax.tree.leaves(PARAMS), PIECES)
    for t, grads in enumerate(batches, start=1):
      phase = t % 4 if static else None
      updates, state = update(grads, state, PARAMS, phase=phase)
      expected = clean.step(jax.tree.leaves(BATCHES[t - 1]), jax.tree.leaves(PARAMS))
      if t == 2:
        expected[1][RIGHT] = expected[1][FAST] = -bad
      if t == 3:
        expected[0][0] = -bad
      assert_close(updates, expected)
