"""The geometry of a leaf, against NumPy indexing."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

import optax_cadence as oc
from optax_cadence.regions import cuts
from optax_cadence.regions import partitions


def cut(cadence, shape):
  partition = partitions.as_partition(cadence)
  if partition is None:
    return [(cadence, cuts.Whole())]
  return partition.cut(shape, key=lambda cell: cell)


def written(one, leaf, tensor):
  """The leaf with the tensor of a cut written into it."""
  return one.put(one.view(leaf), tensor).reshape(leaf.shape)


def expect(cuts, pieces, shape):
  """The cuts read and write exactly the entries of the pieces, in order of the pieces."""
  leaf = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
  assert [p for p, _ in cuts] == [piece.period for piece in pieces]
  for (_, one), piece in zip(cuts, pieces, strict=True):
    tensor = one.take(jnp.asarray(leaf))
    np.testing.assert_array_equal(tensor, leaf[piece.index])
    expected = leaf.copy()
    expected[piece.index] *= -2
    np.testing.assert_array_equal(written(one, jnp.asarray(leaf), tensor * -2), expected)
    assert one.size(shape) == tensor.size


@pytest.mark.parametrize(
  ("periods", "axis"),
  [
    ([1, 2], -1),
    ([1, 2, 4], 0),
    ([3, 3, 1], 1),
    ([1, 2] * 6, 1),
    ([1, 2] * 20, 1),
    (np.random.default_rng(0).choice([1, 2, 3], 40).tolist(), 1),
    ([5] * 40, 1),
    ([1, 1, 1, 2], 0),
  ],
)
def test_bands_are_cut_as_array_split_does(periods, axis):
  shape = (5, 40, 3)
  pieces = oracle.bands(shape, periods, axis)
  expect(cut(oc.channels(periods, axis=axis), shape), pieces, shape)


@pytest.mark.ci
@pytest.mark.parametrize("examples", [8, 40])
def test_any_bands(examples):
  @settings(max_examples=examples)
  @given(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=24), st.integers(24, 60))
  def check(periods, length):
    shape = (2, length)
    expect(cut(oc.channels(periods), shape), oracle.bands(shape, periods, 1), shape)

  check()


def test_bands_that_cover_the_axis_are_the_whole_leaf():
  ((period, one),) = cut(oc.channels([4, 4, 4]), (2, 7))
  assert period == 4 and isinstance(one, cuts.Whole)


def test_rectangles_are_tensors_of_their_own():
  expect(
    cut(oc.quadrants([[1, 1], [2, 1]]), (5, 7)),
    oracle.rectangles((5, 7), [[1, 1], [2, 1]], (0, 1)),
    (5, 7),
  )


def test_grid_over_three_axes():
  periods, axes, shape = np.arange(1, 9).reshape(2, 2, 2), (2, 0, -2), (3, 4, 5)
  expect(cut(oc.Grid(periods, axes), shape), oracle.rectangles(shape, periods, axes), shape)


@pytest.mark.parametrize(
  ("mask", "kind"),
  [
    (np.full((4, 6), 3), cuts.Whole),
    (np.array([[1], [1], [2], [1]]), cuts.Bands),
    (np.array([1, 1, 2, 2, 2, 2]), cuts.Box),
    (np.kron([[1, 2], [2, 1]], np.ones((2, 3), int)), cuts.Box),
    (np.indices((4, 6)).sum(0) % 2 + 1, cuts.Entries),
  ],
)
def test_a_mask_is_the_coarsest_grid_on_which_it_is_constant(mask, kind):
  cuts = cut(mask, (4, 6))
  assert kind in {type(one) for _, one in cuts}
  covered = np.zeros((4, 6), int)
  for period, one in cuts:
    full = np.asarray(written(one, jnp.zeros((4, 6)), one.take(jnp.ones((4, 6))))) > 0
    np.testing.assert_array_equal(np.broadcast_to(mask, (4, 6))[full], period)
    covered += full
  np.testing.assert_array_equal(covered, 1)


def test_scattered_entries_of_a_period_are_a_vector():
  mask = np.random.default_rng(0).choice([1, 2, 4], (8, 8))
  expect(cut(mask, (8, 8)), oracle.entries(mask), (8, 8))


def test_leaves_without_entries():
  for cadence in (8, oc.channels([1, 2]), np.ones((0, 4), int)):
    assert sum(one.size((0, 4)) for _, one in cut(cadence, (0, 4))) == 0
