"""What is new after a growth, and what is old: the gate's clock, blocks put before others."""

import growth_nets as nets
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from growth_nets import close
from growth_nets import equal
from growth_nets import Residual

import optax_cadence as oc
from optax_cadence import growth

pytestmark = pytest.mark.ci

X = jax.random.normal(jax.random.key(0), (5, 6))
RAMP = growth.phase_in(optax.linear_schedule(0.0, 1.0, 4))


def two_layers(params, x):
  return jnp.tanh(x @ params["a"]) @ params["b"]


def grown_tree(params, state, tx, by=2):
  units = growth.couple(two_layers, params, X, producer="a")
  plan = growth.widening(params, units, by)
  bigger = plan.apply(params, lambda path, shape, dtype: jnp.ones(shape, dtype))
  return bigger, growth.grow_state(tx, state, params, bigger, plan), plan


def alphas(tx, params, state, steps):
  found = []
  for _ in range(steps):
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    params = optax.apply_updates(params, updates)
    found.append(float(params["alpha"]))
  return found, params, state


@pytest.mark.parametrize("carried", [True, False], ids=["state merged too", "state left behind"])
def test_every_gate_has_a_clock_of_its_own(carried):
  tx = optax.chain(optax.sgd(0.1), RAMP)
  params = {"a": jnp.ones((6, 3)), "b": jnp.ones((3, 2))}
  state = tx.init(params)
  for _ in range(2):  # the second growth follows the merge at once
    grown, grown_state, plan = grown_tree(params, state, tx)
    found, grown, grown_state = alphas(tx, grown, grown_state, 4)
    assert found == [0.25, 0.5, 0.75, 1.0]
    assert int(grown_state[1].micro_step) == 4
    params = growth.merge(grown, plan)
    state = grown_state
    if carried:
      state = growth.grow_state(tx, grown_state, grown, params, plan)
      assert int(state[1].micro_step) == 0


def test_a_gate_that_stays_keeps_its_clock():
  tx = optax.chain(optax.sgd(0.1), RAMP)
  params = {"a": jnp.ones((6, 3)), "b": jnp.ones((3, 2))}
  grown, state, plan = grown_tree(params, tx.init(params), tx)
  _, grown, state = alphas(tx, grown, state, 2)
  again = growth.grow_state(tx, state, grown, grown, plan)
  assert int(again[1].micro_step) == 2


class Stack(nnx.Module):
  def __init__(self):
    self.blocks = nets.module_list([Residual(2), Residual(4)])

  def __call__(self, x):
    for block in self.blocks:
      x = block(x)
    return x


# A window that is open, a clip, masks and moments: what an optimizer can keep by path.
TX = optax.chain(
  oc.cadence(optax.adam(1e-2), 3), oc.prune(0.5, every=2, where=lambda path, x: x.ndim > 1), RAMP
)


def trained(model, tx, steps=4):
  with nets.relaxed():
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(steps):
      grads = nnx.grad(lambda model: (model(X) ** 2).mean())(model)
      nets.update(optimizer, model, grads)
  return optimizer


def of_block(tree, i):
  """What a state keeps of block `i`, by the rest of its path."""
  found = {}
  for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in keys]
    if "blocks" in names and names[names.index("blocks") + 1] == str(i):
      at = names.index("blocks")
      found[*names[:at], *names[at + 2 :]] = leaf
  return found


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_block_put_anywhere_is_the_new_one(at):
  model = Stack()
  optimizer = trained(model, TX)
  expected, before = model(X), nnx.to_pure_dict(nnx.state(model))
  states = [of_block(optimizer.opt_state, i) for i in (0, 1)]
  assert len(states[0]) >= 12 and any(x.any() for x in states[0].values())
  old = list(model.blocks)
  with nets.relaxed():
    plan = growth.deepen(
      model,
      lambda m: m.blocks.insert(at, Residual(20)),
      X,
      outgoing=lambda m: [m.blocks[at].down],
      optimizer=optimizer,
    )
  close(model(X), expected)
  places = [i for i in range(3) if i != at]
  assert [model.blocks[i] for i in places] == old
  for state, i in zip(states, places, strict=True):
    equal(of_block(optimizer.opt_state, i), state)
  new = of_block(optimizer.opt_state, at)
  assert new.keys() == states[0].keys()
  assert all(not x.any() for name, x in new.items() if "masks" not in name)
  # The merge moves nothing again, and the way back is the tree as it was.
  growth.nnx.set_alpha(model, 1.0)
  with nets.relaxed():
    growth.merge(model, optimizer=optimizer)
  for state, i in zip(states, places, strict=True):
    equal(of_block(optimizer.opt_state, i), state)
  with nets.relaxed():
    growth.shrink(
      model, plan.inverse(), X, take_out=lambda m: m.blocks.pop(at), optimizer=optimizer
    )
  equal(nnx.to_pure_dict(nnx.state(model)), before)
  for state, i in zip(states, (0, 1), strict=True):
    equal(of_block(optimizer.opt_state, i), state)


