"""Makes a trained convolution continuous, and samples its kernels at twice the size.

A small network learns to read handwritten digits of 8 x 8 pixels. A second network then learns the
5 x 5 kernels of its first layer as a function of the position (CKConv, arXiv:2102.02611), and is
sampled at 10 x 10 positions for digits of 16 x 16 pixels. The other layers stay as they are: how
well does the network read the larger digits? It takes half a minute on two CPU cores:

  python examples/continuous_kernels.py
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
import tabulate
from flax import nnx
from matplotlib.figure import Figure

from optax_cadence import growth

SHOWN = 8  # number of kernels in the picture


def load_digits():
  """1797 digits as train and test: images float32 [N, 8, 8, 1], labels int32 [N]."""
  digits = sklearn.datasets.load_digits()
  images = (digits.images[..., None] / 16).astype(np.float32)
  labels = digits.target.astype(np.int32)
  test, train = np.split(np.random.default_rng(0).permutation(len(labels)), [len(labels) // 5])
  return (images[train], labels[train]), (images[test], labels[test])


class Net(nnx.Module):
  """A convolution, means of 4 x 4 cells whatever the size of the image, two dense layers."""

  def __init__(self, rngs):
    self.stem = nnx.Conv(1, 16, (5, 5), rngs=rngs)
    self.hidden = nnx.Linear(4 * 4 * 16, 32, rngs=rngs)
    self.output = nnx.Linear(32, 10, rngs=rngs)

  def __call__(self, images):
    x = nnx.relu(self.stem(images))
    n, height, width, channels = x.shape
    x = x.reshape(n, 4, height // 4, 4, width // 4, channels).mean((2, 4))
    return self.output(nnx.relu(self.hidden(x.reshape(n, -1))))


def train(model, images, labels, steps):
  optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, images, labels):
    def loss(model):
      return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))

  rng = np.random.default_rng(0)
  for _ in range(steps):
    batch = rng.integers(len(labels), size=64)
    step(model, optimizer, images[batch], labels[batch])


def accuracy(model, images, labels):
  return float((model(images).argmax(-1) == labels).mean())


def draw(before, after, path):
  """The kernels at both sizes."""
  figure = Figure(figsize=(1.2 * SHOWN, 3), layout="constrained")
  figure.suptitle("Trained kernels, and the same read at twice the size", fontweight="bold")
  for row, kernels in zip(figure.subplots(2, SHOWN), (before, after), strict=True):
    for i, axes in enumerate(row):
      kernel = np.asarray(kernels[:, :, 0, i])
      limit = abs(kernel).max()
      axes.imshow(kernel, cmap="RdBu", vmin=-limit, vmax=limit)
      axes.set(xticks=[], yticks=[])
    row[0].set_ylabel(f"{len(kernels)} x {len(kernels)}")
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=120)


def main():
  parser = argparse.ArgumentParser(description="Resamples a trained convolution.")
  parser.add_argument("--steps", type=int, default=800, help="training steps")
  parser.add_argument("--fit", type=int, default=3000, help="steps of the fit")
  parser.add_argument("--out", type=pathlib.Path, default="results/continuous_kernels.png")
  parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
  args = parser.parse_args()
  if args.quick:
    args.steps, args.fit = 20, 50

  (images, labels), (test_images, test_labels) = load_digits()
  large = jax.image.resize(jnp.asarray(test_images), (len(test_images), 16, 16, 1), "linear")
  model = Net(nnx.Rngs(0))
  train(model, images, labels, args.steps)
  rows = [("5 x 5, as trained", "8 x 8", accuracy(model, test_images, test_labels))]
  rows.append(("5 x 5, as trained", "16 x 16", accuracy(model, large, test_labels)))

  before = model.stem.kernel[...]
  model.stem, error = growth.to_continuous(
    before, bias=model.stem.bias[...], rngs=nnx.Rngs(1), steps=args.fit, hidden=64
  )
  rows.append(("continuous, 5 x 5", "8 x 8", accuracy(model, test_images, test_labels)))
  model.stem.resample((10, 10))
  rows.append(("continuous, 10 x 10", "16 x 16", accuracy(model, large, test_labels)))
  print(f"The fit leaves {100 * error:.2f} % of the kernel's norm.\n")
  headers = ["kernel", "digits", "test accuracy (%)"]
  print(tabulate.tabulate([(k, d, f"{100 * a:.1f}") for k, d, a in rows], headers=headers))
  draw(before, model.stem.kernel, args.out)
  print(f"\nSaved {args.out}")


if __name__ == "__main__":
  main()
