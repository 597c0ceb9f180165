"""Late phases, the compensated learning rate, metrics and pictures."""

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optax
import oracle
import pytest
from states import groups

import optax_cadence as oc

mpl.use("agg")

PARAMS = {"body": jnp.zeros((4, 4)), "head": jnp.zeros(3)}
EVERY = {"body": 4, "head": 1}


def fired(every, steps, params=PARAMS):
  """For each group the micro-steps at which it fires, and the sums fed and applied."""
  tx = oc.cadence(optax.sgd(1.0), every, accumulate="sum")
  rng = np.random.default_rng(0)
  grads = jax.tree.map(
    lambda p: jnp.asarray(rng.integers(-8, 9, (steps, *p.shape)), jnp.float32), params
  )

  @jax.jit
  def run():
    def step(carry, g):
      params, state = tx.apply(*carry, g)
      return (params, state), [group.updates for group in groups(state)]

    (found, state), counts = jax.lax.scan(step, (params, tx.init(params)), grads)
    updates, _ = tx.flush(state, found)
    return optax.apply_updates(found, updates), counts

  found, counts = run()
  at = [(np.flatnonzero(np.diff(np.asarray(c), prepend=0)) + 1).tolist() for c in counts]
  fed = jax.tree.map(lambda p, g: p - g.sum(0), params, grads)
  return at, fed, found


SCHEMES = {
  "late": oc.late(6, EVERY, before=2),
  "late, by depth": oc.late(5, lambda _: oc.by_depth({"body": 0, "head": 1}, input=4), before=3),
  "late grid": oc.late(3, {"body": oc.quadrants([[1, 2], [4, 8]]), "head": 2}, before=2),
  "ramp": oc.ramp(2, 12, {"body": 8, "head": 1}),
  "falling": oc.ramp(0, 12, {"body": 1, "head": 2}, before=8),
  "policy": oc.each_layer(oc.until_certain(0.3, 2, 7)),
  "settled": oc.each_layer(oc.as_settled(2, 7)),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_gradient_is_lost_or_counted_twice_when_a_period_changes(scheme):
  at, fed, found = fired(SCHEMES[scheme], 23)
  # Sums of small integers are exact, so that every single gradient tells.
  jax.tree.map(np.testing.assert_array_equal, found, fed)
  assert any(len(set(np.diff(times))) > 1 for times in at)


def test_late_changes_between_windows():
  at, _, _ = fired(oc.late(5, {"body": 4, "head": 1}, before=3), 16)
  assert at == [[3, 6, 10, 14], [3, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]]


def test_ramp_grows_by_equal_factors():
  at, _, _ = fired(oc.ramp(0, 12, 8), 40)
  gaps = np.diff([0, *at[0]]).tolist()
  assert gaps[0] == 1 and gaps[-1] == 8 and gaps == sorted(gaps)


def test_equal_periods_share_a_group():
  params = {"a": jnp.zeros(2), "b": jnp.zeros(2), "c": jnp.zeros(2)}
  tx = oc.cadence(optax.sgd(1.0), oc.late(4, {"a": 4, "b": 4, "c": 2}))
  assert len(groups(tx.init(params))) == 2


# --------------------------------------------------------------------------- learning rate


@pytest.mark.parametrize(("rule", "power"), [("sqrt", 0.5), ("linear", 1.0)])
def test_updates_are_scaled_by_the_actual_length(rule, power):
  inner = optax.chain(optax.sgd(1.0), oc.scale_by_cadence(rule, base=2))
  tx = oc.cadence(inner, {"body": oc.Every(4, offset=3), "head": 2})
  state, update = tx.init(PARAMS), jax.jit(tx.update)
  ones = jax.tree.map(jnp.ones_like, PARAMS)
  lengths = {"body": {3: 3, 7: 4, 11: 4}, "head": dict.fromkeys(range(2, 14, 2), 2)}
  for t in range(1, 14):
    updates, state = update(ones, state, PARAMS)
    for name, u in updates.items():
      expected = -((lengths[name].get(t, 0) / 2) ** power)
      np.testing.assert_allclose(u, np.full(u.shape, expected), rtol=1e-6)
  updates, _ = tx.flush(state, PARAMS)
  np.testing.assert_allclose(updates["body"], np.full((4, 4), -((2 / 2) ** power)), rtol=1e-6)
  np.testing.assert_allclose(updates["head"], np.full(3, -((1 / 2) ** power)), rtol=1e-6)


def test_skipped_microbatches_do_not_scale():
  inner = optax.chain(optax.sgd(1.0), oc.scale_by_cadence("linear"))
  tx = oc.cadence(inner, 3, nonfinite="skip")
  state, ones, update = tx.init(PARAMS), jax.tree.map(jnp.ones_like, PARAMS), jax.jit(tx.update)
  for t in range(3):
    grads = ones if t else ones | {"head": jnp.full(3, jnp.nan)}
    updates, state = update(grads, state, PARAMS)
  np.testing.assert_allclose(updates["body"], np.full((4, 4), -3.0))
  np.testing.assert_allclose(updates["head"], np.full(3, -2.0))


def test_the_scale_works_through_masks_parts_and_policies():
  inner = optax.chain(
    oracle.relaxed(optax.sgd(1.0)),
    optax.masked(oc.scale_by_cadence("linear"), {"body": True, "head": False}),
  )
  tx = oc.cadence(inner, oc.until_certain(1.0, 3, 8))
  state, ones, update = tx.init(PARAMS), jax.tree.map(jnp.ones_like, PARAMS), jax.jit(tx.update)
  for _ in range(3):
    updates, state = update(ones, state, PARAMS)
  np.testing.assert_allclose(updates["body"], np.full((4, 4), -3.0))
  np.testing.assert_allclose(updates["head"], np.full(3, -1.0))
  parts = oc.cadence(oc.scale_by_cadence("linear"), {"body": oc.quadrants([[2, 2], [2, 2]])})
  params = {"body": jnp.zeros((4, 4))}
  state = parts.init(params)
  for _ in range(2):
    updates, state = parts.update({"body": jnp.ones((4, 4))}, state, params)
  np.testing.assert_allclose(updates["body"], np.full((4, 4), 2.0))


def test_outside_of_a_cadence_a_window_is_one_gradient_long():
  tx = oc.scale_by_cadence("linear", base=4)
  updates, _ = tx.update(PARAMS | {"head": jnp.ones(3)}, tx.init(PARAMS))
  np.testing.assert_allclose(updates["head"], np.full(3, 0.25))


def test_a_rebuilt_tree_is_an_error_that_names_both():
  inner = optax.flatten(oc.scale_by_cadence())
  tx = oc.cadence(inner, 2)
  expected = "scale_by_cadence: expected tensors of the cadence, 'body'"
  with pytest.raises(ValueError, match=expected):
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)


