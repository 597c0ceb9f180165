"""Live NNX models and Linen modules: grown, trained, merged, shrunk."""

import copy
import functools
import pickle

import growth_nets as nets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from flax.training import train_state
from growth_nets import alike
from growth_nets import close
from growth_nets import equal

from optax_cadence import growth

pytestmark = pytest.mark.ci

ZERO = growth.phase_in(lambda t: 0.0)


@nnx.jit
def out(model, x):
  return model(x)


@functools.partial(jax.jit, static_argnums=0, compiler_options=nets.AS_WRITTEN)
def both_modes_of(graphdef, state, x):
  model = nnx.merge(graphdef, state)
  model.eval()
  evaluated = model(x)
  model.train()
  return (evaluated, model(x)), nnx.state(model)


def both_modes(model, x):
  """Outputs in evaluation and in training, which leaves its statistics and keys in the model."""
  found, state = both_modes_of(*nnx.split(model), x)
  nnx.update(model, state)
  return found


def widen_mlp(m, x, **kwargs):
  return growth.widen(m, x, producer=m.one, by=3, **{"fresh": nets.fresh, **kwargs})


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


@pytest.mark.parametrize("kind", list(GROWTHS))
def test_a_live_model_goes_on_as_it_was_and_merges(kind):
  make, x, grow = GROWTHS[kind]
  model, twin = nets.make(make), nets.make(make)
  plan = grow(model, x)
  assert isinstance(model, make)
  assert plan.changes
  for _ in range(2):  # running statistics and dropout go on alike
    close(both_modes(model, x), both_modes(twin, x))
  growth.nnx.set_alpha(model, 1.0)
  gated = nnx.clone(model)
  growth.merge(model)
  assert type(model) is make
  found, expected = both_modes(model, x), both_modes(gated, x)
  assert float(jnp.abs(expected[0] - both_modes(twin, x)[0]).max()) > 1e-4
  drops = make is nets.Mlp  # then the merged model draws a mask of another size
  close(found[:1] if drops else found, expected[:1] if drops else expected)


@functools.partial(jax.jit, static_argnums=0)
def step(graphdef, state, x):
  model, optimizer = nnx.merge(graphdef, state)
  grads = nnx.grad(lambda model: (model(x) ** 2).mean())(model)
  nets.update(optimizer, model, grads)
  return nnx.state((model, optimizer))


def train(model, optimizer, x, steps):
  graphdef, state = nnx.split((model, optimizer))
  with nets.relaxed():
    for _ in range(steps):
      state = step(graphdef, state, x)
  nnx.update((model, optimizer), state)


def optimizer_of(model, gate=ZERO):
  with nets.relaxed():
    return nnx.Optimizer(model, optax.chain(optax.adam(1e-2), gate), wrt=nnx.Param)


@pytest.mark.parametrize("kind", list(GROWTHS))
def test_trained_with_the_gate_shut_it_is_the_run_without_growth(kind):
  make, x, grow = GROWTHS[kind]
  model, twin = nets.make(make), nets.make(make)
  both = [(model, optimizer_of(model)), (twin, optimizer_of(twin))]
  for net, optimizer in both:
    train(net, optimizer, x, 2)
  (_, optimizer), (_, twin_optimizer) = both
  with nets.relaxed():
    plan = grow(model, x, optimizer=optimizer)
  with nets.relaxed(), oracle.enable_x64():
    x = nets.in_float64(x)
    for pair in both:
      nnx.update(pair, nets.in_float64(nnx.state(pair)))
      train(*pair, x, 3)
    assert float(model.alpha[...]) == 0
    growth.nnx.set_alpha(model, 1.0)  # so that the merge changes no weight
    growth.merge(model, optimizer=optimizer)
    pop = (lambda m: m.blocks.pop()) if kind == "block" else (lambda m: None)
    growth.shrink(model, plan.inverse(), x, take_out=pop, optimizer=optimizer)
    # Adam divides by its eps of 1e-8 what rounding leaves of a gradient that is zero; and Flax
    # computes what it reads of an embedding in float32.
    within = 1e-6 if kind == "embedding" else 1e-8
    alike(nnx.state(model), nnx.state(twin), within)  # with random keys and running statistics
    alike(optimizer.opt_state[0], twin_optimizer.opt_state[0], within)  # moments and the counter
    assert int(optimizer.step[...]) == int(twin_optimizer.step[...]) == 5


def test_what_was_added_has_to_be_taken_out():
  make, x, grow = GROWTHS["block"]
  model = nets.make(make)
  plan = grow(model, x)
  assert plan.flops[1] > plan.flops[0]
  growth.nnx.set_alpha(model, 1.0)
  growth.merge(model)
  with pytest.raises(ValueError, match=r"removes 'blocks/1/.* take_out="):
    growth.shrink(model, plan.inverse(), x)
  assert len(model.blocks) == 2


def test_each_growth_and_each_merge_is_one_compilation():
  traces = []

  @nnx.jit
  def step(model, optimizer, x):
    traces.append(1)
    grads = nnx.grad(lambda model: (model(x) ** 2).mean())(model)
    nets.update(optimizer, model, grads)

  model, x = nets.make(nets.Mlp), nets.IMAGES
  optimizer = optimizer_of(model, growth.phase_in(optax.linear_schedule(0.0, 1.0, 3)))
  with nets.relaxed():
    for stage in range(3):
      if stage == 1:
        widen_mlp(model, x, optimizer=optimizer)
      if stage == 2:
        growth.merge(model, optimizer=optimizer)
      for _ in range(3):
        step(model, optimizer, x)
      assert len(traces) == stage + 1
    # Nothing of the gate is left in the program: it is the one of a model made at this size.
    programs = []
    for m in (model, nets.Mlp(nnx.Rngs(1), hidden=11)):
      graphdef, state = nnx.split(m)
      run = lambda state, x, graphdef=graphdef: nnx.merge(graphdef, state)(x)
      programs.append(jax.jit(run).lower(state, x).as_text())
  assert programs[0] == programs[1]


