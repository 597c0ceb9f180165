"""Sparse training beside JaxPruner's rules, written out here: the table of the documentation."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import optax_cadence as oc
from optax_cadence import pruning

pytestmark = pytest.mark.ci

DOCS = pathlib.Path(__file__).parents[1] / "docs" / "pruning.md"
ROWS = dict(re.findall(r"^\| `(\w+)` \| `([^|]+)` \| [^|]+ \|$", DOCS.read_text(), re.MULTILINE))
NAMES = ("a", "b")
STEPS = 30


def weights():
  rng = np.random.default_rng(0)
  draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
  return {"a": {"kernel": draw(16, 8), "bias": draw(8)}, "b": {"kernel": draw(7, 5)}}


def gradients(t, read):
  """The gradients of micro-step t: of a quadratic, at the weights that the loss reads."""
  rng = np.random.default_rng(t)
  return jax.tree.map(lambda x: x + jnp.asarray(rng.standard_normal(x.shape), x.dtype), read)


def kernels(tree):
  return {name: np.asarray(tree[name]["kernel"]) for name in NAMES}


def top(scores, kept):
  """The mask of the best, of equal ones the first, as JaxPruner's `topk_mask_calculator`."""
  mask = np.zeros(scores.size, bool)
  mask[np.argsort(-scores.ravel(), kind="stable")[:kept]] = True
  return mask.reshape(scores.shape)


def kept_of(scores, sparsity=0.5):
  return scores.size - round(sparsity * scores.size)


def each(scores):
  return {name: top(x, kept_of(x)) for name, x in scores.items()}


def together(scores):
  """As `GlobalPruningMixin.create_masks`, which divides by the norm."""
  scores = {name: x / (np.linalg.norm(x.ravel()) + 1e-8) for name, x in scores.items()}
  flat = np.concatenate([scores[name].ravel() for name in NAMES])
  mask, size = top(flat, kept_of(flat)), scores["a"].size
  return {"a": mask[:size].reshape(16, 8), "b": mask[size:].reshape(7, 5)}


def draws(t):
  """The random scores of micro-step t: those of this library, since JaxPruner draws others."""
  key = jax.random.fold_in(jax.random.key(0), t)
  shapes = {name: x.shape for name, x in kernels(weights()).items()}
  return {
    name: np.asarray(jax.random.bits(jax.random.fold_in(key, i), shape, jnp.uint32), np.float64)
    for i, (name, shape) in enumerate(shapes.items())
  }


def magnitudes(params, *_):
  return {name: np.abs(x) for name, x in kernels(params).items()}


def saliencies(params, grads, *_):
  return {name: np.abs(x * kernels(grads)[name]) for name, x in kernels(params).items()}


def randoms(params, grads, masks, t):
  return {name: x * masks[name] for name, x in draws(t).items()}


def pruner(score, create=each, due=lambda t: t % 2 == 0):
  def masks_after(params, grads, masks, t):
    return create(score(params, grads, masks, t)) if due(t) else masks

  return masks_after


def exchanger(grow):
  """As `SET._update_masks`, with the number of dropped weights rounded as in RigL's own code."""

  def masks_after(params, grads, masks, t):
    if t % 2:
      return masks
    after = {}
    for name, active in masks.items():
      score, n = np.abs(kernels(params)[name]), active.sum()
      survivors = top(np.where(active, score, -1), n - int(np.float32(0.3) * n))
      after[name] = top(np.where(survivors, np.inf, grow(grads, t)[name]), n)
    return after

  return masks_after


dense = lambda: {name: np.ones(x.shape, bool) for name, x in kernels(weights()).items()}
by_gradient = exchanger(lambda grads, t: {n: np.abs(g) for n, g in kernels(grads).items()})
at_random = exchanger(lambda grads, t: draws(t))
always = lambda t: True
never = lambda t: False

