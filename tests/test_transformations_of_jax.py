"""`scan`, `vmap`, `checkpoint`, `eval_shape`, donation, and maps over the state."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from small_tree import adamw_by_oracle
from small_tree import assert_close
from small_tree import assert_same_path
from small_tree import BATCHES
from small_tree import cadence
from small_tree import data
from small_tree import dyadic
from small_tree import EVERY
from small_tree import LEAFWISE
from small_tree import PARAMS
from small_tree import scanned
from small_tree import stack
from small_tree import STEPS
from small_tree import subtree
from small_tree import trained
from small_tree import trained_by_oracle
from states import groups

import optax_cadence as oc


@pytest.mark.parametrize("how", ["update", "apply"])
def test_scan_over_micro_steps(how):
  tx = cadence(optax.adamw(0.1))

  def step(carry, grads):
    params, state = carry
    if how == "apply":
      carry = tx.apply(params, state, grads)
    else:
      updates, state = tx.update(grads, state, params)
      carry = optax.apply_updates(params, updates), state
    return carry, carry[0]

  run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), stack(BATCHES))[1])
  assert_close(run(PARAMS), stack(adamw_by_oracle()))


def test_vmap_over_traced_periods_equals_static_runs():
  def final(period):
    every = {
      "body": {"bias": oc.Every(period), "kernel": oc.channels([1, period, 3])},
      "head": period,
    }
    return scanned(cadence(optax.adamw(0.1), every))

  periods = [1, 3]
  with jax.checking_leaks():
    swept = jax.jit(jax.vmap(final))(jnp.array(periods))
  for i, period in enumerate(periods):
    expected = jax.jit(final, static_argnums=0)(period)
    assert_close(jax.tree.map(lambda x, i=i: x[i], swept), expected)


def test_vmap_over_a_vector_of_periods_for_bands():
  def final(periods):
    tx = cadence(optax.adamw(0.1), {"body": {"bias": oc.channels(periods), "kernel": 2}, "head": 1})
    return scanned(tx)

  sweep = [[1, 2, 4], [3, 3, 3]]
  swept = jax.jit(jax.vmap(final))(jnp.array(sweep))
  for i, periods in enumerate(sweep):
    pieces = [oracle.bands((6,), periods, 0), oracle.whole(2), oracle.whole(1)]
    expected = trained_by_oracle(optax.adamw(0.1), pieces)[-1]
    assert_close(jax.tree.map(lambda x, i=i: x[i], swept), expected)


def test_vmap_over_learning_rates_with_static_periods():
  final = lambda rate: scanned(cadence(optax.adamw(rate)))
  swept = jax.jit(jax.vmap(final))(jnp.array([0.1, 0.5]))
  expected = [adamw_by_oracle()[-1], trained_by_oracle(optax.adamw(0.5))[-1]]
  for i in range(2):
    assert_close(jax.tree.map(lambda x, i=i: x[i], swept), expected[i])


def test_vmap_over_models_trains_an_ensemble():
  tx = cadence(optax.adamw(0.1))
  models = stack([PARAMS, dyadic(101)])
  batches = stack([stack(BATCHES), stack([dyadic(200 + t) for t in range(STEPS)])])
  swept = jax.jit(jax.vmap(functools.partial(scanned, tx)))(models, batches)
  assert_close(jax.tree.map(lambda x: x[0], swept), adamw_by_oracle()[-1])


def test_a_checkpointed_model_trains_as_the_plain_one():
  def loss(params, x, layer):
    for _ in range(2):
      x = layer(params["kernel"], x)
    return (x**2).mean()

  layer = lambda kernel, x: jnp.tanh(x @ kernel)
  params = {"kernel": dyadic(7, (4, 4))}
  tx = cadence(optax.adamw(0.1), oc.quadrants([[1, 2], [2, 1]]))

  def final(layer):
    def step(carry, x):
      grads = jax.grad(loss)(carry[0], x, layer)
      return tx.apply(*carry, grads), grads

    inputs = stack([data(t)[0] for t in range(STEPS)])
    (params_, _), grads = jax.lax.scan(step, (params, tx.init(params)), inputs)
    return params_, grads

  found, grads = jax.jit(lambda: final(jax.checkpoint(layer)))()
  plain, _ = jax.jit(lambda: final(layer))()
  assert_close(found, plain)
  batches = [jax.tree.map(lambda g, t=t: g[t], grads) for t in range(STEPS)]
  pieces = [oracle.rectangles((4, 4), [[1, 2], [2, 1]], (-2, -1))]
  assert_close(found, trained_by_oracle(optax.adamw(0.1), pieces, params, batches)[-1])


def test_with_donated_buffers_every_buffer_is_used_again():
  tx = cadence(optax.adamw(0.1))
  step = jax.jit(tx.apply, donate_argnums=(0, 1))
  params = jax.tree.map(jnp.copy, PARAMS)
  state, found = tx.init(params), []
  for grads in BATCHES:
    # Whether a group fired the last time is written and never read.
    written = [group.fired for group in groups(state)]
    given = jax.tree.leaves((params, state))
    params, state = step(params, state, grads)
    assert all(x.is_deleted() for x in given if not any(x is y for y in written))
    found.append(jax.tree.map(np.array, params))  # A view of a buffer would keep it alive.
  assert_same_path(found, adamw_by_oracle())


def test_a_cadence_passes_through_what_rebuilds_named_tuples():
  # `nnx.jit` does so to the attributes of a module in Flax 0.10.
  alone = cadence(optax.sgd(0.1), LEAFWISE)
  for tx in (alone, oc.chain(optax.clip(0.25), alone)):
    rebuilt = jax.tree.unflatten(jax.tree.structure(tx), jax.tree.leaves(tx))
    for same in (rebuilt, copy.copy(tx)):
      assert same.cycle == 4
      _, state = jax.eval_shape(same.apply, PARAMS, same.init(PARAMS), BATCHES[0])
      jax.eval_shape(same.flush, state, PARAMS)


def test_init_can_be_evaluated_for_its_shapes_alone():
  for nonfinite in ("propagate", "skip"):
    tx = cadence(optax.adamw(0.1), lambda params: EVERY, nonfinite=nonfinite)
    shapes = jax.eval_shape(tx.init, PARAMS)
    assert oc.describe(tx, PARAMS).cycle == 4
    state = tx.init(PARAMS)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True):
      assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
    after = jax.eval_shape(tx.update, PARAMS, shapes, PARAMS)[1]
    assert jax.tree.leaves(after) == jax.tree.leaves(shapes)


def test_tree_map_params_reaches_moments_and_accumulators_alone():
  tx = cadence(optax.adamw(0.1))
  state = trained(tx, batches=BATCHES[:3])[1]
  marked = optax.tree_utils.tree_map_params(
    tx, lambda x: jnp.full_like(x, 7), state, transform_non_params=lambda x: x + 1
  )
  assert int(marked.micro_step) == 4
  for group, old in zip(groups(marked), groups(state), strict=True):
    adam, before = subtree(group, optax.ScaleByAdamState)[0], old.inner_state[0]
    assert int(adam.count) == int(before.count) + 1
    params = jax.tree.leaves((adam.mu, adam.nu, group.accumulators))
    assert params and all(bool((x == 7).all()) for x in params)
    assert group.window is None or int(group.window) == int(old.window) + 1


def test_tree_map_params_takes_a_tree_of_specs():
  tx = cadence(optax.adam(0.1), LEAFWISE)
  specs = {"body": {"bias": "b", "kernel": "k"}, "head": "h"}
  is_masked = lambda x: isinstance(x, optax.MaskedNode)
  mapped = optax.tree_utils.tree_map_params(
    tx,
    lambda x, spec: x if is_masked(x) else spec,
    tx.init(PARAMS),
    specs,
    transform_non_params=lambda _: None,
    is_leaf=is_masked,
  )
  names = [sorted(set(jax.tree.leaves(group))) for group in groups(mapped)]
  assert names == [["b"], ["k"], ["h"]]
  assert groups(mapped)[0].accumulators["body"]["bias"] == "b"
