"""`oc.linen.TrainState` does what Flax's does, and what the loop without it does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from small_tree import assert_close
from small_tree import assert_identical
from small_tree import cadence
from small_tree import data
from small_tree import relaxed
from test_flax import LinenNet

import optax_cadence as oc

LEAVES = {"head": 2, "stem": {"bias": 1, "kernel": 4}}
NET = LinenNet()


def loss_of(apply_fn, params, x, y, weight=1.0):
  return weight * ((apply_fn({"params": params}, x) - y) ** 2).mean()


def made(tx, kind=oc.linen.TrainState, **fields):
  params = NET.init(jax.random.key(0), data(0)[0])["params"]
  return kind.create(apply_fn=NET.apply, params=params, tx=tx, **fields)


def by_gradients(state, x, y, **options):
  value, grads = jax.value_and_grad(loss_of, argnums=1)(state.apply_fn, state.params, x, y)
  return state.apply_gradients(grads=grads, **options), value


def at_once(state, x, y, **options):
  loss = lambda params, x, y: loss_of(state.apply_fn, params, x, y)
  return state.training_step(loss, x, y, **options)


@pytest.mark.parametrize("step", [by_gradients, at_once])
def test_it_does_what_flax_does(step):
  tx = cadence(optax.adamw(0.1), LEAVES)
  state, other = made(tx), made(tx, train_state.TrainState)
  params, opt_state = state.params, state.opt_state
  run, run_other = jax.jit(step), jax.jit(by_gradients)
  plain = jax.jit(oc.training_step(lambda params, x, y: loss_of(NET.apply, params, x, y), tx))
  with relaxed():
    for t in range(5):
      state, value = run(state, *data(t))
      other, other_value = run_other(other, *data(t))
      params, opt_state, plain_value = plain(params, opt_state, *data(t))
      assert value == plain_value
      np.testing.assert_allclose(value, other_value, rtol=1e-6)
      assert_close(state.params, other.params)
      assert_identical(state.params, params)
    assert int(state.step) == 5
    assert {name: bool(x) for name, x in state.has_updated().items()} == {
      "1": True,
      "2": False,
      "4": False,
    }
    flushed = jax.jit(lambda state: state.flush())(state)
    updates, expected = jax.jit(tx.flush)(opt_state, params)
  assert_identical(flushed.params, optax.apply_updates(params, updates))
  np.testing.assert_equal(flushed.metrics(), oc.metrics(expected))
  assert int(flushed.step) == 5


@pytest.mark.parametrize("step", [by_gradients, at_once])
def test_phases_weights_and_donation(step):
  tx = cadence(optax.sgd(0.5), {"head": 2, "stem": 1}, weighted=True)
  state, static = made(tx), made(tx)
  run, run_static = jax.jit(step), jax.jit(step, static_argnames="phase", donate_argnums=0)
  phases = oc.phases(tx, state.params)
  with relaxed():
    for t, weight in enumerate((1.0, 3.0)):
      old = jax.tree.leaves(static.params)
      state, _ = run(state, *data(t), weight=weight)
      static, _ = run_static(static, *data(t), weight=weight, phase=next(phases))
      assert all(x.is_deleted() for x in old)
    assert_close(state.params, static.params)
    with pytest.raises(ValueError, match="weight"):
      run(state, *data(0))


def test_further_fields_are_replaced():
  class WithStatistics(oc.linen.TrainState):
    batch_stats: dict

  tx = cadence(optax.sgd(0.5), 2)
  state = made(tx, WithStatistics, batch_stats={"mean": jnp.zeros(())})
  grads = jax.tree.map(jnp.ones_like, state.params)
  state = state.apply_gradients(grads=grads, batch_stats={"mean": jnp.ones(())})
  assert state.batch_stats["mean"] == 1 and isinstance(state, WithStatistics)
  loss = lambda params: (params["head"]["bias"].sum(), {"mean": jnp.full((), 2.0)})
  state, (_, statistics) = jax.jit(lambda state: state.training_step(loss, has_aux=True))(state)
  assert state.replace(batch_stats=statistics).batch_stats["mean"] == 2
  # The mean of two gradients of one.
  np.testing.assert_array_equal(state.params["head"]["bias"], [-0.5, -0.5])


def test_scales_that_their_gradient_overwrites():
  key = train_state.OVERWRITE_WITH_GRADIENT
  params = {"params": {"w": jnp.ones(2)}, key: {"scale": jnp.ones(())}}
  tx = cadence(optax.sgd(0.5), 2)
  state = oc.linen.TrainState.create(apply_fn=None, params=params, tx=tx)
  grads = {"params": {"w": jnp.ones(2)}, key: {"scale": jnp.full((), 3.0)}}
  state = state.apply_gradients(grads=grads)
  assert state.params[key]["scale"] == 3
  np.testing.assert_array_equal(state.params["params"]["w"], [1.0, 1.0])
  flushed = state.flush()
  assert flushed.params[key]["scale"] == 3
  np.testing.assert_array_equal(flushed.params["params"]["w"], [0.5, 0.5])
  with pytest.raises(ValueError, match=f"training_step: expected .* found '{key}'"):
    state.training_step(lambda params: params["params"]["w"].sum())


def test_what_is_no_cadence():
  with pytest.raises(ValueError, match=r"oc.linen.TrainState.create\(tx=tx\), found"):
    made(optax.adam(0.1))
