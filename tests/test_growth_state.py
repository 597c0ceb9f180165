"""Optimizer state follows the parameters, and a run at α = 0 is the run without growth."""

import functools

import growth_nets as nets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from growth_nets import equal
from states import groups

import optax_cadence as oc
from optax_cadence import _paths
from optax_cadence import growth

pytestmark = pytest.mark.ci

X = jax.random.normal(jax.random.key(1), (16, 5))
Y = jax.random.normal(jax.random.key(2), (16, 2))
PARAMS = {
  "one": {"kernel": jax.random.normal(jax.random.key(3), (5, 8)), "bias": jnp.zeros(8)},
  "two": {"kernel": jax.random.normal(jax.random.key(4), (8, 2))},
}


def forward(p, x):
  h = jnp.tanh(x @ p["one"]["kernel"] + p["one"]["bias"][None])
  return h @ p["two"]["kernel"]


def fresh(path, shape, dtype):
  return jax.random.normal(jax.random.key(sum(map(len, path))), shape, dtype)


UNITS = growth.couple(forward, PARAMS, X, producer="one/kernel")
PLAN = growth.widening(PARAMS, UNITS, by=4)
GATED = growth.gated(forward, PLAN)
ZERO = growth.phase_in(lambda t: 0.0)

OPTIMIZERS = {
  "sgd": lambda: optax.sgd(0.1),
  "chain": lambda: optax.chain(optax.trace(0.9), optax.scale_by_adam(), optax.scale(-0.01)),
  "adamw": lambda: optax.adamw(1e-2),
  "partition": lambda: optax.partition(
    {"a": optax.adam(1e-2), "b": optax.sgd(0.1, momentum=0.9)},
    lambda p: {k: "a" if k == "one" else "b" for k in p} if isinstance(p, dict) else "a",
  ),
  "masked": lambda: optax.chain(
    optax.masked(
      optax.trace(0.5),
      lambda p: {k: k == "one" for k in p} if isinstance(p, dict) else True,
    ),
    optax.scale(-0.1),
  ),
  "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
  "cadence": lambda: oc.cadence(optax.adam(1e-2), oc.by_path({"one": 3, "*": 1})),
  "cadence, gate first": lambda: oc.cadence(
    optax.adam(1e-2), oc.by_path({"one": 3, "two": 2}, default=1)
  ),
  "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 3).gradient_transformation(),
}


def loss(fn, p):
  return jnp.mean((fn(p, X) - Y) ** 2)


@functools.cache
def compiled(tx, fn):
  return jax.jit(jax.grad(functools.partial(loss, fn))), jax.jit(tx.update)


def run(tx, fn, params, state, steps):
  grad, update = compiled(tx, fn)
  for _ in range(steps):
    with nets.relaxed():
      updates, state = update(grad(params), state, params)
      params = optax.apply_updates(params, updates)
  return params, state


def init(tx, params):
  with nets.relaxed():
    return tx.init(params)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_run_with_the_gate_shut_is_the_run_without_growth(name):
  tx = optax.chain(OPTIMIZERS[name](), ZERO)
  params, state = run(tx, forward, PARAMS, init(tx, PARAMS), 4)  # windows of 3 are open
  bigger = PLAN.apply(params, fresh)
  grown_state = growth.grow_state(tx, state, params, bigger, PLAN)
  bigger, grown_state = run(tx, GATED, bigger, grown_state, 7)

  old_tx = optax.chain(OPTIMIZERS[name](), ZERO)
  params, state = run(old_tx, forward, params, state, 7)
  back = {k: v for k, v in bigger.items() if k != "alpha"}
  small = PLAN.inverse().apply(back)
  equal(small, params)
  # The state shrinks by the same description: all moments and counters are those of the run.
  back_state = growth.grow_state(tx, grown_state, bigger, back, PLAN)
  back_state = growth.grow_state(old_tx, back_state, back, small, PLAN.inverse())
  if name.startswith("cadence"):
    # A group that trains nothing is left out: that of the gate has counted while there was one.
    equal(
      [back_state[0].micro_step, groups(back_state[0])], [state[0].micro_step, groups(state[0])]
    )
  else:
    equal(back_state[0], state[0])
  assert float(bigger["alpha"]) == 0


