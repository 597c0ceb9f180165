"""A backward pass that adds to the windows, beside gradients that are stored and then applied."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from small_tree import assert_close
from small_tree import assert_identical

import optax_cadence as oc
from optax_cadence import _training

REFERENCES = jax.__version_info__ >= _training.OLDEST_JAX_WITH_REFERENCES
needs_references = pytest.mark.skipif(not REFERENCES, reason="gradients are stored in this JAX")
OPERATION = "add_in_backward_pass"
LAYERS, WIDTH = 4, 3


def parameters(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(0.5 * rng.normal(size=shape), dtype)
  return {"w": draw(LAYERS, WIDTH, WIDTH), "b": draw(LAYERS, WIDTH), "out": draw(WIDTH, 2)}


def batch(t):
  return jnp.asarray(np.random.default_rng(t + 1).normal(size=(5, WIDTH)), jnp.float32)


def layer(h, p):
  return jnp.tanh(h @ p["w"].astype(h.dtype) + p["b"].astype(h.dtype)[None]), None


def through(h, params, wrap=lambda fn: fn, reverse=False):
  layers = {name: params[name] for name in ("w", "b")}
  return jax.lax.scan(wrap(layer), h, layers, reverse=reverse)[0]


def end(h, params):
  return jnp.sum((h @ params["out"].astype(h.dtype)) ** 2)


def scanned(params, x):
  return end(through(x, params), params)


def scanned_in_reverse(params, x):
  # Where JAX has added to the rows of references in the wrong order: its issue 32411.
  return end(through(x, params, reverse=True), params)


def rematerialized(params, x):
  return end(through(x, params, jax.checkpoint), params)


def folded(params):
  return params | {
    name: params[name].reshape(2, -1, *params[name].shape[1:]) for name in ("w", "b")
  }


def nested(params, x, wrap=lambda fn: fn):
  block = wrap(lambda h, p: (through(h, p, wrap), None))
  return end(jax.lax.scan(block, x, {name: params[name] for name in ("w", "b")})[0], params)


def nested_and_rematerialized(params, x):
  return nested(params, x, jax.checkpoint)


@jax.custom_vjp
def clipped(x):
  return x


clipped.defvjp(lambda x: (x, None), lambda _, ct: (jnp.clip(ct, -0.1, 0.1),))


def with_custom_vjp(params, x):
  return end(through(x, params, lambda fn: lambda h, p: fn(clipped(h), p)), params)


def apart(params, x):
  for i in range(LAYERS):
    x, _ = layer(x, {name: params[name][i] for name in ("w", "b")})
  return end(x, params)


def in_a_branch(params, x):
  h = through(x, params)
  return jax.lax.cond(x[0, 0] > 0, lambda: end(h, params), lambda: end(2 * h, params))


def tied(params, x):
  h = through(x, params)
  return end(h, params) + jnp.sum((h @ params["out"]) @ params["out"].T)


def used_at_every_turn(params, x):
  turn = lambda h, p: (jnp.tanh(layer(h, p)[0] @ params["out"] @ params["out"].T), None)
  layers = {name: params[name] for name in ("w", "b")}
  return end(jax.lax.scan(turn, x, layers)[0], params)


def with_one_unused(params, x):
  return jnp.sum(through(x, params) ** 2)


def computed_in_bfloat16(params, x):
  h = through(x.astype(jnp.bfloat16), params)
  return jnp.sum((h @ params["out"].astype(h.dtype)).astype(jnp.float32) ** 2)


def sliced_inside(params, x):
  def turn(h, p):
    rows = [p["w"][i] for i in range(WIDTH)]
    return layer(h, {"w": jnp.stack(rows), "b": p["b"]})

  return end(jax.lax.scan(turn, x, {name: params[name] for name in ("w", "b")})[0], params)


def by_number(params, x):
  turn = lambda h, i: layer(h, {name: params[name][i] for name in ("w", "b")})
  return end(jax.lax.scan(turn, x, jnp.arange(LAYERS))[0], params)


def in_calls(params, x):
  return end(jax.jit(lambda h, p: jax.nn.relu(through(h, p)))(x, params), params)


def scanned_in_a_branch(params, x):
  return jax.lax.cond(x[0, 0] > 0, lambda: scanned(params, x), lambda: scanned(params, 2 * x))


def alone_and_in_a_scan(params, x):
  return scanned(params, x) + jnp.sum(params["w"][1] ** 2) + jnp.sum(params["b"] ** 2)


def squares(w, v):
  return jnp.sum(w * v) * jnp.ones_like(w)


def of_rows(square):
  """A loss whose turns hand `square` one row as both of its operands."""

  def loss(params, x):
    turn = lambda h, w: (jnp.tanh(h @ w + h @ square(w, w)), None)
    return end(jax.lax.scan(turn, x, params["w"])[0], params) + jnp.sum(params["b"] ** 2)

  return loss


def rows_of_rows(w, v):
  return jax.lax.scan(lambda h, row: (jnp.sin(h @ v + row[None]), None), w, w)[0]


def one_of_all(params, x):
  turn = lambda h, w: (jnp.tanh(h @ w @ params["w"][0]), None)
  return end(jax.lax.scan(turn, x, params["w"])[0], params) + jnp.sum(params["b"] ** 2)


def through_twice(w, v, x):
  return jax.lax.scan(lambda h, ws: (jnp.tanh(h @ ws[0] @ ws[1]), None), x, (w, v))[0]


def in_a_call_twice(params, x):
  h = jax.jit(through_twice)(params["w"], params["w"], x)
  return end(h, params) + jnp.sum(params["b"] ** 2)


def in_a_branch_twice(params, x):
  h = jax.lax.cond(x[0, 0] < jnp.inf, through_twice, lambda w, v, x: x, params["w"], params["w"], x)
  return end(h, params) + jnp.sum(params["b"] ** 2)


# Some operation takes a leaf, or a row of it, as two operands.
TWICE_AT_ONCE = {
  "a scan": one_of_all,
  "a call": in_a_call_twice,
  "a branch": in_a_branch_twice,
  "a call in a scan": of_rows(jax.jit(squares)),
  "a branch in a scan": of_rows(lambda w, v: jax.lax.cond(w.sum() < 9, squares, jnp.add, w, v)),
  "a scan in a scan": of_rows(rows_of_rows),
}
NESTED = [nested, nested_and_rematerialized]
ONE_USE = [
  *NESTED,
  scanned,
  scanned_in_reverse,
  rematerialized,
  with_custom_vjp,
  in_a_branch,
  scanned_in_a_branch,
  with_one_unused,
  computed_in_bfloat16,
  sliced_inside,
  by_number,
  in_calls,
]
SEVERAL_USES = [tied, used_at_every_turn, alone_and_in_a_scan]


def stored(loss, tx):
  """The step that `training_step` stands for."""

  def step(params, state, *args, phase=None):
    value, grads = jax.value_and_grad(loss)(params, *args)
    return *tx.apply(params, state, grads, phase), value

  return step


def adam():
  return oracle.relaxed(optax.adamw(0.1))


def compiled(step):
  return jax.jit(step, static_argnames="phase")


def runs(step, tx, params, steps, phases=False):
  """Parameters, state and value after each micro-step, of a step or of several in turn."""
  state, after = tx.init(params), []
  turns = itertools.cycle(step if isinstance(step, list) else [step])
  for t in range(1, steps + 1):
    phase = {"phase": t % tx.cycle} if phases else {}
    params, state, value = next(turns)(params, state, batch(t), **phase)
    after.append((params, state, value))
  return after


def adds_in_the_backward_pass(loss, tx, params, **options):
  step = functools.partial(oc.training_step(loss, tx), **options)
  return OPERATION in str(jax.make_jaxpr(step)(params, tx.init(params), batch(0)))


def assert_near(found, expected):
  """Counters equal, and numbers within rounding."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    if jnp.issubdtype(b.dtype, jnp.inexact):
      assert_close(a, b, ulps=256)
    else:
      assert_identical(a, b)


