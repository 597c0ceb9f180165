"""Small networks of every kind, as people write them, and what of each grows together.

Beside each stands, written by hand, what its dimensions are: which axes of which leaves share
units with the producers that are named. `ZOO` is the list; `test_zoo.py` and the table in
`docs/growth.md` go by it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from growth_nets import module_list

KEY = jax.random.key(0)
IMAGES = jax.random.normal(KEY, (2, 8, 8, 3))
TOKENS = jnp.array([[1, 2, 3, 0], [4, 5, 6, 2]])
ROWS = jax.random.normal(KEY, (3, 6))
SEQUENCES = jax.random.normal(KEY, (2, 5, 4))


@dataclasses.dataclass(frozen=True)
class Units:
  """A dimension: what makes it, and the axes of leaves that it consists of.

  Attributes:
    kind: "hidden", "residual" or "heads".
    producer: Paths of layers or leaves, globs perhaps.
    by: How many units it grows by.
    members: For a leaf, or a glob, its axis or axes.
    how: `axis`, `unit` and `blocks`, if they are not the defaults.
    sizes: What attributes of the user's own classes are at the new size.
    new: Of Linen, the sizes of the module when they have grown.
    output: Whether the output of the network carries the units.
  """

  kind: str
  producer: str | list[str]
  by: int
  members: Mapping[str, int | tuple[int, ...]]
  how: Mapping[str, int] = dataclasses.field(default_factory=dict)
  sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  new: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  output: bool = False


@dataclasses.dataclass(frozen=True)
class Net:
  """A network.

  Attributes:
    name: What people call it.
    make: Of NNX, `make(rngs)`; of Linen, a module.
    inputs: What it is called with.
    units: Its dimensions.
    all_new: Of Linen, sizes of the module when all of these have grown that are not those of each.
    merges: Whether the merged network computes what the gated one does at 1: not where it draws
      random numbers, of which it then draws others.
  """

  name: str
  make: Any
  inputs: tuple[Any, ...]
  units: tuple[Units, ...]
  all_new: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  merges: bool = True

  @property
  def new(self) -> Mapping[str, Any]:
    """Of Linen, the sizes of the module when all dimensions have grown."""
    return {k: v for units in self.units for k, v in units.new.items()} | dict(self.all_new)

  @property
  def is_linen(self) -> bool:
    return isinstance(self.make, nn.Module)


ZOO: list[Net] = []


def shows(name, make, inputs, *units, **settings):
  ZOO.append(Net(name, make, inputs if isinstance(inputs, tuple) else (inputs,), units, **settings))


# ------------------------------------------------------------------------------ layers in a row


class Mlp(nnx.Module):
  def __init__(self, rngs):
    self.fc1, self.fc2 = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
    self.out = nnx.Linear(8, 2, rngs=rngs)

  def __call__(self, x):
    return self.out(nnx.relu(self.fc2(nnx.relu(self.fc1(x)))))


shows(
  "MLP", Mlp, ROWS,
  Units("hidden", ["fc1", "fc2"], 3, {
    "fc1/kernel": 1, "fc1/bias": 0, "fc2/kernel": (0, 1), "fc2/bias": 0, "out/kernel": 0}),
)  # fmt: skip


class LeNet(nn.Module):
  channels: int = 4
  hidden: int = 10

  @nn.compact
  def __call__(self, x):
    x = nn.avg_pool(nn.tanh(nn.Conv(3, (3, 3))(x)), (2, 2), (2, 2))
    x = nn.avg_pool(nn.tanh(nn.Conv(self.channels, (3, 3))(x)), (2, 2), (2, 2))
    x = nn.tanh(nn.Dense(self.hidden)(x.reshape((x.shape[0], -1))))
    return nn.Dense(2)(x)


shows(
  "LeNet", LeNet(), IMAGES,
  Units("hidden", "params/Conv_1", 2, {
    "params/Conv_1/kernel": 3, "params/Conv_1/bias": 0, "params/Dense_0/kernel": 0},
    new={"channels": 6}),
  Units("hidden", "params/Dense_0", 3, {
    "params/Dense_0/kernel": 1, "params/Dense_0/bias": 0, "params/Dense_1/kernel": 0},
    new={"hidden": 13}),
)  # fmt: skip


class Vgg(nn.Module):
  config: tuple = (4, "M", 6, 6, "M")

  @nn.compact
  def __call__(self, x, train=False):
    for width in self.config:
      if width == "M":
        x = nn.max_pool(x, (2, 2), (2, 2))
      else:
        x = nn.Conv(width, (3, 3), padding=1, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    x = nn.relu(nn.Dense(8)(x.reshape((x.shape[0], -1))))
    return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x))


def vgg(layer, then):
  norm = {f"*/BatchNorm_{layer}/{leaf}": 0 for leaf in ("scale", "bias", "mean", "var")}
  return {f"params/Conv_{layer}/kernel": 3, **norm, f"params/{then}/kernel": 2}


shows(
  "VGG", Vgg(), IMAGES,
  Units("hidden", "params/Conv_0", 2, vgg(0, "Conv_1"), new={"config": (6, "M", 6, 6, "M")}),
  Units("hidden", ["params/Conv_1", "params/Conv_2"], 3, {
    **vgg(1, "Conv_2"), **vgg(2, "Conv_2"), "params/Conv_2/kernel": (2, 3),
    "params/Dense_0/kernel": 0}, new={"config": (4, "M", 9, 9, "M")}),
  all_new={"config": (6, "M", 9, 9, "M")},
)  # fmt: skip


# ------------------------------------------------------------------------ convolutions, residual


def batch_norm(name):
  return {f"{name}/{leaf}": 0 for leaf in ("scale", "bias", "mean", "var")}


class Bottleneck(nnx.Module):
  def __init__(self, width, middle, rngs, groups=1):
    self.conv1 = nnx.Conv(width, middle, (1, 1), use_bias=False, rngs=rngs)
    self.norm1 = nnx.BatchNorm(middle, rngs=rngs)
    self.conv2 = nnx.Conv(
      middle, middle, (3, 3), use_bias=False, feature_group_count=groups, rngs=rngs
    )
    self.norm2 = nnx.BatchNorm(middle, rngs=rngs)
    self.conv3 = nnx.Conv(middle, width, (1, 1), use_bias=False, rngs=rngs)
    self.norm3 = nnx.BatchNorm(width, rngs=rngs)

  def __call__(self, x):
    y = nnx.relu(self.norm1(self.conv1(x)))
    y = nnx.relu(self.norm2(self.conv2(y)))
    return nnx.relu(x + self.norm3(self.conv3(y)))


class ResNet(nnx.Module):
  def __init__(self, rngs, groups=1):
    self.stem = nnx.Conv(3, 4, (3, 3), strides=(2, 2), use_bias=False, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.stage1 = module_list([Bottleneck(4, 6, rngs, groups)])
    self.shortcut = nnx.Conv(4, 8, (1, 1), strides=(2, 2), rngs=rngs)
    self.stage2 = module_list([Bottleneck(8, 6, rngs, groups)])
    self.head = nnx.Linear(8, 2, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.stem(x)))
    for block in self.stage1:
      x = block(x)
    x = self.shortcut(x)
    for block in self.stage2:
      x = block(x)
    return self.head(x.mean(axis=(1, 2)))


RESIDUAL = Units("residual", "stem", 2, {
  "stem/kernel": 3, **batch_norm("norm"), "stage1/0/conv1/kernel": 2, "stage1/0/conv3/kernel": 3,
  **batch_norm("stage1/0/norm3"), "shortcut/kernel": 2})  # fmt: skip

shows(
  "ResNet", ResNet, IMAGES,
  Units("hidden", "*/conv1", 2, {
    "*/conv1/kernel": 3, **batch_norm("*/norm1"), "*/conv2/kernel": 2}),
  Units("hidden", "*/conv2", 3, {
    "*/conv2/kernel": 3, **batch_norm("*/norm2"), "*/conv3/kernel": 2}),
  RESIDUAL,
  Units("residual", "shortcut", 2, {
    "shortcut/kernel": 3, "shortcut/bias": 0, "stage2/0/conv1/kernel": 2,
    "stage2/0/conv3/kernel": 3, **batch_norm("stage2/0/norm3"), "head/kernel": 0}),
)  # fmt: skip

shows(
  "ResNeXt", lambda rngs: ResNet(rngs, groups=2), IMAGES,
  Units("hidden", "*/conv1", 1, {  # one more group of three channels
    "*/conv1/kernel": 3, **batch_norm("*/norm1"), "*/conv2/kernel": 3, **batch_norm("*/norm2"),
    "*/conv3/kernel": 2}, how={"unit": 3}),
  RESIDUAL,
)  # fmt: skip


class SqueezeExcite(nnx.Module):
  def __init__(self, width, rngs):
    self.reduce, self.expand = nnx.Linear(width, 3, rngs=rngs), nnx.Linear(3, width, rngs=rngs)

  def __call__(self, x):
    y = nnx.silu(self.reduce(x.mean(axis=(1, 2), keepdims=True)))
    return x * nnx.sigmoid(self.expand(y))


class InvertedResidual(nnx.Module):
  def __init__(self, width, expanded, rngs):
    self.up = nnx.Conv(width, expanded, (1, 1), use_bias=False, rngs=rngs)
    self.norm1 = nnx.BatchNorm(expanded, rngs=rngs)
    self.depthwise = nnx.Conv(
      expanded, expanded, (3, 3), feature_group_count=expanded, use_bias=False, rngs=rngs
    )
    self.norm2 = nnx.BatchNorm(expanded, rngs=rngs)
    self.squeeze = SqueezeExcite(expanded, rngs)
    self.down = nnx.Conv(expanded, width, (1, 1), use_bias=False, rngs=rngs)

  def __call__(self, x):
    y = nnx.hard_swish(self.norm1(self.up(x)))
    y = self.squeeze(nnx.hard_swish(self.norm2(self.depthwise(y))))
    return x + self.down(y)


class MobileNet(nnx.Module):
  def __init__(self, rngs):
    self.stem = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)
    self.blocks = module_list([InvertedResidual(4, 6, rngs) for _ in range(2)])
    self.head = nnx.Linear(4, 2, rngs=rngs)

  def __call__(self, x):
    x = self.stem(x)
    for block in self.blocks:
      x = block(x)
    return self.head(jnp.mean(x, (1, 2)))


shows(
  "MobileNet", MobileNet, IMAGES,
  Units("hidden", "blocks/*/up", 2, {
    "blocks/*/up/kernel": 3, **batch_norm("blocks/*/norm[12]"), "blocks/*/depthwise/kernel": 3,
    "*/squeeze/reduce/kernel": 0, "*/squeeze/expand/kernel": 1, "*/squeeze/expand/bias": 0,
    "blocks/*/down/kernel": 2}),
  Units("hidden", "blocks/0/squeeze/reduce", 2, {
    "blocks/0/squeeze/reduce/kernel": 1, "blocks/0/squeeze/reduce/bias": 0,
    "blocks/0/squeeze/expand/kernel": 0}),
  Units("residual", "stem", 2, {
    "stem/kernel": 3, "stem/bias": 0, "blocks/*/up/kernel": 2, "blocks/*/down/kernel": 3,
    "head/kernel": 0}),
)  # fmt: skip


class DenseNet(nn.Module):
  stem: int = 4
  growth_rate: int = 3
  bottleneck: int = 5

  @nn.compact
  def __call__(self, x, train=False):
    def norm(x):
      return nn.relu(nn.BatchNorm(use_running_average=not train)(x))

    x = nn.Conv(self.stem, (3, 3), name="stem")(x)
    for i in range(2):
      y = nn.Conv(self.bottleneck, (1, 1), use_bias=False, name=f"narrow{i}")(norm(x))
      y = nn.Conv(self.growth_rate, (3, 3), use_bias=False, name=f"grow{i}")(norm(y))
      x = jnp.concatenate([x, y], axis=-1)
    return nn.Dense(2, name="head")(jnp.mean(norm(x), axis=(1, 2)))


def linen_norm(name):
  return {f"*/BatchNorm_{name}/{leaf}": 0 for leaf in ("scale", "bias", "mean", "var")}


shows(
  "DenseNet", DenseNet(), IMAGES,
  Units("hidden", "params/narrow?", 2, {
    "params/narrow?/kernel": 3, **linen_norm("[13]"), "params/grow?/kernel": 2},
    new={"bottleneck": 7}),
  Units("residual", ["params/grow0", "params/grow1"], 1, {
    "params/grow?/kernel": 3, **linen_norm("[24]"), "params/narrow1/kernel": 2,
    "params/head/kernel": 0}, new={"growth_rate": 4}),
)  # fmt: skip


class UNet(nnx.Module):
  def __init__(self, rngs):
    self.enter = nnx.Conv(3, 4, (3, 3), rngs=rngs)
    self.down = nnx.Conv(4, 6, (3, 3), strides=2, rngs=rngs)
    self.middle = nnx.Conv(6, 6, (3, 3), rngs=rngs)
    self.up = nnx.ConvTranspose(6, 4, (2, 2), strides=2, rngs=rngs)
    self.norm = nnx.GroupNorm(8, num_groups=4, use_fast_variance=False, rngs=rngs)
    self.fuse = nnx.Conv(8, 4, (3, 3), rngs=rngs)
    self.leave = nnx.Conv(4, 1, (1, 1), rngs=rngs)

  def __call__(self, x):
    skip = nnx.silu(self.enter(x))
    x = nnx.silu(self.down(skip))
    x = x + nnx.silu(self.middle(x))
    x = jnp.concatenate([skip, self.up(x)], axis=-1)
    return self.leave(nnx.silu(self.fuse(self.norm(x))))


shows(
  "U-Net", UNet, IMAGES,
  Units("hidden", "enter", 1, {  # one more group of the norm
    "enter/kernel": 3, "enter/bias": 0, "down/kernel": 2, "norm/scale": 0, "norm/bias": 0,
    "fuse/kernel": 2}, how={"unit": 2}),
  Units("hidden", "fuse", 2, {"fuse/kernel": 3, "fuse/bias": 0, "leave/kernel": 2}),
  Units("residual", "down", 3, {
    "down/kernel": 3, "down/bias": 0, "middle/kernel": (2, 3), "middle/bias": 0, "up/kernel": 2}),
)  # fmt: skip


class ConvNeXtBlock(nnx.Module):
  def __init__(self, width, rngs):
    self.depthwise = nnx.Conv(width, width, (7, 7), feature_group_count=width, rngs=rngs)
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.up, self.down = nnx.Linear(width, 8, rngs=rngs), nnx.Linear(8, width, rngs=rngs)
    self.gamma = nnx.Param(1e-6 * jnp.ones((width,)))

  def __call__(self, x):
    return x + self.gamma * self.down(nnx.gelu(self.up(self.norm(self.depthwise(x)))))


class ConvNeXt(nnx.Module):
  def __init__(self, rngs):
    self.stem = nnx.Conv(3, 6, (2, 2), strides=(2, 2), rngs=rngs)
    self.blocks = module_list([ConvNeXtBlock(6, rngs)])
    self.norm, self.head = nnx.LayerNorm(6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

  def __call__(self, x):
    x = self.stem(x)
    for block in self.blocks:
      x = block(x)
    return self.head(self.norm(jnp.mean(x, axis=(1, 2))))


shows(
  "ConvNeXt", ConvNeXt, IMAGES,
  Units("hidden", "blocks/*/up", 3, {
    "blocks/0/up/kernel": 1, "blocks/0/up/bias": 0, "blocks/0/down/kernel": 0}),
  Units("residual", "stem", 2, {
    "stem/kernel": 3, "stem/bias": 0, "blocks/0/depthwise/kernel": 3, "blocks/0/depthwise/bias": 0,
    "*norm/scale": 0, "*norm/bias": 0, "blocks/0/up/kernel": 0, "blocks/0/down/kernel": 1,
    "blocks/0/down/bias": 0, "blocks/0/gamma": 0, "head/kernel": 0}),
)  # fmt: skip


# ------------------------------------------------------------------------------------- attention


class VitBlock(nnx.Module):
  def __init__(self, width, heads, hidden, rngs):
    self.norm1 = nnx.LayerNorm(width, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
    self.norm2 = nnx.LayerNorm(width, rngs=rngs)
    self.fc1, self.fc2 = nnx.Linear(width, hidden, rngs=rngs), nnx.Linear(hidden, width, rngs=rngs)

  def __call__(self, x):
    x = x + self.attention(self.norm1(x))
    return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x))))


class Vit(nnx.Module):
  def __init__(self, rngs):
    self.patches = nnx.Conv(3, 6, (4, 4), strides=(4, 4), padding="VALID", rngs=rngs)
    self.token = nnx.Param(jnp.zeros((1, 1, 6)))
    self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 5, 6)))
    self.blocks = module_list([VitBlock(6, 2, 8, rngs)])
    self.norm, self.head = nnx.LayerNorm(6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

  def __call__(self, x):
    x = self.patches(x)
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height * width, channels)
    x = jnp.concatenate([jnp.tile(self.token, (batch, 1, 1)), x], axis=1) + self.positions
    for block in self.blocks:
      x = block(x)
    return self.head(self.norm(x)[:, 0])


def of_heads(path):
  """Kernels [inputs, heads, of a head] and [heads, of a head, outputs], as Flax has them."""
  kernels = {f"{path}/{name}/kernel": 1 for name in ("query", "key", "value")}
  biases = {f"{path}/{name}/bias": 0 for name in ("query", "key", "value")}
  return {**kernels, **biases, f"{path}/out/kernel": 0}


def attending(path):
  """What of such attention lies on the residual stream."""
  kernels = {f"{path}/{name}/kernel": 0 for name in ("query", "key", "value")}
  return {**kernels, f"{path}/out/kernel": 2, f"{path}/out/bias": 0}


shows(
  "ViT", Vit, IMAGES,
  Units("hidden", "blocks/*/fc1", 3, {
    "blocks/*/fc1/kernel": 1, "blocks/*/fc1/bias": 0, "blocks/*/fc2/kernel": 0}),
  Units("residual", "patches", 2, {
    "patches/kernel": 3, "patches/bias": 0, "token": 2, "positions": 2, "*norm*/scale": 0,
    "*norm*/bias": 0, **attending("blocks/*/attention"), "blocks/*/fc1/kernel": 0,
    "blocks/*/fc2/kernel": 1, "blocks/*/fc2/bias": 0, "head/kernel": 0}),
  Units("heads", "blocks/*/attention/query", 1, of_heads("blocks/*/attention"),
        how={"axis": -2}),
)  # fmt: skip


class MixerBlock(nn.Module):
  tokens: int
  hidden: int

  @nn.compact
  def __call__(self, x):
    def mlp(x, hidden, name):
      y = nn.gelu(nn.Dense(hidden, name=f"{name}_up")(x))
      return nn.Dense(x.shape[-1], name=f"{name}_down")(y)

    y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
    x = x + jnp.swapaxes(mlp(y, self.tokens, "tokens"), 1, 2)
    return x + mlp(nn.LayerNorm()(x), self.hidden, "channels")


class Mixer(nn.Module):
  width: int = 6
  tokens: int = 5
  hidden: int = 8

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(self.width, (4, 4), strides=(4, 4), name="stem")(x)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    for _ in range(2):
      x = MixerBlock(self.tokens, self.hidden)(x)
    return nn.Dense(2, name="head")(nn.LayerNorm(name="norm")(x).mean(axis=1))


def up_and_down(path, up, down):
  return {f"{path}/{up}/kernel": 1, f"{path}/{up}/bias": 0, f"{path}/{down}/kernel": 0}


shows(
  "Mixer", Mixer(), IMAGES,
  Units("hidden", "*/channels_up", 2, up_and_down("*", "channels_up", "channels_down"),
        new={"hidden": 10}),
  Units("hidden", "*/tokens_up", 2, up_and_down("*", "tokens_up", "tokens_down"),
        new={"tokens": 7}),
  Units("residual", "params/stem", 2, {
    "params/stem/kernel": 3, "params/stem/bias": 0, "*/LayerNorm_?/*": 0, "params/norm/*": 0,
    "*/channels_up/kernel": 0, "*/channels_down/kernel": 1, "*/channels_down/bias": 0,
    "params/head/kernel": 0}, new={"width": 8}),
)  # fmt: skip


class Bert(nn.Module):
  width: int = 6
  heads: int = 2
  hidden: int = 8

  @nn.compact
  def __call__(self, tokens, train=False):
    embed = nn.Embed(8, self.width, name="words")
    positions = nn.Embed(4, self.width, name="positions")(jnp.arange(tokens.shape[1])[None])
    x = embed(tokens) + positions
    x = x + nn.Embed(2, self.width, name="types")(jnp.zeros_like(tokens))
    x = nn.Dropout(0.1)(nn.LayerNorm(name="norm")(x), deterministic=not train)
    mask = (tokens > 0)[:, None, None, :]
    for i in range(2):
      y = nn.MultiHeadDotProductAttention(
        self.heads, qkv_features=3 * self.heads, out_features=self.width, name=f"attention{i}"
      )(x, mask=mask)
      x = nn.LayerNorm(name=f"norm1_{i}")(x + y)
      y = nn.Dense(self.width, name=f"down{i}")(nn.gelu(nn.Dense(self.hidden, name=f"up{i}")(x)))
      x = nn.LayerNorm(name=f"norm2_{i}")(x + y)
    y = nn.LayerNorm(name="head_norm")(nn.gelu(nn.Dense(self.width, name="head")(x)))
    bias = self.param("head_bias", nn.initializers.zeros, (8,))
    pooled = nn.tanh(nn.Dense(5, name="pooler")(x[:, 0]))
    return embed.attend(y) + bias, nn.Dense(2, name="next_sentence")(pooled)


shows(
  "BERT", Bert(), TOKENS,
  Units("hidden", "params/up?", 2, up_and_down("params", "up?", "down?"), new={"hidden": 10}),
  Units("residual", "params/words", 3, {
    "params/words/embedding": 1, "params/positions/embedding": 1, "params/types/embedding": 1,
    "params/norm*/scale": 0, "params/norm*/bias": 0, **attending("params/attention?"),
    "params/up?/kernel": 0, "params/down?/kernel": 1, "params/down?/bias": 0,
    "params/head/kernel": (0, 1), "params/head/bias": 0, "params/head_norm/*": 0,
    "params/pooler/kernel": 0}, new={"width": 9}),
  Units("heads", "params/attention?/query", 1, of_heads("params/attention?"), how={"axis": -2},
        new={"heads": 3}),
)  # fmt: skip


class GptBlock(nnx.Module):
  def __init__(self, width, heads, rngs):
    self.heads = heads
    self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
    self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
    self.proj = nnx.Linear(width, width, rngs=rngs)
    self.up, self.down = nnx.Linear(width, 8, rngs=rngs), nnx.Linear(8, width, rngs=rngs)

  def attend(self, x):
    batch, length, _ = x.shape
    q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
    q, k, v = (y.reshape(batch, length, self.heads, -1).transpose(0, 2, 1, 3) for y in (q, k, v))
    scores = q @ k.swapaxes(-2, -1) / np.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
    y = jax.nn.softmax(scores, axis=-1) @ v
    return self.proj(y.transpose(0, 2, 1, 3).reshape(batch, length, -1))

  def __call__(self, x):
    x = x + self.attend(self.norm1(x))
    return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Gpt(nnx.Module):
  def __init__(self, rngs):
    self.embed, self.positions = nnx.Embed(8, 6, rngs=rngs), nnx.Embed(4, 6, rngs=rngs)
    self.blocks = module_list([GptBlock(6, 2, rngs) for _ in range(2)])
    self.norm = nnx.LayerNorm(6, rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))
    for block in self.blocks:
      x = block(x)
    return self.embed.attend(self.norm(x))


shows(
  "GPT", Gpt, TOKENS,
  Units("hidden", "blocks/*/up", 3, up_and_down("blocks/*", "up", "down")),
  Units("residual", "embed", 2, {
    "embed/embedding": 1, "positions/embedding": 1, "*norm*/scale": 0, "*norm*/bias": 0,
    "blocks/*/qkv/kernel": 0, "blocks/*/proj/kernel": 1, "blocks/*/proj/bias": 0,
    "blocks/*/up/kernel": 0, "blocks/*/down/kernel": 1, "blocks/*/down/bias": 0}),
  Units("heads", "blocks/*/qkv", 1, {
    "blocks/*/qkv/kernel": 1, "blocks/*/qkv/bias": 0, "blocks/*/proj/kernel": 0},
    how={"unit": 3, "blocks": 3}, sizes={"heads": 3}),
)  # fmt: skip


class RMSNorm(nnx.Module):
  def __init__(self, width):
    self.weight = nnx.Param(jnp.ones(width))

  def __call__(self, x):
    return self.weight * x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def rotated(x):
  """Rotary positions, of [batch, length, heads, of a head]."""
  angles = jnp.arange(x.shape[1])[:, None] * 10.0 ** -jnp.arange(x.shape[-1] // 2)
  sin, cos = jnp.sin(angles)[:, None, :], jnp.cos(angles)[:, None, :]
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class LlamaAttention(nnx.Module):
  def __init__(self, width, heads, kv_heads, head_dim, rngs):
    self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim

    def linear(inputs, outputs):
      return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)

    self.q, self.o = linear(width, heads * head_dim), linear(heads * head_dim, width)
    self.k, self.v = linear(width, kv_heads * head_dim), linear(width, kv_heads * head_dim)

  def __call__(self, x):
    batch, length, _ = x.shape
    q = rotated(self.q(x).reshape(batch, length, self.heads, self.head_dim))
    k = rotated(self.k(x).reshape(batch, length, self.kv_heads, self.head_dim))
    v = self.v(x).reshape(batch, length, self.kv_heads, self.head_dim)
    k, v = (jnp.repeat(y, self.heads // self.kv_heads, axis=2) for y in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(self.head_dim)
    weights = jax.nn.softmax(scores + jnp.triu(jnp.full((length, length), -1e9), 1), axis=-1)
    return self.o(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, -1))


class LlamaBlock(nnx.Module):
  def __init__(self, rngs):
    self.norm1, self.norm2 = RMSNorm(6), RMSNorm(6)
    self.attention = LlamaAttention(6, 4, 2, 4, rngs)
    self.gate, self.up = (nnx.Linear(6, 8, use_bias=False, rngs=rngs) for _ in range(2))
    self.down = nnx.Linear(8, 6, use_bias=False, rngs=rngs)

  def __call__(self, x):
    x = x + self.attention(self.norm1(x))
    y = self.norm2(x)
    return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Llama(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(8, 6, rngs=rngs)
    self.layers = module_list([LlamaBlock(rngs)])
    self.norm, self.head = RMSNorm(6), nnx.Linear(6, 8, use_bias=False, rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens)
    for layer in self.layers:
      x = layer(x)
    return self.head(self.norm(x))


shows(
  "Llama", Llama, TOKENS,
  Units("hidden", "layers/*/up", 3, {
    "layers/*/gate/kernel": 1, "layers/*/up/kernel": 1, "layers/*/down/kernel": 0}),
  Units("residual", "embed", 2, {
    "embed/embedding": 1, "*norm*/weight": 0, "*/[qkv]/kernel": 0, "*/o/kernel": 1,
    "*/gate/kernel": 0, "*/up/kernel": 0, "*/down/kernel": 1, "head/kernel": 0}),
  Units("heads", "layers/*/attention/k", 1, {
    "*/[qkv]/kernel": 1, "*/o/kernel": 0}, how={"unit": 4}, sizes={"heads": 6, "kv_heads": 3}),
)  # fmt: skip


class T5Attention(nn.Module):
  width: int
  heads: int

  @nn.compact
  def __call__(self, x, memory, bias):
    def heads(x, name):
      return nn.DenseGeneral((self.heads, 3), use_bias=False, name=name)(x)

    scores = jnp.einsum("bqhd,bkhd->bhqk", heads(x, "q"), heads(memory, "k")) + bias
    y = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), heads(memory, "v"))
    return nn.DenseGeneral(self.width, axis=(-2, -1), use_bias=False, name="o")(y)


class T5(nn.Module):
  width: int = 6
  heads: int = 2
  hidden: int = 8

  @nn.compact
  def __call__(self, source, target):
    embed = nn.Embed(8, self.width, name="embed")

    def relative(queries, keys, name):
      distance = jnp.arange(keys)[None, :] - jnp.arange(queries)[:, None]
      table = nn.Embed(7, self.heads, name=name)(jnp.clip(distance, -3, 3) + 3)
      return jnp.transpose(table, (2, 0, 1))[None]

    def block(x, name, bias, memory=None):
      y = nn.RMSNorm(name=f"{name}_norm1")(x)
      x = x + T5Attention(self.width, self.heads, name=f"{name}_self")(y, y, bias)
      if memory is not None:
        y = nn.RMSNorm(name=f"{name}_norm2")(x)
        x = x + T5Attention(self.width, self.heads, name=f"{name}_cross")(y, memory, 0.0)
      y = nn.Dense(self.hidden, use_bias=False, name=f"{name}_wi")(nn.RMSNorm(name=f"{name}_n")(x))
      return x + nn.Dense(self.width, use_bias=False, name=f"{name}_wo")(nn.relu(y))

    n, m = source.shape[1], target.shape[1]
    memory = block(embed(source), "encoder", relative(n, n, "encoder_positions"))
    memory = nn.RMSNorm(name="encoder_norm")(memory)
    causal = jnp.where(jnp.tril(jnp.ones((m, m), bool)), 0.0, -1e9)
    bias = relative(m, m, "decoder_positions") + causal
    x = block(embed(target), "decoder", bias, memory)
    return embed.attend(nn.RMSNorm(name="decoder_norm")(x) * self.width**-0.5)


shows(
  "T5", T5(), (TOKENS, TOKENS[:, :3]),
  Units("hidden", "params/*_wi", 2, {"params/*_wi/kernel": 1, "params/*_wo/kernel": 0},
        new={"hidden": 10}),
  Units("residual", "params/embed", 3, {
    "params/embed/embedding": 1, "params/*_n*/scale": 0, "params/*/[qkv]/kernel": 0,
    "params/*/o/kernel": 2, "params/*_wi/kernel": 0, "params/*_wo/kernel": 1},
    new={"width": 9}),
  Units("heads", ["params/encoder_self/q", "params/decoder_*/q"], 1, {
    "params/*/[qkv]/kernel": 1, "params/*/o/kernel": 0, "params/*_positions/embedding": 1},
    how={"axis": -2}, new={"heads": 3}),
)  # fmt: skip


class Moe(nnx.Module):
  """A layer of experts, of which each token goes to two."""

  def __init__(self, rngs, experts=4, width=6, hidden=8):
    init = nnx.initializers.lecun_normal(batch_axis=0)
    self.embed = nnx.Embed(8, width, rngs=rngs)
    self.router = nnx.Linear(width, experts, use_bias=False, rngs=rngs)
    self.w_in = nnx.Param(init(rngs.params(), (experts, width, hidden)))
    self.w_out = nnx.Param(init(rngs.params(), (experts, hidden, width)))
    self.head = nnx.Linear(width, 8, rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens)
    weights, chosen = jax.lax.top_k(jax.nn.softmax(self.router(x)), 2)
    share = jnp.sum(jax.nn.one_hot(chosen, self.router.out_features) * weights[..., None], axis=-2)
    y = nnx.gelu(jnp.einsum("btd,edh->bteh", x, self.w_in[...]))
    y = jnp.einsum("bteh,ehd,bte->btd", y, self.w_out[...], share)
    return self.head(x + y)


shows(
  "MoE", Moe, TOKENS,
  Units("hidden", "w_in", 3, {"w_in": 2, "w_out": 1}),
  Units("residual", "embed", 2, {
    "embed/embedding": 1, "router/kernel": 0, "w_in": 1, "w_out": 2, "head/kernel": 0}),
)  # fmt: skip


# ------------------------------------------------------------------------------------- recurrent


class Lstm(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(8, 4, rngs=rngs)
    self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(4, 6, rngs=rngs))
    self.head = nnx.Linear(6, 8, rngs=rngs)

  def __call__(self, tokens):
    return self.head(self.rnn(self.embed(tokens)))


shows(
  "LSTM", Lstm, TOKENS,
  Units("hidden", "embed", 2, {"embed/embedding": 1, "rnn/cell/dense_i/kernel": 0}),
  Units("residual", "rnn/cell/dense_h", 3, {
    "rnn/cell/dense_i/kernel": 1, "rnn/cell/dense_h/kernel": (0, 1), "rnn/cell/dense_h/bias": 0,
    "head/kernel": 0}, how={"blocks": 4}),
)  # fmt: skip


class Gru(nn.Module):
  features: int = 6

  @nn.compact
  def __call__(self, x):
    x = nn.RNN(nn.GRUCell(self.features), name="rnn")(x)
    return nn.Dense(2, name="head")(x[:, -1])


shows(
  "GRU", Gru(), SEQUENCES,
  Units("residual", "params/GRUCell_0/hn", 3, {
    "params/*/i[rzn]/kernel": 1, "params/*/h[rzn]/kernel": (0, 1), "params/*/i[rzn]/bias": 0,
    "params/*/hn/bias": 0, "params/head/kernel": 0}, new={"features": 9}),
)  # fmt: skip


class StackedBlock(nnx.Module):
  def __init__(self, rngs):
    self.norm = nnx.LayerNorm(6, rngs=rngs)
    self.up, self.down = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)

  def __call__(self, x):
    return x + self.down(nnx.relu(self.up(self.norm(x))))


class Scanned(nnx.Module):
  def __init__(self, rngs):
    self.stem = nnx.Linear(6, 6, rngs=rngs)
    self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(StackedBlock, in_axes=0))(rngs)
    self.head = nnx.Linear(6, 2, rngs=rngs)

  def __call__(self, x):
    scan = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return self.head(scan(self.stem(x), self.blocks))


shows(
  "scanned MLP", Scanned, ROWS,
  Units("hidden", "blocks/up", 3, {
    "blocks/up/kernel": 2, "blocks/up/bias": 1, "blocks/down/kernel": 1}),
  Units("residual", "stem", 2, {
    "stem/kernel": 1, "stem/bias": 0, "blocks/norm/scale": 1, "blocks/norm/bias": 1,
    "blocks/up/kernel": 1, "blocks/down/kernel": 2, "blocks/down/bias": 1, "head/kernel": 0}),
)  # fmt: skip


class StateSpace(nnx.Module):
  """A diagonal state space model with gates, all steps at once."""

  def __init__(self, rngs, width=6, state=4):
    self.enter = nnx.Linear(4, 2 * width, rngs=rngs)
    self.log_a = nnx.Param(jnp.log(jnp.broadcast_to(jnp.arange(1.0, state + 1), (width, state))))
    self.project = nnx.Linear(width, 2 * state, use_bias=False, rngs=rngs)
    self.step = nnx.Linear(width, width, rngs=rngs)
    self.skip = nnx.Param(jnp.ones(width))
    self.leave = nnx.Linear(width, 2, rngs=rngs)

  def __call__(self, x):
    x, gate = jnp.split(self.enter(x), 2, axis=-1)
    b, c = jnp.split(self.project(x), 2, axis=-1)
    delta = jax.nn.softplus(self.step(x))
    decay = jnp.exp(-delta[..., None] * jnp.exp(self.log_a[...]))
    drive = (delta * x)[..., None] * b[:, :, None, :]

    def joined(left, right):
      return left[0] * right[0], right[0] * left[1] + right[1]

    _, h = jax.lax.associative_scan(joined, (decay, drive), axis=1)
    y = jnp.sum(h * c[:, :, None, :], axis=-1) + self.skip * x
    return self.leave(y * jax.nn.silu(gate))


shows(
  "state space model", StateSpace, SEQUENCES,
  Units("hidden", "log_a", 2, {"log_a": 1, "project/kernel": 1}),
  Units("residual", "enter", 2, {
    "enter/kernel": 1, "enter/bias": 0, "log_a": 0, "project/kernel": 0, "step/kernel": (0, 1),
    "step/bias": 0, "skip": 0, "leave/kernel": 0}, how={"blocks": 2}),
)  # fmt: skip


# ---------------------------------------------------------------------------------------- others


class Vae(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)
    self.norm = nnx.GroupNorm(4, num_groups=2, use_fast_variance=False, rngs=rngs)
    self.mean, self.log_var = nnx.Linear(64, 3, rngs=rngs), nnx.Linear(64, 3, rngs=rngs)
    self.fc = nnx.Linear(3, 8, rngs=rngs)
    self.decoder = nnx.Linear(8, 8 * 8 * 3, rngs=rngs)
    self.noise = nnx.Rngs(noise=0)

  def __call__(self, x):
    h = nnx.silu(self.norm(self.conv(x))).reshape(x.shape[0], -1)
    mean, log_var = self.mean(h), self.log_var(h)
    z = mean + jnp.exp(0.5 * log_var) * jax.random.normal(self.noise.noise(), mean.shape)
    return self.decoder(nnx.relu(self.fc(z))).reshape(x.shape), mean, log_var


shows(
  "VAE", Vae, IMAGES,
  Units("hidden", "conv", 1, {
    "conv/kernel": 3, "conv/bias": 0, "norm/scale": 0, "norm/bias": 0, "mean/kernel": 0,
    "log_var/kernel": 0}, how={"unit": 2}),
  Units("hidden", "fc", 3, {"fc/kernel": 1, "fc/bias": 0, "decoder/kernel": 0}),
  Units("residual", "mean", 2, {  # the latent variables
    "mean/kernel": 1, "mean/bias": 0, "log_var/kernel": 1, "log_var/bias": 0, "fc/kernel": 0},
    output=True),
  merges=False,
)  # fmt: skip


class ActorCritic(nnx.Module):
  def __init__(self, rngs):
    self.body = nnx.Linear(6, 8, rngs=rngs)
    self.policy1, self.policy2 = nnx.Linear(8, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)
    self.value1, self.value2 = nnx.Linear(8, 5, rngs=rngs), nnx.Linear(5, 1, rngs=rngs)

  def features(self, x):
    return nnx.tanh(self.body(x))

  def actor(self, x):
    return jax.nn.log_softmax(self.policy2(nnx.tanh(self.policy1(self.features(x)))))

  def critic(self, x):
    return self.value2(nnx.tanh(self.value1(self.features(x))))[..., 0]

  def __call__(self, x):
    return self.actor(x), self.critic(x)


shows(
  "actor-critic", ActorCritic, ROWS,
  Units("hidden", ["policy1", "value1"], 2, {
    "policy1/kernel": 1, "policy1/bias": 0, "policy2/kernel": 0, "value1/kernel": 1,
    "value1/bias": 0, "value2/kernel": 0}),
  Units("hidden", "body", 3, {
    "body/kernel": 1, "body/bias": 0, "policy1/kernel": 0, "value1/kernel": 0}),
)  # fmt: skip


class GraphNetwork(nn.Module):
  width: int = 6
  messages: int = 5

  @nn.compact
  def __call__(self, nodes, edges, senders, receivers):
    h = nn.Dense(self.width, name="embed")(nodes)
    for i in range(2):
      pair = jnp.concatenate([h[senders], h[receivers], edges], axis=-1)
      message = nn.relu(nn.Dense(self.messages, name=f"message{i}")(pair))
      total = jax.ops.segment_sum(message, receivers, num_segments=nodes.shape[0])
      update = nn.Dense(self.width, name=f"update{i}")(jnp.concatenate([h, total], axis=-1))
      h = nn.LayerNorm(name=f"norm{i}")(h + nn.relu(update))
    return nn.Dense(2, name="head")(h)  # of every node


shows(
  "graph network", GraphNetwork(),
  (ROWS, jax.random.normal(KEY, (4, 2)), jnp.array([0, 1, 2, 2]), jnp.array([1, 2, 0, 1])),
  Units("hidden", "params/message?", 2, {
    "params/message?/kernel": 1, "params/message?/bias": 0, "params/update?/kernel": 0},
    new={"messages": 7}),
  Units("residual", "params/embed", 3, {
    "params/embed/kernel": 1, "params/embed/bias": 0, "params/message?/kernel": 0,
    "params/update?/kernel": (0, 1), "params/update?/bias": 0, "params/norm?/*": 0,
    "params/head/kernel": 0}, new={"width": 9}),
)  # fmt: skip


class HyperNetwork(nnx.Module):
  """A network that makes the weights of another."""

  def __init__(self, rngs):
    self.fc1 = nnx.Linear(4, 5, rngs=rngs)
    self.weights1, self.weights2 = nnx.Linear(5, 6 * 8, rngs=rngs), nnx.Linear(5, 8 * 2, rngs=rngs)
    self.biases = nnx.Linear(5, 8, rngs=rngs)

  def __call__(self, x, task):
    h = nnx.relu(self.fc1(task))
    first = self.weights1(h).reshape(x.shape[-1], -1)
    return nnx.relu(x @ first + self.biases(h)) @ self.weights2(h).reshape(-1, 2)


shows(
  "hypernetwork", HyperNetwork, (ROWS, jnp.arange(4.0)),
  Units("hidden", "fc1", 2, {
    "fc1/kernel": 1, "fc1/bias": 0, "weights?/kernel": 0, "biases/kernel": 0}),
  Units("hidden", "biases", 3, {  # the units of the network whose weights are made
    "biases/kernel": 1, "biases/bias": 0, "weights?/kernel": 1, "weights?/bias": 0}),
)  # fmt: skip


def table():
  """The networks and what each is grown by, as `docs/growth.md` shows it."""
  kinds = ("hidden", "residual", "heads")
  rows = [
    "| network | hidden units | residual stream, state | heads |",
    "| --- | --- | --- | --- |",
  ]
  for net in ZOO:
    cells = ["; ".join(_told(units) for units in net.units if units.kind == k) for k in kinds]
    rows.append(f"| {net.name}{', Linen' if net.is_linen else ''} | {' | '.join(cells)} |")
  return "\n".join(rows)


def _told(units):
  names = [units.producer] if isinstance(units.producer, str) else units.producer
  told = [*names, *(f"{name}={value}" for name, value in units.how.items())]
  told += [f"sizes={dict(units.sizes)}"] if units.sizes else []
  return ", ".join(f"`{x}`" for x in told)


if __name__ == "__main__":
  print(table())
