"""Units born again: which units are found, what is told of them, who is replaced, and by what."""

import functools

import growth_nets as nets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle as oracles
import pytest
from flax import nnx
from flax import serialization

import optax_cadence as oc
from optax_cadence import growth

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mlp(p, x):
  x = jax.nn.relu(x @ p["in"] + p["bias"][None])
  return jax.nn.relu(x @ p["mid"]) @ p["out"]


MLP = {"in": draw(4, 6), "bias": draw(6, seed=1), "mid": draw(6, 3, seed=2), "out": draw(3, 2)}


def swiglu(p, x):
  return x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def two_blocks(p, x):
  """A residual stream between an embedding and a head."""
  x = x @ p["embed"]
  for name in "ab":
    x = x + jnp.tanh(x @ p[f"{name}_up"]) @ p[f"{name}_down"]
  return x @ p["head"]


def squeeze(p, x):
  """Units that are gated by a number for each, made of all."""
  x = jax.nn.relu(x @ p["in"])
  gate = jax.nn.sigmoid(jax.nn.relu(x.mean(0) @ p["squeeze"]) @ p["excite"])
  return (x * gate[None]) @ p["out"]


def recurrent(p, x):
  def step(h, x):
    return jnp.tanh(x[None] @ p["in"] + h @ p["hidden"]), None

  return jax.lax.scan(step, jnp.zeros((1, 6)), x)[0] @ p["out"]


def over_time(p, x):
  """A hidden layer inside a loop over time, which is no state."""

  def step(total, x):
    y = jax.nn.relu(x[None] @ p["in"]) @ p["out"]
    return total + y, y

  return jax.lax.scan(step, jnp.zeros((1, 2)), x)


def stacked(p, x):
  """Layers in a loop."""

  def block(x, p):
    return x + jax.nn.relu(x @ p["up"] + p["bias"][None]) @ p["down"], None

  return jax.lax.scan(jax.checkpoint(block), x, p)[0]


def branch(p, x):
  return jax.lax.cond(x[0, 0] > 0, lambda x: jnp.tanh(x @ p["in"]) @ p["out"], lambda x: x, x)


# The function, its parameters, the hidden layers with the members of each, and what is left out,
# with a word of the reason.
NETS = {
  "mlp": (
    mlp,
    MLP,
    {"in": "in incoming, bias follows, mid outgoing", "mid": "mid incoming, out outgoing"},
    {"out": "output"},
  ),
  "swiglu": (
    swiglu,
    {"gate": draw(4, 6), "up": draw(4, 6, seed=1), "down": draw(6, 4)},
    {"gate": "gate incoming, up incoming, down outgoing"},
    {"down": "argument"},
  ),
  "residual stream": (
    two_blocks,
    {"embed": draw(4, 5), "head": draw(5, 2)}
    | {name: draw(*((5, 3) if name[2:] == "up" else (3, 5))) for name in ("a_up", "b_up")}
    | {name: draw(3, 5) for name in ("a_down", "b_down")},
    {"a_up": "a_up incoming, a_down outgoing", "b_up": "b_up incoming, b_down outgoing"},
    {"embed": "residual stream", "head": "output"},
  ),
  "squeeze and excite": (
    squeeze,
    {"in": draw(4, 6), "squeeze": draw(6, 2), "excite": draw(2, 6), "out": draw(6, 3)},
    {
      "in": "in incoming, excite incoming, squeeze outgoing, out outgoing",
      "squeeze": "squeeze incoming, excite outgoing",
    },
    {"out": "output"},
  ),
  "recurrent": (
    recurrent,
    {"in": draw(4, 6), "hidden": draw(6, 6), "out": draw(6, 2)},
    {},
    {"in": "recurrent", "out": "output"},
  ),
  "over time": (
    over_time,
    {"in": draw(4, 6), "out": draw(6, 2)},
    {"in": "in incoming, out outgoing"},
    {"out": "output"},
  ),
  "stacked": (
    stacked,
    {"up": draw(3, 4, 6), "bias": draw(3, 6), "down": draw(3, 6, 4, seed=1)},
    {"up": "up incoming, bias follows, down outgoing"},
    {"down": "argument"},
  ),
  "branch": (
    branch,
    {"in": draw(4, 6), "out": draw(6, 4)},
    {},
    {"in": "inside cond", "out": "argument"},
  ),
  "tied": (
    lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T,
    {"w": draw(4, 6)},
    {},
    {"w": "tied embedding", "w#2": "argument"},
  ),
  "ensemble": (
    lambda p, x: jax.vmap(mlp)(p, jnp.stack([x, 2 * x])),
    jax.tree.map(lambda x: jnp.stack([x, x]), MLP),
    {},
    {"in": "inside that vmap", "mid": "inside that vmap", "out": "output"},
  ),
}


