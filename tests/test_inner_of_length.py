"""An inner optimizer that is a function of the window's length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import optax_cadence as oc

PARAMS = {"a": jnp.ones(3), "b": jnp.ones((4, 6)), "c": jnp.ones(2)}
MASK = np.random.default_rng(0).choice([1, 2, 4], (4, 6))


def inner(n):
  """Half-lives that are counted in micro-batches, and a learning rate that follows the window."""
  return oracle.relaxed(optax.adamw(0.01 * n**0.5, b1=0.9**n, b2=0.99**n, weight_decay=0.1))


def descent(n):
  return optax.sgd(jnp.asarray(n, jnp.float32))


def grads_of(t, like=PARAMS):
  rng = np.random.default_rng(t)
  return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), like)


def trained(tx, steps, params=PARAMS, way="update"):
  state, update = tx.init(params), jax.jit(getattr(tx, way))
  for t in range(1, steps + 1):
    if way == "apply":
      params, state = update(params, state, grads_of(t))
    else:
      updates, state = update(grads_of(t), state, params)
      params = optax.apply_updates(params, updates)
  return params, state


def by_hand(every, steps):
  """One cadence for each parameter, with the optimizer of its period."""
  result = {}
  for name, k in every.items():
    tx, params = oc.cadence(inner(k), k), {name: PARAMS[name]}
    state = tx.init(params)
    for t in range(1, steps + 1):
      updates, state = tx.update({name: grads_of(t)[name]}, state, params)
      params = optax.apply_updates(params, updates)
    result |= params
  return result


def close(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("way", ["update", "apply"])
def test_a_group_has_the_optimizer_of_its_period(way):
  every = {"a": 4, "b": 2, "c": 1}
  close(trained(oc.cadence(inner, every), 9, way=way)[0], by_hand(every, 9))


def test_parts_and_masks_have_that_of_theirs():
  """Against a parameter for each part, in which the others are as they were."""
  tx = oc.cadence(inner, {"a": 2, "b": MASK, "c": oc.channels([1, 2])})
  assert tx.init(PARAMS).masks.inner_state != ()
  params, _ = trained(tx, 8)
  for k in (1, 2, 4):
    alone, _ = trained(oc.cadence(inner, k), 8)
    close(params["b"][k == MASK], alone["b"][k == MASK])
  for i, k in enumerate((1, 2)):
    close(params["c"][i], trained(oc.cadence(inner, k), 8)[0]["c"][i])


def test_optimizers_that_differ_in_kind_train_vectors_under_a_mask():
  def either(n):
    return oracle.relaxed(optax.adam(0.1, nesterov=n > 1))

  tx = oc.cadence(either, {"a": 2, "b": MASK, "c": 1})
  params, _ = trained(tx, 8)
  for k in (1, 2, 4):
    alone, _ = trained(oc.cadence(either(k), k), 8)
    close(params["b"][k == MASK], alone["b"][k == MASK])


DYNAMIC = {
  "a schedule": oc.Every(lambda t: jnp.where(t < 4, 2, 3)),
  "a policy": oc.until_certain(1e9, 2, 3),
}


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("every", DYNAMIC.values(), ids=DYNAMIC)
def test_a_length_that_varies_is_the_micro_steps_in_the_window(every, nonfinite):
  """With plain descent the learning rate is all there is to see."""
  tx = oc.cadence(descent, every, nonfinite=nonfinite)
  state, total = tx.init(PARAMS), PARAMS
  update = jax.jit(tx.update)
  for _ in range(7):
    updates, state = update(jax.tree.map(jnp.ones_like, PARAMS), state, total)
    total = optax.apply_updates(total, updates)
  # Every window moves by its length times a mean of one: by the micro-steps there were.
  done = 7 if every is DYNAMIC["a schedule"] else 6
  close(total, jax.tree.map(lambda p: p - done, PARAMS))


@pytest.mark.parametrize("wrap", [jax.jit, lambda fn: fn], ids=["jit", "eager"])
def test_under_a_mask_a_length_that_varies_is_that_of_the_entry(wrap):
  tx, params = oc.cadence(descent, oc.late(2, MASK)), PARAMS["b"]
  state, apply = tx.init(params), wrap(tx.apply)
  assert state.regions.masked
  for _ in range(6):  # after two windows of one micro-step those of one, two and four
    params, state = apply(params, state, jnp.ones_like(params))
  close(params, PARAMS["b"] - 6)


def test_flush_has_the_optimizer_of_the_period_of_a_static_group():
  tx = oc.cadence(descent, 4)
  state = tx.update(grads_of(1), tx.init(PARAMS), PARAMS)[1]
  close(tx.flush(state, PARAMS)[0], jax.tree.map(lambda g: -4 * g, grads_of(1)))


def test_periods_in_a_batch():
  def run(period):
    tx = oc.cadence(descent, period)
    state, params = tx.init(PARAMS), PARAMS
    for _ in range(4):
      updates, state = tx.update(PARAMS, state, params)
      params = optax.apply_updates(params, updates)
    return params

  many = jax.jit(jax.vmap(run))(jnp.array([1, 2, 4]))
  close(many, jax.tree.map(lambda p: jnp.stack([p * 0 - 3] * 3), PARAMS))


def test_what_the_state_is_made_of_is_known_without_parameters():
  tx = oc.cadence(inner, {"a": 4, "b": MASK, "c": 1})
  state = tx.init(PARAMS)
  doubled = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, state)
  assert jax.tree.structure(doubled) == jax.tree.structure(state)
  close(doubled.groups["4"].inner_state[0].mu["a"], jnp.ones(3))


def test_a_schedule_inside_counts_micro_steps():
  def rising(n):
    return optax.sgd(lambda t: jnp.float32(n) * t.astype(jnp.float32))

  tx = oc.cadence(rising, {"a": 4, "b": 2, "c": 1}, clock="micro_steps")
  state, ones = tx.init(PARAMS), jax.tree.map(jnp.ones_like, PARAMS)
  for _ in range(4):
    updates, state = tx.update(ones, state, PARAMS)
  assert [float(u.ravel()[0]) for u in updates.values()] == [-12.0, -6.0, -3.0]


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (lambda n: None, "found a function that returns None for 1"),
    (lambda n: optax.sgd(0.1) if n == 1 else "adam", "returns 'adam' for 4"),
    (optax.adam, "or a function of a window's length that returns one, found .*adam"),
    (functools.partial(optax.adam, b1=0.5), "or a function of a window's length"),
    (5, "or a function of a window's length that returns one, found 5"),
  ],
)
def test_errors(given, message):
  with pytest.raises(ValueError, match=message):
    oc.cadence(given, 4).init(PARAMS)
