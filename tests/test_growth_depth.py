"""More layers along the axis on which `vmap` has stacked them: order, gate, state, masks."""

import growth_nets as nets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from growth_nets import close
from growth_nets import equal

import optax_cadence as oc
from optax_cadence import growth

pytestmark = pytest.mark.ci

X = jax.random.normal(jax.random.key(0), (4, 3))
KEYS = jax.random.split(jax.random.key(1), 4)
PARAMS = {
  "blocks": {
    "up": {"kernel": jax.random.normal(KEYS[0], (3, 3, 5)), "bias": jnp.ones((3, 5))},
    "down": {"kernel": jax.random.normal(KEYS[1], (3, 5, 3))},
  },
  "head": jax.random.normal(KEYS[2], (3, 2)),
}


def forward(params, x):
  def layer(x, p):
    h = jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"][None])
    return x + h @ p["down"]["kernel"], None

  return jax.lax.scan(layer, x, params["blocks"])[0] @ params["head"]


def fresh(path, shape, dtype):
  return 0.1 * jax.random.normal(jax.random.key(len(path[-1])), shape, dtype)


@pytest.mark.parametrize(
  ("how", "expected"),
  [
    ({"times": 2}, [0, 1, 2, 0, 1, 2]),
    ({"times": 3}, [0, 1, 2] * 3),
    ({"by": 2}, [0, 1, 2, 1, 2]),
    ({"by": 1, "where": "middle"}, [0, 0, 1, 2]),
    ({"times": 2, "where": "middle"}, [0, 1, 2, 0, 1, 2]),
    ({"times": 2, "where": "between"}, [0, 0, 1, 1, 2, 2]),
    ({"by": 1, "where": 0}, [2, 0, 1, 2]),
    ({"by": 2, "where": 2}, [0, 1, 0, 1, 2]),
  ],
)
def test_the_order_of_copies(how, expected):
  tree = {"a": jnp.arange(3.0), "b": jnp.arange(3)[:, None]}
  plan = growth.stacking({"blocks": tree}, "blocks", **how)
  grown = plan.apply({"blocks": tree})["blocks"]
  assert grown["a"].tolist() == expected
  assert grown["b"][:, 0].tolist() == expected
  equal(growth.undo({"blocks": grown}, plan), {"blocks": tree})


@pytest.mark.parametrize("where", ["end", "middle", "between"])
@pytest.mark.parametrize("copy", [True, False])
def test_the_gate_of_new_layers(where, copy):
  plan = growth.stacking(
    PARAMS, "blocks", times=2, where=where, copy=copy, outgoing=["blocks/down"]
  )
  grown = plan.apply(PARAMS, None if copy else fresh)
  gated = jax.jit(growth.gated(forward, plan))
  equal(gated(grown, X), jax.jit(forward)(PARAMS, X))
  half, one = ({**grown, "alpha": jnp.float32(a)} for a in (0.5, 1.0))
  close(gated(half, X), forward(growth.merge(half, plan), X))
  close(gated(one, X), forward(growth.merge(one, plan), X))
  assert jnp.abs(gated(one, X) - forward(PARAMS, X)).max() > 1e-2
  equal(growth.undo(half, plan), PARAMS)
  equal(growth.undo(growth.merge(one, plan), plan), PARAMS)


def test_without_a_gate_the_function_changes_at_once():
  plan = growth.stacking(PARAMS, "blocks", times=2)
  grown = plan.apply(PARAMS)
  assert "alpha" not in grown
  assert str(plan).endswith("gate: none")
  twice = {**PARAMS, "head": jnp.eye(3)}
  close(forward(grown, X), forward(PARAMS, forward(twice, X)))
  with pytest.raises(ValueError, match="without a gate: call the network as it is"):
    growth.gated(forward, plan)