# --------------------------------------------------------------------------------- metrics


def trained(every, steps=9, **options):
  tx = optax.chain(optax.clip(10.0), oc.cadence(optax.sgd(0.1), every, **options))
  state, rng = tx.init(PARAMS), np.random.default_rng(0)
  update = jax.jit(tx.update)
  for _ in range(steps):
    grads = jax.tree.map(lambda p: jnp.asarray(1 + rng.normal(size=p.shape), jnp.float32), PARAMS)
    _, state = update(grads, state, PARAMS)
  return state


KEYS = ("period", "updates", "skipped", "noise_scale", "snr")


def test_metrics_name_every_region_by_its_path():
  policy = oc.until_certain(0.5, 2, 4)
  found = oc.metrics(trained({"body": oc.quadrants([[policy, 2], [policy, 1]]), "head": 4}))
  names = ("body/0", "body/1", "body/2", "body/3", "head")
  assert list(found) == ["micro_step", *(f"{name}/{key}" for name in names for key in KEYS)]
  assert all(np.ndim(value) == 0 for value in found.values())
  assert found["micro_step"] == 9
  periods = [int(found[f"{name}/period"]) for name in names]
  assert 2 <= periods[0] == periods[1] <= 4 and periods[2:] == [2, 1, 4]
  assert [found[f"{name}/updates"] for name in names[2:]] == [4, 9, 2]
  measured = [np.isfinite([found[f"{name}/{key}"] for key in KEYS[3:]]).all() for name in names]
  assert measured == [True, True, False, False, False]


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("accumulate", ["mean", "latest"])
def test_every_kind_of_group_has_every_value(accumulate, nonfinite):
  every = {"body": oc.Every(4, offset=3), "head": 1}
  for cadence in (every, every | {"head": oc.Every(lambda t: 1 + t // 3)}):
    found = oc.metrics(trained(cadence, 9, accumulate=accumulate, nonfinite=nonfinite))
    assert list(found) == ["micro_step", *(f"{n}/{key}" for n in PARAMS for key in KEYS)]
    assert found["body/period"] == 4 and found["body/updates"] == 2
    assert found["body/skipped"] == found["head/skipped"] == 0
    assert np.isnan(found["head/snr"]) and np.isnan(found["head/noise_scale"])
  # Windows of the schedule: 1, 1, 1, 2 from 3 on, 2 from 5 on, 3 from 7 on.
  assert found["head/period"] == 3 and found["head/updates"] == 5


def test_a_noise_scale_beside_a_cadence_fills_in_what_that_does_not_measure():
  tx = optax.chain(oc.noise_scale(2), oc.cadence(optax.sgd(0.1), {"body": 4, "head": 1}))
  state, rng, update = tx.init(PARAMS), np.random.default_rng(0), jax.jit(tx.update)
  for _ in range(4):
    grads = jax.tree.map(lambda p: jnp.asarray(1 + rng.normal(size=p.shape), jnp.float32), PARAMS)
    _, state = update(grads, state, PARAMS)
  found = oc.metrics(state)
  assert list(found) == ["micro_step", *(f"{n}/{key}" for n in PARAMS for key in KEYS)]
  for name, period in (("body", 4), ("head", 1)):
    np.testing.assert_allclose(found[f"{name}/snr"], period / found[f"{name}/noise_scale"])
  apart = optax.chain(oc.noise_scale({"body": oc.channels([2, 4]), "head": 2}), oc.cadence(tx, 1))
  names = {name.rsplit("/", 1)[0] for name in oc.metrics(apart.init(PARAMS)) if "/" in name}
  assert names == {"body", "head", "body/0", "body/1"}


def test_two_cadences_of_one_parameter_have_names_of_their_own():
  tx = optax.chain(oc.cadence(optax.identity(), 2), oc.cadence(optax.sgd(0.1), 4))
  found = oc.metrics(tx.init(jnp.zeros(3)))
  assert found["params/period"] == 2 and found["params#2/period"] == 4


def test_metrics_count_skipped_microbatches():
  tx = oc.cadence(
    optax.sgd(0.1), {"body": oc.until_certain(0.5, 2, 4), "head": 1}, nonfinite="skip"
  )
  state, ones = tx.init(PARAMS), jax.tree.map(jnp.ones_like, PARAMS)
  _, state = jax.jit(tx.update)(ones | {"head": jnp.full(3, jnp.nan)}, state, PARAMS)
  found = oc.metrics(state)
  assert found["body/skipped"] == 0 and found["head/skipped"] == 1


def test_metrics_are_the_same_inside_a_program():
  state = trained(oc.until_certain(0.5, 2, 4))
  inside, outside = jax.jit(oc.metrics)(state), oc.metrics(state)
  assert inside.keys() == outside.keys()
  for name, value in outside.items():
    np.testing.assert_allclose(inside[name], value, rtol=1e-6)


def test_metrics_take_one_transfer(monkeypatch):
  state, taken = trained(oc.each_layer(oc.until_certain(0.5, 2, 4))), []
  get = jax.device_get
  monkeypatch.setattr(
    jax, "device_get", lambda tree: taken.extend(jax.tree.leaves(tree)) or get(tree)
  )
  found = oc.metrics(state)
  assert len(taken) == 1 and taken[0].size < 40
  assert not any(isinstance(value, jax.Array) for value in found.values())


def test_the_picture_has_a_line_for_every_region():
  history = [oc.metrics(trained(oc.until_certain(0.5, 2, 4), steps)) for steps in (1, 5, 9)]
  axes = oc.plot_confidence(history)
  assert [len(ax.lines) for ax in axes] == [2, 2]
  assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["body", "head"]
  plt.close(axes[0].figure)
  axes = oc.plot_confidence([oc.metrics(trained(4, steps)) for steps in (4, 8)])
  assert [len(ax.lines) for ax in axes] == [2]
  plt.close(axes[0].figure)