def references(loss, tx, params):
  """The shapes of what the backward pass adds to."""
  step = oc.training_step(loss, tx)
  text = str(jax.make_jaxpr(step)(params, tx.init(params), batch(0)))
  return sorted(re.findall(r"Ref\{\w+\[([\d,]+)\]\} = new_ref", text))


@pytest.mark.parametrize("loss", [*ONE_USE, *SEVERAL_USES])
def test_it_is_what_gradients_and_apply_do(loss):
  params = folded(parameters()) if loss in NESTED else parameters()
  tx = oc.cadence(adam(), {"w": 3, "b": 3, "out": 2})
  assert adds_in_the_backward_pass(loss, tx, params) is REFERENCES
  found = runs(compiled(oc.training_step(loss, tx)), tx, params, 7)
  expected = runs(compiled(stored(loss, tx)), tx, params, 7)
  (assert_identical if loss in ONE_USE else assert_near)(found, expected)


@pytest.mark.parametrize("every", [3, oc.stacked([3, 1, 3, 3])])
@pytest.mark.parametrize("operation", TWICE_AT_ONCE)
def test_a_leaf_that_an_operation_takes_twice(operation, every):
  # JAX adds to one of two references only if they are the same.
  loss, params = TWICE_AT_ONCE[operation], parameters()
  tx = oc.cadence(optax.sgd(0.1), {"w": every, "b": 3, "out": 2})
  found = runs(compiled(oc.training_step(loss, tx)), tx, params, 4)
  assert_near(found, runs(compiled(stored(loss, tx)), tx, params, 4))


