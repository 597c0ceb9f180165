"""The cadence inside and around the rest of Optax, Flax, Equinox and JAX itself.

Each composition trains for two full cycles and one micro-step more, and is compared with
the oracle, or with the same composition around `optax.MultiSteps`, or with a plain loop.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect

import equinox as eqx
import flax
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import oracle
import pytest
from flax import nnx
from flax.training import train_state

import optax_cadence as oc

SHAPES = {"body": {"bias": (6,), "kernel": (4, 6)}, "head": (3,)}

# Three groups, a leaf cut into four tensors, two of them in one group; a cycle of 4.
EVERY = {
  "body": {"bias": oc.Every(4, offset=3), "kernel": oc.quadrants([[1, 2], [2, 1]])},
  "head": 2,
}
PIECES = [
  oracle.whole(4, 3),
  oracle.rectangles((4, 6), [[1, 2], [2, 1]], (-2, -1)),
  oracle.whole(2),
]

# The same without cuts, which plain Optax can express.
LEAFWISE = {"body": {"bias": 4, "kernel": 2}, "head": 1}

STEPS = 9


def by_hand(inner):
  """`LEAFWISE` in plain Optax."""
  slow = {k: optax.MultiSteps(inner, k).gradient_transformation() for k in (2, 4)}
  return optax.partition({1: inner, **slow}, LEAFWISE)


def dyadic(seed, shapes=SHAPES):
  """A tree of dyadic numbers, whose sums are exact in any order."""
  rng = np.random.default_rng(seed)
  draw = lambda shape: jnp.asarray(rng.integers(-8, 9, shape) / 8.0, jnp.float32)
  return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


PARAMS = dyadic(100)
BATCHES = [dyadic(seed) for seed in range(STEPS)]


def stack(trees):
  return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def trained(tx, params=PARAMS, batches=BATCHES, **extra_args):
  """Parameters after every micro-step, and the last state."""
  state, update, after = tx.init(params), jax.jit(tx.update), []
  for grads in batches:
    updates, state = update(grads, state, params, **extra_args)
    params = optax.apply_updates(params, updates)
    after.append(params)
  return after, state


def trained_by_oracle(
  inner, pieces=PIECES, params=PARAMS, batches=BATCHES, accumulate="mean", **extra_args
):
  """The same by the oracle: a list of leaves after every micro-step."""
  leaves, after = jax.tree.leaves(params), []
  slow = oracle.Oracle(oracle.relaxed(inner), leaves, pieces, accumulate, **extra_args)
  for grads in batches:
    updates = slow.step(jax.tree.leaves(grads), leaves)
    leaves = optax.apply_updates(leaves, updates)
    after.append(leaves)
  return after


@functools.cache
def adamw_by_oracle():
  return trained_by_oracle(optax.adamw(0.1))


def assert_same_path(found, expected, ulps=8):
  assert len(found) == len(expected)
  for a, b in zip(found, expected, strict=True):
    assert_close(a, b, ulps)


def assert_close(found, expected, ulps=8):
  """Within a few units in the last place of the largest entry, leaf by leaf."""
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    tol = ulps * np.finfo(b.dtype).eps
    largest = np.abs(b).max(initial=1.0, where=np.isfinite(b))
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol * largest)


def assert_identical(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def subtree(state, kind):
  """All parts of a state that are of this type."""
  found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
  return [x for x in found if isinstance(x, kind)]


@contextlib.contextmanager
def relaxed():
  """JAX's ordinary promotion rules, for whole frameworks that rely on them."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def cadence(inner, every=EVERY, **kwargs):
  return oc.cadence(oracle.relaxed(inner), every, **kwargs)


# Chains.


def test_in_a_chain_what_stands_before_and_after_acts_on_every_micro_step():
  tx = optax.chain(optax.clip(0.25), cadence(optax.adam(0.1)), optax.scale(0.5))
  clipped = jax.tree.map(lambda g: jnp.clip(g, -0.25, 0.25), BATCHES)
  leaves, expected = jax.tree.leaves(PARAMS), []
  slow = oracle.Oracle(oracle.relaxed(optax.adam(0.1)), leaves, PIECES)
  for grads in clipped:
    updates = [0.5 * u for u in slow.step(jax.tree.leaves(grads), leaves)]
    leaves = optax.apply_updates(leaves, updates)
    expected.append(leaves)
  assert_same_path(trained(tx)[0], expected)


def test_oc_chain_keeps_apply_phase_flush_and_cycle():
  transforms = optax.clip(0.25), optax.trace(0.5)
  before, inner = optax.chain(*transforms), optax.adamw(0.1)
  tx = oc.chain(transforms[0], oc.chain(transforms[1], cadence(inner)))
  assert tx.cycle == 4
  slow = oracle.Oracle(oracle.relaxed(inner), jax.tree.leaves(PARAMS), PIECES)
  apply = jax.jit(tx.apply, static_argnames="phase")
  by_apply = by_phase = PARAMS, tx.init(PARAMS)
  trace = before.init(PARAMS)
  expected = jax.tree.leaves(PARAMS)
  for t, grads in enumerate(BATCHES, start=1):
    moving, trace = before.update(grads, trace)
    expected = optax.apply_updates(expected, slow.step(jax.tree.leaves(moving), expected))
    by_apply = apply(*by_apply, grads)
    by_phase = apply(*by_phase, grads, phase=t % tx.cycle)
    assert_close(by_apply[0], expected)
    assert_close(by_phase[0], expected)
  expected = optax.apply_updates(expected, slow.flush(expected))
  for params, state in (by_apply, by_phase):
    updates, flushed = jax.jit(tx.flush)(state, params)
    assert_close(optax.apply_updates(params, updates), expected)
    assert jax.tree.structure(flushed) == jax.tree.structure(state)


def test_oc_chain_has_the_state_and_the_updates_of_optax_chain():
  transforms = optax.clip(0.25), optax.trace(0.5), cadence(optax.adamw(0.1))
  ours, theirs = trained(oc.chain(*transforms)), trained(optax.chain(*transforms))
  assert_identical(ours, theirs)


# Masks and partitions.


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


# Hyperparameters, wrappers and optimizers that are not elementwise.


def test_around_injected_hyperparameters_the_schedule_counts_updates():
  schedule = optax.linear_schedule(0.5, 0.1, 4)
  inner = optax.inject_hyperparams(optax.adam)(learning_rate=schedule)
  assert_same_path(trained(cadence(inner))[0], trained_by_oracle(inner))


