"""What is due, told to the program: `oc.phases`."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx

import optax_cadence as oc

PARAMS = {"a": jnp.ones(2), "b": jnp.ones((2, 2)), "c": jnp.ones(3)}
EVERY = {"a": 8, "b": 4, "c": 1}
CADENCES = {
  "one period": (8, 2),
  "8, 4 and 1": (EVERY, 3),
  "offsets": ({"a": oc.Every(4, offset=1), "b": 2, "c": 3}, 6),
  "rectangles": ({"a": 2, "b": oc.quadrants([[1, 2], [4, 3]]), "c": 1}, 6),
  "always": (1, 1),
}


def transformation(every=EVERY, **options):
  return oc.cadence(oracle.relaxed(optax.adam(0.1)), every, **options)


def grads_of(t):
  rng = np.random.default_rng(t)
  return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS)


@pytest.mark.parametrize(("every", "programs"), CADENCES.values(), ids=CADENCES)
def test_as_many_programs_as_there_are_sets_of_regions_due(every, programs):
  tx, traces = transformation(every), []

  def step(params, state, grads, phase=None):
    traces.append(phase)
    return tx.apply(params, state, grads, phase)

  compiled = jax.jit(step, static_argnames="phase")
  phases = oc.phases(tx, PARAMS)
  assert phases.programs == programs
  fast = slow = PARAMS, tx.init(PARAMS)
  for t, phase in zip(range(1, 26), phases, strict=False):
    fast = compiled(*fast, grads_of(t), phase=phase)
    slow = tx.apply(*slow, grads_of(t))
  assert len(traces) == programs
  for x, y in zip(jax.tree.leaves(fast), jax.tree.leaves(slow), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-6)


def test_a_phase_is_the_int_of_its_micro_step():
  tx = transformation()
  state = tx.init(PARAMS)
  for t, phase in zip(range(1, 20), oc.phases(tx, PARAMS), strict=False):
    by_int = tx.update(grads_of(t), state, PARAMS, phase=t % tx.cycle)
    by_phase = tx.update(grads_of(t), state, PARAMS, phase=phase)
    jax.tree.map(np.testing.assert_array_equal, by_int, by_phase)
    state = by_phase[1]


def resumed(tx, state):
  return [phase.due for phase in itertools.islice(oc.phases(tx, PARAMS, state), 9)]


@pytest.mark.parametrize("done", [0, 3, 8])
def test_a_resumed_run_goes_on_where_it_stands(done):
  tx = oc.chain(optax.clip_by_global_norm(1.0), transformation())
  state = tx.init(PARAMS)
  for t in range(done):
    state = tx.update(grads_of(t), state, PARAMS)[1]
  expected = [phase.due for phase in itertools.islice(oc.phases(tx, PARAMS), done + 9)][done:]
  assert resumed(tx, state) == expected
  flushed = tx.flush(state, PARAMS)[1]
  assert resumed(tx, flushed) == expected
  many = jax.tree.map(lambda x: jnp.stack([x, x]), state)
  assert resumed(tx, many) == expected


def test_of_an_nnx_optimizer():
  model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  tx = transformation({"kernel": oc.Every(3, offset=1), "bias": 2})
  optimizer, params = nnx.Optimizer(model, tx, wrt=nnx.Param), nnx.state(model, nnx.Param)
  assert next(oc.phases(tx, params, optimizer.opt_state)).due == {"3 (offset 1)"}


@pytest.mark.parametrize("phase", [2, oc.Phase(frozenset({"1", "4"}))])
@pytest.mark.parametrize("call", ["update", "apply"])
def test_a_phase_that_contradicts_the_state_is_an_error(call, phase):
  tx = transformation({"a": 2, "b": 4, "c": 1})
  state = tx.init(PARAMS)
  args = (PARAMS, state, PARAMS)
  with pytest.raises(
    ValueError, match=r"micro-step 1, .* where '1' are due, found one where '1', "
  ):
    getattr(tx, call)(*args, phase=phase)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda tx, state: oc.phases(optax.sgd(0.1), PARAMS), "expected a cadence"),
    (lambda tx, state: oc.phases(tx, PARAMS, optax.EmptyState()), "expected a cadence in the"),
    (
      lambda tx, state: oc.phases(transformation(oc.Every(lambda t: 2 + t // 9)), PARAMS),
      "oc.phases needs a static cycle",
    ),
    (
      lambda tx, state: oc.phases(
        tx, PARAMS, [state, state._replace(micro_step=state.micro_step + 2)]
      ),
      r"one micro-step, found \[0, 2\]",
    ),
    (
      lambda tx, state: jax.jit(functools.partial(tx.apply, phase=oc.Phase(frozenset({"9"}))))(
        PARAMS, state, PARAMS
      ),
      "some of the groups '1', '4', '8', found '9'",
    ),
  ],
)
def test_errors(call, message):
  tx = transformation()
  with pytest.raises(ValueError, match=message):
    call(tx, tx.init(PARAMS))


def fired(state):
  return {name: bool(x) for name, x in oc.has_updated(state).items()}


@pytest.mark.parametrize("accumulate", ["mean", "latest"])
@pytest.mark.parametrize("static", [False, True])
def test_has_updated(static, accumulate):
  tx = transformation(accumulate=accumulate)
  state = tx.init(PARAMS)
  assert not any(fired(state).values())
  for t, phase in zip(range(1, 10), oc.phases(tx, PARAMS), strict=False):
    state = tx.update(PARAMS, state, PARAMS, phase=phase if static else None)[1]
    assert fired(state) == {"8": t % 8 == 0, "4": t % 4 == 0, "1": True}


def test_has_updated_is_that_of_multi_steps():
  tx, peer = transformation(3), oracle.relaxed(optax.MultiSteps(optax.sgd(0.1), 3))
  state, peers = tx.init(PARAMS), peer.init(PARAMS)
  for _ in range(7):
    state, peers = tx.update(PARAMS, state, PARAMS)[1], peer.update(PARAMS, peers, PARAMS)[1]
    assert any(fired(state).values()) == bool(peers.mini_step == 0)


def test_has_updated_after_flush_and_with_nothing_in_the_window():
  tx = transformation({"a": 2, "b": 4, "c": 1}, nonfinite="skip")
  state = tx.init(PARAMS)
  bad = PARAMS | {"a": jnp.full(2, jnp.nan)}
  for grads in (bad, bad):
    state = tx.update(grads, state, PARAMS)[1]
  assert fired(state) == {"2": False, "4": False, "1": True}
  assert fired(tx.flush(state, PARAMS)[1]) == {"2": False, "4": True, "1": False}


def test_has_updated_of_a_policy_a_mask_and_a_batch():
  every = {"a": oc.until_certain(1e-6, 2, 4), "b": np.array([[1, 2], [2, 1]]), "c": 3}
  tx = transformation(every)
  state = tx.init(PARAMS)
  for t in range(1, 5):
    state = tx.update(PARAMS, state, PARAMS)[1]
    groups = fired(state)
    assert (groups["1"], groups["2"], groups["3"]) == (True, t % 2 == 0, t % 3 == 0)
    assert int(state.groups["3"].updates) == t // 3
  policy = next(name for name in groups if name not in "123")
  assert groups[policy] == (t % 2 == 0)
  states = jax.vmap(tx.init)(jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS))
  assert all(x.shape == (2,) for x in oc.has_updated(states).values())


def test_has_updated_without_a_cadence():
  with pytest.raises(ValueError, match="expected a cadence in the state, found"):
    oc.has_updated(optax.adam(0.1).init(PARAMS))
