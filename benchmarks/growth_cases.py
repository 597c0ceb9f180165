"""Cases about growth: the search for what grows together, and what a step behind a gate costs.

The network is a transformer of 48 layers whose residual stream gets an eighth more entries, so that
every layer of it changes; or one hidden layer in its middle. How cases are timed is in `measure`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks import builds
from benchmarks import cases
from benchmarks import floors
from benchmarks import peers
from benchmarks import variants
from benchmarks.sizes import Sizes
from benchmarks.targets import Target
from optax_cadence import growth

HEADS, VOCABULARY, LENGTH = 4, 64, 16
STREAM, HIDDEN = "gated, residual stream", "gated, one hidden layer"
LEARNED = "gated, residual stream, gate learned"
PLAIN = "plain, at the new size"
SCHEDULE = optax.linear_schedule(0.0, 1.0, 100)


def all_cases(sizes: Sizes) -> dict[str, Callable[[], Any]]:
  """For each case a function that builds it."""
  shape = sizes.grown_layers, sizes.grown_width
  return {
    "growth-search": functools.partial(search, *shape),
    "growth-trace": functools.partial(building, "trace", *shape),
    "growth-compile": functools.partial(building, "compile", *shape),
    "growth-step": functools.partial(step, *shape, sizes.grown_tokens),
  }


class Block(nnx.Module):
  """Attention and an MLP on a residual stream."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    self.norm1 = nnx.LayerNorm(width, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(HEADS, width, decode=False, rngs=rngs)
    self.norm2 = nnx.LayerNorm(width, rngs=rngs)
    self.up = nnx.Linear(width, 4 * width, rngs=rngs)
    self.down = nnx.Linear(4 * width, width, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x + self.attention(self.norm1(x))
    return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
  """Logits [batch, positions, vocabulary] of tokens."""

  def __init__(self, layers: int, width: int, rngs: nnx.Rngs):
    self.embed = nnx.Embed(VOCABULARY, width, rngs=rngs)
    blocks = [Block(width, rngs) for _ in range(layers)]
    self.blocks = nnx.List(blocks) if hasattr(nnx, "List") else blocks  # Flax 0.12
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.head = nnx.Linear(width, VOCABULARY, rngs=rngs)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    x = self.embed(tokens)
    for block in self.blocks:
      x = block(x)
    return self.head(self.norm(x))


def model_of(layers: int, width: int) -> Transformer:
  """The network, with weights that are quicker to make than random ones."""
  graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(layers, width, nnx.Rngs(0))))
  waves = variants.waves(shapes_of(state), 0.0)
  return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(waves)))


def shapes_of(tree: Any) -> Any:
  """The shapes of a tree of arrays, as lists of the leaves are enough for `variants.waves`."""
  return [x.shape for x in jax.tree.leaves(tree)]


def forward(model: Transformer) -> Callable[..., Any]:
  """The forward pass as a function of the variables."""
  run = growth.nnx.forward(model)
  return lambda params, tokens: run(params, tokens)[0]


class Grown(NamedTuple):
  """A network that has grown by an eighth of its units.

  Attributes:
    gated: Its forward pass behind the gate.
    gated_params: The shapes of its parameters, gate included.
    plain: Its forward pass without.
    plain_params: The shapes of its parameters.
  """

  gated: Callable[..., Any]
  gated_params: Any
  plain: Callable[..., Any]
  plain_params: Any


