"""Four cadences for one small network: which layers should update often, which seldom?

A convolutional network learns to read handwritten digits four times, from the same weights and
with the same micro-batches in the same order. All that differs is how many micro-steps each layer
waits between two of its updates:

  uniform      every layer updates every 4 micro-steps
  fast output  the output at every micro-step, each layer before it half as often
  fast input   the reverse
  quadrants    four rectangles of the dense layer's kernel every 1, 2, 4 and 8, the rest every 4

At the end it prints a table and saves a picture. It takes a minute on two CPU cores:

  python examples/layer_cadence.py
  python examples/layer_cadence.py --data cifar-10-batches-bin --steps 6000 --seeds 1

Nothing is downloaded. The digits ship with scikit-learn; CIFAR-10 is read from the folder into
which you unpacked its binary version (data_batch_1.bin and so on).
"""

import argparse
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
import tabulate
import tqdm
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from matplotlib.ticker import NullLocator

import optax_cadence as oc

# ------------------------------------------------------------------------------- settings

LAYERS = ("conv1", "conv2", "hidden", "output")
CADENCES = {
  "uniform": {"*": 4},
  "fast output": {"conv1": 8, "conv2": 4, "hidden": 2, "output": 1},
  "fast input": {"conv1": 1, "conv2": 2, "hidden": 4, "output": 8},
  "quadrants": {"hidden/kernel": oc.quadrants([[1, 2], [4, 8]]), "*": 4},
}
MICROBATCH = 8
LEARNING_RATE = 2e-3
TESTS = 50  # points on a learning curve, denser in the beginning
TEST_IMAGES = 2000  # at most
SCORE_STEPS = 24  # micro-steps shown in the score
# Okabe and Ito's colours, which can be told apart with any kind of colour vision; in grey, the
# styles of the lines tell them apart.
STYLES = [("#000000", "-"), ("#D55E00", "--"), ("#0072B2", "-."), ("#009E73", (0, (1, 1)))]

# ----------------------------------------------------------------------------------- data


