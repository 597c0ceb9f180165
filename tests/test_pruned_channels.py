"""Channels that are pruned go: with the same outputs, whatever bias or norm they had."""

import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx

import optax_cadence as oc
from optax_cadence import growth
from optax_cadence import pruning

pytestmark = pytest.mark.ci

X = jax.random.normal(jax.random.key(9), (12, 6))


def dense(params, x, activation=jax.nn.relu):
  h = activation(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
  return h @ params["output"]["kernel"] + params["output"]["bias"][None]


def normed(params, x):
  """With the scale and shift of a norm per unit in between."""
  h = x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None]
  h = jax.nn.relu(h * params["norm"]["scale"][None] + params["norm"]["shift"][None])
  return h @ params["output"]["kernel"] + params["output"]["bias"][None]


def convolved(params, x, padding):
  x = x.reshape(2, 6, 6, 1)
  for name in ("hidden", "output"):
    kernel, bias = params[name]["kernel"], params[name]["bias"]
    numbers = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    x = jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=numbers)
    x = jnp.tanh(x + bias[None, None, None])
  return x


def weights(kernel=(), width=8):
  rng = np.random.default_rng(0)
  draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
  inputs = 1 if kernel else 6
  return {
    "hidden": {"kernel": draw(*kernel, inputs, width), "bias": draw(width)},
    "norm": {"scale": draw(width), "shift": draw(width)},
    "output": {"kernel": draw(*kernel, width, 3), "bias": draw(3)},
  }


def smaller(params, units, pruned):
  return growth.shrinking(params, units, remove=pruned).apply(params)


def train(fn, around, steps=12):
  """Trains while half of the hidden channels are pruned at the sixth micro-step."""
  params = weights()
  units = growth.couple(fn, params, X, producer="hidden/kernel")
  adam = oracle.relaxed(optax.adam(0.05))
  hidden = lambda path, _: path == "hidden/kernel"
  prune = oc.prune(0.5, every=pruning.once(6), structure=pruning.Channel(-1), where=hidden)
  tx = around(units, optax.chain(adam, prune))
  state = tx.init(params)

  @jax.jit
  def step(params, state):
    grads = jax.grad(lambda p: jnp.sum((fn(p, X) - 1) ** 2))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  states = []
  for _ in range(steps):
    params, state = step(params, state)
    states.append(state)
  return params, units, states


@pytest.mark.parametrize("fn", [dense, normed])
def test_what_follows_a_pruned_channel_goes_with_it(fn):
  params, units, states = train(fn, growth.follow_pruned)
  pruned = np.asarray(growth.pruned_units(params, units))
  assert pruned.sum() == 4
  followers = [params["hidden"]["bias"]] + [params["norm"][k] for k in ("scale", "shift")] * (
    fn is normed
  )
  for x in followers:
    assert not np.asarray(x)[pruned].any() and np.asarray(x)[~pruned].all()
  small = smaller(params, units, pruned)
  assert small["hidden"]["bias"].shape == (4,)
  np.testing.assert_allclose(fn(small, X), fn(params, X), rtol=1e-5, atol=1e-5)
  # At the micro-step at which they are pruned nothing is known of them any more.
  mu = states[5][0][0].mu
  for x in (mu["hidden"]["kernel"], mu["hidden"]["bias"], mu["output"]["kernel"].T):
    assert not np.asarray(x)[..., pruned].any() and np.asarray(x)[..., ~pruned].all()
  assert int(states[5][0][0].count) == 6


def test_alone_a_pruned_channel_leaves_its_bias():
  params, units, _ = train(dense, lambda units, tx: tx)
  pruned = np.asarray(growth.pruned_units(params, units))
  assert pruned.sum() == 4 and np.asarray(params["hidden"]["bias"])[pruned].all()
  difference = dense(smaller(params, units, pruned), X) - dense(params, X)
  assert float(jnp.abs(difference).max()) > 0.01