@pytest.mark.parametrize("name", NETS)
def test_hidden_layers_are_those_of_the_table(name):
  fn, params, layers, left_out = NETS[name]
  found = growth.hidden(fn, params, X)
  members = {
    name: {f"{'/'.join(m.path)} {m.role}" for m in layer.units.members}
    for name, layer in found.layers.items()
  }
  assert members == {name: set(row.split(", ")) for name, row in layers.items()}
  assert set(found.left_out) == set(left_out)
  for name, word in left_out.items():
    assert word in found.left_out[name]


def test_hidden_layers_of_flax_models():
  found = growth.hidden(nets.Transformer().apply, nets.init(nets.Transformer(), 0), nets.TOKENS)
  assert set(found.layers) == {"params/up/kernel"}
  reasons = " ".join(found.left_out.values())
  assert "heads" in reasons and "residual stream" in reasons and len(found.left_out) == 8
  net = nets.ResNet()
  found = growth.hidden(net.apply, nets.init(net, 0), net.inputs)
  (layer,) = found.layers.values()
  norm = ["batch_stats/block0_norm/mean", "batch_stats/block0_norm/var"]
  norm += ["params/block0_norm/bias", "params/block0_norm/scale"]
  assert {"/".join(m.path) for m in layer.units.members if m.role == "follows"} == {
    *norm,
    "params/block0_in/bias",
  }


def compiled(fn, *args):
  return jax.jit(fn).lower(*args).compile(nets.AS_WRITTEN)(*args)


@pytest.mark.parametrize("name", ["mlp", "squeeze and excite", "over time", "stacked"])
def test_results_and_gradients_are_those_of_the_function(name):
  fn, params, *_ = NETS[name]
  forward, _ = growth.recycle(fn, params, X)

  def loss(p, x):
    return sum((y**2).sum() for y in jax.tree.leaves(fn(p, x)))

  def loss_with_activity(p, x):
    y, activity = forward(p, x)
    return sum((y**2).sum() for y in jax.tree.leaves(y)), activity

  x = X[:3]  # other shapes than those on which the layers were found
  with nets.sums_in_order():
    expected = compiled(jax.value_and_grad(loss), params, x)
    (value, _), grads = compiled(jax.value_and_grad(loss_with_activity, has_aux=True), params, x)
  nets.equal((value, grads), expected)


def told(value, *weights):
  """Magnitude and contribution of units with these values, and outgoing weights [units, n]."""
  magnitude = np.abs(value).reshape(-1, value.shape[-1]).mean(0)
  return magnitude, magnitude * sum(np.abs(w).sum(1) for w in weights)


def check(found, *expected):
  for activity, (magnitude, contribution) in zip(found.values(), expected, strict=True):
    np.testing.assert_allclose(activity.magnitude, magnitude, rtol=1e-5)
    np.testing.assert_allclose(activity.contribution, contribution, rtol=1e-5)


def test_activity_of_dense_layers():
  p = jax.tree.map(np.asarray, MLP)
  first = np.maximum(np.asarray(X) @ p["in"] + p["bias"], 0)
  second = np.maximum(first @ p["mid"], 0)
  forward, _ = growth.recycle(mlp, MLP, X)
  check(forward(MLP, X)[1], told(first, p["mid"]), told(second, p["out"]))


