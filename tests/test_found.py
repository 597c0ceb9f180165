"""States whose groups a function of the parameters finds: they need no parameters to match."""

import copy
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import orbax.checkpoint
import pytest
from flax import nnx
from small_tree import assert_close
from small_tree import assert_identical
from small_tree import BATCHES
from small_tree import EVERY
from small_tree import PARAMS
from small_tree import scanned
from states import groups

import optax_cadence as oc
from optax_cadence._state import closed
from optax_cadence._state import opened

MASK = {"body": {"bias": 4, "kernel": 2 ** (np.indices((4, 6)).sum(0) % 3)}, "head": 1}
POLICIES = {"body": oc.until_certain(1.0, 2, 4), "head": oc.as_settled(2, 4)}
SETTINGS = {
  "grid": (EVERY, {}),
  "grid, skip": (EVERY, {"nonfinite": "skip"}),
  "mask": (MASK, {}),
  "mask, latest": (MASK, {"accumulate": "latest"}),
  "policies": (POLICIES, {}),
  "weighted": (EVERY, {"weighted": True}),
}
map_params = optax.tree_utils.tree_map_params


def pair(name, inner=None):
  """The cadence by a function of the parameters, and by the tree that it returns."""
  every, settings = SETTINGS[name]
  inner = oracle.relaxed(optax.adamw(0.1)) if inner is None else inner
  return [oc.cadence(inner, given, **settings) for given in (lambda _: every, every)]


def after(tx, steps=3, params=PARAMS):
  state, extra = tx.init(params), {}
  if oc.describe(tx, PARAMS) and state.groups and any(g.weight is not None for g in groups(state)):
    extra = {"weight": 2.0}
  for grads in BATCHES[:steps]:
    _, state = jax.jit(tx.update)(grads, state, params, **extra)
  return state


def fields(state):
  """What a state holds, whatever tree it is."""
  return state.micro_step, state.groups, state.masks


@pytest.mark.parametrize("name", SETTINGS)
def test_it_holds_what_the_state_of_the_tree_holds(name):
  found, known = map(after, pair(name))
  assert_identical(fields(found), fields(known))
  assert isinstance(found, oc.FoundState) and isinstance(known, oc.CadenceState)


@pytest.mark.parametrize("name", SETTINGS)
def test_tree_map_params_maps_what_follows_the_parameters_alone(name):
  by_function, by_tree = pair(name)
  state = after(by_function)
  other = {"one": jnp.ones(2), "two": jnp.ones(3)}
  oc.cadence(optax.adamw(0.1), lambda p: dict.fromkeys(p, 3)).init(other)
  mapped = map_params(by_function, lambda x: jnp.full_like(x, 7), state)
  expected = map_params(by_tree, lambda x: jnp.full_like(x, 7), after(by_tree))
  assert_identical(fields(mapped), fields(expected))
  assert jax.tree.structure(mapped) == jax.tree.structure(state)
  assert mapped.regions == state.regions
  jax.jit(by_function.flush)(mapped, PARAMS)  # it is a state like any other


