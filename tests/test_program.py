"""The compiled program: what it copies, holds and computes."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import oracle
import pytest
from jax.extend.core import Literal
from states import groups

import optax_cadence as oc

pytestmark = pytest.mark.usefixtures("optimized_programs")

# Older compilers copy what a select could overwrite.
selects_in_place = pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="XLA copies")

SIZE = 96
PERIODS = {"a": 8, "b": 4, "c": 1}
LARGE = re.compile(rf"f32\[(?:{SIZE * SIZE}|{SIZE},{SIZE}|\d+,\d+,\d+)\]")


def parameters():
  return {name: jnp.full((SIZE, SIZE), 0.5, jnp.float32) for name in PERIODS}


def transformation(every=None, **options):
  return oc.cadence(
    oracle.relaxed(optax.adamw(1e-3)), PERIODS if every is None else every, **options
  )


def apply_program(tx, params, phase=None, **jit_options):
  step = jax.jit(tx.apply, static_argnames="phase", donate_argnums=(0, 1), **jit_options)
  return step.lower(params, tx.init(params), params, phase=phase)


def instructions(compiled, opcode):
  """Instructions of the optimized program, fused ones too, that yield a large array."""
  pattern = re.compile(rf"= (\S+) {opcode}\(")
  found = (pattern.search(line) for line in compiled.as_text().splitlines())
  return [m.group(0) for m in found if m and LARGE.search(m.group(1))]


LEAF = 4 * SIZE * SIZE


def temporaries(compiled):
  """Bytes of temporaries, beside a few scalars."""
  scalars = 1024
  return max(0, compiled.memory_analysis().temp_size_in_bytes - scalars)


@pytest.mark.parametrize("phase", [None, 0, 1, 4])
@pytest.mark.parametrize("accumulate", ["mean", "sum", "latest"])
def test_no_parameter_moment_or_accumulator_is_copied(phase, accumulate):
  compiled = apply_program(transformation(accumulate=accumulate), parameters(), phase).compile()
  assert instructions(compiled, "copy") == []


def test_held_micro_step_that_skips_nonfinite_copies_nothing():
  tx = transformation({"a": 8, "b": 4, "c": 2}, nonfinite="skip")
  compiled = apply_program(tx, parameters()).compile()
  entry = compiled.as_text().split("ENTRY")[1]
  assert instructions(compiled, "copy") == [] or not re.search(r" copy\(f32\[\d", entry)
  static = apply_program(tx, parameters(), phase=1).compile()
  assert instructions(static, "copy") == []


PARTS = {
  "quadrants": oc.quadrants([[1, 2], [4, 8]]),
  "bands of the last axis": oc.channels([1, 2, 4, 8] * 4),
  "bands of the first axis": oc.channels([1, 2, 4, 8] * 4, axis=0),
  "two bands": oc.channels([2, 4]),
  "two contiguous bands": oc.channels([2, 4], axis=0),
}


@pytest.mark.parametrize("phase", [None, 0, 1])
@pytest.mark.parametrize("cadence", PARTS.values(), ids=PARTS)
def test_no_copy_for_parts_of_a_leaf(cadence, phase):
  params, tx = {"w": jnp.ones((SIZE, SIZE))}, transformation({"w": cadence})
  compiled = apply_program(tx, params, phase).compile()
  assert instructions(compiled, "copy") == []
  assert temporaries(compiled) <= LEAF


NARROW = {
  "a period": (8, {}),
  "skipped": (8, {"nonfinite": "skip"}),
  "a random mask": (np.resize([1, 2, 8, 4, 2], (SIZE, SIZE)), {}),
}


@selects_in_place
@pytest.mark.parametrize("phase", [None, 0])
@pytest.mark.parametrize(("every", "options"), NARROW.values(), ids=NARROW)
def test_moments_that_are_rounded_are_not_copied(every, options, phase):
  params = {"w": jnp.full((SIZE, SIZE), 0.5, jnp.bfloat16)}
  compiled = apply_program(transformation(every, **options), params, phase).compile()
  assert not re.search(rf"\[{SIZE},{SIZE}\]\S* copy\(", compiled.as_text())
  # Whether entries are finite takes a bit of room.
  assert temporaries(compiled) < params["w"].nbytes / 4


@selects_in_place
@pytest.mark.parametrize(("phase", "most"), [(0, 34), (1, 10)])
def test_a_sum_that_is_read_for_the_last_time_is_not_written(phase, most):
  """Bytes of an entry: three loops read what they need of sum 4, gradient, moments, parameter 2."""
  params = {"w": jnp.full((512, 512), 0.5, jnp.bfloat16)}
  compiled = apply_program(transformation(8), params, phase).compile()
  assert compiled.cost_analysis()["bytes accessed"] <= 1.01 * most * params["w"].size


def test_an_optimizer_with_products_runs_once_where_its_moments_are_rounded():
  params = {"w": jnp.full((SIZE, SIZE), 0.5, jnp.bfloat16)}
  tx = oc.cadence(oracle.relaxed(optax.contrib.muon(1e-3)), 4)
  plain = jax.tree.map(lambda p: p.astype(jnp.float32), params)
  programs = [apply_program(tx, p).as_text() for p in (params, plain)]
  assert programs[0].count("dot_general") == programs[1].count("dot_general") > 0


def test_update_carries_no_array_of_updates():
  params = {name: jnp.ones((SIZE, SIZE)) for name in "abcdef"}
  tx = transformation(8)

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile()
  assert instructions(compiled, "copy") == []
  assert temporaries(compiled) == 0


@selects_in_place
@pytest.mark.parametrize("phase", [None, 0, 1])
def test_skipping_nonfinite_microbatches_takes_no_copies(phase):
  tx = transformation(nonfinite="skip")
  compiled = apply_program(tx, parameters(), phase).compile()
  assert instructions(compiled, "copy") == []
  assert temporaries(compiled) <= LEAF


@selects_in_place
def test_a_batch_of_periods_is_selected_without_copies():
  def step(period, params, state, grads):
    return transformation(period).apply(params, state, grads)

  periods = jnp.array([1, 2, 4, 8])
  params = {"w": jnp.ones((4, SIZE, SIZE))}
  state = jax.vmap(lambda period, p: transformation(period).init(p))(periods, params)
  batched = jax.jit(jax.vmap(step), donate_argnums=(1, 2))
  compiled = batched.lower(periods, params, state, params).compile()
  assert instructions(compiled, "copy") == []
  assert temporaries(compiled) == 0


def test_every_donated_buffer_becomes_its_own_successor():
  params = parameters()
  tx = transformation()
  # Whether a group has fired is written at every micro-step, and never read.
  compiled = apply_program(tx, params, keep_unused=True).compile()
  header = compiled.as_text().splitlines()[0]
  pairs = re.findall(r"\{(\d+)\}: \((\d+), \{\}", header)
  inputs = jax.tree.leaves((params, tx.init(params)))
  assert len(pairs) == len(inputs)
  assert all(output == argument for output, argument in pairs)


def test_temporaries_stay_below_one_leaf():
  assert temporaries(apply_program(transformation(), parameters()).compile()) <= LEAF


def test_held_micro_step_with_static_phase_touches_accumulators_alone():
  params = {"a": jnp.ones((SIZE, SIZE)), "b": jnp.ones((SIZE, SIZE))}
  tx = transformation({"a": 8, "b": 4})
  jaxpr = jax.make_jaxpr(lambda *args: tx.apply(*args, phase=1))(params, tx.init(params), params)
  n_params, n_state = len(params), len(jax.tree.leaves(tx.init(params)))
  used = {v for eqn in jaxpr.jaxpr.eqns for v in eqn.invars if not isinstance(v, Literal)}
  large = [v for v in jaxpr.jaxpr.invars[: n_params + n_state] if v.aval.ndim == 2]
  accumulators = [v for v in large if v in used]
  assert len(large) == n_params + 3 * n_params
  assert len(accumulators) == n_params
  assert not {"while", "cond"} & {eqn.primitive.name for eqn in jaxpr.jaxpr.eqns}


def test_static_phase_leaves_no_branch():
  for phase in range(8):
    text = apply_program(transformation(), parameters(), phase).as_text()
    assert "while" not in text and "conditional" not in text and "stablehlo.case" not in text


def test_period_one_has_no_accumulator_and_no_branch():
  tx = oc.cadence(optax.adam(1e-3), 1)
  plain = optax.adam(1e-3).init(parameters())
  (group,) = groups(tx.init(parameters()))
  assert group.accumulators is None and group.window is None and group.remaining is None
  assert jax.tree.structure(group.inner_state) == jax.tree.structure(plain)
  text = apply_program(transformation(1), parameters()).as_text()
  assert "stablehlo.while" not in text and "stablehlo.case" not in text


def test_accumulators_cover_slow_regions_only():
  tx = oc.cadence(optax.sgd(1.0), {"w": oc.quadrants([[1, 2], [4, 1]])})
  state = tx.init({"w": jnp.ones((SIZE, SIZE))})
  accumulators = [g.accumulators for g in groups(state)]
  assert sum(x.size for x in jax.tree.leaves(accumulators)) == SIZE * SIZE // 2


def test_latest_allocates_no_accumulator():
  state = oc.cadence(optax.sgd(1.0), 8, accumulate="latest").init(parameters())
  assert groups(state)[0].accumulators is None


@pytest.mark.parametrize(
  ("platform", "phase"),
  [
    *(("tpu", None), ("cuda", None), ("cpu", None), ("tpu", 0), ("cuda", 1)),
    *(
      pytest.param(platform, phase, marks=pytest.mark.ci)
      for platform, phase in [("tpu", 1), ("cuda", 0), ("cpu", 0), ("cpu", 1)]
    ),
  ],
)
def test_lowers_for_every_platform(platform, phase):
  params = parameters() | {"grid": jnp.ones((8, 8))}
  every = PERIODS | {"grid": oc.quadrants([[1, 2], [4, 8]])}
  tx = transformation(every, nonfinite="skip")
  state = tx.init(params)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, state))
  update = jax.jit(lambda g, s, p: tx.update(g, s, p, phase=phase))
  apply = jax.jit(lambda p, s, g: tx.apply(p, s, g, phase=phase))
  for fn, args in ((update, (shapes[0], shapes[1], shapes[0])), (apply, (*shapes, shapes[0]))):
    exported = jax.export.export(fn, platforms=[platform])(*args)
    assert exported.platforms == (platform,)
    assert "module" in exported.mlir_module()


def test_one_trace_serves_every_micro_step():
  tx, traces = transformation(), []

  @jax.jit
  def step(params, state, grads):
    traces.append(1)
    return tx.apply(params, state, grads)

  params = parameters()
  state = tx.init(params)
  for _ in range(9):
    params, state = step(params, state, parameters())
  assert len(traces) == 1


def test_trainable_drops_the_backward_pass_of_regions_that_are_not_due():
  params = {"a": jnp.ones((SIZE, SIZE)), "b": jnp.ones((SIZE, SIZE))}
  tx = transformation({"a": 8, "b": 1}, accumulate="latest")

  def flops(phase):
    def loss(params, x):
      params = oc.trainable(params, tx, phase)
      return jnp.sum(jnp.tanh(x @ params["a"]) @ params["b"])

    cost = jax.jit(jax.grad(loss)).lower(params, jnp.ones((SIZE, SIZE))).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]

  product = 2 * SIZE**3
  # Due: forward a, forward b, weight gradients of both, data gradient of b. b alone: two fewer.
  assert flops(0) - flops(1) >= 1.9 * product
