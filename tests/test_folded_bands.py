"""Bands of an axis as tensors in which it is split: where, and that nobody can tell."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from states import groups

import optax_cadence as oc
from optax_cadence.entrywise import proof
from optax_cadence.programs import reading

SHAPES = {"bias": (3,), "first": (128, 3), "last": (3, 128), "other": (2, 3, 64, 2)}
BANDS = [1, 2, 1, 4]
EVERY = {
  "bias": 2,
  "first": oc.channels(BANDS, axis=0),
  "last": oc.channels([1, 4, 2, 4]),
  "other": oc.channels([2, 1, 2, 1], axis=2),
}
PIECES = [
  oracle.whole(2),
  oracle.bands((128, 3), BANDS, 0),
  oracle.bands((3, 128), [1, 4, 2, 4], 1),
  oracle.bands((2, 3, 64, 2), [2, 1, 2, 1], 2),
]


def random(rng, dtype=jnp.float32):
  """A tree of dyadic numbers, whose sums are exact in any order."""
  return {k: jnp.asarray(rng.integers(-8, 9, s) / 8.0, dtype) for k, s in SHAPES.items()}


def cadence(inner, every=None, **options):
  return oc.cadence(oracle.relaxed(inner), EVERY if every is None else every, **options)


def ranks(state, name):
  """Ranks of the accumulators of a leaf."""
  found = (group.accumulators for group in groups(state) if group.accumulators is not None)
  return {x.ndim for tree in found for x in jax.tree.leaves(tree[name])}


def assert_close(found, expected):
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6)


SPLIT = {
  "adamw": optax.adamw(optax.cosine_decay_schedule(0.1, 20)),
  "sgd": optax.chain(optax.clip(0.5), optax.sgd(0.1, momentum=0.9)),
  "matrices decay": optax.adamw(0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
}
JOINED = {
  "norm of each": optax.lamb(0.1),
  "norm of all": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
  "matrices of rank two decay": optax.adamw(
    0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim == 2, p)
  ),
  "a rate that goes by the shape": optax.stateless(
    lambda u, params: jax.tree.map(lambda x: x / x.shape[-1] if x.ndim else x, u)
  ),
}


@pytest.mark.parametrize("inner", SPLIT.values(), ids=SPLIT)
def test_updates_of_folded_bands_follow_the_oracle(inner):
  follow(inner)


@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}], ids=["propagate", "skip"])
@pytest.mark.parametrize("inner", SPLIT.values(), ids=SPLIT)
@pytest.mark.ci
def test_every_way_with_folded_bands_follows_the_oracle(inner, options):
  follow(inner, ("apply", "static apply"), **options)


@pytest.mark.ci
def test_skipping_and_static_phases_with_folded_bands_follow_the_oracle():
  follow(SPLIT["sgd"], ("static apply",), nonfinite="skip")


def follow(inner, other_ways=(), **options):
  """Six micro-steps of `update` and a flush beside the oracle, and of other ways beside those."""
  rng, tx = np.random.default_rng(0), cadence(inner, **options)
  params = random(rng)
  slow = oracle.Oracle(oracle.relaxed(inner), list(params.values()), PIECES)
  state, update = tx.init(params), jax.jit(tx.update)
  others = {way: jax.jit(tx.apply, static_argnames="phase") for way in other_ways}
  assert ranks(state, "last") == {2, 3} and ranks(state, "other") == {5}
  for t in range(1, 7):
    grads = random(rng)
    expected = slow.step(list(grads.values()), list(params.values()))
    updates, new = update(grads, state, params)
    after = optax.apply_updates(params, updates)
    assert_close(list(updates.values()), expected)
    for way, apply in others.items():
      phase = t % 4 if way.startswith("static") else None
      assert_close(apply(params, state, grads, phase=phase)[0], after)
    params, state = after, new
  if options or other_ways:
    updates, _ = jax.jit(tx.flush)(state, params)
    assert_close(list(updates.values()), slow.flush(list(params.values())))


@pytest.mark.parametrize("inner", JOINED.values(), ids=JOINED)
def test_bands_are_joined_where_a_shape_makes_a_difference(inner):
  assert ranks(cadence(inner).init(random(np.random.default_rng(0))), "last") == {2}


def test_bands_are_joined_where_that_is_as_fast():
  state = cadence(optax.adam(0.1)).init(random(np.random.default_rng(0)))
  assert ranks(state, "first") == {2}
  narrow = cadence(optax.adam(0.1), {"w": oc.channels([2, 4] * 8)})
  assert ranks(narrow.init({"w": jnp.ones((3, 128))}), "w") == {2}


@pytest.mark.usefixtures("optimized_programs")
def test_no_array_is_copied():
  tx = cadence(optax.adamw(0.1), {"w": oc.channels([1, 2, 4, 8] * 4)})
  params = {"w": jnp.ones((64, 512))}
  for phase in (None, 0, 1):
    step = jax.jit(tx.apply, static_argnames="phase", donate_argnums=(0, 1))
    compiled = step.lower(params, tx.init(params), params, phase=phase).compile()
    assert not [x for x in compiled.as_text().splitlines() if " copy(f32[64" in x]
    assert compiled.memory_analysis().temp_size_in_bytes <= params["w"].nbytes


def test_a_policy_reads_folded_bands():
  policy = oc.until_certain(1.0, 2, 4)
  tx = cadence(optax.adam(0.1), {"w": oc.channels([policy, 1, policy, 1])})
  params = {"w": jnp.ones((3, 128))}
  state, update = tx.init(params), jax.jit(tx.update)
  assert ranks(state, "w") == {3}
  for _ in range(2):
    updates, state = update(params, state, params)
  assert (updates["w"] != 0).all()  # The same gradient twice is certain.


def test_an_optimizer_that_extra_arguments_couple():
  def update(updates, state, params=None, *, normalize=False, **extra_args):
    del params, extra_args
    scale = lambda u: u / jnp.linalg.norm(u, axis=-1, keepdims=True)
    return jax.tree.map(scale, updates) if normalize else updates, state

  inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
  tx, params = cadence(inner, {"w": oc.channels([1, 2, 1, 2])}), {"w": jnp.ones((3, 128))}
  state = tx.init(params)
  assert ranks(state, "w") == {3}
  tx.update(params, state, params, unused=1)
  with pytest.raises(ValueError, match=r"'w': expected .* one by one.*: normalize"):
    tx.update(params, state, params, normalize=True)


# Which programs are the same but for shapes.

X = jnp.ones((2, 3))


@pytest.mark.parametrize(
  ("fn", "same"),
  [
    (lambda x: jnp.where(x > 0, 2 * x, jnp.zeros_like(x)), True),
    (lambda x: x * x.ndim, False),
    (lambda x: x if x.ndim == 2 else -x, False),
    (lambda x: x + x * 2 if x.ndim == 2 else x * 2 + x, False),
    (lambda x: (x, -x) if x.ndim == 2 else (-x, x), False),
  ],
)
def test_alike(fn, same):
  two = [reading.traced(fn, x) for x in (X, X.reshape(-1))]
  assert proof.alike(*two) == same
