"""The models whose training steps are timed, in plain JAX: parameters, batches and a loss each.

Layers are stacked in one leaf and run by a scan, or leaves of their own and unrolled.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

HEADS = 4
BYTES = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A model and its data.

  Attributes:
    params: Makes fresh parameters.
    batches: `batches(n)` makes n micro-batches, stacked along the first axis.
    loss: `loss(params, batch)`.
    unit: What a micro-batch is a number of.
    units: How many.
  """

  params: Callable[[], Any]
  batches: Callable[[int], Any]
  loss: Callable[[Any, Any], jax.Array]
  unit: str
  units: int

  def batch(self) -> Any:
    """One micro-batch."""
    return jax.tree.map(lambda x: x[0], self.batches(1))


def mlp(layers: int, width: int, rows: int) -> Model:
  """Layers of tanh, stacked and scanned."""

  def loss(params: Any, x: jax.Array) -> jax.Array:
    y = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]
    return jnp.mean(y**2)

  return Model(
    lambda: {"w": drawn(0, (layers, width, width), width)},
    lambda n: drawn(1, (n, rows, width), 1),
    loss,
    "rows",
    rows,
  )


def transformer(layers: int, width: int, rows: int, length: int, scanned: bool) -> Model:
  """Predicts the next byte: causal attention and an MLP in each layer, embeddings tied."""
  shapes = {
    "qkv": (width, 3, HEADS, width // HEADS),
    "out": (width, width),
    "up": (width, 4 * width),
    "down": (4 * width, width),
    "scales": (2, width),
  }

  def params() -> Any:
    embeddings = {
      "bytes": drawn(2, (BYTES, width), 1) * 0.02,
      "places": drawn(3, (length, width), 1),
    }
    blocks: Any = {}
    for i, (name, shape) in enumerate(shapes.items()):
      stacked = (layers, *shape)
      blocks[name] = jnp.ones(stacked) if name == "scales" else drawn(4 + i, stacked, shape[0])
    if not scanned:
      blocks = [jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(layers)]
    return {"blocks": blocks, **embeddings}

  def batches(n: int) -> jax.Array:
    # Bytes that follow from the ones before, so that there is something to learn.
    start = jax.random.randint(jax.random.key(9), (n, rows, 1), 0, BYTES)
    return (start + 7 * jnp.arange(length + 1)) % BYTES

  def loss(params: Any, tokens: jax.Array) -> jax.Array:
    h = params["bytes"][tokens[:, :-1]] + params["places"]
    if scanned:
      h = jax.lax.scan(lambda h, p: (block(h, p), None), h, params["blocks"])[0]
    else:
      h = functools.reduce(block, params["blocks"], h)
    logits = jax.nn.log_softmax(normalized(h) @ params["bytes"].T)
    return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1))

  return Model(params, batches, loss, "tokens", rows * length)


def block(h: jax.Array, p: Any) -> jax.Array:
  """One layer of the transformer."""
  qkv = jnp.einsum("bld,dkhe->kbhle", normalized(h) * p["scales"][0], p["qkv"])
  scores = qkv[0] @ qkv[1].swapaxes(-1, -2) / jnp.sqrt(1.0 * qkv.shape[-1])
  causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
  heads = jax.nn.softmax(jnp.where(causal, scores, -1e9)) @ qkv[2]
  h += heads.swapaxes(1, 2).reshape(h.shape) @ p["out"]
  return h + jax.nn.gelu(normalized(h) * p["scales"][1] @ p["up"]) @ p["down"]


def normalized(h: jax.Array) -> jax.Array:
  """Each entry's features, of unit mean square."""
  return h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)


def resnet(width: int, images: int, size: int = 32) -> Model:
  """Three stages of two residual blocks, each of twice the channels of the one before."""
  shapes = convolutions(width)

  def params() -> Any:
    kernels = {
      name: kernel(20 + i, before, after)
      for i, (name, (before, after, _)) in enumerate(shapes.items())
    }
    return {**kernels, "head": drawn(40, (4 * width, 10), 4 * width)}

  def batches(n: int) -> Any:
    x = drawn(41, (n, images, size, size, 3), 1)
    return {"x": x, "y": jax.random.randint(jax.random.key(42), (n, images), 0, 10)}

  def loss(params: Any, batch: Any) -> jax.Array:
    def run(name: str, x: jax.Array) -> jax.Array:
      *_, stride = shapes[name]
      return convolved(x, params[name], stride)

    logits = jax.nn.log_softmax(residual(run, batch["x"]) @ params["head"])
    return -jnp.mean(jnp.take_along_axis(logits, batch["y"][:, None], axis=-1))

  return Model(params, batches, loss, "images", images)


def convolutions(width: int) -> dict[str, tuple[int, int, int]]:
  """Of each convolution of a ResNet the channels before and after it, and its stride."""
  found, before = {"stem": (3, width, 1)}, width
  for i in range(3):
    for j in range(2):
      after = width * 2**i
      found[f"block_{i}{j}_a"] = before, after, 2 if i and not j else 1
      found[f"block_{i}{j}_b"] = after, after, 1
      before = after
  return found


def residual(run: Callable[[str, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
  """A ResNet up to its last layer; `run(name, x)` is a convolution, with its norm if it has one."""
  h = jax.nn.relu(run("stem", x))
  for i in range(3):
    for j in range(2):
      new = run(f"block_{i}{j}_b", jax.nn.relu(run(f"block_{i}{j}_a", h)))
      h = jax.nn.relu(new if h.shape != new.shape else new + h)
  return h.mean(axis=(1, 2))


def kernel(seed: int, before: int, after: int) -> jax.Array:
  """A kernel of three by three."""
  return drawn(seed, (3, 3, before, after), 9 * before)


def convolved(x: jax.Array, w: jax.Array, stride: int) -> jax.Array:
  """Channels last, same padding."""
  strides = (stride, stride)
  return jax.lax.conv_general_dilated(
    x, w, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def drawn(seed: int, shape: tuple[int, ...], inputs: int) -> jax.Array:
  """Normal numbers, such that a sum over so many inputs has unit variance."""
  return jax.random.normal(jax.random.key(seed), shape) / jnp.sqrt(1.0 * inputs)
