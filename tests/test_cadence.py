"""The contract, against the oracle, on random trees."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from small_tree import assert_same_path
from small_tree import cadence
from small_tree import trained
from small_tree import trained_by_oracle
from states import groups
from states import with_groups

import optax_cadence as oc

DTYPES = ["float32", "bfloat16", "float16", "complex64"]


@dataclasses.dataclass
class Leaf:
  """A random leaf: its shape, its cadence, and the same split by hand."""

  shape: tuple[int, ...]
  dtype: str
  cadence: Any
  pieces: list[oracle.Piece]


@st.composite
def leaves(draw, dtypes) -> Leaf:
  shape = tuple(draw(st.lists(st.sampled_from([2, 3, 6]), max_size=3)))
  kinds = [_whole]
  if shape:
    kinds += [_channels, _stacked, _band_mask]
  if len(shape) > 1:
    kinds += [_quadrants, _grid, _entries]
  kind = draw(st.sampled_from(kinds))
  rng = np.random.default_rng(draw(st.integers(0, 99)))
  return Leaf(shape, draw(st.sampled_from(dtypes)), *kind(shape, rng))


# Powers of two, and a three once in a while, keep the cycle and so the programs few.
def periods(rng, size=None):
  return rng.choice([1, 2, 4, 3], size, p=[0.3, 0.3, 0.3, 0.1])


def _whole(shape, rng):
  period = int(periods(rng))
  offset = int(rng.integers(period))
  return oc.Every(period, offset) if offset else period, oracle.whole(period, offset)


def _channels(shape, rng):
  axis = int(rng.integers(-len(shape), len(shape)))
  bands = periods(rng, rng.integers(1, shape[axis] + 1)).tolist()
  return oc.channels(bands, axis=axis), oracle.bands(shape, bands, axis)


def _stacked(shape, rng):
  layers = periods(rng, shape[0]).tolist()
  return oc.stacked(layers), oracle.bands(shape, layers, 0)


def _band_mask(shape, rng):
  bands = periods(rng, shape[0])
  return bands.reshape(-1, *[1] * (len(shape) - 1)), oracle.bands(shape, bands.tolist(), 0)


def _quadrants(shape, rng):
  corners = periods(rng, (2, 2))
  return oc.quadrants(corners.tolist()), oracle.rectangles(shape, corners, (-2, -1))


def _grid(shape, rng):
  axes = rng.permutation(len(shape))[: rng.integers(2, len(shape) + 1)]
  cells = periods(rng, [rng.integers(1, shape[a] + 1) for a in axes])
  grid = oc.Grid(cells.tolist(), axes.tolist())
  if cells.size == 1:
    return grid, oracle.whole(int(cells.flat[0]))
  return grid, oracle.rectangles(shape, cells, axes)


def _entries(shape, rng):
  # A checkerboard of three periods: no band of it is constant.
  mask = 2 ** (np.indices(shape).sum(0) % 3)
  mask.flat[0] = rng.choice([1, 4])
  return mask, oracle.entries(mask)


def random_like(rng: np.random.Generator, leaf: Leaf) -> jax.Array:
  """Dyadic numbers, whose sums are exact in any order."""
  values = rng.integers(-8, 9, leaf.shape) / 8.0
  if leaf.dtype.startswith("complex"):
    values = values + 1j * rng.integers(-8, 9, leaf.shape) / 8.0
  return jnp.asarray(values).astype(leaf.dtype)


def nest(leaves: list[Any]) -> Any:
  """A tree with leaves at several depths, in the order of the list."""
  return {f"{i}": leaf if i % 2 else {"inner": [leaf]} for i, leaf in enumerate(leaves)}


def assert_close(found, expected):
  """Within a few units in the last place, of float32 or of the leaf's own narrower dtype."""
  found, expected = np.asarray(found), np.asarray(expected)
  assert found.dtype == expected.dtype and found.shape == expected.shape
  eps = float(jnp.finfo(found.dtype).eps) if found.dtype.kind in "fcV" else 0.0
  if found.dtype in (jnp.bfloat16, jnp.float16):
    found, expected = found.astype("float32"), expected.astype("float32")
  scale = max(1.0, np.abs(expected).max(initial=0.0))
  np.testing.assert_allclose(found, expected, rtol=8 * eps, atol=8 * eps * scale)


def assert_zero_where_not_due(leaf: Leaf, update: jax.Array, t: int) -> None:
  for piece in leaf.pieces:
    if t % piece.period != piece.offset % piece.period:
      assert not np.asarray(update)[piece.index].astype("complex64").any()


