"""Two measurements behind docs/confidence.md: what peeking does, and which sign of rest is best.

  python docs/confidence_experiments.py

Takes two minutes on two CPU cores; writes docs/confidence.json and, from it, the tables of the
page.
"""

import collections
import functools
import itertools
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
from flax import nnx

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
    (group,) = state.groups.values()
    done, before = group.updates, group.confidence.estimate
    _, state = tx.update(SCALE**-0.5 + noise, state)
    (group,) = state.groups.values()
    # What one more window added to the decaying sum is the estimate of that window.
    last = (group.confidence.estimate.signal - 0.9 * before.signal)[0] / 0.1
    at = jnp.where(group.updates > done, done, windows)
    values = jnp.stack([group.period.astype(jnp.float32), last / (size / SCALE)])
    return t + 1, state, found.at[:, at].set(values, mode="drop")

  start = jnp.int32(0), tx.init(params), jnp.zeros((2, windows))

  def unfinished(carry):
    (group,) = carry[1].groups.values()
    return group.updates < windows

  return jax.jit(lambda start: jax.lax.while_loop(unfinished, step, start))(start)[2]


def unstopped(size, windows):
  """The mean of estimates of |G|² in windows of the length that is predicted, over the truth."""
  n = int(np.ceil(SCALE))
  tx, key = oc.noise_scale(n, decay=1 - 1e-6), jax.random.key(size)

  def step(state, t):
    noise = jax.random.normal(jax.random.fold_in(key, t), (size,))
    return tx.update(SCALE**-0.5 + noise, state)[1], None

  times = jnp.arange(n * windows)
  state = jax.jit(lambda: jax.lax.scan(step, tx.init(jnp.zeros(size)), times)[0])()
  (group,) = state.groups.values()
  return group.estimate.signals()[0] / (size / SCALE)


# -------------------------------------------------------------------------------- settled

# The rule, fixed before this was first run: of the measures that hold no further array and read at
# most as much as those of `until_certain`, the one wins whose rank correlation with the distance
# of a layer's representation from its last one is highest, in the mean over all networks,
# optimizers, learning rates, seeds and layers. How well it tells layers from one another at one
# time was looked at besides, after that.
SEEDS, WINDOW, UPDATES, DECAY, MICROBATCH, LOOKED_AT = 3, 8, 300, 0.8, 16, 128

SAMPLED = 16  # one entry of so many

# By name, what it reads in bytes for each parameter and window, and the arrays it holds.
MEASURES = {
  "relative update": (8, 0),
  "the same, of a sample": (8 / SAMPLED, 0),
  "size of the update": (4, 0),
  "decay of ‖G‖²": (4 * WINDOW + 4, 0),
  "signal-to-noise": (4 * WINDOW + 4, 0),
  "agreement of updates": (8, 1),
  "none, but time": (0, 0),
}


class MLP(nnx.Module):
  """Four dense layers."""

  def __init__(self, rngs):
    widths = (64, 64, 64, 64, 10)
    self.layers = nnx.List(nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(widths))

  def __call__(self, x):
    """Activations of every layer."""
    outputs, x = [], x.reshape(len(x), -1)
    for layer in self.layers:
      outputs.append(layer(x))
      x = nnx.relu(outputs[-1])
    return outputs


class CNN(nnx.Module):
  """Two convolutions and two dense layers."""

  def __init__(self, rngs):
    self.layers = nnx.List(
      [
        nnx.Conv(1, 8, (3, 3), rngs=rngs),
        nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs),
        nnx.Linear(4 * 4 * 16, 32, rngs=rngs),
        nnx.Linear(32, 10, rngs=rngs),
      ]
    )

  def __call__(self, x):
    """Activations of every layer."""
    outputs = []
    for layer in self.layers:
      x = x.reshape(len(x), -1) if isinstance(layer, nnx.Linear) else x
      outputs.append(layer(x))
      x = nnx.relu(outputs[-1])
    return outputs


