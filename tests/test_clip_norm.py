"""`clip_norm`: one norm of all that fires at a micro-step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_tree

import optax_cadence as oc

RANDOM = np.where(np.random.default_rng(0).random((4, 6)) < 0.5, 2, 4)
PERIODS = {
  "leaves": ({"body": {"bias": 4, "kernel": 1}, "head": 2}, (4, 1, 2)),
  "quadrants": (
    {"body": {"bias": 4, "kernel": oc.quadrants([[1, 2], [4, 2]])}, "head": 2},
    (4, np.kron([[1, 2], [4, 2]], np.ones((2, 3), int)), 2),
  ),
  "mask": ({"body": {"bias": 4, "kernel": RANDOM}, "head": 1}, (4, RANDOM, 1)),
}
CLIP = 0.7


def by_hand(periods, sums, steps, flush=False):
  """Updates of SGD at rate 1, after so many micro-steps, or of a flush after those."""
  windows = [np.zeros(np.shape(g), np.float32) for g in jax.tree.leaves(small_tree.PARAMS)]
  for t in range(1, steps + 1):
    for i, g in enumerate(jax.tree.leaves(small_tree.BATCHES[t - 1])):
      windows[i] = np.where((t - 1) % periods[i] == 0, 0, windows[i]) + np.asarray(g)
  fires = [(steps % k != 0) if flush else (steps % k == 0) for k in periods]
  counts = [1 if sums else np.where(steps % k == 0, k, steps % k) for k in periods]
  means = [np.where(due, w / n, 0) for due, w, n in zip(fires, windows, counts, strict=True)]
  norm = np.sqrt(sum(np.square(x).sum() for x in means))
  assert norm > CLIP
  return [-x * CLIP / norm for x in means]


@pytest.mark.parametrize("accumulate", ["mean", "sum"])
@pytest.mark.parametrize("cadences", PERIODS)
def test_it_is_the_norm_of_all_groups_that_are_due(cadences, accumulate):
  every, periods = PERIODS[cadences]
  tx = oc.cadence(optax.sgd(1.0), every, clip_norm=CLIP, accumulate=accumulate)
  state, update = tx.init(small_tree.PARAMS), jax.jit(tx.update)
  for t in range(1, 5):
    updates, state = update(small_tree.BATCHES[t - 1], state, small_tree.PARAMS)
    if t in (2, 4):
      expected = by_hand(periods, accumulate == "sum", t)
      for x, y in zip(jax.tree.leaves(updates), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
    if t == 3:
      updates, _ = jax.jit(tx.flush)(state, small_tree.PARAMS)
      expected = by_hand(periods, accumulate == "sum", t, flush=True)
      for x, y in zip(jax.tree.leaves(updates), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_of_one_group_it_is_that_of_optax():
  inner = optax.chain(optax.clip_by_global_norm(CLIP), optax.sgd(1.0))
  expected = small_tree.trained(oc.cadence(inner, 4))[0]
  found = small_tree.trained(oc.cadence(optax.sgd(1.0), 4, clip_norm=CLIP))[0]
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("every", [2, {"body": {"bias": 2, "kernel": RANDOM}, "head": 2}])
def test_less_than_that_is_left_as_it_is(every):
  found = small_tree.trained(oc.cadence(optax.sgd(1.0), every, clip_norm=1e6))[0]
  jax.tree.map(
    np.testing.assert_array_equal, found, small_tree.trained(oc.cadence(optax.sgd(1.0), every))[0]
  )


def test_every_way_of_calling_gives_the_same():
  every = PERIODS["mask"][0]
  tx = oc.cadence(optax.trace(0.9), every, clip_norm=CLIP)
  params = small_tree.PARAMS
  state = plain = phased = tx.init(params)
  applied = stepped = params
  phases = oc.phases(tx, params)
  for grads in small_tree.BATCHES[:4]:
    updates, state = tx.update(grads, state, params)  # outside of a program
    params = optax.apply_updates(params, updates)
    applied, plain = jax.jit(tx.apply)(applied, plain, grads)
    phase = next(phases)
    stepped, phased = jax.jit(tx.apply, static_argnames="phase")(
      stepped, phased, grads, phase=phase
    )
  for other in (applied, stepped):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), params, other)


@pytest.mark.parametrize("cadences", ["quadrants", "mask"])
def test_every_member_of_a_vmap_has_its_own(cadences):
  tx = oc.cadence(optax.sgd(1.0), PERIODS[cadences][0], clip_norm=CLIP)
  params, grads = small_tree.PARAMS, small_tree.BATCHES[0]
  batches = [grads, jax.tree.map(lambda g: g / 100, grads)]
  states = jax.tree.map(lambda x: jnp.stack([x, x]), tx.init(params))
  update = jax.jit(jax.vmap(lambda g, s: tx.update(g, s, params)))
  for _ in range(2):
    updates, states = update(small_tree.stack(batches), states)
  for i, g in enumerate(batches):
    state = tx.init(params)
    for _ in range(2):
      expected, state = jax.jit(tx.update)(g, state, params)
    found = jax.tree.map(lambda x: x[i], updates)  # noqa: B023
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found, expected)


def whole_steps(every, way, **settings):
  """Parameters of two stacked layers and a head after some micro-steps."""

  def loss(params, x):
    hidden, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])
    return 10 * (hidden @ params["head"]).sum()

  tx = oc.cadence(optax.sgd(0.1), every, clip_norm=0.5, **settings)
  params = {"layers": jnp.full((2, 4, 4), 0.3), "head": jnp.ones(4)}
  state, extra = tx.init(params), {"weight": 2.0} if settings else {}
  step = jax.jit(oc.training_step(loss, tx))
  apply = jax.jit(
    lambda params, state, x: tx.apply(params, state, jax.grad(loss)(params, x), **extra)
  )
  for x in jnp.asarray(np.random.default_rng(0).normal(size=(5, 3, 4)), jnp.float32):
    if way == "step":
      params, state, _ = step(params, state, x)
    else:
      params, state = apply(params, state, x)
  return params


@pytest.mark.parametrize(
  ("every", "way", "settings"),
  [
    ({"layers": 4, "head": 2}, "step", {}),
    ({"layers": oc.until_certain(1.0, 4, 4), "head": oc.as_settled(2, 2)}, "apply", {}),
    ({"layers": 4, "head": 2}, "apply", {"nonfinite": "skip", "weighted": True}),
  ],
)
def test_it_goes_with_sums_of_the_backward_pass_policies_and_weights(every, way, settings):
  found = whole_steps(every, way, **settings)
  expected = whole_steps({"layers": 4, "head": 2}, "apply")
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected)


def test_a_nan_stays_in_its_window():
  tx = oc.cadence(optax.sgd(1.0), {"a": 1, "b": 2}, clip_norm=1.0)
  params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
  grads = {"a": jnp.full(2, 3.0), "b": jnp.full(2, jnp.nan)}
  _, state = tx.update(grads, tx.init(params), params)
  updates, _ = tx.update(grads, state, params)
  np.testing.assert_array_equal(updates["a"], [-3.0, -3.0])
  assert np.isnan(updates["b"]).all()


def test_it_is_a_number():
  with pytest.raises(ValueError, match="clip_norm: expected a number"):
    oc.cadence(optax.sgd(1.0), 2, clip_norm="1")


@pytest.mark.skipif(jax.__version_info__ < (0, 7), reason="types do not say what varies")
def test_shards_with_a_norm_each_scale_nothing_that_they_share():
  tx = oc.cadence(optax.sgd(1.0), {"shared": 2, "sharded": 1}, clip_norm=1.0)
  mesh = jax.sharding.Mesh(jax.devices()[:1], ("x",))
  along = jax.sharding.PartitionSpec("x")
  params = {"shared": jnp.zeros(2), "sharded": jnp.zeros(2)}

  def updated(shared):
    specs = {"shared": shared, "sharded": along}

    def fn(params):
      return tx.update(params, tx.init(params), params)[0]

    mapped = jax.shard_map(fn, mesh=mesh, in_specs=(specs,), out_specs=specs)
    return jax.eval_shape(jax.jit(mapped), params)

  assert updated(along)["shared"].shape == (2,)
  with pytest.raises(ValueError, match="'sharded' over x and that of 'shared' over none"):
    updated(jax.sharding.PartitionSpec())
