"""When a region is due: static and dynamic periods, and how windows follow one another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from states import groups

import optax_cadence as oc


def due_at(every, steps, params=None, **jit):
  """Micro-steps at which the (first leaf of the) tree moves."""
  params = {"w": jnp.float32(0)} if params is None else params
  tx = oc.cadence(optax.sgd(1.0), every)
  update = jax.jit(tx.update)
  state, found = tx.init(params), []
  for t in range(1, steps + 1):
    updates, state = update(jax.tree.map(jnp.ones_like, params), state)
    if jax.tree.leaves(updates)[0].any():
      found.append(t)
  return found


@pytest.mark.parametrize(
  ("every", "expected"),
  [
    (1, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    (4, [4, 8]),
    (oc.Every(4, offset=1), [1, 5, 9]),
    (oc.Every(4, offset=0), [4, 8]),
    (np.int64(3), [3, 6, 9]),
    (np.array(3), [3, 6, 9]),
  ],
)
def test_static_periods(every, expected):
  assert due_at({"w": every}, 9) == expected


def test_a_schedule_is_read_at_the_start_of_each_window():
  # The change at 5 falls into the window that began after 4: it is finished first.
  schedule = lambda t: jnp.where(t < 5, 4, 1)
  assert due_at(oc.Every(schedule), 11) == [4, 8, 9, 10, 11]
  assert oc.Every(schedule).score(11).nonzero()[0].tolist() == [3, 7, 8, 9, 10]


def test_optax_schedules_serve_as_periods():
  ramp = optax.linear_schedule(1, 4, 6)
  assert due_at(oc.Every(ramp), 13) == [1, 3, 5, 9, 13]
  assert (oc.Every(ramp).score(13).nonzero()[0] + 1).tolist() == [1, 3, 5, 9, 13]


def test_a_schedule_below_one_counts_as_one():
  assert due_at(oc.Every(lambda t: t * 0), 3) == [1, 2, 3]


def test_traced_period_equals_the_static_one():
  def run(k):
    tx = oc.cadence(optax.sgd(1.0), k)
    params = jnp.zeros(3)

    def step(carry, t):
      params, state = carry
      params, state = tx.apply(params, state, jnp.full(3, t))
      return (params, state), params

    times = jnp.arange(1.0, 13.0)
    return jax.lax.scan(step, (params, tx.init(params)), times)[1]

  periods = np.array([1, 2, 3, 5])
  swept = jax.jit(jax.vmap(run))(jnp.asarray(periods))
  for k, found in zip(periods, swept, strict=True):
    np.testing.assert_array_equal(found, run(int(k)))


def test_traced_periods_in_a_grid():
  def run(k):
    tx = oc.cadence(optax.sgd(1.0), {"w": oc.channels(k)})
    params = {"w": jnp.zeros(2)}
    state = tx.init(params)
    for _ in range(4):
      params, state = tx.apply(params, state, {"w": jnp.ones(2)})
    return params["w"]

  found = jax.jit(jax.vmap(run))(jnp.array([[1, 2], [4, 1]]))
  np.testing.assert_array_equal(found, [[-4, -2], [-1, -4]])


def test_the_same_schedule_in_several_places_is_one_group():
  one, other = (lambda t: 2), (lambda t: 2)
  params = {"a": jnp.zeros(2), "b": jnp.zeros(2), "c": jnp.zeros(2)}
  tx = oc.cadence(optax.sgd(1.0), {"a": one, "b": oc.Every(one), "c": other})
  assert len(groups(tx.init(params))) == 2


def test_regions_of_one_period_and_offset_are_one_group():
  params = {"a": jnp.zeros(2), "b": jnp.zeros((4, 4)), "c": jnp.zeros(2)}
  every = {"a": 2, "b": oc.quadrants([[2, 2], [2, 4]]), "c": oc.Every(2, offset=1)}
  assert len(groups(oc.cadence(optax.sgd(1.0), every).init(params))) == 3


@pytest.mark.parametrize(
  ("every", "cycle"),
  [
    (1, 1),
    (8, 8),
    ({"a": 4, "b": 6}, 12),
    ({"a": oc.channels([2, 3]), "b": np.array([5, 1])}, 30),
    (oc.Every(3, offset=2), 3),
    ({"a": 2, "b": lambda t: 2}, None),
    (oc.Every(lambda t: 2), None),
  ],
)
def test_cycle(every, cycle):
  assert oc.cadence(optax.sgd(1.0), every).cycle == cycle


def test_cycle_of_a_builder_is_known_after_init():
  tx = oc.cadence(optax.sgd(1.0), oc.by_path({"a": 4, "b": 6}))
  tx.init({"a": jnp.zeros(1), "b": jnp.zeros(1)})
  assert tx.cycle == 12