NETWORKS = {"MLP": MLP, "CNN": CNN}
OPTIMIZERS = {
  "Adam": (optax.adam, 2e-3),
  "SGD": (functools.partial(optax.sgd, momentum=0.9), 0.03),
}
RATES = {
  "constant": optax.constant_schedule,
  "cosine": lambda rate: optax.warmup_cosine_decay_schedule(0.0, rate, UPDATES // 10, UPDATES),
}


def settled():
  """Rank correlation of cheap measures with how far a layer is from its last representation."""
  digits = sklearn.datasets.load_digits()
  images = jnp.asarray(digits.images[..., None] / 16 - 0.5, jnp.float32)
  labels, found = jnp.asarray(digits.target), collections.defaultdict(list)
  settings = list(itertools.product(NETWORKS, OPTIMIZERS, RATES))
  for setting in tqdm.tqdm(settings, unit=" settings"):
    for seed in range(SEEDS):
      values, distance = jax.device_get(trained(images, labels, seed, setting))
      for name, series in values.items():
        smooth = np.stack([smoothed(x) for x in series.T], axis=1)
        pairs = zip(smooth.T, distance.T, strict=True)
        scores = [spearman(x, y) for x, y in pairs]
        found[name].append(((*setting, seed), np.mean(scores), between(smooth, distance)))
  rows = [correlations(name, scores) for name, scores in found.items()]
  return sorted(rows, key=lambda row: -row["mean"])


def correlations(name, scores):
  """A row of the table: the mean over all runs, and over those of each kind."""
  read, held = MEASURES[name]

  def part(kind):
    return float(np.mean([score for setting, score, _ in scores if kind in setting]))

  return {
    "measure": name,
    "mean": float(np.mean([score for _, score, _ in scores])),
    **{kind: part(kind) for kinds in (NETWORKS, OPTIMIZERS, RATES) for kind in kinds},
    "worst run": float(min(score for _, score, _ in scores)),
    "between layers": float(np.mean([score for _, _, score in scores])),
    "bytes read": read / WINDOW,
    "arrays held": held,
  }


@functools.partial(jax.jit, static_argnums=3)
def trained(images, labels, seed, setting):
  """Measures [updates, layers] by name, and 1 - CKA with the last representation."""
  network, optimizer, rate = setting
  make, learning_rate = OPTIMIZERS[optimizer]
  tx = make(RATES[rate](learning_rate))
  key = jax.random.key(seed)
  graphdef, params = nnx.split(NETWORKS[network](nnx.Rngs(key)), nnx.Param)

  def loss(params, index):
    logits = nnx.merge(graphdef, params)(images[index])[-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels[index]).mean()

  def window(carry, inputs):
    params, state, last = carry
    t, key = inputs
    index = jax.random.randint(key, (WINDOW, MICROBATCH), 0, len(labels))
    grads = jax.lax.map(lambda i: jax.grad(loss)(params, i), index)
    flat = layer_vectors(grads, WINDOW)
    s1 = jnp.stack([(g**2).sum() for g in flat])
    s2 = jnp.stack([(g.sum(0) ** 2).sum() for g in flat])
    signal = (s2 - s1) / (WINDOW * (WINDOW - 1))
    noise = (s1 - s2 / WINDOW) / (WINDOW - 1)
    updates, state = tx.update(jax.tree.map(lambda g: g.mean(0), grads), state, params)
    moved = [u[0] for u in layer_vectors(updates, 1)]
    size = jnp.stack([jnp.linalg.norm(u) for u in moved])
    whole = jnp.stack([jnp.linalg.norm(p) for p in layer_vectors(params, 1)])
    cosines = [
      (u @ v) / jnp.maximum(jnp.linalg.norm(u) * jnp.linalg.norm(v), 1e-12)
      for u, v in zip(moved, last, strict=True)
    ]
    values = {
      "relative update": size / whole,
      "the same, of a sample": jnp.stack(
        [
          jnp.linalg.norm(u[::SAMPLED]) / jnp.linalg.norm(p[0, ::SAMPLED])
          for u, p in zip(moved, layer_vectors(params, 1), strict=True)
        ]
      ),
      "size of the update": size,
      "decay of ‖G‖²": signal,
      "signal-to-noise": WINDOW * signal / noise,
      "agreement of updates": jnp.stack(cosines),
      "none, but time": jnp.full(len(moved), -t, jnp.float32),
    }
    seen = [similarities(x) for x in nnx.merge(graphdef, params)(images[:LOOKED_AT])]
    return (optax.apply_updates(params, updates), state, moved), (values, jnp.stack(seen))

  zeros = [jnp.zeros(p.size) for p in layer_vectors(params, 1)]
  inputs = jnp.arange(UPDATES), jax.random.split(key, UPDATES)
  (params, _, _), (values, seen) = jax.lax.scan(window, (params, tx.init(params), zeros), inputs)
  last = jnp.stack([similarities(x) for x in nnx.merge(graphdef, params)(images[:LOOKED_AT])])
  return values, 1 - (seen * last).sum((-2, -1))


def layer_vectors(tree, n):
  """Kernel and bias of each layer as one vector for each of n."""
  layers = tree["layers"]
  return [
    jnp.concatenate([x.reshape(n, -1) for x in jax.tree.leaves(layers[i])], axis=1) for i in layers
  ]


def similarities(x):
  """What linear centred kernel alignment multiplies (arXiv:1905.00414): [examples, examples]."""
  x = x.reshape(len(x), -1)
  gram = (x - x.mean(0)) @ (x - x.mean(0)).T
  return gram / jnp.linalg.norm(gram)


def smoothed(values):
  """Numerators as a policy smooths them."""
  mean, weight, found = 0.0, 0.0, []
  for value in values:
    mean, weight = DECAY * mean + (1 - DECAY) * value, DECAY * weight + (1 - DECAY)
    found.append(mean / weight)
  return np.array(found)


def between(values, distance):
  """Rank correlation of layers at one time: of what is left of a measure's peak, in the mean."""
  values = np.maximum(values, 0)
  left = values / np.maximum(np.maximum.accumulate(values), np.finfo(np.float32).tiny)
  times = range(UPDATES // 10, UPDATES - UPDATES // 10)
  return np.mean([spearman(left[t], distance[t]) for t in times])


def spearman(x, y):
  """Rank correlation; 0 where a rank tells nothing."""
  ranks = [scipy.stats.rankdata(v) for v in (x, y)]
  return np.corrcoef(*ranks)[0, 1] if min(map(np.ptp, ranks)) > 0 else 0.0


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
