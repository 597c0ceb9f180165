"""Sparse upcycling: the outputs stay, the state follows, tokens go where the router sends them."""

import functools
from typing import Any

import growth_nets as nets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from growth_nets import close
from growth_nets import equal

import optax_cadence as oc
from optax_cadence import growth

pytestmark = pytest.mark.ci

X = jax.random.normal(jax.random.key(0), (2, 5, 6))
KEYS = jax.random.split(jax.random.key(1), 4)
ROUTER = jax.random.normal(KEYS[0], (6, 4))


def mlp(params, x):
  return jnp.tanh(x @ params["up"]) @ params["down"]


PARAMS = {
  "mlp": {
    "up": jax.random.normal(KEYS[1], (6, 8)),
    "down": jax.random.normal(KEYS[2], (8, 6)),
  }
}


def mixture(params, x, **kwargs):
  def experts(tokens):
    return jax.vmap(mlp)(params["mlp"]["experts"], tokens)

  return growth.mixture_of_experts(experts, params["mlp"]["router"]["kernel"], x, **kwargs)


def random_experts():
  shapes = {"up": (4, 6, 8), "down": (4, 8, 6)}
  experts = {n: jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), KEYS[:2], strict=True)}
  return {"mlp": {"experts": experts, "router": {"kernel": ROUTER}}}


def by_hand(params, x, top_k, places):
  """Token by token, first choices first."""
  x = np.asarray(x).reshape(-1, x.shape[-1])
  scores = x @ np.asarray(ROUTER)
  chosen = np.argsort(-scores, axis=1)[:, :top_k]
  total, taken = np.zeros((len(x), 6), np.float32), np.zeros(4, int)
  for k in range(top_k):
    for i, token in enumerate(x):
      expert = chosen[i, k]
      liked = np.exp(scores[i, chosen[i]] - scores[i].max())
      if taken[expert] < places:
        one = {name: leaf[expert] for name, leaf in params["mlp"]["experts"].items()}
        total[i] += liked[k] / liked.sum() * np.asarray(mlp(one, token))
      taken[expert] += 1
  return total


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(("capacity", "places"), [(None, 10), (0.4, None)])
def test_tokens_go_where_the_router_sends_them(top_k, capacity, places):
  params = random_experts()
  places = places or int(np.ceil(0.4 * top_k * 10 / 4))
  found = mixture(params, X, top_k=top_k, capacity=capacity)
  expected = by_hand(params, X, top_k, places)
  np.testing.assert_allclose(found.reshape(10, 6), expected, rtol=2e-5, atol=2e-5)


def test_the_router_learns_and_is_balanced():
  params = random_experts()
  grads = jax.grad(lambda p: (mixture(p, X) ** 2).sum())(params)
  assert (jnp.abs(grads["mlp"]["router"]["kernel"]).max(0) > 0).all()
  even = jnp.eye(4)
  assert float(growth.load_balance(even, 9.0 * jnp.eye(4))) == pytest.approx(1)
  assert float(growth.load_balance(even, jnp.full((8, 4), 0.0).at[:, 1].set(50.0))) == 4.0
  with pytest.raises(ValueError, match=r"router of shape \(6, 4\): expected \[6, experts\]"):
    mixture(params, X, top_k=5)


TX = optax.chain(
  oc.cadence(optax.adam(1e-2), 3),
  oc.prune(0.5, every=1, where=lambda path, x: "router" not in path),
)


