"""The gate: nothing changes at 0, at 1 the plain module is there, in between only α speaks."""

import functools

import growth_nets as nets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from growth_nets import alike
from growth_nets import close
from growth_nets import equal

import optax_cadence as oc
from optax_cadence import growth

pytestmark = pytest.mark.ci

KINDS = list(nets.LINEN)


def grown(kind, **settings):
  old, new, grow, described = nets.LINEN[kind]
  variables = nets.init(old, 0)
  described = {"fresh": nets.init(new, 1), **described, **settings}
  bigger, forward, plan = grow(old, new, variables, old.inputs, **described)
  return old, new, variables, bigger, forward, plan


def with_alpha(variables, alpha):
  return {**variables, "params": {**variables["params"], "alpha": jnp.float32(alpha)}}


def plain(variables):
  return {**variables, "params": {k: v for k, v in variables["params"].items() if k != "alpha"}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_goes_on_as_it_was_and_becomes_the_new_one(kind):
  old, new, variables, bigger, forward, plan = grown(kind)
  before, gated, after = (
    jax.jit(nets.both_modes(f), compiler_options=nets.AS_WRITTEN)
    for f in (old.apply, forward, new.apply)
  )

  expected, (trained, state) = before(variables, old.inputs)
  found, (new_trained, new_state) = gated(bigger, old.inputs)
  close((found, new_trained), (expected, trained))
  close(plan.inverse().apply({**plain(bigger), **new_state}), {**variables, **state})
  equal(plan.inverse().apply(plain(bigger)), variables)  # what was grown can be taken back

  at_one = with_alpha(bigger, 1.0)
  opened = gated(at_one, old.inputs)
  merged = after(growth.merge(at_one, plan), old.inputs)
  assert float(jnp.abs(opened[0] - found).max()) > 1e-3  # the new capacity does something
  drops = not isinstance(old, nets.ResNet)  # then the merged module draws masks of another size
  close(opened[:1] if drops else opened, merged[:1] if drops else merged)

  half = with_alpha(bigger, 0.5)
  if all(dimension.folds for dimension, _ in plan.dimensions):
    opened, merged = gated(half, old.inputs), after(growth.merge(half, plan), old.inputs)
    close(opened[:1] if drops else opened, merged[:1] if drops else merged)
  else:
    with pytest.raises(ValueError, match=r"'params/alpha' is 0.5 .*expected 1"):
      growth.merge(half, plan)


def test_which_gates_fold_into_weights():
  folding = {
    kind for kind in KINDS if all(dimension.folds for dimension, _ in grown(kind)[-1].dimensions)
  }
  assert set(KINDS) - folding == {"conv to conv", "embedding width"}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_old_entries_are_those_without_growth(kind):
  old, _, variables, bigger, forward, plan = grown(kind)
  with oracle.enable_x64():
    variables, bigger, inputs = nets.in_float64((variables, bigger, old.inputs))

  @functools.partial(jax.jit, static_argnums=0)
  def gradients(apply, variables):
    def loss(params, mode):
      output = nets.in_mode(apply, mode)({**variables, "params": params}, inputs)
      return jnp.sin(output[0] if mode else output).sum()

    found = [jax.grad(loss)(variables["params"], mode) for mode in (0, 1)]
    return [{**variables, "params": params} for params in found]

  with oracle.enable_x64(), nets.relaxed():
    pairs = zip(gradients(forward, bigger), gradients(old.apply, variables), strict=True)
    for found, expected in pairs:
      assert float(found["params"]["alpha"]) != 0
      alike(plan.inverse().apply(plain(found))["params"], expected["params"])


def test_the_oracle_of_a_dense_layer_at_any_alpha():
  a, b, c, d = (
    jax.random.normal(k, s)
    for k, s in zip(
      jax.random.split(jax.random.key(0), 4), [(3, 4), (4, 2), (3, 5), (5, 2)], strict=True
    )
  )
  x = jax.random.normal(jax.random.key(9), (6, 3))
  fn = lambda p, x: jnp.tanh(x @ p["one"]) @ p["two"]
  params = {"one": a, "two": b}
  plan = growth.widening(params, growth.couple(fn, params, x, producer="one"), 5)
  fresh = {"one": jnp.concatenate([a, c], 1), "two": jnp.concatenate([b, d])}
  bigger = plan.apply(params, fresh)
  for alpha in (0.0, 0.3, 0.7, 1.0, 2.0):
    found = growth.gated(fn, plan)({**bigger, "alpha": jnp.float32(alpha)}, x)
    expected = jnp.tanh(x @ a) @ b + alpha * (jnp.tanh(x @ c) @ d)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    merged = growth.merge({**bigger, "alpha": jnp.float32(alpha)}, plan)
    np.testing.assert_allclose(fn(merged, x), expected, rtol=1e-5, atol=1e-6)


def test_the_oracle_of_a_norm_at_any_alpha():
  params = {"in": jax.random.normal(jax.random.key(0), (3, 4)), "out": jnp.ones((4, 2))}

  def fn(p, x):
    h = x @ p["in"]
    mean = h.mean(-1, keepdims=True)
    return (h - mean) @ p["out"]

  x = jax.random.normal(jax.random.key(1), (5, 3))
  plan = growth.widening(params, growth.couple(fn, params, x, producer="in"), 2)
  bigger = plan.apply(params, lambda path, shape, dtype: jnp.full(shape, 0.5, dtype))
  for alpha in (0.0, 0.4, 1.0):
    h = x @ bigger["in"]
    weight = jnp.array([1, 1, 1, 1, alpha, alpha])[None]
    mean = (h * weight).sum(-1, keepdims=True) / (4 + 2 * alpha)
    expected = ((h - mean) * weight) @ bigger["out"]
    found = growth.gated(fn, plan)({**bigger, "alpha": jnp.float32(alpha)}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_oracle_of_a_product_that_new_units_enter_and_leave_on_both_sides():
  keys = jax.random.split(jax.random.key(0), 4)
  old, new = 4, 6
  bigger = {
    name: jax.random.normal(key, shape)
    for name, key, shape in zip("abio", keys, [(3, new), (3, new), (2, new), (new, 2)], strict=True)
  }
  params = {name: x[:, :old] if x.shape[1] == new else x[:old] for name, x in bigger.items()}

  def fn(p, x):
    square = p["a"].T @ p["b"]
    return x @ p["i"] @ (square @ square) @ p["o"]

  x = jax.random.normal(jax.random.key(1), (5, 2))
  plan = growth.widening(params, growth.couple(fn, params, x, producer="a"), new - old)
  bigger = plan.apply(params, bigger)
  values = {name: np.asarray(leaf, np.float64) for name, leaf in bigger.items()}
  square, is_old = values["a"].T @ values["b"], np.arange(new) < old
  for alpha in (0.0, 0.4, 1.0):
    gate = np.where(is_old, 1, alpha)
    product = np.where(np.outer(is_old, is_old), (square * gate) @ square, square @ square)
    h = np.asarray(x, np.float64) @ values["i"]
    h = np.where(is_old, (h * gate) @ product, h @ product)
    found = growth.gated(fn, plan)({**bigger, "alpha": jnp.float32(alpha)}, x)
    nets.alike(found, jnp.asarray((h * gate) @ values["o"], jnp.float32))


def test_width_and_filters_behind_one_gate():
  old, new = nets.ResNet(), nets.ResNet(kernel=5, channels=12)
  variables = nets.init(old, 0)
  before, after = old.apply, new.apply
  units = growth.linen.couple(old, variables, old.inputs, producer="params/stem")
  plan = growth.widening(variables, units, 4, alpha="params/alpha") + growth.enlarging(
    variables, {"params/stem/kernel": (5, 5)}, alpha="params/alpha"
  )
  bigger = plan.apply(variables, nets.init(new, 1))
  forward = growth.gated(after, plan, old=before)
  forward = jax.jit(forward)
  close(forward(bigger, old.inputs), jax.jit(before)(variables, old.inputs))
  one = with_alpha(bigger, 1.0)
  close(forward(one, old.inputs), jax.jit(after)(growth.merge(one, plan), old.inputs))


def test_layers_in_a_scan_and_under_remat():
  params = {
    "layers": {
      "up": jax.random.normal(jax.random.key(0), (3, 4, 6)),
      "down": jax.random.normal(jax.random.key(1), (3, 6, 4)),
    },
  }

  def fn(p, x):
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def layer(x, w):
      return x + jnp.tanh(x @ w["up"]) @ w["down"], x.sum()

    x, sums = jax.lax.scan(layer, x, p["layers"])
    return x * sums.sum()

  x = jax.random.normal(jax.random.key(2), (5, 4))
  units = growth.couple(fn, params, x, producer="layers/up")
  plan = growth.widening(params, units, 2)
  bigger = plan.apply(params, lambda path, shape, dtype: jnp.full(shape, 0.1, dtype))
  assert "prevent_cse=True" not in str(jax.make_jaxpr(growth.gated(fn, plan))(bigger, x))
  forward = jax.jit(lambda p: jax.value_and_grad(lambda p: growth.gated(fn, plan)(p, x).sum())(p))
  close(forward(bigger)[0], jax.jit(fn)(params, x).sum())
  one = {**bigger, "alpha": jnp.float32(1)}
  close(forward(one)[0], jax.jit(fn)(growth.merge(one, plan), x).sum())
  assert float(forward(bigger)[1]["alpha"]) != 0


@pytest.mark.parametrize("padding", ["SAME", "CAUSAL"])
def test_kernels_of_one_dimension(padding):
  class Net(nnx.Module):
    def __init__(self, size):
      self.conv = nnx.Conv(2, 3, (size,), padding=padding, rngs=nnx.Rngs(size))

    def __call__(self, x):
      return self.conv(x)

  x, out = jax.random.normal(jax.random.key(0), (2, 9, 2)), nnx.jit(lambda model, x: model(x))
  model = Net(3)
  expected = out(model, x)
  growth.enlarge(model, x, conv=model.conv, kernel_size=(5,))
  close(out(model, x), expected)
  growth.nnx.set_alpha(model, 0.5)
  opened = out(model, x)
  assert float(jnp.abs(opened - expected).max()) > 1e-2
  growth.merge(model)
  close(out(model, x), opened)


def test_linen_entries_come_from_its_own_initializers():
  *_, bigger, _, _ = grown("dense to dense", fresh=None, rngs=jax.random.key(7))
  new = nets.Dense(hidden=11).init(jax.random.key(7), nets.IMAGES)["params"]
  np.testing.assert_array_equal(
    bigger["params"]["one"]["kernel"][:, 8:], new["one"]["kernel"][:, 8:]
  )
  with pytest.raises(ValueError, match="expected rngs=, for new.init, or fresh="):
    grown("dense to dense", fresh=None)


def test_pruned_channels_can_be_removed():
  # Channels pruned by their outgoing weights, in training; the smaller network computes the same.
  old = nets.ResNet()
  variables = nets.init(old, 0)
  tx = oc.prune(
    0.25,
    every=oc.pruning.once(1),
    structure=oc.pruning.Channel(axis=-2),
    where=lambda path, x: path == "block0_out/kernel",
    inner=optax.sgd(0.1),
  )
  params = variables["params"]
  with nets.relaxed():
    state = tx.init(params)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    params = optax.apply_updates(params, updates)
  variables = {**variables, "params": params}
  kept = oc.pruning.masks(params, state)["block0_out"]["kernel"].any((0, 1, 3))
  assert int(kept.sum()) == 9
  smaller, plan = growth.linen.shrink(
    old, nets.ResNet(inner=9), variables, old.inputs, producer="params/block0_in", keep=kept
  )
  assert smaller["params"]["block0_in"]["kernel"].shape == (3, 3, 8, 9)
  assert plan.flops[1] < plan.flops[0]
  programs = [jax.jit(nets.both_modes(m.apply)) for m in (nets.ResNet(inner=9), old)]
  found, expected = programs[0](smaller, old.inputs), programs[1](variables, old.inputs)
  close((found[0], found[1][0]), (expected[0], expected[1][0]))
  with pytest.raises(ValueError, match=r"does not run .*\(3, 3, 8, 9\)"):
    growth.linen.shrink(old, old, variables, old.inputs, producer="params/block0_in", keep=kept)


def test_training_does_not_retrace_and_the_merge_leaves_nothing():
  _, new, _, bigger, forward, plan = grown("dense to dense")
  traces = []

  @jax.jit
  def step(v, x):
    traces.append(1)
    return jax.tree.map(lambda p, g: p - 0.1 * g, v, jax.grad(lambda v: forward(v, x).sum())(v))

  for _ in range(4):
    bigger = step(bigger, nets.IMAGES)
  assert len(traces) == 1
  merged = growth.merge(with_alpha(bigger, 1.0), plan)
  lowered = [jax.jit(new.apply).lower(v, nets.IMAGES) for v in (merged, nets.init(new, 2))]
  assert lowered[0].as_text() == lowered[1].as_text()
