"""A growth is taken back, at any α: the tree, the model and the optimizer's state as they were."""

import copy
import pickle

import growth_nets as nets
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from growth_nets import close
from growth_nets import equal
from growth_nets import Residual

import optax_cadence as oc
from optax_cadence import growth

pytestmark = pytest.mark.ci

X = jax.random.normal(jax.random.key(0), (5, 6))
TX = optax.chain(
  oc.cadence(optax.adam(1e-2), 2),
  oc.prune(0.5, every=2, where=lambda path, x: x.ndim > 1),
  growth.phase_in(lambda t: 0.25),
)


class Net(nnx.Module):
  def __init__(self):
    self.blocks = nets.module_list([Residual(2), Residual(4)])
    self.tail = nnx.Sequential(nnx.Linear(6, 6, rngs=nnx.Rngs(6)), nnx.tanh)
    self.depth = 2

  def __call__(self, x):
    for block in self.blocks:
      x = block(x)
    return self.tail(x)


class ConvNet(nnx.Module):
  def __init__(self):
    self.stem = nnx.Conv(1, 4, (3, 3), padding=1, rngs=nnx.Rngs(0))
    self.norm = nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))
    self.head = nnx.Linear(4, 2, rngs=nnx.Rngs(1))

  def __call__(self, x):
    return self.head(nnx.relu(self.norm(self.stem(x))).mean((1, 2)))


def put_first(model):
  model.blocks.insert(0, Residual(8))
  model.depth = 3


def put_into_the_tail(model):
  layers = [model.tail.layers[0], nnx.Linear(6, 6, rngs=nnx.Rngs(9)), model.tail.layers[1]]
  model.tail.layers = nets.module_list(layers)


GROWTHS = {
  "units": (Net, X, lambda m, **k: growth.widen(m, X, producer=m.blocks[0].up, by=3, **k)),
  "a block before others": (
    Net,
    X,
    lambda m, **k: growth.deepen(m, put_first, X, outgoing=lambda m: [m.blocks[0].down], **k),
  ),
  "a layer in a list made anew": (
    Net,
    X,
    lambda m, **k: growth.deepen(m, put_into_the_tail, X, **k),
  ),
  "groups of a norm": (
    ConvNet,
    nets.IMAGES,
    lambda m, **k: growth.widen(m, nets.IMAGES, producer=m.stem, unit=2, by=1, **k),
  ),
  "larger filters": (
    ConvNet,
    nets.IMAGES,
    lambda m, **k: growth.enlarge(m, nets.IMAGES, conv=m.stem, kernel_size=(5, 5), **k),
  ),
}


def described(model):
  """All that a model is but its arrays."""
  return jax.tree.structure(nnx.state(model)), nnx.graphdef(model)


def objects(model):
  return [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]


@pytest.mark.parametrize("kind", list(GROWTHS))
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_live_model_goes_back(kind, alpha):
  make, x, grow = GROWTHS[kind]
  model = make()
  with nets.relaxed():
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    structure, arrays = described(model), growth.nnx.variables(model)
    modules, state = objects(model), jax.tree.leaves(optimizer.opt_state)
    expected = model(x)
    grow(model, alpha=alpha, optimizer=optimizer)
    assert described(model) != structure
    growth.undo(model, optimizer=optimizer)
    assert described(model) == structure
    equal(growth.nnx.variables(model), arrays)
    equal(jax.tree.leaves(optimizer.opt_state), state)
    equal(model(x), expected)
  old = objects(model)
  containers = tuple(getattr(nnx, name) for name in ("List",) if hasattr(nnx, name))
  kept = [m for m in modules if not isinstance(m, containers)]
  assert all(any(m is n for n in old) for m in kept)
  with pytest.raises(ValueError, match="has no gate, which would know the growth"):
    growth.undo(model)