def test_activity_of_stacked_layers():
  fn, params, *_ = NETS["stacked"]
  (activity,) = growth.recycle(fn, params, X).forward(params, X)[1].values()
  x, p = np.asarray(X), jax.tree.map(np.asarray, params)
  rows = []
  for up, bias, down in zip(p["up"], p["bias"], p["down"], strict=True):
    value = np.maximum(x @ up + bias, 0)
    rows.append(told(value, down))
    x = x + value @ down
  check({"up": activity}, tuple(map(np.stack, zip(*rows, strict=True))))


def test_activity_over_time():
  fn, params, *_ = NETS["over time"]
  value = np.maximum(np.asarray(X @ params["in"]), 0)
  expected = told(value, np.asarray(params["out"]))
  check(growth.recycle(fn, params, X).forward(params, X)[1], expected)


def test_activity_of_channels_that_are_flattened():
  def net(p, x):
    x = jax.lax.conv_general_dilated(
      x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(x).reshape(len(x), -1) @ p["out"]

  params = {"conv": draw(1, 1, 2, 3), "out": draw(2 * 2 * 3, 4)}
  x = draw(5, 2, 2, 2)
  value = np.maximum(np.einsum("bhwi,io->bhwo", x, params["conv"][0, 0]), 0)
  weights = np.abs(np.asarray(params["out"])).sum(1).reshape(2, 2, 3)
  contribution = (value.mean(0) * weights).sum((0, 1))
  found = growth.recycle(net, params, x).forward(params, x)[1]
  check(found, (value.mean((0, 1, 2)), contribution))


def init(key):
  """Fresh parameters, each a number that tells its leaf."""
  shift = jax.random.uniform(key)
  return {name: jnp.full(x.shape, i + 1.0) + shift for i, (name, x) in enumerate(MLP.items())}


def oracle(rule, steps):
  """The parameters after each step and who was replaced, unit by unit."""
  params = {name: np.array(x) for name, x in MLP.items()}
  shapes = {"in": (6, [("in", 1), ("bias", 0)], ("mid", 0)), "mid": (3, [("mid", 1)], ("out", 0))}
  adam = oracles.relaxed(optax.adam(0.1))
  state = adam.init(MLP)
  units = {name: [(0.0, 0)] * n for name, (n, *_) in shapes.items()}
  credit = dict.fromkeys(shapes, 0.0)
  for t in range(1, steps + 1):
    updates, state = adam.update(grads(t), state)
    moments = {k: [np.array(m[k]) for m in (state[0].mu, state[0].nu)] for k in params}
    params = {k: x + np.asarray(updates[k]) for k, x in params.items()}
    fresh = init(jax.random.fold_in(jax.random.key(7), t))
    gone = []
    for name in shapes:
      told, utility = activity(t)[name][rule["utility"] != "redo"], []
      for i, (total, age) in enumerate(units[name]):
        total = rule["decay"] * total + (1 - rule["decay"]) * float(told[i])
        units[name][i] = total, age + 1
        utility.append(total / (1 - rule["decay"] ** (age + 1)))
      may = [i for i, (_, age) in enumerate(units[name]) if age > rule["age"]]
      if rule["threshold"] is not None:
        may = [i for i in may if utility[i] <= rule["threshold"] * np.mean(utility)]
      if t % rule["every"]:
        may = []
      if rule["rate"] is not None:
        credit[name] += rule["rate"] * rule["every"] * len(may)
        may = sorted(may, key=utility.__getitem__)[: int(credit[name])]
        credit[name] -= len(may)
      gone += [(name, i) for i in may]
    for name, i in gone:
      units[name][i] = 0.0, 0
      for leaf, axis in shapes[name][1]:
        at = (slice(None),) * axis + (i,)
        params[leaf][at] = fresh[leaf][at]
        for m in moments[leaf]:
          m[at] = 0
    for name, i in gone:
      leaf, _ = shapes[name][2]
      params[leaf][i] = 0
      for m in moments[leaf]:
        m[i] = 0
    mu, nu = ({k: jnp.asarray(m[j]) for k, m in moments.items()} for j in range(2))
    state = (state[0]._replace(mu=mu, nu=nu), *state[1:])
    yield params, gone, moments


@functools.cache
def grads(t):
  return {name: draw(*x.shape, seed=10 * t + i) for i, (name, x) in enumerate(MLP.items())}


@functools.cache
def activity(t):
  rng = np.random.default_rng(t)
  return {
    name: growth.Activity(*(jnp.asarray(rng.exponential(size=n), jnp.float32) for _ in range(2)))
    for name, n in (("in", 6), ("mid", 3))
  }


RULES = {
  "redo": {"utility": "redo", "threshold": 0.3, "rate": None, "age": 0, "every": 2, "decay": 0.0},
  "contribution": {
    "utility": "contribution",
    "threshold": None,
    "rate": 0.1,
    "age": 2,
    "every": 1,
    "decay": 0.9,
  },
}


@pytest.mark.parametrize("name", RULES)
def test_the_same_units_as_the_oracle_s(name):
  rule = RULES[name]
  given = {key: value for key, value in rule.items() if value is not None}
  _, tx = growth.recycle(
    mlp, MLP, X, inner=oracles.relaxed(optax.adam(0.1)), init=init, key=7, **given
  )
  traces = []

  @jax.jit
  def step(params, state, grads, activity):
    traces.append(1)
    updates, state = tx.update(grads, state, params, activity=activity)
    return optax.apply_updates(params, updates), state

  params, state = MLP, tx.init(MLP)
  replaced, times = {"in": np.zeros(6), "mid": np.zeros(3)}, 0
  for t, (expected, gone, moments) in enumerate(oracle(rule, 24), start=1):
    params, state = step(params, state, grads(t), activity(t))
    for name, i in gone:
      replaced[name][i] += 1
    times += bool(gone)
    for leaf, x in params.items():
      np.testing.assert_allclose(x, expected[leaf], rtol=1e-4, atol=1e-5)
      adam = state.inner_state[0]
      np.testing.assert_allclose(adam.mu[leaf], moments[leaf][0], rtol=1e-4, atol=1e-6)
      np.testing.assert_allclose(adam.nu[leaf], moments[leaf][1], rtol=1e-4, atol=1e-6)
    for name, n in replaced.items():
      np.testing.assert_array_equal(state.layers[name].replaced, n)
  assert len(traces) == 1
  assert 3 < times < 24 and all(n.any() for n in replaced.values())


ALIKE = {name: growth.Activity(jnp.ones(n), jnp.ones(n)) for name, n in (("in", 6), ("mid", 3))}
LAZY = ALIKE | {"in": growth.Activity(jnp.array([1.0, 0.0, 1.0, 1.0, 1.0, 1.0]), jnp.ones(6))}


@pytest.mark.ci
def test_moments_windows_and_counters_start_anew():
  inner = oc.cadence(oracles.relaxed(optax.adam(0.1)), 4)
  _, tx = growth.recycle(mlp, MLP, X, inner=inner, every=2)
  params, state = MLP, tx.init(MLP)
  ones = jax.tree.map(jnp.ones_like, MLP)
  for t in range(1, 8):
    updates, state = tx.update(ones, state, params, activity=LAZY if t in (5, 6) else ALIKE)
    params = optax.apply_updates(params, updates)
  # At micro-step 6, in the middle of the second window, unit 1 was replaced: in step 5 none were
  # looked for. Its entries have gathered one gradient since, all others three.
  (group,) = state.inner_state.groups.values()
  new = {name: np.zeros(x.shape, bool) for name, x in MLP.items()}
  new["in"][:, 1], new["bias"][1], new["mid"][1] = True, True, True
  for name, x in group.accumulators.items():
    np.testing.assert_array_equal(x, np.where(new[name], 1.0, 3.0))
    mu = group.inner_state[0].mu[name]
    np.testing.assert_allclose(mu, np.where(new[name], 0.0, 0.1), rtol=1e-6)
  assert group.inner_state[0].count == 1
  np.testing.assert_array_equal(state.layers["in"].age, [7, 1, 7, 7, 7, 7])
  assert (params["mid"][1] == 0).all() and (params["mid"][0] != 0).all()


@pytest.mark.ci
def test_it_stands_in_chains_and_alone():
  forward, alone = growth.recycle(mlp, MLP, X, every=1, threshold=0.0)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1), alone)
  grads = jax.tree.map(jnp.zeros_like, MLP)
  with nets.relaxed():
    updates, state = tx.update(grads, tx.init(MLP), MLP, activity=LAZY)
  params = optax.apply_updates(MLP, updates)
  assert (params["mid"][1] == 0).all() and (params["in"][:, 1] != MLP["in"][:, 1]).all()
  nets.equal(params["out"], MLP["out"])
  nets.equal(jnp.delete(params["in"], 1, 1), jnp.delete(MLP["in"], 1, 1))
  assert state[-1].layers["in"].replaced.sum() == 1
  assert growth.dormant(LAZY)["in"].tolist() == [False, True, False, False, False, False]
  assert growth.dormant(forward(params, X)[1])["mid"].shape == (3,)


