"""New tokens: old logits stay, new ones are as likely as old ones on average, state follows."""

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
from optax_cadence import _paths
from optax_cadence import growth

pytestmark = pytest.mark.ci

TOKENS = jnp.array([[1, 2, 3], [4, 0, 6]])


class Untied(nnx.Module):
  def __init__(self, rngs):
    self.vocab_size = 7
    self.embed = nnx.Embed(7, 8, rngs=rngs)
    self.up = nnx.Linear(8, 8, rngs=rngs)
    self.head = nnx.Linear(8, 7, rngs=rngs)

  def __call__(self, x):
    logits = self.head(nnx.relu(self.up(self.embed(x))))
    return logits.reshape(*x.shape, self.vocab_size)


class Tied(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(7, 8, rngs=rngs)
    self.up = nnx.Linear(8, 8, rngs=rngs)

  def __call__(self, x):
    return self.embed.attend(nnx.relu(self.up(self.embed(x))))


TX = optax.chain(
  oc.cadence(optax.adam(1e-2), 3), oc.prune(0.5, every=1, where=lambda path, x: x.ndim > 1)
)


@pytest.mark.parametrize("kind", [Untied, Tied])
def test_old_logits_stay_and_the_state_follows(kind):
  tied = kind is Tied
  model, twin = nets.make(kind), nets.make(kind)
  with nets.relaxed():
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    # An open window, moments and masks.
    _, state = TX.update(params, TX.init(params), params)
    _paths.set_arrays(optimizer.opt_state, jax.tree.leaves(state))
    before = growth.nnx.variables(model)
    plan = growth.vocabulary(
      model,
      TOKENS,
      by=2,
      embed=model.embed,
      head=None if tied else model.head,
      sizes=None if tied else {"vocab_size": 9},
      optimizer=optimizer,
    )
  logits, expected = model(TOKENS), twin(TOKENS)
  equal(logits[..., :7], expected)
  close(logits[..., 7:], jnp.repeat(expected.mean(-1, keepdims=True), 2, -1))
  assert model.embed.num_embeddings == 9
  assert not hasattr(model, "alpha")
  if not tied:
    assert model.head.out_features == 9
  # The new tokens are read too.
  close(model.embed(jnp.array([8])), jnp.mean(twin.embed(jnp.arange(7)), 0, keepdims=True))
  accumulator = optimizer.opt_state[0].groups["3"].accumulators["embed"]["embedding"]
  accumulator = nets.array(accumulator)
  np.testing.assert_array_equal(accumulator[:7], before["embed"]["embedding"])
  assert accumulator.shape == (9, 8)
  with nets.relaxed():
    growth.undo(model, plan, sizes=None if tied else {"vocab_size": 7}, optimizer=optimizer)
    equal(growth.nnx.variables(model), before)
    equal(jax.tree.leaves(optimizer.opt_state), jax.tree.leaves(state))
  equal(model(TOKENS), twin(TOKENS))


def test_given_rows():
  model = nets.make(Tied)
  rows = jnp.ones((2, 8))
  with pytest.raises(ValueError, match=r"expected shape \(2, 8\), found \(1, 8\)"):
    growth.vocabulary(model, by=2, embed=model.embed, given={"embed/embedding": rows[:1]})
  growth.vocabulary(model, TOKENS, by=2, embed=model.embed, given={"embed/embedding": rows})
  np.testing.assert_array_equal(model.embed(jnp.array([7, 8])), rows)


class Linen(nn.Module):
  tokens: int = 7

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(8, name="up")(nn.Embed(self.tokens, 8, name="embed")(x)))
    return nn.Dense(self.tokens, name="head")(x)


def test_linen_and_its_train_state():
  old, new = Linen(), Linen(tokens=10)
  variables = old.init(jax.random.key(0), TOKENS)
  grown, forward, plan = growth.linen.vocabulary(
    new, variables, TOKENS, by=3, embed="params/embed", head="params/head"
  )
  equal(forward(grown, TOKENS)[..., :7], old.apply(variables, TOKENS))
  tx = optax.adam(1e-2)
  params, bigger = variables["params"], grown["params"]
  with nets.relaxed():
    _, state = tx.update(params, tx.init(params), params)
    found = growth.grow_state(tx, state, params, bigger, plan)
    equal(growth.grow_state(tx, found, bigger, params, plan.inverse()), state)
  moments = found[0].mu["embed"]["embedding"]
  np.testing.assert_array_equal(moments[:7], state[0].mu["embed"]["embedding"])
  assert not moments[7:].any()
  equal(growth.undo(grown, plan), variables)
  with pytest.raises(ValueError, match="the new module has another size than the plan"):
    growth.linen.vocabulary(old, variables, TOKENS, by=3, embed="params/embed")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"by": 0, "embed": "embed"}, "by must be a positive integer, found 0"),
    ({"by": 1, "embed": "bias"}, r"expected shape \[tokens, features\], found \(5,\)"),
    ({"by": 1, "embed": "embed", "head": "other"}, r"head 'other' of shape \(3, 4\): expected 5"),
    ({"by": 1, "embed": "embed", "head": "embed"}, "head 'embed' is the embedding: expected None"),
  ],
)
def test_errors(arguments, message):
  params = {"embed": jnp.ones((5, 3)), "bias": jnp.ones(5), "other": jnp.ones((3, 4))}
  with pytest.raises(ValueError, match=message):
    growth.adding_tokens(params, **arguments)
