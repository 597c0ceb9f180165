"""Where new entries come from if nobody says."""

import growth_nets as nets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from growth_nets import close

from optax_cadence import growth

pytestmark = pytest.mark.ci

X = jax.random.normal(jax.random.key(0), (3, 6))


@pytest.fixture(autouse=True)
def as_people_write_them():
  with nets.relaxed():
    yield


def new_entries(plan, model, name):
  """The entries of a leaf that a growth has added."""
  tree = growth.nnx.variables(model)
  change = {"/".join(c.path): c for c in plan.changes}[name]
  for key in name.split("/"):
    tree = {str(k): v for k, v in tree.items()}[key]
  new = np.ones(change.after, bool)
  new[change.index] = False
  return np.asarray(tree)[new]


class LayerScale(nnx.Module):
  def __init__(self, width):
    self.gamma = nnx.Param(jnp.full((width,), 1e-5))


class Net(nnx.Module):
  """What the user's own classes have: a token, a scale, a table of their own initializer."""

  def __init__(self, rngs):
    self.stem = nnx.Linear(6, 400, rngs=rngs)
    self.scale = LayerScale(400)
    self.table_init = nnx.initializers.constant(7.0)
    self.table = nnx.Param(jnp.zeros((2, 400)))
    self.token = nnx.Param(2 + 0.1 * jax.random.normal(rngs.params(), (1, 400)))
    self.out = nnx.Linear(400, 2, rngs=rngs)

  def __call__(self, x):
    x = self.stem(x) * self.scale.gamma[...]
    return self.out(x + self.token[...] + self.table[...][:1])


def test_variables_of_own_classes_are_drawn_like_the_old_and_the_plan_says_so():
  model = Net(nnx.Rngs(0))
  plan = growth.widen(model, X, producer=model.stem, by=400)
  np.testing.assert_array_equal(new_entries(plan, model, "scale/gamma"), np.float32(1e-5))
  np.testing.assert_array_equal(new_entries(plan, model, "table"), np.float32(7))
  token = new_entries(plan, model, "token")
  np.testing.assert_allclose([token.mean(), token.std()], [2, 0.1], rtol=0.1)
  kernel = new_entries(plan, model, "stem/kernel")
  np.testing.assert_allclose(kernel.std(), 6**-0.5, rtol=0.1)  # the default of a Linear
  how = ": drawn like the old ones, normal, of their mean and deviation\n"
  assert f"new entries of 'gamma' of LayerScale{how}" in str(plan)
  assert f"new entries of 'token' of Net{how}" in str(plan)
  assert str(plan).count("drawn") == 2


def test_what_has_no_mean_needs_fresh_values():
  class Ranks(nnx.Module):
    def __init__(self, rngs):
      self.one, self.two = nnx.Linear(6, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
      self.rank = nnx.Variable(jnp.arange(4))

    def __call__(self, x):
      return self.two(self.one(x) * self.rank[...])

  model = nets.make(Ranks)
  with pytest.raises(ValueError, match="for 'rank', 'rank' of Ranks, and int32 entries .* fresh="):
    growth.widen(model, X, producer=model.one, by=2)


def test_a_layer_that_keeps_its_initializer_uses_it():
  model = nnx.Linear(3, 4, kernel_init=nnx.initializers.constant(5.0), rngs=nnx.Rngs(0))
  if not hasattr(model, "kernel_init"):
    model.kernel_init = nnx.initializers.constant(5.0)  # as Flax did before 0.11
  kernel = growth.nnx.default_init(model)(("kernel",), (3, 6), jnp.float32)
  np.testing.assert_array_equal(kernel, np.float32(5))


def test_low_rank_additions():
  class Lora(nnx.Module):
    def __init__(self, rngs):
      self.one = nnx.LoRALinear(6, 5, lora_rank=2, rngs=rngs)
      self.two = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
      return self.two(jnp.tanh(self.one(x)))

  model, twin = nets.make(Lora), nets.make(Lora)
  rank = growth.nnx.couple(model, X, producer="one/lora/lora_a")
  units = growth.nnx.couple(model, X, producer=model.one)  # its own kernel
  plan = growth.widening(growth.nnx.variables(model), {rank: 3, units: 4})
  growth.nnx.grow(model, plan, None, inputs=[X])
  close(model(X), twin(X))
  assert not new_entries(plan, model, "one/lora/lora_b").any()
  assert new_entries(plan, model, "one/lora/lora_a").std() > 0.1
  assert "drawn" not in str(plan)
  nets.opens_and_merges(model, twin, X)
  assert tuple(model.one.lora.lora_b.shape) == (5, 9)


def test_the_state_of_a_cell_is_read_by_orthogonal_weights():
  cell = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0))
  fresh = growth.nnx.default_init(cell)
  kernel = fresh(("dense_h", "kernel"), (8, 24), jnp.float32)
  np.testing.assert_allclose(kernel @ kernel.T, np.eye(8), atol=1e-5)
  kernel = fresh(("dense_i", "kernel"), (8, 24), jnp.float32)
  assert abs(kernel @ kernel.T - np.eye(8)).max() > 1e-2


@pytest.mark.skipif(not hasattr(nnx, "WeightNorm"), reason="came with Flax 0.12")
def test_layers_that_norm_their_weights():
  class Normed(nnx.Module):
    def __init__(self, rngs):
      self.one = nnx.WeightNorm(nnx.Linear(6, 4, rngs=rngs), rngs=rngs)
      self.two = nnx.SpectralNorm(nnx.Linear(4, 5, rngs=rngs), update_stats=False, rngs=rngs)
      self.three = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
      return self.three(jnp.tanh(self.two(jnp.tanh(self.one(x)))))

  model, twin = Normed(nnx.Rngs(0)), Normed(nnx.Rngs(0))
  plan = growth.widen(model, X, producer=["one", "two/layer_instance"], by=[2, 30])
  np.testing.assert_array_equal(new_entries(plan, model, "one/scales/('kernel',)"), np.float32(1))
  assert 0.005 < new_entries(plan, model, "two/batch_stats/('kernel', 'u')").std() < 0.02
  assert "drawn" not in str(plan)
  close(model(X), twin(X))
  nets.opens_and_merges(model, twin, X)
