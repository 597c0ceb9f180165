"""The branch that runs zero times or once, under every transformation of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cadence import _control

CARRY = {"x": jnp.arange(3.0), "n": jnp.int32(4)}
CONSTS = jnp.array([1.0, -2.0, 3.0])


def fn(carry, consts):
  x = carry["x"] * consts + 1
  return {"x": x, "n": carry["n"] + (x.sum() > 2).astype(jnp.int32)}


def plain(when, carry=CARRY, consts=CONSTS):
  return fn(carry, consts) if when else carry


def assert_equal(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("when", [True, False])
@pytest.mark.parametrize("run", [_control.maybe, _control.keep])
def test_runs_if_and_only_if_it_should(run, when):
  step = jax.jit(lambda when: run(when, fn, CARRY, CONSTS))
  assert_equal(step(jnp.bool_(when)), plain(when))


def test_keep_selects_leaf_by_leaf():
  new, flags = fn(CARRY, CONSTS), {"x": True, "n": jnp.bool_(False)}
  assert_equal(_control.keep(flags, fn, CARRY, CONSTS), {"x": new["x"], "n": CARRY["n"]})


def test_keep_passes_on_constants_repeated_and_unchanged_values():
  carry = tuple(map(jnp.float32, range(4)))

  def some(carry, _):
    shared = carry[0] + 10
    return shared, shared, jnp.float32(7), carry[3]

  flags = tuple(jnp.bool_(i % 2) for i in range(4))
  expected = tuple(
    x if i % 2 else old for i, (x, old) in enumerate(zip(some(carry, ()), carry, strict=True))
  )
  assert_equal(_control.keep(flags, some, carry, ()), expected)


@pytest.mark.parametrize("batched", ["when", "carry", "consts", "all"])
def test_a_batch_is_its_members_one_by_one(batched):
  whens = jnp.array([True, False, True])
  carries = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), CARRY)
  consts = jnp.stack([CONSTS, -CONSTS, CONSTS + 1])
  given = (
    whens if batched in ("when", "all") else jnp.bool_(True),
    carries if batched in ("carry", "all") else CARRY,
    consts if batched in ("consts", "all") else CONSTS,
  )
  axes = tuple(0 if batched in (name, "all") else None for name in ("when", "carry", "consts"))
  found = jax.vmap(lambda w, c, k: _control.maybe(w, fn, c, k), in_axes=axes)(*given)
  for i in range(3):
    member = [
      jax.tree.map(lambda x, i=i: x[i], x) if a == 0 else x
      for x, a in zip(given, axes, strict=True)
    ]
    assert_equal(jax.tree.map(lambda x, i=i: x[i], found), plain(*member))


def test_batches_of_batches():
  whens = jnp.array([[True, False], [False, False]])
  step = lambda when: _control.maybe(when, fn, CARRY, CONSTS)
  found = jax.jit(jax.vmap(jax.vmap(step)))(whens)
  for i, j in np.ndindex(2, 2):
    assert_equal(jax.tree.map(lambda x, at=(i, j): x[at], found), plain(bool(whens[i, j])))


@pytest.mark.parametrize("when", [True, False])
def test_both_modes_of_differentiation_also_in_batches(when):
  def loss(x, when):
    return (_control.maybe(when, fn, CARRY | {"x": x}, CONSTS)["x"] ** 2).sum()

  expected = jax.grad(lambda x: (plain(when, CARRY | {"x": x})["x"] ** 2).sum())(CARRY["x"])
  for derivative in (jax.grad(loss), jax.jacfwd(loss)):
    assert_equal(jax.jit(derivative)(CARRY["x"], jnp.bool_(when)), expected)
    found = jax.vmap(derivative, in_axes=(None, 0))(CARRY["x"], jnp.array([when, not when]))
    assert_equal(found[0], expected)


def test_apart_is_the_function_itself():
  run = lambda carry, count: _control.apart(fn, carry, CONSTS, count)
  assert_equal(jax.jit(run)(CARRY, jnp.int32(0)), plain(True))
  counts = jnp.arange(2, dtype=jnp.int32)
  batched = jax.vmap(run, in_axes=(None, 0))(CARRY, counts)
  assert_equal(jax.tree.map(lambda x: x[1], batched), plain(True))
