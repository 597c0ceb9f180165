"""Several producers in one call, further arguments of the forward pass, sizes in attributes."""

import growth_nets as nets
import jax
import jax.numpy as jnp
import pytest
import zoo
from flax import linen as nn
from flax import nnx
from growth_nets import close

from optax_cadence import growth

pytestmark = pytest.mark.ci

X = jax.random.normal(jax.random.key(0), (3, 4))


@pytest.fixture(autouse=True)
def as_people_write_them():
  with nets.relaxed():
    yield


class Tower(nnx.Module):
  """Layers in a list, all of one width but the last; dropout if told so by an argument."""

  def __init__(self, rngs):
    self.layers = nets.module_list(
      [nnx.Linear(n, m, rngs=rngs) for n, m in ((4, 6), (6, 6), (6, 5))]
    )
    self.out = nnx.Linear(5, 6, rngs=rngs)

  def __call__(self, x, *, scaled):
    for layer in self.layers:
      x = jnp.tanh(layer(x))
    return self.out(x) * (2 if scaled else 1)


def shapes(model):
  return [tuple(layer.kernel.shape) for layer in [*model.layers, model.out]]


@pytest.mark.parametrize(
  ("producer", "by", "expected"),
  [
    ("layers/[01]", 2, [(4, 8), (8, 8), (8, 5), (5, 6)]),
    ("layers/*", 2, [(4, 8), (8, 8), (8, 7), (7, 6)]),
    (["layers/0", "layers/2"], [2, 3], [(4, 8), (8, 6), (6, 8), (8, 6)]),
    (["layers/0", "layers/0"], 1, [(4, 7), (7, 6), (6, 5), (5, 6)]),
  ],
)
def test_several_layers_grow_at_once(producer, by, expected):
  model, twin = nets.make(Tower), nets.make(Tower)
  plan = growth.widen(model, X, producer=producer, by=by, fresh=nets.fresh, scaled=True)
  assert shapes(model) == expected
  close(model(X, scaled=False), twin(X, scaled=False))
  growth.nnx.set_alpha(model, 1.0)
  opened = model(X, scaled=True)
  growth.merge(model)
  close(model(X, scaled=True), opened)
  growth.shrink(model, plan.inverse(), X, scaled=True)
  assert shapes(model) == shapes(twin)


def test_modules_in_a_list():
  model = nets.make(Tower)
  units = growth.nnx.couple(model, X, producer=[model.layers[0], "layers/1"], scaled=True)
  assert {"/".join(m.path) for m in units.members} == {
    "layers/0/kernel", "layers/0/bias", "layers/1/kernel", "layers/1/bias", "layers/2/kernel",
  }  # fmt: skip


@pytest.mark.parametrize(
  ("producer", "by", "message"),
  [
    ("layer*/up", 2, r"'layer\*/up' matches nothing: expected layers or leaves of 'layers/0/bias'"),
    (["layers/0", "layers/1"], [2], r"one for each of 2 producers, found \[2\]"),
    (["layers/0", "layers/0"], [1, 2], r"'layers/0/kernel' .* gets 1 new ones, and would get 2"),
    (["layers/0", "out"], 2, "nothing uses the units of 'out/bias', 'out/kernel'"),
  ],
)
def test_producers_that_do_not_fit(producer, by, message):
  model = nets.make(Tower)
  with pytest.raises(ValueError, match=message):
    growth.widen(model, X, producer=producer, by=by, fresh=nets.fresh, scaled=True)
  assert shapes(model) == shapes(nets.make(Tower))


def test_the_forward_pass_of_a_live_model_gets_its_arguments():
  class Deep(nnx.Module):
    def __init__(self, rngs):
      self.stem, self.blocks = nnx.Conv(1, 4, (3, 3), rngs=rngs), nets.module_list([])

    def __call__(self, x, *, train):
      assert train in (True, False)
      x = self.stem(x)
      for block in self.blocks:
        x = x + block(x)
      return x.sum((1, 2, 3))

  model, x = nets.make(Deep), nets.IMAGES
  plan = growth.deepen(
    model,
    lambda m: m.blocks.append(nnx.Conv(4, 4, (1, 1), rngs=nnx.Rngs(1))),
    x,
    outgoing=lambda m: [m.blocks[0]],
    train=True,
  )
  growth.merge(model)
  growth.shrink(model, plan.inverse(), x, take_out=lambda m: m.blocks.pop(), train=True)
  growth.enlarge(model, x, conv=model.stem, kernel_size=(5, 5), fresh=nets.fresh, train=False)
  growth.merge(model)
  units = growth.dimension(growth.nnx.variables(model), {"stem/kernel": -1, "stem/bias": 0})
  plan = growth.widening(growth.nnx.variables(model), units, by=1)
  growth.nnx.grow(model, plan, nets.fresh, inputs=[x], train=True)
  assert tuple(model.stem.kernel.shape) == (5, 5, 1, 5)


