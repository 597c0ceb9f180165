"""Tables and pictures say what the transformation does."""

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from states import groups

import optax_cadence as oc

mpl.use("agg")

PARAMS = {"body": jnp.zeros((4, 6)), "head": jnp.zeros(5, jnp.bfloat16)}


def transformation(**options):
  every = {"body": oc.quadrants([[1, 2], [4, 8]]), "head": 4}
  return oc.cadence(optax.sgd(1.0), every, **options)


def test_groups_account_for_every_parameter_and_byte():
  tx = transformation()
  description = oc.describe(tx, PARAMS, microbatch=16)
  assert [g.period for g in description.groups] == ["1", "2", "4", "8"]
  assert [g.parameters for g in description.groups] == [6, 6, 11, 6]
  assert [g.effective_batch for g in description.groups] == [16, 32, 64, 128]
  assert [g.share for g in description.groups] == [1, 1 / 2, 1 / 4, 1 / 8]
  assert description.groups[2].leaves == ("body", "head")
  for summary, group in zip(description.groups, groups(tx.init(PARAMS)), strict=True):
    held = sum(x.nbytes for x in jax.tree.leaves(group.accumulators))
    assert summary.accumulator_bytes == held


def test_latest_has_no_accumulator_and_the_batch_of_one_micro_step():
  summaries = oc.describe(transformation(accumulate="latest"), PARAMS, microbatch=16).groups
  assert {g.accumulator_bytes for g in summaries} == {0}
  assert {g.effective_batch for g in summaries} == {16}


def test_dynamic_periods_vary():
  tx = oc.cadence(optax.sgd(1.0), oc.Every(optax.linear_schedule(1, 8, 100)))
  description = oc.describe(tx, PARAMS)
  assert description.cycle is None
  assert "varies" in str(description) and "dynamic" in str(description)


def test_prints_as_a_table_with_aligned_columns():
  lines = str(oc.describe(transformation(), PARAMS)).splitlines()
  assert lines[0].split()[:2] == ["period", "leaves"]
  assert len({len(line) for line in lines[:5]}) == 1
  assert lines[6:] == [
    "cycle: 8 micro-steps",
    "training_step stores the gradient of body: regions that are no runs of layers",
    "training_step stores the gradient of head: a window in float32 of a parameter in bfloat16",
  ]


def test_describes_chains_and_shapes_without_computing():
  tx = oc.chain(optax.clip(1.0), transformation())
  shapes = jax.eval_shape(lambda: PARAMS)
  found, alone = oc.describe(tx, shapes), oc.describe(transformation(), PARAMS)
  assert (found.groups, found.cycle) == (alone.groups, alone.cycle)
  assert set(found.stored.values()) == {"transformations before the cadence"}


def test_the_score_has_a_row_for_every_region_and_a_mark_where_it_is_due():
  ax = oc.plot_score(transformation(), PARAMS, 16)
  labels = [text.get_text() for text in ax.get_yticklabels()]
  assert labels == ["body[0:2, 0:3]", "body[0:2, 3:6]", "body[2:4, 0:3]", "body[2:4, 3:6]", "head"]
  marks = [len(collection.get_paths()) for collection in ax.collections]
  assert marks == [16, 8, 4, 2, 4]
  plt.close(ax.figure)


def test_the_score_is_drawn_on_the_axes_given():
  figure, axes = plt.subplots()
  assert oc.plot_score(transformation(), PARAMS, 4, ax=axes) is axes
  plt.close(figure)


def test_a_trace_has_no_score():
  with pytest.raises(jax.errors.ConcretizationTypeError):
    jax.jit(lambda k: oc.Every(k).score(3))(2)


# Many states in one, as vmap makes them.

MEASURED = {
  "policy": (oc.until_certain(0.5, 2, 4), {}),
  "policy of updates": (oc.as_settled(1, 4), {}),
  "each layer": (oc.each_layer(oc.until_certain(0.5, 2, 4)), {"nonfinite": "skip"}),
  "grid": ({"body": oc.quadrants([[1, 2], [4, 8]]), "head": 4}, {"nonfinite": "skip"}),
  "mask": ({"body": np.arange(24).reshape(4, 6) % 5 + 1, "head": 2}, {"nonfinite": "skip"}),
  "latest": ({"body": 2, "head": 1}, {"accumulate": "latest"}),
  "schedule": (oc.Every(lambda t: 1 + t // 2), {}),
}


@pytest.mark.parametrize(
  ("every", "options"),
  [
    pytest.param(*case, id=name, marks=[pytest.mark.ci] * (name in ("grid", "policy")))
    for name, case in MEASURED.items()
  ],
)
def test_metrics_of_many_states_are_those_of_each(every, options):
  params = jax.tree.map(lambda p: p.astype(jnp.float32), PARAMS)
  tx = optax.chain(oc.noise_scale(2), oc.cadence(optax.sgd(0.1), every, **options))

  def train(seed):
    def step(state, key):
      bad = jnp.where(jax.random.uniform(key) < 0.3, jnp.nan, 1.0)
      draw = lambda p: bad * (1.0 + jax.random.normal(key, p.shape))
      return tx.update(jax.tree.map(draw, params), state, params)[1], None

    return jax.lax.scan(step, tx.init(params), jax.random.split(jax.random.key(seed), 7))[0]

  state = jax.jit(jax.vmap(jax.vmap(train)))(jnp.arange(6).reshape(2, 3))
  found = oc.metrics(state)
  assert all(value.shape == (2, 3) for value in found.values())
  inside = jax.jit(oc.metrics)(state)
  for i in np.ndindex(2, 3):
    expected = oc.metrics(jax.tree.map(lambda x: x[i], state))  # noqa: B023
    assert found.keys() == inside.keys() == expected.keys()
    for name, value in expected.items():
      np.testing.assert_array_equal(found[name][i], value)
      np.testing.assert_allclose(inside[name][i], value, rtol=1e-6)
  if "nonfinite" in options:
    assert len(np.unique(found["head/skipped"])) > 1
  assert len(np.unique(found["head/noise_scale"])) > 1


def test_a_picture_is_of_one_state():
  state = jax.vmap(oc.cadence(optax.sgd(0.1), 2).init)(jnp.zeros((3, 2)))
  history = [oc.metrics(state)]
  with pytest.raises(ValueError, match=r"of one state, found those of many, of shape \(3,\)"):
    oc.plot_confidence(history)
  one = [jax.tree.map(lambda x: x[0], entry) for entry in history]
  plt.close(oc.plot_confidence(one)[0].figure)
