"""Micro-batches that a predicate leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import optax_cadence as oc

PARAMS = {"a": jnp.zeros((2, 4)), "b": jnp.zeros(3)}
RANDOM = np.array([[2, 3, 2, 2], [3, 2, 3, 3]])


def of_size(a, b):
  return {"a": jnp.full((2, 4), a), "b": jnp.full(3, b)}


def too_large(grads, params):
  assert jax.tree.structure(grads) == jax.tree.structure(params)
  return jnp.abs(grads["a"]).max() > 100


def by_leaf(grads, params):
  return jax.tree.map(lambda g: jnp.abs(g).max() > 100, grads)


def trained(batches, way, **settings):
  tx = oc.cadence(optax.sgd(1.0), settings.pop("every", {"a": 2, "b": 3}), **settings)
  params, state = PARAMS, tx.init(PARAMS)
  step = jax.jit(oc.training_step(lambda p, g: sum(map(jnp.vdot, leaves(p), leaves(g))), tx))
  for grads in batches:
    if way == "update":
      updates, state = jax.jit(tx.update)(grads, state, params)
      params = optax.apply_updates(params, updates)
    elif way == "apply":
      params, state = tx.apply(params, state, grads)
    else:
      params, state, _ = step(params, state, grads)
  return params, state


leaves = jax.tree.leaves
BATCHES = [of_size(1.0, 2.0), of_size(1000.0, 4.0), of_size(3.0, 6.0), of_size(5.0, 8.0)]


@pytest.mark.parametrize("way", ["update", "apply", "step"])
def test_it_is_left_out_of_the_mean_and_counted(way):
  params, state = trained(BATCHES, way, skip=too_large)
  np.testing.assert_array_equal(params["a"], np.full((2, 4), -1.0 - 4.0))
  np.testing.assert_array_equal(params["b"], np.full(3, -4.0))
  assert [int(group.skipped[0]) for group in state.groups.values()] == [1, 1]


@pytest.mark.parametrize("every", [{"a": 2, "b": 3}, {"a": oc.channels([2, 3]), "b": 3}])
def test_it_may_be_said_for_each_leaf(every):
  params, state = trained(BATCHES, "update", skip=by_leaf, every=every)
  np.testing.assert_array_equal(params["a"][:, :2], np.full((2, 2), -1.0 - 4.0))
  np.testing.assert_array_equal(params["b"], np.full(3, -4.0))
  found = oc.metrics(state)
  assert found["b/skipped"] == 0
  assert all(x == 1 for name, x in found.items() if name[0] == "a" and name.endswith("skipped"))


def test_entries_under_a_mask_are_left_out_too():
  params, _ = trained(BATCHES, "update", skip=by_leaf, every={"a": RANDOM, "b": 3})
  expected = np.where(RANDOM == 2, -1.0 - 4.0, -2.0)
  np.testing.assert_array_equal(params["a"], expected)


def test_beside_what_is_not_finite_and_weights():
  tx = oc.cadence(
    optax.sgd(1.0), 4, nonfinite="skip", weighted=True, skip=lambda grads, _: grads > 100
  )
  state = tx.init(jnp.zeros(()))
  for g, weight in ((1.0, 1.0), (jnp.nan, 5.0), (1000.0, 5.0), (5.0, 3.0)):
    updates, state = tx.update(jnp.float32(g), state, jnp.zeros(()), weight=weight)
  assert updates == -4.0
  assert state.groups["4"].skipped == 2


def test_as_multi_steps_skips():
  """The predicate of `optax.MultiSteps`; there a micro-batch left out does not move the window."""

  def skip(grads, params):
    with jax.numpy_dtype_promotion("standard"):
      return optax.skip_large_updates(grads, 0, params, 1e4)[0]

  inner = oracle.relaxed(optax.adamw(0.1))
  tx = oc.cadence(inner, 1, skip=skip)
  plain, state, expected = inner.init(PARAMS), tx.init(PARAMS), PARAMS
  params = PARAMS
  for grads in BATCHES:
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    if grads["a"].max() < 100:
      updates, plain = inner.update(grads, plain, expected)
      expected = optax.apply_updates(expected, updates)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), params, expected)
  assert state.groups["1"].updates == 3


@pytest.mark.parametrize(
  ("skip", "says"),
  [
    (lambda grads, params: 1, "what skip returns: expected a truth value, found 1"),
    (lambda grads, params: {"a": True}, "found none for 'b' among 'a'"),
    (lambda grads, params: {"a": True, "b": jnp.ones(3, bool)}, "what skip returns of 'b'"),
  ],
)
def test_what_it_returns_is_checked(skip, says):
  with pytest.raises(ValueError, match=says):
    trained(BATCHES[:1], "update", skip=skip)


@pytest.mark.parametrize(
  ("skip", "says"), [(True, "not a callable"), (optax.skip_not_finite, "missing a required arg")]
)
def test_it_is_a_function_of_gradients_and_parameters(skip, says):
  with pytest.raises(ValueError, match=f"skip must be a function .*{says}"):
    oc.cadence(optax.sgd(1.0), 2, skip=skip)
