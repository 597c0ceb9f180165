"""The measurement behind "Units born again" in docs/growth.md: does a network stay able to learn?

  python docs/recycle_experiments.py

A small network learns twenty tasks one after another, each the handwritten digits with their pixels
in another order, with plain Adam and with both rules of `growth.recycle` around it. Takes some
minutes on two CPU cores; writes docs/recycle.json and, from it, the table of the page.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
import sklearn.datasets
import tabulate

from optax_cadence import growth

FOLDER = pathlib.Path(__file__).parent

TASKS, SEEDS, WIDTHS = 20, 10, (64, 128, 64, 10)
EPOCHS, EXAMPLES, BATCH, RATE = 40, 320, 32, 5e-3
DORMANT = 0.025  # a unit is called dormant at this part of its layer's mean, as in ReDo's figures

WAYS = {
  "Adam": None,
  "ReDo": {"utility": "redo", "threshold": 0.1, "every": 100},
  "continual backprop": {"utility": "contribution", "rate": 1e-3, "age": 100},
}


def init(key):
  """Weights as He et al. draw them for ReLU, biases of zero."""
  keys = jax.random.split(key, len(WIDTHS) - 1)
  kernel = jax.nn.initializers.he_normal()
  pairs = zip(keys, WIDTHS, WIDTHS[1:], strict=False)
  return [{"kernel": kernel(k, (n, m)), "bias": jnp.zeros(m)} for k, n, m in pairs]


def logits_of(params, x):
  for layer in params[:-1]:
    x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
  return x @ params[-1]["kernel"] + params[-1]["bias"]


def load_digits():
  """Images, labels, and the numbers of those for testing and for training."""
  digits = sklearn.datasets.load_digits()
  images = jnp.asarray(digits.data / 16 - 0.5, jnp.float32)
  order = np.random.default_rng(0).permutation(len(images))
  test, train = np.split(order, [len(images) // 5])
  return images, jnp.asarray(digits.target), test, train[:EXAMPLES]


def learn_tasks(key, settings):
  """Accuracy on each new task, and the share of dormant units after it, in percent."""
  images, labels, test, train = load_digits()
  of_params, of_tasks, of_units = jax.random.split(key, 3)
  params, adam = init(of_params), optax.adam(RATE)
  rule = settings or {}
  forward, tx = growth.recycle(
    logits_of, params, images[:BATCH], inner=adam, init=init, key=of_units, **rule
  )
  tx = adam if settings is None else tx

  def loss_of(params, x, y):
    logits, activity = forward(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), activity

  def step(carry, batch, pixels):
    params, state = carry
    x, y = images[batch][:, pixels], labels[batch]
    grads, activity = jax.grad(loss_of, has_aux=True)(params, x, y)
    told = {} if settings is None else {"activity": activity}
    updates, state = tx.update(grads, state, params, **told)
    return (optax.apply_updates(params, updates), state), None

  def learn(carry, key):
    of_pixels, *of_epochs = jax.random.split(key, 1 + EPOCHS)
    pixels = jax.random.permutation(of_pixels, images.shape[1])
    order = jax.vmap(lambda k: jax.random.permutation(k, jnp.asarray(train)))(jnp.stack(of_epochs))
    carry, _ = jax.lax.scan(
      lambda c, batch: step(c, batch, pixels), carry, order.reshape(-1, BATCH)
    )
    logits, activity = forward(carry[0], images[test][:, pixels])
    asleep = jnp.concatenate(list(growth.dormant(activity, DORMANT).values())).mean()
    return carry, 100 * jnp.stack([(logits.argmax(-1) == labels[test]).mean(), asleep])

  start = params, tx.init(params)
  return jax.lax.scan(learn, start, jax.random.split(of_tasks, TASKS))[1]


def interval(values):
  """The mean, and half of its 95 % interval."""
  n = len(values)
  return values.mean(), scipy.stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5


def row_of(name, curve):
  """The first task beside the last."""
  (first, half), (last, half_last) = interval(curve[:, 0, 0]), interval(curve[:, -1, 0])
  row = {"": name, "first task %": first, "± (95 %)": half, "twentieth %": last, "±": half_last}
  row |= {"dormant at first %": curve[:, 0, 1].mean(), "at last %": curve[:, -1, 1].mean()}
  row |= {"most, over all tasks %": curve[..., 1].mean(0).max()}
  return {k: v if isinstance(v, str) else round(float(v), 2) for k, v in row.items()}


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--epochs", type=int)
  parser.add_argument("--examples", type=int)
  parser.add_argument("--rate", type=float)
  parser.add_argument("--out")
  args = parser.parse_args()
  globals().update({k.upper(): v for k, v in vars(args).items() if v is not None and k != "out"})
  keys = jax.vmap(jax.random.key)(jnp.arange(SEEDS))
  rows = []
  for name, settings in WAYS.items():
    run = jax.jit(jax.vmap(lambda key, settings=settings: learn_tasks(key, settings)))
    curve = np.asarray(run(keys))
    rows.append(row_of(name, curve))
    print(name, curve.mean(0).round(1).T.tolist(), flush=True)
  print(tabulate.tabulate(rows, headers="keys"))


if __name__ == "__main__":
  main()
