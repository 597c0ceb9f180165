"""A network too narrow for its task grows while it trains: wider, deeper, larger filters.

A small convolutional network learns handwritten digits. At four moments it gets more
capacity, each time behind a gate α that a schedule then opens: more channels, more hidden units,
a residual block, larger filters. Two more networks are trained from scratch for as many
floating-point operations: one as large as this one at the start, one as large as at the end.
At the end it prints a table and saves a picture. It takes a minute on two CPU cores:

  python examples/grow.py

Nothing is downloaded; the digits ship with scikit-learn.
"""

import argparse
import pathlib

import jax
import numpy as np
import optax
import sklearn.datasets
import tabulate
import tqdm
from flax import nnx
from matplotlib.figure import Figure

from optax_cadence import growth

BATCH = 64
LEARNING_RATE = 3e-3
PHASE = 0.5  # share of the steps after a growth in which its gate opens
COLOURS = {"small": "#000000", "grown": "#D55E00", "large": "#0072B2"}


def load_digits():
  """1797 digits as train and test: images float32 [N, 8, 8, 1], labels int32 [N]."""
  digits = sklearn.datasets.load_digits()
  images = (digits.images[..., None] / 16 - 0.5).astype(np.float32)
  labels = digits.target.astype(np.int32)
  test, train = np.split(np.random.default_rng(0).permutation(len(labels)), [len(labels) // 5])
  return (images[train], labels[train]), (images[test], labels[test])


class Block(nnx.Module):
  """The branch of a residual block: what is added to its input."""

  def __init__(self, channels, rngs):
    self.up = nnx.Conv(channels, channels, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(channels, rngs=rngs)
    self.down = nnx.Conv(channels, channels, (3, 3), rngs=rngs)

  def __call__(self, x):
    return self.down(nnx.relu(self.norm(self.up(x))))


class Net(nnx.Module):
  """A convolution, residual blocks, a hidden layer, an output."""

  def __init__(self, channels, hidden, blocks, kernel, rngs):
    self.stem = nnx.Conv(1, channels, (kernel, kernel), rngs=rngs)
    self.norm = nnx.BatchNorm(channels, rngs=rngs)
    self.blocks = nnx.List([Block(channels, rngs) for _ in range(blocks)])
    self.hidden = nnx.Linear(16 * channels, hidden, rngs=rngs)
    self.output = nnx.Linear(hidden, 10, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.stem(x)))
    for block in self.blocks:
      x = x + block(x)
    x = nnx.max_pool(x, (2, 2), (2, 2))
    return self.output(nnx.relu(self.hidden(x.reshape(len(x), -1))))


SMALL = {"channels": 4, "hidden": 8, "blocks": 0, "kernel": 3}
LARGE = {"channels": 8, "hidden": 32, "blocks": 1, "kernel": 5}


def widen_channels(model, optimizer, x, rngs):
  return growth.widen(model, x, producer=model.stem, by=4, optimizer=optimizer, rngs=rngs)


def widen_hidden(model, optimizer, x, rngs):
  return growth.widen(model, x, producer=model.hidden, by=24, optimizer=optimizer, rngs=rngs)


def deepen(model, optimizer, x, rngs):
  block = Block(8, rngs)
  return growth.deepen(
    model,
    lambda m: m.blocks.append(nnx.clone(block)),
    x,
    outgoing=lambda m: [m.blocks[-1].down],
    optimizer=optimizer,
  )


def enlarge(model, optimizer, x, rngs):
  return growth.enlarge(
    model, x, conv=model.stem, kernel_size=(5, 5), optimizer=optimizer, rngs=rngs
  )


GROWTHS = {
  "channels 4 to 8": widen_channels,
  "hidden 8 to 32": widen_hidden,
  "residual block": deepen,
  "filters 3x3 to 5x5": enlarge,
}


def make_steps():
  """A training step and a test. They compile again for a model of another shape."""

  @nnx.jit
  def step(model, optimizer, images, labels):
    def loss(model):
      return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value

  @nnx.jit
  def test(model, images, labels):
    logits = model(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), (logits.argmax(-1) == labels).mean()

  return step, test


def flops_of(model, images):
  """Floating-point operations of a training step: the forward pass, and twice that backward."""
  tree = growth.nnx.variables(model)
  image = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
  return 3 * BATCH * growth.flops(growth.nnx.forward(model), tree, image)


class Run:
  """A model in training, with its curve: (FLOPs, test loss, accuracy, α)."""

  def __init__(self, config, seed, schedule, data, progress):
    self.model = Net(**config, rngs=nnx.Rngs(seed))
    tx = growth.phase_in(schedule, optax.adamw(LEARNING_RATE))
    self.optimizer = nnx.Optimizer(self.model, tx, wrt=nnx.Param)
    self.step, self.test = make_steps()
    self.data, self.progress = data, progress
    self.rng = np.random.default_rng(seed)
    self.flops, self.curve = 0.0, []

  def record(self):
    self.model.eval()
    loss, accuracy = self.test(self.model, *self.data[1])
    self.model.train()
    alpha = float(self.model.alpha[...]) if hasattr(self.model, "alpha") else np.nan
    self.curve.append((self.flops, float(loss), float(accuracy), alpha))

  def train(self, steps, cost, every=20):
    images, labels = self.data[0]
    for t in range(1, steps + 1):
      batch = self.rng.integers(len(labels), size=BATCH)
      self.step(self.model, self.optimizer, images[batch], labels[batch])
      self.flops += cost
      if t % every == 0 or t == steps:
        self.record()
      self.progress.update()


def train_grown(stage, seed, data, progress):
  """The network that grows: `stage` steps before each growth and after the last.

  Returns the run, how far the test loss jumped at each growth, and the plan of each growth.
  """
  gated = max(int(PHASE * stage), 1)
  run = Run(SMALL, seed, optax.linear_schedule(0.0, 1.0, gated), data, progress)
  jumps, plans, x = [], [], data[0][0][:1]
  run.train(stage, flops_of(run.model, x))
  for i, (name, grow) in enumerate(GROWTHS.items()):
    before = run.curve[-1][1]
    plans.append((name, grow(run.model, run.optimizer, x, nnx.Rngs(100 * seed + i))))
    run.record()
    jumps.append((name, run.flops, abs(run.curve[-1][1] - before)))
    run.train(gated, flops_of(run.model, x))
    growth.merge(run.model, optimizer=run.optimizer)
    run.record()
    run.train(stage - gated, flops_of(run.model, x))
  return run, jumps, plans


def train_fixed(config, seed, budget, data, progress):
  """A network of fixed size, trained until it has used `budget` operations."""
  run = Run(config, seed, optax.constant_schedule(1.0), data, progress)
  cost = flops_of(run.model, data[0][0])
  steps = round(budget / cost)
  run.train(steps, cost, every=max(steps // 60, 1))
  return run


def draw(grown, jumps, fixed, path):
  """Test loss over FLOPs, with the gate below."""
  figure = Figure(figsize=(10, 6.5), layout="constrained")
  above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
  for name, runs in {"small": fixed["small"], "large": fixed["large"], "grown": grown}.items():
    for i, run in enumerate(runs):
      flops, loss, _, alpha = np.array(run.curve).T
      label = name if i == 0 else None
      above.plot(flops / 1e9, loss, color=COLOURS[name], label=label, lw=2 if i == 0 else 1)
      if name == "grown" and i == 0:
        below.plot(flops / 1e9, alpha, color=COLOURS[name], lw=2)
  for name, flops, _ in jumps:
    for axes in (above, below):
      axes.axvline(flops / 1e9, color="0.7", lw=1, zorder=0)
    where = above.get_xaxis_transform()
    text = name.replace(" ", "\n", 1)
    above.text(flops / 1e9, 1.01, text, va="bottom", ha="center", size=9, transform=where)
  above.set(xscale="log", yscale="log", ylabel="test loss")
  above.set_title("A network that grows while it trains, at equal FLOPs", weight="bold", pad=34)
  above.legend(frameon=False, loc="lower left")
  below.set(xlabel="training cost (GFLOP)", ylabel="gate", ylim=(-0.05, 1.05))
  for axes in (above, below):
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=120)


def main():
  parser = argparse.ArgumentParser(description="A network that grows while it trains.")
  parser.add_argument("--stage", type=int, default=200, help="steps between two growths")
  parser.add_argument("--seeds", type=int, default=1, help="repetitions")
  parser.add_argument("--out", type=pathlib.Path, default="results/grow.png")
  parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
  args = parser.parse_args()
  if args.quick:
    args.stage, args.seeds = 8, 1

  data = load_digits()
  grown, fixed = [], {"small": [], "large": []}
  with tqdm.tqdm(unit=" steps", mininterval=1) as progress:
    for seed in range(args.seeds):
      run, jumps, plans = train_grown(args.stage, seed, data, progress)
      grown.append(run)
      for name, config in {"small": SMALL, "large": LARGE}.items():
        fixed[name].append(train_fixed(config, seed, run.flops, data, progress))

  print("\nThe first growth, as its plan shows it:\n")
  print(plans[0][1])
  print("\nTest loss at the moment of each growth: how far it jumped\n")
  print(tabulate.tabulate([(n, f"{j:.1e}") for n, _, j in jumps], headers=["growth", "jump"]))
  rows = []
  for name, runs in {"small": fixed["small"], "grown": grown, "large": fixed["large"]}.items():
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(runs[0].model, nnx.Param)))
    last = np.array([run.curve[-1] for run in runs])
    rows.append(
      (
        name,
        parameters,
        f"{runs[0].flops / 1e9:.2f}",
        f"{last[:, 1].mean():.3f}",
        f"{100 * last[:, 2].mean():.1f}",
      )
    )
  headers = ["network", "parameters", "GFLOP", "test loss", "accuracy (%)"]
  print(f"\nAfter training, mean of {args.seeds} seed(s):\n")
  print(tabulate.tabulate(rows, headers=headers, disable_numparse=True))
  draw(grown, jumps, fixed, args.out)
  print(f"\nSaved {args.out}")


if __name__ == "__main__":
  main()
