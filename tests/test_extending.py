"""What somebody adds in a file of their own: a kind of region, a policy, a pruning criterion.

`docs/inside.md` shows one of each; here is what the protocols promise beyond that, and what they
say to a mistake.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cadence as oc
from optax_cadence import pruning
from optax_cadence.regions.cuts import Box
from optax_cadence.regions.cuts import Entries
from optax_cadence.regions.partitions import Partition

PARAMS = {"w": jnp.arange(1.0, 13.0).reshape(3, 4), "b": jnp.ones(4)}
DISTANCE = np.abs(np.subtract.outer(np.arange(3), np.arange(4)))


@dataclasses.dataclass(frozen=True, eq=False)
class Rows(Partition):
  """The first row, and the others."""

  first: Any
  others: Any

  @property
  def cells(self):
    return [self.first, self.others]

  def map(self, fn):
    return dataclasses.replace(self, first=fn(self.first), others=fn(self.others))

  def cut(self, shape, key):
    if len(shape) != 2:
      raise ValueError("Rows cuts matrices")
    n, m = shape
    return [(self.first, Box(((0, 1), (0, m)))), (self.others, Box(((1, n), (0, m))))]


class Near(Rows):
  """What is near the diagonal, and the rest."""

  def cut(self, shape, key):
    near = np.flatnonzero(DISTANCE < 2).astype(np.int32)
    far = np.flatnonzero(DISTANCE >= 2).astype(np.int32)
    return [(self.first, Entries(near)), (self.others, Entries(far))]


class NearInOnePass(Near):
  has_entries = True


class Mixed(Rows):
  """The first row as a rectangle, the others as entries."""

  has_entries = True

  def cut(self, shape, key):
    others = np.arange(shape[1], shape[0] * shape[1], dtype=np.int32)
    return [(self.first, Box(((0, 1), (0, shape[1])))), (self.others, Entries(others))]


def run(every, steps=4):
  tx = oc.cadence(optax.sgd(0.1, momentum=0.9), {"w": every, "b": 1})
  params, state = PARAMS, tx.init(PARAMS)
  for t in range(steps):
    grads = jax.tree.map(lambda x, t=t: jnp.cos(x * (t + 1)), params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params["w"], state


OF_TWO_PERIODS = [(kind, (1, 2)) for kind in (Rows, Near, NearInOnePass, Mixed)]
OF_ONE_PERIOD = [
  pytest.param(kind, (2, 2), marks=pytest.mark.ci) for kind in (Rows, Near, NearInOnePass)
]


@pytest.mark.parametrize(("kind", "periods"), OF_TWO_PERIODS + OF_ONE_PERIOD)
def test_a_kind_of_region_of_ones_own(kind, periods):
  by_row = np.arange(3)[:, None] < 1
  first = DISTANCE < 2 if issubclass(kind, Near) else np.broadcast_to(by_row, (3, 4))
  found, state = run(kind(*periods))
  expected, _ = run(np.where(first, *periods))
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert (found != PARAMS["w"]).all()
  # One vector for each cadence, or there is nothing that a single pass could join.
  one_pass = kind is NearInOnePass and periods == (1, 2)
  assert bool(state.regions.masked) == one_pass


class Hole(Rows):
  def cut(self, shape, key):
    return super().cut(shape, key)[:1]


class Overlap(Rows):
  def cut(self, shape, key):
    return [*super().cut(shape, key), (self.first, Box(((0, 1), (0, 1))))]


class WithoutMap(Rows):
  def map(self, fn):
    return self


class UnknownCadence(Rows):
  @property
  def cells(self):
    return [self.others]


@pytest.mark.parametrize(
  ("every", "message"),
  [
    (Hole(1, 2), r"cadence of 'w' of shape \(3, 4\): .* each of its 12 .* found tensors of 4 "),
    (Overlap(1, 2), r"cadence of 'w' of shape \(3, 4\): .* each of its 12 .* found tensors of 13 "),
    (WithoutMap(1, 2), r"cadence of 'w': WithoutMap.map\(fn\) must .* found cells \[1, 2\]"),
    (UnknownCadence(3, 2), "cadence of 'w': expected one .* in the cells of a partition"),
    (Mixed(2, 2), "cadence of 'w' .* expected cuts of one class .* found Box and Entries"),
    (Rows(1, 2.5), "cadence of 'w': a period must be an integer of at least 1, .* found 2.5"),
  ],
)
def test_a_kind_of_region_that_is_wrong(every, message):
  with pytest.raises(ValueError, match=message):
    oc.cadence(optax.adam(0.1), {"w": every, "b": 1}).init(PARAMS)


def test_the_error_of_a_partition_names_the_parameter():
  with pytest.raises(ValueError, match=r"cadence of 'b' of shape \(4,\): Rows cuts matrices"):
    oc.cadence(optax.adam(0.1), {"w": 1, "b": Rows(1, 2)}).init(PARAMS)


class Plateau(oc.Policy):
  """Twice as long once the loss is no better than it was when the last window ended."""

  reads_gradients = False

  def init(self):
    return {"period": self.min_period, "loss": jnp.inf}

  def earliest(self, state):
    return state["period"]

  def due(self, window, state):
    return True

  def fired(self, window, state):
    loss = window.extra_args["value"]
    factor = jnp.where(loss < state["loss"], 1, 2)
    return {"period": jnp.minimum(factor * state["period"], self.max_period), "loss": loss}


@pytest.mark.parametrize("jit", [False, True])
def test_a_policy_reads_extra_arguments(jit):
  # Inside a chain with an optimizer that takes none.
  tx = optax.chain(optax.clip(1.0), oc.cadence(optax.sgd(0.1), Plateau(1, 4)))
  update = jax.jit(tx.update) if jit else tx.update
  state, periods = tx.init(PARAMS), []
  for value in [5.0, 4.0, 4.0, 9.0, 3.0, 3.0, 3.0]:
    _, state = update(PARAMS, state, PARAMS, value=value)
    (group,) = state[1].groups.values()
    periods.append(int(group.confidence.policy["period"]))
  assert periods == [1, 1, 2, 2, 2, 2, 4]


class Answers(oc.Policy):
  """Says what it is told to say."""

  def __init__(self, due, fired):
    super().__init__(1, 4)
    self.says, self.learns = due, fired

  def init(self):
    return {"count": 0}

  def due(self, window, state):
    return self.says(window)

  def fired(self, window, state):
    return self.learns(window)


@pytest.mark.parametrize(
  ("due", "fired", "message"),
  [
    (lambda w: w.square > 1, None, r"Answers\(1-4\): due must return .* array of shape \(2,\)"),
    (lambda w: w.square.sum(), None, "due must return a boolean scalar"),
    (lambda w: None, None, "due must return a boolean scalar, .* found None"),
    (lambda w: True, lambda w: None, r"fired must .* expected .*int32\[\].*, found None"),
    (lambda w: True, lambda w: {"count": w.length}, r"fired must .* found .*int32\[2\]"),
    (lambda w: True, lambda w: {"count": w.square.sum()}, r"fired must .* found .*float32\[\]"),
  ],
)
def test_a_policy_that_is_wrong(due, fired, message):
  tx = oc.cadence(optax.sgd(0.1), Answers(due, fired))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(tx.update, PARAMS, tx.init(PARAMS), PARAMS)


def test_a_policy_has_to_say_when_it_is_due():
  with pytest.raises(TypeError, match="due"):
    oc.Policy(1, 4)


def is_pruned(criterion, steps=1, prune_at=1, inner=None, jit=False, stacked=None, **extra):
  """Which weights of a kernel are pruned."""
  where = lambda path, x: path == "w"
  every = pruning.once(prune_at)
  tx = oc.prune(0.5, every=every, criterion=criterion, inner=inner, where=where, stacked=stacked)
  state = tx.init(PARAMS)
  update = jax.jit(tx.update) if jit else tx.update
  for t in range(steps):
    grads = {"w": (t + 1) * jnp.flip(PARAMS["w"]), "b": jnp.ones(4)}
    _, state = update(grads, state, PARAMS, **extra)
  return ~np.asarray(pruning.masks(PARAMS, state)["w"])


def test_a_criterion_remembers_what_it_likes():
  decay = lambda memory, param, grad: 0.5 * memory + grad
  criterion = pruning.Criterion("decay", lambda param, memory, key: memory, remembers=decay)
  found = is_pruned(criterion, steps=3, prune_at=3, inner=optax.sgd(0.0))
  assert (found == (PARAMS["w"] > 6.5)).all()  # gradients are largest where weights are smallest
  # The memory itself: (1 / 4 + 2 / 2 + 3) times the gradient of the first micro-step.
  tx = oc.prune(
    0.5, every=9, criterion=criterion, inner=optax.sgd(0.0), where=lambda p, x: p == "w"
  )
  state = tx.init(PARAMS)
  for t in (1, 2, 3):
    _, state = tx.update(jax.tree.map(lambda x, t=t: t * x, PARAMS), state, PARAMS)
  np.testing.assert_allclose(state.memory["w"], 4.25 * PARAMS["w"], rtol=1e-6)


def test_what_a_criterion_remembers_stays_finite():
  total = lambda memory, param, grad: memory + grad
  criterion = pruning.Criterion("total", lambda param, memory, key: memory, remembers=total)
  tx = oc.prune(
    0.5, every=9, criterion=criterion, inner=optax.sgd(0.0), where=lambda p, x: p == "w"
  )
  state, broken = tx.init(PARAMS), {**PARAMS, "w": PARAMS["w"].at[0, 0].set(jnp.nan)}
  for grads in (PARAMS, broken):
    _, state = tx.update(grads, state, PARAMS)
  np.testing.assert_array_equal(state.memory["w"], (2 * PARAMS["w"]).at[0, 0].set(1.0))


WANDA = pruning.Criterion(
  "wanda", lambda param, norms, key: jnp.abs(param) * norms[..., None], reads="norms"
)


@pytest.mark.parametrize("jit", [False, True])
def test_a_criterion_reads_an_extra_argument(jit):
  found = is_pruned(WANDA, jit=jit, norms={"w": jnp.array([9.0, 1.0, 0.0]), "b": None})
  scores = np.asarray(PARAMS["w"]) * np.array([9.0, 1.0, 0.0])[:, None]
  assert (found == (scores < np.median(scores))).all()


def test_layers_that_are_stacked_get_their_own_part_of_it():
  double = pruning.Criterion("double", lambda param, given, key: param * given, reads="sign")
  sign = {"w": jnp.array([1.0, -1.0, 1.0])}
  found = is_pruned(double, stacked=lambda path, x: True, sign=sign)
  assert found.tolist() == [
    [True, True, False, False],
    [False, False, True, True],
    [True, True, False, False],
  ]


@pytest.mark.parametrize(
  ("criterion", "extra", "message"),
  [
    (lambda param, grad: None, {}, r"scores of 'w' by criterion <lambda>: .* \(3, 4\), found None"),
    (
      lambda param, grad: jax.lax.complex(param, param),
      {},
      "scores of 'w' .* real numbers .* dtype complex64",
    ),
    (WANDA, {}, "criterion wanda: reads the extra argument 'norms': .* found no extra argument"),
    (WANDA, {"value": 1.0}, "criterion wanda: reads the extra argument 'norms': .* found 'value'"),
    (WANDA, {"norms": {"b": 1.0}}, "norms: expected something for 'w', .* found 'b'"),
    (
      pruning.Criterion(
        "sums", lambda param, memory, key: memory, remembers=lambda m, p, g: p.sum()
      ),
      {"inner": optax.sgd(0.1)},
      r"criterion sums: remembers must return a real array of shape \(3, 4\), found \(\), float32",
    ),
    (
      pruning.Criterion("sums", lambda param, memory, key: memory, remembers=True),
      {},
      "sums reads gradients, .* found inner=None",
    ),
    (
      pruning.Criterion("late", lambda param, grad, key: jnp.abs(grad)),
      {"inner": optax.sgd(0.1)},
      "criterion late: reads the gradient, which is not there yet .* found reads_grads=False",
    ),
  ],
)
def test_a_criterion_that_is_wrong(criterion, extra, message):
  with pytest.raises(ValueError, match=message):
    is_pruned(criterion, **extra)


def test_a_criterion_cannot_remember_and_read():
  with pytest.raises(ValueError, match="criterion both: expected remembers or reads, found both"):
    pruning.Criterion("both", lambda param, x, key: x, remembers=True, reads="norms")
