"""`oc.nnx.Optimizer` trains a live model as `nnx.Optimizer` and the loop without NNX do."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_tree import assert_close
from small_tree import assert_identical
from small_tree import cadence
from small_tree import data
from small_tree import relaxed
from test_flax import CHECKERS
from test_flax import NET_EVERY
from test_flax import nnx_update
from test_flax import NnxNet

import optax_cadence as oc
from optax_cadence import _paths

LEAVES = {"head": 2, "stem": {"bias": 1, "kernel": 4}}
MASK = {"head": 2, "stem": {"bias": 4, "kernel": CHECKERS}}
TRANSFORMATIONS = {
  "leaves": cadence(optax.adamw(0.1), LEAVES),
  "quadrants, skip": cadence(optax.adamw(0.1), NET_EVERY, nonfinite="skip"),
  "mask": cadence(optax.adamw(0.1), MASK),
  "latest": cadence(optax.adamw(0.1), LEAVES, accumulate="latest"),
  "chain": oc.chain(optax.clip_by_global_norm(0.5), cadence(optax.adamw(0.1), LEAVES)),
}
CALLED = ("training_step", "update")


def loss(model, x, y):
  return ((model(x) - y) ** 2).mean()


def step_of(called, loss=loss, has_aux=False, **jit_args):
  """A micro-step by one method or the other, under `nnx.jit`; returns what the loss does."""

  def step(model, optimizer, *args, **kwargs):
    if called == "training_step":
      return optimizer.training_step(model, loss, *args, has_aux=has_aux, **kwargs)
    value, grads = nnx.value_and_grad(loss, has_aux=has_aux)(model, *args)
    optimizer.update(model, grads, **kwargs)
    return value

  return nnx.jit(step, static_argnames="phase", **jit_args)


def made(tx, net=NnxNet):
  model = net(nnx.Rngs(0))
  return model, oc.nnx.Optimizer(model, tx)


def params_of(model):
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def arrays(tree):
  """What is in the variables of a tree, or of the state of a model; keys as numbers."""
  leaves = _paths.arrays(nnx.state(tree) if isinstance(tree, nnx.Module) else tree)
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in leaves]


def assert_same(found, expected):
  """To the bit, model and optimizer both."""
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_equal(arrays(getattr(a, "opt_state", a)), arrays(getattr(b, "opt_state", b)))


OFTEN = {("leaves", "training_step"), ("quadrants, skip", "update"), ("mask", "training_step")}
CASES = [
  pytest.param(name, called, marks=[] if (name, called) in OFTEN else pytest.mark.ci)
  for name in TRANSFORMATIONS
  for called in CALLED
]


@pytest.mark.parametrize(("name", "called"), CASES)
def test_it_does_what_the_loop_without_nnx_does(name, called):
  tx = TRANSFORMATIONS[name]
  model, optimizer = made(tx)
  graph, params = nnx.split(NnxNet(nnx.Rngs(0)))
  params = nnx.to_pure_dict(params)
  state = tx.init(params)

  def without(params, x, y):
    given = nnx.state(NnxNet(nnx.Rngs(0)))
    nnx.replace_by_pure_dict(given, params)
    return loss(nnx.merge(graph, given), x, y)

  slow = oc.training_step(without, tx)
  if called == "update":

    def slow(params, state, *batch):
      value, grads = jax.value_and_grad(without)(params, *batch)
      return *tx.apply(params, state, grads), value

  slow, step = jax.jit(slow), step_of(called)
  for t in range(5):
    x, y = data(t)
    if t == 1 and "skip" in name:
      x = x.at[0, 0].set(jnp.nan)
    with relaxed():
      value = step(model, optimizer, x, y)
      params, state, expected = slow(params, state, x, y)
    np.testing.assert_array_equal(value, expected)
    assert_identical(params_of(model), params)
  np.testing.assert_equal(arrays(optimizer.opt_state), arrays(state))
  assert arrays(optimizer.step) == [5]
  assert all(np.isfinite(x).all() for x in arrays(model))


def test_it_does_what_the_optimizer_of_flax_does_and_reads_what_that_saves():
  tx = TRANSFORMATIONS["quadrants, skip"]
  ours, model = made(tx), NnxNet(nnx.Rngs(0))
  of_flax, step = nnx.Optimizer(model, tx, wrt=nnx.Param), step_of("training_step")

  @nnx.jit
  def step_of_flax(model, optimizer, x, y):
    nnx_update(optimizer, model, nnx.grad(loss)(model, x, y))

  with relaxed():
    for t in range(5):
      step(*ours, *data(t))
      step_of_flax(model, of_flax, *data(t))
      assert_close(params_of(ours[0]), params_of(model))
    resumed = made(tx)
    nnx.update(resumed, nnx.state((model, of_flax)))
    assert_same(resumed, (model, of_flax))
    assert arrays(resumed[1].step) == [5]
    step(*resumed, *data(5))
    step_of_flax(model, of_flax, *data(5))
  assert_close(params_of(resumed[0]), params_of(model))


def test_it_goes_on_where_multisteps_was_and_as_another_cadence():
  inner, model = optax.adam(0.5), NnxNet(nnx.Rngs(0))
  first, second = cadence(inner, 4), cadence(inner, {"head": 2, "stem": 4})
  params = params_of(model)
  old = nnx.Optimizer(model, optax.MultiSteps(inner, 4), wrt=nnx.Param)
  state = old.tx.init(params)

  def gradients(t):
    return jax.tree.map(lambda x: jnp.full_like(x, 2.0**-t), params)

  def in_model(t):
    structure = jax.tree.structure(nnx.state(model, nnx.Param))
    return jax.tree.unflatten(structure, jax.tree.leaves(gradients(t)))

  with relaxed():
    for t in range(6):
      nnx_update(old, model, in_model(t))
      updates, state = old.tx.update(gradients(t), state, params)
      params = optax.apply_updates(params, updates)
    optimizer = old
    for start, tx in ((6, first), (11, second), (15, first)):
      before = optimizer.tx
      optimizer = oc.nnx.convert(optimizer, model, to=tx, counters="most")
      state = oc.convert(state, before, params, to=tx, counters="most")
      for t in range(start, start + 5):
        optimizer.update(model, in_model(t))
        params, state = tx.apply(params, state, gradients(t))
      assert_identical(params_of(model), params)
      np.testing.assert_equal(arrays(optimizer.opt_state), arrays(state))
    assert arrays(optimizer.step) == [21]
    with pytest.raises(ValueError, match="period 1"):
      oc.nnx.convert(optimizer, model, to=cadence(inner, 1))


class NetWithMore(NnxNet):
  """With statistics and random numbers, its own and those that are given."""

  def __init__(self, rngs):
    super().__init__(rngs)
    self.norm = nnx.BatchNorm(6, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.other_drop = nnx.Dropout(0.5)

  def __call__(self, x, rngs=None):
    x = self.drop(self.norm(nnx.tanh(self.stem(x))))
    return self.head(x if rngs is None else self.other_drop(x, rngs=rngs))


def no_fallback(monkeypatch):
  def fail(*args, **kwargs):
    raise AssertionError("gradients are stored")

  monkeypatch.setattr(oc.nnx.nnx, "value_and_grad", fail)


def test_what_else_the_loss_changes_is_carried(monkeypatch):
  tx = cadence(optax.adamw(0.1), LEAVES | {"norm": 1})

  def loss(model, rngs, metric, x, y):
    out = model(x, rngs)
    value = ((out - y) ** 2).mean()
    metric.update(values=value)
    return value, out

  made_with = lambda: (*made(tx, NetWithMore), nnx.Rngs(7), nnx.metrics.Average())
  (ours, ours_step), (slow, slow_step) = [(made_with(), step_of(c, loss, True)) for c in CALLED]
  with relaxed():
    for t in range(3):
      expected = slow_step(*slow, *data(t))
      with monkeypatch.context() as context:
        no_fallback(context)
        found = ours_step(*ours, *data(t))
      np.testing.assert_equal(*(jax.tree.map(np.asarray, x) for x in (found, expected)))
  for a, b in zip(ours, slow, strict=True):
    np.testing.assert_equal(*(arrays(nnx.state(x)) for x in (a, b)))
  # All of it has changed.
  kinds = nnx.Any(nnx.BatchStat, nnx.RngCount, nnx.metrics.MetricState)
  other = made_with()
  for i, n in ((0, 3), (2, 1), (3, 2)):
    after, before = (arrays(nnx.state(x[i], kinds)) for x in (ours, other))
    assert sum((a != b).any() for a, b in zip(after, before, strict=True)) == n, i


class NetThatChanges(NnxNet):
  what = None

  def __call__(self, x):
    if self.what == "a parameter":
      nnx.update(self.stem, jax.tree.map(lambda p: 0.5 * p, nnx.state(self.stem)))
    elif self.what == "a new variable":
      self.seen = nnx.Intermediate(x)
    else:
      self.seen = 3
    return super().__call__(x)


@pytest.mark.parametrize("what", ["a parameter", "a new variable", "an attribute"])
def test_a_loss_may_change_the_model(what, monkeypatch):
  tx = TRANSFORMATIONS["leaves"]
  runs = [made(tx, NetThatChanges) for _ in CALLED]
  with relaxed():
    for run, called in zip(runs, CALLED, strict=True):
      run[0].what = what
      step_of(called)(*run, *data(0))
  assert_same(*runs)
  if what == "an attribute":
    assert runs[0][0].seen == 3
  if what == "a new variable":
    assert arrays(runs[0][0].seen)[0].shape == data(0)[0].shape


@pytest.mark.parametrize("called", CALLED)
def test_phases(called):
  tx = cadence(optax.adamw(0.1), {"head": 1, "stem": 2})
  static, dynamic, step = made(tx), made(tx), step_of(called)
  phases = oc.phases(tx, nnx.state(static[0], nnx.Param), static[1].opt_state)
  with relaxed():
    for t in range(3):
      step(*static, *data(t), phase=next(phases))
      step(*dynamic, *data(t))
      assert_close(params_of(static[0]), params_of(dynamic[0]))
    again = oc.phases(tx, nnx.state(static[0], nnx.Param), static[1].opt_state)
    assert next(again) == next(phases)
  model, optimizer = made(tx)
  with pytest.raises(ValueError, match="phase"):
    optimizer.training_step(model, loss, *data(0), phase=0)


@pytest.mark.parametrize("called", CALLED)
def test_weights(called):
  tx = cadence(optax.sgd(1.0), 2, weighted=True)
  (model, optimizer), step = made(tx), step_of(called)
  params, weights = params_of(model), (1.0, 3.0)
  state, apply = tx.init(params), jax.jit(tx.apply)
  graph = nnx.graphdef(model)
  with relaxed():
    for t, weight in enumerate(weights):
      grads = nnx.to_pure_dict(
        nnx.jit(nnx.grad(loss))(nnx.merge(graph, nnx.state(model)), *data(t))
      )
      step(model, optimizer, *data(t), weight=weight)
      params, state = apply(params, state, grads, weight=weight)
    assert_close(params_of(model), params)
    with pytest.raises(ValueError, match="weight"):
      step(model, optimizer, *data(0))


def test_flush_has_updated_and_metrics():
  tx = TRANSFORMATIONS["leaves"]
  (model, optimizer), step = made(tx), step_of("update")
  with relaxed():
    for t in range(3):
      step(model, optimizer, *data(t))
    assert {n: bool(x) for n, x in optimizer.has_updated().items()} == {
      "1": True,
      "2": False,
      "4": False,
    }
    updates, state = jax.jit(tx.flush)(plain(tx, optimizer, model), params_of(model))
    expected = optax.apply_updates(params_of(model), updates)
    assert (params_of(model)["stem"]["kernel"] != expected["stem"]["kernel"]).any()
    nnx.jit(lambda model, optimizer: optimizer.flush(model))(model, optimizer)
  assert_close(params_of(model), expected)
  np.testing.assert_equal(arrays(optimizer.opt_state), arrays(state))
  assert arrays(optimizer.step) == [3]
  np.testing.assert_equal(optimizer.metrics(), oc.metrics(state))
  assert optimizer.metrics()["micro_step"] == 3


def plain(tx, optimizer, model):
  structure = jax.tree.structure(jax.eval_shape(tx.init, params_of(model)))
  return jax.tree.unflatten(structure, _paths.arrays(optimizer.opt_state))


def test_some_of_the_parameters():
  tx, head, runs = cadence(optax.adamw(0.1), 1), nnx.PathContains("head"), []
  for called in CALLED:
    model = NnxNet(nnx.Rngs(0))
    before = params_of(model)
    optimizer = oc.nnx.Optimizer(model, tx, wrt=head)
    with relaxed():
      step_of(called)(model, optimizer, *data(0))
    runs.append((model, optimizer))
    assert_identical(params_of(model)["stem"], before["stem"])
    assert (params_of(model)["head"]["kernel"] != before["head"]["kernel"]).any()
  assert_same(*runs)


@pytest.mark.filterwarnings("ignore:Variable hooks are deprecated")
def test_parameters_with_hooks():
  """What Flax does to a parameter's values is nothing to its moments."""
  model = NnxNet(nnx.Rngs(0))
  hook = lambda variable, value: value + 1.0
  value = _paths.arrays(model.head.bias)[0]
  model.head.bias = nnx.Param(value, on_set_value=hook)
  optimizer = oc.nnx.Optimizer(model, TRANSFORMATIONS["leaves"])
  slow = made(TRANSFORMATIONS["leaves"])
  with relaxed():
    for t in range(2):
      for run in ((model, optimizer), slow):
        step_of("training_step")(*run, *data(t))
  assert_same((model, optimizer), slow)