@pytest.mark.ci
def test_fresh_weights_are_drawn_as_those_at_the_start():
  wide = {
    "in": 3 + 0.5 * draw(400, 6),
    "bias": jnp.full(6, 2.0),
    "mid": draw(6, 3),
    "out": draw(3, 2),
  }
  _, tx = growth.recycle(mlp, wide, draw(1, 400), every=1)
  step = jax.jit(tx.update)
  state, columns = tx.init(wide), []
  for _ in range(2):
    updates, state = step(jax.tree.map(jnp.zeros_like, wide), state, wide, activity=LAZY)
    params = optax.apply_updates(wide, updates)
    columns.append(params["in"][:, 1])
    np.testing.assert_allclose(params["bias"], 2.0)
  assert (columns[0] != columns[1]).all()
  for x in columns:
    np.testing.assert_allclose([x.mean(), x.std()], [3.0, 0.5], rtol=0.1)
  other = growth.recycle(mlp, wide, draw(1, 400), every=1, key=jax.random.key(1)).transformation
  updates, _ = other.update(
    jax.tree.map(jnp.zeros_like, wide), other.init(wide), wide, activity=LAZY
  )
  assert (wide["in"][:, 1] + updates["in"][:, 1] != columns[0]).all()


@pytest.mark.ci
def test_stacked_layers_have_units_of_their_own():
  fn, params, *_ = NETS["stacked"]
  _, tx = growth.recycle(fn, params, X, every=1)
  magnitude = jnp.ones((3, 6)).at[1, 4].set(0.0)
  activity = {"up": growth.Activity(magnitude, magnitude)}
  grads = jax.tree.map(jnp.zeros_like, params)
  updates, state = tx.update(grads, tx.init(params), params, activity=activity)
  expected = {name: np.zeros(x.shape, bool) for name, x in params.items()}
  expected["up"][1, :, 4], expected["bias"][1, 4], expected["down"][1, 4] = True, True, True
  for name, update in updates.items():
    np.testing.assert_array_equal(update != 0, expected[name])
  nets.equal(updates["down"][1, 4], -params["down"][1, 4])
  np.testing.assert_array_equal(state.layers["up"].replaced, 1 - magnitude.astype(int))


