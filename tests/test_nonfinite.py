"""Gradients that are not finite: skipped region by region, or passed on to their own window."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import optax_exports
import oracle
import pytest
from small_tree import assert_close
from small_tree import assert_identical
from small_tree import BATCHES
from small_tree import cadence
from small_tree import dyadic
from small_tree import LEAFWISE
from small_tree import PARAMS
from small_tree import PIECES
from states import groups

import optax_cadence as oc


def poison(batches, where):
  """The batches with entries set: from micro-step to pairs of a path and a value."""
  batches = [jax.tree.map(np.array, grads) for grads in batches]
  for t, spots in where.items():
    for (name, index), value in spots:
      leaf = batches[t - 1]["head"] if name == "head" else batches[t - 1]["body"][name]
      leaf[index] = value
  return [jax.tree.map(jnp.asarray, grads) for grads in batches]


NAN, INF = float("nan"), float("inf")
FAST, RIGHT, LEFT, CORNER = (0, 0), (1, 5), (3, 0), (3, 5)  # One entry in each quadrant.
BAD = {
  1: [(("bias", 0), INF)],
  2: [(("bias", 1), NAN), (("kernel", FAST), NAN)],
  # The first window of the bias is now empty.
  3: [(("bias", 2), -INF), (("kernel", LEFT), NAN)],
  # So is the second of one quadrant of period 2.
  4: [(("kernel", LEFT), NAN), (("head", 0), NAN)],
  # And the third of everything with period 2.
  5: [(("head", 1), NAN), (("kernel", RIGHT), NAN), (("kernel", LEFT), INF)],
  6: [(("head", 1), NAN), (("kernel", RIGHT), NAN), (("kernel", LEFT), INF)],
  # Nothing of period 1 is left here.
  7: [(("kernel", FAST), NAN), (("kernel", CORNER), INF)],
}
# Groups stand in order of appearance: the bias; the kernel's 1 and 2; the head is with the 2.
SKIPPED = [[3], [2, 1], [2, 4, 3]]


def skip_by_loop(inner, batches):
  """Updates of every micro-step: a window and an instance of the inner optimizer per tensor."""
  inner, params = oracle.relaxed(inner), jax.tree.leaves(PARAMS)
  tensors = [(i, p) for i, pieces in enumerate(PIECES) for p in pieces]
  states = [inner.init(params[i][p.index]) for i, p in tensors]
  windows = [[] for _ in tensors]
  for t, grads in enumerate(batches, start=1):
    leaves = list(map(np.asarray, jax.tree.leaves(grads)))
    updates = [np.zeros_like(leaf) for leaf in leaves]
    for n, (i, p) in enumerate(tensors):
      if np.isfinite(leaves[i][p.index]).all():
        windows[n].append(leaves[i][p.index])
      if t % p.period == p.offset and windows[n]:
        mean = jnp.asarray(sum(windows[n]) / np.float32(len(windows[n])))
        update, states[n] = inner.update(mean, states[n], params[i][p.index])
        updates[i][p.index] = update
        windows[n] = []
      elif t % p.period == p.offset:
        windows[n] = []
    yield updates


@pytest.mark.parametrize("how", ["update", "apply", "static apply"])
def test_skip_leaves_out_a_bad_batch_region_by_region(how):
  inner = optax.sgd(0.5, momentum=0.5)
  tx = cadence(inner, nonfinite="skip")
  batches = poison(BATCHES, BAD)
  params, state = PARAMS, tx.init(PARAMS)
  leaves = jax.tree.leaves(PARAMS)
  apply = jax.jit(tx.apply, static_argnames="phase")
  update = jax.jit(tx.update, static_argnames="phase")
  for t, expected in enumerate(skip_by_loop(inner, batches), start=1):
    phase = t % 4 if how.startswith("static") else None
    leaves = optax.apply_updates(leaves, expected)
    if how.endswith("apply"):
      params, state = apply(params, state, batches[t - 1], phase=phase)
    else:
      updates, state = update(batches[t - 1], state, params, phase=phase)
      for found, want in zip(jax.tree.leaves(updates), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(found) == 0, want == 0)
      params = optax.apply_updates(params, updates)
    assert_close(params, leaves)
  assert [group.skipped.tolist() for group in groups(state)] == SKIPPED


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_skip_an_empty_window_leaves_the_inner_state_bit_for_bit(static):
  tx = cadence(optax.adamw(0.1), nonfinite="skip")
  update = jax.jit(tx.update, static_argnames="phase")
  batches, states = poison(BATCHES, BAD), [tx.init(PARAMS)]
  for t, grads in enumerate(batches, start=1):
    phase = t % 4 if static else None
    states.append(update(grads, states[-1], PARAMS, phase=phase)[1])
  inner = lambda t, group: groups(states[t])[group].inner_state
  # Every window of the group is empty when it is due: nothing moves, the counter neither.
  assert_identical(inner(3, 0), inner(0, 0))
  assert_identical(inner(7, 1), inner(6, 1))
  assert_identical(inner(6, 2), inner(4, 2))
  # One of the windows is empty, beside others that fire.
  for old, new, empty, fired in [
    (inner(1, 1), inner(2, 1), 0, 1),
    (inner(2, 2), inner(4, 2), 1, 0),
  ]:
    assert int(new[0].count) == int(old[0].count) + 1
    for name in ("mu", "nu"):
      before = getattr(old[0], name)["body"]["kernel"]
      after = getattr(new[0], name)["body"]["kernel"]
      assert_identical(after[empty], before[empty])
      assert bool((after[fired] != before[fired]).any())


@pytest.mark.parametrize(
  ("accumulate", "static"), [("mean", False), ("mean", True), ("sum", False), ("latest", False)]
)
def test_skip_nothing_but_bad_batches_change_counters_alone(accumulate, static):
  tx = cadence(optax.adamw(0.1), LEAFWISE, accumulate=accumulate, nonfinite="skip")
  apply = jax.jit(tx.apply, static_argnames="phase")
  carry = PARAMS, tx.init(PARAMS)
  for t, grads in enumerate(BATCHES[:4], start=1):
    carry = apply(*carry, grads, phase=t % 4 if static else None)
  start, bad = carry, jax.tree.map(lambda g: jnp.full_like(g, NAN), PARAMS)
  for t in range(5, 13):
    carry = apply(*carry, bad, phase=t % 4 if static else None)
  inner = lambda carry: [group.inner_state for group in groups(carry[1])]
  assert_identical((carry[0], inner(carry)), (start[0], inner(start)))
  assert [group.skipped.tolist() for group in groups(carry[1])] == [[8], [8], [8]]
  # The next good batches train as ever.
  before = carry[0]
  for t in range(13, 17):
    carry = apply(*carry, BATCHES[0], phase=t % 4 if static else None)
  for a, b in zip(*map(jax.tree.leaves, (carry[0], before)), strict=True):
    assert bool(jnp.isfinite(a).all() and (a != b).any())


def test_skip_flush_applies_what_is_finite():
  tx = cadence(optax.sgd(1.0), accumulate="sum", nonfinite="skip")
  apply, flush = jax.jit(tx.apply), jax.jit(tx.flush)
  batches = poison(BATCHES, BAD)
  carry = PARAMS, tx.init(PARAMS)
  for grads in batches:
    carry = apply(*carry, grads)
  updates, state = flush(carry[1], carry[0])
  found = optax.apply_updates(carry[0], updates)
  kept = [np.zeros_like(x) for x in jax.tree.leaves(PARAMS)]
  for grads in batches:
    for i, leaf in enumerate(map(np.asarray, jax.tree.leaves(grads))):
      for p in PIECES[i]:
        if np.isfinite(leaf[p.index]).all():
          kept[i][p.index] += leaf[p.index]
  expected = [p - k for p, k in zip(jax.tree.leaves(PARAMS), kept, strict=True)]
  assert_identical(jax.tree.leaves(found), expected)
  assert all(not group.window.any() for group in groups(state) if group.window is not None)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_propagate_reaches_the_update_of_its_own_window_and_no_other(static):
  tx = cadence(optax.sgd(1.0))
  update = jax.jit(tx.update, static_argnames="phase")
  for bad in (NAN, INF):
    spots = [(("bias", 0), bad), (("kernel", RIGHT), bad), (("kernel", FAST), bad)]
    batches = poison(BATCHES, {2: spots})
    state, clean = tx.init(PARAMS), oracle.Oracle(optax.sgd(1.0), jax.tree.leaves(PARAMS), PIECES)
    for t, grads in enumerate(batches, start=1):
      phase = t % 4 if static else None
      updates, state = update(grads, state, PARAMS, phase=phase)
      expected = clean.step(jax.tree.leaves(BATCHES[t - 1]), jax.tree.leaves(PARAMS))
      if t == 2:
        expected[1][RIGHT] = expected[1][FAST] = -bad
      if t == 3:
        expected[0][0] = -bad
      assert_close(updates, expected)


def labels(tree):
  return jax.tree.map(lambda x: "adam" if x.ndim == 1 else "sgd", tree)


MATRICES = {"where": lambda path, x: x.ndim == 2}
INNERS = {
  "chain": optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1)),
  "partition": optax.partition({"adam": optax.adam(0.1), "sgd": optax.sgd(0.1, 0.9)}, labels),
  "masked": optax.masked(optax.adam(0.1), lambda tree: jax.tree.map(lambda x: x.ndim == 2, tree)),
  "multi steps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
  "hyperparameters": optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.5, 0.1, 4)),
  "if finite": optax.apply_if_finite(optax.adam(0.1), 3),
  # Several arrays in the place of one parameter.
  "sm3": optax.sm3(0.1),
  "muon": optax.contrib.muon(0.1),
  "cadence": oc.cadence(optax.adam(0.1), 2),
  "random mask": oc.cadence(optax.adam(0.1), {"b": 2, "k": 1, "m": np.array([[1, 2], [2, 1]])}),
  "prune": oc.prune(0.5, every=3, inner=optax.adam(0.1), **MATRICES),
  "prune to bools": oc.prune(0.5, every=1, inner=optax.adam(0.1), packed=False, **MATRICES),
  "movement": oc.prune(
    0.5, every=2, criterion=oc.pruning.movement(), inner=optax.adam(0.1), **MATRICES
  ),
  "shocks": optax.chain(optax.adam(0.1), oc.prune(0.5, every=2, hold=False, **MATRICES)),
}
TRIO = {"b": jnp.arange(1.0, 4) / 4, "k": jnp.arange(1.0, 13).reshape(4, 3) / 8, "m": jnp.eye(2)}
SHAPES = jax.tree.map(jnp.shape, TRIO)


def beside_a_bad_leaf(inner, bad, every=2, **extra_args):
  """Parameters and states of a run in which a leaf is never finite, and of one without it."""
  tx, alone = (cadence(x, every, nonfinite="skip") for x in (inner, only_without(inner, bad)))
  carry = TRIO, tx.init(TRIO)
  without = {name: x for name, x in TRIO.items() if name != bad}
  other = without, alone.init(without)
  apply, apply_alone = (jax.jit(lambda *a, x=x: x.apply(*a, **extra_args)) for x in (tx, alone))
  start = carry
  for t in range(6):
    grads = dyadic(t, SHAPES)
    carry = apply(*carry, grads | {bad: jnp.full_like(grads[bad], NAN)})
    other = apply_alone(*other, {name: grads[name] for name in without})
  return start, carry, other


def only_without(inner, bad):
  """The inner optimizer; a tree that it was given loses the leaf that is not there."""
  if inner is INNERS["random mask"]:
    every = {"b": 2, "k": 1, "m": np.array([[1, 2], [2, 1]])}
    return oc.cadence(optax.adam(0.1), {name: x for name, x in every.items() if name != bad})
  return inner


def of_leaf(state, name):
  """What an inner state has of a parameter, by its place in the state."""
  flat, _ = jax.tree_util.tree_flatten_with_path(groups(state)[0].inner_state)
  key = jax.tree_util.DictKey(name)
  return {jax.tree_util.keystr(path): x for path, x in flat if key in path}


def assert_that_a_bad_leaf_is_as_if_it_were_not_there(inner, bad, **extra_args):
  start, carry, other = beside_a_bad_leaf(inner, bad, **extra_args)
  assert_identical(carry[0][bad], start[0][bad])
  assert_identical(of_leaf(carry[1], bad), of_leaf(start[1], bad))
  for name in other[0]:
    assert_close(carry[0][name], other[0][name])
    found, expected = of_leaf(carry[1], name), of_leaf(other[1], name)
    assert found.keys() == expected.keys()
    for place, x in expected.items():
      # Masks are whole numbers.
      (assert_close if jnp.issubdtype(x.dtype, jnp.inexact) else assert_identical)(found[place], x)


@pytest.mark.ci
@pytest.mark.parametrize(
  ("name", "bad"), [*((name, "k") for name in INNERS), ("chain", "b"), ("prune", "b")]
)
def test_skip_a_leaf_that_is_never_finite_is_as_if_it_were_not_there(name, bad):
  assert_that_a_bad_leaf_is_as_if_it_were_not_there(INNERS[name], bad)


# What these draw depends on how many parameters there are; the last is an error, see below.
NOT_ALONE = {"add_noise", "noisy_sgd", "contrib.sophia", "flatten"}


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", sorted(set(optax_exports.NAMES) - NOT_ALONE))
def test_skip_beside_a_bad_leaf_in_every_optimizer(name):
  inner = optax_exports.build(name)
  extra_args = optax_exports.EXTRA_ARGS.get(name, {})
  assert_that_a_bad_leaf_is_as_if_it_were_not_there(inner, "k", **extra_args)


def test_skip_an_optimizer_that_mixes_the_parameters_is_an_error():
  tx = cadence(optax.flatten(optax.adam(0.1)), 2, nonfinite="skip")
  with pytest.raises(ValueError, match="tree_map_params"):
    tx.init(PARAMS)


def test_skip_a_field_under_other_names_is_an_error_that_says_which():
  joined = lambda tree: {f"of_{name}": x for name, x in tree.items()}

  def init(params):
    # As `tree_map_params` asks for it, or by names that are not those of the parameters.
    return joined(params) if isinstance(params, dict) else jnp.int32(0)

  inner = optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
  tx = cadence(inner, 2, nonfinite="skip")
  with pytest.raises(ValueError, match="'of_b', 'of_k', 'of_m' where its parameters are 'b', 'k'"):
    tx.init(TRIO)


# What is in their states depends on how many axes a tensor has.
@pytest.mark.ci
@pytest.mark.parametrize("name", ["movement", "partition"])
def test_skip_a_quadrant_that_is_never_finite_is_as_if_it_were_not_there(name):
  kernel, inner = dyadic(100, (4, 6)), INNERS[name]
  tx = cadence(inner, oc.quadrants([[2, 2], [2, 2]]), nonfinite="skip")
  alone = cadence(inner, 2)
  cut = lambda x: [x[:2, :3], x[:2, 3:], x[2:, 3:]]
  carry, other = ((p, x.init(p)) for x, p in ((tx, kernel), (alone, cut(kernel))))
  apply, apply_alone = jax.jit(tx.apply), jax.jit(alone.apply)
  for t in range(6):
    grads = dyadic(t, (4, 6))
    carry = apply(*carry, grads.at[2:, :3].set(NAN))
    other = apply_alone(*other, cut(grads))
  assert_close(cut(carry[0]), other[0])
  assert_identical(carry[0][2:, :3], kernel[2:, :3])
  assert bool((carry[0][:2] != kernel[:2]).all())