@functools.cache
def grown(layers: int, width: int, hidden: bool) -> Grown:
  """The network with more units in the hidden layer of its middle, or in its residual stream."""
  model = model_of(layers, width)
  larger = nnx.clone(model)
  producer = larger.blocks[layers // 2].up if hidden else larger.embed
  more = (4 * width if hidden else width) // 8
  plan = growth.widen(larger, tokens_of(2), producer=producer, by=more, alpha=1.0)
  growth.merge(larger)
  params = jax.eval_shape(lambda: growth.nnx.variables(larger))
  old, new = forward(model), forward(larger)
  alpha = {"alpha": jax.ShapeDtypeStruct((), jnp.float32)}
  return Grown(growth.gated(new, plan, old=old), params | alpha, new, params)


def tokens_of(batch: int) -> Any:
  """The shape of the inputs."""
  return jax.ShapeDtypeStruct((batch, LENGTH), jnp.int32)


def stepper(fn: Callable[..., Any], tx: optax.GradientTransformation) -> Callable[..., Any]:
  """A step on tokens, which stand where other cases have gradients."""

  def one_step(params: Any, state: Any, tokens: jax.Array) -> Any:
    grads = jax.grad(lambda params: (fn(params, tokens) ** 2).mean())(params)
    return peers.stepper(tx)(params, state, grads)

  return one_step


class Network(NamedTuple):
  """One of the networks that a step is made of.

  Attributes:
    name: What it is called.
    role: "ours" or "peer".
    fn: Its forward pass.
    params: The shapes of its parameters.
    tx: The optimizer.
  """

  name: str
  role: str
  fn: Callable[..., Any]
  params: Any
  tx: optax.GradientTransformation


def networks(layers: int, width: int) -> list[Network]:
  """The grown networks with their gates, set by a schedule or learned, and without."""
  stream, hidden = (grown(layers, width, which) for which in (False, True))
  scheduled, learned = growth.phase_in(SCHEDULE, peers.adamw()), peers.adamw()
  return [
    Network(STREAM, "ours", stream.gated, stream.gated_params, scheduled),
    Network(HIDDEN, "ours", hidden.gated, hidden.gated_params, scheduled),
    Network(LEARNED, "ours", stream.gated, stream.gated_params, learned),
    Network(PLAIN, "peer", stream.plain, stream.plain_params, peers.adamw()),
  ]


def search(layers: int, width: int) -> builds.BuildCase:
  """The search for all that grows with the residual stream, and the growth of a live model."""

  def couple() -> Any:
    model = model_of(layers, width)
    return lambda: growth.nnx.couple(model, tokens_of(2), producer=model.embed).size, ()

  def widen() -> Any:
    model = model_of(layers, width)
    tx = growth.phase_in(SCHEDULE, optax.adamw(1e-3))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def whole() -> Any:
      rngs, more = nnx.Rngs(0), width // 8
      growth.widen(
        model, tokens_of(2), producer=model.embed, by=more, rngs=rngs, optimizer=optimizer
      )
      return jax.tree.leaves(nnx.state(model))[0]

    return whole, ()

  def trace() -> Any:
    model = model_of(layers, width)
    fn, params = forward(model), growth.nnx.variables(model)
    return lambda: jax.make_jaxpr(fn)(params, tokens_of(2)).out_avals[0].size, ()

  return builds.BuildCase(
    "growth-search",
    f"growth of the residual stream of {layers} layers",
    "call",
    [
      builds.BuildVariant("search", "ours", couple),
      builds.BuildVariant("widen", "ours", widen),
      builds.BuildVariant("tracing the network", "peer", trace),
    ],
    [Target("search", "seconds", 5.0), Target("widen", "seconds", 10.0)],
    "search",
    "tracing the network",
  )


def building(stage: str, layers: int, width: int) -> builds.BuildCase:
  """Tracing or compiling a step behind a gate, beside that of the grown network without one."""

  def program(network: Network) -> Any:
    arguments = network.params, jax.eval_shape(network.tx.init, network.params), tokens_of(2)
    return stepper(network.fn, network.tx), arguments

  return builds.BuildCase(
    f"growth-{stage}",
    f"{'tracing' if stage == 'trace' else 'compilation of'} a step, {layers} layers",
    stage,
    [
      builds.BuildVariant(network.name, network.role, functools.partial(program, network))
      for network in networks(layers, width)
    ],
    [Target(STREAM, PLAIN, 1.5), Target(HIDDEN, PLAIN, 1.5)] if stage == "compile" else [],
    STREAM,
    PLAIN,
  )


def step(layers: int, width: int, tokens: int) -> cases.Case:
  """A step behind a gate, beside that of the grown network without one."""

  def variant(network: Network) -> variants.Variant:
    shapes = jax.tree.map(lambda x: x.shape, network.params)
    inputs = variants.Inputs(
      lambda: variants.waves(shapes, 0.0),
      lambda: jnp.arange(tokens, dtype=jnp.int32).reshape(-1, LENGTH) % VOCABULARY,
    )
    floor = sum(x.size for x in jax.tree.leaves(network.params)) * floors.every_micro_step()
    init, program = variants.init_of(network.tx), stepper(network.fn, network.tx)
    return variants.Variant(network.name, network.role, inputs, init, (program,), floor)

  compared = networks(layers, width)
  sizes = [x.size for x in jax.tree.leaves(compared[-1].params)]
  return cases.Case(
    "growth-step",
    f"a step of {tokens} tokens, {layers} layers, {cases.human(sum(sizes)).upper()} parameters",
    [variant(network) for network in compared],
    [Target(STREAM, PLAIN, 1.25), Target(HIDDEN, PLAIN, 1.25)],
    STREAM,
    PLAIN,
    sum(sizes),
    4 * max(sizes),
  )