def in_use(state: oc.CadenceState) -> oc.CadenceState:
  """The state, with zeros for accumulators of empty windows: what they hold has no meaning."""
  kept = [
    group
    if group.window is None or group.window.any()
    else group._replace(accumulators=jax.tree.map(jnp.zeros_like, group.accumulators))
    for group in groups(state)
  ]
  return with_groups(state, kept)


def follow_the_oracle(tree: list[Leaf], inner: Any, accumulate: str, seed: int) -> None:
  """Two cycles of `update`, `apply` and static `phase` beside the oracle.

  Of the phases the first four with different regions due, since every one of them compiles.
  """
  rng = np.random.default_rng(seed)
  tx = oc.cadence(inner, nest([leaf.cadence for leaf in tree]), accumulate=accumulate)
  params = nest([random_like(rng, leaf) for leaf in tree])
  slow = oracle.Oracle(inner, jax.tree.leaves(params), [x.pieces for x in tree], accumulate)
  state = tx.init(params)
  update, apply = jax.jit(tx.update), jax.jit(tx.apply)
  static = jax.jit(tx.update, static_argnames="phase")
  phases: dict[frozenset, int] = {}
  for t in range(1, 2 * tx.cycle + 1):
    phase = t % tx.cycle
    due = frozenset(
      x.label for leaf in tree for x in leaf.pieces if t % x.period == x.offset % x.period
    )
    if len(phases) < 4:
      phases.setdefault(due, phase)
    grads = nest([random_like(rng, leaf) for leaf in tree])
    expected = slow.step(jax.tree.leaves(grads), jax.tree.leaves(params))
    updates, new_state = update(grads, state, params)
    applied = apply(params, state, grads)
    before, state = state, new_state
    if phase in phases.values():
      phased = static(grads, before, params, phase=phase)
      jax.tree.map(assert_close, (phased[0], in_use(phased[1])), (updates, in_use(state)))
    params = optax.apply_updates(params, updates)
    for leaf, found, want in zip(tree, jax.tree.leaves(updates), expected, strict=True):
      assert_close(found, want)
      assert_zero_where_not_due(leaf, found, t)
    jax.tree.map(assert_close, (applied[0], in_use(applied[1])), (params, in_use(state)))


INNERS = {
  "sgd": lambda: optax.sgd(0.5, momentum=0.5),
  "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
  "clip, sgd": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.5)),
}


# Every example compiles a dozen programs: a few of them by default, many in CI.
EXAMPLES = [pytest.param(2, id="few"), pytest.param(20, id="many", marks=pytest.mark.ci)]


@pytest.mark.parametrize("examples", EXAMPLES)
def test_update_apply_and_static_phase_follow_the_oracle(examples):
  @settings(max_examples=examples)
  @given(
    st.lists(leaves(DTYPES), min_size=1, max_size=4),
    st.sampled_from(sorted(INNERS)),
    st.sampled_from(["mean", "sum", "latest"]),
    st.integers(0, 99),
  )
  def check(tree, inner, accumulate, seed):
    follow_the_oracle(tree, oracle.relaxed(INNERS[inner]()), accumulate, seed)

  check()


@settings(max_examples=2)
@given(st.lists(leaves(["float64", "complex128"]), min_size=1, max_size=3), st.integers(0, 99))
def test_double_precision_follows_the_oracle(tree, seed):
  with oracle.enable_x64():
    follow_the_oracle(tree, oracle.relaxed(INNERS["adamw"]()), "mean", seed)


PARAMS = {"a": jnp.ones((3, 4)), "b": jnp.ones(5), "c": jnp.ones(())}
PERIODS = {"a": 4, "b": 2, "c": 1}


def gradients(steps, seed=0):
  rng = np.random.default_rng(seed)
  for _ in range(steps):
    yield jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS)