def test_a_learning_rate_set_by_hand_holds_for_the_next_update():
  inner = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
  tx = cadence(inner, 2)
  state = tx.init(PARAMS)
  _, state = tx.update(BATCHES[0], state, PARAMS)
  injected = state.groups[0].inner_state
  injected.hyperparams["learning_rate"] = jnp.float32(0.25)
  updates, _ = tx.update(BATCHES[1], state, PARAMS)
  expected = jax.tree.map(lambda a, b: -0.25 * (a + b) / 2, *BATCHES[:2])
  assert_close(updates, expected)


@pytest.mark.parametrize("static", [False, True])
def test_inside_injected_hyperparameters_the_learning_rate_is_traced(static):
  schedule = optax.linear_schedule(0.5, 0.1, 8)
  inject = lambda make: oracle.relaxed(optax.inject_hyperparams(make)(learning_rate=schedule))
  tx = inject(lambda learning_rate: oc.cadence(optax.adam(learning_rate), LEAFWISE))
  peer = inject(lambda learning_rate: by_hand(optax.adam(learning_rate)))
  state, params, found = tx.init(PARAMS), PARAMS, []
  update = jax.jit(tx.update, static_argnames="phase")
  for t, grads in enumerate(BATCHES, start=1):
    phase = {"phase": t % 4} if static else {}
    updates, state = update(grads, state, params, **phase)
    params = optax.apply_updates(params, updates)
    found.append(params)
  assert_same_path(found, trained(peer)[0])
  assert float(state.hyperparams["learning_rate"]) == schedule(STEPS - 1)


def test_a_period_can_be_an_injected_hyperparameter():
  make = lambda every: oc.cadence(optax.sgd(1.0), every)
  tx = oracle.relaxed(optax.inject_hyperparams(make)(every=2))
  state, update, due = tx.init(PARAMS), jax.jit(tx.update), []
  for t, grads in enumerate(BATCHES, start=1):
    updates, state = update(grads, state, PARAMS)
    due += [t] if updates["head"].any() else []
    if t == 3:
      state.hyperparams["every"] = jnp.int32(4)  # Read when the next window begins.
  assert due == [2, 4, 8]


NAN_BATCHES = [
  jax.tree.map(lambda g, bad=(t == 5): jnp.where(bad, jnp.nan, g), grads)
  for t, grads in enumerate(BATCHES)
]


def test_around_apply_if_finite_a_window_with_a_nan_is_not_applied():
  inner = optax.apply_if_finite(optax.adam(0.1), 3)
  found, state = trained(cadence(inner), batches=NAN_BATCHES)
  assert_same_path(found, trained_by_oracle(inner, batches=NAN_BATCHES))
  assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found))
  counts = [int(s.total_notfinite) for s in subtree(state, optax.ApplyIfFiniteState)]
  assert counts == [1, 1, 1]


def test_inside_apply_if_finite_a_micro_step_with_a_nan_is_none_at_all():
  tx = optax.apply_if_finite(cadence(optax.adam(0.1)), 3)
  found, state = trained(tx, batches=NAN_BATCHES)
  clean = BATCHES[:5] + BATCHES[6:]
  expected = trained_by_oracle(optax.adam(0.1), batches=clean)
  assert_same_path(found, [*expected[:5], expected[4], *expected[5:]])
  assert int(state.inner_state.micro_step) == STEPS - 1


def test_inside_lookahead():
  around = lambda fast: oracle.relaxed(optax.lookahead(fast, sync_period=3, slow_step_size=0.5))
  start = optax.LookaheadParams.init_synced(PARAMS)
  batches = BATCHES
  found, _ = trained(around(oc.cadence(optax.sgd(0.5, momentum=0.5), LEAFWISE)), start, batches)
  expected, _ = trained(around(by_hand(optax.sgd(0.5, momentum=0.5))), start, batches)
  assert_same_path(found, expected)


@pytest.mark.parametrize("every", [2, LEAFWISE, {"fast": 2, "slow": 4}])
def test_around_lookahead_is_an_error_that_says_what_to_use_instead(every):
  tx = oc.cadence(optax.lookahead(optax.sgd(0.5), sync_period=3, slow_step_size=0.5), every)
  params = optax.LookaheadParams.init_synced(PARAMS)
  with pytest.raises(ValueError, match="lookahead"):
    tx.update(BATCHES[0], tx.init(params), params)


def test_around_schedule_free_adamw():
  inner = optax.contrib.schedule_free_adamw(0.1, warmup_steps=2, weight_decay=0.1)
  # Each step takes a difference of weighted means divided by b1, so rounding grows along the way.
  assert_same_path(trained(cadence(inner))[0], trained_by_oracle(inner), ulps=64)


def test_inside_schedule_free_the_average_goes_on_in_every_micro_step():
  around = lambda base: oracle.relaxed(optax.contrib.schedule_free(base, 0.1, b1=0.9))
  found, state = trained(around(oc.cadence(optax.adam(0.1, b1=0.0), LEAFWISE)))
  expected, peer = trained(around(by_hand(optax.adam(0.1, b1=0.0))))
  assert_same_path(found, expected, ulps=64)  # As above.
  evaluate = optax.contrib.schedule_free_eval_params
  with relaxed():
    assert_close(evaluate(state, found[-1]), evaluate(peer, expected[-1]), ulps=64)


def test_around_muon_each_quadrant_is_a_matrix():
  inner = optax.contrib.muon(0.1)
  # Newton-Schulz multiplies matrices, whose sums XLA orders as it likes in each program.
  assert_same_path(trained(cadence(inner))[0], trained_by_oracle(inner), ulps=256)


# Flax and Equinox.


class LinenNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(6, name="stem")(x))
    return nn.Dense(2, name="head")(x)


NET_EVERY = {"head": 4, "stem": {"bias": 2, "kernel": oc.quadrants([[1, 2], [2, 1]])}}
NET_PIECES = [
  oracle.whole(4),
  oracle.whole(4),
  oracle.whole(2),
  oracle.rectangles((4, 6), [[1, 2], [2, 1]], (-2, -1)),
]


def data(t):
  rng = np.random.default_rng(t)
  x = rng.normal(size=(8, 4)).astype(np.float32)
  return jnp.asarray(x), jnp.asarray(np.stack([x.sum(1), x[:, 0] * x[:, 1]], axis=1))


class Follower:
  """The oracle beside a framework: fed the gradients that the framework computed."""

  def __init__(self, inner, params, pieces):
    self.leaves = [jnp.array(p) for p in jax.tree.leaves(params)]
    self.slow = oracle.Oracle(oracle.relaxed(inner), self.leaves, pieces)

  def step(self, grads):
    updates = self.slow.step(jax.tree.leaves(grads), self.leaves)
    self.leaves = optax.apply_updates(self.leaves, updates)
    return self.leaves


