"""Every transformation that Optax exports, as the inner optimizer, against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax_exports
import oracle
import pytest

import optax_cadence as oc

# Every kind of tensor that an optimizer may see: a vector, a scalar, a matrix and the entries of a
# mask. Both groups have the same shapes, so that the oracle compiles one program.
HALVES = np.random.default_rng(0).permutation(np.repeat([1, 2], 10)).reshape(5, 4)
SMALL = (
  {"bias": oc.channels([1, 2]), "fast": 1, "gain": 2, "kernel": oc.Grid([[1, 2]], (0, 1))}
  | {"mask": HALVES},
  [
    oracle.bands((6,), [1, 2], 0),
    oracle.whole(1),
    oracle.whole(2),
    oracle.rectangles((6, 4), [[1, 2]], (0, 1)),
    oracle.entries(HALVES),
  ],
)


def random_case(rng):
  """Cadences for the leaves drawn at random, and the same by hand."""
  mask = 2 ** (np.arange(20).reshape(5, 4) % 3)
  bands = rng.choice([1, 2, 4], rng.integers(1, 4)).tolist()
  corners = rng.choice([1, 2, 4], (2, 2)).tolist()
  gain, offset = [(1, 0), (2, 1), (4, 3)][rng.integers(3)]
  every = {
    "bias": oc.channels(bands),
    "fast": 1,
    "gain": oc.Every(gain, offset),
    "kernel": oc.quadrants(corners),
    "mask": mask,
  }
  pieces = [
    oracle.bands((6,), bands, 0),
    oracle.whole(1),
    oracle.whole(gain, offset),
    oracle.rectangles((6, 4), corners, (0, 1)),
    oracle.entries(mask),
  ]
  return every, pieces


def begin(name, case):
  """The generator of a case, a cadence of the optimizer, its parameters, oracle and arguments."""
  rng = np.random.default_rng(list(name.encode()))
  every, pieces = case(rng)
  inner = oracle.relaxed(optax_exports.build(name))
  extra = optax_exports.EXTRA_ARGS.get(name, {})
  scalar = (1,) if name in optax_exports.NO_SCALARS else ()
  shapes = {"bias": (6,), "fast": scalar, "gain": scalar, "kernel": (6, 4), "mask": (5, 4)}
  params = {leaf: random(rng, shape) for leaf, shape in shapes.items()}
  slow = oracle.Oracle(inner, list(params.values()), pieces, **extra)
  return rng, oc.cadence(inner, every), params, slow, extra


def follow(name, case, other_ways=()):
  """Two cycles of `update` beside the oracle, and of other ways to the same parameters."""
  rng, tx, params, slow, extra = begin(name, case)
  update = jax.jit(functools.partial(tx.update, **extra))
  others = [make(tx, extra) for make in other_ways]
  state = tx.init(params)
  for t in range(1, 2 * tx.cycle + 1):
    grads = like(rng, params)
    expected = slow.step(list(grads.values()), list(params.values()))
    updates, new_state = update(grads, state, params)
    assert_close(list(updates.values()), expected)
    after = optax.apply_updates(params, updates)
    for other in others:
      found = other(t, params, state, grads)
      if found is not None:
        assert_close(list(found.values()), list(after.values()))
    params, state = after, new_state


def by_apply(tx, extra):
  """The parameters after `apply`."""
  apply = jax.jit(functools.partial(tx.apply, **extra))
  return lambda t, params, state, grads: apply(params, state, grads)[0]


def by_static_phase(tx, extra):
  """The parameters after an `update` that knows while it is traced which regions are due.

  None where neither all regions are due nor as few as can be, since every phase compiles.
  """
  update = jax.jit(functools.partial(tx.update, **extra), static_argnames="phase")

  def after(t, params, state, grads):
    phase = t % tx.cycle
    if phase > 1:
      return None
    return optax.apply_updates(params, update(grads, state, params, phase=phase)[0])

  return after


# The names of Optax themselves warn.
deprecated = pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated")


def contributed_in_ci(names):
  return [
    pytest.param(name, marks=[pytest.mark.ci] * name.startswith("contrib.")) for name in names
  ]


@deprecated
@pytest.mark.parametrize("name", contributed_in_ci(optax_exports.NAMES))
def test_any_inner_optimizer_follows_the_oracle(name):
  follow(name, lambda rng: SMALL)


# Without state, with moments, elementwise or not under a mask, with extra arguments.
FAMILIES = {
  "adafactor",
  "adamw",
  "clip_by_global_norm",
  "contrib.muon",
  "contrib.schedule_free_adamw",
  "contrib.sophia",
  "lamb",
  "lion",
  "sgd",
  "trace",
}


@deprecated
@pytest.mark.parametrize("name", contributed_in_ci(sorted(FAMILIES & set(optax_exports.NAMES))))
def test_every_way_of_any_family_follows_the_oracle(name):
  follow(name, random_case, [by_apply, by_static_phase])


# Each way of each case is a program to compile. What the ways do around an inner optimizer, and not
# in it, is tested with the families; here every optimizer meets regions drawn at random.
@pytest.mark.ci
@deprecated
@pytest.mark.parametrize("name", sorted(set(optax_exports.NAMES) - FAMILIES))
def test_apply_of_any_inner_optimizer_follows_the_oracle(name):
  rng, tx, params, slow, extra = begin(name, random_case)
  apply, state = jax.jit(functools.partial(tx.apply, **extra)), tx.init(params)
  for _ in range(2 * tx.cycle):
    grads = like(rng, params)
    slow.step(list(grads.values()), list(params.values()))
    expected = slow.applied(list(params.values()))
    params, state = apply(params, state, grads)
    assert_close(list(params.values()), expected)


def like(rng, params):
  """Gradients for these parameters."""
  return {leaf: random(rng, x.shape) for leaf, x in params.items()}


def random(rng, shape):
  return jnp.asarray(rng.integers(-8, 9, shape) / 8.0, jnp.float32)


def assert_close(found, expected):
  """Within 2e-6, some 16 units in the last place of float32.

  The two programs fuse differently, so that each of the dozen or so rounded operations of an
  optimizer (moments, their powers, roots, trust ratios) may come out one unit apart.
  """
  for x, y in zip(found, expected, strict=True):
    scale = max(1.0, np.abs(y).max(initial=0.0))
    np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6 * scale)


@pytest.mark.parametrize("search", ["scale_by_backtracking_linesearch", "scale_by_zoom_linesearch"])
def test_line_searches(search):
  """The objective is called on the tree that the inner optimizer sees: here the whole one."""

  def objective(params):
    return jnp.sum((params["x"] - 3.0) ** 2)

  inner = oracle.relaxed(optax.chain(optax.sgd(1.0), getattr(optax, search)(5)))
  tx = oc.cadence(inner, 2)
  params = {"x": jnp.zeros(3)}
  plain, state = inner.init(params), tx.init(params)
  value, grads = jax.value_and_grad(objective)(params)
  extra = {"value": value, "grad": grads, "value_fn": objective}
  expected, plain = inner.update(grads, plain, params, **extra)
  for held in (True, False):
    updates, state = tx.update(grads, state, params, **extra)
    assert held != updates["x"].any()
  assert_close([updates["x"]], [np.asarray(expected["x"])])
