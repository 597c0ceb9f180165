"""`oc.metrics` by group: the few numbers that a training loop logs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import small_tree

import optax_cadence as oc

EVERY = {"body": {"bias": 4, "kernel": oc.channels([1, 2, 1, 2, 1, 2])}, "head": 2}


def with_rate(schedule):
  inner = optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)
  return oracle.relaxed(optax.chain(oc.gradient_norm(), inner))


def trained(tx, steps, params=small_tree.PARAMS):
  state, update = tx.init(params), jax.jit(tx.update)
  for grads in small_tree.BATCHES[:steps]:
    _, state = update(grads, state, params)
  return state


def test_it_has_what_is_logged_of_every_group():
  tx = oc.cadence(with_rate(lambda count: 1.0 / (1 + count)), EVERY)
  found = oc.metrics(trained(tx, 6), by="group")
  of_a_group = ["length", "updates", "skipped", "learning_rate", "gradient_norm"]
  names = [f"{name}/{key}" for name in ("4", "1", "2") for key in of_a_group]
  assert set(found) == {"micro_step", "learning_rate", *names}
  assert all(np.shape(value) == () for value in found.values())
  assert {name: found[f"{name}/updates"] for name in "421"} == {"4": 1, "2": 3, "1": 6}
  assert found["4/learning_rate"] == 1.0
  assert found["2/learning_rate"] == pytest.approx(1 / 3)
  assert found["learning_rate"] == found["1/learning_rate"] == pytest.approx(1 / 6)


def test_the_norm_is_that_of_the_mean_of_the_last_window():
  found = oc.metrics(trained(oc.cadence(with_rate(0.1), EVERY), 7), by="group")
  biases = [grads["body"]["bias"] for grads in small_tree.BATCHES[:4]]
  expected = np.linalg.norm(np.mean(biases, axis=0))
  assert expected > 0
  np.testing.assert_allclose(found["4/gradient_norm"], expected, rtol=1e-6)


def test_skipped_is_of_the_region_with_the_most():
  tx = oc.cadence(optax.sgd(0.1), {"body": 4, "head": 4}, nonfinite="skip")
  bad = {**small_tree.BATCHES[0], "head": jnp.full(3, jnp.nan)}
  state = tx.init(small_tree.PARAMS)
  for grads in (bad, small_tree.BATCHES[1], bad):
    _, state = tx.update(grads, state)
  assert oc.metrics(state, by="group")["4/skipped"] == 2


def test_it_is_the_same_inside_of_a_program_and_of_many():
  tx = oc.cadence(with_rate(0.1), EVERY, nonfinite="skip")
  state = trained(tx, 5)
  inside, outside = (
    jax.jit(lambda s: oc.metrics(s, by="group"))(state),
    oc.metrics(state, by="group"),
  )
  assert inside.keys() == outside.keys()
  for name, value in outside.items():
    np.testing.assert_allclose(inside[name], value, rtol=1e-6)
  many = jax.tree.map(lambda x: jnp.stack([x, x]), state)
  for name, value in oc.metrics(many, by="group").items():
    np.testing.assert_array_equal(value, [outside[name]] * 2)


def test_errors_say_what_is_missing():
  with pytest.raises(ValueError, match="expected a cadence in the state, found EmptyState"):
    oc.metrics(optax.EmptyState(), by="group")
  with pytest.raises(ValueError, match="'region' or 'group', found 'leaf'"):
    oc.metrics(oc.cadence(optax.sgd(0.1), 2).init(jnp.ones(2)), by="leaf")