def trained(tx, params, state, steps, fn=forward):
  @jax.jit
  def step(params, state):
    grads = jax.grad(lambda p: (fn(p, X) ** 2).mean())(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(steps):
    params, state = step(params, state)
  return params, state


TX = optax.chain(
  oc.cadence(optax.adam(1e-2), 3),
  oc.prune(0.5, every=2, where=lambda path, x: "kernel" in path),
  growth.phase_in(lambda t: 0.0),
)


@pytest.mark.parametrize("copied", [True, False])
def test_moments_windows_and_masks_follow(copied):
  with nets.relaxed():
    # A window is open, and masks are there.
    params, state = trained(TX, PARAMS, TX.init(PARAMS), 4)
    plan = growth.stacking(params, "blocks", by=2, where=1, copy_state=copied)
    grown = plan.apply(params)
    found = growth.grow_state(TX, state, params, grown, plan)
    like = TX.init(grown)
    assert jax.tree.structure(found) == jax.tree.structure(like)
    big = jax.tree_util.tree_flatten_with_path(found)[0]
    small = dict(jax.tree_util.tree_flatten_with_path(state)[0])
    checked = 0
    for (keys, leaf), empty in zip(big, jax.tree.leaves(like), strict=True):
      old = small[keys]
      if leaf.shape == old.shape or leaf.dtype == jnp.uint8:
        continue
      checked += 1
      np.testing.assert_array_equal(leaf[np.array([0, 3, 4])], old)
      expected = old[np.array([2, 0])] if copied else empty[1:3]
      np.testing.assert_array_equal(leaf[1:3], expected)
    assert checked >= 9  # a sum and two moments of three leaves each
    # What is pruned of a layer is pruned of its copy, and only of that.
    masks = growth_masks(found, grown)
    of_old = growth_masks(state, params)
    expected = of_old[np.array([0, 2, 0, 1, 2])]
    if not copied:
      expected[1:3] = True
    np.testing.assert_array_equal(masks, expected)
    assert not of_old.all()
    back = growth.grow_state(TX, found, grown, params, plan.inverse())
    equal(back, state)


def growth_masks(state, params):
  """The mask of one kernel, unpacked."""
  return np.asarray(oc.pruning.masks(params, state)["blocks"]["down"]["kernel"])


def test_training_behind_a_closed_gate_is_training_without_it():
  with nets.relaxed(), nets.sums_in_order():
    tx = optax.chain(oc.cadence(optax.sgd(0.1), 2), growth.phase_in(lambda t: 0.0))
    params, state = trained(tx, PARAMS, tx.init(PARAMS), 3)
    plan = growth.stacking(params, "blocks", times=2, outgoing=["blocks/down"])
    grown = plan.apply(params)
    big = growth.grow_state(tx, state, params, grown, plan)
    grown, big = trained(tx, grown, big, 3, growth.gated(forward, plan))
    old = growth.undo(grown, plan)
    expected, expected_state = trained(tx, params, state, 3)
    close(old, expected)
    close(growth.grow_state(tx, big, grown, old, plan.inverse()), expected_state)


@pytest.mark.parametrize(
  "periods", [[4, 2, 1, 4, 2, 1], [4, 2, 1, 8, 8, 8], [1, 2, 4, 8, 8, 8]], ids=str
)
def test_periods_of_single_layers_are_refused_and_carried_by_way_of_one_period(periods):
  def cadence(every):
    return oc.cadence(optax.adam(1e-2), {"blocks": every, "head": 1})

  tx, one, new_tx = map(cadence, (oc.stacked([4, 2, 1]), 4, oc.stacked(periods)))
  with nets.relaxed():
    params, state = trained(tx, PARAMS, tx.init(PARAMS), 6)
    plan = growth.stacking(params, "blocks", times=2)
    grown = plan.apply(params)
    match = r"'blocks/.*each of 6 layers, found 3: if .*to=one, counters=.*to=\.\.\.\), the cadence"
    with pytest.raises(ValueError, match=match):
      growth.grow_state(tx, state, params, grown, plan)
    match = r"\['blocks'\].* of 'blocks/.*' is that of 1 of 3 layers: if .*to=one, counters="
    with pytest.raises(ValueError, match=match):
      growth.grow_state(tx, state, params, grown, plan, new_tx=new_tx)

    updates, state = tx.flush(state, params)
    params = optax.apply_updates(params, updates)
    grown = plan.apply(params)
    found = oc.convert(state, tx, params, to=one, counters="most")
    found = growth.grow_state(one, found, params, grown, plan)
    found = oc.convert(found, one, grown, to=new_tx)
  assert jax.tree.structure(found) == jax.tree.structure(new_tx.init(grown))
  for period in set(periods):
    moments = found.groups[str(period)].inner_state[0].mu["blocks"]["up"]["kernel"]
    layers = [i % 3 for i, p in enumerate(periods) if p == period]
    for layer, x in zip(layers, moments, strict=True):
      expected = state.groups[str([4, 2, 1][layer])].inner_state[0].mu["blocks"]["up"]["kernel"]
      equal(x, expected[0])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"times": 2, "by": 1}, "expected either times="),
    ({"times": 1}, "expected times= of 2 or more, found 1"),
    ({"by": 0}, "expected by= of 1 or more, found 0"),
    ({"by": 2, "where": "between"}, "between 3 layers: expected as many new ones after each"),
    ({"by": 2, "where": 4}, "a number from 0 to 3, found 4"),
    ({"by": 2, "where": "start"}, "where: expected one of 'end', 'middle', 'between'"),
    ({"by": 2, "outgoing": ["head"]}, "outgoing 'head': expected one of the layers"),
    ({"by": 2, "layers": "body"}, "layers 'body': expected one of"),
    ({"by": 2, "layers": ""}, "layers '': expected one of"),
  ],
)
def test_errors(arguments, message):
  layers = arguments.pop("layers", "blocks")
  with pytest.raises(ValueError, match=message):
    growth.stacking(PARAMS, layers, **arguments)