class Drops(nnx.Module):
  """A forward pass that asks for random numbers by the name by which growth does."""

  def __init__(self, rngs):
    self.one, self.drop = nnx.Linear(4, 6, rngs=rngs), nnx.Dropout(0.5, deterministic=False)
    self.two = nnx.Linear(6, 2, rngs=rngs)

  def __call__(self, x, *, rngs):
    x = jnp.tanh(self.one(x))
    return self.two(x if rngs is None else self.drop(x, rngs=rngs))


@pytest.mark.parametrize("rngs", [None, lambda: nnx.Rngs(params=0, dropout=1)])
def test_random_numbers_go_to_the_forward_pass_too(rngs):
  model, twin = nets.make(Drops), nets.make(Drops)
  given = None if rngs is None else rngs()
  growth.widen(model, X, producer=model.one, by=2, rngs=given)
  assert tuple(model.one.kernel.shape) == (4, 8)
  close(*(m(X, rngs=None if rngs is None else rngs()) for m in (model, twin)))


def test_random_numbers_may_be_a_key():
  model, twin = nets.make(Tower), nets.make(Tower)
  growth.widen(model, X, producer="layers/0", by=2, rngs=jax.random.key(3), scaled=False)
  close(model(X, scaled=False), twin(X, scaled=False))


class LinenTower(nn.Module):
  width: int = 6
  middle: int = 6

  @nn.compact
  def __call__(self, x, train):
    x = nn.Dropout(0.5, deterministic=not train)(nn.tanh(nn.Dense(self.width, name="layer0")(x)))
    x = nn.tanh(nn.Dense(self.middle, name="layer1")(x))
    x = nn.tanh(nn.Dense(self.width, name="layer2")(x))
    return nn.Dense(2, name="out")(x)


def linen_variables(module):
  return module.init(jax.random.key(0), X, train=False)


def test_a_module_whose_layers_have_one_width():
  old, new = LinenTower(), LinenTower(width=9, middle=9)
  variables = linen_variables(old)
  grown, forward, plan = growth.linen.widen(
    old, new, variables, X, producer="params/layer?", by=3, rngs=jax.random.key(1), train=False
  )
  close(forward(grown, X, train=False), old.apply(variables, X, train=False))
  opened = nets.with_alpha(grown, 1.0)
  merged = growth.merge(opened, plan)
  close(new.apply(merged, X, train=False), forward(opened, X, train=False))
  small, _ = growth.linen.shrink(
    LinenTower(width=9, middle=9), LinenTower(width=9, middle=8), merged, X,
    producer="params/layer1", keep=range(8), train=False,
  )  # fmt: skip
  assert small["params"]["layer2"]["kernel"].shape == (8, 9)


@pytest.mark.parametrize("fresh", [nets.fresh, None])
def test_a_new_module_of_another_size_is_an_error_that_names_the_leaves(fresh):
  old, new = LinenTower(), LinenTower(width=9, middle=9)
  match = (
    r"'params/layer0/bias' \(9,\), but \(6,\) by the plan; 'params/layer0/kernel' \(4, 9\), but"
    r" \(4, 6\).*a producer for each layer"
  )
  with pytest.raises(ValueError, match=match):
    growth.linen.widen(
      old, new, linen_variables(old), X, producer="params/layer1", by=3, train=True, fresh=fresh,
      rngs=jax.random.key(1),
    )  # fmt: skip


def test_what_is_larger_in_the_new_module_grows():
  class Net(nn.Module):
    """One number sets all widths, as of a ResNet; the flattened pixels hold channels four times."""

    filters: int = 3

    @nn.compact
    def __call__(self, x):
      x = nn.relu(nn.Conv(self.filters, (3, 3))(x))
      for width in (self.filters, 2 * self.filters):
        y = nn.Conv(width, (1, 1))(nn.relu(nn.Conv(self.filters, (3, 3))(x)))
        x = y if x.shape != y.shape else x + y
      x = nn.max_pool(x, (2, 2), (2, 2))
      return nn.Dense(2)(x.reshape(len(x), -1))

  old, new, x = Net(), Net(5), nets.IMAGES
  variables = old.init(jax.random.key(0), x)
  grown, forward, plan = growth.linen.widen(old, new, variables, x, fresh=nets.fresh)
  assert sorted((units.size, more) for units, more in plan.dimensions) == [
    (3, 2), (3, 2), (3, 2), (6, 4),
  ]  # fmt: skip
  close(forward(grown, x), old.apply(variables, x))
  opened = nets.with_alpha(grown, 1.0)
  close(new.apply(growth.merge(opened, plan), x), forward(opened, x))

  with pytest.raises(ValueError, match="larger than the old one, found the same"):
    growth.linen.widen(old, Net(3), variables, x, fresh=nets.fresh)
  with pytest.raises(ValueError, match=r"'.*' grows along axis . from 3 to 2: expected .* larger"):
    growth.linen.widen(old, Net(2), variables, x, fresh=nets.fresh)
  with pytest.raises(ValueError, match="expected both producer= and by=, or neither, found None"):
    growth.linen.widen(old, new, variables, x, by=2, fresh=nets.fresh)