def test_new_entries_are_as_init_makes_them():
  tx = optax.adam(1e-2)
  params, state = run(tx, forward, PARAMS, init(tx, PARAMS), 3)
  bigger = PLAN.apply(params, fresh)
  found = growth.grow_state(tx, state, params, bigger, PLAN)
  equal(jax.tree.map(jnp.shape, found), jax.tree.map(jnp.shape, init(tx, bigger)))
  assert int(found[0].count) == 3
  np.testing.assert_array_equal(found[0].mu["one"]["kernel"][:, :8], state[0].mu["one"]["kernel"])
  assert not found[0].mu["one"]["kernel"][:, 8:].any()
  assert float(found[0].mu["alpha"]) == 0


def test_factored_moments_follow():
  big = {"one": {"kernel": jnp.ones((5, 160))}, "two": {"kernel": jnp.ones((160, 130))}}
  fn = lambda p, x: jnp.tanh(x @ p["one"]["kernel"]) @ p["two"]["kernel"]
  plan = growth.widening(big, growth.couple(fn, big, X, producer="one/kernel"), 6)
  tx = optax.scale_by_factored_rms()
  state = init(tx, big)
  state = state._replace(v_row=jax.tree.map(lambda x: x + 2, state.v_row))
  bigger = plan.apply(big, fresh)
  found = growth.grow_state(tx, state, big, bigger, plan)
  shapes = jax.tree.map(jnp.shape, init(tx, bigger))
  assert jax.tree.map(jnp.shape, found) == shapes
  changed = {x.shape for x in jax.tree.leaves((found.v_row, found.v_col))}
  assert (166,) in changed


@pytest.mark.parametrize(
  ("packed", "inner"),
  [
    (True, optax.adam(1e-2)),
    (False, None),
    pytest.param(True, None, marks=pytest.mark.ci),
    pytest.param(False, optax.adam(1e-2), marks=pytest.mark.ci),
  ],
)
def test_masks_of_pruning_follow(packed, inner):
  settings = {"every": oc.pruning.once(2), "packed": packed, "where": lambda path, x: x.ndim == 2}
  if inner is None:
    tx = optax.chain(optax.adam(1e-2), oc.prune(0.5, **settings), ZERO)
  else:
    tx = optax.chain(oc.prune(0.5, criterion="saliency", inner=inner, **settings), ZERO)
  params, state = run(tx, forward, PARAMS, init(tx, PARAMS), 3)
  before = oc.pruning.masks(params, state)
  assert 0 < int(before["one"]["kernel"].sum()) < 40
  bigger = PLAN.apply(params, fresh)
  grown_state = growth.grow_state(tx, state, params, bigger, PLAN)
  masks = oc.pruning.masks(bigger, grown_state)
  np.testing.assert_array_equal(masks["one"]["kernel"][:, :8], before["one"]["kernel"])
  assert masks["one"]["kernel"][:, 8:].all() and masks["two"]["kernel"][8:].all()
  equal(jax.tree.map(jnp.shape, grown_state), jax.tree.map(jnp.shape, init(tx, bigger)))

  bigger, grown_state = run(tx, GATED, bigger, grown_state, 3)
  params, state = run(tx, forward, params, state, 3)
  back = {k: v for k, v in bigger.items() if k != "alpha"}
  equal(PLAN.inverse().apply(back), params)
  merged_state = growth.grow_state(tx, grown_state, bigger, back, PLAN)
  small_state = growth.grow_state(tx, merged_state, back, params, PLAN.inverse())
  equal(small_state[:-1], state[:-1])