@pytest.mark.parametrize("copied", [True, False])
def test_outputs_stay_and_the_state_follows(copied):
  plan = growth.upcycling(PARAMS, "mlp", experts=4, features=6, copy_state=copied)
  grown = plan.apply(PARAMS, lambda path, shape, dtype: ROUTER)
  close(mixture(grown, X), mlp(PARAMS["mlp"], X))
  with nets.relaxed():
    _, state = TX.update(PARAMS, TX.init(PARAMS), PARAMS)
    found = growth.grow_state(TX, state, PARAMS, grown, plan)
    like = TX.init(grown)
    assert jax.tree.structure(found) == jax.tree.structure(like)
    accumulated = found[0].groups["3"].accumulators["mlp"]["experts"]["up"]
    expected = jnp.broadcast_to(PARAMS["mlp"]["up"], (4, 6, 8))
    np.testing.assert_array_equal(accumulated, expected if copied else jnp.zeros((4, 6, 8)))
    masks = oc.pruning.masks(grown, found)["mlp"]["experts"]["up"]
    of_old = oc.pruning.masks(PARAMS, state)["mlp"]["up"]
    assert not of_old.all()
    expected = jnp.broadcast_to(of_old, masks.shape) if copied else jnp.ones_like(masks)
    np.testing.assert_array_equal(masks, expected)
    if copied:
      equal(growth.grow_state(TX, found, grown, PARAMS, plan.inverse()), state)
  equal(growth.undo(grown, plan), PARAMS)


class Mlp(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(6, 8, rngs=rngs)
    self.down = nnx.Linear(8, 6, rngs=rngs)

  def __call__(self, x):
    return self.down(nnx.relu(self.up(x)))


class Block(nnx.Module):
  def __init__(self, rngs):
    self.mlp = Mlp(rngs)

  def __call__(self, x):
    return x + self.mlp(x)


class Net(nnx.Module):
  def __init__(self, rngs):
    self.blocks = nets.module_list([Block(rngs), Block(rngs)])
    self.tail = Mlp(rngs)

  def __call__(self, x):
    for block in self.blocks:
      x = block(x)
    return self.tail(x)


def test_a_live_model():
  model, twin = nets.make(Net), nets.make(Net)
  with nets.relaxed():
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    before, state = growth.nnx.variables(model), jax.tree.leaves(optimizer.opt_state)
    modules = [model.blocks[1].mlp, model.tail]
    plan = growth.upcycle(model, X, mlp=modules, experts=4, rngs=nnx.Rngs(3), optimizer=optimizer)
    assert isinstance(model.tail, growth.MixtureOfExperts)
    assert model.tail.experts is modules[1]
    assert model.tail.experts.up.kernel.shape == (4, 6, 8)
    assert optimizer.opt_state[0].mu["tail"]["experts"]["up"]["kernel"].shape == (4, 6, 8)
    routers = [nets.array(m.router.kernel) for m in (model.blocks[1].mlp, model.tail)]
    assert jnp.abs(routers[0] - routers[1]).max() > 1e-3
    close(model(X), twin(X))
    grads = nnx.grad(lambda model: (model(X) ** 2).mean())(model)
    assert jnp.abs(nets.array(grads["tail"]["experts"]["up"]["kernel"])).max() > 0
    assert float(model.tail.load_balance(X)) >= 1
    growth.undo(model, plan, optimizer=optimizer)
    equal(growth.nnx.variables(model), before)
    equal(jax.tree.leaves(optimizer.opt_state), state)
    assert model.blocks[1].mlp is modules[0]
    assert model.tail is modules[1]
    close(model(X), twin(X))


class Scanned(nnx.Module):
  def __init__(self, rngs):
    self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=0))(rngs)

  def __call__(self, x):
    scan = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return scan(x, self.blocks)


def test_stacked_layers():
  model, twin = nets.make(Scanned), nets.make(Scanned)
  with nets.relaxed():
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    before, state = growth.nnx.variables(model), jax.tree.leaves(optimizer.opt_state)
    plan = growth.upcycle(model, X, mlp=model.blocks.mlp, experts=4, optimizer=optimizer)
    mixture = model.blocks.mlp
    assert mixture.experts.up.kernel.shape == (3, 4, 6, 8)
    assert mixture.router.kernel.shape == (3, 6, 4)
    assert optimizer.opt_state[0].mu["blocks"]["mlp"]["experts"]["up"]["bias"].shape == (3, 4, 8)
    close(model(X), twin(X))
    growth.undo(model, plan, optimizer=optimizer)
    equal(growth.nnx.variables(model), before)
    equal(jax.tree.leaves(optimizer.opt_state), state)
  close(model(X), twin(X))


