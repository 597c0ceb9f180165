"""Outputs that carry the units that grow are named in the plan."""

import growth_nets as nets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from growth_nets import close

from optax_cadence import growth

X = jax.random.normal(jax.random.key(0), (5, 4))


class Vae(nnx.Module):
  def __init__(self, rngs):
    self.mean, self.decoder = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(3, rngs=rngs)

  def __call__(self, x):
    mean = self.norm(self.mean(x))
    return {"x": self.decoder(mean), "posterior": (mean, mean.sum(-1))}


@pytest.mark.ci
def test_a_mean_that_is_an_output_is_named():
  model, twin = Vae(nnx.Rngs(0)), Vae(nnx.Rngs(0))
  plan = growth.widen(model, X, producer=model.mean, by=2, fresh=nets.fresh)
  assert "output 'posterior/0' axis 1 grows from 3 to 5" in str(plan)
  assert str(plan).count("output") == 1  # not the running statistics, which are no output
  found, expected = model(X), twin(X)
  assert found["posterior"][0].shape == (5, 5)
  found["posterior"] = (found["posterior"][0][:, :3], found["posterior"][1])
  close(found, expected)


def test_units_lie_in_an_output_as_often_as_they_do():
  params = {"a": jnp.ones((4, 3)), "b": jnp.ones((3, 2))}

  def fn(p, x):
    h = x @ p["a"]
    return h @ p["b"], jnp.concatenate([h, h], 1), h

  units = growth.couple(fn, params, X, producer="a")
  assert "output '1' axis 1" in str(units)
  plan = growth.widening(params, units, by=2)
  assert "output '1' axis 1 grows from 6 to 10\noutput '2' axis 1 grows" in str(plan)
  grown = plan.apply(params, lambda path, shape, dtype: np.ones(shape, dtype))
  assert growth.gated(fn, plan)(grown, X)[1].shape == (5, 10)