def test_in_a_linen_train_state():
  net, inner = LinenNet(), optax.adamw(0.1)
  params = net.init(jax.random.key(0), data(0)[0])["params"]
  state = train_state.TrainState.create(
    apply_fn=net.apply, params=params, tx=cadence(inner, NET_EVERY)
  )
  slow = Follower(inner, params, NET_PIECES)

  @jax.jit
  def step(state, x, y):
    loss = lambda params: ((state.apply_fn({"params": params}, x) - y) ** 2).mean()
    grads = jax.grad(loss)(state.params)
    return state.apply_gradients(grads=grads), grads

  for t in range(STEPS):
    with relaxed():
      state, grads = step(state, *data(t))
    assert_close(state.params, slow.step(grads))
  assert int(state.step) == int(state.opt_state.micro_step) == STEPS


def test_a_plain_dict_is_a_prefix_of_a_frozen_dict():
  freeze = flax.core.freeze
  params, batches = freeze(PARAMS), list(map(freeze, BATCHES))
  tx = cadence(optax.adamw(0.1), EVERY)
  found, state = trained(tx, params, batches)
  assert isinstance(found[0], flax.core.FrozenDict)
  assert isinstance(state.groups[0].accumulators, flax.core.FrozenDict)
  assert_same_path(found, adamw_by_oracle())


class NnxNet(nnx.Module):
  def __init__(self, rngs):
    self.stem = nnx.Linear(4, 6, rngs=rngs)
    self.head = nnx.Linear(6, 2, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.tanh(self.stem(x)))


def nnx_update(optimizer, model, grads):
  """`nnx.Optimizer.update`, which takes the model since Flax 0.11."""
  takes_model = "model" in inspect.signature(nnx.Optimizer.update).parameters
  return optimizer.update(model, grads) if takes_model else optimizer.update(grads)


CHECKERS = 2 ** (np.indices((4, 6)).sum(0) % 3)
NNX_CASES = {
  "leaves": (
    {"head": 1, "stem": {"bias": 2, "kernel": 4}},
    list(map(oracle.whole, (1, 1, 2, 4))),
    True,
  ),
  # Two tensors of one leaf in one group.
  "quadrants": (NET_EVERY, NET_PIECES, True),
  # So many that their numbers sort differently as text.
  "twelve rectangles": (
    {"head": 2, "stem": {"bias": 2, "kernel": oc.Grid([[2] * 4] * 3, axes=(0, 1))}},
    [oracle.whole(2)] * 3 + [oracle.rectangles((4, 6), [[2] * 4] * 3, (0, 1))],
    True,
  ),
  "quadrants without nnx.jit": (NET_EVERY, NET_PIECES, False),
  "mask": (
    {"head": 2, "stem": {"bias": 4, "kernel": CHECKERS}},
    [*map(oracle.whole, (2, 2, 4)), oracle.entries(CHECKERS)],
    True,
  ),
  "bands": (
    oc.by_path({"head": 4, "stem/kernel": oc.channels([4, 2, 4, 1]), "*": 2}),
    [*NET_PIECES[:3], oracle.bands((4, 6), [4, 2, 4, 1], -1)],
    True,
  ),
}


@pytest.mark.parametrize(("every", "pieces", "jit"), NNX_CASES.values(), ids=NNX_CASES)
def test_in_an_nnx_optimizer(every, pieces, jit):
  model, inner = NnxNet(nnx.Rngs(0)), optax.adamw(0.1)
  slow = Follower(inner, nnx.state(model, nnx.Param), pieces)
  optimizer = nnx.Optimizer(model, cadence(inner, every), wrt=nnx.Param)

  def step(model, optimizer, x, y):
    grads = nnx.grad(lambda model: ((model(x) - y) ** 2).mean())(model)
    nnx_update(optimizer, model, grads)
    return grads

  step = nnx.jit(step) if jit else step
  for t in range(STEPS if jit else 5):  # Without jit every micro-step compiles its branches.
    with relaxed():
      grads = step(model, optimizer, *data(t))
    assert_close(nnx.state(model, nnx.Param), slow.step(grads))


def test_in_an_nnx_optimizer_bad_batches_are_skipped():
  model, inner = NnxNet(nnx.Rngs(0)), optax.adamw(0.1)
  slow = Follower(inner, nnx.state(model, nnx.Param), NET_PIECES)
  optimizer = nnx.Optimizer(model, cadence(inner, NET_EVERY, nonfinite="skip"), wrt=nnx.Param)
  step = nnx.jit(lambda model, optimizer, grads: nnx_update(optimizer, model, grads) and None)
  template = nnx.state(model, nnx.Param)
  bad = jax.tree.map(lambda p: jnp.full_like(p, NAN), template)
  with relaxed():
    for _ in range(4):  # A whole cycle in which no window holds anything.
      step(model, optimizer, bad)
    assert_close(nnx.state(model, nnx.Param), slow.leaves, ulps=0)
    for t in range(4):
      leaves = dyadic(t, [p.shape for p in jax.tree.leaves(template)])
      step(model, optimizer, jax.tree.unflatten(jax.tree.structure(template), leaves))
      assert_close(nnx.state(model, nnx.Param), slow.step(leaves))


def test_on_an_equinox_module_filtered_to_its_arrays():
  model = eqx.nn.MLP(4, 2, 6, depth=1, key=jax.random.key(0))
  params, static = eqx.partition(model, eqx.is_inexact_array)
  every = {"layers": {"0": {"weight": oc.quadrants([[1, 2], [2, 1]]), "bias": 4}, "1": 2}}
  inner = optax.adamw(0.1)
  tx = cadence(inner, every)
  state = tx.init(params)
  leaves = jax.tree.leaves(params)
  pieces = [
    oracle.rectangles(leaves[0].shape, [[1, 2], [2, 1]], (-2, -1)),
    oracle.whole(4),
    oracle.whole(2),
    oracle.whole(2),
  ]
  slow = Follower(inner, params, pieces)

  @jax.jit
  def step(params, state, x, y):
    loss = lambda params: ((jax.vmap(eqx.combine(params, static))(x) - y) ** 2).mean()
    grads = jax.grad(loss)(params)
    return *tx.apply(params, state, grads), grads

  for t in range(STEPS):
    with relaxed():
      params, state, grads = step(params, state, *data(t))
    assert isinstance(params, eqx.nn.MLP)
    assert_close(params, slow.step(grads))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Net:
  body: dict
  head: jax.Array


