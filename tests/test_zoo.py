"""Networks of every kind: what grows together is found, and grows; see `zoo.py`."""

import dataclasses
import fnmatch
import functools
import pathlib
from typing import Any

import growth_nets as nets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import zoo
from flax import nnx

from optax_cadence import _paths
from optax_cadence import growth
from optax_cadence.growth import _nnx_model
from optax_cadence.growth import _trees

NETS = {net.name: net for net in zoo.ZOO}
EVERY = pytest.mark.parametrize("name", list(NETS))
# Large nets, of whose parts there are smaller ones.
LARGE = ("VGG", "ResNet", "MobileNet", "DenseNet", "BERT", "T5", "Mixer")


@pytest.fixture(autouse=True)
def as_people_write_them():
  with nets.relaxed():
    yield


def linen_variables(module, net):
  return nets.drawn(jax.eval_shape(module.init, jax.random.key(0), *net.inputs), seed=0)


def couple(net, units, model, variables):
  if net.is_linen:
    return growth.linen.couple(
      net.make, variables, *net.inputs, producer=units.producer, **units.how
    )
  return growth.nnx.couple(model, *net.inputs, producer=units.producer, **units.how)


def by_hand(units, paths):
  """The members of a dimension as they are written down, globs resolved."""
  members = {}
  for pattern, axes in units.members.items():
    matching = [p for p in map(_paths.join, paths) if fnmatch.fnmatchcase(p, pattern)]
    assert matching, f"{pattern} matches nothing"
    members.update(dict.fromkeys(matching, axes))
  return {(p, a) for p, axes in members.items() for a in np.atleast_1d(axes).tolist()}


def planned(net, model, variables):
  """One plan by which all dimensions of a network grow at once, compared with what is written."""
  paths = [path for path, _ in _paths.flatten_with_paths(variables)]
  found = {}
  for units in net.units:
    dimension = couple(net, units, model, variables)
    assert {(_paths.join(m.path), m.axis) for m in dimension.members} == by_hand(units, paths)
    assert bool(dimension.outputs) == units.output
    found[dimension] = units.by
  alpha = "params/alpha" if net.is_linen else "alpha"
  return growth.widening(variables, found, alpha=alpha)


def sizes(net):
  return {name: size for units in net.units for name, size in units.sizes.items()}


def outputs_of(model, *inputs):
  return growth.nnx.call(lambda model, *inputs: model(*inputs), model, *inputs)


def old_part(found, expected):
  """Of outputs that carry units, and so are longer, what was there before."""
  cut = lambda a, b: a[tuple(map(slice, b.shape))]
  return jax.tree.map(cut, found, expected)


@dataclasses.dataclass
class Grown:
  """A network before and after all its dimensions have grown, as functions of trees.

  Attributes:
    plan: The plan.
    before: The forward pass of the old network, and its variables.
    gated: That through the gate, and the grown variables, the gate among them.
    merged: That of the network at its new size.
    trainable: Paths of the parameters, the gate among them.
  """

  plan: growth.Plan
  before: tuple
  gated: tuple
  merged: Any
  trainable: set


def grow_linen(net):
  old, new, variables = net.make, net.make.clone(**net.new), linen_variables(net.make, net)
  plan = planned(net, None, variables)
  grown = plan.apply(variables, nets.fresh)
  gated = growth.gated(new.apply, plan, old=old.apply)
  assert _trees.shapes(_trees.remove(grown, plan.alpha)) == _trees.shapes(linen_variables(new, net))
  trainable = {path for path in _paths.by_path(grown) if path[0] == "params"}
  return Grown(plan, (old.apply, variables), (gated, grown), new.apply, trainable)


def as_function(model):
  """A live model as a function of its variables, which it does not change."""
  graphdef, state = nnx.split(model)

  def run(tree, *inputs):
    return nnx.merge(graphdef, _nnx_model.filled(state, tree))(*inputs)

  return run, growth.nnx.variables(model)


def grow_nnx(net, inputs):
  model = nets.make(net.make)
  before = as_function(nnx.clone(model))
  plan = planned(net, model, before[1])
  growth.nnx.grow(model, plan, nets.fresh, inputs=inputs, sizes=sizes(net))
  merged = nnx.clone(model)
  growth.nnx.set_alpha(merged, 1.0)
  growth.merge(merged)
  trainable = set(_paths.by_path(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
  return Grown(plan, before, as_function(model), as_function(merged)[0], trainable)


def grow(net, checked=True):
  """The network grown; that an NNX model then runs is checked first if so asked."""
  return grow_linen(net) if net.is_linen else grow_nnx(net, net.inputs if checked else ())


def open_gate(tree, plan):
  return _trees.with_leaves(tree, {plan.alpha: jnp.float32(1)})


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=[pytest.mark.ci] * (name in LARGE)) for name in NETS]
)
def test_dimensions_are_found_and_nothing_changes_at_first(name):
  net = NETS[name]
  grown = grow(net, checked=False)
  (before, old), (gated, new) = grown.before, grown.gated

  def both(old, new, *inputs):
    return before(old, *inputs), gated(new, *inputs)

  with oracle.enable_x64():
    given = old, new, *net.inputs
    # Flax starts the carry of a recurrent cell in float32.
    given = given if name in ("LSTM", "GRU") else nets.in_float64(given)
    expected, found = jax.jit(both)(*given)
    nets.alike(old_part(found, expected), expected)