class Holder(nnx.Module):
  def __init__(self, rngs):
    self.experts = Block(rngs)
    self.experts.experts = Mlp(rngs)

  def __call__(self, x):
    return self.experts.experts(self.experts(x))


def test_an_mlp_that_is_called_experts_already_comes_back():
  model, twin = nets.make(Holder), nets.make(Holder)
  inside = model.experts.experts
  plan = growth.upcycle(model, X, mlp=inside, experts=2)
  assert isinstance(model.experts.experts, growth.MixtureOfExperts)
  growth.undo(model, plan)
  assert model.experts.experts is inside
  equal(growth.nnx.variables(model), growth.nnx.variables(twin))


def test_experts_of_layers_that_have_a_period_each():
  params = {"mlp": jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), PARAMS["mlp"])}
  tx = oc.cadence(optax.adam(1e-2), oc.stacked([4, 2, 4]))
  plan = growth.upcycling(params, "mlp", experts=4, features=6, axis=1)
  grown = plan.apply(params, lambda path, shape, dtype: jnp.ones(shape))
  with nets.relaxed():
    _, state = tx.update(params, tx.init(params), params)
    found = growth.grow_state(tx, state, params, grown, plan)
    for name, group in state.groups.items():
      moments = found.groups[name].accumulators["mlp"]["experts"]["up"]
      for i in range(4):
        equal(moments[:, i], group.accumulators["mlp"]["up"])
    assert found.groups["4"].accumulators["mlp"]["experts"]["up"].shape == (2, 4, 6, 8)
    equal(growth.grow_state(tx, found, grown, params, plan.inverse()), state)


class LinenMlp(nn.Module):
  hidden: int = 8

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(nn.Dense(self.hidden, name="up")(x))
    return nn.Dense(6, name="down")(nn.Dropout(0.5, deterministic=not train)(x))


class LinenMixture(nn.Module):
  """A mixture as people write it, its router under another name."""

  @nn.compact
  def __call__(self, x):
    router = self.param("router", nn.initializers.normal(0.02), (6, 4))
    of_experts = nn.vmap(
      LinenMlp, in_axes=0, variable_axes={"params": 0}, split_rngs={"params": True}
    )
    return growth.mixture_of_experts(of_experts(name="experts"), router, x)


def ours(**kwargs):
  return growth.linen.MixtureOfExperts(LinenMlp, number=4, **kwargs)


class LinenBlock(nn.Module):
  mlp: Any = LinenMlp

  @nn.compact
  def __call__(self, x):
    return x + self.mlp(name="mlp")(x)


class LinenNet(LinenBlock):
  @nn.compact
  def __call__(self, x):
    x = LinenBlock(self.mlp, name="block")(x)
    return x + self.mlp(name="mlp")(x)


class LinenScanned(LinenBlock):
  @nn.compact
  def __call__(self, x):
    scan = nn.scan(
      lambda block, x, _: (block(x), None),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=3,
    )
    return scan(LinenBlock(self.mlp, name="mlp"), x, None)[0]


