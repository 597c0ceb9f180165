"""What a shock leaves behind, and what the optimizer then still knows."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import optax_cadence as oc
from optax_cadence import pruning

pytestmark = pytest.mark.ci

ADAM = oracle.relaxed(optax.adam(0.1))


def weights():
  rng = np.random.default_rng(0)
  draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
  return {"a": {"kernel": 3 + draw(16, 8), "bias": jnp.zeros(8)}, "b": {"kernel": draw(7, 5)}}


def gradients(t):
  return jax.tree.map(lambda x: jnp.cos(t + x), weights())


def run(tx, steps, params=None):
  """Parameters and state before and after the last of some micro-steps."""
  params = weights() if params is None else params
  state, update = tx.init(params), jax.jit(tx.update)
  for t in range(1, steps + 1):
    before = params, state
    updates, state = update(gradients(t), state, params)
    params = optax.apply_updates(params, updates)
  return before, (params, state)


def ones(key, shape, dtype):
  del key
  return jnp.ones(shape, dtype)


def kernel(params):
  return np.asarray(params["a"]["kernel"])


@pytest.mark.parametrize(
  ("fill", "expected"),
  [
    ("zero", lambda x: 0 * x),
    (pruning.Fill(0.25, 0.0), lambda x: 0.25 * x),
    (pruning.Fill(0.0, 1.0, initializer=ones), lambda x: 0 * x + 1),
    (pruning.Fill(0.5, 2.0, initializer={"a": ones, "b": ones}), lambda x: 0.5 * x + 2),
  ],
)
@pytest.mark.parametrize("inner", [None, ADAM])
def test_what_is_hit_is_filled_and_the_rest_is_trained(fill, expected, inner):
  shock = {"every": 3, "hold": False, "fill": fill, "criterion": pruning.random(0)}
  plain = run(ADAM, 3)
  if inner is None:
    (before, _), (after, _) = run(optax.chain(ADAM, oc.prune(0.5, **shock)), 3)
  else:
    (before, _), (after, _) = run(oc.prune(0.5, inner=inner, **shock), 3)
  jax.tree.map(np.testing.assert_array_equal, before, plain[0][0])
  trained, hit = kernel(plain[1][0]), kernel(after) != kernel(plain[1][0])
  assert hit.sum() == 64
  np.testing.assert_allclose(kernel(after)[hit], expected(kernel(before))[hit], rtol=1e-5)
  np.testing.assert_array_equal(kernel(after)[~hit], trained[~hit])


def test_without_an_initializer_fresh_weights_are_as_the_first_ones_were():
  params = {
    "kernel": 5 + 0.1 * jax.random.normal(jax.random.key(0), (64, 64)),
    "bias": jnp.ones(64),
  }
  tx = pruning.reset(lambda path, x: True, every=1)
  drawn, state = [], tx.init(params)
  for _ in range(2):
    far = jax.tree.map(lambda x: 100 * x, params)
    updates, state = tx.update(far, state, far)
    drawn.append(optax.apply_updates(far, updates))
  for fresh in drawn:
    assert float(fresh["kernel"].mean()) == pytest.approx(5, abs=0.01)
    assert float(fresh["kernel"].std()) == pytest.approx(0.1, rel=0.05)
    # What was one number is that number again.
    np.testing.assert_allclose(fresh["bias"], 1, rtol=1e-5)
  assert abs(np.corrcoef(drawn[0]["kernel"].ravel(), drawn[1]["kernel"].ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("seed", [3, jax.random.key(3), jax.random.key(3, impl="rbg")])
def test_draws_follow_the_key_in_the_state(seed):
  tx = pruning.reset(lambda path, x: x.ndim > 1, every=1, fill=pruning.Fill(0.0, 1.0, key=seed))
  params = weights()
  state, update = tx.init(params), jax.jit(tx.update)
  again, _ = update(params, tx.init(params), params)
  first, _ = update(params, state, params)
  other = state._replace(fill=state.fill._replace(key=state.fill.key + 1))
  second, _ = update(params, other, params)
  np.testing.assert_array_equal(kernel(first), kernel(again))
  assert (kernel(first) != kernel(second)).mean() > 0.9
  # Two leaves of a shape are drawn apart.
  twins = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.arange(12.0).reshape(3, 4)}
  updates, _ = tx.update(twins, tx.init(twins), twins)
  assert (np.asarray(updates["a"]) != np.asarray(updates["b"])).all()


HEAD = lambda path, _: path.startswith("a/")


def moments(state):
  return np.asarray(state.mu["a"]["kernel"]), np.asarray(state.mu["b"]["kernel"])


@pytest.mark.parametrize("restart", [None, False])
def test_moments_of_what_was_filled_start_anew_or_are_kept(restart):
  options = {"every": 3, "hold": False, "fill": "init", "criterion": pruning.random(0)}
  _, (plain, known) = run(ADAM, 3)
  _, (after, state) = run(oc.prune(0.5, inner=ADAM, restart=restart, **options), 3)
  hit = kernel(after) != kernel(plain)
  found, expected = moments(state.inner_state[0])[0], moments(known[0])[0]
  assert hit.sum() == 64 and (expected != 0).all()
  if restart is None:
    expected = np.where(hit, 0, expected)
  np.testing.assert_array_equal(found, expected)
  # Some weights of every leaf are as they were, and so the counter serves them on.
  assert int(state.inner_state[0].count) == 3


LABELS = {"a": {"kernel": "a", "bias": "a"}, "b": {"kernel": "b"}}
COUNTERS = {
  "adam": (ADAM, lambda state: [state[0].count]),
  "partition": (
    optax.partition({"a": ADAM, "b": ADAM}, LABELS),
    lambda state: [state.inner_states[k].inner_state[0].count for k in "ab"],
  ),
  "multi_steps": (
    oracle.relaxed(optax.MultiSteps(ADAM, 8).gradient_transformation()),
    lambda state: [state.mini_step],
  ),
}


@pytest.mark.parametrize(
  ("name", "one_leaf", "all_leaves"),
  [("adam", [3], [0]), ("partition", [0, 3], [0, 0]), ("multi_steps", [3], [0])],
)
def test_a_counter_starts_anew_with_the_weights_beside_it(name, one_leaf, all_leaves):
  inner, counters = COUNTERS[name]
  for where, expected in ((HEAD, one_leaf), (lambda path, _: True, all_leaves)):
    _, (_, state) = run(pruning.reset(where, 3, inner=inner), 3)
    assert [int(x) for x in counters(state.inner_state)] == expected


def test_the_counter_of_a_schedule_stays():
  scheduled = optax.chain(
    optax.scale_by_adam(), optax.scale_by_schedule(optax.constant_schedule(-0.1))
  )
  tx = pruning.shrink_and_perturb(0.4, 0.1, every=3, inner=oracle.relaxed(scheduled))
  _, (_, state) = run(tx, 3)
  adam, schedule = state.inner_state
  assert int(adam.count) == 0 and int(schedule.count) == 3


CUT = {"a": {"kernel": oc.quadrants([[1, 2], [4, 4]]), "bias": 4}, "b": 4}


def test_windows_of_what_was_filled_are_empty_in_a_cadence_inside():
  inner = oc.cadence(ADAM, CUT)
  _, (_, plain) = run(inner, 3)
  _, (_, state) = run(pruning.reset(HEAD, 3, inner=inner), 3)
  for name, group in state.inner_state.groups.items():
    known = plain.groups[name]
    assert int(group.updates) == int(known.updates)
    assert group.remaining is None or int(group.remaining) == int(known.remaining)
  one, two, four = (state.inner_state.groups[k] for k in "124")
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(one.inner_state[0].mu["a"]))
  assert int(one.inner_state[0].count) == int(two.inner_state[0].count) == 0
  assert int(two.window) == 0 and int(plain.groups["2"].window) == 1
  # The last group trains `b` too, whose window goes on.
  assert int(four.window) == 3
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(four.accumulators["a"]))
  np.testing.assert_array_equal(
    four.accumulators["b"]["kernel"], plain.groups["4"].accumulators["b"]["kernel"]
  )


@pytest.mark.parametrize(
  "around",
  [
    lambda inner: oc.chain(optax.clip(10.0), oc.cadence(inner, {"a": 2, "b": 4})),
    lambda inner: optax.chain(optax.clip(10.0), oc.cadence(inner, {"a": 2, "b": 4})),
  ],
)
def test_windows_are_emptied_within_a_chain(around):
  _, (_, state) = run(pruning.reset(HEAD, 3, inner=around(ADAM)), 3)
  groups = state.inner_state[1].groups
  assert int(groups["2"].window) == 0 and int(groups["4"].window) == 3
  assert int(groups["2"].remaining) == 1
  assert not np.asarray(groups["2"].accumulators["a"]["kernel"]).any()
  assert np.asarray(groups["4"].accumulators["b"]["kernel"]).all()


def test_a_region_alone_is_emptied_where_windows_are_its_own():
  inner = oc.cadence(ADAM, 4, nonfinite="skip")
  _, (_, state) = run(pruning.reset(HEAD, 3, inner=inner), 3)
  assert state.inner_state.groups["4"].window.tolist() == [0, 0, 3]


def test_a_random_mask_inside_is_an_error_that_says_what_to_do():
  mask = np.random.default_rng(0).choice([1, 2], (16, 8))
  inner = oc.cadence(ADAM, {"a": {"kernel": mask, "bias": 1}, "b": 1})
  with pytest.raises(ValueError, match="a/kernel.*restart=False"):
    run(pruning.reset(HEAD, 3, inner=inner), 1)
  before, (after, _) = run(pruning.reset(HEAD, 3, inner=inner, restart=False), 3)
  assert (kernel(before[0]) != kernel(after)).all()


def test_a_shock_inside_a_cadence_hits_regions():
  fill = pruning.Fill(0.0, 1.0, initializer=ones)
  shock = oc.prune(1.0, every=2, hold=False, fill=fill, where=lambda p, x: True, inner=ADAM)
  _, (after, _) = run(
    oc.cadence(shock, {"a": {"kernel": oc.channels([1, 4]), "bias": 4}, "b": 4}), 2
  )
  # The half with period 1 has had two updates, the other half none.
  np.testing.assert_allclose(kernel(after)[:, :4], 1, rtol=1e-5)
  np.testing.assert_array_equal(kernel(after)[:, 4:], kernel(weights())[:, 4:])


def test_a_scan_and_a_batch_of_keys_equal_single_steps():
  tx = optax.chain(ADAM, pruning.shrink_and_perturb(0.5, 0.5, every=2))
  grads = jax.tree.map(lambda *x: jnp.stack(x), *map(gradients, range(1, 5)))

  def final(key):
    adam, shock = tx.init(weights())
    shock = shock._replace(fill=shock.fill._replace(key=key))

    def body(carry, grads):
      updates, state = tx.update(grads, carry[1], carry[0])
      return (optax.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(body, (weights(), (adam, shock)), grads)[0][0]

  default = tx.init(weights())[1].fill.key
  keys = jnp.stack([default, default + 1])
  batch = jax.jit(jax.vmap(final))(keys)
  _, (alone, _) = run(tx, 4)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x[0], y, rtol=1e-5, atol=1e-6), batch, alone)
  assert (np.asarray(batch["a"]["kernel"][0]) != np.asarray(batch["a"]["kernel"][1])).all()


def test_shrink_and_perturb_reaches_all_leaves_and_reset_those_that_are_named():
  before, (after, _) = run(
    optax.chain(ADAM, pruning.shrink_and_perturb(0.4, 0.1, initializer=ones, every=3)), 3
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(y, 0.4 * x + 0.1, rtol=1e-5), before[0], after
  )
  _, (plain, _) = run(ADAM, 3)
  _, (after, _) = run(optax.chain(ADAM, pruning.reset(HEAD, pruning.once(3), fill="zero")), 3)
  assert not kernel(after).any() and not np.asarray(after["a"]["bias"]).any()
  np.testing.assert_array_equal(after["b"]["kernel"], plain["b"]["kernel"])


@pytest.mark.parametrize("fill", ["init", "zero"])
def test_tree_map_params_maps_what_follows_the_parameters_and_nothing_else(fill):
  tx = oc.prune(0.5, every=2, hold=False, fill=fill, inner=ADAM)
  state = tx.init(weights())
  found = optax.tree_utils.tree_map_params(
    tx, lambda x: "parameter", state, transform_non_params=lambda x: "other"
  )
  assert found.inner_state[0].mu["a"]["kernel"] == "parameter"
  assert found.step == "other" and found.fill == (("other",) * 3 if fill == "init" else ())


@pytest.mark.parametrize("fill", ["init", pruning.Fill(0.0, 1.0, initializer=ones)])
def test_a_shock_waits_in_a_region_whose_gradients_are_left_out(fill):
  shock = pruning.reset(lambda path, _: True, every=1, fill=fill, inner=ADAM)
  tx, params = oc.cadence(shock, 2, nonfinite="skip"), weights()
  state, update = tx.init(params), jax.jit(tx.update)
  grads = gradients(1)
  grads["a"]["kernel"] = jnp.full_like(grads["a"]["kernel"], jnp.nan)
  for _ in range(2):
    updates, state = update(grads, state, params)
  assert not kernel(updates).any() and np.asarray(updates["b"]["kernel"]).all()


@pytest.mark.parametrize(
  ("make", "match"),
  [
    (lambda: pruning.Fill(np.nan, 1.0), "fill: expected a finite number as keep, found nan"),
    (lambda: pruning.Fill(0.4, "1"), "fill: expected a finite number as fresh, found '1'"),
    (
      lambda: pruning.reset(
        lambda p, x: True, 2, fill=pruning.Fill(0.0, 1.0, initializer={"a": ones})
      ).init(weights()),
      "initializer of 'b/kernel': expected a function .* found 'none'",
    ),
    (
      lambda: run(
        pruning.reset(
          HEAD, 1, fill=pruning.Fill(0.0, 1.0, initializer=lambda k, s, d: jnp.ones(3))
        ),
        1,
      ),
      r"initializer of 'a/bias': expected shape \(8,\), found \(3,\)",
    ),
  ],
)
def test_bad_fills_are_errors_that_name_what_is_wrong(make, match):
  with pytest.raises(ValueError, match=match):
    make()


def network():
  """A layer of 16 units behind a ReLU without biases, whose targets are those of another one."""
  keys = jax.random.split(jax.random.key(0), 5)
  draw = lambda key, *s: jax.random.normal(key, s) / s[0] ** 0.5
  params = {"hidden": {"kernel": draw(keys[0], 8, 16)}, "output": {"kernel": draw(keys[1], 16, 4)}}
  x = jax.random.normal(keys[2], (64, 8))
  targets = jax.nn.relu(x @ draw(keys[3], 8, 16)) @ draw(keys[4], 16, 4)
  hidden = lambda params: jax.nn.relu(x @ params["hidden"]["kernel"])
  loss = lambda params: jnp.mean((hidden(params) @ params["output"]["kernel"] - targets) ** 2)
  return params, hidden, loss


@pytest.fixture(scope="module")
def after_a_shock():
  """Training after a shock to half of the channels: by fill, dead channels and the last loss."""
  params, hidden, loss = network()
  found = {}
  for fill in ("zero", "init", "shrink"):
    tx = oc.prune(
      0.5,
      every=pruning.once(20),
      structure=pruning.Channel(axis=-1),
      criterion=pruning.random(0),
      hold=False,
      fill=fill,
      where=lambda path, _: path.startswith("hidden"),
      inner=oracle.relaxed(optax.adam(0.01)),
    )

    def step(carry, _, tx=tx):
      params, state = carry
      updates, state = tx.update(jax.grad(loss)(params), state, params)
      return (optax.apply_updates(params, updates), state), loss(params)

    train = jax.jit(
      lambda params, tx=tx, f=step: jax.lax.scan(f, (params, tx.init(params)), length=600)
    )
    (after, _), losses = train(params)
    dead = int((~hidden(after).any(0)).sum())
    found[fill] = dead, [float(losses[t]) for t in (19, 20, -1)]
  return found


def test_channels_of_zeros_behind_a_relu_are_dead(after_a_shock):
  dead, (_, _, end) = after_a_shock["zero"]
  assert dead == 8
  assert end > 2 * max(after_a_shock[fill][1][2] for fill in ("init", "shrink"))


@pytest.mark.parametrize("fill", ["init", "shrink"])
def test_a_shock_of_channels_recovers(after_a_shock, fill):
  dead, (before, shocked, end) = after_a_shock[fill]
  assert dead == 0
  assert shocked > before > 2 * end


def test_the_table_of_the_page_is_that_of_the_file_and_says_what_the_page_says():
  docs = pathlib.Path(__file__).parents[1] / "docs"
  rows = json.loads((docs / "fills.json").read_text(encoding="utf-8"))
  page = (docs / "pruning.md").read_text(encoding="utf-8")
  table = re.search(r"<!-- fills -->\n(.*?)<!-- end fills -->", page, re.DOTALL)[1]
  found = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
  assert found[0] == list(rows[0])
  assert found[2:] == [list(map(str, row.values())) for row in rows]
  changes = {row["a shock leaves"]: (row["change"], row["± (95 %)"]) for row in rows}
  for name in ("no shock", "zero"):
    change, half = changes[name]
    assert change + half < 0
  for name in ("init", "shrink"):
    change, half = changes[name]
    assert change - half < 0 < change + half


PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "pruning.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| (.+?) \| `((?:oc|pruning)\..+)` \|$", PAGE, re.MULTILINE))


def row(name):
  """The program in a row of "How to choose"."""
  names = {"oc": oc, "pruning": pruning, "adam": ADAM, "head": HEAD}
  return eval(ROWS[name], names | {"epoch": 3, "step": 3, "end": 100})


def test_row_of_a_network_that_is_sparse_from_the_first_step_on():
  tx = row("a sparse network from the first step on")
  state, update, exchanged = tx.init(weights()), jax.jit(tx.update), 0
  params = pruning.masked(weights(), state)
  for t in range(1, 8):
    masks = np.asarray(pruning.masks(params, state)["a"]["kernel"])
    assert masks.sum() == 13 and not kernel(params)[~masks].any()
    updates, state = update(gradients(t), state, params)
    params = optax.apply_updates(params, updates)
    exchanged += (masks != np.asarray(pruning.masks(params, state)["a"]["kernel"])).any()
  assert exchanged == 2


def test_row_of_weights_that_may_come_back_at_any_time():
  tx = optax.chain(ADAM, row("weights that may come back at any time"))
  ways = np.random.default_rng(1).choice([-1.0, 1.0], (16, 8))
  grads = jax.tree.map(jnp.ones_like, weights())
  grads["a"]["kernel"] = jnp.asarray(ways, jnp.float32)
  params, state, update, masks = weights(), tx.init(weights()), jax.jit(tx.update), []
  for _ in range(12):
    masks.append(np.asarray(pruning.masks(params, state)["a"]["kernel"]))
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
  assert {int(mask.sum()) for mask in masks} == {13}
  assert (masks[-1] & ~masks[0]).any() and (kernel(params) != 0).all()


def test_row_of_a_shock_after_which_weights_come_back():
  tx = optax.chain(ADAM, row("a shock, after which weights come back"))
  _, (after, _) = run(tx, 3)
  assert int((kernel(after) == 0).sum()) == round(0.9 * 128)
  _, (after, _) = run(tx, 4)
  assert (kernel(after) != 0).all()


def test_row_of_a_shock_of_channels_which_recover():
  tx = row("a shock of channels, which recover")
  _, (after, _) = run(tx, 3)
  _, (plain, _) = run(ADAM, 3)
  hit = (kernel(after) != kernel(plain)).all(0)
  assert hit.sum() == 4 and (kernel(after)[:, hit] != 0).all()
  np.testing.assert_array_equal(kernel(after)[:, ~hit], kernel(plain)[:, ~hit])


def test_row_of_a_last_layer_that_begins_anew():
  _, (after, state) = run(row("a last layer that begins anew"), 3)
  _, (plain, _) = run(ADAM, 3)
  assert (kernel(after) != kernel(plain)).all() and not np.asarray(after["a"]["bias"]).any()
  np.testing.assert_array_equal(after["b"]["kernel"], plain["b"]["kernel"])
  assert not moments(state.inner_state[0])[0].any() and moments(state.inner_state[0])[1].all()


def test_row_of_a_network_that_goes_on_learning_new_tasks():
  (before, _), (after, state) = run(row("a network that goes on learning new tasks"), 3)
  rest = kernel(after) - 0.4 * kernel(before)
  first = kernel(weights())
  # What is added is a tenth of weights as they are first drawn.
  assert abs(rest.mean() - 0.1 * first.mean()) < 0.03 and 0.07 < rest.std() / first.std() < 0.13
  assert int(state.inner_state[0].count) == 0
