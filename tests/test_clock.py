"""Which micro-step a schedule inside the inner optimizer reads."""

import functools
import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax_exports
import oracle
import pytest
from small_tree import assert_close
from small_tree import assert_identical
from small_tree import BATCHES
from small_tree import cadence
from small_tree import PARAMS
from small_tree import STEPS
from small_tree import subtree
from small_tree import trained
from states import groups

import optax_cadence as oc

SCHEDULE = optax.linear_schedule(1.0, 0.0, 16)  # Dyadic at every whole number.


@pytest.mark.parametrize("injected", [False, True], ids=["schedule", "inject_hyperparams"])
def test_clock_of_micro_steps_leaves_period_one_as_the_plain_optimizer(injected):
  make = optax.inject_hyperparams(optax.adam) if injected else optax.adam
  inner = oracle.relaxed(make(learning_rate=SCHEDULE))
  tx = oc.cadence(inner, {"body": 4, "head": 1}, clock="micro_steps")
  params, state = PARAMS, tx.init(PARAMS)
  head, plain = {"head": PARAMS["head"]}, inner.init({"head": PARAMS["head"]})
  plain_update, update = jax.jit(inner.update), jax.jit(tx.update)
  for grads in BATCHES:
    updates, state = update(grads, state, params)
    expected, plain = plain_update({"head": grads["head"]}, plain, head)
    assert_identical(updates["head"], expected["head"])
    params = optax.apply_updates(params, updates)
    head = optax.apply_updates(head, expected)
  assert_identical(jax.tree.leaves(groups(state)[1].inner_state), jax.tree.leaves(plain))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("clock", ["updates", "micro_steps"])
@pytest.mark.parametrize("injected", [False, True], ids=["schedule", "inject_hyperparams"])
def test_clock_decides_where_a_slow_group_reads_its_schedule(injected, clock, static):
  make = optax.inject_hyperparams(optax.sgd) if injected else optax.sgd
  tx = cadence(make(learning_rate=SCHEDULE), {"body": 4, "head": 1}, clock=clock)
  state = tx.init(PARAMS)
  update = jax.jit(tx.update, static_argnames="phase")
  for t, grads in enumerate(BATCHES, start=1):
    phase = {"phase": t % 4} if static else {}
    updates, state = update(grads, state, PARAMS, **phase)
    count = t - 1 if clock == "micro_steps" else t // 4 - 1
    window = [g["body"]["bias"] for g in BATCHES[max(t - 4, 0) : t]]
    expected = -SCHEDULE(count) * sum(window) / 4 if t % 4 == 0 else jnp.zeros(6)
    assert_close(updates["body"]["bias"], expected)
    assert_close(updates["head"], -SCHEDULE(t - 1) * grads["head"])
  # One micro-step after the second window: a flush reads the schedule where training stands.
  updates, _ = tx.flush(state, PARAMS)
  rate = SCHEDULE(STEPS - 1) if clock == "micro_steps" else SCHEDULE(2)
  assert_close(updates["body"]["bias"], -rate * BATCHES[-1]["body"]["bias"])


@pytest.mark.parametrize("injected", [False, True], ids=["schedule", "inject_hyperparams"])
def test_clock_of_micro_steps_leaves_the_count_of_adam_alone(injected):
  make = optax.inject_hyperparams(optax.adam) if injected else optax.adam
  tx = cadence(make(learning_rate=SCHEDULE), {"body": 4, "head": 1}, clock="micro_steps")
  _, state = trained(tx)
  counts = [int(s.count) for s in subtree(groups(state), optax.ScaleByAdamState)]
  assert counts == [2, 9]
  kind = type(groups(state)[0].inner_state) if injected else optax.ScaleByScheduleState
  clocks = [int(s.count) for s in subtree(groups(state), kind)]
  assert clocks == [8, 9]


def test_clock_of_micro_steps_under_a_schedule_of_periods():
  growing = lambda done: jnp.where(done < 3, 1, 3)  # Due at 1, 2, 3, 6, 9.
  tx = cadence(optax.sgd(SCHEDULE), oc.Every(growing), clock="micro_steps")
  state, update, start = tx.init(PARAMS), jax.jit(tx.update), 0
  for t, grads in enumerate(BATCHES, start=1):
    updates, state = update(grads, state, PARAMS)
    if t in (1, 2, 3, 6, 9):
      mean = sum(g["head"] for g in BATCHES[start:t]) / (t - start)
      assert_close(updates["head"], -SCHEDULE(t - 1) * mean)
      start = t
    else:
      assert not updates["head"].any()