@pytest.mark.ci
def test_many_at_once():
  _, tx = growth.recycle(mlp, MLP, X, inner=oracles.relaxed(optax.adam(0.1)), every=1)

  def step(params, activity):
    state = tx.init(params)
    return tx.update(params, state, params, activity=activity)

  two = [LAZY, ALIKE]
  many = jax.tree.map(lambda *x: jnp.stack(x), *two)
  found = jax.jit(jax.vmap(step, (None, 0)))(MLP, many)
  nets.close(found, jax.tree.map(lambda *x: jnp.stack(x), *(step(MLP, one) for one in two)))


def test_what_is_no_number_says_nothing_of_a_unit():
  _, tx = growth.recycle(mlp, MLP, X, utility="contribution", rate=1.0, age=0)
  broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), ALIKE)
  updates, state = tx.update(MLP, tx.init(MLP), MLP, activity=broken)
  nets.equal(updates, MLP)
  assert all((x.age == 0).all() and (x.utility == 0).all() for x in state.layers.values())


def test_the_state_is_saved_and_mapped():
  tx = growth.recycle(mlp, MLP, X, inner=oracles.relaxed(optax.adam(0.1)), every=1).transformation
  _, state = tx.update(MLP, tx.init(MLP), MLP, activity=LAZY)
  assert all(x.size for x in jax.tree.leaves(state))
  nets.equal(serialization.from_bytes(tx.init(MLP), serialization.to_bytes(state)), state)
  mapped = optax.tree_utils.tree_map_params(tx, jnp.zeros_like, state)
  assert not any(x.any() for x in jax.tree.leaves(mapped.inner_state[0].mu))
  nets.equal(mapped.layers, state.layers)