def test_a_function_may_return_a_builder():
  builder = oc.by_path({"head": 1, "body": 3})
  by_function, by_builder = [
    oc.cadence(oracle.relaxed(optax.adamw(0.1)), given) for given in (lambda _: builder, builder)
  ]
  assert_identical(fields(after(by_function)), fields(after(by_builder)))
  with pytest.raises(ValueError, match=r"one schedule for the whole tree is Every\(schedule\)"):
    oc.cadence(optax.sgd(0.1), lambda _: lambda t: 1 + t // 2).init(PARAMS)


def test_one_transformation_maps_the_states_of_different_parameters():
  tx = oc.cadence(
    oracle.relaxed(optax.adam(0.1)), lambda params: {k: {"a": 2, "b": 3}[k] for k in params}
  )
  params = {"a": jnp.ones(2), "b": jnp.ones(3)}
  for part in (params, {"a": params["a"]}, {"b": params["b"]}):
    state = tx.init(part)
    mapped = map_params(tx, jnp.ones_like, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert all((x == 1).all() for g in mapped.groups.values() for x in jax.tree.leaves(g[0][0].mu))
  both = optax.partition({"x": tx, "y": tx}, {"a": "x", "b": "y"})
  _, state = both.update(params, both.init(params), params)
  mapped = map_params(both, jnp.zeros_like, state)
  assert jax.tree.structure(mapped) == jax.tree.structure(state)
  sums = [jax.tree.leaves(s.inner_state.groups) for s in mapped.inner_states.values()]
  assert [sum(float(abs(x).sum()) for x in xs if x.ndim) for xs in sums] == [0, 0]


def test_what_follows_no_parameter_is_mapped_together():
  tx = pair("grid")[0]
  state, calls = after(tx), []

  def doubled(part):
    calls.append(part)
    return jax.tree.map(lambda x: 2 * x, part)

  mapped = map_params(tx, lambda x: x, state, transform_non_params=doubled)
  assert len(calls) == 2 and int(mapped.micro_step) == 6
  for new, old in zip(groups(mapped), groups(state), strict=True):
    assert int(new.updates) == 2 * int(old.updates)
    assert_identical(new.accumulators, old.accumulators)
  # What is one value for all makes a prefix of the state, as `jax.jit` takes it.
  marked = map_params(tx, lambda _: "p", state, transform_non_params=lambda _: "n")
  assert {*jax.tree.leaves(marked.like_parameters)} == {"p"}
  prefixed = jax.tree.map(lambda mark, _: mark, marked, state)
  assert {*jax.tree.leaves(prefixed)} == {"p", "n"}
  # One number at a time it cannot be, as nobody knows how many there are.
  for function in (lambda x: x + 1, jnp.zeros_like):
    with pytest.raises(TypeError):
      map_params(tx, lambda x: x, state, transform_non_params=function)


def test_trees_of_the_parameters_need_the_tree_of_cadences():
  by_function = pair("grid")[0]
  specs = jax.tree.map(lambda _: "spec", PARAMS)
  with pytest.raises(ValueError, match="tuple"):
    map_params(by_function, lambda _, spec: spec, after(by_function), specs)


def test_an_inner_optimizer_that_cannot_be_mapped_is_trained_as_ever():
  def init(params):
    return {"first": jnp.zeros_like(jax.tree.leaves(params)[0])}

  update = lambda grads, state, params=None: (grads, state)
  tx = oc.cadence(optax.GradientTransformation(init, update), lambda _: 2)
  assert type(tx.init(PARAMS)) is oc.CadenceState
  after(tx)


def test_one_inside_another():
  outer, inner = {"body": 2, "head": 1}, {"body": {"bias": 1, "kernel": 2}, "head": 2}
  nested = lambda of: oc.cadence(oc.cadence(oracle.relaxed(optax.adam(0.1)), of(inner)), of(outer))
  by_function, by_tree = nested(lambda every: lambda _: every), nested(lambda every: every)
  # The cadence inside sees a part of the tree, so that its cadences are a function of that.
  by_part = oc.cadence(
    oc.cadence(oracle.relaxed(optax.adam(0.1)), lambda tree: inner), lambda _: outer
  )
  found, known = after(by_function), after(by_tree)
  assert_identical(after(by_part), found)
  flat = lambda state: [np.asarray(x).tolist() for x in jax.tree.leaves(fields(opened(state)))]
  assert flat(found) == flat(known)
  mapped = map_params(by_function, lambda x: jnp.full_like(x, 7), found)
  assert jax.tree.structure(mapped) == jax.tree.structure(found)
  assert flat(mapped) == flat(map_params(by_tree, lambda x: jnp.full_like(x, 7), known))
  assert_identical(closed(opened(found), found), found)


@pytest.mark.parametrize("every", [lambda _: 2, 2], ids=["function", "tree"])
def test_what_is_set_in_its_hyperparameters_is_set(every):
  tx = oc.cadence(optax.inject_hyperparams(optax.sgd)(learning_rate=1.0), every)
  _, state = tx.update(BATCHES[0], tx.init(PARAMS), PARAMS)
  state.groups["2"].inner_state.hyperparams["learning_rate"] = jnp.float32(0.25)
  updates, _ = jax.jit(tx.update)(BATCHES[1], state, PARAMS)
  expected = jax.tree.map(lambda a, b: -0.25 * (a + b) / 2, *BATCHES[:2])
  assert_close(updates, expected)


def test_a_moment_that_tree_set_puts_in_its_place_is_refused():
  tx = oc.cadence(optax.adam(0.1), lambda _: 2)
  state = tx.init(PARAMS)
  assert "FoundState.groups" in repr(optax.tree_utils.tree_get(state, "mu"))
  broken = optax.tree_utils.tree_set(state, mu=PARAMS)
  with pytest.raises(ValueError, match="no moments"):
    tx.update(BATCHES[0], broken, PARAMS)


@pytest.mark.parametrize("name", ["grid", "mask", "policies"])
def test_transformations_of_jax(name):
  by_function, by_tree = pair(name)
  assert_identical(scanned(by_function), scanned(by_tree))
  shapes = jax.eval_shape(by_function.init, PARAMS)
  state = by_function.init(PARAMS)
  assert jax.tree.structure(shapes) == jax.tree.structure(state)
  donated = jax.jit(by_function.apply, donate_argnums=(0, 1))
  _, state = donated(*jax.tree.map(jnp.array, (PARAMS, state)), BATCHES[0])
  assert jax.tree.structure(state) == jax.tree.structure(shapes)
  several = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
  states = jax.vmap(by_function.init)(several)
  _, states = jax.vmap(by_function.apply, in_axes=(0, jax.tree.map(lambda _: 0, states), 0))(
    several, states, several
  )
  assert states.micro_step.tolist() == [1, 1]


@pytest.mark.parametrize("name", ["grid", "mask", "policies"])
def test_copies_and_files(name, tmp_path):
  tx = pair(name)[0]
  state, fresh = after(tx), tx.init(PARAMS)
  loaded = [
    copy.deepcopy(state),
    pickle.loads(pickle.dumps(state)),
    flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state)),
  ]
  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", state)
    checkpointer.wait_until_finished()
    loaded.append(checkpointer.restore(tmp_path / "state", fresh))
  for other in loaded:
    assert_identical(other, state)
    assert_identical(
      jax.jit(tx.update)(BATCHES[3], other, PARAMS), jax.jit(tx.update)(BATCHES[3], state, PARAMS)
    )


