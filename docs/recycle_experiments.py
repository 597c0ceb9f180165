"""The measurement behind "Units born again" in docs/growth.md: does a network stay able to learn?

  python docs/recycle_experiments.py

A small network learns twenty tasks one after another, each the handwritten digits with their pixels
in another order: with plain Adam, and with Adam inside both rules of `growth.recycle`. All seeds of
a row are one compiled program. Takes five minutes on two CPU cores; writes docs/recycle.json and,
from it, the table of the page.
"""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
import sklearn.datasets
import tabulate
import tqdm

from optax_cadence import growth

FOLDER = pathlib.Path(__file__).parent

TASKS, SEEDS, WIDTHS = 20, 10, (64, 128, 64, 10)
EXAMPLES, BATCH = 320, 32
DORMANT = 0.025  # a unit is called dormant at this part of its layer's mean, as in ReDo's figures

# Epochs of each task and the learning rate of Adam. With the second, weights grow so much that a
# network loses more than its dormant units.
REGIMES = {"long": (40, 2e-3), "fast": (10, 5e-3)}
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
  """Two hidden layers of ReLU."""
  for layer in params[:-1]:
    x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
  return x @ params[-1]["kernel"] + params[-1]["bias"]


def load_digits():
  """Images, labels, and the numbers of those for testing and for training."""
  digits = sklearn.datasets.load_digits()
  images = jnp.asarray(digits.data / 16 - 0.5, jnp.float32)
  order = np.random.default_rng(0).permutation(len(images))
  test, train = np.split(order, [len(images) // 5])
  return images, jnp.asarray(digits.target), test, jnp.asarray(train[:EXAMPLES])


def learn_tasks(key, settings, epochs, learning_rate):
  """Accuracy on each new task, and the share of dormant units after it, in percent."""
  images, labels, test, train = load_digits()
  of_params, of_tasks, of_units = jax.random.split(key, 3)
  params, adam = init(of_params), optax.adam(learning_rate)
  forward, tx = growth.recycle(
    logits_of, params, images[:BATCH], inner=adam, init=init, key=of_units, **(settings or {})
  )
  if settings is None:  # the same, but nobody asks what the units do
    tx = adam

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
    of_pixels, *of_epochs = jax.random.split(key, 1 + epochs)
    pixels = jax.random.permutation(of_pixels, images.shape[1])
    order = jax.vmap(lambda k: jax.random.permutation(k, train))(jnp.stack(of_epochs))
    carry, _ = jax.lax.scan(
      lambda c, batch: step(c, batch, pixels), carry, order.reshape(-1, BATCH)
    )
    logits, activity = forward(carry[0], images[test][:, pixels])
    asleep = jnp.concatenate(list(growth.dormant(activity, DORMANT).values())).mean()
    return carry, 100 * jnp.stack([(logits.argmax(-1) == labels[test]).mean(), asleep])

  start = params, tx.init(params)
  return jax.lax.scan(learn, start, jax.random.split(of_tasks, TASKS))[1]


def row_of(regime, name, curve):
  """The first task beside the last one, accuracies with their 95 % intervals."""
  accuracy, dormant = curve[..., 0], curve[..., 1].mean(0)
  half = scipy.stats.t.ppf(0.975, len(curve) - 1) * accuracy.std(0, ddof=1) / len(curve) ** 0.5
  row = {"tasks": regime, "optimizer": name}
  row |= {"first task %": accuracy[:, 0].mean(), "± first": half[0]}
  row |= {"twentieth task %": accuracy[:, -1].mean(), "± twentieth": half[-1]}
  row |= {"dormant at first %": dormant[0], "at last %": dormant[-1], "at most %": dormant.max()}
  return {k: v if isinstance(v, str) else round(float(v), 2) for k, v in row.items()}


def write(rows):
  """The table of the page."""
  page = FOLDER / "growth.md"
  table = tabulate.tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".2f")
  pattern = r"(<!-- recycle -->\n).*?(<!-- end recycle -->)"
  text = page.read_text(encoding="utf-8")
  text, n = re.subn(pattern, lambda m: m[1] + table + "\n" + m[2], text, flags=re.DOTALL)
  if n != 1:
    raise ValueError(f"{page}: expected one place for the table recycle, found {n}")
  page.write_text(text, encoding="utf-8")


def main():
  """Measures, writes and prints."""
  keys = jax.vmap(jax.random.key)(jnp.arange(SEEDS))
  rows = []
  for regime, name in tqdm.tqdm([(regime, name) for regime in REGIMES for name in WAYS]):
    run = jax.vmap(lambda key, of=(WAYS[name], *REGIMES[regime]): learn_tasks(key, *of))
    rows.append(row_of(regime, name, np.asarray(jax.jit(run)(keys))))
  path = FOLDER / "recycle.json"
  path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
  write(rows)
  print(tabulate.tabulate(rows, headers="keys", floatfmt=".2f"))


if __name__ == "__main__":
  main()
