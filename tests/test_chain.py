"""Chains, in which the cadence is one transformation among others."""

import jax
import jax.numpy as jnp
import optax
import oracle
import pytest
from small_tree import assert_close
from small_tree import assert_identical
from small_tree import assert_same_path
from small_tree import BATCHES
from small_tree import cadence
from small_tree import PARAMS
from small_tree import PIECES
from small_tree import trained

import optax_cadence as oc


def test_in_a_chain_what_stands_before_and_after_acts_on_every_micro_step():
  tx = optax.chain(optax.clip(0.25), cadence(optax.adam(0.1)), optax.scale(0.5))
  clipped = jax.tree.map(lambda g: jnp.clip(g, -0.25, 0.25), BATCHES)
  leaves, expected = jax.tree.leaves(PARAMS), []
  slow = oracle.Oracle(oracle.relaxed(optax.adam(0.1)), leaves, PIECES)
  for grads in clipped:
    updates = [0.5 * u for u in slow.step(jax.tree.leaves(grads), leaves)]
    leaves = optax.apply_updates(leaves, updates)
    expected.append(leaves)
  assert_same_path(trained(tx)[0], expected)


def test_oc_chain_keeps_apply_phase_flush_and_cycle():
  transforms = optax.clip(0.25), optax.trace(0.5)
  before, inner = optax.chain(*transforms), optax.adamw(0.1)
  tx = oc.chain(transforms[0], oc.chain(transforms[1], cadence(inner)))
  assert tx.cycle == 4
  slow = oracle.Oracle(oracle.relaxed(inner), jax.tree.leaves(PARAMS), PIECES)
  apply = jax.jit(tx.apply, static_argnames="phase")
  by_apply = by_phase = PARAMS, tx.init(PARAMS)
  trace = before.init(PARAMS)
  expected = jax.tree.leaves(PARAMS)
  for t, grads in enumerate(BATCHES, start=1):
    moving, trace = before.update(grads, trace)
    expected = optax.apply_updates(expected, slow.step(jax.tree.leaves(moving), expected))
    by_apply = apply(*by_apply, grads)
    by_phase = apply(*by_phase, grads, phase=t % tx.cycle)
    assert_close(by_apply[0], expected)
    assert_close(by_phase[0], expected)
  expected = optax.apply_updates(expected, slow.flush(expected))
  for params, state in (by_apply, by_phase):
    updates, flushed = jax.jit(tx.flush)(state, params)
    assert_close(optax.apply_updates(params, updates), expected)
    assert jax.tree.structure(flushed) == jax.tree.structure(state)


def test_oc_chain_has_the_state_and_the_updates_of_optax_chain():
  transforms = optax.clip(0.25), optax.trace(0.5), cadence(optax.adamw(0.1))
  ours, theirs = trained(oc.chain(*transforms)), trained(optax.chain(*transforms))
  assert_identical(ours, theirs)


@pytest.mark.parametrize("behind", [oc.prune(0.5, every=2), oc.growth.phase_in(lambda t: 0.5)])
def test_what_belongs_behind_an_optimizer_is_refused_before_a_cadence(behind):
  params = {"kernel": jnp.ones((2, 2))}
  with pytest.raises(ValueError, match=r"as the last transformation, .* or behind it by optax.ch"):
    oc.chain(cadence(optax.sgd(0.1)), behind)
  for before in (behind, optax.chain(optax.clip(0.25), behind)):
    tx = oc.chain(before, oc.cadence(optax.sgd(0.1), 2))
    with pytest.raises(ValueError, match=r"expected transformations of gradients before the cade"):
      tx.init(params)