def test_layers_that_are_leaves_have_the_program_of_gradients_and_apply():
  tx, params = oc.cadence(adam(), 3), parameters()
  assert not adds_in_the_backward_pass(apart, tx, params)
  found = runs(compiled(oc.training_step(apart, tx)), tx, params, 4)
  assert_identical(found, runs(compiled(stored(apart, tx)), tx, params, 4))


EVERY = {
  "uniform": 3,
  "graded": {"w": 4, "b": 2, "out": 1},
  "offset": {"w": oc.Every(4, 3), "b": 2, "out": 4},
  "layers": {"w": oc.stacked([1, 2, 4, 4]), "b": 4, "out": 2},
  "alternating": {"w": oc.stacked([1, 2, 1, 4]), "b": 4, "out": 2},
  "bands": {"w": oc.channels([1, 2], axis=2), "b": oc.quadrants([[1, 2], [2, 4]]), "out": 2},
  "mask": {"w": np.arange(36).reshape(LAYERS, WIDTH, WIDTH) % 2 + 1, "b": 2, "out": 2},
  "schedule": oc.Every(lambda t: 1 + t // 3),
  "settled": oc.as_settled(1, 4),
  "certain": {"w": oc.until_certain(1.0, 1, 4), "b": 2, "out": 1},
}
OPTIONS = {
  "mean": {},
  "sum": {"accumulate": "sum"},
  "skip": {"nonfinite": "skip"},
  "narrow": {"accumulator_dtype": jnp.bfloat16},
}
# What `training_step` stores the gradient of, of those that have a window.
STORED = {"bands": ["b", "w"], "mask": ["w"], "certain": ["w"], "alternating": ["w"]}
FEW = [("uniform", "sum"), ("graded", "mean"), ("layers", "mean"), ("offset", "skip")]
ALL = list(itertools.product(EVERY, OPTIONS))


@pytest.mark.parametrize(
  ("every", "options"),
  [pytest.param(*x, marks=() if x in FEW else pytest.mark.ci) for x in ALL],
)
def test_every_cadence_and_every_way_to_go_on(every, options):
  tx, params = oc.cadence(adam(), EVERY[every], **OPTIONS[options]), parameters()
  step, other = compiled(oc.training_step(scanned, tx)), compiled(stored(scanned, tx))
  expected = runs(other, tx, params, 6)
  assert_identical(runs(step, tx, params, 6), expected)
  # Either may take any micro-step: what one has left of a window, the other clears.
  assert_identical(runs([step, other], tx, params, 6), expected)
  kept = set(oc.describe(tx, params).stored)
  if options in ("skip", "narrow") or not REFERENCES:
    assert {"w", "b"} - kept <= {"w", "b", "out"} and kept
  else:
    assert kept == set(STORED.get(every, []))


# Cadences with a period for each layer, and the shapes of what the backward pass adds to.
ROWS = {
  "rows of period 1": (
    {"w": oc.stacked([1, 2, 4, 4]), "b": 3, "out": 1},
    ["1,3,3", "2,3,3", "4,3"],
  ),
  "cut in other places": (
    {"w": oc.stacked([2, 4, 4, 4]), "b": oc.stacked([3, 3, 3, 5]), "out": 2},
    ["1,3", "1,3,3", "3,3", "3,3,3"],
  ),
  "beside a stored gradient": (
    {"w": oc.stacked([4, 2, 2, 2]), "b": 1, "out": 1},
    ["1,3,3", "3,3,3"],
  ),
}


@pytest.mark.ci
@pytest.mark.parametrize(("every", "shapes"), ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("loss", [scanned, scanned_in_reverse, in_calls])
def test_a_period_for_each_layer(loss, every, shapes):
  tx, params = oc.cadence(adam(), every), parameters()
  assert references(loss, tx, params) == (shapes if REFERENCES else [])
  found = runs(compiled(oc.training_step(loss, tx)), tx, params, 7)
  assert_identical(found, runs(compiled(stored(loss, tx)), tx, params, 7))


def test_a_period_for_each_block_of_layers():
  tx = oc.cadence(adam(), {"w": oc.stacked([2, 4]), "b": 2, "out": 1})
  params = folded(parameters())
  assert references(nested, tx, params) == (["1,2,3,3", "1,2,3,3", "2,2,3"] if REFERENCES else [])
  found = runs(compiled(oc.training_step(nested, tx)), tx, params, 7)
  assert_identical(found, runs(compiled(stored(nested, tx)), tx, params, 7))


@pytest.mark.parametrize("loss", [alone_and_in_a_scan, scanned_in_a_branch, by_number])
def test_layers_that_more_than_a_scan_reads_are_in_one_piece(loss):
  tx, params = oc.cadence(adam(), {"w": oc.stacked([1, 2, 4, 4]), "b": 3, "out": 1}), parameters()
  assert references(loss, tx, params) == (["4,3"] if REFERENCES else [])
  found = runs(compiled(oc.training_step(loss, tx)), tx, params, 5)
  assert_near(found, runs(compiled(stored(loss, tx)), tx, params, 5))


@pytest.mark.ci
def test_a_period_for_each_layer_under_vmap_and_differentiation():
  tx, params = oc.cadence(adam(), ROWS["rows of period 1"][0]), parameters()
  many = jax.tree.map(lambda x: jnp.stack([x, 1.5 * x]), params)

  def final(step, params):
    carry = params, tx.init(params)
    for t in range(2):
      *carry, value = step(*carry, batch(t))
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(carry[0])) + value

  step, other = compiled(oc.training_step(scanned, tx)), stored(scanned, tx)
  for transform, start in ((jax.vmap, many), (jax.grad, params)):
    expected = jax.jit(transform(functools.partial(final, other)))(start)
    assert_near(jax.jit(transform(functools.partial(final, step)))(start), expected)


@pytest.mark.parametrize("accumulate", ["mean", "latest"])
def test_a_static_phase_makes_no_difference(accumulate):
  tx = oc.cadence(adam(), {"w": 4, "b": 2, "out": 1}, accumulate=accumulate)
  step = compiled(oc.training_step(scanned, tx))
  found = runs(step, tx, parameters(), 6, phases=True)
  assert_near(found, runs(compiled(stored(scanned, tx)), tx, parameters(), 6))


def test_a_nan_does_not_outlive_its_window():
  tx, params = oc.cadence(oracle.relaxed(optax.sgd(0.1)), 2), parameters()
  step = compiled(oc.training_step(scanned, tx))
  state = tx.init(params)
  for t, scale in enumerate([jnp.nan, 1.0, 1.0, 1.0]):
    new, state, _ = step(params, state, scale * batch(t))
    bad = [bool(jnp.isnan(x).any()) for x in jax.tree.leaves(new)]
    assert all(bad) if t == 1 else not any(bad)


def test_what_flush_leaves_in_the_accumulators_is_cleared():
  tx, params = oc.cadence(adam(), 4), parameters()
  step, other = compiled(oc.training_step(scanned, tx)), compiled(stored(scanned, tx))
  ways = []
  for one in (step, other):
    state = tx.init(params)
    _, state, _ = one(params, state, batch(0), phase=1)
    _, state = jax.jit(tx.flush)(state, params)
    ways.append(one(params, state, batch(1), phase=2)[1])
    ways[-1] = ways[-1]._replace(groups={"4": ways[-1].groups["4"]._replace(inner_state=())})
  assert_identical(*ways)


def test_what_the_loss_returns_beside_its_value():
  def loss(params, x, scale):
    value = scanned(params, x) * scale
    return value, {"rows": x.shape[0], "mean": (x.mean(), jnp.argmax(x))}

  tx, params = oc.cadence(adam(), 2), parameters()
  step = oc.training_step(loss, tx, has_aux=True)
  found = jax.jit(step)(params, tx.init(params), batch(0), 2.0)[2]
  assert_identical(found, jax.jit(loss)(params, batch(0), 2.0))
  eager = step(params, tx.init(params), batch(0), 2.0)[2]
  assert_near(eager, found)


@pytest.mark.ci
def test_gradients_take_the_place_of_references_under_vmap_and_differentiation():
  tx, params = oc.cadence(adam(), {"w": 2, "b": 3, "out": 1}), parameters()
  many = jax.tree.map(lambda x: jnp.stack([x, 1.5 * x, -x]), params)

  def final(loss):
    def train(params, scale):
      carry = params, tx.init(params)
      for t in range(2):
        *carry, value = loss(*carry, scale * batch(t))
      return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(carry[0])) + value

    return train

  step, other = compiled(oc.training_step(scanned, tx)), stored(scanned, tx)
  scales = jnp.array([1.0, 2.0, 0.5])
  for transform in (
    lambda fn: jax.vmap(fn)(many, scales),
    lambda fn: jax.vmap(fn, in_axes=(0, None))(many, scales[1]),
    lambda fn: jax.grad(fn)(params, scales[1]),
    lambda fn: jax.vmap(jax.grad(fn, argnums=1), in_axes=(None, 0))(params, scales),
    lambda fn: jax.jvp(fn, (params, scales[1]), (params, scales[0])),
  ):
    expected = jax.jit(lambda: transform(final(other)))()  # noqa: B023
    assert_near(jax.jit(lambda: transform(final(step)))(), expected)  # noqa: B023


