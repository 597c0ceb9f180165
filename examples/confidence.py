"""A network whose layers decide for themselves when to update.

Each layer of a small convolutional network collects gradients until their mean stands out of the
noise, and only then updates. The example prints how the periods changed while the network learned
to read handwritten digits, and saves a picture. It takes a minute on two CPU cores:

  python examples/confidence.py
  python examples/confidence.py --policy late      # one period, later one per layer
  python examples/confidence.py --policy patient   # a policy of your own, in ten lines
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import sklearn.datasets
import tabulate
import tqdm
from flax import nnx

import optax_cadence as oc

# ------------------------------------------------------------------------------- settings

LAYERS = ("conv1", "conv2", "hidden", "output")
MICROBATCH = 8
LEARNING_RATE = 1e-3
LOOKS = 20  # how often the metrics are read
BY_DEPTH = {"conv1": 16, "conv2": 8, "hidden": 4, "output": 2}


class Patient(oc.Policy):
  """Due when all regions of a layer are certain, not only the layer as a whole."""

  def due(self, window, state):
    n = window.length.astype(jnp.float32)
    return (n * window.signals() >= window.noises()).all() & (n > 1).all()


def cadences(policy, steps):
  """The argument `every` of `oc.cadence` for the policy of this name."""
  return {
    "certain": oc.each_layer(oc.until_certain(0.5, min_period=2, max_period=64)),
    "settled": oc.each_layer(oc.as_settled(min_period=2, max_period=64)),
    "late": oc.late(steps // 2, BY_DEPTH, before=4),
    "patient": oc.each_layer(Patient(2, 64)),
  }[policy]


# ------------------------------------------------------------------------- data and model


def load_digits():
  """1797 digits as train and test: images float32 [N, 8, 8, 1] and labels int32 [N]."""
  digits = sklearn.datasets.load_digits()
  images = (digits.images[..., None] / 16 - 0.5).astype(np.float32)
  labels = digits.target.astype(np.int32)
  test, train = np.split(np.random.default_rng(0).permutation(len(labels)), [len(labels) // 5])
  return (images[train], labels[train]), (images[test], labels[test])


class Net(nnx.Module):
  """Two convolutions, a dense layer, an output."""

  def __init__(self, rngs):
    self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
    self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
    self.hidden = nnx.Linear(4 * 4 * 32, 64, rngs=rngs)
    self.output = nnx.Linear(64, 10, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.conv1(x))
    x = nnx.avg_pool(nnx.relu(self.conv2(x)), (2, 2), strides=(2, 2))
    x = nnx.relu(self.hidden(x.reshape(len(x), -1)))
    return self.output(x)


# ------------------------------------------------------------------------------- training


def train(every, steps):
  """Trains; returns the metrics at each look and the test accuracy at the end."""
  (images, labels), test_set = load_digits()
  graphdef, params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
  inner = optax.chain(optax.adam(LEARNING_RATE), oc.scale_by_cadence("sqrt"))
  # Measures the noise of every layer, also under a policy that does not look at it.
  tx = oc.chain(oc.noise_scale(16, decay=0.95), oc.cadence(inner, every))
  state, images, labels = tx.init(params), jnp.asarray(images), jnp.asarray(labels)

  def loss(params, images, labels):
    logits = nnx.merge(graphdef, params)(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), (logits.argmax(-1) == labels).mean()

  @jax.jit
  def learn(params, state, batches):
    def micro_step(carry, batch):
      params, state = carry
      grads, _ = jax.grad(loss, has_aux=True)(params, images[batch], labels[batch])
      return tx.apply(params, state, grads), None

    return jax.lax.scan(micro_step, (params, state), batches)[0]

  rng, history = np.random.default_rng(0), []
  for _ in tqdm.trange(LOOKS, unit=" looks"):
    batches = rng.integers(0, len(labels), (max(1, steps // LOOKS), MICROBATCH))
    params, state = learn(params, state, batches)
    history.append(oc.metrics(state))
  last, state = jax.jit(tx.flush)(state, params)
  params = optax.apply_updates(params, last)
  return history, float(jax.jit(loss)(params, *test_set)[1])


def updates(metrics):
  """Updates of each layer: those of its kernel, which shares its group with the bias."""
  return np.array([metrics[f"{layer}/kernel/updates"] for layer in LAYERS])


def mean_periods(history):
  """A row for every tenth of the run: micro-steps, and micro-steps per update of each layer."""
  before, rows = {"micro_step": 0} | dict.fromkeys(history[-1], 0), []
  for now in history[LOOKS // 10 - 1 :: LOOKS // 10]:
    passed = now["micro_step"] - before["micro_step"]
    done = np.maximum(updates(now) - updates(before), 1)
    rows.append([now["micro_step"], *np.round(passed / done, 1)])
    before = now
  return rows


def main():
  parser = argparse.ArgumentParser(description="Trains a network whose layers decide on their own.")
  names = ("certain", "settled", "late", "patient")
  parser.add_argument("--policy", choices=names, default="certain")
  parser.add_argument("--steps", type=int, default=5120, help="micro-steps")
  parser.add_argument("--out", type=pathlib.Path, default="results/confidence.png")
  parser.add_argument("--quick", action="store_true", help="few micro-steps, to see that it runs")
  args = parser.parse_args()
  steps = min(args.steps, 1280) if args.quick else args.steps

  history, accuracy = train(cadences(args.policy, steps), steps)
  print(f"\nMean period of each layer, in every tenth of the run; policy {args.policy!r}:\n")
  rows = [*mean_periods(history), ["updates", *updates(history[-1])]]
  print(tabulate.tabulate(rows, ["micro-steps", *LAYERS]))
  print(f"\ntest accuracy {accuracy:.3f} after {history[-1]['micro_step']} micro-steps")

  mpl.use("agg")
  kernels = [
    {k.replace("/kernel", ""): v for k, v in m.items() if "bias" not in k} for m in history
  ]
  axes = oc.plot_confidence(kernels)
  axes[0].set_title(f"How each layer's cadence moved: policy {args.policy!r}")
  args.out.parent.mkdir(parents=True, exist_ok=True)
  axes[0].figure.savefig(args.out, dpi=120)
  print(f"Saved as {args.out}")


if __name__ == "__main__":
  main()
