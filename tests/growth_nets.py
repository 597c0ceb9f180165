"""Networks that grow in the tests, and an oracle for the gate, written out by hand."""

import contextlib
import functools
import inspect
import platform

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from optax_cadence import growth

IMAGES = jax.random.normal(jax.random.key(5), (4, 4, 4, 1))
TOKENS = jnp.array([[1, 2, 3], [4, 5, 6]])


class Dense(nn.Module):
  hidden: int = 8
  inputs = IMAGES

  @nn.compact
  def __call__(self, x, train=False):
    x = x.reshape(len(x), -1)
    x = nn.relu(nn.Dense(self.hidden, name="one")(x))
    return nn.Dense(3, name="two")(nn.Dropout(0.5, deterministic=not train)(x))


class ResNet(nn.Module):
  """Convolutions with BatchNorm, a residual stream, GroupNorm if asked, a flatten."""

  channels: int = 8
  groups: int = 0
  kernel: int = 3
  blocks: int = 1
  inner: int = 12
  inputs = IMAGES

  @nn.compact
  def __call__(self, x, train=False):
    def norm(name):
      return nn.BatchNorm(use_running_average=not train, name=name)

    size = (self.kernel, self.kernel)
    x = nn.relu(norm("stem_norm")(nn.Conv(self.channels, size, name="stem")(x)))
    for i in range(self.blocks):
      y = nn.Conv(self.inner, (3, 3), name=f"block{i}_in")(x)
      y = nn.Conv(self.channels, (3, 3), name=f"block{i}_out")(nn.relu(norm(f"block{i}_norm")(y)))
      x = x + y
    x = nn.max_pool(x, (2, 2), (2, 2))
    if self.groups:
      # The fast variance, a difference of squares, would lose more digits than are compared.
      x = nn.GroupNorm(self.groups, use_fast_variance=False, name="group_norm")(x)
    return nn.Dense(3, name="head")(x.reshape(len(x), -1))


class Transformer(nn.Module):
  """A block of attention and one of an MLP on a residual stream, with tied embeddings."""

  width: int = 8
  heads: int = 2
  head: int = 4
  hidden: int = 16
  inputs = TOKENS

  @nn.compact
  def __call__(self, x, train=False):
    embed = nn.Embed(7, self.width, name="embed")
    x = embed(x)
    attention = nn.MultiHeadDotProductAttention(
      self.heads, qkv_features=self.heads * self.head, out_features=self.width, name="attention"
    )
    x = x + attention(nn.LayerNorm(name="norm1")(x))
    y = nn.gelu(nn.Dense(self.hidden, name="up")(nn.RMSNorm(name="norm2")(x)))
    x = x + nn.Dense(self.width, name="down")(nn.Dropout(0.2, deterministic=not train)(y))
    return embed.attend(nn.LayerNorm(name="norm3")(x))


def module_list(modules):
  return nnx.List(modules) if hasattr(nnx, "List") else modules


def put(variable, value):
  variable.set_value(value) if hasattr(variable, "set_value") else setattr(variable, "value", value)


def array(variable):
  return variable.get_value() if hasattr(variable, "get_value") else variable.value


class Mlp(nnx.Module):
  def __init__(self, rngs, hidden=8):
    self.one = nnx.Linear(16, hidden, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.two = nnx.Linear(hidden, 3, rngs=rngs)

  def __call__(self, x):
    return self.two(self.drop(nnx.relu(self.one(x.reshape(len(x), -1)))))


class NnxResNet(nnx.Module):
  def __init__(self, rngs):
    self.stem = nnx.Conv(1, 8, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.blocks = module_list([Block(8, rngs)])
    self.head = nnx.Linear(32, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.stem(x)))
    for block in self.blocks:
      x = x + block(x)
    return self.head(nnx.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1))