@pytest.mark.ci
def test_low_precision_units_are_replaced_exactly():
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), MLP)
  for params, grads in ((half, half), (MLP, half)):
    forward, tx = growth.recycle(mlp, params, X.astype(params["in"].dtype), every=1)
    assert forward(params, X.astype(params["in"].dtype))[1]["in"].magnitude.dtype == jnp.float32
    updates, _ = tx.update(grads, tx.init(params), params, activity=LAZY)
    with nets.relaxed():
      after = optax.apply_updates(params, updates)
    assert (after["mid"][1] == 0).all()
    assert all(after[name].dtype == x.dtype for name, x in params.items())


class Net(nnx.Module):
  def __init__(self, rngs):
    self.one = nnx.Linear(4, 6, rngs=rngs)
    self.norm = nnx.BatchNorm(6, rngs=rngs)
    self.two = nnx.Linear(6, 2, rngs=rngs)

  def __call__(self, x):
    return self.two(nnx.relu(self.norm(self.one(x))))


@pytest.mark.ci
def test_a_live_model():
  model, twin = nets.make(Net), nets.make(Net)
  optimizer_args = {"inner": oracles.relaxed(optax.adam(0.1)), "threshold": 0.9, "every": 2}
  optimizer_args["compensate"] = True
  with nets.relaxed():
    forward, tx = growth.nnx.recycle(model, X, **optimizer_args)
    params = nnx.state(model, nnx.Param)
    state, traces = tx.init(params), []

    @nnx.jit
    def step(model, state):
      traces.append(1)

      def loss(model):
        y, activity = forward(model, X)
        return (y**2).sum(), (y, activity)

      (_, (y, activity)), grads = nnx.value_and_grad(loss, has_aux=True)(model)
      params = nnx.state(model, nnx.Param)
      updates, state = tx.update(grads, state, params, activity=activity)
      nnx.update(model, optax.apply_updates(params, updates))
      return y, activity, state

    expected = nnx.jit(lambda m, x: m(x))(twin, X)
    y, activity, state = step(model, state)
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    # Running statistics move as they do without.
    nets.close(nets.array(model.norm.mean), nets.array(twin.norm.mean))
    assert set(activity) == {"one/kernel"}
    _, _, state = step(model, state)
  (gone,) = np.nonzero(state.layers["one"]["kernel"].replaced)
  assert 0 < len(gone) < 6 and len(traces) == 1
  assert (nets.array(model.two.kernel)[gone] == 0).all()
  assert len(state.layers["one"]["kernel"].means) == 1
  assert (nets.array(model.norm.bias)[gone] != 0).all()


def test_another_method_of_a_live_model():
  model = nets.make(Net)
  with nets.relaxed():
    forward, _ = growth.nnx.recycle(model, X, method=lambda model, x: (model(x) ** 2).mean())
    value, activity = forward(model, X)
    (_, expected) = growth.nnx.recycle(model, X).forward(model, X)
  assert value.shape == () and set(activity) == set(expected)


