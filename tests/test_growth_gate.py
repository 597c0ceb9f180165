"""The gate: nothing changes at 0, at 1 the plain module is there, in between only α speaks."""

import functools

import growth_nets as nets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cadence import growth

KINDS = list(nets.WIDENINGS)


@functools.cache
def grown(kind, train=False):
  old, new, producer, settings = nets.WIDENINGS[kind]
  variables = nets.init(old, 0)
  before, after = nets.apply(old, train), nets.apply(new, train)
  settings = dict(settings)
  by = settings.pop("by")
  if not producer.endswith(("kernel", "embedding")):
    producer += "/embedding" if producer.endswith("embed") else "/kernel"
  units = growth.couple(before, variables, old.inputs, producer=producer, **settings)
  plan = growth.widening(variables, units, by, alpha="params/alpha")
  bigger = plan.apply(variables, nets.init(new, 1))
  return variables, bigger, plan, before, after, growth.gated(after, plan, old=before), old.inputs


def with_alpha(variables, alpha):
  return {**variables, "params": {**variables["params"], "alpha": jnp.float32(alpha)}}


def plain(variables):
  return {**variables, "params": {k: v for k, v in variables["params"].items() if k != "alpha"}}


def close(found, expected):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_at_zero_nothing_has_changed(kind, train):
  variables, bigger, plan, before, _, forward, x = grown(kind, train)
  expected, found = jax.jit(before)(variables, x), jax.jit(forward)(bigger, x)
  if train:  # running statistics of old channels too
    (expected, state), (found, new_state) = expected, found
    old_state = plan.inverse().apply({**plain(bigger), **new_state}) if state else {}
    close({k: old_state[k] for k in state}, state)
  close(found, expected)
  assert float(jnp.abs(found).max()) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_at_one_it_is_the_plain_module(kind):
  _, bigger, plan, _, after, forward, x = grown(kind)
  bigger = with_alpha(bigger, 1.0)
  merged = growth.merge(bigger, plan)
  close(jax.jit(forward)(bigger, x), jax.jit(after)(merged, x))
  changed = jax.jit(forward)(bigger, x) - jax.jit(forward)(with_alpha(bigger, 0.0), x)
  assert float(jnp.abs(changed).max()) > 1e-3  # the new capacity does something


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_old_entries_are_those_without_growth(kind):
  variables, bigger, plan, before, _, forward, x = grown(kind)

  def gradients(fn, v):
    return jax.grad(lambda v: jnp.sin(fn(v, x)).sum())(v)

  # Operation by operation they are so bit for bit. Inside a larger program XLA fuses
  # multiplications into additions, and chooses which by what else is there.
  with nets.operation_by_operation():
    expected, found = gradients(before, variables), gradients(forward, bigger)
  assert float(found["params"]["alpha"]) != 0
  old = plan.inverse().apply(plain(found))
  for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b)
  compiled = plan.inverse().apply(plain(jax.jit(lambda v: gradients(forward, v))(bigger)))
  for a, b in zip(jax.tree.leaves(compiled), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6 * max(1, float(jnp.abs(b).max())))


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


def test_a_gate_on_statistics_merges_at_one_alone():
  _, bigger, plan, *_ = grown("embedding width")
  with pytest.raises(ValueError, match=r"'params/alpha' is 0.5 .*expected 1"):
    growth.merge(with_alpha(bigger, 0.5), plan)


@pytest.mark.parametrize("train", [False, True])
def test_larger_filters(train):
  old, new = nets.ResNet(), nets.ResNet(kernel=5)
  variables = nets.init(old, 0)
  before, after = nets.apply(old, train), nets.apply(new, train)
  plan = growth.enlarging(variables, {"params/stem/kernel": (5, 5)}, alpha="params/alpha")
  bigger = plan.apply(variables, nets.init(new, 1))
  forward = growth.gated(after, plan, old=before)
  close(jax.jit(forward)(bigger, old.inputs), jax.jit(before)(variables, old.inputs))
  for alpha in (0.5, 1.0):
    one = with_alpha(bigger, alpha)
    expected = jax.jit(after)(growth.merge(one, plan), old.inputs)
    close(jax.jit(forward)(one, old.inputs), expected)
  assert plan.inverse().apply(plain(bigger))["params"]["stem"]["kernel"].shape == (3, 3, 1, 8)


@pytest.mark.parametrize("train", [False, True])
def test_a_new_residual_block(train):
  old, new = nets.ResNet(), nets.ResNet(blocks=2)
  variables = nets.init(old, 0)
  before, after = nets.apply(old, train), nets.apply(new, train)
  fresh = nets.init(new, 1)
  plan = growth.deepening(variables, fresh, outgoing=["params/block1_out"], alpha="params/alpha")
  bigger = plan.apply(variables, fresh)
  forward = growth.gated(after, plan)
  expected, found = jax.jit(before)(variables, old.inputs), jax.jit(forward)(bigger, old.inputs)
  if train:
    (expected, state), (found, new_state) = expected, found
    new_state = {"batch_stats": {k: new_state["batch_stats"][k] for k in state["batch_stats"]}}
    close(new_state, state)
  close(found, expected)
  for alpha in (0.5, 1.0):
    one = with_alpha(bigger, alpha)
    expected = jax.jit(after)(growth.merge(one, plan), old.inputs)
    close(jax.jit(forward)(one, old.inputs), expected)