def test_on_a_dataclass_with_a_plain_dict_as_prefix():
  net = lambda tree: Net(body={"inner": [tree["body"], None]}, head=tree["head"])
  every = {"body": {"inner": {"0": EVERY["body"]}}, "head": 2}
  found, state = trained(cadence(optax.adamw(0.1), every), net(PARAMS), list(map(net, BATCHES)))
  assert isinstance(found[0], Net) and isinstance(state.groups[0].accumulators, Net)
  assert_same_path(found, adamw_by_oracle())


# JAX's own transformations.


@pytest.mark.parametrize("how", ["update", "apply"])
def test_scan_over_micro_steps(how):
  tx = cadence(optax.adamw(0.1))

  def step(carry, grads):
    params, state = carry
    if how == "apply":
      carry = tx.apply(params, state, grads)
    else:
      updates, state = tx.update(grads, state, params)
      carry = optax.apply_updates(params, updates), state
    return carry, carry[0]

  run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), stack(BATCHES))[1])
  assert_close(run(PARAMS), stack(adamw_by_oracle()))


def scanned(tx, params=PARAMS, batches=None):
  """The parameters after all micro-steps, with `apply` in a scan."""
  step = lambda carry, grads: (tx.apply(*carry, grads), None)
  batches = stack(BATCHES) if batches is None else batches
  return jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]


def test_vmap_over_traced_periods_equals_static_runs():
  def final(period):
    every = {
      "body": {"bias": oc.Every(period), "kernel": oc.channels([1, period, 3])},
      "head": period,
    }
    return scanned(cadence(optax.adamw(0.1), every))

  periods = [1, 3]
  with jax.checking_leaks():
    swept = jax.jit(jax.vmap(final))(jnp.array(periods))
  for i, period in enumerate(periods):
    expected = jax.jit(final, static_argnums=0)(period)
    assert_close(jax.tree.map(lambda x, i=i: x[i], swept), expected)


def test_vmap_over_a_vector_of_periods_for_bands():
  def final(periods):
    tx = cadence(optax.adamw(0.1), {"body": {"bias": oc.channels(periods), "kernel": 2}, "head": 1})
    return scanned(tx)

  sweep = [[1, 2, 4], [3, 3, 3]]
  swept = jax.jit(jax.vmap(final))(jnp.array(sweep))
  for i, periods in enumerate(sweep):
    pieces = [oracle.bands((6,), periods, 0), oracle.whole(2), oracle.whole(1)]
    expected = trained_by_oracle(optax.adamw(0.1), pieces)[-1]
    assert_close(jax.tree.map(lambda x, i=i: x[i], swept), expected)


def test_vmap_over_learning_rates_with_static_periods():
  final = lambda rate: scanned(cadence(optax.adamw(rate)))
  swept = jax.jit(jax.vmap(final))(jnp.array([0.1, 0.5]))
  expected = [adamw_by_oracle()[-1], trained_by_oracle(optax.adamw(0.5))[-1]]
  for i in range(2):
    assert_close(jax.tree.map(lambda x, i=i: x[i], swept), expected[i])


def test_vmap_over_models_trains_an_ensemble():
  tx = cadence(optax.adamw(0.1))
  models = stack([PARAMS, dyadic(101)])
  batches = stack([stack(BATCHES), stack([dyadic(200 + t) for t in range(STEPS)])])
  swept = jax.jit(jax.vmap(functools.partial(scanned, tx)))(models, batches)
  assert_close(jax.tree.map(lambda x: x[0], swept), adamw_by_oracle()[-1])


def test_a_checkpointed_model_trains_as_the_plain_one():
  def loss(params, x, layer):
    for _ in range(2):
      x = layer(params["kernel"], x)
    return (x**2).mean()

  layer = lambda kernel, x: jnp.tanh(x @ kernel)
  params = {"kernel": dyadic(7, (4, 4))}
  tx = cadence(optax.adamw(0.1), oc.quadrants([[1, 2], [2, 1]]))

  def final(layer):
    def step(carry, x):
      grads = jax.grad(loss)(carry[0], x, layer)
      return tx.apply(*carry, grads), grads

    inputs = stack([data(t)[0] for t in range(STEPS)])
    (params_, _), grads = jax.lax.scan(step, (params, tx.init(params)), inputs)
    return params_, grads

  found, grads = jax.jit(lambda: final(jax.checkpoint(layer)))()
  plain, _ = jax.jit(lambda: final(layer))()
  assert_close(found, plain)
  batches = [jax.tree.map(lambda g, t=t: g[t], grads) for t in range(STEPS)]
  pieces = [oracle.rectangles((4, 4), [[1, 2], [2, 1]], (-2, -1))]
  assert_close(found, trained_by_oracle(optax.adamw(0.1), pieces, params, batches)[-1])


def test_with_donated_buffers_every_buffer_is_used_again():
  tx = cadence(optax.adamw(0.1))
  step = jax.jit(tx.apply, donate_argnums=(0, 1))
  params = jax.tree.map(jnp.copy, PARAMS)
  state, found = tx.init(params), []
  for grads in BATCHES:
    given = jax.tree.leaves((params, state))
    params, state = step(params, state, grads)
    assert all(x.is_deleted() for x in given)
    found.append(jax.tree.map(np.array, params))  # A view of a buffer would keep it alive.
  assert_same_path(found, adamw_by_oracle())


def test_a_cadence_passes_through_what_rebuilds_named_tuples():
  # `nnx.jit` does so to the attributes of a module in Flax 0.10.
  alone = cadence(optax.sgd(0.1), LEAFWISE)
  for tx in (alone, oc.chain(optax.clip(0.25), alone)):
    rebuilt = jax.tree.unflatten(jax.tree.structure(tx), jax.tree.leaves(tx))
    for same in (rebuilt, copy.copy(tx)):
      assert same.cycle == 4
      _, state = jax.eval_shape(same.apply, PARAMS, same.init(PARAMS), BATCHES[0])
      jax.eval_shape(same.flush, state, PARAMS)


def test_init_can_be_evaluated_for_its_shapes_alone():
  for nonfinite in ("propagate", "skip"):
    tx = cadence(optax.adamw(0.1), lambda params: EVERY, nonfinite=nonfinite)
    shapes = jax.eval_shape(tx.init, PARAMS)
    assert tx.cycle == 4
    state = tx.init(PARAMS)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True):
      assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
    after = jax.eval_shape(tx.update, PARAMS, shapes, PARAMS)[1]
    assert jax.tree.leaves(after) == jax.tree.leaves(shapes)


