"""Pruning in mid-training, and what a shock leaves behind.

The first part: a small network learns to read handwritten digits in five ways, from the same
weights and with the same batches: dense, pruned every epoch, with shocks of two kinds, and RigL.

The second: the same network learns twenty tasks one after another, each the digits with their
pixels in another order. Before each new task a shock hits a random half of the units of each hidden
layer, and leaves zeros behind, fresh weights, or half of the old ones and half of fresh ones.

The example prints two tables and saves a picture. It takes up to two minutes on a CPU:

  python examples/prune_and_shock.py

With ten seeds, and the numbers of the second part in a file:

  python examples/prune_and_shock.py --part fills --seeds 10 --json docs/fills.json
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
import sklearn.datasets
import tabulate
import tqdm
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import optax_cadence as oc
from optax_cadence import pruning

BATCH = 32
SPARSITY = 0.9
EPOCHS_PER_TASK = 10
EXAMPLES_PER_TASK = 320


class Net(nnx.Module):
  """Three dense layers."""

  def __init__(self, rngs):
    self.hidden1 = nnx.Linear(64, 128, rngs=rngs)
    self.hidden2 = nnx.Linear(128, 64, rngs=rngs)
    self.output = nnx.Linear(64, 10, rngs=rngs)

  def __call__(self, x):
    return self.output(self.units(x)[1])

  def units(self, x):
    """What the units of both hidden layers put out."""
    first = nnx.relu(self.hidden1(x))
    return first, nnx.relu(self.hidden2(first))


def transformations(epochs, epoch):
  """The five ways, each an ordinary Optax transformation."""
  adam, steps = optax.adam(2e-3), epochs * epoch.period
  rise = pruning.cubic(SPARSITY, begin=0, end=steps // 2)
  # The shocks end in the middle, so that the second half of the training is there to recover.
  shocks = pruning.Times(epoch.period, end=steps // 2)
  return {
    "dense": adam,
    "pruned every epoch": optax.chain(adam, oc.prune(rise, every=epoch)),
    "shock, magnitude": optax.chain(adam, oc.prune(SPARSITY, every=shocks, hold=False)),
    "shock, random": optax.chain(
      adam, oc.prune(SPARSITY, every=shocks, hold=False, criterion=pruning.random(0))
    ),
    "RigL": oc.prune(
      SPARSITY,
      every=epoch,
      allocation="erk",
      regrow=pruning.by_gradient(stop=3 * steps // 4),
      inner=adam,
    ),
  }


def fills(task):
  """Shocks that leave something else behind, each before a new task of so many micro-steps."""
  adam = optax.adam(5e-3)
  shock = {
    "every": lambda t: (t > 1) & (t % task == 1),
    "structure": pruning.Channel(axis=-1),
    "criterion": pruning.random(0),
    "where": lambda path, param: path.startswith("hidden") and param.ndim > 1,
    "hold": False,
    "inner": adam,
  }
  return {
    "no shock": adam,
    "zero": oc.prune(0.5, fill="zero", **shock),
    "init": oc.prune(0.5, fill="init", **shock),
    "shrink": oc.prune(0.5, fill="shrink", **shock),
  }


def load_digits():
  """Images, labels, and the numbers of those for testing and for training."""
  digits = sklearn.datasets.load_digits()
  images = (digits.data / 16 - 0.5).astype(np.float32)
  labels = digits.target.astype(np.int32)
  order = np.random.default_rng(0).permutation(len(labels))
  return images, labels, *np.split(order, [len(labels) // 5])


def loss_fn(logits, target):
  return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()


def accuracy(logits, target):
  return (logits.argmax(-1) == target).mean()


def train_in_five_ways(n_epochs, seeds):
  """By way: test accuracy and zeros in kernels, in percent, for each seed after each epoch."""
  images, labels, test, train = load_digits()
  epoch = pruning.every_epoch(len(train), BATCH, drop_last=True)
  graphdef = nnx.split(Net(nnx.Rngs(0)))[0]
  curves = {}

  def logits_of(params, batch):
    return nnx.merge(graphdef, params)(jnp.asarray(images)[batch])

  def loss_of(params, batch):
    return loss_fn(logits_of(params, batch), jnp.asarray(labels)[batch])

  for name, tx in tqdm.tqdm(transformations(n_epochs, epoch).items()):

    @jax.jit
    def train_epoch(params, state, batches, tx=tx):
      def step(carry, batch):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_of)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

      (params, state), _ = jax.lax.scan(step, (params, state), batches)
      kernels = [x for x in jax.tree.leaves(params) if x.ndim > 1]
      zeros = sum((x == 0).sum() for x in kernels) / sum(x.size for x in kernels)
      reached = accuracy(logits_of(params, test), jnp.asarray(labels)[test])
      return params, state, 100 * jnp.stack([reached, zeros])

    of_seeds = []
    for seed in range(seeds):
      params = nnx.split(Net(nnx.Rngs(seed)))[1]
      state, rng, curve = tx.init(params), np.random.default_rng(seed), []
      for _ in range(n_epochs):
        order = rng.permutation(train)[: epoch.period * BATCH]
        params, state, measured = train_epoch(params, state, order.reshape(-1, BATCH))
        curve.append(measured)
      of_seeds.append(np.stack(curve))
    curves[name] = np.stack(of_seeds)
  return curves


def learn_tasks(n_tasks, seeds):
  """By fill: accuracy on each new task and share of dead units, in percent, for each seed."""
  images, labels, test, train = load_digits()
  train = train[:EXAMPLES_PER_TASK]
  task = EPOCHS_PER_TASK * len(train) // BATCH
  graphdef = nnx.split(Net(nnx.Rngs(0)))[0]
  first = [nnx.split(Net(nnx.Rngs(seed)))[1] for seed in range(seeds)]
  first = jax.tree.map(lambda *x: jnp.stack(x), *first)
  curves = {}

  def run(params, key, tx):
    def step(carry, batch, pixels):
      def loss_of(params):
        x = jnp.asarray(images)[batch][:, pixels]
        return loss_fn(nnx.merge(graphdef, params)(x), jnp.asarray(labels)[batch])

      params, state = carry
      updates, state = tx.update(jax.grad(loss_of)(params), state, params)
      return (optax.apply_updates(params, updates), state), None

    def learn(carry, key):
      of_pixels, *of_epochs = jax.random.split(key, 1 + EPOCHS_PER_TASK)
      pixels = jax.random.permutation(of_pixels, images.shape[1])
      order = [jax.random.permutation(k, jnp.asarray(train)) for k in of_epochs]
      batches = jnp.concatenate(order).reshape(-1, BATCH)
      carry, _ = jax.lax.scan(lambda c, batch: step(c, batch, pixels), carry, batches)
      net, x = nnx.merge(graphdef, carry[0]), jnp.asarray(images)[test][:, pixels]
      dead = jnp.concatenate([(h == 0).all(0) for h in net.units(x)]).mean()
      return carry, 100 * jnp.stack([accuracy(net(x), jnp.asarray(labels)[test]), dead])

    keys = jax.random.split(key, n_tasks)
    return jax.lax.scan(learn, (params, tx.init(params)), keys)[1]

  for name, tx in tqdm.tqdm(fills(task).items()):
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    curves[name] = np.asarray(jax.jit(jax.vmap(lambda p, k, tx=tx: run(p, k, tx)))(first, keys))
  return curves


def rows_of_fills(curves):
  """A row for each fill: the first task beside the last one, with a 95 % interval."""
  rows = []
  for name, curve in curves.items():
    reached, dead = curve[..., 0], curve[..., 1]
    change = reached[:, -1] - reached[:, 0]
    n = len(change)
    half = scipy.stats.t.ppf(0.975, n - 1) * change.std(ddof=1) / n**0.5 if n > 1 else np.nan
    row = {"a shock leaves": name, "first task %": reached[:, 0].mean()}
    row |= {"last task %": reached[:, -1].mean(), "change": change.mean(), "± (95 %)": half}
    row |= {"dead units at first %": dead[:, 0].mean(), "at last %": dead[:, -1].mean()}
    rows.append({k: v if isinstance(v, str) else round(float(v), 2) for k, v in row.items()})
  return rows


def main():
  parser = argparse.ArgumentParser(description="Prunes one network in five ways, and shocks it.")
  parser.add_argument("--part", choices=["both", "pruning", "fills"], default="both")
  parser.add_argument("--epochs", type=int, default=40)
  parser.add_argument("--tasks", type=int, default=20)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--out", type=pathlib.Path, default="results/prune_and_shock.png")
  parser.add_argument("--json", type=pathlib.Path, help="where the table of the fills goes")
  parser.add_argument("--quick", action="store_true", help="few epochs, to see that it runs")
  args = parser.parse_args()
  if args.quick:
    args.epochs, args.tasks, args.seeds = 4, 2, 1
  parts = ["pruning", "fills"] if args.part == "both" else [args.part]
  figure = Figure(figsize=(11, 4.5 * len(parts)), layout="constrained")
  axes = dict(zip(parts, figure.subplots(len(parts), 2, squeeze=False), strict=True))
  if "pruning" in parts:
    curves = train_in_five_ways(args.epochs, args.seeds)
    rows = [
      [name, f"{end[:, 0].mean():.2f} ± {end[:, 0].std():.2f}", f"{end[:, 1].mean():.1f}"]
      for name, end in ((name, curve[:, -1]) for name, curve in curves.items())
    ]
    print(tabulate.tabulate(rows, ["way", "test accuracy %", "zeros in kernels %"]))
    left, right = axes["pruning"]
    epochs = range(1, args.epochs + 1)
    for i, (name, curve) in enumerate(curves.items()):
      # Each line is thinner than the one before, so that all are seen where they coincide.
      left.plot(epochs, curve[..., 0].mean(0), label=name)
      right.plot(epochs, curve[..., 1].mean(0), label=name, linewidth=7 - 1.4 * i)
    left.set(xlabel="epoch", ylabel="test accuracy (%)", title="After each epoch")
    right.set(xlabel="epoch", ylabel="zeros in kernels (%)", title="Sparsity")
  if "fills" in parts:
    curves = learn_tasks(args.tasks, args.seeds)
    rows = rows_of_fills(curves)
    print("\n" + tabulate.tabulate(rows, headers="keys"))
    if args.json is not None:
      args.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    left, right = axes["fills"]
    for name, curve in curves.items():
      label = name if name == "no shock" else f'fill="{name}"'
      for ax, values in ((left, curve[..., 0]), (right, curve[..., 1])):
        ax.plot(range(1, args.tasks + 1), values.mean(0), label=label)
    left.set(xlabel="task", ylabel="test accuracy (%)", title="At the end of each new task")
    right.set(xlabel="task", ylabel="dead units (%)", title="Units that are zero for every image")
  for _, right in axes.values():
    right.legend(frameon=False)
  for ax in figure.axes:
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
  args.out.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(args.out, dpi=130)
  print(f"\nThe picture: {args.out}")


if __name__ == "__main__":
  main()