def test_buffers_are_donated():
  (model, optimizer), donated = made(TRANSFORMATIONS["leaves"]), ("model", "optimizer")
  step = step_of("training_step", donate_argnames=donated)
  with relaxed():
    step(model, optimizer, *data(0))
    old = _paths.arrays(nnx.state((model, optimizer)))
    step(model, optimizer, *data(1))
  assert all(x.is_deleted() for x in old if x.size > 1)
  assert not any(x.is_deleted() for x in _paths.arrays(nnx.state((model, optimizer))))


def test_a_copy_and_a_pickle_go_on():
  first, step = made(cadence(optax.sgd(0.1), 2)), step_of("training_step")
  with relaxed():
    step(*first, *data(0))
    graph, state = nnx.split(first)
    copies = [nnx.clone(first), nnx.merge(graph, pickle.loads(pickle.dumps(state)))]
    for run in (first, *copies):
      step(*run, *data(1))
  for copy in copies:
    assert isinstance(copy[1], oc.nnx.Optimizer)
    assert_same(copy, first)


class DeeperNet(NnxNet):
  def __init__(self, rngs):
    super().__init__(rngs)
    self.last = nnx.Linear(2, 2, rngs=rngs)

  def __call__(self, x):
    return self.last(super().__call__(x))


def test_growth_takes_it_along():
  model, growth, step = DeeperNet(nnx.Rngs(0)), oc.growth.nnx, step_of("training_step")
  # Where a leaf is cut, its variable in the optimizer's state has several arrays.
  every = oc.by_path({"last/kernel": oc.quadrants([[1, 2], [2, 1]]), "*": 2})
  everything = nnx.Any(nnx.Param, nnx.PathContains("alpha"))
  optimizer = oc.nnx.Optimizer(model, cadence(optax.adamw(0.1), every), wrt=everything)
  x, y = data(0)
  with relaxed():
    step(model, optimizer, x, y)
    growth.widen(model, x, producer=model.stem, by=2, rngs=nnx.Rngs(1), optimizer=optimizer)
    growth.set_alpha(model, 1.0)
    growth.merge(model, optimizer=optimizer)
    assert isinstance(optimizer, oc.nnx.Optimizer)
    before = params_of(model)
    step(model, optimizer, x, y)
  after = params_of(model)
  assert after["stem"]["kernel"].shape == (4, 8)
  assert (after["stem"]["kernel"] != before["stem"]["kernel"]).any()
  assert optimizer.metrics()["micro_step"] == 2


