"""Heads of attention layers of every make: more of them, more queries of a group, larger ones."""

import dataclasses
import inspect

import growth_nets as nets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from flax import linen as nn
from flax import nnx
from growth_nets import close

from optax_cadence import growth

pytestmark = pytest.mark.ci

X = jax.random.normal(jax.random.key(0), (2, 5, 6))


def softmax_attention(q, k, v, bias=None):
  """Queries, keys and values [batch, position, head, entry]."""
  scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
  if bias is not None:
    scores = scores + bias[None]
  return jnp.einsum("bhts,bshd->bthd", nnx.softmax(scores), v)


def turned(x, angles, neighbours=False):
  """Rotary positions: pairs of entries, one of each half or neighbours, turned by angles."""
  if neighbours:
    a, b = x.reshape(*x.shape[:-1], -1, 2)[..., 0], x.reshape(*x.shape[:-1], -1, 2)[..., 1]
  else:
    a, b = jnp.split(x, 2, -1)
  cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
  parts = a * cos - b * sin, b * cos + a * sin
  if neighbours:
    return jnp.stack(parts, -1).reshape(x.shape)
  return jnp.concatenate(parts, -1)


class Fused(nnx.Module):
  """One matrix for queries, keys and values, which lie in it in one of several orders."""

  order = "three of all heads"

  def __init__(self, rngs):
    self.num_heads, self.head_dim = 2, 4
    self.qkv = nnx.Linear(6, 24, rngs=rngs)
    self.out = nnx.Linear(8, 6, rngs=rngs)

  def __call__(self, x):
    y, h, d = self.qkv(x), self.num_heads, self.head_dim
    if self.order == "three of all heads":
      q, k, v = (a.reshape(*x.shape[:-1], h, d) for a in jnp.split(y, 3, -1))
    elif self.order == "three axes":
      q, k, v = (y.reshape(*x.shape[:-1], 3, h, d)[..., i, :, :] for i in range(3))
    elif self.order == "three of each head":
      q, k, v = (y.reshape(*x.shape[:-1], h, 3, d)[..., i, :] for i in range(3))
    else:
      q, k, v = jnp.split(y.reshape(*x.shape[:-1], h, 3 * d), 3, -1)
    return self.out(softmax_attention(q, k, v).reshape(*x.shape[:-1], h * d))


class FusedAxes(Fused):
  order = "three axes"


class FusedHeads(Fused):
  order = "three of each head"


class FusedSplit(Fused):
  order = "three in a head"


