"""Every call of a live model with a gate goes through the gate, or says that it would not."""

import copy
import functools
import pickle
import subprocess
import sys

import growth_nets as nets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from growth_nets import close
from growth_nets import equal

from optax_cadence import growth

pytestmark = pytest.mark.ci

X = jax.random.normal(jax.random.key(0), (5, 4))


class Mixin:
  def loss(self, x):
    return ((self(x) - x) ** 2).mean()


class Auto(Mixin, nnx.Module):
  """An autoencoder of many methods, the encoder used outside `__call__` too."""

  def __init__(self, rngs):
    self.encoder = nnx.Linear(4, 6, rngs=rngs)
    self.decoder = nnx.Linear(6, 4, rngs=rngs)
    self.aside = nnx.Linear(4, 4, rngs=rngs)
    self.calls = nnx.Variable(jnp.int32(0))
    self.best = nnx.Param(jnp.float32(0.0))

  def __call__(self, x):
    return self.decode(self.encode(x))

  def encode(self, x):
    return nnx.relu(self.encoder(x))

  def decode(self, h):
    return self.decoder(h)

  @nnx.jit
  def jitted(self, x):
    return self.loss(x)

  def counted(self, x, *, by=1):
    nets.put(self.calls, nets.array(self.calls) + by)
    nets.put(self.best, self.loss(x))
    return {"loss": self.loss(x), "name": "counted"}

  def noisy(self, x, rngs):
    return self(x + jax.random.normal(rngs.noise(), x.shape))

  def noted(self, x):
    h = self.encoder(x).sum(-1)
    self.seen = nnx.Intermediate(h)
    return h

  def renamed(self, x):
    self.title = "renamed"
    return self(x)


def grown(alpha=0.0):
  model, twin = Auto(nnx.Rngs(0)), Auto(nnx.Rngs(0))
  growth.widen(model, X, producer=model.encoder, by=3, fresh=nets.fresh, alpha=alpha)
  return model, twin


CALLS = {
  "call": lambda m: m(X),
  "of a mixin": lambda m: m.loss(X),
  "of the class": lambda m: Mixin.loss(m, X),
  "jitted": lambda m: m.jitted(X),
  "under nnx.jit": lambda m: nnx.jit(Auto.loss)(m, X),
  "bound": lambda m: nnx.jit(lambda m, x: functools.partial(m.loss)(x))(m, X),
  "keywords": lambda m: m.counted(x=X, by=2)["loss"],
  "split and merged": lambda m: nnx.merge(*nnx.split(m)).loss(X),
  "cloned": lambda m: nnx.clone(m).loss(X),
  "gradients": lambda m: nnx.to_pure_dict(nnx.grad(lambda m: m.loss(X))(m))["decoder"]["bias"],
  "a function": lambda m: growth.nnx.call(lambda m, x: m.decoder(nnx.relu(m.encoder(x))), m, X),
  "untouched": lambda m: m.aside(X),
}


@pytest.mark.parametrize("kind", list(CALLS))
def test_every_call_is_that_of_the_old_model_at_first(kind):
  model, twin = grown()
  call = CALLS[kind]
  close(call(model), call(twin))
  growth.nnx.set_alpha(model, 1.0)
  expected = call(model)
  assert type(model) is Auto
  growth.merge(model)
  close(call(model), expected)
  if kind != "untouched":
    assert abs(expected - call(twin)).max() > 1e-4


def test_what_a_method_changes_is_changed():
  model, twin = grown()
  for _ in range(2):
    close(model.counted(X, by=3)["loss"], twin.counted(X, by=3)["loss"])
  assert int(nets.array(model.calls)) == int(nets.array(twin.calls)) == 6
  close(nets.array(model.best), nets.array(twin.best))
  rngs, others = nnx.Rngs(noise=1), nnx.Rngs(noise=1)
  first = model.noisy(X, rngs)
  close(first, twin.noisy(X, others))
  second = model.noisy(X, rngs=rngs)
  assert abs(first - second).max() > 0.1
  close(second, twin.noisy(X, rngs=others))


def test_variables_that_are_added_are_there():
  model, twin = grown()
  model.noted(X)
  twin.noted(X)
  seen, expected = (nets.array(m.seen) for m in (model, twin))
  assert isinstance(model.seen, nnx.Intermediate)
  # The sum over all units is that over the old ones, as long as the gate is shut.
  close(seen, expected)


def test_attributes_cannot_be_followed():
  model, _ = grown()
  with pytest.raises(ValueError, match="Auto.renamed sets the attributes 'title'"):
    model.renamed(X)
  assert not hasattr(model, "title")