@pytest.mark.parametrize("boxed", [True, False])
def test_variables_with_names_for_their_axes(boxed):
  class Named(nn.Module):
    width: int = 6

    @nn.compact
    def __call__(self, x):
      init = nn.with_partitioning(nn.initializers.normal(), ("in", "out"))
      x = nn.tanh(nn.Dense(self.width, kernel_init=init, name="up")(x))
      return nn.Dense(2, kernel_init=init, name="down")(x)

  old, new = Named(), Named(9)
  variables = old.init(jax.random.key(0), X)
  variables = variables if boxed else nn.meta.unbox(variables)
  grown, forward, _ = growth.linen.widen(
    old, new, variables, X, producer="params/up", by=3, rngs=jax.random.key(1)
  )
  close(forward(grown, X), old.apply(variables, X))
  with pytest.raises(ValueError, match="'params/up/bias'.* but .* by the plan"):
    growth.linen.widen(old, Named(8), variables, X, producer="params/up", by=3, fresh=nets.fresh)


def gpt():
  return nets.make(zoo.Gpt)


HEADS = {"producer": "blocks/*/qkv", "unit": 3, "blocks": 3, "fresh": nets.fresh}


# With two more heads the network runs at its new size, but with two heads of twice the size.
@pytest.mark.parametrize(("by", "heads"), [(1, 3), (2, 4)])
def test_a_size_in_an_attribute_is_named_and_set(by, heads):
  model = gpt()
  match = rf"GptBlock holds 'heads', 2: if .* changed, pass sizes=\{{'heads': {heads}\}}\. "
  with pytest.raises(ValueError, match=match):
    growth.widen(model, zoo.TOKENS, by=by, **HEADS)
  assert model.blocks[0].heads == 2
  growth.widen(model, zoo.TOKENS, by=by, sizes={"heads": heads}, **HEADS)
  assert model.blocks[1].heads == heads
  close(model(zoo.TOKENS), gpt()(zoo.TOKENS))
  growth.nnx.set_alpha(model, 1.0)
  opened = model(zoo.TOKENS)
  growth.merge(model)
  close(model(zoo.TOKENS), opened)


def test_a_size_by_its_path():
  model = gpt()
  plan = growth.widen(
    model, zoo.TOKENS, by=1, sizes={"blocks/0/heads": 3}, **{**HEADS, "producer": "blocks/0/qkv"}
  )
  assert [block.heads for block in model.blocks] == [3, 2]
  growth.nnx.set_alpha(model, 1.0)
  growth.merge(model)
  match = r"pass sizes=\{'blocks/0/heads': 2\}"
  with pytest.raises(ValueError, match=match):
    growth.shrink(model, plan.inverse(), zoo.TOKENS)
  growth.shrink(model, plan.inverse(), zoo.TOKENS, sizes={"*/heads": 2})
  close(model(zoo.TOKENS), gpt()(zoo.TOKENS))


def test_an_attribute_that_is_not_there():
  match = r"sizes: no attribute 'num_heads': expected one of 'blocks/0/heads', 'blocks/1/heads'"
  with pytest.raises(ValueError, match=match):
    growth.widen(gpt(), zoo.TOKENS, by=1, sizes={"num_heads": 3}, **HEADS)


def test_a_linen_module_that_cuts_its_heads_otherwise():
  class Attention(nn.Module):
    heads: int = 2
    width: int = 6

    @nn.compact
    def __call__(self, x):
      q = nn.Dense(self.width, name="q")(x).reshape(len(x), self.heads, -1)
      return nn.Dense(2, name="o")(jax.nn.softmax(q, axis=-1).reshape(len(x), -1))

  old = Attention()
  variables = old.init(jax.random.key(0), X)
  described = {"producer": "params/q", "unit": 3, "by": 2, "fresh": nets.fresh}
  growth.linen.widen(old, Attention(heads=4, width=12), variables, X, **described)
  with pytest.raises(ValueError, match="does not run at its new size with its units where they"):
    growth.linen.widen(old, Attention(heads=2, width=12), variables, X, **described)
