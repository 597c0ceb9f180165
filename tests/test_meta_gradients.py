"""Derivatives through several updates, in float64 so that finite differences tell."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from small_tree import assert_close
from small_tree import BATCHES
from small_tree import PARAMS

import optax_cadence as oc

# Away from the square root's kink at zero, which `eps_root` rounds off.
META_INNER = functools.partial(optax.adam, eps_root=1e-3)
META_EVERY = {"bias": 2, "kernel": oc.channels([2, 1, 2, 1])}
META_COLUMNS = {"even": ([0, 2], 2), "odd": ([1, 3], 1)}


def meta_params():
  rng = np.random.default_rng(5)
  return {"bias": jnp.asarray(rng.normal(size=4)), "kernel": jnp.asarray(rng.normal(size=(3, 4)))}


def meta_loss(params, t):
  x = jnp.cos(jnp.arange(3.0) + t)
  return jnp.sum(jnp.sin(x @ params["kernel"] + params["bias"]) ** 2)


def meta_final(how, rate, params, remat=False, inner=META_INNER, every=META_EVERY):
  """The loss after three cycles of training."""
  tx = oc.cadence(oracle.relaxed(inner(rate)), every)
  carry = params, tx.init(params)

  def step(carry, t, phase=None):
    params, state = carry
    grads = jax.grad(meta_loss)(params, t.astype(jnp.float64))
    if how.startswith("apply"):
      return tx.apply(params, state, grads, phase)
    updates, state = tx.update(grads, state, params, phase=phase)
    return optax.apply_updates(params, updates), state

  def cycle(carry, t):
    for i in (1, 2):
      carry = step(carry, t + i, i % 2)
    return carry, None

  step_of_scan = jax.checkpoint(step) if remat else step
  if how.endswith("static"):
    (params, _), _ = jax.lax.scan(cycle, carry, jnp.array([0, 2, 4]))
  else:
    (params, _), _ = jax.lax.scan(
      lambda carry, t: (step_of_scan(carry, t), None), carry, jnp.arange(1, 7)
    )
  return meta_loss(params, 0.0)


def meta_by_loop(rate, params):
  """The same by hand: a dict of tensors, a list of gradients for each."""
  inner = oracle.relaxed(META_INNER(rate))
  tensors = {"bias": params["bias"]}
  tensors |= {name: params["kernel"][:, columns] for name, (columns, _) in META_COLUMNS.items()}
  periods = {"bias": 2} | {name: period for name, (_, period) in META_COLUMNS.items()}
  states = {name: inner.init(x) for name, x in tensors.items()}
  windows = {name: [] for name in tensors}

  def loss(tensors, t):
    columns = [c for columns, _ in META_COLUMNS.values() for c in columns]
    kernel = jnp.concatenate([tensors[name] for name in META_COLUMNS], axis=1)
    return meta_loss({"bias": tensors["bias"], "kernel": kernel[:, np.argsort(columns)]}, t)

  for t in range(1, 7):
    grads = jax.grad(loss)(tensors, float(t))
    for name, period in periods.items():
      windows[name].append(grads[name])
      if t % period == 0:
        mean = sum(windows[name]) / period
        update, states[name] = inner.update(mean, states[name], tensors[name])
        tensors = tensors | {name: tensors[name] + update}
        windows[name] = []
  return loss(tensors, 0.0)


@functools.cache
def meta_expected():
  return jax.jit(jax.value_and_grad(meta_by_loop, argnums=(0, 1)))(0.125, meta_params())


def assert_near(found, expected, rtol):
  compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 100)
  jax.tree.map(compare, found, expected)


@pytest.mark.parametrize(
  "how",
  [
    *("update", "apply static"),
    *(pytest.param(how, marks=pytest.mark.ci) for how in ("apply", "update static")),
  ],
)
def test_meta_gradients(how):
  with oracle.enable_x64():
    final = jax.jit(functools.partial(meta_final, how))
    rate, params = jnp.asarray(0.125), meta_params()
    value, grads = jax.jit(jax.value_and_grad(final, argnums=(0, 1)))(rate, params)
    assert_near((value, grads), meta_expected(), rtol=1e-9)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), (rate, params))
    products = jax.tree.map(lambda g, d: (g * d).sum(), grads, direction)
    reverse = sum(jax.tree.leaves(products))
    forward = jax.jit(lambda *xs: jax.jvp(final, xs, direction)[1])(rate, params)
    moved = lambda h: final(*jax.tree.map(lambda x, d: x + h * d, (rate, params), direction))
    h = 1e-5
    difference = (moved(h) - moved(-h)) / (2 * h)
    assert_near(forward, reverse, rtol=1e-9)
    assert_near(forward, difference, rtol=1e-6)


@pytest.mark.ci
def test_meta_gradients_of_second_order():
  with oracle.enable_x64():
    final = functools.partial(meta_final, "update", inner=optax.sgd)
    slope = jax.jit(jax.grad(final))
    params, rate, h = meta_params(), 0.125, 1e-5
    curvature = jax.jit(jax.grad(jax.grad(final)))(rate, params)
    difference = (slope(rate + h, params) - slope(rate - h, params)) / (2 * h)
    assert_near(curvature, difference, rtol=1e-6)


def test_meta_gradients_through_flush():
  def moved(rate):
    tx = oc.cadence(oracle.relaxed(optax.sgd(rate)), {"body": 4, "head": 2})
    _, state = tx.apply(PARAMS, tx.init(PARAMS), BATCHES[0])
    return tx.flush(state, PARAMS)[0]

  expected = jax.tree.map(jnp.negative, BATCHES[0])
  assert_close(jax.jit(jax.jacfwd(moved))(0.5), expected)
  assert_close(jax.jit(jax.jacrev(moved))(0.5), expected)


def test_meta_gradients_through_checkpointed_micro_steps():
  with oracle.enable_x64():
    final = functools.partial(meta_final, "apply", remat=True)
    found = jax.jit(jax.value_and_grad(final, argnums=(0, 1)))(0.125, meta_params())
    assert_near(found, meta_expected(), rtol=1e-9)


def test_meta_gradients_under_vmap_over_traced_periods():
  slope = jax.grad(functools.partial(meta_final, "apply", inner=optax.sgd))
  with oracle.enable_x64():
    rate, params, periods = 0.125, meta_params(), [1, 3]
    sweep = jax.vmap(lambda period: slope(rate, params, every=period))
    found = jax.jit(sweep)(jnp.array(periods))
    for i, period in enumerate(periods):
      expected = jax.jit(functools.partial(slope, every=period))(rate, params)
      assert_near(found[i], expected, rtol=1e-9)