def test_the_oracle_is_partition_of_multi_steps():
  inner = oracle.relaxed(optax.adamw(0.1))
  parts = {k: optax.MultiSteps(inner, k).gradient_transformation() for k in (1, 2, 4)}
  reference = oracle.relaxed(optax.partition(parts, PERIODS))
  state, params = reference.init(PARAMS), PARAMS
  slow = oracle.Oracle(inner, jax.tree.leaves(params), [oracle.whole(k) for k in (4, 2, 1)])
  update = jax.jit(reference.update)
  for grads in gradients(8):
    expected, state = update(grads, state, params)
    found = slow.step(jax.tree.leaves(grads), jax.tree.leaves(params))
    # Adam divides by the root of a mean that MultiSteps accumulates in another order.
    for x, y in zip(found, jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    params = optax.apply_updates(params, expected)


@pytest.mark.parametrize("period", [1, 3, 8])
def test_one_period_equals_multi_steps(period):
  inner = oracle.relaxed(optax.sgd(0.1, momentum=0.9))
  reference, tx = optax.MultiSteps(inner, period), oc.cadence(inner, period)
  expected, found = reference.init(PARAMS), tx.init(PARAMS)
  update_reference, update = jax.jit(reference.update), jax.jit(tx.update)
  for grads in gradients(2 * period):
    with jax.numpy_dtype_promotion("standard"):
      updates, expected = update_reference(grads, expected, PARAMS)
    mine, found = update(grads, found, PARAMS)
    chex.assert_trees_all_close(mine, updates, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("accumulate", ["mean", "latest"])
def test_inner_state_of_a_held_group_is_bit_for_bit_what_it_was(static, accumulate):
  tx = oc.cadence(oracle.relaxed(optax.adamw(0.1)), PERIODS, accumulate=accumulate)
  params, state = PARAMS, tx.init(PARAMS)
  update = jax.jit(tx.update, static_argnames="phase")
  for t, grads in enumerate(gradients(8), 1):
    phase = t % tx.cycle if static else None
    updates, new = update(grads, state, params, phase=phase)
    for period, old_group, new_group, name in zip(
      (4, 2, 1), groups(state), groups(new), "abc", strict=True
    ):
      if t % period:
        chex.assert_trees_all_equal(new_group.inner_state, old_group.inner_state)
        assert not updates[name].any()
      else:
        assert updates[name].all()
    state = new


def test_static_phase_and_apply_give_the_very_same_state():
  tx = oc.cadence(optax.sgd(0.5, momentum=0.5), PERIODS)
  states = [tx.init(PARAMS)] * 3
  params = PARAMS
  for t, grads in enumerate(gradients(9), 1):
    _, states[0] = tx.update(grads, states[0], params)
    _, states[1] = tx.update(grads, states[1], params, phase=t % tx.cycle)
    _, states[2] = tx.apply(params, states[2], grads)
    found = [in_use(state) for state in states]
    chex.assert_trees_all_close(found[0], found[1], rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(found[0], found[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  ("dtype", "asked", "expected"),
  [
    ("float32", None, "float32"),
    ("bfloat16", None, "float32"),
    ("float16", None, "float32"),
    ("complex64", None, "complex64"),
    ("float32", "bfloat16", "bfloat16"),
    ("complex64", "float32", "complex64"),
    ("bfloat16", "float16", "float16"),
  ],
)
def test_accumulators_are_float32_or_wider_unless_asked(dtype, asked, expected):
  tx = oc.cadence(optax.sgd(1.0), 4, accumulator_dtype=asked)
  assert groups(tx.init(jnp.ones(3, dtype)))[0].accumulators.dtype == expected


@pytest.mark.parametrize("given", [True, False], ids=["with parameters", "without"])
def test_updates_come_back_in_the_wider_dtype_of_gradients_and_parameters(given):
  tx = oc.cadence(oracle.relaxed(optax.sgd(0.1)), {"a": 2, "b": 1, "c": 1})
  params = {"a": jnp.ones(3), "b": jnp.ones(3), "c": jnp.ones(3, jnp.float16)}
  grads = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3, jnp.float16)} | {"c": params["c"]}
  state = tx.init(params)
  for _ in range(2):
    updates, state = tx.update(grads, state, params if given else None)
    assert [x.dtype for x in updates.values()] == ["float32", "float32", "float16"]


def test_many_small_gradients_are_not_lost_in_half_precision():
  # In bfloat16 a running sum of ones stops growing at 256.
  tx = oc.cadence(optax.sgd(1.0), 512, accumulate="sum")
  grads, state = jnp.ones((), jnp.bfloat16), tx.init(jnp.zeros((), jnp.bfloat16))
  step = lambda state, _: tx.update(grads, state)[::-1]
  assert jax.lax.scan(step, state, length=512)[1][-1] == -512


@pytest.mark.parametrize("accumulate", ["sum", "latest"])
def test_sum_and_latest(accumulate):
  tx = cadence(optax.adamw(0.1), accumulate=accumulate)
  expected = trained_by_oracle(optax.adamw(0.1), accumulate=accumulate)
  found, state = trained(tx)
  assert_same_path(found, expected)
  if accumulate == "latest":
    assert all(group.accumulators is None for group in groups(state))