# For each row the rule of the masks, the first ones, and what JaxPruner's class sets.
PEERS = {
  "no_prune": (pruner(magnitudes, due=never), dense, ()),
  "magnitude": (pruner(magnitudes), dense, ()),
  "random": (pruner(randoms), dense, ()),
  "saliency": (pruner(saliencies), dense, ()),
  "magnitude_ste": (pruner(magnitudes, due=always), None, ("straight_through",)),
  "random_ste": (
    pruner(lambda p, g, m, t: draws(t), due=always),
    lambda: each(draws(0)),
    ("straight_through",),
  ),
  "global_magnitude": (pruner(magnitudes, together), dense, ()),
  "global_saliency": (pruner(saliencies, together), dense, ()),
  "static_sparse": (pruner(magnitudes, due=never), lambda: each(draws(1)), ("sparse",)),
  "rigl": (by_gradient, lambda: each(draws(1)), ("sparse", "skips", "restarts")),
  "set": (at_random, lambda: each(draws(1)), ("sparse", "skips", "restarts")),
}


def under(tree, masks):
  return {
    name: {**tree[name], "kernel": jnp.where(masks[name], tree[name]["kernel"], 0)}
    for name in NAMES
  }


def peer_run(name, inner):
  """JaxPruner's `wrap_optax` and its hooks around the gradient step, in plain Python."""
  masks_after, first, flags = PEERS[name]
  params = weights()
  state, after = inner.init(params), []
  masks = first() if first else each(magnitudes(params))
  for t in range(1, STEPS + 1):
    straight = "straight_through" in flags
    grads = gradients(t, under(params, masks) if straight or "sparse" in flags else params)
    if not straight:
      old, masks = masks, masks_after(params, grads, masks, t)
      exchanged = "restarts" in flags and t % 2 == 0
      if exchanged:
        grown = {n: masks[n] & ~old[n] for n in NAMES}
        trace = under(state[0].trace, {n: ~grown[n] for n in NAMES})
        state = (state[0]._replace(trace=trace), *state[1:])
      grads = under(grads, masks) if "sparse" in flags else grads
      if not (exchanged and "skips" in flags):
        updates, state = inner.update(grads, state, params)
        params = optax.apply_updates(params, updates)
      params = under(params, masks)
    else:
      updates, state = inner.update(grads, state, params)
      params = optax.apply_updates(params, updates)
      masks = masks_after(params, grads, masks, t)
    after.append((params, masks, state))
  return after


def test_the_table_has_a_row_for_each_rule():
  assert set(ROWS) == set(PEERS)


