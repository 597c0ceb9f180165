"""The cadence inside and around `optax.masked` and `optax.partition`."""

import jax
import optax
import oracle
import pytest
from small_tree import assert_close
from small_tree import assert_same_path
from small_tree import BATCHES
from small_tree import cadence
from small_tree import EVERY
from small_tree import PARAMS
from small_tree import PIECES
from small_tree import STEPS
from small_tree import trained
from small_tree import trained_by_oracle

import optax_cadence as oc


@pytest.mark.parametrize("every", [EVERY, 2])
def test_inside_masked_it_trains_what_is_left(every):
  pieces = [PIECES[0], PIECES[2]] if every == EVERY else [oracle.whole(2)] * 2
  mask = {"body": {"bias": True, "kernel": False}, "head": True}
  tx = optax.masked(cadence(optax.adamw(0.1), every), mask)
  found, _ = trained(tx)
  keep = lambda tree: [tree["body"]["bias"], tree["head"]]
  expected = trained_by_oracle(optax.adamw(0.1), pieces, keep(PARAMS), list(map(keep, BATCHES)))
  assert_same_path(list(map(keep, found)), expected)
  for t in range(STEPS):  # Optax hands masked gradients through.
    moved = sum(grads["body"]["kernel"] for grads in BATCHES[: t + 1])
    assert_close(found[t]["body"]["kernel"], PARAMS["body"]["kernel"] + moved)


def test_inside_masked_a_whole_subtree_may_be_missing():
  tx = optax.masked(cadence(optax.adamw(0.1)), {"body": False, "head": True})
  found, _ = trained(tx)
  heads = lambda trees: [[tree["head"]] for tree in trees]
  expected = trained_by_oracle(optax.adamw(0.1), PIECES[2:], [PARAMS["head"]], heads(BATCHES))
  assert_same_path(heads(found), expected)


def test_around_a_mask_by_rank_every_tensor_keeps_its_rank():
  matrices = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
  inner = optax.adamw(0.1, weight_decay=0.5, mask=matrices)
  assert_same_path(trained(cadence(inner))[0], trained_by_oracle(inner))


def test_around_a_mask_by_name_names_are_those_of_the_parameters():
  inner = optax.adamw(0.1, weight_decay=0.5, mask={"body": {"bias": 0, "kernel": 1}, "head": 1})
  bare, decayed = optax.adamw(0.1, weight_decay=0.0), optax.adamw(0.1, weight_decay=0.5)
  expected = zip(
    *(
      trained_by_oracle(inner, [pieces], [leaf], [[jax.tree.leaves(g)[i]] for g in BATCHES])
      for i, (inner, pieces, leaf) in enumerate(
        zip((bare, decayed, decayed), PIECES, jax.tree.leaves(PARAMS), strict=True)
      )
    ),
    strict=True,
  )
  assert_same_path(trained(cadence(inner))[0], list(expected))


LABELS = {"body": {"bias": "adam", "kernel": "sgd"}, "head": "adam"}
SORTS = {"adam": optax.adam(0.1), "sgd": optax.sgd(0.5, momentum=0.5)}


def partition_by_oracle():
  bias_and_head = lambda tree: [tree["body"]["bias"], tree["head"]]
  kernel = lambda tree: [tree["body"]["kernel"]]
  adam = trained_by_oracle(
    SORTS["adam"], [PIECES[0], PIECES[2]], bias_and_head(PARAMS), list(map(bias_and_head, BATCHES))
  )
  sgd = trained_by_oracle(SORTS["sgd"], [PIECES[1]], kernel(PARAMS), list(map(kernel, BATCHES)))
  return [[a[0], s[0], a[1]] for a, s in zip(adam, sgd, strict=True)]


@pytest.mark.parametrize("labels", [LABELS, lambda params: LABELS], ids=["tree", "callable"])
def test_around_a_partition(labels):
  tx = cadence(optax.partition(SORTS, labels))
  assert_same_path(trained(tx)[0], partition_by_oracle())


def test_inside_a_partition_each_with_the_cadences_of_all():
  tx = optax.partition({sort: cadence(inner) for sort, inner in SORTS.items()}, LABELS)
  assert_same_path(trained(tx)[0], partition_by_oracle())


def test_inside_a_partition_each_with_cadences_of_its_own():
  transforms = {
    "adam": cadence(SORTS["adam"], {"body": {"bias": oc.Every(4, offset=3)}, "head": 2}),
    "sgd": cadence(SORTS["sgd"], oc.quadrants([[1, 2], [2, 1]])),
  }
  assert_same_path(trained(optax.partition(transforms, LABELS))[0], partition_by_oracle())