def test_what_pruning_remembers_follows():
  where = lambda path, x: x.ndim == 2
  tx = oc.prune(0.5, every=5, criterion=oc.pruning.movement(), inner=optax.sgd(0.1), where=where)
  params, state = run(tx, forward, PARAMS, init(tx, PARAMS), 2)
  bigger = PLAN.apply(params, fresh)
  found = growth.grow_state(tx, state, params, bigger, PLAN).memory["two"]["kernel"]
  np.testing.assert_array_equal(found[:8], state.memory["two"]["kernel"])
  assert not found[8:].any()


@pytest.mark.parametrize(
  "pack",
  [
    lambda p: [p["one"]["kernel"], p["one"]["bias"], p["two"]["kernel"]],
    lambda p: {"net": (p["one"]["kernel"], [p["one"]["bias"]], p["two"]["kernel"])},
  ],
)
def test_trees_of_tuples_and_lists_follow(pack):
  # A list has no place for a gate, so the tree is given at its new size, as after the merge.
  small = pack(PARAMS)
  big = jax.tree.map(lambda x: jnp.ones([12 if n == 8 else n for n in x.shape]), small)
  names = ["/".join(path) for path, _ in _paths.flatten_with_paths(small)]
  units = growth.dimension(small, dict(zip(names, (-1, 0, 0), strict=True)))
  plan = growth.widening(small, units, by=4)
  tx = optax.chain(optax.trace(0.5), oc.cadence(optax.adam(1e-2), oc.as_settled(2, 4)))
  with nets.relaxed():
    _, state = tx.update(small, tx.init(small), small)
    found = growth.grow_state(tx, state, small, big, plan)
    equal(jax.tree.map(jnp.shape, found), jax.tree.map(jnp.shape, tx.init(big)))
  for a, b in zip(jax.tree.leaves(found[0].trace), jax.tree.leaves(small), strict=True):
    expected = np.zeros(a.shape, a.dtype)
    expected[tuple(map(slice, b.shape))] = b
    np.testing.assert_array_equal(a, expected)
  assert int(found[1].micro_step) == 1
  equal(growth.grow_state(tx, found, big, small, plan.inverse())[0], state[0])


def test_a_single_array_follows():
  params, bigger = jnp.ones((3, 4)), jnp.ones((3, 6))
  change = growth.LeafChange((), (3, 4), (3, 6), "follows", {1: np.arange(4)})
  tx = optax.chain(optax.adam(1e-2), oc.cadence(optax.trace(0.5), 2))
  with nets.relaxed():
    _, state = tx.update(params, tx.init(params), params)
    found = growth.grow_state(tx, state, params, bigger, growth.Plan((change,)))
    equal(jax.tree.map(jnp.shape, found), jax.tree.map(jnp.shape, tx.init(bigger)))
  np.testing.assert_array_equal(found[0][0].mu[:, :4], state[0][0].mu)
  assert not found[0][0].mu[:, 4:].any() and int(found[0][0].count) == 1


def test_a_cut_leaf_is_refused():
  tx = oc.cadence(
    optax.adam(1e-2),
    {
      "one": {"kernel": oc.channels([1, 2]), "bias": 1},
      "two": 1,
    },
  )
  state = tx.init(PARAMS)
  with pytest.raises(ValueError, match=r"cuts the leaf into regions"):
    growth.grow_state(
      tx, state, PARAMS, PLAN.apply(PARAMS, fresh), PLAN, new_tx=oc.cadence(optax.adam(1e-2), 1)
    )


def test_old_entries_can_be_slowed_by_a_cadence():
  bigger = PLAN.apply(PARAMS, fresh, alpha=1.0)
  periods = growth.periods(PLAN, bigger, old=1000)
  tx = oc.cadence(optax.sgd(0.1), periods)
  params, _ = run(tx, GATED, bigger, tx.init(bigger), 3)
  old = PLAN.inverse().apply({k: v for k, v in params.items() if k != "alpha"})
  equal(old, PARAMS)
  assert (params["one"]["kernel"][:, 8:] != bigger["one"]["kernel"][:, 8:]).all()