@pytest.mark.ci
@EVERY
def test_the_gate_opens_the_growth_goes_back_and_it_trains(name):
  net = NETS[name]
  grown = grow(net)
  gate_opens_and_growth_goes_back(net, grown)
  trains_while_the_gate_opens_and_the_state_follows(net, grown)


def gate_opens_and_growth_goes_back(net, grown):
  plan, (gated, tree) = grown.plan, grown.gated
  run = functools.partial(jax.jit, compiler_options=nets.AS_WRITTEN)
  gated = run(gated)
  found = gated(open_gate(tree, plan), *net.inputs)
  bigger = growth.merge(open_gate(tree, plan), plan)
  expected = run(grown.merged)(bigger, *net.inputs)
  if net.merges:
    nets.close(found, expected)
  shut = gated(tree, *net.inputs)
  changes = [
    float(abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (found, shut)), strict=True)
  ]
  assert max(changes) > 1e-3
  nets.equal(plan.inverse().apply(bigger), grown.before[1])


def trains_while_the_gate_opens_and_the_state_follows(net, grown):
  plan, (before, old), (gated, new) = grown.plan, grown.before, grown.gated
  gate = growth.phase_in(optax.linear_schedule(0.0, 1.0, 2), alpha=_paths.join(plan.alpha))
  tx = optax.chain(optax.adam(1e-2), gate)

  def parameters(tree):
    return _trees.rearranged(
      tree, {path: leaf for path, leaf in _paths.by_path(tree).items() if path in grown.trainable}
    )

  def step(forward):
    @jax.jit
    def run(params, state, tree):
      def loss(params):
        outputs = forward(_trees.with_leaves(tree, _paths.by_path(params)), *net.inputs)
        return sum(jnp.mean((x - 1) ** 2) for x in jax.tree.leaves(outputs))

      value, grads = jax.value_and_grad(loss)(params)
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state, value

    return run

  params = parameters(old)
  params, state, _ = step(before)(params, tx.init(params), old)
  fresh = parameters(new)  # at the new size; what was there comes from the trained ones
  grows = dataclasses.replace(
    plan, changes=tuple(c for c in plan.changes if c.path in grown.trainable)
  )
  bigger = grows.apply(params, _trees.remove(fresh, plan.alpha))
  bigger_state = growth.grow_state(tx, state, params, bigger, plan)
  back = growth.grow_state(
    tx, bigger_state, _trees.remove(bigger, plan.alpha), params, plan.inverse()
  )
  nets.equal(back, state)

  losses, run = [], step(gated)
  for _ in range(3):
    bigger, bigger_state, value = run(bigger, bigger_state, new)
    losses.append(float(value))
  leaves = _paths.by_path(bigger)
  assert float(leaves[plan.alpha]) == 1 and np.isfinite(losses).all()
  for change in grows.changes:
    entries = np.ones(change.after, bool)
    entries[change.index] = False
    started = _paths.by_path(fresh)[change.path]
    assert (leaves[change.path] != started)[entries].any(), change.path


@pytest.mark.ci
@EVERY
def test_each_dimension_grows_alone_from_its_own_initializers(name):
  net, unchanged = NETS[name], None
  for units in net.units:
    told = {"producer": units.producer, "by": units.by, **units.how}
    if net.is_linen:
      old, new, variables = net.make, net.make.clone(**units.new), linen_variables(net.make, net)
      tree, gated, plan = growth.linen.widen(
        old, new, variables, *net.inputs, rngs=jax.random.key(1), **told
      )
      before, merged = old.apply, new.apply
    else:
      model = nets.make(net.make)
      before, variables = as_function(nnx.clone(model))
      optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
      plan = growth.widen(model, *net.inputs, optimizer=optimizer, sizes=units.sizes, **told)
      gated, tree = as_function(model)
      moments = _trees.shapes(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
      assert _trees.shapes(optimizer.opt_state[0].mu) == moments
      growth.nnx.set_alpha(model, 1.0)
      growth.merge(model, optimizer=optimizer)
      merged, _ = as_function(model)
    # Every dimension starts from the same network.
    if unchanged is None:
      unchanged = jax.jit(before)(variables, *net.inputs)
    nets.alike(old_part(jax.jit(gated)(tree, *net.inputs), unchanged), unchanged)
    at_one = open_gate(tree, plan)
    if net.merges:
      expected = jax.jit(merged)(growth.merge(at_one, plan), *net.inputs)
      nets.alike(jax.jit(gated)(at_one, *net.inputs), expected)


def test_the_table_in_the_docs_is_what_is_tested():
  page = (pathlib.Path(__file__).parents[1] / "docs" / "growth.md").read_text()
  assert f"\n\n{zoo.table()}\n\n" in page  # python tests/zoo.py prints it