@pytest.mark.parametrize(
  ("fn", "kernel"),
  [
    (dense, ()),
    (lambda params, x: dense(params, x, jax.nn.sigmoid), ()),
    (normed, ()),
    (lambda params, x: convolved(params, x, "VALID"), (3, 3)),
    (lambda params, x: convolved(params, x, "SAME"), (1, 1)),
  ],
)
def test_what_a_pruned_channel_puts_out_is_folded_into_its_reader(fn, kernel):
  params, gone = weights(kernel), jnp.array([0, 3, 4])
  params["hidden"]["kernel"] = params["hidden"]["kernel"].at[..., gone].set(0.0)
  params["hidden"]["bias"] = jnp.abs(params["hidden"]["bias"]) + 1
  units = growth.couple(fn, params, X, producer="hidden/kernel")
  pruned = growth.pruned_units(params, units)
  assert np.flatnonzero(pruned).tolist() == [0, 3, 4]
  folded = growth.fold_pruned(fn, params, units, X)
  small = smaller(folded, units, pruned)
  assert small["hidden"]["kernel"].shape[-1] == small["output"]["kernel"].shape[-2] == 5
  np.testing.assert_allclose(fn(folded, X), fn(params, X), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(fn(small, X), fn(params, X), rtol=1e-4, atol=1e-4)
  # Without folding they would be others, and other inputs are folded for too.
  assert float(jnp.abs(fn(smaller(params, units, pruned), X) - fn(params, X)).max()) > 0.01
  np.testing.assert_allclose(fn(small, 2 * X), fn(params, 2 * X), rtol=1e-4, atol=1e-4)


def test_nothing_is_folded_where_nothing_is_pruned():
  params = weights()
  units = growth.couple(dense, params, X, producer="hidden/kernel")
  assert growth.fold_pruned(dense, params, units, X) is params


def test_what_is_no_constant_is_an_error_that_says_so():
  fn = lambda params, x: convolved(params, x, "SAME")
  params = weights((3, 3))
  params["hidden"]["kernel"] = params["hidden"]["kernel"].at[..., 0].set(0.0)
  units = growth.couple(fn, params, X, producer="hidden/kernel")
  with pytest.raises(ValueError, match="output/kernel.*differs between positions.*follow_pruned"):
    growth.fold_pruned(fn, params, units, X)
  bare = lambda params, x: jax.nn.relu(x @ params["a"] + params["b"][None]) @ params["c"]
  params = {"a": jnp.zeros((6, 4)).at[:, 1:].set(1.0), "b": jnp.ones(4), "c": jnp.ones((4, 2))}
  units = growth.couple(bare, params, X, producer="a")
  with pytest.raises(ValueError, match="'c': expected a bias that is added to its product"):
    growth.fold_pruned(bare, params, units, X)
  with pytest.raises(ValueError, match="expected weights that make the units among 'c'"):
    growth.pruned_units({"c": params["c"]}, units)


def test_the_optimizer_follows_the_smaller_network():
  params, units, states = train(dense, growth.follow_pruned)
  plan = growth.shrinking(params, units, remove=growth.pruned_units(params, units))
  tx = optax.adam(0.05)
  small = plan.apply(params)
  state = growth.grow_state(tx, states[-1][0], params, small, plan)
  assert state[0].mu["hidden"]["kernel"].shape == (6, 4)
  assert int(state[0].count) == 12


def test_the_lines_of_the_page_take_pruned_channels_out():
  page = pathlib.Path(__file__).parents[1] / "docs" / "growth.md"
  blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
  (code,) = (block for block in blocks if "growth.fold_pruned" in block)
  params = weights()
  params["hidden"]["kernel"] = params["hidden"]["kernel"].at[:, 2:5].set(0.0)
  params["hidden"]["bias"] = jnp.ones(8)
  names = {"growth": growth, "fn": dense, "params": params, "x": X}
  exec(code, names)
  assert names["params"]["hidden"]["kernel"].shape == (6, 5)
  np.testing.assert_allclose(dense(names["params"], X), dense(params, X), rtol=1e-4, atol=1e-4)


class Net(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(6, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
    self.output = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    return self.output(nnx.relu(self.norm(self.hidden(x))))


def test_a_live_model_loses_its_pruned_channels():
  if "model" not in inspect.signature(nnx.Optimizer.update).parameters:
    pytest.skip("written for Flax 0.11: the optimizer's update takes the model")
  model = Net(nnx.Rngs(0))
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    units = growth.nnx.couple(model, X, producer=model.hidden)
    hidden = lambda path, _: path == "hidden/kernel"
    prune = oc.prune(0.5, every=pruning.once(3), structure=pruning.Channel(-1), where=hidden)
    tx = growth.follow_pruned(units, optax.chain(optax.adam(0.05), prune))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = nnx.jit(lambda model, optimizer, x: optimizer.update(
      model, nnx.grad(lambda model: jnp.sum((model(x) - 1) ** 2))(model)))  # fmt: skip
    for _ in range(5):
      step(model, optimizer, X)
    before, variables = model(X), growth.nnx.variables(model)
    pruned = growth.pruned_units(variables, units)
    assert int(pruned.sum()) == 4
    assert not np.asarray(model.norm.bias[...])[np.asarray(pruned)].any()
    growth.shrink(model, growth.shrinking(variables, units, remove=pruned), X)
    assert model.hidden.kernel.shape == (6, 4) and model.norm.bias.shape == (4,)
    np.testing.assert_allclose(model(X), before, rtol=1e-5, atol=1e-5)