def test_tree_map_params_reaches_moments_and_accumulators_alone():
  tx = cadence(optax.adamw(0.1))
  state = trained(tx, batches=BATCHES[:3])[1]
  marked = optax.tree_utils.tree_map_params(
    tx, lambda x: jnp.full_like(x, 7), state, transform_non_params=lambda x: x + 1
  )
  assert int(marked.micro_step) == 4
  for group, old in zip(marked.groups, state.groups, strict=True):
    adam, before = subtree(group, optax.ScaleByAdamState)[0], old.inner_state[0]
    assert int(adam.count) == int(before.count) + 1
    params = jax.tree.leaves((adam.mu, adam.nu, group.accumulators))
    assert params and all(bool((x == 7).all()) for x in params)
    assert group.window is None or int(group.window) == int(old.window) + 1


def test_tree_map_params_takes_a_tree_of_specs():
  tx = cadence(optax.adam(0.1), LEAFWISE)
  specs = {"body": {"bias": "b", "kernel": "k"}, "head": "h"}
  is_masked = lambda x: isinstance(x, optax.MaskedNode)
  mapped = optax.tree_utils.tree_map_params(
    tx,
    lambda x, spec: x if is_masked(x) else spec,
    tx.init(PARAMS),
    specs,
    transform_non_params=lambda _: None,
    is_leaf=is_masked,
  )
  names = [sorted(set(jax.tree.leaves(group))) for group in mapped.groups]
  assert names == [["b"], ["k"], ["h"]]
  assert mapped.groups[0].accumulators["body"]["bias"] == "b"


# Differentiation through several updates, in float64 so that finite differences tell.


# Away from the square root's kink at zero, which `eps_root` rounds off.
META_INNER = functools.partial(optax.adam, eps_root=1e-3)
META_EVERY = {"bias": 2, "kernel": oc.channels([2, 1, 2, 1])}
META_COLUMNS = {"even": ([0, 2], 2), "odd": ([1, 3], 1)}


def meta_params():
  rng = np.random.default_rng(5)
  return {"bias": jnp.asarray(rng.normal(size=4)), "kernel": jnp.asarray(rng.normal(size=(3, 4)))}


def meta_loss(params, t):
  x = jnp.cos(jnp.arange(3.0) + t)
  return jnp.sum(jnp.sin(x @ params["kernel"] + params["bias"]) ** 2)


def meta_final(how, rate, params, remat=False, inner=META_INNER, every=META_EVERY):
  """The loss after three cycles of training."""
  tx = oc.cadence(oracle.relaxed(inner(rate)), every)
  carry = params, tx.init(params)

  def step(carry, t, phase=None):
    params, state = carry
    grads = jax.grad(meta_loss)(params, t.astype(jnp.float64))
    if how.startswith("apply"):
      return tx.apply(params, state, grads, phase)
    updates, state = tx.update(grads, state, params, phase=phase)
    return optax.apply_updates(params, updates), state

  def cycle(carry, t):
    for i in (1, 2):
      carry = step(carry, t + i, i % 2)
    return carry, None

  step_of_scan = jax.checkpoint(step) if remat else step
  if how.endswith("static"):
    (params, _), _ = jax.lax.scan(cycle, carry, jnp.array([0, 2, 4]))
  else:
    (params, _), _ = jax.lax.scan(
      lambda carry, t: (step_of_scan(carry, t), None), carry, jnp.arange(1, 7)
    )
  return meta_loss(params, 0.0)


def meta_by_loop(rate, params):
  """The same by hand: a dict of tensors, a list of gradients for each."""
  inner = oracle.relaxed(META_INNER(rate))
  tensors = {"bias": params["bias"]}
  tensors |= {name: params["kernel"][:, columns] for name, (columns, _) in META_COLUMNS.items()}
  periods = {"bias": 2} | {name: period for name, (_, period) in META_COLUMNS.items()}
  states = {name: inner.init(x) for name, x in tensors.items()}
  windows = {name: [] for name in tensors}

  def loss(tensors, t):
    columns = [c for columns, _ in META_COLUMNS.values() for c in columns]
    kernel = jnp.concatenate([tensors[name] for name in META_COLUMNS], axis=1)
    return meta_loss({"bias": tensors["bias"], "kernel": kernel[:, np.argsort(columns)]}, t)

  for t in range(1, 7):
    grads = jax.grad(loss)(tensors, float(t))
    for name, period in periods.items():
      windows[name].append(grads[name])
      if t % period == 0:
        mean = sum(windows[name]) / period
        update, states[name] = inner.update(mean, states[name], tensors[name])
        tensors = tensors | {name: tensors[name] + update}
        windows[name] = []
  return loss(tensors, 0.0)


@functools.cache
def meta_expected():
  return jax.jit(jax.value_and_grad(meta_by_loop, argnums=(0, 1)))(0.125, meta_params())


def assert_near(found, expected, rtol):
  compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 100)
  jax.tree.map(compare, found, expected)


@pytest.mark.parametrize("how", ["update", "apply", "update static", "apply static"])
def test_meta_gradients(how):
  with oracle.enable_x64():
    final = jax.jit(functools.partial(meta_final, how))
    rate, params = jnp.asarray(0.125), meta_params()
    value, grads = jax.jit(jax.value_and_grad(final, argnums=(0, 1)))(rate, params)
    assert_near((value, grads), meta_expected(), rtol=1e-9)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), (rate, params))
    products = jax.tree.map(lambda g, d: (g * d).sum(), grads, direction)
    reverse = sum(jax.tree.leaves(products))
    forward = jax.jit(lambda *xs: jax.jvp(final, xs, direction)[1])(rate, params)
    moved = lambda h: final(*jax.tree.map(lambda x, d: x + h * d, (rate, params), direction))
    h = 1e-5
    difference = (moved(h) - moved(-h)) / (2 * h)
    assert_near(forward, reverse, rtol=1e-9)
    assert_near(forward, difference, rtol=1e-6)


def test_meta_gradients_of_second_order():
  with oracle.enable_x64():
    final = functools.partial(meta_final, "update", inner=optax.sgd)
    slope = jax.jit(jax.grad(final))
    params, rate, h = meta_params(), 0.125, 1e-5
    curvature = jax.jit(jax.grad(jax.grad(final)))(rate, params)
    difference = (slope(rate + h, params) - slope(rate - h, params)) / (2 * h)
    assert_near(curvature, difference, rtol=1e-6)


