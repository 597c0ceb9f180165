"""Bad input says where, what was found and what was expected."""

import growth_nets as nets
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from optax_cadence import growth

PARAMS = {"one": jnp.ones((3, 4)), "bias": jnp.ones(4), "two": jnp.ones((4, 2))}
X = jnp.ones((5, 3))


def fn(p, x):
  return jnp.tanh(x @ p["one"] + p["bias"][None]) @ p["two"]


def test_a_missing_member_is_named():
  described = growth.dimension(PARAMS, {"one": -1, "two": 0})
  with pytest.raises(ValueError, match=r"lacks 'bias' of shape \(4,\)"):
    growth.couple(fn, PARAMS, X, producer=described)


def test_sizes_that_do_not_agree():
  with pytest.raises(ValueError, match=r"'one' of shape \(3, 4\): 4, 'two' of shape \(4, 2\): 2"):
    growth.dimension(PARAMS, {"one": -1, "two": 1})


def test_layers_and_units_of_the_same_leaves_are_not_added_at_once():
  p = {"up": jnp.ones((2, 3, 4)), "down": jnp.ones((2, 4, 3))}
  plans = [
    growth.stacking(p, ["up", "down"], by=1, outgoing=["down"]),
    growth.widening(p, growth.dimension(p, {"up": 2, "down": 1}), by=2),
  ]
  for one, other in (plans, plans[::-1]):
    with pytest.raises(ValueError, match="in both plans, and in one of them grows by whole layers"):
      one + other


def test_a_consumer_that_does_not_match():
  model = nets.make(nets.Mlp)
  with pytest.raises(ValueError, match=r"consumer 'one/kernel' of shape \(16, 8\) has 16 inputs"):
    growth.widen(model, producer=model.two, consumers=[model.one], by=2)


def test_a_norm_that_was_not_described_changes_nothing():
  model = nets.make(nets.NnxResNet)
  block = model.blocks[0]
  with pytest.raises(ValueError, match="lacks 'blocks/0/norm/"):
    growth.widen(model, nets.IMAGES, producer=block.up, consumers=[block.down], by=4)
  assert type(model) is nets.NnxResNet and block.up.kernel.shape == (3, 3, 8, 12)


def test_a_description_without_inputs_is_checked_when_it_runs_and_can_be_taken_back():
  model = nets.make(nets.NnxResNet)
  before = growth.nnx.variables(model)
  block = model.blocks[0]
  plan = growth.widen(model, producer=block.up, consumers=[block.down], by=4, fresh=nets.fresh)
  with pytest.raises(ValueError, match=r"'blocks/0/norm/bias' of shape \(12,\)"):
    model(nets.IMAGES)
  growth.nnx.set_alpha(model, 1.0)
  growth.merge(model)
  growth.shrink(model, plan.inverse())
  assert jax.tree.all(
    jax.tree.map(lambda a, b: (a == b).all(), growth.nnx.variables(model), before)
  )


def test_kernels_do_not_shrink():
  kernel = {"kernel": jnp.ones((3, 3, 1, 2))}
  with pytest.raises(ValueError, match=r"'kernel' of shape .*\(3, 3\), found \(1, 3\)"):
    growth.enlarging(kernel, {"kernel": (1, 3)})