@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="models are always graphs there")
def test_a_model_that_is_a_tree_and_no_graph():
  tx, found = cadence(optax.adamw(0.1), LEAVES | {"norm": 1}), []
  for graph in (True, False):
    with nnx.set_graph_mode(graph), relaxed():
      run, step = made(tx, NetWithMore), step_of("training_step")
      for t in range(2):
        step(*run, *data(t))
      nnx.jit(lambda model, optimizer: optimizer.flush(model))(*run)
    found.append(run)
  assert_same(*found)


@pytest.mark.parametrize("jit", [True, False])
def test_layers_in_a_scan_are_added_to_in_the_backward_pass(jit):
  class Stack(nnx.Module):
    def __init__(self, rngs):
      make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(2, 2, rngs=rngs)))
      self.layers = make(rngs)

    def __call__(self, x):
      run = lambda layer, x: nnx.tanh(layer(x))
      carry = nnx.Carry
      return nnx.scan(run, in_axes=(0, carry), out_axes=carry)(self.layers, x)

  loss = lambda model, x: (model(x) ** 2).mean()
  runs, x = [made(cadence(optax.adamw(0.1), 2), Stack) for _ in CALLED], jnp.ones((3, 2))
  graph, state = nnx.split(runs[0])

  def run(state, x):
    model, optimizer = nnx.merge(graph, state)
    return optimizer.training_step(model, loss, x)

  if hasattr(jax, "new_ref") and jit:
    with relaxed():
      program = jax.make_jaxpr(run)(state, x)
    assert "add_in_backward_pass" in str(program)
  with relaxed():
    for run, called in zip(runs, CALLED, strict=True):
      step = step_of(called, loss) if jit else lambda m, o, x: o.training_step(m, loss, x)
      for _ in range(2):
        step(*run, x)
  assert_same(*runs)


def test_what_it_cannot_take():
  model = NnxNet(nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"oc.nnx.Optimizer\(model, tx\), found"):
    oc.nnx.Optimizer(model, optax.adam(0.1))
  model, optimizer = made(TRANSFORMATIONS["leaves"])
  no_scalar = lambda model, x, y: model(x)
  with pytest.raises(ValueError, match="expected a scalar of real numbers"):
    optimizer.training_step(model, no_scalar, *data(0))
  with pytest.raises(ValueError, match="expected a pair, as has_aux=True says, found"):
    optimizer.training_step(model, loss, *data(0), has_aux=True)
  with pytest.raises(ValueError, match="has_aux=True it returns a pair"):
    optimizer.training_step(model, lambda m, x, y: (loss(m, x, y), x), *data(0))
  with pytest.raises(ValueError, match="weight: expected none"):
    optimizer.training_step(model, loss, *data(0), weight=2.0)
  scaled = lambda model, x, y, scale=1.0: scale * loss(model, x, y)
  with pytest.raises(ValueError, match="scale= is an argument of the loss"):
    optimizer.training_step(model, scaled, *data(0), scale=2.0)
  assert arrays(optimizer.step) == [0]
