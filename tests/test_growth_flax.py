"""Live NNX models and Linen modules: grown, trained, merged, shrunk."""

import inspect

import growth_nets as nets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optax_cadence import growth

NEW_UPDATE = "model" in inspect.signature(nnx.Optimizer.update).parameters
ZERO = growth.phase_in(lambda t: 0.0)


@nnx.jit
def out(model, x):
  return model(x)


def close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * float(jnp.abs(expected).max()))


def widen_mlp(m, x, **kwargs):
  return growth.widen(m, x, producer=m.one, by=3, **kwargs)


GROWTHS = {
  "dense": (nets.Mlp, nets.IMAGES, widen_mlp),
  "dense, described": (
    nets.Mlp,
    nets.IMAGES,
    lambda m, x, **kw: growth.widen(m, producer=m.one, consumers=[m.two], by=3, **kw),
  ),
  "residual stream": (
    nets.NnxResNet,
    nets.IMAGES,
    lambda m, x, **kw: growth.widen(m, x, producer=m.stem, by=4, fresh=nets.fresh, **kw),
  ),
  "conv to conv": (
    nets.NnxResNet,
    nets.IMAGES,
    lambda m, x, **kw: growth.widen(
      m,
      producer=m.blocks[0].up,
      consumers=[m.blocks[0].down],
      also=[m.blocks[0].norm],
      by=4,
      fresh=nets.fresh,
      **kw,
    ),
  ),
  "filters": (
    nets.NnxResNet,
    nets.IMAGES,
    lambda m, x, **kw: growth.enlarge(
      m, x, conv=m.stem, kernel_size=(5, 5), fresh=nets.fresh, **kw
    ),
  ),
  "block": (
    nets.NnxResNet,
    nets.IMAGES,
    lambda m, x, **kw: growth.deepen(
      m,
      lambda m: m.blocks.append(nets.make(nets.Block, 8, seed=8)),
      x,
      outgoing=lambda m: [m.blocks[-1].down],
      **kw,
    ),
  ),
  "embedding": (
    nets.NnxTransformer,
    nets.TOKENS,
    lambda m, x, **kw: growth.widen(m, x, producer=m.embed, by=4, fresh=nets.fresh, **kw),
  ),
  "heads": (
    nets.NnxTransformer,
    nets.TOKENS,
    lambda m, x, **kw: growth.widen(
      m, x, producer=m.attention.query, axis=-2, by=1, fresh=nets.fresh, **kw
    ),
  ),
  "hidden": (
    nets.NnxTransformer,
    nets.TOKENS,
    lambda m, x, **kw: growth.widen(m, x, producer=m.up, by=5, fresh=nets.fresh, **kw),
  ),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", list(GROWTHS))
def test_a_live_model_goes_on_as_it_was_and_merges(kind, train):
  make, x, grow = GROWTHS[kind]
  model, twin = nets.make(make), nets.make(make)
  plan = grow(model, x)
  assert isinstance(model, make)
  for m in (model, twin):
    m.train() if train else m.eval()
  close(out(model, x), out(twin, x))
  close(out(model, x), out(twin, x))  # running statistics and dropout went on alike
  growth.nnx.set_alpha(model, 1.0)
  model.eval()
  gated = out(model, x)
  growth.nnx.merge(model)
  assert type(model) is make
  close(out(model, x), gated)
  assert plan.changes


def train(model, optimizer, x, steps):
  # Operation by operation: inside larger programs XLA may round sums in another order.
  for _ in range(steps):
    with (
      nets.operation_by_operation(),
      jax.numpy_dtype_promotion("standard"),
      jax.numpy_rank_promotion("allow"),
    ):
      grads = nnx.grad(lambda model: (model(x) ** 2).mean())(model)
      if NEW_UPDATE:
        optimizer.update(model, grads)
      else:  # Flax before 0.11
        optimizer.update(grads)


def optimizer_of(model):
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    return nnx.Optimizer(model, optax.chain(optax.adam(1e-2), ZERO), wrt=nnx.Param)


@pytest.mark.parametrize("kind", ["dense", "conv to conv", "block", "hidden"])
def test_trained_with_the_gate_shut_it_is_the_run_without_growth(kind):
  make, x, grow = GROWTHS[kind]
  model, twin = nets.make(make), nets.make(make)
  optimizers = optimizer_of(model), optimizer_of(twin)
  train(model, optimizers[0], x, 2)
  train(twin, optimizers[1], x, 2)
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    plan = grow(model, x, optimizer=optimizers[0])
  train(model, optimizers[0], x, 3)
  train(twin, optimizers[1], x, 3)
  tree = growth.nnx.variables(model)
  assert float(tree.pop("alpha")) == 0
  if kind == "block":
    tree["blocks"].pop(1)
  else:
    tree = plan.inverse().apply(tree)
  flat = lambda t: [x for x in jax.tree.leaves(t) if jnp.issubdtype(x.dtype, jnp.floating)]
  for a, b in zip(flat(tree), flat(growth.nnx.variables(twin)), strict=True):
    np.testing.assert_array_equal(a, b)
  assert int(optimizers[0].step[...]) == int(optimizers[1].step[...])


def test_an_optimizer_that_cannot_follow_leaves_the_model_as_it_was():
  model, other = nets.make(nets.Mlp), nets.make(nets.NnxResNet)
  with pytest.raises(ValueError, match="optimizer: expected the state for this model, 10 arrays"):
    growth.widen(model, producer=model.one, consumers=[model.two], by=3, fresh=nets.fresh,
                 optimizer=optimizer_of(other))  # fmt: skip
  assert type(model) is nets.Mlp and model.one.kernel.shape == (16, 8)
  assert not hasattr(model, "alpha")


def test_the_optimizer_goes_on_after_the_merge():
  model = nets.make(nets.Mlp)
  optimizer = optimizer_of(model)
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    widen_mlp(model, nets.IMAGES, optimizer=optimizer)
    train(model, optimizer, nets.IMAGES, 2)
    growth.nnx.set_alpha(model, 0.5)
    expected = out(model, nets.IMAGES)
    growth.nnx.merge(model, optimizer=optimizer)
  del expected
  train(model, optimizer, nets.IMAGES, 2)
  assert model.one.kernel.shape == (16, 11) and model.one.out_features == 11


def test_a_merged_model_loads_into_the_plain_class():
  model = nets.make(nets.Mlp)
  widen_mlp(model, nets.IMAGES)
  growth.nnx.set_alpha(model, 1.0)
  model.eval()
  expected = out(model, nets.IMAGES)
  growth.nnx.merge(model)
  other = nets.Mlp(nnx.Rngs(9), hidden=11)
  nnx.update(other, nnx.state(model))
  other.eval()
  close(out(other, nets.IMAGES), expected)


def test_a_shrunk_model_runs():
  model = nets.make(nets.NnxResNet)
  model.eval()
  down = model.blocks[0].down
  nets.put(down.kernel, down.kernel[...].at[:, :, jnp.array([0, 3])].set(0))
  expected = out(model, nets.IMAGES)
  units = growth.nnx.couple(model, nets.IMAGES, producer=model.blocks[0].up)
  growth.shrink(model, growth.shrinking(growth.nnx.variables(model), units, remove=[0, 3]))
  assert model.blocks[0].up.kernel.shape == (3, 3, 8, 10)
  close(out(model, nets.IMAGES), expected)


def test_net2deeper_needs_no_gate():
  class Deep(nnx.Module):
    def __init__(self, rngs):
      self.layers = nets.module_list([nnx.Linear(16, 8, rngs=rngs)])
      self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
      for layer in self.layers:
        x = nnx.relu(layer(x))
      return self.head(x)

  def add(model):
    layer = nnx.Linear(8, 8, rngs=nnx.Rngs(1))
    nets.put(layer.kernel, growth.identity_kernel((8, 8)))
    model.layers.append(layer)

  model, x = Deep(nnx.Rngs(0)), nets.IMAGES.reshape(4, 16)
  expected = out(model, x)
  growth.deepen(model, add, x)
  close(out(model, x), expected)
  growth.nnx.merge(model)
  close(out(model, x), expected)


def test_linen_by_path():
  old, new = nets.Transformer(), nets.Transformer(width=12)
  variables = nets.init(old, 0)
  bigger, forward, plan = growth.linen.widen(
    old, new, variables, old.inputs, producer="params/embed", by=4, rngs=jax.random.key(1)
  )
  close(forward(bigger, old.inputs), old.apply(variables, old.inputs))
  bigger["params"]["alpha"] = jnp.float32(1)
  close(forward(bigger, old.inputs), new.apply(growth.merge(bigger, plan), old.inputs))


@pytest.mark.parametrize(("shape", "size"), [((7, 2, 3), (13,)), ((5, 5, 2, 3), (9, 9))])
def test_a_trained_kernel_becomes_continuous(shape, size):
  taps = jnp.stack(jnp.meshgrid(*[jnp.linspace(-1, 1, n) for n in shape[:-2]], indexing="ij"), -1)
  waves = jax.random.normal(jax.random.key(0), (len(size), 6))
  kernel = jnp.cos(2 * (taps @ waves)).reshape(shape)
  layer, error = growth.to_continuous(kernel, rngs=nnx.Rngs(0), steps=1500, hidden=64)
  assert error < 0.02
  np.testing.assert_allclose(layer.kernel, kernel, atol=0.1)
  layer.resample(size)
  expected = (
    jnp.stack(jnp.meshgrid(*[jnp.linspace(-1, 1, n) for n in size], indexing="ij"), -1) @ waves
  )
  scale = np.prod(shape[:-2]) / np.prod(size)
  found = layer.kernel.reshape(*size, 6)
  error = jnp.linalg.norm(found - scale * jnp.cos(2 * expected)) / jnp.linalg.norm(found)
  assert float(error) < 0.15
  assert layer(jnp.ones((2, *[16] * len(size), 2))).shape == (2, *[16] * len(size), 3)


def test_a_continuous_layer_learns():
  layer = growth.CKConv(1, 4, (5, 5), rngs=nnx.Rngs(0))
  grads = nnx.grad(lambda layer: (layer(nets.IMAGES) ** 2).mean())(layer)
  assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
  causal = growth.CKConv(1, 2, (5,), padding="CAUSAL", rngs=nnx.Rngs(0))
  x = jnp.zeros((1, 9, 1)).at[:, 6].set(1)
  assert not (causal(x) - causal(jnp.zeros_like(x)))[:, :6].any()