def load_digits():
  """1797 digits as train and test: images uint8 [N, 8, 8, 1] and labels int32 [N]."""
  digits = sklearn.datasets.load_digits()
  images = (digits.images[..., None] * (255 / 16)).astype(np.uint8)
  labels = digits.target.astype(np.int32)
  test, train = np.split(np.random.default_rng(0).permutation(len(labels)), [len(labels) // 5])
  return (images[train], labels[train]), (images[test], labels[test])


def load_cifar10(folder):
  """CIFAR-10's binary version as train and test: images uint8 [N, 32, 32, 3], labels int32 [N].

  A file is a row of records of 3073 bytes: the label, then the 32 x 32 pixels of the red, the
  green and the blue plane.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise ValueError(f"{folder}: expected a folder with CIFAR-10's binary files, found none")

  def read(pattern):
    paths = sorted(folder.glob(pattern))
    if not paths:
      found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
      raise ValueError(f"{folder}: expected {pattern} of CIFAR-10's binary version, found {found}")
    files = []
    for path in paths:
      data = np.fromfile(path, np.uint8)
      if data.size == 0 or data.size % 3073:
        raise ValueError(f"{path}: expected whole records of 3073 bytes, found {data.size} bytes")
      files.append(data.reshape(-1, 3073))
      if files[-1][:, 0].max() > 9:
        raise ValueError(f"{path}: expected labels from 0 to 9, found {files[-1][:, 0].max()}")
    records = np.concatenate(files)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int32)

  return read("data_batch_*.bin"), read("test_batch.bin")


# ---------------------------------------------------------------------------------- model


class Net(nnx.Module):
  """Two convolutions, a dense layer, an output: 38 thousand parameters."""

  def __init__(self, images, rngs):
    _, height, width, colours = images.shape
    self.pool = (height // 4, width // 4)
    self.conv1 = nnx.Conv(colours, 16, (3, 3), rngs=rngs)
    self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
    self.hidden = nnx.Linear(4 * 4 * 32, 64, rngs=rngs)
    self.output = nnx.Linear(64, 10, rngs=rngs)

  def __call__(self, images):
    x = images.astype(jnp.float32) / 255 - 0.5
    x = nnx.relu(self.conv1(x))
    x = nnx.relu(self.conv2(x))
    x = nnx.avg_pool(x, self.pool, strides=self.pool)
    x = nnx.relu(self.hidden(x.reshape(len(x), -1)))
    return self.output(x)


def loss_fn(params, graphdef, images, labels):
  """Mean cross-entropy and accuracy."""
  logits = nnx.merge(graphdef, params)(images)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses.mean(), (logits.argmax(-1) == labels).mean()


# ------------------------------------------------------------------------------- training


def train(tx, train_set, test_set, steps, tested_at, seeds, progress):
  """Trains once per seed; returns the curves [seeds, tests, (loss, accuracy)] and the updates."""
  images, labels = map(jnp.asarray, train_set)
  graphdef, _ = nnx.split(Net(images, nnx.Rngs(0)), nnx.Param)

  # The results of `apply` have the order of its arguments, so that each donated array is
  # overwritten by its successor.
  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def micro_step(params, state, images, labels, batch):
    grads, _ = jax.grad(loss_fn, has_aux=True)(params, graphdef, images[batch], labels[batch])
    return tx.apply(params, state, grads)

  # Applies the gradients of windows that are not over when training ends.
  @jax.jit
  def flush(params, state):
    updates, state = tx.flush(state, params)
    return optax.apply_updates(params, updates), state

  @jax.jit
  def test(params):
    return jnp.stack(loss_fn(params, graphdef, *test_set))

  curves = []
  for seed in range(seeds):
    _, params = nnx.split(Net(images, nnx.Rngs(seed)), nnx.Param)
    state = tx.init(params)
    rng = np.random.default_rng(seed)
    epochs = -(-steps * MICROBATCH // len(labels))
    order = np.concatenate([rng.permutation(len(labels)) for _ in range(epochs)])
    batches = order[: steps * MICROBATCH].reshape(steps, MICROBATCH)
    curve = []
    for t, batch in enumerate(batches, start=1):
      params, state = micro_step(params, state, images, labels, batch)
      if t in tested_at:
        curve.append(test(params))
      progress.update()
    params, state = flush(params, state)
    curve[-1] = test(params)
    curves.append(jnp.stack(curve))
  return np.stack(curves), count_updates(state)


def count_updates(state):
  """How often each layer was updated; several numbers if its regions have several periods."""
  counts = {layer: set() for layer in LAYERS}
  for name, value in oc.metrics(state).items():
    if name.endswith("/updates"):
      counts[name.split("/")[0]].add(int(value))
  return [" ".join(map(str, sorted(counts[layer], reverse=True))) for layer in LAYERS]


# -------------------------------------------------------------------------------- results


def mean_and_spread(values, digits):
  return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"


def draw(transformations, params, curves, tested_at, path):
  """Draws which layer updates when, and below it the learning curves."""
  figure = Figure(figsize=(13, 8), layout="constrained")
  figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
  above, below = figure.subfigures(2, 1, height_ratios=(1, 1.4))
  above.suptitle(f"Who updates when: the first {SCORE_STEPS} micro-steps", fontweight="bold")
  kernels = {layer: {"kernel": params[layer]["kernel"]} for layer in LAYERS}
  scores = above.subplots(1, len(transformations))
  for axes, (name, tx), (colour, _) in zip(scores, transformations.items(), STYLES, strict=True):
    oc.plot_score(tx, kernels, SCORE_STEPS, ax=axes)
    axes.set_title(name, color=colour)
    axes.set_xticks(range(8, SCORE_STEPS + 1, 8))
    for marks in axes.collections:
      marks.set_facecolor(colour)
  for axes in scores[1:3]:
    axes.set_yticklabels([])  # the same regions as in the picture to the left
  left, right = below.subplots(1, 2, width_ratios=(2, 1))
  for i, ((name, curve), (colour, line)) in enumerate(zip(curves.items(), STYLES, strict=True)):
    left.plot(
      tested_at, curve[..., 0].mean(0), linestyle=line, color=colour, label=name, linewidth=2
    )
    accuracy = 100 * curve[:, -1, 1]
    rows = i + np.linspace(-0.2, 0.2, len(accuracy))  # so that equal seeds stay apart
    right.plot(accuracy, rows, "o", color=colour, alpha=0.6)
    right.plot(accuracy.mean(), i, "|", color=colour, markersize=36, markeredgewidth=3)
  left.set_title(f"Learning curves: test loss, mean of {len(curve)} seeds", fontweight="bold")
  left.set(xscale="log", yscale="log", xlabel="gradients seen (micro-steps)")
  for axis in (left.xaxis, left.yaxis):
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
  right.xaxis.set_major_formatter("{x:g}")
  left.grid(alpha=0.3)
  left.legend(frameon=False)
  right.set_title("Test accuracy (%): seeds, mean", fontweight="bold")
  right.set(xlabel="after the last gradient", ylim=(len(curves) - 0.5, -0.5))
  right.set_yticks(range(len(curves)), curves)
  right.grid(axis="x", alpha=0.3)
  for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)


def main():
  parser = argparse.ArgumentParser(description="Trains one network with four cadences.")
  parser.add_argument("--data", metavar="FOLDER", help="CIFAR-10's binary version, for the digits")
  parser.add_argument("--steps", type=int, default=2500, help="micro-steps of a run")
  parser.add_argument("--seeds", type=int, default=5, help="repetitions of a run")
  parser.add_argument("--out", type=pathlib.Path, default="results/layer_cadence.png")
  parser.add_argument("--quick", action="store_true", help="few micro-steps, to see that it runs")
  args = parser.parse_args()
  if args.quick:
    args.steps, args.seeds = min(args.steps, 404), 1

  train_set, test_set = load_cifar10(args.data) if args.data else load_digits()
  test_set = [array[:TEST_IMAGES] for array in test_set]
  images = train_set[0]
  _, params = nnx.split(Net(images, nnx.Rngs(0)), nnx.Param)
  print(
    f"{len(images)} training and {len(test_set[0])} test images of {images.shape[1:]};"
    f" {sum(x.size for x in jax.tree.leaves(params))} parameters.\n"
    f"{len(CADENCES)} cadences x {args.seeds} seeds x {args.steps} micro-steps"
    f" of {MICROBATCH} images."
  )
  transformations = {
    name: oc.cadence(optax.adamw(LEARNING_RATE), oc.by_path(every))
    for name, every in CADENCES.items()
  }
  print("\nWhat 'fast output' means for this network:\n")
  print(oc.describe(transformations["fast output"], params, microbatch=MICROBATCH), "\n")

  tested_at = np.unique(np.rint(np.geomspace(min(10, args.steps), args.steps, TESTS)).astype(int))
  curves, updates = {}, {}
  start = time.perf_counter()
  total = len(CADENCES) * args.seeds * args.steps
  with tqdm.tqdm(total=total, unit=" micro-steps", smoothing=0) as progress:
    for name, tx in transformations.items():
      progress.set_description(f"{name:11}")
      curves[name], updates[name] = train(
        tx, train_set, test_set, args.steps, tested_at, args.seeds, progress
      )
  print(f"\nTrained for {time.perf_counter() - start:.0f} s. Mean ± standard deviation:\n")
  rows = [
    [
      name,
      mean_and_spread(100 * curve[:, -1, 1], 2),
      mean_and_spread(curve[:, -1, 0], 4),
      *updates[name],
      args.steps,
    ]
    for name, curve in curves.items()
  ]
  headers = ["cadence", "test accuracy\n%", "test\nloss"]
  headers += [f"updates\n{layer}" for layer in LAYERS] + ["gradients\nseen"]
  print(tabulate.tabulate(rows, headers, disable_numparse=True))
  draw(transformations, params, curves, tested_at, args.out)
  print(f"\nThe score of who updated when, over the learning curves: {args.out}")


if __name__ == "__main__":
  main()
