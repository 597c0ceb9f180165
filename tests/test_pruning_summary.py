"""What is said about sparsity is what is in the parameters; and several prunes are read as one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import optax_cadence as oc
from optax_cadence import pruning


def tree(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
  return {"a": {"kernel": draw(16, 8), "bias": draw(8)}, "c": {"kernel": draw(7, 5)}}


def run(tx, steps=3, params=None):
  params = tree() if params is None else params
  state, update = tx.init(params), jax.jit(tx.update)
  for t in range(steps):
    updates, state = update(tree(t + 1), state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def zeros(x):
  return int((np.asarray(x) == 0).sum())


@pytest.mark.parametrize("place", ["last", "first", "before decay"])
def test_zeros_are_counted_in_the_parameters_and_the_masks_beside_them(place):
  prune = oc.prune(0.75, every=2)
  tx = {
    "last": optax.chain(optax.sgd(0.1), prune),
    "first": optax.chain(prune, optax.sgd(0.1)),
    "before decay": optax.chain(optax.sgd(0.1), prune, optax.add_decayed_weights(0.1)),
  }[place]
  params, state = run(tx)
  found = pruning.summary(params, state)
  assert list(found.leaves) == ["a/bias", "a/kernel", "c/kernel"]
  for name, x in (("a/kernel", params["a"]["kernel"]), ("c/kernel", params["c"]["kernel"])):
    leaf = found.leaves[name]
    assert (leaf.size, leaf.zeros, leaf.masked) == (x.size, zeros(x), round(0.75 * x.size))
    assert leaf.stray == leaf.masked - leaf.zeros
  assert found.sparsity == sum(map(zeros, jax.tree.leaves(params))) / 163
  assert (found.stray == 0) == (place == "last")
  assert ("prune must stand last" in str(found)) == (place != "last")


def test_leaves_that_are_not_pruned_are_shown_and_not_counted_among_the_pruned():
  params = tree()
  params["a"]["bias"] = params["a"]["bias"].at[:2].set(0)
  params, state = run(optax.chain(optax.sgd(0.0), oc.prune(0.75, every=1)), 1, params)
  found = pruning.summary(params, state)
  assert found.leaves["a/bias"] == (8, 2, 16.0, None, 0)
  assert (found.size, found.sparsity) == (163, (96 + 26) / 163)
  assert found.overall == (96 + 26 + 2) / 171
  lines = str(found).splitlines()
  first_words = [line.split()[0] for line in lines]
  assert first_words == ["leaf", "a/bias", "a/kernel", "c/kernel", "pruned", "all"]
  assert lines[1].split() == ["a/bias", "8", "25.00%", "-", "-"]


def test_averages_are_dense_until_they_are_masked_and_the_summary_says_both():
  tx = optax.chain(optax.sgd(0.1), oc.prune(0.75, every=2))
  average = tree()
  params, state, update = tree(), tx.init(tree()), jax.jit(tx.update)
  for t in range(4):
    updates, state = update(tree(t + 1), state, params)
    params = optax.apply_updates(params, updates)
    average = optax.incremental_update(params, average, 0.1)
  dense = pruning.summary(average, state)
  assert dense.sparsity == 0 and dense.stray == 122
  assert "pruning.masked(params, state)" in str(dense)
  sparse = pruning.summary(pruning.masked(average, state), state)
  assert sparse.stray == 0 and sparse.sparsity == 122 / 163


def test_after_shocks_which_leave_no_masks_all_leaves_count():
  tx = optax.chain(optax.sgd(0.0), oc.prune(0.5, every=1, hold=False))
  found = pruning.summary(*run(tx, 1))
  assert found.size == 171 and found.sparsity == (64 + 18) / 171
  assert all(leaf.masked is None for leaf in found.leaves.values())
  assert "all leaves" not in str(found)


def test_flops_of_no_leaf_are_an_error():
  params, state = run(oc.prune(0.5, every=1, where=lambda path, x: "a/k" in path), 1)
  assert pruning.summary(params, state, flops={"a/kernel": 7.0}).leaves["a/kernel"].flops == 7
  with pytest.raises(ValueError, match=r"flops: .*a/kernel.*found 'a/kernal'"):
    pruning.summary(params, state, flops={"a/kernal": 7.0})


def test_other_parameters_than_those_of_the_masks_are_an_error():
  params, state = run(oc.prune(0.5, every=1), 1)
  with pytest.raises(ValueError, match="'c/kernel', found 'a/bias', 'a/kernel'"):
    pruning.masks({"a": params["a"]}, state)
  with pytest.raises(ValueError, match="mask of 'a/kernel': expected shape"):
    pruning.masked(params | {"a": {"kernel": jnp.ones((16, 16)), "bias": jnp.ones(8)}}, state)


def several():
  of = lambda part: lambda path, x: part in path
  return optax.chain(
    optax.sgd(0.1),
    oc.prune(every=1, structure=pruning.NM(2, 4), where=of("a/kernel")),
    oc.prune(0.6, every=1, where=of("c/kernel"), packed=False),
    oc.prune(0.25, every=1, structure=pruning.Channel(0), where=of("a/kernel")),
  )


def test_several_prunes_in_a_chain_are_read_as_one():
  params, state = run(several())
  masks = pruning.masks(params, state)
  assert jax.tree.structure(masks) == jax.tree.structure(params)
  jax.tree.map(lambda x, m: np.testing.assert_array_equal(x != 0, m), params, masks)
  # Two of four, and of these four rows of sixteen are gone too.
  assert int((~masks["c"]["kernel"]).sum()) == 21
  assert int((~masks["a"]["kernel"].any(1)).sum()) >= 4
  found = pruning.summary(params, state)
  assert found.stray == 0 and found.sparsity == sum(map(zeros, jax.tree.leaves(params))) / 163
  dense = pruning.masked(tree(9), state)
  jax.tree.map(lambda x, m: np.testing.assert_array_equal(x != 0, m), dense, masks)
  flipped = jax.tree.map(lambda m: m[::-1], masks)
  again = pruning.masks(params, pruning.with_masks(state, flipped, params))
  jax.tree.map(np.testing.assert_array_equal, again, flipped)


def change(masks, path, value):
  """The masks with another value, or none, in one place."""
  first, second = path.split("/")
  inner = {k: v for k, v in masks[first].items() if k != second}
  return masks | {first: inner if value is None else inner | {second: value}}


@pytest.mark.parametrize(
  ("path", "value", "match"),
  [
    ("a/kernel", None, "masks: expected one for 'a/kernel', found masks of 'a/bias', 'c/kernel'"),
    ("a/kernel", np.full((16, 8), 0.5), "mask of 'a/kernel': expected bools, found .*float64"),
    ("a/kernel", np.ones((16, 8), int), "mask of 'a/kernel': expected bools, found .*int"),
    ("a/kernel", 0.5, "mask of 'a/kernel': expected 2 axes"),
    ("a/kernel", np.ones(128, bool), r"mask of 'a/kernel': expected 2 axes, found shape \(128,\)"),
    ("a/bias", np.zeros(8, bool), "mask of 'a/bias': no prune in the state prunes this leaf"),
    ("c/kernel", np.ones((5, 7), bool), r"mask of 'c/kernel': expected shape \(7, 5\)"),
    ("c/extra", np.ones(3, bool), "mask of 'c/extra'"),
  ],
)
def test_masks_that_are_none_are_an_error_that_names_the_leaf(path, value, match):
  params, state = run(oc.prune(0.5, every=1), 1)
  masks = change(pruning.masks(params, state), path, value)
  with pytest.raises(ValueError, match=match):
    pruning.with_masks(state, masks, params)


def test_a_state_without_masks_is_an_error():
  with pytest.raises(ValueError, match="expected the state of a prune in it, found none"):
    pruning.masks(tree(), optax.sgd(0.1).init(tree()))


@pytest.mark.parametrize("n", [3, pytest.param(12, marks=pytest.mark.ci)])
def test_plot_shows_every_leaf_where_all_are_as_sparse(n):
  params = {f"layer{i:02}": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)} for i in range(n)}
  schedule = optax.linear_schedule(0.0, 0.8, 4)
  tx = optax.chain(optax.sgd(0.0), oc.prune(schedule, every=1))
  history, state, update = {}, tx.init(params), jax.jit(tx.update)
  for t in range(1, 7):
    updates, state = update(params, state, params)
    params = optax.apply_updates(params, updates)
    history[t] = pruning.summary(params, state)
  figure = Figure(figsize=(6, 4), layout="constrained")
  canvas = FigureCanvasAgg(figure)
  ax = pruning.plot(history, ax=figure.subplots())
  *leaves, _ = ax.get_lines()
  assert [line.get_label() for line in leaves] == [f"layer{i:02}/kernel" for i in range(n)]
  for line in ax.get_lines():
    np.testing.assert_allclose(line.get_ydata(), [0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
  # In the picture itself, the legend left out, the color of each is there.
  ax.get_legend().remove()
  canvas.draw()
  pixels = np.asarray(canvas.buffer_rgba())[..., :3].reshape(-1, 3).astype(int)
  for line in leaves:
    color = np.round(255 * np.array(line.get_color()[:3]))
    assert (np.abs(pixels - color).max(1) < 30).sum() > 20, line.get_label()


def test_plot_draws_leaves_that_differ_as_whole_lines():
  params, history = tree(), {}
  for t, sparsity in enumerate((0.25, 0.5), start=1):
    tx = oc.prune(oc.by_path({"a": sparsity}, default=0.75), every=1)
    history[t] = pruning.summary(*run(tx, 1, params))
  ax = pruning.plot(history, ax=Figure().subplots())
  assert {line.get_label() for line in ax.get_lines()} == {"a/kernel", "c/kernel", "total"}
  assert {line.get_linestyle() for line in ax.get_lines()} == {"-"}