PAST = {
  "a layer": lambda m: m.encoder(X),
  "from a function that was there before": lambda m: nnx.jit(EARLIER)(m, X),
  "on a copy": lambda m: nnx.clone(m).decoder(jnp.ones((1, 9))),
  "traced": lambda m: nnx.jit(lambda m: m.encoder(X))(m),
}


class Early(nnx.Module):
  def __init__(self, rngs):
    self.encoder, self.decoder = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)

  def __call__(self, x):
    return self.decoder(nnx.relu(self.encoder(x)))


EARLIER = Early.__call__


@pytest.mark.parametrize("kind", list(PAST))
def test_a_call_that_would_pass_the_gate_by_says_so(kind):
  model = Early(nnx.Rngs(0))
  growth.widen(model, X, producer=model.encoder, by=3, fresh=nets.fresh)
  with pytest.raises(ValueError, match=r"of '(en|de)coder' was called from outside its Early"):
    PAST[kind](model)
  growth.nnx.set_alpha(model, 1.0)
  growth.merge(model)
  PAST[kind](model)


def test_flags_and_other_models_are_left_alone():
  model, _ = grown()
  model.train()
  model.eval()
  model.set_attributes(deterministic=True, raise_if_not_found=False)
  alone = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
  close(alone(X), grown()[1].encoder(X))


def test_a_part_grows_alone():
  """A model inside another: the outer one's methods go through its gate."""

  class Outer(nnx.Module):
    def __init__(self, rngs):
      self.inner = Auto(rngs)

    def __call__(self, x):
      return self.inner(x) + self.inner.loss(x)[None, None]

  model, twin = Outer(nnx.Rngs(0)), Outer(nnx.Rngs(0))
  growth.widen(model.inner, X, producer=model.inner.encoder, by=3, fresh=nets.fresh)
  close(nnx.jit(lambda m, x: m(x))(model, X), twin(X))
  with pytest.raises(ValueError, match="has a gate already"):
    growth.widen(model.inner, X, producer=model.inner.encoder, by=3)


def test_a_checkpoint_is_restored_into_a_model_that_has_grown_alike():
  model, _ = grown(alpha=0.5)
  other, _ = grown()
  nets.put(model.decoder.bias, jnp.ones(4))
  nnx.update(other, nnx.state(model))
  assert float(nets.array(other.alpha)) == 0.5
  equal(other(X), model(X))


PICKLE = """
import pickle, sys
import jax.numpy as jnp
import test_growth_methods as t
model = pickle.load(open(sys.argv[1], "rb"))
assert type(model) is t.Early
print(model(t.X).tolist())
try:
  model.encoder(t.X)
except ValueError as error:
  print("says", error)
"""


@pytest.mark.ci
def test_a_pickle_is_read_in_another_process(tmp_path):
  model = Early(nnx.Rngs(0))
  if hasattr(model.encoder, "kernel_init"):
    pytest.skip("layers keep their initializers in this version of Flax, which do not pickle")
  growth.widen(model, X, producer=model.encoder, by=3, fresh=nets.fresh, alpha=0.5)
  expected = model(X)
  equal(copy.deepcopy(model)(X), expected)
  (tmp_path / "model").write_bytes(pickle.dumps(model))
  command = [sys.executable, "-c", PICKLE, str(tmp_path / "model")]
  done = subprocess.run(command, cwd="tests", capture_output=True, text=True, check=True)
  output, says = done.stdout.splitlines()
  np.testing.assert_allclose(jnp.array(eval(output)), expected, rtol=1e-6)
  assert says.startswith("says") and "'encoder'" in says


WRT = nnx.All(nnx.Param, nnx.PathContains("encoder"))


def test_an_optimizer_that_does_not_see_the_gate_is_an_error_of_the_growth():
  tx = optax.chain(optax.sgd(0.1), growth.phase_in(optax.linear_schedule(0.0, 1.0, 2)))
  model = Auto(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, tx, wrt=WRT)
  with pytest.raises(ValueError, match="wrt.*leaves out the gate 'alpha'"):
    growth.widen(model, X, producer=model.encoder, by=3, optimizer=optimizer)
  assert model.encoder.kernel.shape == (4, 6) and not hasattr(model, "alpha")
  wrt = nnx.Any(WRT, nnx.PathContains("alpha"))
  optimizer = nnx.Optimizer(model, tx, wrt=wrt)
  growth.widen(model, X, producer=model.encoder, by=3, optimizer=optimizer)
  assert "alpha" in nnx.to_pure_dict(nnx.state(model, optimizer.wrt))
