"""Models whose training steps are timed in NNX and in Linen: a transformer and a small ResNet.

They are written as people write them, and are the same in both.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from benchmarks.models import BYTES
from benchmarks.models import convolutions
from benchmarks.models import HEADS
from benchmarks.models import residual


def attention(qkv: jax.Array) -> jax.Array:
  """Causal attention of queries, keys and values that lie one after the other."""
  q, k, v = jnp.moveaxis(qkv.reshape(*qkv.shape[:-1], 3, HEADS, -1), -3, 0)
  heads = jax.nn.dot_product_attention(q, k, v, is_causal=True)
  return heads.reshape(*qkv.shape[:-1], -1)


class NnxBlock(nnx.Module):
  """One layer of the transformer."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    self.before, self.between = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
    self.qkv, self.out = (
      nnx.Linear(width, 3 * width, rngs=rngs),
      nnx.Linear(width, width, rngs=rngs),
    )
    self.up = nnx.Linear(width, 4 * width, rngs=rngs)
    self.down = nnx.Linear(4 * width, width, rngs=rngs)

  def __call__(self, h: jax.Array) -> jax.Array:
    h += self.out(attention(self.qkv(self.before(h))))
    return h + self.down(nnx.gelu(self.up(self.between(h))))


class NnxTransformer(nnx.Module):
  """Predicts the next byte; its layers in one leaf for each kind of weight, or in many."""

  def __init__(self, layers: int, width: int, length: int, scanned: bool, rngs: nnx.Rngs):
    self.scanned, self.names = scanned, [f"block_{i}" for i in range(layers)]
    self.bytes = nnx.Embed(BYTES, width, rngs=rngs)
    self.places = nnx.Embed(length, width, rngs=rngs)
    if scanned:
      make = nnx.vmap(lambda rngs: NnxBlock(width, rngs))
      self.blocks = nnx.split_rngs(splits=layers)(make)(rngs)
    else:
      for name in self.names:
        setattr(self, name, NnxBlock(width, rngs))

  def __call__(self, tokens: jax.Array) -> jax.Array:
    h = self.bytes(tokens) + self.places(jnp.arange(tokens.shape[-1]))
    if self.scanned:
      run = nnx.scan(lambda block, h: block(h), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
      h = run(self.blocks, h)
    else:
      for name in self.names:
        h = getattr(self, name)(h)
    return self.bytes.attend(h)


class LinenBlock(nn.Module):
  """One layer of the transformer; returns a pair, as `nn.scan` wants it."""

  width: int

  @nn.compact
  def __call__(self, h: jax.Array, _: None = None) -> tuple[jax.Array, None]:
    qkv = nn.Dense(3 * self.width, name="qkv")(nn.LayerNorm(name="before")(h))
    h += nn.Dense(self.width, name="out")(attention(qkv))
    up = nn.gelu(nn.Dense(4 * self.width, name="up")(nn.LayerNorm(name="between")(h)))
    return h + nn.Dense(self.width, name="down")(up), None


class LinenTransformer(nn.Module):
  """As `NnxTransformer`."""

  layers: int
  width: int
  length: int
  scanned: bool

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    embed = nn.Embed(BYTES, self.width, name="bytes")
    h = embed(tokens) + nn.Embed(self.length, self.width, name="places")(
      jnp.arange(tokens.shape[-1])
    )
    if self.scanned:
      along = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
      h, _ = nn.scan(LinenBlock, length=self.layers, **along)(self.width, name="blocks")(h, None)
    else:
      for i in range(self.layers):
        h, _ = LinenBlock(self.width, name=f"block_{i}")(h)
    return embed.attend(h)


class NnxResNet(nnx.Module):
  """Three stages of two residual blocks, with a norm over the batch after every convolution."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    for name, shape in convolutions(width).items():
      self.add(name, *shape, rngs)
    self.head = nnx.Linear(4 * width, 10, rngs=rngs)

  def add(self, name: str, before: int, after: int, stride: int, rngs: nnx.Rngs) -> None:
    """Adds a convolution and its norm."""
    conv = nnx.Conv(before, after, (3, 3), strides=stride, use_bias=False, rngs=rngs)
    setattr(self, name, conv)
    setattr(self, f"{name}_norm", nnx.BatchNorm(after, rngs=rngs))

  def __call__(self, x: jax.Array) -> jax.Array:
    def run(name: str, x: jax.Array) -> jax.Array:
      return getattr(self, f"{name}_norm")(getattr(self, name)(x))

    return self.head(residual(run, x))


class LinenResNet(nn.Module):
  """As `NnxResNet`."""

  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def run(name: str, x: jax.Array) -> jax.Array:
      _, channels, stride = convolutions(self.width)[name]
      conv = nn.Conv(channels, (3, 3), strides=stride, use_bias=False, name=name)
      return nn.BatchNorm(use_running_average=False, name=f"{name}_norm")(conv(x))

    return nn.Dense(10, name="head")(residual(run, x))