def through_disk(path, state):
  checkpoint = pytest.importorskip("orbax.checkpoint")
  with checkpoint.StandardCheckpointer() as disk:
    disk.save(path, state)
  with checkpoint.StandardCheckpointer() as disk:
    return disk.restore(path, jax.tree.map(jnp.zeros_like, state))


@pytest.mark.ci
def test_orbax_with_a_live_model_and_its_optimizer(tmp_path):
  gate = growth.phase_in(optax.linear_schedule(0.0, 1.0, 6))

  def new(seed):
    model = nets.make(nets.NnxResNet, seed=seed)
    return model, optimizer_of(model, gate)

  def grow(model, optimizer):
    block = model.blocks[0]
    with nets.relaxed():
      growth.widen(model, nets.IMAGES, producer=block.up, by=4, fresh=nets.fresh,
                   optimizer=optimizer)  # fmt: skip

  live, restored = new(0), new(1)
  train(*live, nets.IMAGES, 2)
  nnx.update(restored, through_disk(tmp_path / "before", nnx.state(live)))
  grow(*live)
  grow(*restored)
  equal(nnx.state(restored), nnx.state(live))

  train(*live, nets.IMAGES, 2)
  assert 0 < float(live[0].alpha[...]) < 1
  resumed = new(2)
  grow(*resumed)  # at its new size, then filled
  nnx.update(resumed, through_disk(tmp_path / "half", nnx.state(live)))
  for run in (live, resumed):
    train(*run, nets.IMAGES, 2)
  equal(nnx.state(resumed), nnx.state(live))


def test_orbax_with_a_train_state(tmp_path):
  old, new = nets.Dense(), nets.Dense(hidden=11)
  tx = optax.chain(optax.adam(1e-2), growth.phase_in(optax.linear_schedule(0.0, 1.0, 6)))

  @jax.jit
  def step(state):
    def loss(params):
      return (state.apply_fn({"params": params}, old.inputs) ** 2).mean()

    with nets.relaxed():
      return state.apply_gradients(grads=jax.grad(loss)(state.params))

  def grow(state):
    variables = {"params": state.params}
    bigger, forward, plan = growth.linen.widen(
      old, new, variables, old.inputs, producer="params/one", by=3, fresh=nets.init(new, 1)
    )
    params = bigger["params"]
    opt_state = growth.grow_state(tx, state.opt_state, state.params, params, plan)
    return state.replace(apply_fn=forward, params=params, opt_state=opt_state)

  def create(seed):
    with nets.relaxed():
      params = nets.init(old, seed)["params"]
      return train_state.TrainState.create(apply_fn=old.apply, params=params, tx=tx)

  def leaves(state):
    return {"step": jnp.asarray(state.step), "params": state.params, "state": state.opt_state}

  def restored(state, path):
    found = through_disk(path, leaves(state))
    return state.replace(step=found["step"], params=found["params"], opt_state=found["state"])

  live = step(step(create(0)))
  before = restored(live, tmp_path / "before")
  grown = grow(live)
  equal(leaves(grow(before)), leaves(grown))
  half = step(step(grown))
  assert 0 < float(half.params["alpha"]) < 1
  resumed = restored(half, tmp_path / "half")
  equal(leaves(step(step(resumed))), leaves(step(step(half))))


def test_an_optimizer_that_cannot_follow_leaves_the_model_as_it_was():
  model, other = nets.make(nets.Mlp), nets.make(nets.NnxResNet)
  with pytest.raises(ValueError, match="optimizer: expected the state for this model, 9 arrays"):
    growth.widen(model, producer=model.one, consumers=[model.two], by=3, fresh=nets.fresh,
                 optimizer=optimizer_of(other))  # fmt: skip
  assert type(model) is nets.Mlp and model.one.kernel.shape == (16, 8)
  assert not hasattr(model, "alpha")


def test_a_merged_model_loads_into_the_plain_class():
  model = nets.make(nets.Mlp)
  widen_mlp(model, nets.IMAGES)
  growth.nnx.set_alpha(model, 1.0)
  model.eval()
  expected = out(model, nets.IMAGES)
  growth.merge(model)
  other = nets.Mlp(nnx.Rngs(9), hidden=11)
  nnx.update(other, nnx.state(model))
  other.eval()
  close(out(other, nets.IMAGES), expected)


def pickled(model):
  if hasattr(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), "kernel_init"):
    pytest.skip("layers keep their initializers in this version of Flax, which do not pickle")
  return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy])
def test_a_model_with_a_gate_is_copied_with_its_gate(copied):
  model = nets.make(nets.Mlp)
  plan = widen_mlp(model, nets.IMAGES, alpha=0.5)
  model.eval()
  expected = out(model, nets.IMAGES)
  other = copied(model)
  assert isinstance(other, nets.Mlp) and str(growth.nnx.plan_of(other)) == str(plan)
  growth.nnx.set_alpha(model, 0.0)
  close(out(other, nets.IMAGES), expected)
  growth.merge(other)
  assert type(other) is nets.Mlp
  close(out(other, nets.IMAGES), expected)


def test_a_call_changes_no_class():
  classes = set()

  class Net(nets.Mlp):
    def __call__(self, x):
      classes.update(map(type, (self, model)))
      return super().__call__(x)

  model = nets.make(Net)
  widen_mlp(model, nets.IMAGES)
  classes.clear()
  model(nets.IMAGES)
  assert classes == {Net}


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
  growth.merge(model)
  close(out(model, x), expected)


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
