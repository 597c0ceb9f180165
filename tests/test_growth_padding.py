"""Larger filters under every padding, transposed convolutions among them."""

import growth_nets as nets
import jax
import pytest
from flax import nnx
from growth_nets import close

from optax_cadence import growth

pytestmark = pytest.mark.ci

IMAGES = jax.random.normal(jax.random.key(3), (2, 6, 6, 3))
UP = {"kind": nnx.ConvTranspose, "strides": (2, 2)}

LAYERS = {
  "VALID": {"padding": "VALID"},
  "a number": {"padding": 1},
  "pairs": {"padding": [(0, 2), (1, 1)], "strides": 2},
  "dilated": {"padding": [(2, 2), (2, 2)], "kernel_dilation": 2},
  "transposed": UP,
  "transposed, pairs": {**UP, "padding": [(1, 1), (2, 1)]},
  "transposed, its kernel too": {**UP, "transpose_kernel": True},
}


class Net(nnx.Module):
  def __init__(self, rngs, kind=nnx.Conv, **settings):
    self.conv = kind(3, 4, kernel_size=(3, 2), rngs=rngs, **settings)
    self.out = nnx.Conv(4, 2, (1, 1), rngs=rngs)

  def __call__(self, x):
    return self.out(nnx.relu(self.conv(x)))


@pytest.mark.parametrize("kind", list(LAYERS))
def test_filters_grow_and_shrink(kind):
  model, twin = (nets.make(lambda rngs: Net(rngs, **LAYERS[kind])) for _ in range(2))
  # A kernel that is turned round has to grow alike at both ends, as "SAME" then pads.
  size = (5, 4) if "its kernel too" in kind else (4, 5)
  plan = growth.enlarge(model, IMAGES, conv=model.conv, kernel_size=size, fresh=nets.fresh)
  close(model(IMAGES), twin(IMAGES))
  nets.opens_and_merges(model, twin, IMAGES)
  assert tuple(model.conv.kernel_size) == size
  growth.shrink(model, plan.inverse(), IMAGES)
  close(model(IMAGES), twin(IMAGES))
  assert tuple(model.conv.kernel_size) == (3, 2)


@pytest.mark.parametrize("transposed", [False, True])
def test_transposed_convolutions_widen(transposed):
  settings = {**UP, "transpose_kernel": transposed}
  model, twin = (nets.make(lambda rngs: Net(rngs, **settings)) for _ in range(2))
  axis = -2 if transposed else -1
  growth.widen(model, IMAGES, producer=model.conv, axis=axis, by=2, fresh=nets.fresh)
  close(model(IMAGES), twin(IMAGES))
  growth.nnx.set_alpha(model, 1.0)
  growth.merge(model)
  assert (model.conv.in_features, model.conv.out_features) == (3, 6)


class Own(nnx.Module):
  """A convolution that is not Flax's."""

  def __init__(self, inputs, outputs, kernel_size, *, rngs):
    shape = (*kernel_size, inputs, outputs)
    self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape))

  def __call__(self, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    kernel = nets.array(self.kernel)
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)


def test_a_convolution_of_ones_own():
  model, twin = (nets.make(lambda rngs: Net(rngs, kind=Own)) for _ in range(2))
  growth.enlarge(model, IMAGES, conv=model.conv, kernel_size=(5, 3), fresh=nets.fresh)
  assert model.conv.kernel.shape == (5, 3, 3, 4)
  close(model(IMAGES), twin(IMAGES))


def test_a_padding_that_makes_more_of_the_image_is_refused():
  model = nets.make(lambda rngs: Net(rngs, padding="VALID", **UP))
  with pytest.raises(ValueError, match="does not run at its new size.*pad"):
    growth.enlarge(model, IMAGES, conv=model.conv, kernel_size=(5, 4), fresh=nets.fresh)