def test_leaves_must_have_as_many_layers():
  params = {"blocks": {"a": jnp.ones((3, 2)), "shared": jnp.ones(2)}}
  with pytest.raises(ValueError, match=r"'blocks/shared' of shape \(2,\)"):
    growth.stacking(params, "blocks", times=2)


class Block(nnx.Module):
  def __init__(self, rngs):
    self.norm = nnx.LayerNorm(6, rngs=rngs)
    self.up = nnx.Linear(6, 8, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.down = nnx.Linear(8, 6, rngs=rngs)

  def __call__(self, x):
    return x + self.down(self.drop(nnx.relu(self.up(self.norm(x)))))


class Net(nnx.Module):
  def __init__(self, rngs):
    self.depth = 3
    self.stem = nnx.Linear(3, 6, rngs=rngs)
    make = nnx.split_rngs(splits=self.depth)(nnx.vmap(Block, in_axes=0))
    self.blocks = make(rngs)

  def __call__(self, x):
    shared = () if hasattr(nnx, "List") else (nnx.RngState,)
    axes = nnx.StateAxes({**dict.fromkeys(shared, nnx.Carry), ...: 0})
    scan = nnx.scan(
      lambda x, block: block(x),
      in_axes=(nnx.Carry, axes),
      out_axes=nnx.Carry,
      length=self.depth,
    )
    return scan(self.stem(x), self.blocks)


@pytest.mark.parametrize("copies", [True, False])
def test_a_live_model_gets_deeper(copies):
  model, twin = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
  model.eval()
  twin.eval()
  with nets.relaxed():
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    before, state = growth.nnx.variables(model), jax.tree.leaves(optimizer.opt_state)
    with pytest.raises(ValueError, match="does not run at its new size"):
      growth.stack(model, X, layers=model.blocks, times=2, outgoing=[model.blocks.down])
    growth.stack(
      model,
      X,
      layers=model.blocks,
      times=2,
      where="middle",
      outgoing=[model.blocks.down],
      fresh=None if copies else growth.nnx.default_init(model, nnx.Rngs(1)),
      sizes={"depth": 6},
      optimizer=optimizer,
    )
    kernel = growth.nnx.variables(model)["blocks"]["up"]["kernel"]
    assert kernel.shape == (6, 6, 8)
    assert bool((kernel[1] == kernel[4]).all()) == copies
    keys = growth.nnx.variables(model)["blocks"]["drop"]["rngs"].get("key")
    if keys is not None:  # in old versions of Flax layers share one
      assert len({tuple(k) for k in jax.random.key_data(keys).tolist()}) == 6
    close(model(X), twin(X))
    blocks = model.blocks
    growth.undo(model, optimizer=optimizer)
    assert model.depth == 3
    assert model.blocks is blocks
    equal(growth.nnx.variables(model), before)
    equal(jax.tree.leaves(optimizer.opt_state), state)
    close(model(X), twin(X))
  growth.stack(
    model, X, layers=model.blocks, by=1, outgoing=[model.blocks.down], sizes={"depth": 4}
  )
  nets.opens_and_merges(model, twin, X)


class Loud(nnx.Module):
  """Layers that also change the stream in another way than by adding to it."""

  def __init__(self, rngs):
    self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(LoudBlock, in_axes=0))(rngs)

  def __call__(self, x):
    scan = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return scan(x, self.blocks)


