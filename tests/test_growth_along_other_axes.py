"""What a program does along axes that do not grow is no reason to refuse it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from growth_nets import close
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from optax_cadence import growth

pytestmark = pytest.mark.ci

ROWS, UNITS = 6, 4
PARAMS = {
  "a": jax.random.normal(jax.random.key(1), (3, UNITS)),
  "b": jax.random.normal(jax.random.key(2), (UNITS, 2)),
}
X = jax.random.normal(jax.random.key(0), (ROWS, 3))
SEGMENTS = jnp.array([0, 1, 1, 2, 0, 1])
SOME = jnp.arange(2)


def by_unit(fn):
  return lambda h: jax.vmap(fn, 1, 1)(h)


def scanned(h):
  def put(buffer, i):
    return lax.dynamic_update_slice(buffer, h[i][None], (i, jnp.int32(0))), None

  return lax.scan(put, jnp.zeros_like(h), jnp.arange(ROWS))[0]


def looped(h):
  return lax.while_loop(
    lambda carry: carry[0] < 3,
    lambda carry: (carry[0] + 1, jnp.tanh(carry[1]) + h * carry[0].astype(h.dtype)),
    (jnp.int32(0), jnp.zeros_like(h)),
  )[1]


def recurrence(h):
  """A state space: h_t = a_t h_(t-1) + b_t."""

  def joined(left, right):
    return left[0] * right[0], right[0] * left[1] + right[1]

  return lax.associative_scan(joined, (jnp.tanh(h), h))[1]


# From [rows, units] to as many units.
FORWARD = {
  "strides": lambda h: h[::2],
  "stacked on a new axis": lambda h: jnp.stack([h, h[::-1]], 1),
  "taken apart": lambda h: sum(jnp.unstack(h, axis=0)),
  "tiles": lambda h: jnp.tile(h[None], (2, 1, 1)),
  "a class token": lambda h: jnp.concatenate([jnp.tile(h[:1], (2, 1)), h]),
  "segment sums": lambda h: jax.ops.segment_sum(h, SEGMENTS, 3),
  "segment maxima": lambda h: jax.ops.segment_max(h, SEGMENTS, 3),
  "segment minima": lambda h: jax.ops.segment_min(h, SEGMENTS, 3),
  "segment products": lambda h: jax.ops.segment_prod(h, SEGMENTS, 3),
  "segment sums, mapped": by_unit(lambda c: jax.ops.segment_sum(c, SEGMENTS, 3)),
  "set rows": lambda h: jnp.zeros((8, h.shape[1])).at[2:].set(h),
  "set a row": lambda h: h.at[1].set(h[0]),
  "applied to a row": lambda h: h.at[0].apply(jnp.sin),
  "multiplied rows": lambda h: h.at[SOME].mul(h[2:4]),
  "a buffer": lambda h: lax.dynamic_update_slice(jnp.zeros((8, h.shape[1])), h, (1, 0)),
  "a buffer, mapped": by_unit(lambda c: lax.dynamic_update_slice(c, c[:2], (1,))),
  "a buffer in a loop": scanned,
  "a row of it by a traced index": lambda h: lax.fori_loop(
    0, 3, lambda i, total: total * 0.5 + h[i][None], jnp.zeros_like(h)
  ),
  "while": looped,
  "associative scan": recurrence,
  "associative scan, backwards": lambda h: lax.associative_scan(jnp.add, h, reverse=True),
  "fft": lambda h: jnp.abs(jnp.fft.fft(h, axis=0)),
  "rfft and back": lambda h: jnp.fft.irfft(jnp.fft.rfft(h, axis=0), axis=0, n=ROWS),
  "sorted": lambda h: jnp.sort(h, 0),
  "sorted by another": lambda h: jnp.take_along_axis(h, jnp.argsort(h, 0), 0),
  "looked up, mapped": by_unit(lambda c: c[SEGMENTS]),
  "the best rows": lambda h: lax.top_k(h.T, 2)[0].T,
  "triangular solve": lambda h: lax.linalg.triangular_solve(
    jnp.eye(ROWS) + 0.1, h, left_side=True, lower=True
  ),
  "padded by its edges": lambda h: jnp.pad(h, ((1, 2), (0, 0)), mode="edge"),
  "images padded by their edges": lambda h: jnp.pad(
    h.reshape(1, 2, 3, -1), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge"
  ).reshape(20, -1),
  "padded by a ramp": lambda h: jnp.pad(h, ((1, 2), (0, 0)), mode="linear_ramp"),
  "padded by maxima": lambda h: jnp.pad(h, ((1, 2), (0, 0)), mode="maximum"),
  "linear solve": lambda h: jnp.linalg.solve(jnp.eye(ROWS) + 0.1, h),
  "linear solve, mapped": by_unit(lambda c: jnp.linalg.solve(jnp.eye(ROWS) + 0.1, c)),
  "tridiagonal solve": lambda h: lax.linalg.tridiagonal_solve(
    jnp.full(ROWS, 0.1), jnp.full(ROWS, 2.0), jnp.full(ROWS, 0.1), h
  ),
  "stacked": lambda h: jnp.stack([h, h * 2], 1).sum(1),
  "named": lambda h: checkpoint_name(h, "h"),
  "behind a barrier": lambda h: lax.optimization_barrier((h, h.T))[1].T,
  "in groups of rows": lambda h: (
    lax.ragged_dot(h, jnp.ones((2, h.shape[1], 1)), jnp.array([2, 4])) + h
  ),
  "constrained": lambda h: lax.with_sharding_constraint(
    h, jax.sharding.SingleDeviceSharding(jax.devices()[0])
  ),
}


@pytest.mark.parametrize("kind", list(FORWARD))
def test_it_grows_beside_them(kind):
  def fn(p, x):
    return FORWARD[kind](jnp.tanh(x @ p["a"])) @ p["b"]

  units = growth.couple(fn, PARAMS, X, producer="a")
  assert [(m.path, m.axis) for m in units.members] == [(("a",), 1), (("b",), 0)]
  plan = growth.widening(PARAMS, units, 2)
  grown = plan.apply(PARAMS, lambda path, shape, dtype: np.full(shape, 0.7, dtype))
  forward = jax.jit(growth.gated(fn, plan))
  close(forward(grown, X), fn(PARAMS, X))
  at_one = fn({name: grown[name] for name in "ab"}, X)
  close(forward({**grown, "alpha": jnp.float32(1)}, X), at_one)
  assert jnp.abs(at_one - fn(PARAMS, X)).max() > 1e-3


def test_a_primitive_that_is_not_known_says_what_it_needs():
  def fn(p, x):
    return (
      lax.reduce_window(x @ p["a"], 0.0, lambda a, b: a + b + 1, (2, 1), (2, 1), "SAME") @ p["b"]
    )

  match = r"through reduce_window of shapes.* no row for it: one that names the axes"
  with pytest.raises(ValueError, match=match):
    growth.couple(fn, PARAMS, X, producer="a")


def test_integers_that_are_sizes():
  def fn(what):
    def run(p, x):
      h = x @ p["a"]
      return what(h, jnp.int32(h.shape[1])) @ p["b"]

    return run

  def grown(fn):
    plan = growth.widening(PARAMS, growth.couple(fn, PARAMS, X, producer="a"), 2)
    tree = plan.apply(PARAMS, lambda path, shape, dtype: np.full(shape, 0.7, dtype))
    return growth.gated(fn, plan), tree

  scaled = fn(lambda h, n: h / lax.convert_element_type(n + 1, h.dtype))
  forward, tree = grown(scaled)
  close(forward(tree, X), scaled(PARAMS, X))
  close(forward({**tree, "alpha": jnp.float32(1)}, X), scaled({n: tree[n] for n in "ab"}, X))
  forward, tree = grown(fn(lambda h, n: lax.dynamic_slice_in_dim(h, n - 2, 2)))
  with pytest.raises(ValueError, match="integer that is 2 in the program before and 4 in the one"):
    forward(tree, X)


@pytest.mark.parametrize(
  ("along", "where"),
  [
    (lambda h: h[:, ::-1], r"rev of shapes \[\(6, 4\)\]"),
    (lambda h: lax.map(jnp.sin, h.T).T, r"a loop over the first axis of shape \(4, 6\)"),
    (lambda h: jnp.sort(h, 1), r"sort of shapes \[\(6, 4\)\]"),
  ],
)
def test_where_units_end_is_said(along, where):
  with pytest.raises(ValueError, match=rf"nothing uses the units of 'a'.* They end in {where}"):
    growth.couple(lambda p, x: along(x @ p["a"]) @ p["b"], PARAMS, X, producer="a")


def test_experts_whose_tokens_are_sorted_grow():
  params = {"up": jnp.ones((2, 3, UNITS)) * 0.3, "down": jnp.ones((2, UNITS, 2)) * 0.2}
  sizes = jnp.array([2, 4])

  def fn(p, x):
    return lax.ragged_dot(jnp.tanh(lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes)

  units = growth.couple(fn, params, X, producer="up")
  assert [(m.path[0], m.axis, m.role) for m in units.members] == [
    ("down", 1, "outgoing"), ("up", 2, "incoming"),
  ]  # fmt: skip
  plan = growth.widening(params, units, 3)
  grown = plan.apply(params, lambda path, shape, dtype: np.full(shape, 0.7, dtype))
  forward = jax.jit(growth.gated(fn, plan))
  close(forward(grown, X), fn(params, X))
  half = {**grown, "alpha": jnp.float32(0.5)}
  close(fn(growth.merge(half, plan), X), forward(half, X))


def test_the_derivative_of_a_linear_solve_is_its_own():
  matrix = jnp.eye(ROWS) + 0.1

  def fn(p, x):
    return jnp.linalg.solve(p["m"], x @ p["a"]) @ p["b"]

  params = {**PARAMS, "m": matrix}
  plan = growth.widening(params, growth.couple(fn, params, X, producer="a"), 2)
  grown = plan.apply(params, lambda path, shape, dtype: np.full(shape, 0.7, dtype))
  gradient = lambda fn, p: jax.grad(lambda p: jnp.sin(fn(p, X)).sum())(p)["m"]
  close(gradient(growth.gated(fn, plan), grown), gradient(fn, params))


ALONG = {
  "softmax": jax.nn.softmax,
  "log_softmax": jax.nn.log_softmax,
  "masked softmax": lambda h: jax.nn.softmax(jnp.where(h > 0.9, h, -jnp.inf)),
  "minus the largest": lambda h: h - h.max(1, keepdims=True),
  "minus the smallest": lambda h: h - jnp.min(h, 1, keepdims=True),
  "numbered": lambda h: h * jnp.sin(jnp.arange(h.shape[1], dtype=h.dtype))[None],
}


@pytest.mark.parametrize("kind", list(ALONG))
def test_what_goes_along_units_and_has_a_gate(kind):
  def fn(p, x):
    return ALONG[kind](x @ p["a"]) @ p["b"]

  x = jnp.abs(X) + 0.1
  params = {"a": jnp.linspace(1, 2, 3 * UNITS).reshape(3, UNITS), "b": PARAMS["b"]}
  units = growth.couple(fn, params, x, producer="a")
  assert not units.folds or kind == "numbered"
  plan = growth.widening(params, units, 2)
  grown = plan.apply(params, lambda path, shape, dtype: np.full(shape, 1.7, dtype))
  forward = growth.gated(fn, plan)
  gradient = lambda fn, p: jax.grad(lambda p: jnp.sin(fn(p, x)).sum())(p)
  np.testing.assert_array_equal(forward(grown, x), fn(params, x))
  found, expected = gradient(forward, grown), gradient(fn, params)
  assert np.isfinite(found["alpha"])
  close(found["a"][:, :UNITS], expected["a"])
  at_one = {name: grown[name] for name in "ab"}
  close(forward({**grown, "alpha": jnp.float32(1)}, x), fn(at_one, x))
  assert jnp.abs(fn(at_one, x) - fn(params, x)).max() > 1e-3


def test_numbers_that_old_units_would_not_keep():
  def fn(p, x):
    h = jnp.concatenate([x @ p["a"], x @ p["a"]], 1)
    return (h * jnp.arange(h.shape[1], dtype=h.dtype)[None]) @ p["c"]

  params = {"a": PARAMS["a"], "c": jnp.ones((2 * UNITS, 2))}
  with pytest.raises(ValueError, match=r"counts along an axis of size 8 \(iota\) .* in a variable"):
    growth.couple(fn, params, X, producer="a")
  described = growth.dimension(params, {"a": -1, "c": growth.Axis(0, outer=2)})
  plan = growth.widening(params, described, 2)
  grown = plan.apply(params, lambda path, shape, dtype: np.full(shape, 0.7, dtype))
  with pytest.raises(ValueError, match="counts along an axis that grows .* expected inputs"):
    growth.gated(fn, plan)(grown, X)


def test_some_pieces_of_a_split_grow():
  params = {**PARAMS, "a": jnp.linspace(0.1, 1, 3 * (2 + UNITS)).reshape(3, 2 + UNITS)}

  def fn(p, x):
    gate, h = jnp.split(x @ p["a"], [2], 1)
    return jnp.tanh(h) @ p["b"] * gate

  units = growth.couple(fn, params, X, producer="b", axis=0)
  assert [(m.path[0], m.axis) for m in units.members] == [("a", 1), ("b", 0)]
  plan = growth.widening(params, units, 3)
  grown = plan.apply(params, lambda path, shape, dtype: np.full(shape, 0.7, dtype))
  forward = growth.gated(fn, plan)
  close(forward(grown, X), fn(params, X))
  half = {**grown, "alpha": jnp.float32(0.5)}
  close(fn(growth.merge(half, plan), X), forward(half, X))


def test_what_only_dead_code_reads_grows_too():
  params = {**PARAMS, "scale": jnp.ones(UNITS)}

  def fn(p, x):
    h = x @ p["a"]
    jnp.sort(h * p["scale"][None], 1)
    return h @ p["b"]

  units = growth.couple(fn, params, X, producer="a")
  assert {m.path[0] for m in units.members} == {"a", "b", "scale"}
  plan = growth.widening(params, units, 2)
  grown = plan.apply(params, lambda path, shape, dtype: np.full(shape, 0.7, dtype))
  close(growth.gated(fn, plan)(grown, X), fn(params, X))