@pytest.mark.parametrize(
  "schedule",
  [
    optax.linear_schedule(0.0, 1.0, 5),
    lambda t: 0.5 - 0.5 * jnp.cos(jnp.pi * t / 5),
    lambda t: jnp.where(t < 3, 0.0, 0.25),
  ],
)
def test_the_gate_follows_its_schedule(schedule):
  tx = optax.chain(optax.adam(1e-2), growth.phase_in(schedule))
  params = PLAN.apply(PARAMS, fresh)
  state = init(tx, params)
  for t in range(1, 7):
    params, state = run(tx, GATED, params, state, 1)
    np.testing.assert_allclose(params["alpha"], schedule(t), atol=1e-7)


def test_set_and_then_learned():
  tx = optax.chain(optax.sgd(0.1), growth.phase_in(lambda t: 0.25, learn_from=3))
  params = PLAN.apply(PARAMS, fresh)
  state, fn = init(tx, params), GATED
  params, state = run(tx, fn, params, state, 2)
  assert float(params["alpha"]) == 0.25
  expected = 0.25 - 0.1 * jax.grad(functools.partial(loss, fn))(params)["alpha"]
  params, state = run(tx, fn, params, state, 1)
  np.testing.assert_allclose(params["alpha"], expected, rtol=1e-6)


def test_the_gate_stays_out_of_a_clipped_norm():
  inner = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(0.1))
  tx = growth.phase_in(lambda t: 0.0, inner)
  params, state = run(tx, forward, PARAMS, init(tx, PARAMS), 2)
  bigger = PLAN.apply(params, fresh)
  state = growth.grow_state(tx, state, params, bigger, PLAN)
  bigger, _ = run(tx, GATED, bigger, state, 2)
  params, _ = run(tx, forward, params, init(tx, params), 2)
  small = PLAN.inverse().apply({k: v for k, v in bigger.items() if k != "alpha"})
  for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(params), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)  # the norm adds up more entries, in another order


@pytest.mark.parametrize(
  ("every", "options"),
  [
    (2, {"nonfinite": "skip"}),
    (2, {"weighted": True}),
    (oc.until_certain(1.0, 2, 2), {}),
    (oc.until_certain(1.0, 2, 2), {"nonfinite": "skip"}),
  ],
)
@pytest.mark.parametrize("around", [True, False])
def test_what_a_cadence_keeps_for_each_region_follows(every, options, around):
  # The gate is one region more in the group of all leaves, and one less after the merge.
  if around:
    tx = oc.cadence(growth.phase_in(lambda t: 0.0, optax.sgd(0.1, momentum=0.9)), every, **options)
  else:
    tx = growth.phase_in(lambda t: 0.0, oc.cadence(optax.sgd(0.1, momentum=0.9), every, **options))
  weight = {"weight": 2.0} if options.get("weighted") else {}

  def runs(fn, params, state, steps):
    for t in steps:
      grads = jax.grad(functools.partial(loss, fn))(params)
      if "nonfinite" in options and t in (2, 3):  # one region misses two micro-batches
        grads["one"]["bias"] *= jnp.nan
      updates, state = tx.update(grads, state, params, **weight)
      params = optax.apply_updates(params, updates)
    return params, state

  params, state = runs(forward, PARAMS, tx.init(PARAMS), range(3))
  bigger = PLAN.apply(params, fresh)
  grown = growth.grow_state(tx, state, params, bigger, PLAN)
  bigger, grown = runs(GATED, bigger, grown, range(3, 5))
  params, state = runs(forward, params, state, range(3, 5))
  back = PLAN.inverse().apply({k: v for k, v in bigger.items() if k != "alpha"})
  state_back = growth.grow_state(tx, grown, bigger, back, PLAN.inverse())
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
  found, expected = (groups(x.inner_state if not around else x) for x in (state_back, state))
  for a, b in zip(found, expected, strict=True):
    assert jax.tree.map(jnp.shape, a) == jax.tree.map(jnp.shape, b)
    for field in ("window", "skipped", "weight"):
      np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
  assert ("nonfinite" in options) == (expected[0].skipped is not None)
  if expected[0].skipped is not None:
    assert expected[0].skipped.tolist() == [2, 0, 0]


