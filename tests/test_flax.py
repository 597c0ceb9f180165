"""Networks of Flax and Equinox, trained as their own documentation says."""

import inspect

import equinox as eqx
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import orbax.checkpoint
import pytest
from flax import nnx
from flax.training import train_state
from matplotlib.figure import Figure
from small_tree import adamw_by_oracle
from small_tree import assert_close
from small_tree import assert_same_path
from small_tree import BATCHES
from small_tree import cadence
from small_tree import data
from small_tree import dyadic
from small_tree import EVERY
from small_tree import Follower
from small_tree import PARAMS
from small_tree import relaxed
from small_tree import STEPS
from small_tree import trained
from states import groups

import optax_cadence as oc


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
  assert isinstance(groups(state)[0].accumulators, flax.core.FrozenDict)
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
  bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), template)
  with relaxed():
    for _ in range(4):  # A whole cycle in which no window holds anything.
      step(model, optimizer, bad)
    assert_close(nnx.state(model, nnx.Param), slow.leaves, ulps=0)
    for t in range(4):
      leaves = dyadic(t, [p.shape for p in jax.tree.leaves(template)])
      step(model, optimizer, jax.tree.unflatten(jax.tree.structure(template), leaves))
      assert_close(nnx.state(model, nnx.Param), slow.step(leaves))


POLICIES = {"head": oc.until_certain(1.0, 2, 4), "stem": oc.as_settled(2, 4)}
PRUNED = oc.prune(
  every=1, structure=oc.pruning.NM(1, 2), criterion=oc.pruning.movement(), inner=optax.adam(0.1)
)
QUARTERS = {"head": 2, "stem": {"bias": 2, "kernel": oc.quadrants([[2, 2], [2, 2]])}}
TRANSFORMATIONS = {
  name: cadence(optax.adamw(0.1), NNX_CASES[name][0])
  for name in ("leaves", "quadrants", "twelve rectangles", "mask", "bands")
} | {
  "mask as vectors": cadence(optax.lamb(0.1), NNX_CASES["mask"][0]),
  "skip": cadence(optax.adamw(0.1), NET_EVERY, nonfinite="skip"),
  "latest": cadence(optax.adamw(0.1), NET_EVERY, accumulate="latest"),
  "policies": cadence(optax.adamw(0.1), POLICIES),
  "schedule": cadence(optax.adamw(0.1), oc.Every(lambda t: 2 + t // 2)),
  "chain": oc.chain(oc.noise_scale(3), oc.chain(optax.trace(0.5), cadence(optax.adam(0.1), 2))),
  "pruning": cadence(PRUNED, QUARTERS, nonfinite="skip"),
}
# The others differ only in what a group trains.
OFTEN = "mask"


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=[pytest.mark.ci] * (n != OFTEN)) for n in TRANSFORMATIONS]
)
def test_the_state_of_an_nnx_optimizer_is_taken_as_it_is(name):
  tx = TRANSFORMATIONS[name]
  model, optimizer = a_model_in_mid_window(tx)
  params = nnx.state(model, nnx.Param)
  grads = jax.tree.unflatten(jax.tree.structure(params), gradients(params, 3))
  # The same without NNX.
  pure = nnx.to_pure_dict(nnx.state(NnxNet(nnx.Rngs(0)), nnx.Param))
  state, update = tx.init(pure), jax.jit(tx.update)
  pure_grads = lambda t: jax.tree.unflatten(jax.tree.structure(pure), gradients(pure, t))
  with relaxed():
    for t in range(3):
      updates, state = update(pure_grads(t), state, pure)
      pure = optax.apply_updates(pure, updates)
    assert_close(params, pure)
    flushed = jitted(tx.flush)(optimizer.opt_state, params)
    assert_close_or_equal(flushed, jax.jit(tx.flush)(state, pure))
    applied, expected = jitted(tx.apply), jax.jit(tx.apply)(pure, state, pure_grads(3))
    found = applied(params, optimizer.opt_state, grads)
    assert_close_or_equal(found, expected)
    updates, _ = jitted(tx.update)(grads, optimizer.opt_state, params)
    assert_close(optax.apply_updates(params, updates), expected[0])
  metrics = oc.metrics(optimizer.opt_state)
  assert metrics.keys() == oc.metrics(state).keys()
  assert all(isinstance(x, np.ndarray | np.generic) for x in metrics.values())
  np.testing.assert_allclose(list(metrics.values()), list(oc.metrics(state).values()), rtol=1e-5)
  assert str(oc.describe(tx, params)) == str(oc.describe(tx, pure))
  assert str(oc.describe(tx, nnx.state(model))) == str(oc.describe(tx, pure))
  # What `apply` returns goes on, and goes back into the model.
  with relaxed():
    again = applied(*found, grads)
    nnx.update(model, again[0])
    assert_close(nnx.state(model, nnx.Param), jax.jit(tx.apply)(*expected, pure_grads(3))[0])