def test_meta_gradients_through_flush():
  def moved(rate):
    tx = oc.cadence(oracle.relaxed(optax.sgd(rate)), {"body": 4, "head": 2})
    _, state = tx.apply(PARAMS, tx.init(PARAMS), BATCHES[0])
    return tx.flush(state, PARAMS)[0]

  expected = jax.tree.map(jnp.negative, BATCHES[0])
  assert_close(jax.jit(jax.jacfwd(moved))(0.5), expected)
  assert_close(jax.jit(jax.jacrev(moved))(0.5), expected)


def test_meta_gradients_through_checkpointed_micro_steps():
  with oracle.enable_x64():
    final = functools.partial(meta_final, "apply", remat=True)
    found = jax.jit(jax.value_and_grad(final, argnums=(0, 1)))(0.125, meta_params())
    assert_near(found, meta_expected(), rtol=1e-9)


def test_meta_gradients_under_vmap_over_traced_periods():
  slope = jax.grad(functools.partial(meta_final, "apply", inner=optax.sgd))
  with oracle.enable_x64():
    rate, params, periods = 0.125, meta_params(), [1, 3]
    sweep = jax.vmap(lambda period: slope(rate, params, every=period))
    found = jax.jit(sweep)(jnp.array(periods))
    for i, period in enumerate(periods):
      expected = jax.jit(functools.partial(slope, every=period))(rate, params)
      assert_near(found[i], expected, rtol=1e-9)


# States on disk.


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_a_state_saved_in_mid_window_resumes_bit_for_bit(nonfinite):
  tx = cadence(optax.adamw(0.1), nonfinite=nonfinite)
  step = jax.jit(tx.apply)
  steps = [(PARAMS, tx.init(PARAMS))]
  for grads in BATCHES:
    steps.append(step(*steps[-1], grads))
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  for stop in (1, 3, 6):
    saved = flax.serialization.to_bytes(steps[stop])
    loaded = flax.serialization.from_bytes((zeros, tx.init(zeros)), saved)
    assert_identical(loaded, steps[stop])
    for grads in BATCHES[stop:]:
      loaded = step(*loaded, grads)
    assert_identical(loaded, steps[-1])


# Extra arguments, holes, empty trees, scalars, no parameters.


def test_extra_arguments_reach_the_inner_optimizer():
  inner = optax.polyak_sgd(max_learning_rate=0.5)
  expected = trained_by_oracle(inner, value=jnp.float32(0.75))
  assert_same_path(trained(cadence(inner), value=jnp.float32(0.75))[0], expected)
  tx = oc.chain(optax.clip(8.0), cadence(inner))
  apply, carry, found = jax.jit(tx.apply), (PARAMS, tx.init(PARAMS)), []
  for grads in BATCHES:
    carry = apply(*carry, grads, value=jnp.float32(0.75))
    found.append(carry[0])
  assert_same_path(found, expected)
  updates, _ = tx.flush(carry[1], carry[0], value=jnp.float32(0.75))
  assert any(bool(u.any()) for u in jax.tree.leaves(updates))


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


# Accumulation and clocks.


@pytest.mark.parametrize("accumulate", ["sum", "latest"])
def test_sum_and_latest(accumulate):
  tx = cadence(optax.adamw(0.1), accumulate=accumulate)
  expected = trained_by_oracle(optax.adamw(0.1), accumulate=accumulate)
  found, state = trained(tx)
  assert_same_path(found, expected)
  if accumulate == "latest":
    assert all(group.accumulators is None for group in state.groups)


SCHEDULE = optax.linear_schedule(1.0, 0.0, 16)  # Dyadic at every whole number.


@pytest.mark.parametrize("injected", [False, True], ids=["schedule", "inject_hyperparams"])
def test_clock_of_micro_steps_leaves_period_one_as_the_plain_optimizer(injected):
  make = optax.inject_hyperparams(optax.adam) if injected else optax.adam
  inner = oracle.relaxed(make(learning_rate=SCHEDULE))
  tx = oc.cadence(inner, {"body": 4, "head": 1}, clock="micro_steps")
  params, state = PARAMS, tx.init(PARAMS)
  head, plain = {"head": PARAMS["head"]}, inner.init({"head": PARAMS["head"]})
  plain_update, update = jax.jit(inner.update), jax.jit(tx.update)
  for grads in BATCHES:
    updates, state = update(grads, state, params)
    expected, plain = plain_update({"head": grads["head"]}, plain, head)
    assert_identical(updates["head"], expected["head"])
    params = optax.apply_updates(params, updates)
    head = optax.apply_updates(head, expected)
  assert_identical(jax.tree.leaves(state.groups[1].inner_state), jax.tree.leaves(plain))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("clock", ["updates", "micro_steps"])
@pytest.mark.parametrize("injected", [False, True], ids=["schedule", "inject_hyperparams"])
def test_clock_decides_where_a_slow_group_reads_its_schedule(injected, clock, static):
  make = optax.inject_hyperparams(optax.sgd) if injected else optax.sgd
  tx = cadence(make(learning_rate=SCHEDULE), {"body": 4, "head": 1}, clock=clock)
  state = tx.init(PARAMS)
  update = jax.jit(tx.update, static_argnames="phase")
  for t, grads in enumerate(BATCHES, start=1):
    phase = {"phase": t % 4} if static else {}
    updates, state = update(grads, state, PARAMS, **phase)
    count = t - 1 if clock == "micro_steps" else t // 4 - 1
    window = [g["body"]["bias"] for g in BATCHES[max(t - 4, 0) : t]]
    expected = -SCHEDULE(count) * sum(window) / 4 if t % 4 == 0 else jnp.zeros(6)
    assert_close(updates["body"]["bias"], expected)
    assert_close(updates["head"], -SCHEDULE(t - 1) * grads["head"])
  # One micro-step after the second window: a flush reads the schedule where training stands.
  updates, _ = tx.flush(state, PARAMS)
  rate = SCHEDULE(STEPS - 1) if clock == "micro_steps" else SCHEDULE(2)
  assert_close(updates["body"]["bias"], -rate * BATCHES[-1]["body"]["bias"])


@pytest.mark.parametrize("injected", [False, True], ids=["schedule", "inject_hyperparams"])
def test_clock_of_micro_steps_leaves_the_count_of_adam_alone(injected):
  make = optax.inject_hyperparams(optax.adam) if injected else optax.adam
  tx = cadence(make(learning_rate=SCHEDULE), {"body": 4, "head": 1}, clock="micro_steps")
  _, state = trained(tx)
  counts = [int(s.count) for s in subtree(state, optax.ScaleByAdamState)]
  assert counts == [2, 9]
  kind = type(state.groups[0].inner_state) if injected else optax.ScaleByScheduleState
  clocks = [int(s.count) for s in subtree(state, kind)]
  assert clocks == [8, 9]


