"""Convolutions in groups, and layers of a single unit."""

import growth_nets as nets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from growth_nets import close

from optax_cadence import growth

pytestmark = pytest.mark.ci

IMAGES = jax.random.normal(jax.random.key(3), (2, 4, 4, 3))
ROWS = jax.random.normal(jax.random.key(4), (5, 4))


class Grouped(nnx.Module):
  """A block as in ResNeXt; with a multiplier, the middle is depthwise and makes more channels."""

  def __init__(self, rngs, groups=2, middle=6, after=8):
    self.reduce = nnx.Conv(3, middle, (1, 1), rngs=rngs)
    self.middle = nnx.Conv(middle, after, (3, 3), feature_group_count=groups, rngs=rngs)
    self.norm = nnx.GroupNorm(after, num_groups=groups, use_fast_variance=False, rngs=rngs)
    self.expand = nnx.Conv(after, 3, (1, 1), rngs=rngs)

  def __call__(self, x):
    y = nnx.relu(self.middle(nnx.relu(self.reduce(x))))
    return x + self.expand(self.norm(y))


def shapes(model):
  return [tuple(np.shape(nets.array(m.kernel))) for m in (model.reduce, model.middle, model.expand)]


GROUPED = {
  "more groups": (
    {}, lambda m: {"producer": m.reduce, "unit": 3, "by": 2},
    [(1, 1, 3, 12), (3, 3, 3, 16), (1, 1, 16, 3)], (4, 12, 16),
  ),
  "wider groups": (
    {}, lambda m: {"producer": m.reduce, "blocks": 2, "by": 1},
    [(1, 1, 3, 8), (3, 3, 4, 8), (1, 1, 8, 3)], (2, 8, 8),
  ),
  "groups that give more": (
    {}, lambda m: {"producer": m.middle, "blocks": 2, "by": 1},
    [(1, 1, 3, 6), (3, 3, 3, 10), (1, 1, 10, 3)], (2, 6, 10),
  ),
  "a depthwise multiplier": (
    {"groups": 4, "middle": 4}, lambda m: {"producer": m.reduce, "by": 2},
    [(1, 1, 3, 6), (3, 3, 1, 12), (1, 1, 12, 3)], (6, 6, 12),
  ),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(GROUPED))
def test_groups_grow(kind):
  sizes, how, expected_shapes, (groups, inputs, outputs) = GROUPED[kind]
  model, twin = (nets.make(lambda rngs: Grouped(rngs, **sizes)) for _ in range(2))
  plan = growth.widen(model, IMAGES, fresh=nets.fresh, **how(model))
  assert shapes(model) == expected_shapes
  close(model(IMAGES), twin(IMAGES))
  growth.nnx.set_alpha(model, 1.0)
  expected = model(IMAGES)
  growth.merge(model)
  middle = model.middle
  assert (middle.feature_group_count, middle.in_features, middle.out_features) == (
    groups, inputs, outputs,
  )  # fmt: skip
  close(model(IMAGES), expected)
  assert jnp.abs(expected - twin(IMAGES)).max() > 1e-3
  growth.shrink(model, plan.inverse(), IMAGES)
  close(model(IMAGES), twin(IMAGES))


def test_a_part_of_a_group_says_what_to_name():
  model = nets.make(Grouped)
  with pytest.raises(ValueError, match=r"2 groups of 3 .*unit=3 .more groups.*blocks=2 .wider"):
    growth.widen(model, IMAGES, producer=model.reduce, by=2)


def test_the_work_of_groups_is_counted_once():
  model = nets.make(Grouped)
  plan = growth.widen(model, IMAGES, producer=model.reduce, unit=3, by=2, fresh=nets.fresh)
  before, after = plan.flops
  assert after == 2 * before


class LinenGrouped(nn.Module):
  groups: int = 2

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(3 * self.groups, (1, 1), name="reduce")(x))
    x = nn.Conv(4 * self.groups, (3, 3), feature_group_count=self.groups, name="middle")(x)
    return nn.Conv(3, (1, 1), name="expand")(nn.relu(x))


def test_linen_groups_grow():
  old, new = LinenGrouped(), LinenGrouped(3)
  variables = nets.init(old, 0) if hasattr(old, "inputs") else old.init(jax.random.key(0), IMAGES)
  grown, forward, plan = growth.linen.widen(
    old, new, variables, IMAGES, producer="params/reduce", unit=3, by=1, rngs=jax.random.key(1)
  )
  close(forward(grown, IMAGES), old.apply(variables, IMAGES))
  grown["params"]["alpha"] = jnp.float32(1)
  close(new.apply(growth.merge(grown, plan), IMAGES), forward(grown, IMAGES))