def test_padding_has_to_keep_the_taps():
  def conv(p, x):
    return jax.lax.conv_general_dilated(
      x, p["kernel"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )

  params = {"kernel": jnp.ones((3, 1, 2))}
  plan = growth.enlarging(params, {"kernel": (5,)})
  bigger = plan.apply(params, lambda path, shape, dtype: jnp.ones(shape, dtype))
  with pytest.raises(ValueError, match="SAME"):
    growth.gated(conv, plan)(bigger, jnp.ones((1, 9, 1)))


def test_growth_inside_jit():
  plan = growth.widening(PARAMS, growth.couple(fn, PARAMS, X, producer="one"), 2)
  with pytest.raises(ValueError, match="outside jit"):
    jax.jit(lambda p: plan.apply(p, lambda path, shape, dtype: jnp.ones(shape, dtype)))(PARAMS)


def test_what_grows_into_the_input():
  with pytest.raises(ValueError, match="argument 0 of shape"):
    growth.couple(fn, PARAMS, X, producer="one", axis=0)


def test_units_that_nothing_reads():
  with pytest.raises(ValueError, match="nothing uses the units"):
    growth.couple(fn, PARAMS, X, producer="two")


def test_units_that_cannot_be_followed():
  def sorted_fn(p, x):
    return jnp.sort(x @ p["one"], -1) @ p["two"]

  params = {"one": PARAMS["one"], "two": PARAMS["two"]}
  units = growth.dimension(params, {"one": -1, "two": 0})
  plan = growth.widening(params, units, 2)
  bigger = plan.apply(params, lambda path, shape, dtype: jnp.ones(shape, dtype))
  with pytest.raises(ValueError, match="sort .*cannot keep old and new"):
    growth.gated(sorted_fn, plan)(bigger, X)


def test_channels_cut_into_groups():
  old = nets.ResNet(groups=4)
  variables = nets.init(old, 0)
  with pytest.raises(ValueError, match=r"unit=2 .*blocks=4"):
    growth.couple(old.apply, variables, old.inputs, producer="params/stem/kernel")


def test_a_plan_fits_its_tree_alone():
  plan = growth.widening(PARAMS, growth.dimension(PARAMS, {"one": -1, "bias": 0, "two": 0}), 2)
  other = {**PARAMS, "bias": jnp.ones(5)}
  with pytest.raises(ValueError, match=r"'bias': the plan expected shape \(4,\), found .*5"):
    plan.apply(other, PARAMS)
  with pytest.raises(ValueError, match=r"fresh values of 'one': expected shape \(3, 6\)"):
    plan.apply(PARAMS, PARAMS)
  bigger = plan.apply(PARAMS, lambda path, shape, dtype: jnp.ones(shape, dtype))
  with pytest.raises(ValueError, match="no gate at 'alpha'"):
    growth.gated(fn, plan)(PARAMS, X)
  with pytest.raises(ValueError, match=r"'alpha': expected nothing"):
    plan.apply({**PARAMS, "alpha": bigger["alpha"]}, lambda path, shape, dtype: jnp.ones(shape))


def test_one_growth_at_a_time():
  model = nets.make(nets.Mlp)
  growth.widen(model, nets.IMAGES, producer=model.one, by=2)
  with pytest.raises(ValueError, match="merge it before"):
    growth.widen(model, nets.IMAGES, producer=model.one, by=2)


@pytest.mark.parametrize("by", [0, -1, 1.5, True])
def test_a_number_of_units(by):
  units = growth.dimension(PARAMS, {"one": -1})
  with pytest.raises(ValueError, match="by must be a positive integer"):
    growth.widening(PARAMS, units, by)


def test_entries_are_given_along_one_axis():
  params = {**PARAMS, "three": jnp.ones((2, 1))}
  one, two = ({"one": -1, "bias": 0, "two": 0}, {"two": -1, "three": 0})
  plan = growth.widening(params, {growth.dimension(params, d): 1 for d in (one, two)})
  fresh = growth.given(plan, lambda path, shape, dtype: jnp.ones(shape, dtype), {"two": 1.0})
  with pytest.raises(ValueError, match=r"'two': expected a leaf .* one axis, found axes \[0, 1\]"):
    plan.apply(params, fresh)


def test_flax_stays_at_the_edge():
  import subprocess
  import sys

  code = "import sys; from optax_cadence import growth; assert 'flax' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True)


def test_inputs_of_the_wrong_shape():
  with pytest.raises(ValueError, match=r"does not run on .* \(5, 7\) float32: TypeError: .*\(7,\)"):
    growth.couple(fn, PARAMS, jnp.ones((5, 7)), producer="one")
  model = nets.make(nets.Mlp)
  with pytest.raises(ValueError, match=r"does not run on .* \(4, 5\) float32: TypeError: "):
    growth.widen(model, jnp.ones((4, 5)), producer=model.one, by=2)
  assert type(model) is nets.Mlp
  old = nets.Dense()
  with pytest.raises(ValueError, match=r"\(4, 5\) float32: ScopeParamShapeError: "):
    growth.linen.couple(old, nets.init(old, 0), jnp.ones((4, 5)), producer="params/one")


def test_a_merge_without_a_plan_or_a_gate():
  with pytest.raises(ValueError, match=r"growth.merge\(variables, plan\)"):
    growth.merge(PARAMS)
  with pytest.raises(ValueError, match="Mlp has no gate"):
    growth.merge(nets.make(nets.Mlp))


def test_a_layer_without_one_kernel():
  model = nets.make(nets.NnxTransformer)
  with pytest.raises(ValueError, match=r"'attention': expected one kernel .*'attention/key/"):
    growth.widen(model, nets.TOKENS, producer=model.attention, by=2)


def test_what_cannot_be_gated_changes_no_live_model():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.one, self.two = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
      return self.two(jnp.sort(self.one(x), -1))

  model = nets.make(Net)
  units = growth.dimension(
    growth.nnx.variables(model), {"one/kernel": -1, "one/bias": 0, "two/kernel": 0}
  )
  with pytest.raises(ValueError, match=r"sort .*cannot keep old and new|cannot be followed"):
    growth.widen(model, X, producer=units, by=2, fresh=nets.fresh)
  assert type(model) is Net


def test_a_program_that_has_no_gate_is_an_error_of_the_growth():
  class Net(nn.Module):
    width: int = 6

    @nn.compact
    def __call__(self, x):
      x = nn.Dense(2, name="down")(nn.Dense(self.width, name="up")(x))
      return x[:, jax.nn.one_hot(self.width, self.width + 1).argmax() % 2]

  old, new, x = Net(), Net(9), jnp.ones((3, 4))
  variables = old.init(jax.random.key(0), x)
  with pytest.raises(ValueError, match="Net does not run at its new size, so nothing .* by an int"):
    growth.linen.widen(old, new, variables, x, producer="params/up", by=3, fresh=nets.fresh)