# Every schedule that an optimizer of Optax takes.


def second_update(inner, extra, done=None, clock="updates"):
  """The second update; with `done`, that of a cadence that begins after so many micro-steps."""
  params = {"b": jnp.array([1.0, -0.5]), "w": jnp.array([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]])}
  grads = {"b": jnp.array([-0.5, 1.0]), "w": jnp.array([[0.5, 0.25, -1.0], [1.0, -0.5, 0.75]])}
  tx = inner = oracle.relaxed(inner)
  state = inner.init(params)
  if done is not None:
    tx = oc.cadence(inner, 1, clock=clock)
    state = tx.init(params)._replace(micro_step=jnp.int32(done))
  for _ in range(2):
    updates, state = tx.update(grads, state, params, **extra)
  return np.concatenate(jax.tree.leaves(jax.tree.map(jnp.ravel, updates)))


def takes_schedules():
  """Every optimizer of Optax, with each of its parameters that may be a schedule."""
  cases = []
  for name in optax_exports.NAMES:
    for p in inspect.signature(optax_exports.exported()[name]).parameters.values():
      if p.annotation == optax.Schedule or optax.Schedule in typing.get_args(p.annotation):
        cases.append((name, p.name))
  return cases


# Those that read it by a counter of their own. No newer optimizer joins them without a word.
REFUSED = {
  ("contrib.ademamix", "alpha"),
  ("contrib.ademamix", "b3"),
  ("contrib.dadapt_adamw", "learning_rate"),
  ("contrib.madgrad", "learning_rate"),
  ("contrib.momo", "learning_rate"),
  ("contrib.momo_adam", "learning_rate"),
  ("contrib.prodigy", "learning_rate"),
  ("contrib.scale_by_ademamix", "alpha"),
  ("contrib.scale_by_ademamix", "b3"),
  ("contrib.scale_by_madgrad", "learning_rate"),
  ("contrib.scale_by_simplified_ademamix", "alpha"),
  ("contrib.schedule_free", "learning_rate"),
  ("contrib.simplified_ademamix", "alpha"),
}
# Optax declares that they take a schedule, and fails on one.
TAKES_NONE = {
  ("novograd", "weight_decay"),
  ("optimistic_gradient_descent", "alpha"),
  ("optimistic_gradient_descent", "beta"),
}
if optax.__version__ == "0.2.5":
  TAKES_NONE |= {(f"contrib.{x}simplified_ademamix", "alpha") for x in ("", "scale_by_")}
# The others are all made of the same few parts.
FEW = {"adamw", "adafactor", "add_decayed_weights", "fromage", "scale_by_schedule", "sgd"}
CASES = [
  pytest.param(*case, marks=[] if case in REFUSED or case[0] in FEW else pytest.mark.ci)
  for case in sorted(set(takes_schedules()) - TAKES_NONE)
]


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_every_schedule_of_optax_counts_micro_steps_or_is_refused(name, parameter):
  extra = optax_exports.EXTRA_ARGS.get(name, {})
  build = lambda schedule: optax_exports.build(name, **{parameter: schedule})
  scale = 50.0 if parameter == "alpha" else 0.05  # of moments that are small at first
  schedule = lambda count: scale * (1.0 + count)
  inner = build(schedule)
  if (name, parameter) in REFUSED:
    with pytest.raises(ValueError, match=rf"{parameter} .*inject_hyperparams") as caught:
      oc.cadence(inner, 4, clock="micro_steps")
    assert name.split(".")[-1].removeprefix("scale_by_") in str(caught.value)
    oc.cadence(inner, 4)
    given = {k: v for k, v in optax_exports.arguments_of(name).arguments.items() if v is not None}
    factory = optax.inject_hyperparams(optax_exports.exported()[name])
    inner = factory(**given | {parameter: schedule})
  found = second_update(inner, extra, done=7, clock="micro_steps")
  later = 6 if name == "contrib.schedule_free" else 7  # it counts from 1
  expected = second_update(build(lambda count: schedule(count + later)), extra)
  # What is injected is rounded to float32 before it is taken from 1.
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
  other = second_update(build(schedule), extra)
  assert not np.allclose(other, expected, rtol=1e-3), "the schedule makes no difference"


