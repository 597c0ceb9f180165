"""Models with layers stacked by `vmap` and run by `scan` grow outside the stack and inside it."""

import growth_nets as nets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from growth_nets import close

from optax_cadence import growth

pytestmark = pytest.mark.ci

X = jax.random.normal(jax.random.key(0), (2, 4, 4))


def stacked(make, rngs, layers):
  return nnx.split_rngs(splits=layers)(nnx.vmap(make, in_axes=0))(rngs)


class Block(nnx.Module):
  """A block of attention, of a convolution over positions, and of an MLP."""

  def __init__(self, rngs):
    self.attention = nnx.MultiHeadAttention(2, 6, qkv_features=8, decode=False, rngs=rngs)
    self.conv = nnx.Conv(6, 6, (3,), feature_group_count=6, rngs=rngs)
    self.norm = nnx.LayerNorm(6, rngs=rngs)
    self.up = nnx.Linear(6, 8, rngs=rngs)
    self.down = nnx.Linear(8, 6, rngs=rngs)

  def __call__(self, x):
    x = x + self.conv(self.attention(self.norm(x)))
    return x + self.down(nnx.relu(self.up(x)))


class Net(nnx.Module):
  def __init__(self, rngs):
    self.first, self.stem = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 6, rngs=rngs)
    self.blocks = stacked(Block, rngs, 3)
    self.head = nnx.Linear(6, 2, rngs=rngs)

  def __call__(self, x):
    def step(x, block):
      return block(x)

    scan = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return self.head(scan(self.stem(self.first(x)), self.blocks))


GROWTHS = {
  "outside": (lambda m: {"producer": m.first}, "first/kernel", (4, 7)),
  "inside": (lambda m: {"producer": m.blocks.up}, "blocks/up/kernel", (3, 6, 10)),
  "heads": (
    lambda m: {"producer": m.blocks.attention.query, "axis": -2},
    "blocks/attention/out/kernel",
    (3, 4, 4, 6),
  ),
  "the residual stream": (lambda m: {"producer": m.stem}, "blocks/conv/kernel", (3, 3, 1, 8)),
}


@pytest.mark.parametrize("kind", list(GROWTHS))
def test_stacks_grow(kind):
  how, name, shape = GROWTHS[kind]
  model, twin = nets.make(Net), nets.make(Net)
  with nets.relaxed():
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    plan = growth.widen(model, X, by=2, optimizer=optimizer, **how(model))
    leaf = optimizer.opt_state[0].mu
    for key in name.split("/"):
      leaf = leaf[key]
    assert {"/".join(c.path): c.after for c in plan.changes}[name] == shape
    assert tuple(leaf.shape) == shape
    close(model(X), twin(X))
    growth.nnx.set_alpha(model, 1.0)
    expected = model(X)
    growth.merge(model, optimizer=optimizer)
    close(model(X), expected)
    assert jnp.abs(expected - twin(X)).max() > 1e-3
    assert model.blocks.up.in_features == (8 if kind == "the residual stream" else 6)


def test_stacked_layers_are_initialized_one_by_one():
  class Wide(nnx.Module):
    def __init__(self, rngs):
      self.layers = stacked(lambda rngs: nnx.Linear(64, 64, rngs=rngs), rngs, 16)

    def __call__(self, x):
      scan = nnx.scan(lambda x, m: m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
      return scan(x, self.layers)

  model = nets.make(Wide)
  kernel = growth.nnx.default_init(model)(("layers", "kernel"), (16, 64, 64), jnp.float32)
  np.testing.assert_allclose(kernel.std((1, 2)), np.full(16, 1 / 8), rtol=0.1)
  assert len({float(x) for x in kernel[:, 0, 0]}) == 16


class LinenBlock(nn.Module):
  hidden: int

  @nn.compact
  def __call__(self, x, _):
    y = nn.relu(nn.Dense(self.hidden, name="up")(x))
    return x + nn.Dense(x.shape[-1], name="down")(y), None


class LinenNet(nn.Module):
  width: int = 6
  hidden: int = 8

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(self.width, name="stem")(x)
    stack = nn.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    x, _ = stack(self.hidden, name="blocks")(x, None)
    return nn.Dense(2, name="head")(x)


@pytest.mark.parametrize("sizes", [{"hidden": 10}, {"width": 8}])
def test_linen_stacks_grow(sizes):
  old, new = LinenNet(), LinenNet(**sizes)
  variables = old.init(jax.random.key(1), X)
  producer = "params/blocks/up" if "hidden" in sizes else "params/stem"
  grown, forward, plan = growth.linen.widen(
    old, new, variables, X, producer=producer, by=2, rngs=jax.random.key(2)
  )
  close(forward(grown, X), old.apply(variables, X))
  grown["params"]["alpha"] = jnp.float32(1)
  close(new.apply(growth.merge(grown, plan), X), forward(grown, X))