@pytest.mark.parametrize(
  ("net", "mixture", "mlp", "router"),
  [
    (LinenNet, ours, "params/*mlp", "router/kernel"),
    (LinenScanned, ours, ["params/mlp/mlp"], "router/kernel"),
    (LinenBlock, LinenMixture, "params/mlp", "router"),
  ],
)
def test_linen(net, mixture, mlp, router):
  old, new = net(), net(mixture)
  variables = old.init(jax.random.key(0), X)
  grown, forward, plan = growth.linen.upcycle(
    old, new, variables, X, mlp=mlp, router=router, rngs=jax.random.key(1)
  )
  close(forward(grown, X), old.apply(variables, X))
  equal(jax.tree.map(jnp.shape, grown), jax.tree.map(jnp.shape, new.init(jax.random.key(0), X)))
  tx = optax.adam(1e-2)
  with nets.relaxed():
    params, bigger = variables["params"], grown["params"]
    _, state = tx.update(params, tx.init(params), params)
    found = growth.grow_state(tx, state, params, bigger, plan)
    before, after = (s[0].mu["mlp"] for s in (state, found))
    if net is LinenScanned:
      before, after = before["mlp"], after["mlp"]
    moments = jnp.moveaxis(after["experts"]["up"]["kernel"], -3, 0)
    np.testing.assert_array_equal(moments[3], before["up"]["kernel"])
    equal(growth.grow_state(tx, found, bigger, params, plan.inverse()), state)
  equal(growth.undo(grown, plan), variables)


def test_experts_of_linen_get_further_arguments_and_say_how_they_are_loaded():
  x, key = X.reshape(10, 6), jax.random.key(2)
  variables = ours().init(jax.random.key(0), x)
  assert variables.keys() == {"params"}
  kernels = variables["params"]["experts"]["up"]["kernel"]
  assert kernels.shape == (4, 6, 8) and jnp.abs(kernels[0] - kernels[1]).max() > 0.01
  _, found = ours().apply(variables, x, mutable=["intermediates"])
  (sown,) = found["intermediates"]["load_balance"]
  close(sown, growth.load_balance(variables["params"]["router"]["kernel"], x))
  dropped = ours().apply(variables, x, train=True, rngs={"dropout": key})
  assert jnp.abs(dropped - ours().apply(variables, x)).max() > 0.1


def test_a_linen_module_without_that_mixture():
  old = LinenNet()
  variables = old.init(jax.random.key(0), X)
  match = r"mlp 'params/mlp': expected 'params/mlp/router/kernel' in the .*, found nothing there"
  with pytest.raises(ValueError, match=match):
    growth.linen.upcycle(old, old, variables, X, mlp="params/mlp")
  other = LinenNet(functools.partial(growth.linen.MixtureOfExperts, functools.partial(LinenMlp, 9)))
  with pytest.raises(
    ValueError, match=r"'params/mlp/experts/up/kernel' \(8, 6, 9\), but \(8, 6, 8\)"
  ):
    growth.linen.upcycle(old, other, variables, X, mlp="params/*mlp", rngs=jax.random.key(1))


def test_routers_may_be_given():
  model = nets.make(Net)
  with pytest.raises(ValueError, match=r"given 'router': expected some of 'tail/router/kernel'"):
    growth.upcycle(model, X, mlp=model.tail, experts=4, given={"router": ROUTER})
  growth.upcycle(model, X, mlp=model.tail, experts=4, given={"tail/router/kernel": ROUTER})
  equal(nets.array(model.tail.router.kernel), ROUTER)


class Indifferent(Mlp):
  def __call__(self, x):
    return x * self.up.bias.sum()


def test_errors():
  model = nets.make(Net)
  with pytest.raises(ValueError, match="experts must be an integer, 2 or more, found 1"):
    growth.upcycle(model, X, mlp=model.tail, experts=1)
  with pytest.raises(ValueError, match="found the model itself"):
    growth.upcycle(model, X, mlp=model)
  with pytest.raises(ValueError, match="mlp 'mlp': expected each once, and none in another"):
    growth.upcycling(PARAMS, ["mlp", "mlp"], experts=2, features=6)
  with pytest.raises(ValueError, match="capacity: expected a number above 0, or None, found 0"):
    mixture(random_experts(), X, capacity=0)
  with pytest.raises(ValueError, match="mlp 'head': expected what holds leaves of 'mlp/"):
    growth.upcycling(PARAMS, "head", experts=2, features=6)
  model.tail = Indifferent(nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"one of \[6, 8\] entries, found that it runs on \[6, 8\]"):
    growth.upcycle(model, mlp=model.tail, experts=2)