def test_clock_of_micro_steps_under_a_schedule_of_periods():
  growing = lambda done: jnp.where(done < 3, 1, 3)  # Due at 1, 2, 3, 6, 9.
  tx = cadence(optax.sgd(SCHEDULE), oc.Every(growing), clock="micro_steps")
  state, update, start = tx.init(PARAMS), jax.jit(tx.update), 0
  for t, grads in enumerate(BATCHES, start=1):
    updates, state = update(grads, state, PARAMS)
    if t in (1, 2, 3, 6, 9):
      mean = sum(g["head"] for g in BATCHES[start:t]) / (t - start)
      assert_close(updates["head"], -SCHEDULE(t - 1) * mean)
      start = t
    else:
      assert not updates["head"].any()


# Gradients that are not finite.


def poison(batches, where):
  """The batches with entries set: from micro-step to pairs of a path and a value."""
  batches = [jax.tree.map(np.array, grads) for grads in batches]
  for t, spots in where.items():
    for (name, index), value in spots:
      leaf = batches[t - 1]["head"] if name == "head" else batches[t - 1]["body"][name]
      leaf[index] = value
  return [jax.tree.map(jnp.asarray, grads) for grads in batches]


NAN, INF = float("nan"), float("inf")
FAST, RIGHT, LEFT, CORNER = (0, 0), (1, 5), (3, 0), (3, 5)  # One entry in each quadrant.
BAD = {
  1: [(("bias", 0), INF)],
  2: [(("bias", 1), NAN), (("kernel", FAST), NAN)],
  # The first window of the bias is now empty.
  3: [(("bias", 2), -INF), (("kernel", LEFT), NAN)],
  # So is the second of one quadrant of period 2.
  4: [(("kernel", LEFT), NAN), (("head", 0), NAN)],
  # And the third of everything with period 2.
  5: [(("head", 1), NAN), (("kernel", RIGHT), NAN), (("kernel", LEFT), INF)],
  6: [(("head", 1), NAN), (("kernel", RIGHT), NAN), (("kernel", LEFT), INF)],
  # Nothing of period 1 is left here.
  7: [(("kernel", FAST), NAN), (("kernel", CORNER), INF)],
}
# Groups stand in order of appearance: the bias; the kernel's 1 and 2; the head is with the 2.
SKIPPED = [[3], [2, 1], [2, 4, 3]]


def skip_by_loop(inner, batches):
  """Updates of every micro-step: a window and an instance of the inner optimizer per tensor."""
  inner, params = oracle.relaxed(inner), jax.tree.leaves(PARAMS)
  tensors = [(i, p) for i, pieces in enumerate(PIECES) for p in pieces]
  states = [inner.init(params[i][p.index]) for i, p in tensors]
  windows = [[] for _ in tensors]
  for t, grads in enumerate(batches, start=1):
    leaves = list(map(np.asarray, jax.tree.leaves(grads)))
    updates = [np.zeros_like(leaf) for leaf in leaves]
    for n, (i, p) in enumerate(tensors):
      if np.isfinite(leaves[i][p.index]).all():
        windows[n].append(leaves[i][p.index])
      if t % p.period == p.offset and windows[n]:
        mean = jnp.asarray(sum(windows[n]) / np.float32(len(windows[n])))
        update, states[n] = inner.update(mean, states[n], params[i][p.index])
        updates[i][p.index] = update
        windows[n] = []
      elif t % p.period == p.offset:
        windows[n] = []
    yield updates


@pytest.mark.parametrize("how", ["update", "apply", "static apply"])
def test_skip_leaves_out_a_bad_batch_region_by_region(how):
  inner = optax.sgd(0.5, momentum=0.5)
  tx = cadence(inner, nonfinite="skip")
  batches = poison(BATCHES, BAD)
  params, state = PARAMS, tx.init(PARAMS)
  leaves = jax.tree.leaves(PARAMS)
  apply = jax.jit(tx.apply, static_argnames="phase")
  update = jax.jit(tx.update, static_argnames="phase")
  for t, expected in enumerate(skip_by_loop(inner, batches), start=1):
    phase = t % 4 if how.startswith("static") else None
    leaves = optax.apply_updates(leaves, expected)
    if how.endswith("apply"):
      params, state = apply(params, state, batches[t - 1], phase=phase)
    else:
      updates, state = update(batches[t - 1], state, params, phase=phase)
      for found, want in zip(jax.tree.leaves(updates), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(found) == 0, want == 0)
      params = optax.apply_updates(params, updates)
    assert_close(params, leaves)
  assert [group.skipped.tolist() for group in state.groups] == SKIPPED


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_skip_an_empty_window_leaves_the_inner_state_bit_for_bit(static):
  tx = cadence(optax.adamw(0.1), nonfinite="skip")
  update = jax.jit(tx.update, static_argnames="phase")
  batches, states = poison(BATCHES, BAD), [tx.init(PARAMS)]
  for t, grads in enumerate(batches, start=1):
    phase = t % 4 if static else None
    states.append(update(grads, states[-1], PARAMS, phase=phase)[1])
  inner = lambda t, group: states[t].groups[group].inner_state
  # Every window of the group is empty when it is due: nothing moves, the counter neither.
  assert_identical(inner(3, 0), inner(0, 0))
  assert_identical(inner(7, 1), inner(6, 1))
  assert_identical(inner(6, 2), inner(4, 2))
  # One of the windows is empty, beside others that fire.
  for old, new, empty, fired in [
    (inner(1, 1), inner(2, 1), 0, 1),
    (inner(2, 2), inner(4, 2), 1, 0),
  ]:
    assert int(new[0].count) == int(old[0].count) + 1
    for name in ("mu", "nu"):
      before = getattr(old[0], name)["body"]["kernel"]
      after = getattr(new[0], name)["body"]["kernel"]
      assert_identical(after[empty], before[empty])
      assert bool((after[fired] != before[fired]).any())