def test_regions_that_move_keep_what_is_theirs():
  tx = oc.cadence(optax.sgd(0.1), 3, nonfinite="skip")
  old = {"block0": jnp.ones(2), "head": jnp.ones(2)}
  new = {"block0": jnp.ones(2), "block1": jnp.ones(2), "head": jnp.ones(2)}
  plan = growth.deepening(old, new, outgoing=["block0"], moved={"block0": "block1"})
  grads = {"block0": jnp.full(2, jnp.inf), "head": jnp.ones(2)}
  _, state = tx.update(grads, tx.init(old), old)
  grown = plan.apply(old, lambda path, shape, dtype: jnp.ones(shape, dtype))
  state = growth.grow_state(tx, state, old, grown, plan)
  found = oc.metrics(state)
  names = ("alpha", "block0", "block1", "head")
  assert [int(found[f"{name}/skipped"]) for name in names] == [0, 0, 1, 0]
  assert state.groups["3"].window.tolist() == [0, 0, 0, 1]


def test_a_cadence_without_a_period_for_the_gate_is_an_error_that_says_so():
  old, new = {"one": 2, "two": 1}, oc.by_path({"one": 2}, default=1)
  tx, new_tx = (oc.cadence(optax.sgd(0.1), every) for every in (old, new))
  state, bigger = tx.init(PARAMS), PLAN.apply(PARAMS, fresh)
  with pytest.raises(ValueError, match=r"no cadence for 'alpha'.*oc.by_path\(\{...\}, default=1\)"):
    growth.grow_state(tx, state, PARAMS, bigger, PLAN)
  grown = growth.grow_state(tx, state, PARAMS, bigger, PLAN, new_tx=new_tx)
  assert sorted(grown.groups) == sorted(state.groups)


def test_tree_map_params_knows_the_parameters_of_phase_in():
  tx = growth.phase_in(lambda t: 0.5, optax.sgd(0.1, momentum=0.9))
  params = PLAN.apply(PARAMS, fresh)
  _, state = tx.update(params, tx.init(params), params)
  zeros = optax.tree_utils.tree_map_params(tx, jnp.zeros_like, state)
  assert int(zeros.micro_step) == 1
  assert not any(x.any() for x in jax.tree.leaves(zeros.inner_state[0].trace))


def test_a_parameter_that_is_called_as_the_gate_is_an_error():
  tx, params = growth.phase_in(lambda t: 0.5), {"alpha": jnp.ones(4)}
  with pytest.raises(ValueError, match=r"at 'alpha', found a parameter of shape \(4,\)"):
    tx.init(params)
  with pytest.raises(ValueError, match=r"at 'alpha', found a parameter of shape \(4,\)"):
    tx.update(params, growth.PhaseInState({}, optax.EmptyState()), params)


def test_without_a_gate_phase_in_does_nothing():
  tx = growth.phase_in(lambda t: 0.5)
  updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
  equal(updates, PARAMS)
  assert int(state.micro_step) == 0
  with pytest.raises(ValueError, match="needs the parameters"):
    tx.update(PARAMS, state)


