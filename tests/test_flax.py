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
import pytest
from flax import nnx
from flax.training import train_state
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