class Narrow(nnx.Module):
  def __init__(self, rngs, conv=False):
    self.one = nnx.Linear(4, 1, rngs=rngs)
    self.scale = nnx.Param(jnp.full((1,), 1.5))
    self.two = nnx.Linear(1, 2, rngs=rngs)
    nets.put(self.one.bias, jnp.array([0.5]))

  def __call__(self, x):
    scale = jnp.broadcast_to(nets.array(self.scale)[None], (len(x), self.one.kernel.shape[-1]))
    return self.two(jnp.tanh(self.one(x)) * scale)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_layer_of_one_unit_grows(rows):
  model, twin, x = nets.make(Narrow), nets.make(Narrow), ROWS[:rows]
  plan = growth.widen(model, x, producer=model.one, by=2, fresh=nets.fresh)
  changed = {"/".join(change.path) for change in plan.changes}
  assert changed == {"one/bias", "one/kernel", "scale", "two/kernel"}
  assert tuple(model.one.bias.shape) == (3,)
  close(model(x), twin(x))
  nets.opens_and_merges(model, twin, x)


def test_what_has_shrunk_to_one_unit_grows_again():
  model = nets.make(nets.Mlp)
  model.eval()
  units = growth.nnx.couple(model, nets.IMAGES, producer=model.one)
  tree = growth.nnx.variables(model)
  growth.shrink(model, growth.shrinking(tree, units, keep=[3]), nets.IMAGES)
  expected = model(nets.IMAGES)
  growth.widen(model, nets.IMAGES, producer=model.one, by=4, fresh=nets.fresh)
  close(model(nets.IMAGES), expected)
  assert tuple(model.one.bias.shape) == (5,)


def test_one_channel_of_images_grows():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.conv, self.norm = nnx.Conv(3, 1, (3, 3), rngs=rngs), nnx.BatchNorm(1, rngs=rngs)
      self.out = nnx.Conv(1, 2, (1, 1), rngs=rngs)

    def __call__(self, x):
      return self.out(self.norm(self.conv(x)))

  model, twin = nets.make(Net), nets.make(Net)
  growth.widen(model, IMAGES, producer=model.conv, by=2, fresh=nets.fresh)
  assert tuple(model.norm.scale.shape) == tuple(model.norm.mean.shape) == (3,)
  close(model(IMAGES), twin(IMAGES))


class Gated(nnx.Module):
  """A depthwise convolution behind a layer that makes what it reads and its gate, as Mamba's."""

  def __init__(self, rngs):
    self.enter = nnx.Linear(4, 12, rngs=rngs)
    self.conv = nnx.Conv(6, 6, (3,), padding="CAUSAL", feature_group_count=6, rngs=rngs)
    self.mix = nnx.Einsum("btd,de->bte", (6, 5), (5,), rngs=rngs)
    self.leave = nnx.Linear(5, 2, rngs=rngs)

  def __call__(self, x):
    h, gate = jnp.split(self.enter(x), 2, axis=-1)
    return self.leave(self.mix(self.conv(h) * nnx.sigmoid(gate)))


def test_blocks_of_one_layer_are_no_groups_of_the_next():
  model, twin, x = nets.make(Gated), nets.make(Gated), ROWS.reshape(1, 5, 4)
  plan = growth.widen(model, x, producer="enter", blocks=2, by=2, fresh=nets.fresh)
  assert tuple(model.enter.kernel.shape) == (4, 16)
  assert model.conv.feature_group_count == model.conv.in_features == 8
  close(model(x), twin(x))
  nets.opens_and_merges(model, twin, x)
  assert model.mix.kernel_shape == (8, 5)
  growth.shrink(model, plan.inverse(), x)
  assert model.conv.feature_group_count == model.mix.kernel_shape[0] == 6
  growth.widen(model, x, producer="mix", by=2, fresh=nets.fresh)
  assert model.mix.bias_shape == (7,)
  close(model(x), twin(x))


def test_one_group_becomes_several():
  # As described by hand: a search takes a convolution of one channel for one without groups.
  numbers = ("NWC", "WIO", "NWC")

  def fn(p, x):
    x = jax.lax.conv_general_dilated(x, p["in"], (1,), "SAME", dimension_numbers=numbers)
    groups = {"dimension_numbers": numbers, "feature_group_count": x.shape[-1]}
    return jax.lax.conv_general_dilated(x, p["each"], (1,), "SAME", **groups) @ p["out"]

  shapes = {"in": (1, 4, 3), "each": (3, 1, 3), "out": (3, 2)}
  larger = {name: nets.fresh((name,), shape, jnp.float32) for name, shape in shapes.items()}
  params = {"in": larger["in"][..., :1], "each": larger["each"][..., :1], "out": larger["out"][:1]}
  units = growth.dimension(params, {"in": -1, "each": -1, "out": 0})
  plan = growth.widening(params, units, by=2)
  forward, rows = growth.gated(fn, plan), ROWS[None]
  for alpha, expected in ((0.0, fn(params, rows)), (1.0, fn(larger, rows))):
    found = forward({**plan.apply(params, larger), "alpha": jnp.float32(alpha)}, rows)
    close(found, expected)