def test_what_add_takes_out_is_named():
  model = Stack()
  with pytest.raises(ValueError, match=r"add took 'blocks/0/down/bias'.* out of Stack"):
    growth.deepen(model, lambda m: setattr(m, "blocks", nets.module_list([Residual(1)] * 3)), X)
  assert len(model.blocks) == 2


class LinenStack(nn.Module):
  depth: int = 2

  @nn.compact
  def __call__(self, x):
    for i in range(self.depth):
      y = nn.Dense(8, name=f"up{i}")(x)
      x = x + nn.Dense(6, name=f"down{i}")(nn.relu(y))
    return x


def test_linen_moves_by_word():
  old, new = LinenStack(), LinenStack(3)
  params = old.init(jax.random.key(1), X)["params"]
  tx = optax.adam(1e-2)
  grads = jax.grad(lambda p: (old.apply({"params": p}, X) ** 2).mean())(params)
  with nets.relaxed():
    _, state = tx.update(grads, tx.init(params), params)
  kwargs = {"rngs": jax.random.key(3), "outgoing": ["params/down1"]}
  with pytest.raises(ValueError, match="'params/down1': expected it to be new.*moved="):
    growth.linen.deepen(old, new, {"params": params}, X, **kwargs)
  moved = {"params/up1": "params/up2", "params/down1": "params/down2"}
  grown, forward, plan = growth.linen.deepen(old, new, {"params": params}, X, moved=moved, **kwargs)
  assert "params/up1/kernel -> params/up2/kernel" in str(plan)
  equal([grown["params"][name] for name in ("up0", "up2")], [params["up0"], params["up1"]])
  close(forward(grown, X), old.apply({"params": params}, X))
  grown_state = growth.grow_state(tx, state, params, grown["params"], plan)
  equal(grown_state[0].mu["down2"], state[0].mu["down1"])
  assert not grown_state[0].mu["up1"]["kernel"].any()
  merged = growth.merge({**grown, "params": {**grown["params"], "alpha": jnp.float32(1)}}, plan)
  equal(plan.inverse().apply(merged), {"params": params})


def test_two_leaves_at_one_place():
  tree = {"a": jnp.ones(2), "b": jnp.ones(2)}
  deeper = {**tree, "c": jnp.ones(2)}
  with pytest.raises(ValueError, match="moved puts 'b' to 'b', where another leaf stands"):
    growth.deepening(tree, deeper, moved={"a": "b"})
  with pytest.raises(ValueError, match="moved 'd': expected one of 'a', 'b', found"):
    growth.deepening(tree, deeper, moved={"d": "c"})


def test_a_block_that_counts_behind_a_closed_gate_is_refused():
  model = Stack()
  before = nnx.to_pure_dict(nnx.state(model))

  class Loud(Residual):
    def __call__(self, x):
      return self.up(x)[:, :6] + self.down(nnx.relu(self.up(x)))

  with pytest.raises(ValueError, match="the output still depends on the new layers"):
    growth.deepen(
      model, lambda m: m.blocks.append(Loud(8)), X, outgoing=lambda m: [m.blocks[2].down]
    )
  equal(nnx.to_pure_dict(nnx.state(model)), before)
  assert len(model.blocks) == 2