@pytest.mark.ci
@pytest.mark.parametrize("name", PEERS)
def test_a_row_of_the_table_does_what_the_rule_of_jaxpruner_does(name):
  row = eval(ROWS[name], {"oc": oc, "optax": optax, "pruning": pruning})
  inner = optax.sgd(0.1, momentum=0.9)
  tx = row if "inner=" in ROWS[name] else optax.chain(inner, row)
  params, pruned = weights(), name != "no_prune"
  state, update = tx.init(params), jax.jit(tx.update)
  changes, before = 0, None
  for t, (expected, masks, inner_state) in enumerate(peer_run(name, inner), start=1):
    read = pruning.masked(params, state) if pruned else params
    updates, state = update(gradients(t, read), state, params)
    params = optax.apply_updates(params, updates)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), params, expected
    )
    if pruned:
      found = kernels(pruning.masks(params, state))
      for n in NAMES:
        np.testing.assert_array_equal(found[n], masks[n])
      changes += before is not None and any((found[n] != before[n]).any() for n in NAMES)
      before = found
    if name in ("rigl", "set"):
      trace = state.inner_state[0].trace
      for n in NAMES:
        np.testing.assert_allclose(
          trace[n]["kernel"], inner_state[0].trace[n]["kernel"], rtol=1e-4, atol=1e-5
        )
  # Masks that are made anew change, and those that are not do not.
  least = {"no_prune": 0, "static_sparse": 0, "magnitude": 1, "random": 1, "saliency": 1}
  assert changes >= least.get(name, 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("around", [lambda tx: tx, lambda tx: oc.cadence(tx, 2)])
def test_straight_through_masks_are_those_of_the_weights_that_are_read(dtype, around):
  inner = around(optax.sgd(0.3))
  tx = optax.chain(inner, oc.prune(0.5, every=1, straight_through=True))
  params = jax.tree.map(lambda x: x.astype(dtype), weights())
  state, moved = tx.init(params), 0

  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for t in range(1, 9):
    masks = kernels(pruning.masks(params, state))
    read = {name: x.astype(np.float32) for name, x in kernels(params).items()}
    expected = each({name: np.abs(x) for name, x in read.items()})
    for name in NAMES:
      np.testing.assert_array_equal(masks[name], expected[name])
    params, state = step(params, state, gradients(t, params))
    moved += any((masks[n] != kernels(pruning.masks(params, state))[n]).any() for n in NAMES)
  assert moved >= 3


def test_straight_through_begins_where_it_is_told_to():
  tx = optax.chain(
    optax.sgd(0.1), oc.prune(0.5, every=pruning.Times(1, begin=3), straight_through=True)
  )
  params, kept = weights(), []
  state = tx.init(params)
  for t in range(1, 5):
    kept.append(float(pruning.masks(params, state)["a"]["kernel"].mean()))
    updates, state = tx.update(gradients(t, params), state, params)
    params = optax.apply_updates(params, updates)
  assert kept == [1.0, 1.0, 1.0, 0.5]


def test_a_straight_through_criterion_that_reads_gradients_begins_dense():
  reads = lambda param, grad: jnp.abs(param * grad)
  for criterion in ("saliency", reads):
    tx = oc.prune(
      0.5, every=1, criterion=criterion, straight_through=True, inner=oracle.relaxed(optax.sgd(0.1))
    )
    params = weights()
    state = tx.init(params)
    assert pruning.masks(params, state)["a"]["kernel"].all()
    _, state = tx.update(gradients(1, params), state, params)
    assert pruning.masks(params, state)["a"]["kernel"].sum() == 64


SPARSE_FROM_THE_START = {
  "static": {"every": pruning.once(1), "criterion": pruning.random(0)},
  "static, the largest": {"every": pruning.once(1)},
  "SET": {"every": 2, "regrow": pruning.at_random(0)},
  "RigL": {"every": 2, "regrow": pruning.by_gradient(stop=None), "inner": optax.sgd(0.1)},
}


@pytest.mark.parametrize("name", SPARSE_FROM_THE_START)
def test_masks_are_there_before_the_first_step(name):
  tx, params = oc.prune(0.5, **SPARSE_FROM_THE_START[name]), weights()
  state = jax.jit(tx.init)(params)
  start = pruning.masked(params, state)
  masks = kernels(pruning.masks(params, state))
  assert {n: int((x == 0).sum()) for n, x in kernels(start).items()} == {"a": 64, "b": 18}
  # They are the masks of the first step, whether or not it begins with the sparse weights.
  for begin in (params, start):
    updates, after = tx.update(gradients(1, begin), state, begin)
    for n in NAMES:
      np.testing.assert_array_equal(kernels(pruning.masks(params, after))[n], masks[n])
      assert not kernels(optax.apply_updates(begin, updates))[n][~masks[n]].any()


def test_sparse_gradients_keep_pruned_weights_out_of_a_global_norm():
  inner = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
  static = {"every": pruning.once(1), "criterion": pruning.random(0), "inner": inner}
  params, lengths = weights(), {}
  grads = jax.tree.map(jnp.ones_like, params)
  for sparse in (False, True):
    tx = oc.prune(0.9, sparse_gradients=sparse, **static)
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    masks = pruning.masks(params, state)
    kept = jax.tree.map(lambda u, m: jnp.where(m, u, jnp.zeros_like(u)), updates, masks)
    lengths[sparse] = float(optax.tree_utils.tree_norm(kept))
  n_kept = sum(int(m.sum()) for m in jax.tree.leaves(masks))
  assert lengths[True] == pytest.approx(1.0, rel=1e-5)
  assert lengths[False] == pytest.approx((n_kept / (16 * 8 + 8 + 7 * 5)) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("restart", [None, False])
def test_moments_of_grown_weights_start_at_zero_or_are_kept(restart):
  regrow = pruning.by_gradient(stop=None)
  adam = oracle.relaxed(optax.adam(0.1))
  tx = oc.prune(0.5, every=4, regrow=regrow, inner=adam, restart=restart)
  params, known = weights(), []
  state, update = tx.init(params), jax.jit(tx.update)
  for t in range(1, 5):
    before, old = params, kernels(pruning.masks(params, state))["a"]
    updates, state = update(gradients(t, params), state, params)
    params = optax.apply_updates(params, updates)
    known.append(state.inner_state[0])
  grown = kernels(pruning.masks(params, state))["a"] & ~old
  assert 10 < grown.sum() <= 19
  mu = np.asarray(state.inner_state[0].mu["a"]["kernel"])
  # At an exchange nothing else happens: no step is counted, and what is kept does not move.
  assert int(known[3].count) == int(known[2].count) == 3
  kept = old & kernels(pruning.masks(params, state))["a"]
  np.testing.assert_array_equal(kernels(params)["a"][kept], kernels(before)["a"][kept])
  np.testing.assert_array_equal(params["a"]["bias"], before["a"]["bias"])
  np.testing.assert_array_equal(mu[~grown], np.asarray(known[2].mu["a"]["kernel"])[~grown])
  assert (mu[grown] != 0).all() if restart is False else not mu[grown].any()


def test_an_exchange_beside_a_step_counts_and_trains():
  tx = oc.prune(0.5, every=2, regrow=pruning.at_random(0), inner=oracle.relaxed(optax.adam(0.1)))
  params = weights()
  state = tx.init(params)
  for t in range(1, 3):
    old = kernels(pruning.masks(params, state))["a"]
    updates, state = tx.update(gradients(t, params), state, params)
    params = optax.apply_updates(params, updates)
  grown = kernels(pruning.masks(params, state))["a"] & ~old
  assert int(state.inner_state[0].count) == 2
  assert grown.sum() and (kernels(params)["a"][grown] != 0).all()


def test_without_a_norm_the_larger_leaf_takes_all():
  params = {"large": 100 * weights()["a"]["kernel"], "small": weights()["a"]["kernel"]}
  kept = {}
  for normalize in (False, True):
    tx = oc.prune(0.5, every=1, allocation="global", normalize=normalize)
    _, state = tx.update(params, tx.init(params), params)
    masks = pruning.masks(params, state)
    kept[normalize] = {name: int(mask.sum()) for name, mask in masks.items()}
  assert kept[True] == {"large": 64, "small": 64}
  assert kept[False]["large"] > 120 and sum(kept[False].values()) == 128


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"normalize": True}, "normalize: expected allocation='global', found 'uniform'"),
    ({"fill": "init"}, "fill: expected hold=False"),
    ({"fill": "ones", "hold": False}, "fill: expected 'zero', 'init', 'shrink'.*found 'ones'"),
    ({"sparse_gradients": True}, "sparse_gradients: expected prune.*inner=optimizer.*found no"),
    (
      {"sparse_gradients": True, "hold": False, "inner": optax.sgd(0.1)},
      "sparse_gradients: expected .*masks that hold.*found inner, hold=False",
    ),
    ({"restart": True}, "restart=True: expected prune.*inner=optimizer.*found inner=None"),
  ],
)
def test_choices_that_change_nothing_are_errors(options, match):
  with pytest.raises(ValueError, match=match):
    oc.prune(0.5, every=2, **options)
