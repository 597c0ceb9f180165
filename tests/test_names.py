"""Names of parameters: two that read the same when joined by slashes are still two."""

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest

import optax_cadence as oc

mpl.use("agg")

SGD = optax.sgd(1.0)
# In the order of the tree "a" stands before "a/b".
PARAMS = {"a/b": jnp.ones((2, 4)), "a": {"b": jnp.ones((3, 4))}}
NAMES = ["a/b", "a/b#2"]


def updated(tx, steps=1):
  """Which parameters have an update at each micro-step."""
  state, due = tx.init(PARAMS), []
  for _ in range(steps):
    updates, state = tx.update(PARAMS, state, PARAMS)
    due.append((bool(updates["a"]["b"].any()), bool(updates["a/b"].any())))
  return due, state


@pytest.mark.parametrize(
  "every",
  [
    {"a": 1, "a/b": 2},
    oc.by_path({"a/b#2": 2, "a": 1}),
    oc.by_path({"*2": 2}, default=1),
    oc.late(0, {"a": 1, "a/b": 2}),
    oc.by_depth({"a": {"b": 1}, "a/b": 0}, output=1, input=2),
  ],
)
def test_each_has_its_own_cadence(every):
  due, state = updated(oc.cadence(SGD, every), 2)
  assert due == [(True, False), (True, True)]
  found = oc.metrics(state)
  assert [int(found[f"{name}/updates"]) for name in NAMES] == [2, 1]


def test_one_cadence_for_both():
  for every in (2, oc.by_path({"*": 2}), oc.by_path({"a/b": 2}), oc.by_path({"a": 2})):
    due, state = updated(oc.cadence(SGD, every), 2)
    assert due == [(False, False), (True, True)]
    assert state.regions.names == {"2": NAMES}


def test_a_slash_within_a_key_ends_a_prefix():
  tree = {"mlp/~/linear_0": {"w": 0}, "mlp2": {"w": 0}}
  found = oc.by_path({"mlp/~/linear_0/w": 8}, default=1)(tree)
  assert found == {"mlp/~/linear_0": {"w": 8}, "mlp2": {"w": 1}}
  found = oc.by_path({"mlp": 4}, default=1)(tree)
  assert found == {"mlp/~/linear_0": {"w": 4}, "mlp2": {"w": 1}}


def test_metrics_and_noise_scales_go_by_the_same_names():
  measure = oc.noise_scale({"a": 2, "a/b": 3})
  tx = optax.chain(measure, oc.cadence(SGD, {"a": 3, "a/b": 2}))
  _, state = updated(tx, 2)
  found = oc.metrics(state)
  assert {key.rpartition("/")[0] for key in found} == {"", *NAMES}
  assert [int(found[f"{name}/period"]) for name in NAMES] == [3, 2]
  # Only the first is measured after two micro-steps.
  assert [bool(np.isnan(found[f"{name}/noise_scale"])) for name in NAMES] == [False, True]


def test_the_numbers_of_bands_stay_apart_from_keys():
  params = {"w": jnp.ones(4), "w/0": jnp.ones(4)}
  state = oc.cadence(SGD, {"w": oc.channels([1, 2]), "w/0": 2}).init(params)
  assert state.regions.names == {"1": ["w/0"], "2": ["w/1", "w/0#2"]}
  assert len(oc.metrics(state)) == 1 + 3 * 5


def test_tables_and_pictures_name_both():
  tx = oc.cadence(SGD, 2)
  assert oc.describe(tx, PARAMS).groups[0].leaves == tuple(NAMES)
  mask = np.arange(8).reshape(2, 4) % 3 + 1
  masks = {"a/b": mask, "a": {"b": np.arange(12).reshape(3, 4) % 5 + 1}}
  assert list(oc.describe(oc.cadence(SGD, masks), PARAMS).masks) == NAMES
  ax = oc.plot_score(tx, PARAMS, 4)
  assert [text.get_text() for text in ax.get_yticklabels()] == NAMES
  plt.close(ax.figure)


def test_each_layer_is_named():
  params = jax.tree.map(lambda x: {"w": x}, PARAMS)
  state = oc.cadence(SGD, oc.each_layer(oc.until_certain(1.0, 1, 4))).init(params)
  assert list(state.regions.names.values()) == [["a/b/w"], ["a/b/w#2"]]
  assert [name.partition(" of ")[2] for name in state.regions.names] == NAMES


def test_forward_order_places_both():
  fn = lambda p, x: x @ p["a"]["b"].T @ p["a"]["b"] @ p["a/b"].T
  assert oc.forward_order(fn, PARAMS, jnp.ones((5, 4))) == {"a": {"b": 0}, "a/b": 1}
  with pytest.raises(ValueError, match=r"\['a/b#2'\]"):
    oc.forward_order(lambda p, x: x @ p["a"]["b"].T, PARAMS, jnp.ones((5, 4)))


TWO = oc.cadence(SGD, 2)


@pytest.mark.parametrize(
  "call",
  [
    lambda: oc.cadence(SGD, {"a": 1, "a/b": oc.stacked([1])}).init(PARAMS),
    lambda: oc.cadence(SGD, {"a": {"b": 1}, "a/b": 0}),
    lambda: oc.cadence(SGD, {"a": 1}).init(PARAMS),
    lambda: TWO.update(PARAMS | {"a/b": jnp.ones(3)}, TWO.init(PARAMS), PARAMS),
    lambda: oc.by_depth({"a": {"b": 1}, "a/b": 0.5}),
    lambda: oc.noise_scale({"a": {"b": 2}, "a/b": 1}).init(PARAMS),
  ],
)
def test_errors_name_the_one_at_fault(call):
  with pytest.raises(ValueError, match="'a/b#2'"):
    call()