def test_in_a_scan_over_micro_steps():
  tx, params = oc.cadence(adam(), {"w": 2, "b": 3, "out": 1}), parameters()
  batches = jnp.stack([batch(t) for t in range(1, 6)])

  @jax.jit
  def train(params):
    step = oc.training_step(scanned, tx)
    turn = lambda carry, x: (lambda p, s, v: ((p, s), v))(*step(*carry, x))
    return jax.lax.scan(turn, (params, tx.init(params)), batches)

  (found, state), values = train(params)
  expected = runs(compiled(stored(scanned, tx)), tx, params, 5)
  assert_identical((found, state), expected[-1][:2])
  assert_identical(values, jnp.stack([value for *_, value in expected]))


def test_regions_that_are_not_due_are_not_differentiated():
  tx = oc.cadence(adam(), {"w": 2, "b": 2, "out": 1}, accumulate="latest")
  step, params = oc.training_step(scanned, tx), parameters()

  def loops(phase):
    fn = functools.partial(step, phase=phase)
    return str(jax.make_jaxpr(fn)(params, tx.init(params), batch(0))).count("scan[")

  assert loops(0) - loops(1) == 1


def test_transformations_before_the_cadence_see_the_gradients():
  tx = oc.chain(oracle.relaxed(optax.clip_by_global_norm(0.1)), oc.cadence(adam(), 2))
  params = parameters()
  assert not adds_in_the_backward_pass(scanned, tx, params)
  found = runs(compiled(oc.training_step(scanned, tx)), tx, params, 4)
  assert_identical(found, runs(compiled(stored(scanned, tx)), tx, params, 4))
  assert set(oc.describe(tx, params).stored.values()) == {"transformations before the cadence"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_of_parameters(dtype):
  tx, params = oc.cadence(adam(), 2), parameters(dtype)
  wide = dtype == jnp.float32
  assert adds_in_the_backward_pass(scanned, tx, params) is (REFERENCES and wide)
  found = runs(compiled(oc.training_step(scanned, tx)), tx, params, 4)
  assert_identical(found, runs(compiled(stored(scanned, tx)), tx, params, 4))
  if not wide:
    reason = f"a window in float32 of a parameter in {jnp.dtype(dtype)}"
    assert set(oc.describe(tx, params).stored.values()) == {reason}


def test_effects_of_the_loss_take_place(capfd):
  def loss(params, x):
    jax.debug.print("seen {}", x.shape[0])
    return scanned(params, x)

  tx, params = oc.cadence(adam(), 2), parameters()
  assert not adds_in_the_backward_pass(loss, tx, params)
  jax.block_until_ready(compiled(oc.training_step(loss, tx))(params, tx.init(params), batch(0)))
  jax.effects_barrier()
  assert capfd.readouterr().out == "seen 5\n"


@needs_references
def test_a_loss_may_close_over_what_is_traced():
  tx, params = oc.cadence(adam(), 2), parameters()

  @jax.jit
  def train(params, state, x, scale):
    step = oc.training_step(lambda p, x: scale * scanned(p, x), tx)
    return step(params, state, x)

  with jax.checking_leaks():
    _, _, value = train(params, tx.init(params), batch(0), jnp.float32(3.0))
  assert_near(value, 3 * scanned(params, batch(0)))


@pytest.mark.parametrize("accumulate", ["mean", "latest"])
def test_errors(accumulate):
  tx, params = oc.cadence(adam(), 2, accumulate=accumulate), parameters()
  state = tx.init(params)
  with pytest.raises(ValueError, match=r"oc.training_step\(loss, tx\), found a GradientTransf"):
    oc.training_step(scanned, optax.adam(1e-3))
  with pytest.raises(ValueError, match="loss must be a function, found 3"):
    oc.training_step(3, tx)
  with pytest.raises(ValueError, match=r"loss: expected a scalar .* float32 of shape \(5, 3\)"):
    oc.training_step(lambda p, x: x, tx)(params, state, batch(0))
  with pytest.raises(ValueError, match=r"loss: expected a scalar .* found a tuple"):
    oc.training_step(lambda p, x: (scanned(p, x), x), tx)(params, state, batch(0))
  with pytest.raises(ValueError, match=r"loss: expected a pair"):
    oc.training_step(scanned, tx, has_aux=True)(params, state, batch(0))
  with pytest.raises(ValueError, match="below 2, found 5"):
    oc.training_step(scanned, tx)(params, state, batch(0), phase=5)
  with pytest.raises(AttributeError, match="update was replaced"):
    oc.training_step(scanned, tx._replace(update=lambda *args: args))


def test_a_keyword_that_is_meant_for_the_loss_is_an_error():
  def loss(params, x, scale=1.0, *, shift=0.0):
    return scale * jnp.sum(params * x) + shift

  tx = oc.cadence(optax.sgd(0.5), 1)
  params, step = jnp.ones(2), oc.training_step(loss, tx)
  state = tx.init(params)
  for name, args in (("scale", [2.0]), ("shift", [2.0]), ("shift", [2.0, 3.0])):
    with pytest.raises(ValueError, match=f"{name}= is an argument of the loss"):
      step(params, state, *args, **{name: 0.5})
  # Not one that the loss has been given already, or does not know.
  assert step(params, state, 2.0, 3.0, scale=0.5, value=1.0)[-1] == 12.0


@needs_references
def test_a_state_of_other_parameters_is_an_error():
  tx, params = oc.cadence(adam(), 2), parameters()
  state = tx.init(params | {"w": jnp.zeros((2, WIDTH, WIDTH))})
  with pytest.raises(ValueError, match=r"'w': expected shape \(2, 3, 3\), found shape \(4, 3, 3\)"):
    compiled(oc.training_step(scanned, tx))(params, state, batch(0))


def program(step, tx, params, x, phase):
  jitted = jax.jit(step, donate_argnums=(0, 1), static_argnames="phase")
  state = jax.eval_shape(tx.init, params)
  return jitted.lower(params, state, x, phase=phase).compile()


@needs_references
@pytest.mark.usefixtures("optimized_programs")
@pytest.mark.parametrize("phase", [None, *(pytest.param(t, marks=pytest.mark.ci) for t in (2, 0))])
def test_no_gradient_of_scanned_layers_is_held(phase):
  params = {"w": jax.ShapeDtypeStruct((48, 64, 64), jnp.float32)}
  x, tx = jax.ShapeDtypeStruct((8, 64), jnp.float32), oc.cadence(adam(), 4)

  def loss(params, x):
    turn = lambda h, w: (jnp.tanh(h @ w), None)
    return jnp.sum(jax.lax.scan(turn, x, params["w"])[0])

  found, expected = (
    program(step, tx, params, x, phase).memory_analysis().temp_size_in_bytes
    for step in (oc.training_step(loss, tx), stored(loss, tx))
  )
  # All but the gradient of one layer, which is computed before it is added.
  assert expected - found >= 0.95 * 4 * params["w"].size


@pytest.mark.usefixtures("optimized_programs")
@pytest.mark.parametrize("phase", [None, 2, 0])
def test_layers_that_are_leaves_take_no_more(phase):
  params = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 12
  x, tx = jax.ShapeDtypeStruct((8, 64), jnp.float32), oc.cadence(adam(), 4)
  loss = lambda params, x: jnp.sum(functools.reduce(lambda h, w: jnp.tanh(h @ w), params, x))
  found, expected = (
    program(step, tx, params, x, phase).memory_analysis().temp_size_in_bytes
    for step in (oc.training_step(loss, tx), stored(loss, tx))
  )
  assert found <= expected + 1024  # beside a few scalars


@needs_references
@pytest.mark.usefixtures("optimized_programs")
@pytest.mark.parametrize("phase", [None, *(pytest.param(t, marks=pytest.mark.ci) for t in (1, 0))])
def test_no_gradient_of_layers_with_their_own_periods_is_held(phase):
  params = {"w": jax.ShapeDtypeStruct((48, 64, 64), jnp.float32)}
  every = {"w": oc.stacked([8] * 24 + [4] * 16 + [2] * 8)}
  x, tx = jax.ShapeDtypeStruct((8, 64), jnp.float32), oc.cadence(adam(), every)

  def loss(params, x):
    turn = lambda h, w: (jnp.tanh(h @ w), None)
    return jnp.sum(jax.lax.scan(turn, x, params["w"])[0])

  found, expected = (
    program(step, tx, params, x, phase).memory_analysis().temp_size_in_bytes
    for step in (oc.training_step(loss, tx), stored(loss, tx))
  )
  assert expected - found >= 0.95 * 4 * params["w"].size


@pytest.mark.parametrize(
  "every", [{"u": 1, "v": 3, "w": 1, "z": 3}, {"u": 3, "v": 1, "w": 3, "z": oc.stacked([1, 3])}]
)
@pytest.mark.parametrize(
  "wrap",
  [lambda fn: fn, *(pytest.param(x, marks=pytest.mark.ci) for x in (jax.checkpoint, jax.jit))],
)
def test_leaves_of_one_shape_are_told_apart(every, wrap):
  # Where JAX has mixed up which cotangents of a scan go to references and which do not.
  rng = np.random.default_rng(0)
  params = {name: jnp.asarray(rng.normal(size=(2, 2)), jnp.float32) for name in "uvwz"}
  params["shift"] = params["u"]

  def loss(params, x):
    shift = jnp.sin(params["shift"])

    def turn(h, rows):
      h = jnp.tanh(h @ params["v"] * rows["z"][None] + rows["u"][None] @ shift)
      return h @ params["w"] @ shift, rows["u"]

    h, rows = jax.lax.scan(turn, x, {name: params[name] for name in ("u", "z")})
    return jnp.sum(h**2) + jnp.sum(rows**2)

  tx = oc.cadence(adam(), every | {"shift": 2})
  step, other = (
    compiled(way(lambda p, x: wrap(loss)(p, x[:, :2]), tx)) for way in (oc.training_step, stored)
  )
  assert_near(runs(step, tx, params, 4), runs(other, tx, params, 4))


PERIODS = st.integers(1, 4)
ANY_LEAF = st.one_of(
  PERIODS,
  st.builds(lambda k, offset: oc.Every(k, offset % k), PERIODS, st.integers(0, 3)),
  st.builds(lambda slope: oc.Every(lambda t: 1 + slope * t), st.integers(0, 1)),
)
ANY_LAYERS = st.one_of(
  ANY_LEAF,
  st.builds(oc.stacked, st.lists(PERIODS, min_size=LAYERS, max_size=LAYERS).map(sorted)),
  st.builds(oc.channels, st.lists(PERIODS, min_size=2, max_size=3)),
)


@pytest.mark.ci
@settings(max_examples=12)
@given(
  loss=st.sampled_from([*ONE_USE, *SEVERAL_USES, apart]),
  every=st.fixed_dictionaries({"w": ANY_LAYERS, "b": ANY_LAYERS, "out": ANY_LEAF}),
  options=st.sampled_from([{}, {"accumulate": "sum"}, {"accumulate": "latest"}, OPTIONS["skip"]]),
  in_turns=st.booleans(),
)
def test_any_loss_and_any_cadence(loss, every, options, in_turns):
  tx = oc.cadence(oracle.relaxed(optax.sgd(0.1, momentum=0.9)), every, **options)
  params = parameters()
  if loss in NESTED:
    params = folded(params)
    tx = oc.cadence(oracle.relaxed(optax.sgd(0.1)), every | {"w": oc.stacked([2, 3]), "b": 2})
  step, other = compiled(oc.training_step(loss, tx)), compiled(stored(loss, tx))
  expected = runs(other, tx, params, 6)
  assert_near(runs([step, other] if in_turns else step, tx, params, 6), expected)
  if tx.cycle is not None:
    assert_near(runs(step, tx, params, 6, phases=True), expected)


def test_a_state_with_accumulators_of_another_dtype():
  tx, params = oc.cadence(adam(), 2), parameters()
  state = oc.cadence(adam(), 2, accumulator_dtype=jnp.bfloat16).init(params)
  found, expected = (
    compiled(way(scanned, tx))(params, state, batch(0)) for way in (oc.training_step, stored)
  )
  assert_identical(found, expected)
