"""Trains a Linen model in a `TrainState`, each layer with its own period: only `tx` is new."""

import argparse

import jax
import numpy as np
import optax
import sklearn.datasets
from flax import linen as nn
from flax.training import train_state

import optax_cadence as oc

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="few micro-steps, to see that it runs")
STEPS = 300 if parser.parse_args().quick else 3000
tx = oc.cadence(optax.adamw(2e-3), {"conv": 8, "hidden": {"kernel": 4, "bias": 2}, "output": 1})


class Net(nn.Module):
  @nn.compact
  def __call__(self, images):
    x = nn.relu(nn.Conv(16, (3, 3), strides=2, name="conv")(images))
    x = nn.relu(nn.Dense(64, name="hidden")(x.reshape(len(x), -1)))
    return nn.Dense(10, name="output")(x)


@jax.jit
def micro_step(state, images, labels):
  def loss_fn(params):
    logits = state.apply_fn({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))


digits = sklearn.datasets.load_digits()
rng = np.random.default_rng(0)
order = rng.permutation(len(digits.target))
images, labels = digits.images[order, ..., None].astype("float32") / 16, digits.target[order]
params = Net().init(jax.random.key(0), images[:1])["params"]
state = train_state.TrainState.create(apply_fn=Net().apply, params=params, tx=tx)
print(oc.describe(tx, params, microbatch=8))
for _ in range(STEPS):
  batch = rng.integers(360, len(labels), 8)  # the first 360 are kept for the test
  state = micro_step(state, images[batch], labels[batch])
updates, _ = tx.flush(state.opt_state, state.params)
params = optax.apply_updates(state.params, updates)
accuracy = (Net().apply({"params": params}, images[:360]).argmax(-1) == labels[:360]).mean()
print(f"test accuracy after {STEPS} micro-steps: {accuracy:.3f}")