class LoudBlock(nnx.Module):
  def __init__(self, rngs):
    self.one, self.two = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)
    self.norm = nnx.LayerNorm(3, rngs=rngs)

  def __call__(self, x):
    return self.norm(x + self.one(x) + self.two(x))


def test_layers_that_count_behind_a_closed_gate_are_refused():
  model = nets.make(Loud)
  before = growth.nnx.variables(model)
  blocks = model.blocks
  for outgoing in ([blocks.one], [blocks.one, blocks.two]):
    with pytest.raises(ValueError, match="the output still depends on the new layers"):
      growth.stack(model, X, layers=blocks, times=2, outgoing=outgoing)
  equal(growth.nnx.variables(model), before)
  growth.stack(model, X, layers=blocks, times=2)
  assert blocks.one.kernel.shape == (6, 3, 3)


class Masked(nnx.Module):
  def __init__(self, rngs):
    self.blocks = nets.module_list([nnx.Linear(3, 3, rngs=rngs)])

  def __call__(self, x, mask):
    for block in self.blocks:
      x = x + block(x)
    return x * mask


def test_an_argument_of_which_only_the_shape_is_known():
  model = nets.make(Masked)
  growth.deepen(
    model,
    lambda model: model.blocks.append(nnx.Linear(3, 3, rngs=nnx.Rngs(1))),
    X,
    outgoing=lambda model: [model.blocks[1]],
    mask=jax.ShapeDtypeStruct(X.shape, X.dtype),
  )
  equal(model(X, X), nets.make(Masked)(X, X))


class LinenBlock(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    y = nn.BatchNorm(use_running_average=True, name="norm")(nn.Dense(8, name="up")(x))
    return x + nn.Dense(x.shape[-1], name="down")(y), None


class LinenNet(nn.Module):
  depth: int = 3

  @nn.compact
  def __call__(self, x):
    axes = {"params": 0, "batch_stats": 0}
    stack = nn.scan(LinenBlock, variable_axes=axes, split_rngs={"params": True}, length=self.depth)
    return stack(name="blocks")(x, None)[0]


@pytest.mark.parametrize("copies", [True, False])
def test_a_linen_module_gets_deeper(copies):
  old, new = LinenNet(), LinenNet(5)
  variables = old.init(jax.random.key(1), X)
  grown, forward, plan = growth.linen.stack(
    old,
    new,
    variables,
    X,
    layers="params/blocks",
    by=2,
    outgoing=["params/blocks/down"],
    rngs=None if copies else jax.random.key(2),
  )
  close(forward(grown, X), old.apply(variables, X))
  grown["params"]["alpha"] = jnp.float32(1)
  close(new.apply(growth.merge(grown, plan), X), forward(grown, X))
  assert jnp.abs(forward(grown, X) - old.apply(variables, X)).max() > 1e-2
  equal(growth.undo(grown, plan), variables)
  assert grown["batch_stats"]["blocks"]["norm"]["mean"].shape == (5, 8)
  kernel = grown["params"]["blocks"]["up"]["kernel"]
  assert bool((kernel[1:3] == kernel[3:]).all()) == copies
  doubled, forward, _ = growth.linen.stack(
    old, LinenNet(6), variables, X, layers="params/blocks", times=2
  )
  equal(forward(doubled, X), LinenNet(6).apply(doubled, X))