@pytest.mark.parametrize("through", [nnx.clone, copy.deepcopy])
def test_a_copy_of_a_grown_model_goes_back_by_itself(through):
  model = Net()
  arrays = growth.nnx.variables(model)
  growth.deepen(model, put_first, X, outgoing=lambda m: [m.blocks[0].down])
  twin = through(model)
  growth.undo(twin)
  equal(growth.nnx.variables(twin), arrays)
  assert len(model.blocks) == 3
  assert all(a is not b for a in objects(twin) for b in objects(model))
  growth.undo(model)
  equal(growth.nnx.variables(model), arrays)


def test_a_pickled_model_goes_back():
  model = Net()
  arrays = growth.nnx.variables(model)
  growth.widen(model, X, producer=model.blocks[0].up, by=3)
  mark = model.growth_gate
  again = pickle.loads(pickle.dumps(mark))
  assert again.contents == mark.contents
  assert again.before == mark.before
  growth.undo(model)
  equal(growth.nnx.variables(model), arrays)


def two_layers(params, x):
  return jnp.tanh(x @ params["a"]) @ params["b"]


def test_old_weights_keep_what_they_have_learned():
  params = {"a": jnp.ones((6, 3)) / 3, "b": jnp.ones((3, 2))}
  tx = optax.chain(optax.adam(1e-2), growth.phase_in(optax.linear_schedule(0.0, 1.0, 3)))
  with nets.relaxed():
    plan = growth.widening(params, growth.couple(two_layers, params, X, producer="a"), 2)
    grown = plan.apply(params, lambda path, shape, dtype: jnp.ones(shape, dtype))
    state = growth.grow_state(tx, tx.init(params), params, grown, plan)
    forward = growth.gated(two_layers, plan)
    for _ in range(2):
      grads = jax.grad(lambda p: (forward(p, X) ** 2).mean())(grown)
      updates, state = tx.update(grads, state, grown)
      grown = optax.apply_updates(grown, updates)
    old = growth.undo(grown, plan)
    back = growth.grow_state(tx, state, grown, old, plan.inverse())
    assert jax.tree.structure(back) == jax.tree.structure(tx.init(old))
  equal(old, {"a": grown["a"][:, :3], "b": grown["b"][:3]})
  equal(back[0][0].mu["a"], state[0][0].mu["a"][:, :3])
  assert int(back[0][0].count) == 2
  assert back[1].clock == {}
  assert jnp.abs(old["a"] - params["a"]).min() > 0


def test_after_the_merge_and_with_a_train_state():
  old, new = nets.Transformer(), nets.Transformer(hidden=20)
  params = nets.init(old, 0)["params"]
  with nets.relaxed():
    tx = optax.adam(1e-2)
    state = tx.init(params)
    grown, _, plan = growth.linen.widen(
      old, new, {"params": params}, nets.TOKENS, producer="params/up", by=4, fresh=nets.fresh
    )
    grown_state = growth.grow_state(tx, state, params, grown["params"], plan)
    equal(growth.undo(grown, plan), {"params": params})
    equal(growth.grow_state(tx, grown_state, grown["params"], params, plan.inverse()), state)
    grown["params"]["alpha"] = jnp.float32(1)
    equal(growth.undo(growth.merge(grown, plan), plan), {"params": params})
  with pytest.raises(ValueError, match="expected the plan by which the tree has grown"):
    growth.undo(grown)
  with pytest.raises(ValueError, match="a plan that shrinks has no inverse"):
    growth.undo(grown, plan.inverse())


def test_a_model_that_is_merged_goes_back_by_its_plan():
  model = Net()
  arrays, expected = growth.nnx.variables(model), model(X)
  plan = growth.widen(model, X, producer=model.blocks[0].up, by=3, alpha=1.0)
  growth.merge(model)
  growth.undo(model, plan)
  equal(growth.nnx.variables(model), arrays)
  close(model(X), expected)
  assert model.blocks[0].up.out_features == 8
