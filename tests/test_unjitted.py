"""Outside of a program nothing is compiled or traced anew, once it has run."""

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import optax_cadence as oc

pytestmark = pytest.mark.ci

PARAMS = {"b": jnp.ones(6), "k": jnp.ones((8, 6))}
ADAM = oracle.relaxed(optax.adam(0.1))
GRID = {"b": 2, "k": oc.quadrants([[1, 2], [2, 4]])}
MASK = np.random.default_rng(1).choice([1, 2, 4], (8, 6))
TRANSFORMATIONS = {
  "period": oc.cadence(ADAM, 2),
  "always": oc.cadence(ADAM, 1),
  "rectangles": oc.cadence(ADAM, GRID),
  "bands": oc.cadence(ADAM, {"b": 2, "k": oc.channels([1, 2, 1, 4])}),
  "skip": oc.cadence(ADAM, GRID, nonfinite="skip"),
  "schedule": oc.cadence(ADAM, oc.Every(lambda t: 1 + t // 4)),
  "certain": oc.cadence(ADAM, oc.until_certain(1.0, 2, 4)),
  "settled": oc.cadence(ADAM, oc.as_settled(2, 4)),
  "mask": oc.cadence(ADAM, {"b": 2, "k": MASK}),
  "mask, skipped": oc.cadence(ADAM, {"b": 2, "k": MASK}, nonfinite="skip"),
  "latest": oc.cadence(ADAM, 2, accumulate="latest"),
  "pruned": oc.prune(0.5, every=2, inner=ADAM),
  "pruned in chain": optax.chain(ADAM, oc.prune(0.5, every=2)),
}


COMPILED = []


def listen(event, duration, **_):
  if "backend_compile" in event:
    COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(listen)


def steps(tx, n, state=None):
  state = tx.init(PARAMS) if state is None else state
  params, rng = PARAMS, np.random.default_rng(0)
  for _ in range(n):
    grads = {k: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for k, x in params.items()}
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


@pytest.mark.parametrize("tx", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_a_warm_update_compiles_nothing(tx):
  steps(tx, 9)
  before = len(COMPILED)
  steps(tx, 9)
  assert len(COMPILED) == before
  jax.jit(lambda x: x * 3.25)(jnp.ones(7))
  assert len(COMPILED) > before  # it listens


@pytest.mark.parametrize("tx", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_it_does_what_a_program_does(tx):
  compiled = optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))
  results = []
  for t, flush in ((tx, getattr(tx, "flush", None)), (compiled, None)):
    params, state = steps(t, 9)
    flush = flush or (jax.jit(tx.flush) if hasattr(tx, "flush") else None)
    results.append((params, flush(state, params)[0] if flush else None))
  for x, y in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6)
