"""Estimates of signal and noise against the truth, and the firing times that follow from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from states import groups

import optax_cadence as oc


def measured(every, params, mu, sigma, steps, replicas=1):
  """Means of the estimates over windows and replicas, and the size of every region.

  All leaves of a shape get the same normal noise around `mu`.
  """
  # There is no forgetting to speak of, so that the smoothed estimates are means.
  tx = oc.noise_scale(every, decay=1 - 1e-6)

  def step(state, key):
    grads = jax.tree.map(
      lambda p: (mu + sigma * jax.random.normal(key, p.shape)).astype(p.dtype), params
    )
    return tx.update(grads, state)[1], None

  @jax.jit
  @jax.vmap
  def run(key):
    return jax.lax.scan(step, tx.init(params), jax.random.split(key, steps))[0]

  found = run(jax.random.split(jax.random.key(0), replicas))
  sizes = [x[0].size for group in groups(found) for x in jax.tree.leaves(group.sums)]
  estimates = [group.estimate for group in groups(found)]
  signals = np.concatenate([e.signals().mean(0) for e in estimates])
  return signals, np.concatenate([e.noises().mean(0) for e in estimates]), np.array(sizes)


def kinds(n):
  """A cadence of every kind for a leaf of shape [n, n], n even."""
  return {
    "whole": 8,
    "channels": oc.channels([2, 4]),
    "quadrants": oc.quadrants([[2, 4], [8, 2]]),
    "stacked": oc.stacked([2, 4] * (n // 2)),
    "grid": oc.Grid([[8, 4]], (0, 1)),
    "mask": 2 ** (1 + np.indices((n, n)).sum(0) % 2),
  }


# Regions of 1 to 4, 1024 to 4096 and 250,000 to 1,000,000 entries. The fewer, the more the
# estimates scatter, and the more windows there are: by five standard deviations enough.
@pytest.mark.parametrize(
  ("n", "mu", "steps", "replicas"),
  [
    (2, 1.0, 800, 64),
    pytest.param(64, 0.5, 64, 4, marks=pytest.mark.ci),
    pytest.param(1000, 0.5, 8, 1, marks=pytest.mark.ci),
  ],
)
def test_estimates_are_right_in_the_mean_for_every_kind_of_region(n, mu, steps, replicas):
  dtypes = "float32", "bfloat16"
  params = {dtype: dict.fromkeys(kinds(n), jnp.zeros((n, n), dtype)) for dtype in dtypes}
  every = dict.fromkeys(dtypes, kinds(n))
  signal, noise, sizes = measured(every, params, mu, 1.0, steps, replicas)
  assert len(sizes) == 2 * 13 and sizes.max() == n * n and sizes.min() == n * n // 4
  np.testing.assert_allclose(signal, mu**2 * sizes, rtol=0.05)
  np.testing.assert_allclose(noise, sizes, rtol=0.05)
  np.testing.assert_allclose(noise / signal, np.full(len(sizes), mu**-2), rtol=0.05)


@pytest.mark.ci
def test_neither_numerator_nor_denominator_is_biased_where_there_is_little_signal():
  signal, noise, _ = measured(2, jnp.zeros(1000), 0.0, 1.0, 4000)
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
    done = groups(state)[0].updates
    _, state = tx.update(1 / jnp.sqrt(scale) + noise, state)
    group = groups(state)[0]
    at = jnp.where(group.updates > done, done, updates)
    return t + 1, state, lengths.at[at].set(group.period, mode="drop")

  start = jnp.int32(0), tx.init(params), jnp.zeros(updates, jnp.int32)
  return jax.lax.while_loop(lambda c: groups(c[1])[0].updates < updates, step, start)[2]


@pytest.mark.parametrize("scale", [4.5, 45.0, 450.0, pytest.param(4500.0, marks=pytest.mark.ci)])
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
    return state, groups(state)[0].period

  state = tx.init(jnp.zeros(8))
  periods = jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(jax.random.key(1), 600))[1])
  found = np.asarray(periods(state))
  found = found[found > 0]
  assert found.min() >= low and found.max() <= high


@pytest.mark.parametrize("value", [0.0, 1.0, jnp.nan])
def test_noise_scale_of_degenerate_gradients(value):
  tx = oc.noise_scale(4)
  state, update = tx.init(jnp.zeros(3)), jax.jit(tx.update)
  for _ in range(8):
    updates, state = update(jnp.full(3, value), state)
    np.testing.assert_array_equal(updates, jnp.full(3, value))
  assert all(np.isfinite(x).all() for x in groups(state)[0].estimate)
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