def test_width_and_filters_behind_one_gate():
  old, new = nets.ResNet(), nets.ResNet(kernel=5, channels=12)
  variables = nets.init(old, 0)
  before, after = nets.apply(old, False), nets.apply(new, False)
  units = growth.couple(before, variables, old.inputs, producer="params/stem/kernel")
  plan = growth.widening(variables, units, 4, alpha="params/alpha") + growth.enlarging(
    variables, {"params/stem/kernel": (5, 5)}, alpha="params/alpha"
  )
  bigger = plan.apply(variables, nets.init(new, 1))
  forward = growth.gated(after, plan, old=before)
  close(jax.jit(forward)(bigger, old.inputs), before(variables, old.inputs))
  one = with_alpha(bigger, 1.0)
  close(jax.jit(forward)(one, old.inputs), after(growth.merge(one, plan), old.inputs))


def test_layers_in_a_scan_and_under_remat():
  params = {
    "layers": {
      "up": jax.random.normal(jax.random.key(0), (3, 4, 6)),
      "down": jax.random.normal(jax.random.key(1), (3, 6, 4)),
    },
  }

  def fn(p, x):
    @jax.checkpoint
    def layer(x, w):
      return x + jnp.tanh(x @ w["up"]) @ w["down"], x.sum()

    x, sums = jax.lax.scan(layer, x, p["layers"])
    return x * sums.sum()

  x = jax.random.normal(jax.random.key(2), (5, 4))
  units = growth.couple(fn, params, x, producer="layers/up")
  plan = growth.widening(params, units, 2)
  bigger = plan.apply(params, lambda path, shape, dtype: jnp.full(shape, 0.1, dtype))
  forward = growth.gated(fn, plan)
  close(jax.jit(forward)(bigger, x), jax.jit(fn)(params, x))
  one = {**bigger, "alpha": jnp.float32(1)}
  close(jax.jit(forward)(one, x), jax.jit(fn)(growth.merge(one, plan), x))
  assert float(jax.grad(lambda p: forward(p, x).sum())(bigger)["alpha"]) != 0


@pytest.mark.parametrize("kind", KINDS)
def test_shrinking_gives_back_the_old_tree(kind):
  variables, bigger, plan, *_ = grown(kind)
  old = plan.inverse().apply(plain(bigger))
  assert jax.tree.structure(old) == jax.tree.structure(variables)
  for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(variables), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_pruned_channel_can_be_removed():
  old = nets.ResNet()
  variables = nets.init(old, 0)
  before = nets.apply(old, False)
  units = growth.couple(before, variables, old.inputs, producer="params/block0_in/kernel")
  gone = [1, 5, 6]
  params = jax.tree.map(lambda x: x, variables["params"])
  params["block0_out"]["kernel"] = params["block0_out"]["kernel"].at[:, :, jnp.array(gone)].set(0)
  variables = {**variables, "params": params}
  plan = growth.shrinking(variables, units, remove=gone)
  smaller = plan.apply(variables)
  assert plan.flops[1] < plan.flops[0]
  assert smaller["params"]["block0_in"]["kernel"].shape == (3, 3, 8, 9)
  mask = np.ones(12, bool)
  mask[gone] = False
  assert str(growth.shrinking(variables, units, keep=mask)) == str(plan)
  # The function reads all sizes from its arrays, written as one.

  def fn(v, x):
    p, s = v["params"], v["batch_stats"]

    def conv(x, n):
      dims = ("NHWC", "HWIO", "NHWC")
      y = jax.lax.conv_general_dilated(x, p[n]["kernel"], (1, 1), "SAME", dimension_numbers=dims)
      return y + p[n]["bias"][None, None, None]

    def norm(x, n):
      y = (x - s[n]["mean"][None, None, None]) * jax.lax.rsqrt(s[n]["var"] + 1e-5)[None, None, None]
      return y * p[n]["scale"][None, None, None] + p[n]["bias"][None, None, None]

    x = jax.nn.relu(norm(conv(x, "stem"), "stem_norm"))
    x = x + conv(jax.nn.relu(norm(conv(x, "block0_in"), "block0_norm")), "block0_out")
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.reshape(len(x), -1) @ p["head"]["kernel"] + p["head"]["bias"][None]

  close(fn(smaller, old.inputs), before(variables, old.inputs))


def test_training_does_not_retrace_and_the_merge_leaves_nothing():
  variables, bigger, plan, _, after, forward, x = grown("dense to dense")
  traces = []

  @jax.jit
  def step(v, x):
    traces.append(1)
    return jax.tree.map(lambda p, g: p - 0.1 * g, v, jax.grad(lambda v: forward(v, x).sum())(v))

  for _ in range(4):
    bigger = step(bigger, x)
  assert len(traces) == 1
  merged = growth.merge(with_alpha(bigger, 1.0), plan)
  fresh = nets.init(nets.Dense(hidden=11), 2)
  lowered = [jax.jit(after).lower(v, x).as_text() for v in (merged, fresh)]
  assert lowered[0] == lowered[1]
  del variables
