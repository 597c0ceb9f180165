"""Structures that lie along the axes they should, layer by layer, beside obvious NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cadence as oc
from optax_cadence import pruning


def draw(*shape, seed=0, dtype=np.float32):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def masks_after(params, **options):
  tx = oc.prune(every=1, **options)
  _, state = jax.jit(tx.update)(params, tx.init(params), params)
  return jax.tree.map(np.asarray, pruning.masks(params, state))


def kept_per_group(mask, axes, m=4):
  """How many weights of each group are kept, the groups lying along some axes taken as one."""
  rows = np.moveaxis(mask, axes, range(-len(axes), 0))
  return rows.reshape(-1, m).sum(1)


@pytest.mark.parametrize("shape", [(8, 3), (3, 3, 8, 2)])
def test_n_of_m_lies_along_what_dense_layers_and_convolutions_sum_over(shape):
  mask = masks_after({"kernel": draw(*shape)}, structure=pruning.NM(2, 4))["kernel"]
  assert (kept_per_group(mask, (-2,)) == 2).all()


def attention(p, x):
  q = jnp.einsum("bd,dhk->bhk", x, p["query"]["kernel"])
  return jnp.einsum("bhk,hkd->bd", q, p["out"]["kernel"]) + p["out"]["bias"][None]


ATTENTION = {
  "query": {"kernel": draw(8, 3, 2)},
  "out": {"kernel": draw(2, 6, 5, seed=1), "bias": jnp.ones(5)},
}


@pytest.mark.parametrize("source", ["program", "prefix", "by_path"])
def test_each_leaf_has_its_groups_along_its_own_axes(source):
  def fn(p, x):
    return attention({"query": {"kernel": p["query"]["kernel"].repeat(2, 2)}, "out": p["out"]}, x)

  params = ATTENTION | {"query": {"kernel": draw(8, 2, 3)}}
  axis = {
    "program": lambda: pruning.contraction_axes(fn, params, draw(1, 8)),
    "prefix": lambda: {"query": 0, "out": (0, 1)},
    "by_path": lambda: oc.by_path({"query": 0}, default=(0, 1)),
  }[source]()
  masks = masks_after(params, structure=pruning.NM(2, 4, axis=axis))
  assert (kept_per_group(masks["query"]["kernel"], (0,)) == 2).all()
  assert (kept_per_group(masks["out"]["kernel"], (0, 1)) == 2).all()
  # Within a group the largest stay.
  groups = np.abs(params["out"]["kernel"]).reshape(3, 4, 5)
  best = np.argsort(np.argsort(-groups, axis=1), axis=1) < 2
  np.testing.assert_array_equal(masks["out"]["kernel"], best.reshape(2, 6, 5))


def test_a_leaf_that_no_product_sums_over_is_an_error_for_n_of_m():
  params = {"kernel": draw(8, 4), "other": draw(8, 4)}
  axes = pruning.contraction_axes(lambda p, x: x @ p["kernel"], params, draw(2, 8))
  tx = oc.prune(every=1, structure=pruning.NM(2, 4, axis=axes))
  with pytest.raises(ValueError, match="'other': expected different axes.*found none"):
    tx.init(params)


def test_two_of_four_is_reached_through_three_of_four_and_never_takes_back():
  sparsity = optax.linear_schedule(0.0, 0.5, 4)
  tx = optax.chain(optax.sgd(0.0), oc.prune(sparsity, every=1, structure=pruning.NM(2, 4)))
  params = {"kernel": draw(16, 3)}
  state, update, found = tx.init(params), jax.jit(tx.update), []
  before = np.ones((16, 3), bool)
  for _ in range(6):
    updates, state = update(params, state, params)
    params = optax.apply_updates(params, updates)
    mask = np.asarray(pruning.masks(params, state)["kernel"])
    assert not (mask & ~before).any()
    before = mask
    (kept,) = set(kept_per_group(mask, (0,)))
    found.append(int(kept))
  # Sparsities 1/8, 1/4, 3/8, 1/2: a half goes up.
  assert found == [3, 3, 2, 2, 2, 2]
  best = np.argsort(np.argsort(-np.abs(draw(16, 3)).reshape(4, 4, 3), axis=1), axis=1) < 2
  np.testing.assert_array_equal(before, best.reshape(16, 3))


@pytest.mark.parametrize("sparsity", [0.25, {"kernel": "0.5"}, {"kernel": 0.25}, jnp.float32(0.5)])
def test_n_of_m_implies_its_sparsity(sparsity):
  tx = oc.prune(sparsity, every=1, structure=pruning.NM(2, 4))
  with pytest.raises(ValueError, match=r"'kernel': NM.*states 0.5, found"):
    tx.init({"kernel": draw(8, 4)})


# Layers stacked on axis 0 beside the same layers apart. The second layer has larger weights, which
# would be kept in place of the first one's if they competed.
LAYERS = [draw(8, 12, seed=i) * 10**i for i in range(3)]
STACKED = {"blocks": {"kernel": jnp.stack(LAYERS)}, "head": {"kernel": draw(12, 6, seed=4)}}
APART = {str(i): {"kernel": x} for i, x in enumerate(LAYERS)} | {"head": STACKED["head"]}


@pytest.mark.parametrize(
  "options",
  [
    {"sparsity": 0.5, "structure": pruning.Channel(), "allocation": "global"},
    {"structure": pruning.NM(2, 4)},
    *(
      pytest.param(options, marks=pytest.mark.ci)
      for options in (
        {"sparsity": 0.5},
        {"sparsity": 0.75, "allocation": "erk"},
        {"sparsity": 0.5, "allocation": "global"},
        {"sparsity": 0.5, "structure": pruning.Channel()},
        {"sparsity": 0.5, "structure": pruning.Block((4, 3))},
        {"sparsity": 1.0, "structure": lambda x, s: x > s * x.mean()},
      )
    ),
  ],
)
def test_layers_that_are_stacked_are_pruned_as_layers(options):
  stacked = masks_after(STACKED, stacked=lambda path, x: path.startswith("blocks"), **options)
  apart = masks_after(APART, **options)
  np.testing.assert_array_equal(stacked["head"]["kernel"], apart["head"]["kernel"])
  assert not apart["0"]["kernel"].all()
  for i, mask in enumerate(stacked["blocks"]["kernel"]):
    np.testing.assert_array_equal(mask, apart[str(i)]["kernel"])


def scanned(p, x):
  x, _ = jax.lax.scan(lambda x, w: (x @ w @ w.T, None), x, p["blocks"]["kernel"])
  return x.repeat(2, 1)[:, :12] @ p["head"]["kernel"]


def test_the_program_tells_which_leaves_are_stacked():
  found = pruning.kernels(scanned, STACKED, draw(2, 8))
  masks = masks_after(STACKED, sparsity=0.5, where=found, structure=pruning.Channel())
  expected = masks_after(APART, sparsity=0.5, structure=pruning.Channel())
  for i, mask in enumerate(masks["blocks"]["kernel"]):
    np.testing.assert_array_equal(mask, expected[str(i)]["kernel"])
  # Axes are those of the leaf, which the program says too.
  axes = pruning.contraction_axes(scanned, STACKED, draw(2, 8))
  assert axes == {"blocks": {"kernel": (1,)}, "head": {"kernel": (0,)}}
  masks = masks_after(STACKED, where=found, structure=pruning.NM(1, 4, axis=axes))
  assert (kept_per_group(masks["blocks"]["kernel"], (1,)) == 1).all()


@pytest.mark.ci
def test_regrowth_exchanges_within_each_layer():
  tx = oc.prune(
    0.5,
    every=2,
    stacked=lambda path, x: path.startswith("blocks"),
    regrow=pruning.by_gradient(stop=None),
    inner=optax.sgd(0.1),
  )
  params, before, moved = STACKED, None, 0
  state, update = tx.init(params), jax.jit(tx.update)
  for t in range(4):
    grads = jax.tree.map(lambda x, t=t: jnp.cos((t + 1) * x), params)
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    mask = np.asarray(pruning.masks(params, state)["blocks"]["kernel"])
    assert mask.sum((1, 2)).tolist() == [48, 48, 48]
    moved += 0 if before is None else (mask != before).any((1, 2)).sum()
    before = mask
  assert moved >= 3


@pytest.mark.parametrize(
  ("structure", "match"),
  [
    (lambda: pruning.NM(2.5, 4), "NM: n must be an integer.*2.5"),
    (lambda: pruning.NM(2, "4"), "NM: m must be an integer.*'4'"),
    (lambda: pruning.NM(5, 4), "NM: n must be at most m, found 5 of 4"),
    (lambda: pruning.NM(0, 0), "NM: m must be an integer of at least 1"),
    (lambda: pruning.NM(2, 4, axis="in"), "NM: axis must be .*'in'"),
    (lambda: pruning.NM(2, 4, axis={"a": (0, 0.5)}), "NM: axis must be .*0.5"),
    (lambda: pruning.NM(2, 4, axis=oc.by_path({"*": "in"})), "NM: axis must be .*'in'"),
    (lambda: pruning.Channel("out"), "Channel: axis must be .*'out'"),
    (lambda: pruning.Channel(True), "Channel: axis must be .*True"),
    (lambda: pruning.Block(4), "Block: shape must be a tuple of integers, found 4"),
    (lambda: pruning.Block((4, 0)), "Block: a size in shape must be .*found 0"),
    (lambda: pruning.Block((2.5,)), "Block: a size in shape must be .*found 2.5"),
    (lambda: pruning.Block(()), r"Block: shape must be .*found \(\)"),
  ],
)
def test_nonsense_names_the_argument(structure, match):
  with pytest.raises(ValueError, match=match):
    structure()


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"structure": pruning.NM(2, 4, axis=(0, 0))}, "kernel'.*axis 0, 0"),
    ({"structure": pruning.NM(2, 4, axis=(1, -1))}, "kernel'.*axis 1, -1"),
    ({"structure": pruning.NM(2, 4, axis={"b": 0})}, "axis of 'b': no parameter is there"),
    ({"structure": pruning.NM(2, 4, axis={"a": 0})}, "axis of 'c/kernel': expected one"),
    ({"structure": pruning.NM(2, 4, axis=0), "stacked": lambda *_: True}, "kernel'.*layers are"),
    ({"structure": pruning.Block((4, 4)), "sparsity": 0.5, "stacked": lambda *_: True}, "4, 4"),
    ({"structure": lambda x, s: x * 0.5, "sparsity": 0.5}, "mask of bools.*float32"),
  ],
)
def test_what_does_not_fit_names_the_leaf(options, match):
  params = {"a": {"kernel": draw(4, 4)}, "c": {"kernel": draw(4, 4)}}
  tx = oc.prune(every=1, **options)
  with pytest.raises(ValueError, match=match):
    tx.update(params, tx.init(params), params)
