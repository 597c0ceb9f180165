"""Trees of parameters: any container, with holes, without leaves, a single array."""

import dataclasses

import jax
import numpy as np
import optax
import oracle
import pytest
from small_tree import adamw_by_oracle
from small_tree import assert_identical
from small_tree import assert_same_path
from small_tree import BATCHES
from small_tree import cadence
from small_tree import dyadic
from small_tree import EVERY
from small_tree import PARAMS
from small_tree import STEPS
from small_tree import trained
from small_tree import trained_by_oracle
from states import groups

import optax_cadence as oc


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Net:
  body: dict
  head: jax.Array


def test_on_a_dataclass_with_a_plain_dict_as_prefix():
  net = lambda tree: Net(body={"inner": [tree["body"], None]}, head=tree["head"])
  every = {"body": {"inner": {"0": EVERY["body"]}}, "head": 2}
  found, state = trained(cadence(optax.adamw(0.1), every), net(PARAMS), list(map(net, BATCHES)))
  assert isinstance(found[0], Net) and isinstance(groups(state)[0].accumulators, Net)
  assert_same_path(found, adamw_by_oracle())


@pytest.mark.parametrize("hole", [None, optax.MaskedNode()], ids=["None", "MaskedNode"])
@pytest.mark.parametrize(
  "every",
  [
    {"a": 3, "body": EVERY["body"], "list": 2},
    {"a": 3, "body": {**EVERY["body"], "gap": 2}, "list": {"0": 5, "1": {"x": 3}, "2": 2}},
  ],
  ids=["prefix", "full"],
)
def test_holes_in_the_tree_stay_holes(hole, every):
  dig = lambda tree: {
    "a": hole,
    "body": {"gap": hole, **tree["body"]},
    "list": [hole, {"x": hole}, tree["head"]],
  }
  params, batches = dig(PARAMS), list(map(dig, BATCHES))
  found, _ = trained(cadence(optax.adamw(0.1), every), params, batches)
  assert jax.tree.structure(found[-1]) == jax.tree.structure(params)
  assert_same_path(found, adamw_by_oracle())


@pytest.mark.parametrize("tree", [{}, [], (), None, {"a": {}, "b": [None]}], ids=str)
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_a_tree_without_leaves_trains_nothing(tree, nonfinite):
  tx = cadence(optax.adamw(0.1), 3, nonfinite=nonfinite)
  state = jax.jit(tx.init)(tree)
  for _ in range(4):
    updates, state = jax.jit(tx.update)(tree, state, tree)
    assert updates == tree
    same, state = jax.jit(tx.apply)(tree, state, tree)
    assert same == tree
  assert tx.flush(state, tree)[0] == tree
  assert int(state.micro_step) == 8


def test_scalar_leaves():
  shapes = {"a": (), "b": [(), ()]}
  params, batches = dyadic(1, shapes), [dyadic(t, shapes) for t in range(STEPS)]
  every = {"a": oc.Every(4, offset=1), "b": [np.array(2), 3]}
  pieces = [oracle.whole(4, 1), oracle.whole(2), oracle.whole(3)]
  found, _ = trained(cadence(optax.adamw(0.1), every), params, batches)
  assert_same_path(found, trained_by_oracle(optax.adamw(0.1), pieces, params, batches))


def test_a_tree_that_is_one_array():
  params, batches = PARAMS["head"], [grads["head"] for grads in BATCHES]
  found, _ = trained(cadence(optax.adamw(0.1), oc.channels([1, 2, 4])), params, batches)
  pieces = [oracle.bands((3,), [1, 2, 4], 0)]
  assert_same_path(found, trained_by_oracle(optax.adamw(0.1), pieces, params, batches))


def test_without_parameters_where_the_inner_optimizer_needs_none():
  tx = cadence(optax.sgd(0.5, momentum=0.5))
  update = jax.jit(tx.update)
  with_params = without = tx.init(PARAMS)
  for grads in BATCHES:
    expected, with_params = update(grads, with_params, PARAMS)
    found, without = update(grads, without)
    assert_identical(found, expected)