class Block(nnx.Module):
  def __init__(self, channels, rngs):
    self.up = nnx.Conv(channels, 12, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(12, rngs=rngs)
    self.down = nnx.Conv(12, channels, (3, 3), rngs=rngs)

  def __call__(self, x):
    return self.down(nnx.relu(self.norm(self.up(x))))


class Residual(nnx.Module):
  """A block of an MLP on a residual stream of six."""

  def __init__(self, seed):
    self.up = nnx.Linear(6, 8, rngs=nnx.Rngs(seed))
    self.down = nnx.Linear(8, 6, rngs=nnx.Rngs(seed + 1))

  def __call__(self, x):
    return x + self.down(nnx.relu(self.up(x)))


class NnxTransformer(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(7, 8, rngs=rngs)
    self.norm1 = nnx.LayerNorm(8, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
    self.norm2 = nnx.RMSNorm(8, rngs=rngs)
    self.up = nnx.Linear(8, 16, rngs=rngs)
    self.down = nnx.Linear(16, 8, rngs=rngs)

  def __call__(self, x):
    x = self.embed(x)
    x = x + self.attention(self.norm1(x))
    x = x + self.down(nnx.gelu(self.up(self.norm2(x))))
    return self.embed.attend(x)


# Old and new module, the function that grows one to the other, what it is told: every kind of
# growth by path.
LINEN = {
  "dense to dense": (
    Dense(),
    Dense(hidden=11),
    growth.linen.widen,
    {"producer": "params/one", "by": 3},
  ),
  "residual stream, BatchNorm, flatten": (
    ResNet(),
    ResNet(channels=12),
    growth.linen.widen,
    {"producer": "params/stem", "by": 4},
  ),
  "conv to conv": (
    ResNet(groups=4),
    ResNet(groups=4, channels=12),
    growth.linen.widen,
    {"producer": "params/stem", "by": 1, "blocks": 4},
  ),
  "more norm groups": (
    ResNet(groups=4),
    ResNet(groups=6, channels=12),
    growth.linen.widen,
    {"producer": "params/stem", "by": 2, "unit": 2},
  ),
  "hidden layer of an MLP": (
    Transformer(),
    Transformer(hidden=21),
    growth.linen.widen,
    {"producer": "params/up", "by": 5},
  ),
  "heads": (
    Transformer(),
    Transformer(heads=3),
    growth.linen.widen,
    {"producer": "params/attention/query", "by": 1, "axis": -2},
  ),
  "embedding width": (
    Transformer(),
    Transformer(width=13),
    growth.linen.widen,
    {"producer": "params/embed", "by": 5},
  ),
  "larger filters": (
    ResNet(),
    ResNet(kernel=5),
    growth.linen.enlarge,
    {"conv": "params/stem", "kernel_size": (5, 5)},
  ),
  "residual block": (
    ResNet(),
    ResNet(blocks=2),
    growth.linen.deepen,
    {"outgoing": ["params/block1_out"]},
  ),
}


def in_mode(apply, train):
  """`apply` in training or evaluation mode; in training, what that changes is returned too."""
  settings = {"train": True, "rngs": {"dropout": jax.random.key(3)}, "mutable": ["batch_stats"]}
  return lambda variables, x: apply(variables, x, **(settings if train else {}))


def both_modes(apply):
  """Both, as one program."""
  return lambda *args: (in_mode(apply, False)(*args), in_mode(apply, True)(*args))


def make(kind, *args, seed=0):
  """An NNX module with variables by NumPy, for the same reason as `drawn`."""
  graphdef, state = nnx.split(nnx.eval_shape(lambda: kind(*args, nnx.Rngs(0))))
  rng = np.random.default_rng(seed)

  def value(path, leaf):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.key(seed)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return jnp.zeros(leaf.shape, leaf.dtype)
    x = 0.3 * rng.normal(size=leaf.shape).astype(np.float32)
    positive = any(getattr(key, "key", None) in ("scale", "var") for key in path)
    return jnp.asarray(1 + np.abs(x) if positive else x)

  return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(value, state))


# XLA then computes what the program says: no multiplication is fused into an addition, and no
# expression is rewritten.
AS_WRITTEN = {"xla_backend_optimization_level": 0, "xla_disable_hlo_passes": "algsimp"}
if platform.machine() in ("x86_64", "AMD64"):
  AS_WRITTEN["xla_cpu_max_isa"] = "SSE4_2"


@contextlib.contextmanager
def sums_in_order():
  """Gradients are added up in the program's own order; JAX 0.6 does so on request alone."""
  before = jax.config.jax_use_direct_linearize
  jax.config.update("jax_use_direct_linearize", True)
  try:
    yield
  finally:
    jax.config.update("jax_use_direct_linearize", before)


@contextlib.contextmanager
def relaxed():
  """Promotion as JAX has it by default: Optax and Flax rely on it."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def equal(found, expected):
  """The same tree, bit for bit."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    if hasattr(a, "dtype") and jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)


def close(found, expected):
  """The same tree within 1e-6, relative to the largest entry of each leaf."""
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * float(jnp.abs(b).max()))


def alike(found, expected, within=1e-12):
  """The same tree but for rounding, relative to the largest entry of all floats.

  This is how close float64 is, in which rounding is told from every mistake; float32 is to be
  within 1e-5. A leaf may hold nothing but what rounding leaves: the gradient of a key's bias does.
  """
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
  leaves = jax.tree.leaves(expected)
  scale = max(float(jnp.abs(x).max()) for x in leaves if is_float(x))
  for a, b in zip(jax.tree.leaves(found), leaves, strict=True):
    if not is_float(b):
      equal(a, b)
      continue
    tolerance = within if b.dtype == jnp.float64 else 1e-5
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def in_float64(tree):
  """The tree with its floats in float64, where `oracle.enable_x64` has switched that on."""
  is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
  return jax.tree.map(lambda x: x.astype(jnp.float64) if is_float(x) else x, tree)


def fresh(path, shape, dtype):
  """New entries by NumPy, as `init` makes variables."""
  rng = np.random.default_rng(len("/".join(path)))
  x = 0.3 * rng.normal(size=shape).astype(np.float32)
  return jnp.asarray(1 + np.abs(x) if path[-1] in ("scale", "var") else x, dtype)


@functools.cache
def init(module, seed):
  """Variables of a Linen module."""
  return drawn(jax.eval_shape(module.init, jax.random.key(0), module.inputs), seed)


def drawn(shapes, seed):
  """Variables by NumPy: XLA takes seconds to compile random numbers."""
  rng = np.random.default_rng(seed)

  def value(path, leaf):
    x = 0.3 * rng.normal(size=leaf.shape).astype(np.float32)
    positive = path[-1].key in ("scale", "var")
    return jnp.asarray(1 + np.abs(x) if positive else x)

  return jax.tree_util.tree_map_with_path(value, shapes)


def update(optimizer, model, grads):
  """Updates a live model; Flax before 0.11 keeps it in the optimizer."""
  takes_model = "model" in inspect.signature(nnx.Optimizer.update).parameters
  optimizer.update(*((model, grads) if takes_model else (grads,)))


def opens_and_merges(model, twin, x):
  """Opens the gate of a grown NNX model, which its twin is not, and merges: the outputs stay."""
  growth.nnx.set_alpha(model, 1.0)
  expected = model(x)
  growth.merge(model)
  close(model(x), expected)
  assert jnp.abs(expected - twin(x)).max() > 1e-3


def with_alpha(variables, alpha):
  """Variables of a Linen module with the gate at another value."""
  return {**variables, "params": {**variables["params"], "alpha": jnp.float32(alpha)}}