@pytest.mark.parametrize(
  ("accumulate", "static"), [("mean", False), ("mean", True), ("sum", False), ("latest", False)]
)
def test_skip_nothing_but_bad_batches_change_counters_alone(accumulate, static):
  tx = cadence(optax.adamw(0.1), LEAFWISE, accumulate=accumulate, nonfinite="skip")
  apply = jax.jit(tx.apply, static_argnames="phase")
  carry = PARAMS, tx.init(PARAMS)
  for t, grads in enumerate(BATCHES[:4], start=1):
    carry = apply(*carry, grads, phase=t % 4 if static else None)
  start, bad = carry, jax.tree.map(lambda g: jnp.full_like(g, NAN), PARAMS)
  for t in range(5, 13):
    carry = apply(*carry, bad, phase=t % 4 if static else None)
  inner = lambda carry: [group.inner_state for group in carry[1].groups]
  assert_identical((carry[0], inner(carry)), (start[0], inner(start)))
  assert [group.skipped.tolist() for group in carry[1].groups] == [[8], [8], [8]]
  # The next good batches train as ever.
  before = carry[0]
  for t in range(13, 17):
    carry = apply(*carry, BATCHES[0], phase=t % 4 if static else None)
  for a, b in zip(*map(jax.tree.leaves, (carry[0], before)), strict=True):
    assert bool(jnp.isfinite(a).all() and (a != b).any())


def test_skip_flush_applies_what_is_finite():
  tx = cadence(optax.sgd(1.0), accumulate="sum", nonfinite="skip")
  apply, flush = jax.jit(tx.apply), jax.jit(tx.flush)
  batches = poison(BATCHES, BAD)
  carry = PARAMS, tx.init(PARAMS)
  for grads in batches:
    carry = apply(*carry, grads)
  updates, state = flush(carry[1], carry[0])
  found = optax.apply_updates(carry[0], updates)
  kept = [np.zeros_like(x) for x in jax.tree.leaves(PARAMS)]
  for grads in batches:
    for i, leaf in enumerate(map(np.asarray, jax.tree.leaves(grads))):
      for p in PIECES[i]:
        if np.isfinite(leaf[p.index]).all():
          kept[i][p.index] += leaf[p.index]
  expected = [p - k for p, k in zip(jax.tree.leaves(PARAMS), kept, strict=True)]
  assert_identical(jax.tree.leaves(found), expected)
  assert all(not group.window.any() for group in state.groups if group.window is not None)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_propagate_reaches_the_update_of_its_own_window_and_no_other(static):
  tx = cadence(optax.sgd(1.0))
  update = jax.jit(tx.update, static_argnames="phase")
  for bad in (NAN, INF):
    spots = [(("bias", 0), bad), (("kernel", RIGHT), bad), (("kernel", FAST), bad)]
    batches = poison(BATCHES, {2: spots})
    state, clean = tx.init(PARAMS), oracle.Oracle(optax.sgd(1.0), jax.tree.leaves(PARAMS), PIECES)
    for t, grads in enumerate(batches, start=1):
      phase = t % 4 if static else None
      updates, state = update(grads, state, PARAMS, phase=phase)
      expected = clean.step(jax.tree.leaves(BATCHES[t - 1]), jax.tree.leaves(PARAMS))
      if t == 2:
        expected[1][RIGHT] = expected[1][FAST] = -bad
      if t == 3:
        expected[0][0] = -bad
      assert_close(updates, expected)


# The end of training.


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_flush_at_every_point_of_a_cycle_loses_nothing(nonfinite):
  tx = cadence(optax.sgd(1.0), accumulate="sum", nonfinite=nonfinite)
  apply, flush = jax.jit(tx.apply), jax.jit(tx.flush)
  total = lambda batches: [
    sum(leaves, start=jnp.zeros_like(p))
    for p, *leaves in zip(*map(jax.tree.leaves, [PARAMS, *batches]), strict=True)
  ]
  expected = lambda batches: [
    p - g for p, g in zip(jax.tree.leaves(PARAMS), total(batches), strict=True)
  ]
  for stop in range(STEPS + 1):
    params, state = PARAMS, tx.init(PARAMS)
    for grads in BATCHES[:stop]:
      params, state = apply(params, state, grads)
    updates, state = flush(state, params)
    params = optax.apply_updates(params, updates)
    assert_identical(jax.tree.leaves(params), expected(BATCHES[:stop]))
    again, same = flush(state, params)
    assert not any(u.any() for u in jax.tree.leaves(again))
    assert_identical(same, state)
    # Training goes on, on the same grid.
    for t in range(stop + 1, STEPS + 1):
      before, (params, state) = params, apply(params, state, BATCHES[t - 1])
      moved = [
        bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (before, params)), strict=True)
      ]
      assert moved == [t % 4 == 3, True, t % 2 == 0]
    updates, _ = flush(state, params)
    assert_identical(jax.tree.leaves(optax.apply_updates(params, updates)), expected(BATCHES))


def test_flush_applies_the_mean_of_what_is_there():
  tx = cadence(optax.adamw(0.1))
  apply, flush = jax.jit(tx.apply), jax.jit(tx.flush)
  for stop in range(5):
    leaves = jax.tree.leaves(PARAMS)
    slow = oracle.Oracle(oracle.relaxed(optax.adamw(0.1)), leaves, PIECES)
    params, state = PARAMS, tx.init(PARAMS)
    for t, grads in enumerate(BATCHES):
      if t == stop:
        updates, after = flush(state, params)
        params = optax.apply_updates(params, updates)
        leaves = optax.apply_updates(leaves, slow.flush(leaves))
        assert_close(params, leaves)
        for old, new in zip(state.groups, after.groups, strict=True):
          if old.window is None or not old.window.any():
            assert_identical(new.inner_state, old.inner_state)
        state = after
      params, state = apply(params, state, grads)
      leaves = optax.apply_updates(leaves, slow.step(jax.tree.leaves(grads), leaves))
      assert_close(params, leaves)


def test_flush_of_the_latest_gradient_is_a_no_op():
  tx = cadence(optax.adamw(0.1), accumulate="latest")
  _, state = trained(tx)
  updates, after = tx.flush(state, PARAMS)
  assert not any(u.any() for u in jax.tree.leaves(updates))
  assert_identical(after, state)


def test_flush_under_a_schedule_of_periods_keeps_to_the_grid():
  growing = lambda done: jnp.where(done < 4, 2, 3)  # Due at 2, 4, 7, 10.
  tx = cadence(optax.sgd(1.0), oc.Every(growing), accumulate="sum")
  apply = jax.jit(tx.apply)
  params, state = PARAMS, tx.init(PARAMS)
  for t, grads in enumerate(BATCHES, start=1):
    before, (params, state) = params, apply(params, state, grads)
    assert bool((params["head"] != before["head"]).any()) == (t in (2, 4, 7))
    if t in (1, 5):
      updates, state = tx.flush(state, params)
      params = optax.apply_updates(params, updates)
  updates, _ = tx.flush(state, params)
  params = optax.apply_updates(params, updates)
  expected = PARAMS["head"] - sum(grads["head"] for grads in BATCHES)
  assert_identical(params["head"], expected)