@pytest.mark.ci
def test_a_module_draws_from_its_own_initializers():
  module = nets.ResNet()
  variables = nets.init(module, 0)
  with nets.relaxed():
    forward, tx = growth.linen.recycle(
      module, variables, module.inputs, every=1, threshold=0.9, train=True, mutable=["batch_stats"],
      compensate=True,
    )  # fmt: skip
    settings = {"train": True, "mutable": ["batch_stats"]}
    (y, changed), activity = forward(variables, module.inputs, **settings)
    expected = module.apply(variables, module.inputs, **settings)
    nets.close((y, changed), expected)
    params = variables["params"]
    grads = jax.tree.map(jnp.zeros_like, params)
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(grads, state, params, activity=activity)
    after = optax.apply_updates(params, updates)
  assert set(activity) == {"block0_in/kernel"}
  (gone,) = np.nonzero(state.layers["block0_in"]["kernel"].replaced)
  assert 0 < len(gone) < 12
  np.testing.assert_allclose(after["block0_norm"]["scale"][gone], 1.0, rtol=1e-6)
  np.testing.assert_allclose(after["block0_in"]["bias"][gone], 0.0, atol=1e-6)
  assert (after["block0_out"]["kernel"][:, :, gone] == 0).all()
  nets.equal(after["head"], params["head"])
  assert (after["block0_out"]["bias"] != params["block0_out"]["bias"]).all()


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"utility": "weight"}, "utility: expected one of .*contribution.* found 'weight'"),
    ({"every": 0}, "every: expected an integer of at least 1, found 0"),
    ({"age": 1.5}, "age: expected an integer of at least 0, found 1.5"),
    ({"threshold": -1.0}, "threshold: expected a number of at least 0, found -1.0"),
    ({"decay": 1.0}, "decay: expected a number from 0 to below 1"),
    ({"rate": 0.5, "every": 4}, "rate: expected a share above 0, and at most 1 in 4 micro-steps"),
    ({"where": lambda name: False}, "found 'in', 'mid', of which none are chosen; left out: 'out'"),
  ],
)
def test_errors_of_the_settings(settings, message):
  with pytest.raises(ValueError, match=message):
    growth.recycle(mlp, MLP, X, **settings)


def test_errors_of_a_call():
  tx = growth.recycle(mlp, MLP, X, every=1).transformation
  state = tx.init(MLP)
  with pytest.raises(
    ValueError, match="'in': expected 6 entries along axis 1 .* found no such leaf"
  ):
    tx.init({name: x for name, x in MLP.items() if name != "in"})
  with pytest.raises(
    ValueError, match="'mid': expected 6 entries along axis 0 .* shape \\(5, 3\\)"
  ):
    tx.init(MLP | {"mid": draw(5, 3)})
  with pytest.raises(ValueError, match="expected params, found None"):
    tx.update(MLP, state, activity=ALIKE)
  with pytest.raises(ValueError, match="for the layers 'in', 'mid', found none"):
    tx.update(MLP, state, MLP)
  with pytest.raises(ValueError, match="for the layers 'in', 'mid', found 'in'"):
    tx.update(MLP, state, MLP, activity={"in": ALIKE["in"]})
  tx = growth.recycle(mlp, MLP, X, every=1, init=lambda key: {"in": MLP["in"]}).transformation
  with pytest.raises(ValueError, match="init: expected 'bias' of shape .* found no such leaf"):
    tx.update(MLP, tx.init(MLP), MLP, activity=LAZY)


def conv(x, kernel, **kwargs):
  numbers = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), dimension_numbers=numbers, **kwargs)


def convolutions(p, x):
  """Channels that a convolution with a bias reads, and then flattened ones that a product reads."""
  x = conv(jnp.tile(x[:, None, None], (1, 5, 4, 1)), p["one"], padding="VALID")
  x = conv(jnp.tanh(x), p["two"], padding="VALID") + p["bias"].reshape(1, 1, 1, -1)
  return jnp.tanh(x).reshape(len(x), -1) @ p["out"] + p["out_bias"]


def with_biases(p, x):
  """Weights of two axes that are read, a bias in lower precision, one layer that runs twice."""
  x = jnp.tanh(x @ p["in"])
  x = jnp.einsum("nu,uho->nho", x, p["mid"]) + p["mid_bias"].astype(x.dtype)
  x = jnp.tanh(x).reshape(len(x), -1)
  return jnp.tanh(x @ p["up"]) @ p["down"] + p["bias"] + x @ p["skip"]