def test_the_readers_of_states_take_it():
  by_function, by_tree = pair("grid", oracle.relaxed(optax.inject_hyperparams(optax.adamw)(0.1)))
  found, known = after(by_function), after(by_tree)
  assert_identical(oc.metrics(found), oc.metrics(known))
  assert_identical(oc.has_updated(found), oc.has_updated(known))
  set_both = [optax.tree_utils.tree_set(s, learning_rate=jnp.float32(3.0)) for s in (found, known)]
  assert_identical(*map(fields, set_both))
  assert_identical(
    optax.tree_utils.tree_get_all_with_path(set_both[0], "learning_rate")[0][1], jnp.float32(3.0)
  )
  converted = oc.convert(found, by_function, PARAMS, to=by_tree)
  assert_identical(converted, known)
  assert_identical(oc.convert(known, by_tree, PARAMS, to=by_function), found)


def test_in_an_nnx_optimizer():
  results = []
  for every in (lambda params: {"kernel": 2, "bias": 1}, {"kernel": 2, "bias": 1}):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = oc.cadence(oracle.relaxed(optax.adamw(0.1)), every)
    optimizer = oc.nnx.Optimizer(model, tx)

    @nnx.jit
    def step(model, optimizer):
      loss = lambda model: (model(jnp.ones((4, 3))) ** 2).sum()
      optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(3):
      step(model, optimizer)
    updates, _ = tx.flush(optimizer.opt_state, nnx.state(model, nnx.Param))
    results.append((nnx.state(model, nnx.Param), updates, oc.metrics(optimizer.opt_state)))
  assert_identical(*results)


EACH = {"a": 2, "b": 3, "alpha": 1}


def test_what_has_grown_is_carried():
  growth = oc.growth
  params = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 4))}
  plan = growth.widening(params, growth.dimension(params, {"a": -1, "b": 0}), by=1)
  grown = plan.apply(params, lambda path, shape, dtype: jnp.ones(shape, dtype))
  states = []
  for every in (
    lambda params: {k: EACH[k] for k in params},
    oc.by_path({"a": 2, "b": 3}, default=1),
  ):
    tx = oc.cadence(oracle.relaxed(optax.adam(0.1)), every, nonfinite="skip")
    _, state = tx.update(params, tx.init(params), params)
    states.append(growth.grow_state(tx, state, params, grown, plan))
    tx.update(grown, states[-1], grown)
  assert_identical(*map(fields, states))
  assert isinstance(states[0], oc.FoundState)
