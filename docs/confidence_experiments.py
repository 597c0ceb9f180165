"""Two measurements behind docs/confidence.md: what peeking does, and which sign of rest is best.

  python docs/confidence_experiments.py

Takes a minute on two CPU cores; writes docs/confidence.json and, from it, the tables of the page.
"""

import itertools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
import tabulate

import optax_cadence as oc

FOLDER = pathlib.Path(__file__).parent

# -------------------------------------------------------------------------------- peeking

SIZES = (1, 10, 100, 1000, 10_000)
SCALE = 16.5  # the noise scale: at snr = 1, the first whole n beyond it is 17
WINDOWS = 300


def peeking():
  """How long windows are, and how far |G|² is off at their end, when they end on its estimate."""
  rows = []
  for size in SIZES:
    lengths, estimates = map(np.asarray, stopped(size, min(WINDOWS, 3_000_000 // size)))
    rows.append(
      {
        "entries": size,
        "median length / predicted": float(np.median(lengths) / np.ceil(SCALE)),
        "mean length / predicted": float(lengths.mean() / np.ceil(SCALE)),
        "‖G‖² where it stopped / true": float(estimates.mean()),
        "‖G‖² at a fixed length / true": float(unstopped(size, len(lengths))),
      }
    )
  return rows


def stopped(size, windows):
  """Lengths of windows, and the estimates of |G|² at their ends over the truth: [2, windows]."""
  tx = oc.cadence(optax.sgd(0.0), oc.until_certain(1.0, 2, 1000))
  params, key = jnp.zeros(size), jax.random.key(size)

  def step(carry):
    t, state, found = carry
    noise = jax.random.normal(jax.random.fold_in(key, t), (size,))
    done, before = state.groups[0].updates, state.groups[0].confidence.estimate
    _, state = tx.update(SCALE**-0.5 + noise, state)
    group = state.groups[0]
    # What one more window added to the decaying sum is the estimate of that window.
    last = (group.confidence.estimate.signal - 0.9 * before.signal)[0] / 0.1
    at = jnp.where(group.updates > done, done, windows)
    values = jnp.stack([group.confidence.period.astype(jnp.float32), last / (size / SCALE)])
    return t + 1, state, found.at[:, at].set(values, mode="drop")

  start = jnp.int32(0), tx.init(params), jnp.zeros((2, windows))
  run = jax.jit(lambda c: jax.lax.while_loop(lambda c: c[1].groups[0].updates < windows, step, c))
  return run(start)[2]


def unstopped(size, windows):
  """The mean of estimates of |G|² in windows of the length that is predicted, over the truth."""
  n = int(np.ceil(SCALE))
  tx, key = oc.noise_scale(n, decay=1 - 1e-6), jax.random.key(size)

  def step(state, t):
    noise = jax.random.normal(jax.random.fold_in(key, t), (size,))
    return tx.update(SCALE**-0.5 + noise, state)[1], None

  times = jnp.arange(n * windows)
  state = jax.jit(lambda: jax.lax.scan(step, tx.init(jnp.zeros(size)), times)[0])()
  return state.groups[0].estimate.signals()[0] / (size / SCALE)


# -------------------------------------------------------------------------------- settled

LAYERS, SEEDS, WINDOW, UPDATES, DECAY = (64, 64, 64, 64, 10), 5, 8, 300, 0.8
MICROBATCH = 16


def settled():
  """Rank correlation of cheap signs with how far a layer's representation is from its last one."""
  digits = sklearn.datasets.load_digits()
  images, labels = jnp.asarray(digits.data / 16 - 0.5, jnp.float32), jnp.asarray(digits.target)
  found = {}
  for seed in range(SEEDS):
    signs, distance = jax.device_get(trained(images, labels, seed))
    for name, values in signs.items():
      found.setdefault(name, []).append(
        [spearman(smoothed(v), d) for v, d in zip(values.T, distance.T, strict=True)]
      )
  costs = {
    "decay of ‖G‖²": "nothing: s1 and s2",
    "signal-to-noise": "nothing: s1 and s2",
    "relative update": "update and parameters, once a window",
    "agreement of updates": "the last update kept: one more array",
  }
  return [
    {
      "sign": name,
      "mean": float(np.mean(values)),
      "worst layer": float(np.mean(values, 0).min()),
      "spread of the seeds": float(np.mean(values, 1).std()),
      "cost": costs[name],
    }
    for name, values in sorted(found.items(), key=lambda item: -np.mean(item[1]))
  ]


def forward(params, x):
  """Activations of every layer."""
  outputs = []
  for i, (w, b) in enumerate(params):
    x = x @ w + b
    x = jax.nn.relu(x) if i < len(params) - 1 else x
    outputs.append(x)
  return outputs


@jax.jit
def trained(images, labels, seed):
  """Signs of rest [updates, layers] by name, and 1 - CKA with the last representation."""
  key = jax.random.key(seed)
  shapes = list(itertools.pairwise(LAYERS))
  keys = jax.random.split(key, len(shapes))
  params = [
    (jax.random.normal(k, s) * (2 / s[0]) ** 0.5, jnp.zeros(s[1]))
    for k, s in zip(keys, shapes, strict=True)
  ]
  tx = optax.adam(2e-3)

  def loss(params, index):
    logits = forward(params, images[index])[-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels[index]).mean()

  def window(carry, key):
    params, state, last = carry
    index = jax.random.randint(key, (WINDOW, MICROBATCH), 0, len(labels))
    grads = jax.vmap(jax.grad(loss), (None, 0))(params, index)
    flat = [layer_vectors(g, WINDOW) for g in grads]
    s1 = jnp.stack([(g**2).sum() for g in flat])
    s2 = jnp.stack([(g.sum(0) ** 2).sum() for g in flat])
    signal = (s2 - s1) / (WINDOW * (WINDOW - 1))
    noise = (s1 - s2 / WINDOW) / (WINDOW - 1)
    updates, state = tx.update(jax.tree.map(lambda g: g.mean(0), grads), state, params)
    moved = [layer_vectors(u, 1)[0] for u in updates]
    size = jnp.stack([jnp.linalg.norm(u) for u in moved])
    whole = jnp.stack([jnp.linalg.norm(layer_vectors(p, 1)[0]) for p in params])
    agree = jnp.stack(
      [
        (u @ v) / jnp.maximum(jnp.linalg.norm(u) * jnp.linalg.norm(v), 1e-12)
        for u, v in zip(moved, last, strict=True)
      ]
    )
    signs = {
      "decay of ‖G‖²": signal,
      "signal-to-noise": WINDOW * signal / noise,
      "relative update": size / whole,
      "agreement of updates": agree,
    }
    seen = forward(params, images[:500])
    return (optax.apply_updates(params, updates), state, moved), (signs, seen)

  zeros = [jnp.zeros(s[0] * s[1] + s[1]) for s in shapes]
  start = params, tx.init(params), zeros
  (params, _, _), (signs, seen) = jax.lax.scan(window, start, jax.random.split(key, UPDATES))
  last = forward(params, images[:500])
  distance = [
    jax.vmap(lambda x, y=y: 1 - cka(x, y))(layer) for layer, y in zip(seen, last, strict=True)
  ]
  return signs, jnp.stack(distance, 1)


def layer_vectors(layer, n):
  """Kernel and bias of a layer as one vector for each of n."""
  return jnp.concatenate([x.reshape(n, -1) for x in layer], axis=1)


def cka(x, y):
  """Linear centred kernel alignment (Kornblith et al. 2019, arXiv:1905.00414)."""
  x, y = x - x.mean(0), y - y.mean(0)
  return ((x.T @ y) ** 2).sum() / jnp.sqrt(((x.T @ x) ** 2).sum() * ((y.T @ y) ** 2).sum())


def smoothed(values):
  """Numerators as a policy smooths them."""
  mean, weight, found = 0.0, 0.0, []
  for value in values:
    mean, weight = DECAY * mean + (1 - DECAY) * value, DECAY * weight + (1 - DECAY)
    found.append(mean / weight)
  return np.array(found)


def spearman(x, y):
  """Rank correlation."""
  ranks = [np.argsort(np.argsort(v)) for v in (x, y)]
  return np.corrcoef(*ranks)[0, 1]


def write(results):
  """The tables of the page."""
  page = FOLDER / "confidence.md"
  text = page.read_text(encoding="utf-8")
  for name, rows in results.items():
    table = tabulate.tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".2f")
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
    text, n = re.subn(pattern, lambda m, t=table: m[1] + t + "\n" + m[2], text, flags=re.DOTALL)
    if n != 1:
      raise ValueError(f"{page}: expected one place for the table {name}, found {n}")
  page.write_text(text, encoding="utf-8")


def main():
  """Measures, writes and prints."""
  results = {"peeking": peeking(), "settled": settled()}
  path = FOLDER / "confidence.json"
  path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
  write(results)
  for rows in results.values():
    print(tabulate.tabulate(rows, headers="keys", floatfmt=".2f"), "\n")


if __name__ == "__main__":
  main()