def stacked_with_biases(p, x):
  def block(x, p):
    return x + (jnp.tanh(x @ p["up"]) @ p["down"] + p["bias"][None]), None

  return jax.lax.scan(block, x, p)[0]


# The function, its parameters, and by weights that read units the bias behind.
TAKERS = {
  "convolutions": (
    convolutions,
    {
      "one": draw(2, 1, 4, 6),
      "two": draw(3, 2, 6, 5, seed=1),
      "bias": draw(5),
      "out": draw(2 * 3 * 5, 3, seed=2),
      "out_bias": draw(3),
    },
    {"two": "bias", "out": "out_bias"},
  ),
  "products": (
    with_biases,
    {
      "in": draw(4, 6),
      "mid": draw(6, 2, 4, seed=1),
      "mid_bias": draw(2, 4).astype(jnp.bfloat16),
      "up": draw(8, 6, seed=2),
      "down": draw(6, 3, seed=3),
      "bias": draw(3),
      "skip": draw(8, 3, seed=4),
    },
    {"mid": "mid_bias", "down": "bias"},
  ),
  "stacked": (
    stacked_with_biases,
    {"up": draw(3, 4, 6), "down": draw(3, 6, 4, seed=1), "bias": draw(3, 4)},
    {"down": "bias"},
  ),
}


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=[pytest.mark.ci] * (name == "convolutions")) for name in TAKERS]
)
def test_biases_take_up_what_replaced_units_gave(name):
  fn, params, takers = TAKERS[name]
  x = jnp.tile(X[:1], (3, 1))  # so every unit is a constant
  with nets.relaxed():
    found = growth.hidden(fn, params, x).layers
    pairs = [(taker.name, taker.bias) for layer in found.values() for taker in layer.takers]
    assert dict(pairs) == {weights: (bias,) for weights, bias in takers.items()}
    outputs = []
    for compensate in (True, False):
      forward, tx = growth.recycle(
        fn, params, x, utility="contribution", rate=0.5, age=0, decay=0.5, compensate=compensate
      )
      _, activity = forward(params, x)
      nothing = jax.tree.map(jnp.zeros_like, params)
      updates, _ = jax.jit(tx.update)(nothing, tx.init(params), params, activity=activity)
      outputs.append(fn(optax.apply_updates(params, updates), x))
    expected = fn(params, x)
  np.testing.assert_allclose(outputs[0], expected, rtol=2e-2 if name == "products" else 1e-4)
  assert jnp.abs(outputs[1] - expected).max() > 0.1


def test_the_mean_that_a_bias_takes_up_decays_as_utility_does():
  def net(p, x):
    return jnp.tanh(x @ p["in"]) @ p["out"] + p["bias"][None]

  params = {"in": draw(4, 6), "out": draw(6, 2, seed=1), "bias": jnp.ones(2)}
  forward, tx = growth.recycle(
    net, params, X, every=2, threshold=9.0, age=1, decay=0.5, compensate=True
  )
  state, nothing = tx.init(params), jax.tree.map(jnp.zeros_like, params)
  for x in (X, X[:2]):
    updates, state = tx.update(nothing, state, params, activity=forward(params, x)[1])
  before, now = (np.tanh(x @ params["in"]).mean(0) for x in (X, X[:2]))
  mean = (0.25 * before + 0.5 * now) / 0.75
  np.testing.assert_allclose(updates["bias"], mean @ params["out"], rtol=1e-5)
  assert state.layers["in"].replaced.all() and not state.layers["in"].means[0].any()


def test_errors_of_compensation():
  with pytest.raises(ValueError, match="a layer which reads one of 'in', 'mid' adds a bias"):
    growth.recycle(mlp, MLP, X, compensate=True)
  fn, params, _ = TAKERS["stacked"]
  tx = growth.recycle(fn, params, X, compensate=True).transformation
  _, activity = growth.recycle(fn, params, X).forward(params, X)
  match = "activity of 'up': expected the means .* of 'down' among them, found none"
  with pytest.raises(ValueError, match=match):
    tx.update(params, tx.init(params), params, activity=activity)