MOMO = optax.contrib.momo(SCHEDULE)


def its_own_way():
  def update(grads, state, params=None, **extra):
    return MOMO_HELD.update(grads, state, params, **extra)

  MOMO_HELD = MOMO
  return optax.GradientTransformationExtraArgs(MOMO.init, jax.jit(update))


@pytest.mark.parametrize(
  "inner",
  [
    optax.chain(optax.clip(1.0), MOMO),
    optax.named_chain(("momo", MOMO)),
    optax.partition({"a": optax.sgd(0.1), "b": MOMO}, {"body": "a", "head": "b"}),
    optax.masked(MOMO, {"body": True, "head": False}),
    optax.apply_if_finite(MOMO, 2),
    optax.MultiSteps(MOMO, 2).gradient_transformation(),
    optax.lookahead(MOMO, 2, 0.5),
    optax.flatten(MOMO),
    oc.cadence(MOMO, 2),
    oc.chain(optax.clip(1.0), oc.cadence(MOMO, 2)),
    optax.inject_hyperparams(functools.partial(optax.contrib.momo, SCHEDULE))(beta=0.5),
    optax.inject_hyperparams(optax.contrib.schedule_free_sgd, "warmup_steps")(warmup_steps=4),
    oracle.relaxed(optax.inject_hyperparams(lambda beta: MOMO)(beta=0.5)),
    optax.GradientTransformationExtraArgs(MOMO.init, functools.partial(MOMO.update, value=1.0)),
    its_own_way(),
  ],
)
def test_a_schedule_that_cannot_be_set_is_found_wherever_it_is(inner):
  with pytest.raises(ValueError, match="micro_steps.*(momo|schedule_free) .*inject_hyperparams"):
    oc.cadence(inner, 4, clock="micro_steps")


def test_what_is_no_schedule_of_a_counter_is_not_refused():
  """Masks, conditions, rates that are functions of anything else, and constants."""

  def own_state(rate):
    init = lambda params: optax.ScaleByScheduleState(jnp.int32(0))
    update = lambda grads, state, params=None: (jax.tree.map(rate, grads), state)
    return optax.GradientTransformation(init, update)

  for inner in [
    optax.adamw(0.1, mask=lambda params: True),
    optax.adafactor(SCHEDULE),
    optax.contrib.adopt(SCHEDULE, clip_value_fn=lambda count: count**0.25),
    optax.contrib.momo(0.1),
    optax.contrib.muon(SCHEDULE, adam_learning_rate=SCHEDULE)
    if "adam_learning_rate" in inspect.signature(optax.contrib.muon).parameters
    else optax.contrib.muon(SCHEDULE),
    optax.contrib.sam(optax.sgd(SCHEDULE), optax.sgd(0.1)),
    optax.conditionally_transform(optax.sgd(SCHEDULE), lambda step: step < 2),
    optax.masked(optax.sgd(SCHEDULE), lambda params: True),
    optax.inject_hyperparams(optax.contrib.momo)(SCHEDULE),
    own_state(lambda x: x),
  ]:
    oc.cadence(inner, 4, clock="micro_steps")


def test_clock_of_micro_steps_reaches_into_wrappers():
  """A schedule inside of wrappers that count by themselves stands at the micro-step as well."""
  rate = lambda count: jnp.where(count >= 4, 0.0, 0.5)
  sgd = optax.sgd(rate)
  sgd = optax.MultiSteps(optax.sgd(rate), 1).gradient_transformation()
  inner = optax.chain(
    optax.masked(optax.identity(), {"b": True, "w": False}),
    optax.partition({"all": optax.apply_if_finite(sgd, 2)}, {"b": "all", "w": "all"}),
  )
  assert second_update(inner, {}).all()
  assert second_update(inner, {}, done=2, clock="micro_steps").all()
  assert not second_update(inner, {}, done=3, clock="micro_steps").any()