def test_orbax_before_growth_and_in_mid_phase_in(tmp_path):
  checkpoint = pytest.importorskip("orbax.checkpoint")
  tx = optax.chain(optax.adam(1e-2), growth.phase_in(optax.linear_schedule(0.0, 1.0, 6)))
  params, state = run(tx, forward, PARAMS, init(tx, PARAMS), 3)
  fn = GATED

  def through_disk(name, params, state):
    with checkpoint.StandardCheckpointer() as disk:
      disk.save(tmp_path / name, {"params": params, "state": state})
    with checkpoint.StandardCheckpointer() as disk:
      like = jax.tree.map(jnp.zeros_like, {"params": params, "state": state})
      restored = disk.restore(tmp_path / name, like)
    return restored["params"], restored["state"]

  def grow(params, state):
    bigger = PLAN.apply(params, fresh)
    return bigger, growth.grow_state(tx, state, params, bigger, PLAN)

  live = grow(params, state)
  equal(grow(*through_disk("before", params, state)), live)
  half = run(tx, fn, *live, 3)
  assert 0 < float(half[0]["alpha"]) < 1
  equal(run(tx, fn, *through_disk("half", *half), 3), run(tx, fn, *half, 3))


@pytest.mark.ci
def test_gradmax_beats_random_draws_of_equal_norm():
  outer = growth.outer_product(
    lambda p: loss(forward, p), PARAMS, producer="one/kernel", consumer="two/kernel"
  )
  best = growth.gradmax(outer, units=2, norm=0.5)

  plan = growth.widening(PARAMS, UNITS, by=2)
  gradients = jax.jit(jax.grad(functools.partial(loss, growth.gated(forward, plan))))

  def gradient_norm(outgoing):
    values = {"one/kernel": 0.0, "one/bias": 0.0, "two/kernel": outgoing}
    bigger = plan.apply(PARAMS, growth.given(plan, fresh, values), alpha=1.0)
    return float(jnp.linalg.norm(gradients(bigger)["one"]["kernel"][:, 8:]))

  largest = gradient_norm(best)
  # Orthonormal rows of the same norm, as the method's constraint has it.
  for i in range(100):
    draw = jnp.linalg.qr(jax.random.normal(jax.random.key(i), (2, 2)))[0]
    assert gradient_norm(0.5 * draw) <= largest * (1 + 1e-5)
  single = growth.gradmax(outer, units=1)
  for i in range(200):
    draw = jax.random.normal(jax.random.key(i), (1, 2))
    draw = draw / jnp.linalg.norm(draw)
    assert jnp.linalg.norm(outer @ draw.T) <= jnp.linalg.norm(outer @ single.T) * (1 + 1e-5)


def test_copies_are_near_their_sources():
  make = growth.copies(PARAMS, PLAN, fresh, jax.random.key(0), noise=0.0)
  bigger = PLAN.apply(PARAMS, make)
  new, old = bigger["one"]["kernel"][:, 8:], PARAMS["one"]["kernel"]
  assert all((old == column[:, None]).all(0).any() for column in new.T)
  noisy = PLAN.apply(PARAMS, growth.copies(PARAMS, PLAN, fresh, jax.random.key(0), noise=0.1))
  difference = noisy["one"]["kernel"][:, 8:] - new
  assert 0 < float(jnp.abs(difference).max()) < 0.6


def test_a_group_that_has_no_region_before_or_after():
  params = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 4))}
  plan = growth.widening(params, growth.dimension(params, {"a": -1, "b": 0}), by=1)
  grown = plan.apply(params, lambda path, shape, dtype: jnp.ones(shape, dtype))
  # Only the gate has period 1, of which there is none before, and none after the merge.
  tx = oc.cadence(optax.sgd(0.1), oc.by_path({"a": 2, "b": 3}, default=1), nonfinite="skip")
  bad = jax.tree.map(lambda p: p.at[0].set(jnp.nan), params)
  _, state = tx.update(bad, tx.init(params), params)
  assert state.groups["1"].skipped.shape == ()
  bigger = growth.grow_state(tx, state, params, grown, plan)
  assert {k: g.skipped.tolist() for k, g in bigger.groups.items()} == {"2": [1], "3": [1], "1": [0]}
  tx.update(grown, bigger, grown)
  merged = {name: grown[name] for name in params}
  smaller = growth.grow_state(tx, bigger, grown, merged, plan)
  assert {k: g.skipped.tolist() for k, g in smaller.groups.items()} == {"2": [1], "3": [1], "1": 0}
  tx.update(merged, smaller, merged)
