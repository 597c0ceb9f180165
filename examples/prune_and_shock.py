"""Pruning in mid-training: dense, pruned every epoch, with shocks of two kinds, and RigL.

A small network learns to read handwritten digits in five ways, from the same weights and with the
same batches. The example prints a table and saves a picture. It takes up to two minutes on a CPU:

  python examples/prune_and_shock.py
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
import tabulate
import tqdm
from flax import nnx
from matplotlib.figure import Figure

import optax_cadence as oc
from optax_cadence import pruning

BATCH = 32
SPARSITY = 0.9


class Net(nnx.Module):
  """Three dense layers."""

  def __init__(self, rngs):
    self.hidden1 = nnx.Linear(64, 128, rngs=rngs)
    self.hidden2 = nnx.Linear(128, 64, rngs=rngs)
    self.output = nnx.Linear(64, 10, rngs=rngs)

  def __call__(self, x):
    return self.output(nnx.relu(self.hidden2(nnx.relu(self.hidden1(x)))))


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


def main():
  parser = argparse.ArgumentParser(description="Trains one network in five ways.")
  parser.add_argument("--epochs", type=int, default=40)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--out", type=pathlib.Path, default="results/prune_and_shock.png")
  parser.add_argument("--quick", action="store_true", help="few epochs, to see that it runs")
  args = parser.parse_args()
  if args.quick:
    args.epochs, args.seeds = 4, 1
  digits = sklearn.datasets.load_digits()
  images = (digits.data / 16 - 0.5).astype(np.float32)
  labels = digits.target.astype(np.int32)
  test, train = np.split(np.random.default_rng(0).permutation(len(labels)), [len(labels) // 5])
  epoch = pruning.every_epoch(len(train), BATCH, drop_last=True)
  curves, sparsities = {}, {}
  graphdef = nnx.split(Net(nnx.Rngs(0)))[0]

  def loss_fn(params, batch):
    logits = nnx.merge(graphdef, params)(jnp.asarray(images)[batch])
    target = jnp.asarray(labels)[batch]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()
    return loss, (logits.argmax(-1) == target).mean()

  ways = transformations(args.epochs, epoch)
  for name, tx in tqdm.tqdm(ways.items()):

    @jax.jit
    def train_epoch(params, state, batches, tx=tx):
      def step(carry, batch):
        params, state = carry
        grads, _ = jax.grad(loss_fn, has_aux=True)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

      (params, state), _ = jax.lax.scan(step, (params, state), batches)
      kernels = [x for x in jax.tree.leaves(params) if x.ndim > 1]
      zeros = sum((x == 0).sum() for x in kernels) / sum(x.size for x in kernels)
      return params, state, jnp.stack([loss_fn(params, test)[1], zeros])

    curves_of_seeds = []
    for seed in range(args.seeds):
      params = nnx.split(Net(nnx.Rngs(seed)))[1]
      state, rng, curve = tx.init(params), np.random.default_rng(seed), []
      for _ in range(args.epochs):
        order = rng.permutation(train)[: epoch.period * BATCH]
        params, state, measured = train_epoch(params, state, order.reshape(-1, BATCH))
        curve.append(measured)
      curves_of_seeds.append(np.stack(curve))
    curves[name] = 100 * np.stack(curves_of_seeds)[..., 0]
    sparsities[name] = 100 * np.stack(curves_of_seeds)[..., 1]
  rows = [
    [
      name,
      f"{curve[:, -1].mean():.2f} ± {curve[:, -1].std():.2f}",
      f"{sparsities[name][:, -1].mean():.1f}",
    ]
    for name, curve in curves.items()
  ]
  print(tabulate.tabulate(rows, ["way", "test accuracy %", "zeros in kernels %"]))
  figure = Figure(figsize=(11, 4.5), layout="constrained")
  left, right = figure.subplots(1, 2)
  epochs = range(1, args.epochs + 1)
  for i, name in enumerate(ways):
    # Each line is thinner than the one before, so that all are seen where they coincide.
    left.plot(epochs, curves[name].mean(0), label=name)
    right.plot(epochs, sparsities[name].mean(0), label=name, linewidth=7 - 1.4 * i)
  left.set(xlabel="epoch", ylabel="test accuracy (%)", title="After each epoch")
  right.set(xlabel="epoch", ylabel="zeros in kernels (%)", title="Sparsity")
  right.legend(frameon=False)
  args.out.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(args.out, dpi=130)
  print(f"\nAccuracy and sparsity over training: {args.out}")


if __name__ == "__main__":
  main()
