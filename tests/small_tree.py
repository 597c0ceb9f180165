"""One small tree, its cadences and batches, trained by the cadence or by the oracle."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle

import optax_cadence as oc

SHAPES = {"body": {"bias": (6,), "kernel": (4, 6)}, "head": (3,)}

# Three groups, a leaf cut into four tensors, two of them in one group; a cycle of 4.
EVERY = {
  "body": {"bias": oc.Every(4, offset=3), "kernel": oc.quadrants([[1, 2], [2, 1]])},
  "head": 2,
}
PIECES = [
  oracle.whole(4, 3),
  oracle.rectangles((4, 6), [[1, 2], [2, 1]], (-2, -1)),
  oracle.whole(2),
]

# The same without cuts, which plain Optax can express.
LEAFWISE = {"body": {"bias": 4, "kernel": 2}, "head": 1}

STEPS = 9


def by_hand(inner):
  """`LEAFWISE` in plain Optax."""
  slow = {k: optax.MultiSteps(inner, k).gradient_transformation() for k in (2, 4)}
  return optax.partition({1: inner, **slow}, LEAFWISE)


def dyadic(seed, shapes=SHAPES):
  """A tree of dyadic numbers, whose sums are exact in any order."""
  rng = np.random.default_rng(seed)
  draw = lambda shape: jnp.asarray(rng.integers(-8, 9, shape) / 8.0, jnp.float32)
  return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


PARAMS = dyadic(100)
BATCHES = [dyadic(seed) for seed in range(STEPS)]


def stack(trees):
  return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def trained(tx, params=PARAMS, batches=BATCHES, **extra_args):
  """Parameters after every micro-step, and the last state."""
  state, update, after = tx.init(params), jax.jit(tx.update), []
  for grads in batches:
    updates, state = update(grads, state, params, **extra_args)
    params = optax.apply_updates(params, updates)
    after.append(params)
  return after, state


def trained_by_oracle(
  inner, pieces=PIECES, params=PARAMS, batches=BATCHES, accumulate="mean", **extra_args
):
  """The same by the oracle: a list of leaves after every micro-step."""
  leaves, after = jax.tree.leaves(params), []
  slow = oracle.Oracle(oracle.relaxed(inner), leaves, pieces, accumulate, **extra_args)
  for grads in batches:
    updates = slow.step(jax.tree.leaves(grads), leaves)
    leaves = optax.apply_updates(leaves, updates)
    after.append(leaves)
  return after


@functools.cache
def adamw_by_oracle():
  return trained_by_oracle(optax.adamw(0.1))


def assert_same_path(found, expected, ulps=8):
  assert len(found) == len(expected)
  for a, b in zip(found, expected, strict=True):
    assert_close(a, b, ulps)


def assert_close(found, expected, ulps=8):
  """Within a few units in the last place of the largest entry, leaf by leaf."""
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    tol = ulps * np.finfo(b.dtype).eps
    largest = np.abs(b).max(initial=1.0, where=np.isfinite(b))
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol * largest)


def assert_identical(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def subtree(state, kind):
  """All parts of a state that are of this type."""
  found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
  return [x for x in found if isinstance(x, kind)]


@contextlib.contextmanager
def relaxed():
  """JAX's ordinary promotion rules, for whole frameworks that rely on them."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def cadence(inner, every=EVERY, **kwargs):
  return oc.cadence(oracle.relaxed(inner), every, **kwargs)


def scanned(tx, params=PARAMS, batches=None):
  """The parameters after all micro-steps, with `apply` in a scan."""
  step = lambda carry, grads: (tx.apply(*carry, grads), None)
  batches = stack(BATCHES) if batches is None else batches
  return jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]


def data(t):
  rng = np.random.default_rng(t)
  x = rng.normal(size=(8, 4)).astype(np.float32)
  return jnp.asarray(x), jnp.asarray(np.stack([x.sum(1), x[:, 0] * x[:, 1]], axis=1))


class Follower:
  """The oracle beside a framework: fed the gradients that the framework computed."""

  def __init__(self, inner, params, pieces):
    self.leaves = [jnp.array(p) for p in jax.tree.leaves(params)]
    self.slow = oracle.Oracle(oracle.relaxed(inner), self.leaves, pieces)

  def step(self, grads):
    updates = self.slow.step(jax.tree.leaves(grads), self.leaves)
    self.leaves = optax.apply_updates(self.leaves, updates)
    return self.leaves