def jitted(fn):
  """`jax.jit`, but where variables of NNX are no trees and so no arguments, as before Flax 0.11."""
  is_tree = not jax.tree_util.all_leaves([nnx.Param(jnp.zeros(()))])
  return jax.jit(fn) if is_tree else fn


def gradients(params, t):
  return dyadic(t, [x.shape for x in jax.tree.leaves(params)])


def a_model_in_mid_window(tx):
  """A network and its optimizer after three micro-steps."""
  model = NnxNet(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  step = nnx.jit(lambda model, optimizer, grads: nnx_update(optimizer, model, grads) and None)
  structure = jax.tree.structure(nnx.state(model, nnx.Param))
  with relaxed():
    for t in range(3):
      grads = gradients(nnx.state(model, nnx.Param), t)
      step(model, optimizer, jax.tree.unflatten(structure, grads))
  return model, optimizer


def assert_close_or_equal(found, expected):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    if jnp.issubdtype(b.dtype, jnp.inexact):
      assert_close(a, b)
    else:
      np.testing.assert_array_equal(a, b)


class NetWithMore(NnxNet):
  """With variables that are no parameters: statistics, counters, random keys."""

  def __init__(self, rngs):
    super().__init__(rngs)
    self.norm = nnx.BatchNorm(6, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)


def test_a_model_with_statistics_and_keys_is_described_by_its_parameters():
  model = NetWithMore(nnx.Rngs(0))
  params = nnx.state(model, nnx.Param)
  assert len(jax.tree.leaves(params)) == 6 < len(jax.tree.leaves(nnx.state(model)))
  tx = oc.cadence(optax.adamw(0.1), NET_EVERY | {"norm": {"bias": 2, "scale": 1}})
  assert str(oc.describe(tx, nnx.state(model))) == str(oc.describe(tx, params))
  labels = [
    [
      label.get_text()
      for label in oc.plot_score(tx, x, 8, ax=Figure().subplots()).get_yticklabels()
    ]
    for x in (nnx.state(model), params)
  ]
  assert labels[0] == labels[1] and len(labels[0]) == 5 + 4


def assert_equal(found, expected):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b)


def test_the_state_of_another_nnx_optimizer_is_an_error():
  model, optimizer = a_model_in_mid_window(cadence(optax.adamw(0.1), 2))
  params = nnx.state(model, nnx.Param)
  with pytest.raises(ValueError, match="arrays as init makes them"):
    cadence(optax.sgd(0.1), 2).flush(optimizer.opt_state, params)


def test_masks_are_read_from_an_nnx_optimizer():
  tx = optax.chain(cadence(optax.adam(0.1), 2), oc.prune(0.5, every=2))
  model, optimizer = a_model_in_mid_window(tx)
  params = nnx.state(model, nnx.Param)
  masks = oc.pruning.masks(params, optimizer.opt_state)
  assert [int(m.sum()) for m in jax.tree.leaves(masks)] == [2, 6, 6, 12]
  assert oc.pruning.summary(params, optimizer.opt_state).sparsity == 0.5
  flipped = jax.tree.map(lambda m: ~m if m.ndim > 1 else m, masks)
  changed = oc.pruning.with_masks(optimizer.opt_state, flipped)
  found = oc.pruning.masks(params, changed)
  assert_equal(found, flipped)


@pytest.mark.parametrize("name", ["quadrants", pytest.param("pruning", marks=pytest.mark.ci)])
def test_an_nnx_optimizer_is_saved_in_mid_window(name, tmp_path):
  model, optimizer = a_model_in_mid_window(TRANSFORMATIONS[name])
  saved = nnx.state((model, optimizer))
  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", saved)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: saved))
  other = NnxNet(nnx.Rngs(1))
  resumed = nnx.Optimizer(other, TRANSFORMATIONS[name], wrt=nnx.Param)
  nnx.update((other, resumed), restored)
  step = nnx.jit(lambda model, optimizer, grads: nnx_update(optimizer, model, grads) and None)
  with relaxed():
    for t in range(3, 6):
      for m, o in ((model, optimizer), (other, resumed)):
        params = nnx.state(m, nnx.Param)
        step(m, o, jax.tree.unflatten(jax.tree.structure(params), gradients(params, t)))
  assert_equal(nnx.state((other, resumed)), nnx.state((model, optimizer)))


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
