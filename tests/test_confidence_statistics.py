"""Estimates of signal and noise against the truth, and the firing times that follow from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cadence as oc


def measured(every, shape, mu, sigma, windows, length, dtype="float32", seed=0):
  """Smoothed estimates with no forgetting to speak of: means over many windows."""
  tx = oc.noise_scale(every, decay=1 - 1e-6)

  def step(state, key):
    g = mu + sigma * jax.random.normal(key, shape)
    return tx.update(g.astype(dtype), state)[1], None

  @jax.jit
  def run(key):
    state = tx.init(jnp.zeros(shape, dtype))
    return jax.lax.scan(step, state, jax.random.split(key, windows * length))[0]

  estimates = [group.estimate for group in run(jax.random.key(seed)).groups]
  signals = np.concatenate([e.signals() for e in estimates])
  return signals, np.concatenate([e.noises() for e in estimates])


# The spread of |G|² falls with the dimension: few entries need many windows.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "windows"), [(1, 6000), (100, 400), (10_000, 50), (10**6, 4)])
def test_estimates_are_right_in_the_mean(size, windows, dtype):
  signal, noise = measured(4, (size,), 0.5, 1.0, windows, 4, dtype)
  np.testing.assert_allclose(signal, 0.25 * size, rtol=0.05)
  np.testing.assert_allclose(noise, size, rtol=0.05)
  np.testing.assert_allclose(noise / signal, 4.0, rtol=0.05)


KINDS = {
  "whole": (8, [4096]),
  "channels": (oc.channels([2, 4, 8]), [22 * 64, 21 * 64, 21 * 64]),
  "quadrants": (oc.quadrants([[2, 4], [8, 2]]), [1024] * 4),
  "stacked": (oc.stacked([2, 4] * 32), [2048, 2048]),
  "mask": (2 ** (1 + np.indices((64, 64)).sum(0) % 2), [2048, 2048]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_region_is_measured(kind):
  every, sizes = KINDS[kind]
  signal, noise = measured(every, (64, 64), 0.5, 1.0, 100, 8)
  np.testing.assert_allclose(sorted(noise), sorted(sizes), rtol=0.05)
  np.testing.assert_allclose(noise / signal, 4.0, rtol=0.05)


def test_neither_numerator_nor_denominator_is_biased_where_there_is_little_signal():
  signal, noise = measured(2, (1000,), 0.0, 1.0, 2000, 2)
  # The mean of 2000 estimates of 0 whose standard deviation is √(tr Σ²) = √1000.
  assert abs(signal[0]) < 4 * np.sqrt(1000 / 2000)
  np.testing.assert_allclose(noise, 1000, rtol=0.01)


@functools.partial(jax.jit, static_argnums=(1,))
def firing_times(scale, updates):
  """Window lengths of a region with this noise scale, one after another."""
  size, most = 2000, 8192
  tx = oc.cadence(optax.sgd(0.0), oc.until_certain(1.0, 2, most))
  params, key = jnp.zeros(size), jax.random.key(0)

  def step(carry):
    t, state, lengths = carry
    noise = jax.random.normal(jax.random.fold_in(key, t), (size,))
    done = state.groups[0].updates
    _, state = tx.update(1 / jnp.sqrt(scale) + noise, state)
    group = state.groups[0]
    at = jnp.where(group.updates > done, done, updates)
    return t + 1, state, lengths.at[at].set(group.period, mode="drop")

  start = jnp.int32(0), tx.init(params), jnp.zeros(updates, jnp.int32)
  return jax.lax.while_loop(lambda c: c[1].groups[0].updates < updates, step, start)[2]


@pytest.mark.parametrize("scale", [4.5, 45.0, 450.0, 4500.0])
def test_until_certain_fires_when_theory_predicts(scale):
  lengths = np.asarray(firing_times(jnp.float32(scale), 3 if scale > 1000 else 9))
  # The ratio at n is n / scale: the first whole n at which it is 1.
  assert abs(np.median(lengths) / np.ceil(scale) - 1) <= 0.2
  assert lengths.min() >= 2 and lengths.max() <= 8192


@pytest.mark.parametrize(("low", "high"), [(2, 3), (5, 9), (7, 64)])
def test_a_window_is_never_outside_its_bounds(low, high):
  tx = oc.cadence(optax.sgd(0.0), oc.until_certain(0.3, low, high))

  def step(state, key):
    k1, k2 = jax.random.split(key)
    mu = jnp.exp(jax.random.normal(k1, ()) - 1)
    state = tx.update(mu + jax.random.normal(k2, (8,)), state)[1]
    return state, state.groups[0].period

  state = tx.init(jnp.zeros(8))
  periods = jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(jax.random.key(1), 600))[1])
  found = np.asarray(periods(state))
  found = found[found > 0]
  assert found.min() >= low and found.max() <= high


@pytest.mark.parametrize("value", [0.0, 1.0, jnp.nan])
def test_noise_scale_of_degenerate_gradients(value):
  tx = oc.noise_scale(4)
  params = jnp.zeros(3)
  state = tx.init(params)
  for _ in range(8):
    updates, state = tx.update(jnp.full(3, value), state)
    np.testing.assert_array_equal(updates, jnp.full(3, value))
  assert all(np.isfinite(x).all() for x in state.groups[0].estimate)
  found = oc.metrics(state)["params/noise_scale"]
  expected = {0.0: np.inf, 1.0: 0.0}.get(value, np.nan)
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_noise_scale_in_a_chain_leaves_the_run_as_it_is():
  params = {"w": jnp.ones((4, 4))}
  measured = optax.chain(oc.noise_scale({"w": oc.quadrants([[2, 4], [2, 4]])}), optax.sgd(0.1))
  state = measured.init(params)
  for i in range(4):
    grads = {"w": jnp.full((4, 4), 1.0 + i)}
    updates, state = measured.update(grads, state, params)
    np.testing.assert_allclose(updates["w"], -0.1 * grads["w"])
  found = oc.metrics(state)
  assert sum(name.endswith("/noise_scale") for name in found) == 4
  assert all(np.isfinite(value) for value in found.values())