class Grouped(nnx.Module):
  """Two keys, each of which serves two queries: by an axis of groups, or repeated."""

  repeats = False

  def __init__(self, rngs):
    self.n_heads, self.n_kv_heads, self.head_dim = 4, 2, 3
    self.wq = nnx.Linear(6, 12, use_bias=False, rngs=rngs)
    self.wk = nnx.Linear(6, 6, use_bias=False, rngs=rngs)
    self.wv = nnx.Linear(6, 6, use_bias=False, rngs=rngs)
    self.wo = nnx.Linear(12, 6, use_bias=False, rngs=rngs)

  def __call__(self, x):
    b, t, _ = x.shape
    n, d = self.n_kv_heads, self.head_dim
    q = self.wq(x).reshape(b, t, self.n_heads, d)
    k, v = self.wk(x).reshape(b, t, n, d), self.wv(x).reshape(b, t, n, d)
    if self.repeats:
      k, v = (jnp.repeat(a, self.n_heads // n, 2) for a in (k, v))
      y = softmax_attention(q, k, v)
    else:
      q = q.reshape(b, t, n, self.n_heads // n, d)
      scores = jnp.einsum("btkgd,bskd->bkgts", q, k) / np.sqrt(d)
      y = jnp.einsum("bkgts,bskd->btkgd", nnx.softmax(scores), v)
    return self.wo(y.reshape(b, t, -1))


class Repeated(Grouped):
  repeats = True


class Rotary(nnx.Module):
  """Rotary positions, whose frequencies are computed for the size or kept as a variable."""

  neighbours = False
  kept = False
  numbers = staticmethod(jnp.arange)

  def __init__(self, rngs):
    self.num_heads, self.head_dim = 2, 4
    self.q = nnx.Linear(6, 8, rngs=rngs)
    self.k = nnx.Linear(6, 8, rngs=rngs)
    self.v = nnx.Linear(6, 8, rngs=rngs)
    self.out = nnx.Linear(8, 6, rngs=rngs)
    if self.kept:
      self.frequencies = nnx.Variable(0.1 ** jnp.arange(2.0))

  def __call__(self, x):
    b, t, _ = x.shape
    q, k, v = (f(x).reshape(b, t, self.num_heads, self.head_dim) for f in (self.q, self.k, self.v))
    if self.kept:
      frequencies = nets.array(self.frequencies)
    else:
      powers = self.numbers(self.head_dim // 2).astype(np.float32) * 2 / self.head_dim
      frequencies = jnp.asarray(100.0**-powers)
    angles = jnp.arange(float(t))[:, None] * frequencies[None]
    q, k = turned(q, angles, self.neighbours), turned(k, angles, self.neighbours)
    return self.out(softmax_attention(q, k, v).reshape(b, t, -1))


class RotaryConstant(Rotary):
  numbers = staticmethod(np.arange)


class Neighbours(Rotary):
  neighbours = True


class RotaryKept(Rotary):
  kept = True


class NeighboursKept(Neighbours):
  kept = True


class Relative(nnx.Module):
  """Relative positions: a number for each head (T5), and a vector of every distance (Shaw)."""

  def __init__(self, rngs):
    self.attention = nnx.MultiHeadAttention(2, 6, qkv_features=8, decode=False, rngs=rngs)
    self.table = nnx.Embed(9, 2, rngs=rngs)
    self.distances = nnx.Embed(9, 4, rngs=rngs)

  def __call__(self, x):
    t = x.shape[1]
    at = jnp.arange(t)[:, None] - jnp.arange(t)[None] + 4
    m = self.attention
    q, k, v = m.query(x), m.key(x), m.value(x)
    bias = jnp.moveaxis(self.table(at), -1, 0)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) + bias[None]
    scores = scores + jnp.einsum("bthd,tsd->bhts", q, self.distances(at))
    y = jnp.einsum("bhts,bshd->bthd", nnx.softmax(scores / np.sqrt(4.0)), v)
    return m.out(y)


class Flax(nnx.MultiHeadAttention):
  def __init__(self, rngs):
    super().__init__(2, 6, qkv_features=8, decode=False, rngs=rngs)


class Normed(nnx.MultiHeadAttention):
  def __init__(self, rngs):
    super().__init__(2, 6, qkv_features=8, decode=False, normalize_qk=True, rngs=rngs)


class FlaxGroups(nnx.MultiHeadAttention):
  def __init__(self, rngs):
    super().__init__(4, 6, num_kv_heads=2, qkv_features=8, decode=False, rngs=rngs)


class Net(nnx.Module):
  """Two layers, of which the second grows."""

  def __init__(self, kind, rngs):
    self.first, self.attn = kind(rngs), kind(rngs)

  def __call__(self, x):
    x = x + self.first(x)
    return x + self.attn(x)


# The layer, what is added to it, how much, and what its attributes are then.
GROWTHS = {
  "Flax, heads": (Flax, "heads", 2, {"num_heads": 4, "qkv_features": 16}),
  "Flax, size": (Flax, "size", 3, {"head_dim": 7, "qkv_features": 14}),
  "groups of Flax, heads": (FlaxGroups, "heads", 1, {"num_heads": 6, "num_kv_heads": 3}),
  "groups of Flax, queries": (FlaxGroups, "queries", 1, {"num_heads": 6, "num_kv_heads": 2}),
  "groups of Flax, size": (FlaxGroups, "size", 1, {"num_heads": 4, "head_dim": 3}),
  "queries and keys normed, heads": (Normed, "heads", 1, {"num_heads": 3}),
  "three of all heads, heads": (Fused, "heads", 2, {"num_heads": 4, "head_dim": 4}),
  "three of all heads, size": (Fused, "size", 2, {"num_heads": 2, "head_dim": 6}),
  "three axes, heads": (FusedAxes, "heads", 1, {"num_heads": 3}),
  "three axes, size": (FusedAxes, "size", 1, {"head_dim": 5}),
  "three of each head, heads": (FusedHeads, "heads", 1, {"num_heads": 3}),
  "three of each head, size": (FusedHeads, "size", 1, {"head_dim": 5}),
  "three in a head, heads": (FusedSplit, "heads", 1, {"num_heads": 3}),
  "three in a head, size": (FusedSplit, "size", 1, {"head_dim": 5}),
  "groups, keys with their queries": (Grouped, "heads", 1, {"n_heads": 6, "n_kv_heads": 3}),
  "groups, queries": (Grouped, "queries", 1, {"n_heads": 6, "n_kv_heads": 2}),
  "groups, size": (Grouped, "size", 1, {"n_heads": 4, "head_dim": 4}),
  "repeated keys, with their queries": (Repeated, "heads", 1, {"n_heads": 6, "n_kv_heads": 3}),
  "repeated keys, queries": (Repeated, "queries", 1, {"n_heads": 6, "n_kv_heads": 2}),
  "rotary, heads": (Rotary, "heads", 1, {"num_heads": 3, "head_dim": 4}),
  "rotary neighbours, heads": (Neighbours, "heads", 1, {"num_heads": 3}),
  "rotary, size": (Rotary, "size", 2, {"head_dim": 6}),
  "rotary neighbours, size": (Neighbours, "size", 2, {"head_dim": 6}),
  "rotary with frequencies kept, size": (RotaryKept, "size", 2, {"head_dim": 6}),
  "neighbours with frequencies kept, size": (NeighboursKept, "size", 2, {"head_dim": 6}),
  "relative positions, heads": (Relative, "heads", 1, {}),
  "relative positions, size": (Relative, "size", 2, {}),
}


if "num_kv_heads" not in inspect.signature(nnx.MultiHeadAttention.__init__).parameters:
  GROWTHS = {kind: how for kind, how in GROWTHS.items() if how[0] is not FlaxGroups}
# What tells most; the rest is for CI.
FIRST = {
  "Flax, heads",
  "three of all heads, size",
  "three in a head, heads",
  "groups, queries",
  "repeated keys, with their queries",
  "rotary with frequencies kept, size",
  "relative positions, heads",
}


def fresh(path, shape, dtype):
  return nets.fresh(path, shape, dtype)


@pytest.mark.parametrize(
  "kind", [pytest.param(kind, marks=[pytest.mark.ci] * (kind not in FIRST)) for kind in GROWTHS]
)
def test_heads_grow(kind):
  layer, of, by, attributes = GROWTHS[kind]
  model, twin = nets.make(Net, layer), nets.make(Net, layer)
  before = growth.nnx.variables(model)
  with nets.relaxed():
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    state = jax.tree.leaves(optimizer.opt_state)
    plan = growth.heads(model, X, attn=model.attn, by=by, of=of, fresh=fresh, optimizer=optimizer)
    assert all(change.path[0] == "attn" for change in plan.changes)
    expected = twin(X)
    close(model(X), expected)
    assert {name: getattr(model.attn, name) for name in attributes} == attributes
    shapes = {path: x.shape for path, x in leaves(nnx.state(model, nnx.Param))}
    moments = {path: x.shape for path, x in leaves(optimizer.opt_state[0].mu)}
    assert shapes == moments
    growth.nnx.set_alpha(model, 0.3)
    growth.undo(model, optimizer=optimizer)
    nets.equal(growth.nnx.variables(model), before)
    nets.equal(jax.tree.leaves(optimizer.opt_state), state)
    nets.equal(model(X), expected)
    growth.heads(model, X, attn=model.attn, by=by, of=of, fresh=fresh)
    nets.opens_and_merges(model, twin, X)


def leaves(tree):
  return [
    ("/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path if hasattr(k, "key")), x)
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
  ]


class Linen(nn.Module):
  heads: int = 2
  size: int = 4

  @nn.compact
  def __call__(self, x):
    return x + nn.MultiHeadDotProductAttention(
      self.heads, qkv_features=self.heads * self.size, out_features=6, name="attn"
    )(x)


@pytest.mark.parametrize(("of", "new"), [("heads", Linen(heads=3)), ("size", Linen(size=5))])
def test_heads_of_linen_grow(of, new):
  old = Linen()
  variables = old.init(jax.random.key(0), X)
  grown, forward, plan = growth.linen.heads(
    old, new, variables, X, attn="params/attn", by=1, of=of, rngs=jax.random.key(1)
  )
  close(forward(grown, X), old.apply(variables, X))
  grown["params"]["alpha"] = jnp.float32(1)
  close(new.apply(growth.merge(grown, plan), X), forward(grown, X))
  nets.equal(growth.undo(grown, plan), variables)


class Nameless(nnx.Module):
  """Its number of heads is in an attribute whose name does not say so."""

  def __init__(self, rngs):
    self.m = 2
    self.q = nnx.Linear(6, 8, rngs=rngs)
    self.k = nnx.Linear(6, 8, rngs=rngs)
    self.out = nnx.Linear(8, 6, rngs=rngs)

  def __call__(self, x):
    q, k = (f(x).reshape(*x.shape[:-1], self.m, -1) for f in (self.q, self.k))
    return self.out(softmax_attention(q, k, k).reshape(*x.shape[:-1], -1))


def test_attributes_with_other_names_are_named():
  model, twin = nets.make(Net, Nameless), nets.make(Net, Nameless)
  with pytest.raises(ValueError, match=r"Nameless holds 'm', 2: .* pass sizes=\{'m': 3\}"):
    growth.heads(model, X, attn=model.attn, by=1, fresh=fresh)
  growth.heads(model, X, attn=model.attn, by=1, fresh=fresh, sizes={"attn/m": 3})
  close(model(X), twin(X))
  nets.opens_and_merges(model, twin, X)


@pytest.mark.parametrize(
  ("kind", "arguments", "message"),
  [
    (RotaryConstant, {"of": "size", "by": 2}, r"as its size: a constant of shape \(2,\) has"),
    (Flax, {"of": "queries", "by": 1}, "have no axis that can grow as its queries"),
    (RotaryKept, {"of": "size", "by": 1}, "a positive integer that 2 divides, found 1"),
    (Flax, {"of": "width", "by": 1}, "of: expected one of 'heads', 'queries', 'size'"),
    (Flax, {"by": 0}, "by: expected a positive integer, found 0"),
  ],
)
def test_errors(kind, arguments, message):
  model = nets.make(Net, kind)
  before = growth.nnx.variables(model)
  with nets.relaxed(), pytest.raises(ValueError, match=message):
    growth.heads(model, X, attn=model.attn, **arguments)
  nets.equal(growth.nnx.variables(model), before)


@pytest.mark.parametrize("how", ["list", "glob"])
def test_all_layers_at_once(how):
  model, twin = nets.make(Net, Grouped), nets.make(Net, Grouped)
  attn = [model.first, "attn"] if how == "list" else "[fa]*t*"
  plan = growth.heads(model, X, attn=attn, by=1, fresh=fresh)
  assert len(plan.dimensions) == 2
  assert (model.first.n_heads, model.attn.n_heads, model.attn.n_kv_heads) == (6, 6, 3)
  close(model(X), twin(X))
  nets.opens_and_merges(model, twin, X)


@dataclasses.dataclass(frozen=True)
class Config:
  heads: int


class OfConfig(nnx.Module):
  """Its number of heads is in a config that the forward pass reads."""

  def __init__(self, rngs):
    self.config = Config(2)
    self.q = nnx.Linear(6, 8, rngs=rngs)
    self.k = nnx.Linear(6, 8, rngs=rngs)
    self.out = nnx.Linear(8, 6, rngs=rngs)

  def __call__(self, x):
    q, k = (f(x).reshape(*x.shape[:-1], self.config.heads, -1) for f in (self.q, self.k))
    return self.out(softmax_attention(q, k, k).reshape(*x.shape[:-1], -1))


def test_a_config_follows_and_goes_back():
  model, twin = nets.make(Net, OfConfig), nets.make(Net, OfConfig)
  with pytest.raises(ValueError, match="does not run at its new size"):
    growth.heads(model, X, attn=model.attn, by=1, fresh=fresh)
  sizes = {"attn/config": Config(3)}
  growth.heads(model, X, attn=model.attn, by=1, fresh=fresh, sizes=sizes)
  close(model(X), twin(X))
  assert model.attn.config == Config(3)
  growth.undo(model)
  assert model.attn.config == model.first.config == Config(2)
  growth.heads(model, X, attn=model.attn, by=1, fresh=fresh, sizes=sizes)
  nets.opens_and_merges(model, twin, X)


def test_heads_of_stacked_layers_grow():
  class Stacked(nnx.Module):
    def __init__(self, rngs):
      self.layers = nnx.split_rngs(splits=3)(nnx.vmap(Fused, in_axes=0))(rngs)

    def __call__(self, x):
      scan = nnx.scan(lambda x, m: x + m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
      return scan(x, self.layers)

  model, twin = nets.make(Stacked), nets.make(Stacked)
  growth.heads(model, X, attn=model.layers, by=1, fresh=fresh)
  assert model.layers.qkv.kernel.shape == (3, 6, 36)
  assert model.layers.num_heads == 3
  close(model(X), twin(X))
  nets.opens_and_merges(model, twin, X)


def test_what_is_no_attention_layer():
  model = nets.make(nets.Mlp)
  with pytest.raises(ValueError, match=r"attn 'one': expected a product of queries with keys"):
    growth.heads(model, nets.IMAGES, attn=model.one, by=1)
  with pytest.raises(ValueError, match="expected inputs of the forward pass"):
    growth.heads(model, attn=model.one, by=1)


# The attention layers of the networks in `zoo.py`, and which members their heads have.
OF_ZOO = {
  "ViT": ("blocks/0/attention", {"query", "key", "value", "out"}),
  "BERT": ("params/attention1", {"query", "key", "value", "out"}),
  "GPT": ("blocks/1", {"qkv", "proj"}),
  "Llama": ("layers/0/attention", {"q", "k", "v", "o"}),
  "T5": ("params/decoder_cross", {"q", "k", "v", "o"}),
}


@pytest.mark.ci
@pytest.mark.parametrize("name", list(OF_ZOO))
def test_heads_of_the_zoo_are_found(name):
  net = next(net for net in zoo.ZOO if net.name == name)
  attn, layers = OF_ZOO[name]
  with nets.relaxed():
    if net.is_linen:
      fn = net.make.apply
      variables = jax.eval_shape(lambda: net.make.init(jax.random.key(0), *net.inputs))
    else:
      model = nets.make(net.make)
      fn, variables = growth.nnx.forward(model), growth.nnx.variables(model)
    found = growth.couple_heads(fn, variables, *net.inputs, attn=attn)
  paths = {"/".join(member.path) for member in found.members}
  assert found.size == 2
  assert {path.split("/")[-2] for path in paths if path.startswith(attn)} == layers
