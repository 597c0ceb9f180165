"""What growth costs, counted in operations: no time is asserted."""

import collections
import itertools

import growth_nets as nets
import jax
import jax.numpy as jnp

from optax_cadence import growth
from optax_cadence.growth import _couple
from optax_cadence.growth import _graph
from optax_cadence.programs import reading

LAYERS = 48
STREAM = {
  "embed": jnp.ones((4, 8)),
  "blocks": [{"up": jnp.ones((8, 6)), "down": jnp.ones((6, 8))} for _ in range(LAYERS)],
  "head": jnp.ones((8, 2)),
}
X = jnp.ones((3, 4))


def stream(params, x):
  x = x @ params["embed"]
  for block in params["blocks"]:
    x = x + jnp.tanh(x @ block["up"]) @ block["down"]
  return x @ params["head"]


def looked_at(monkeypatch, producer):
  """How often the search looks at an operation, over the number of operations."""
  times = itertools.count()
  spread = _couple._spread_along

  def counting(link):
    next(times)
    return spread(link)

  with monkeypatch.context() as patch:
    patch.setattr(_couple, "_spread_along", counting)
    units = growth.couple(stream, STREAM, X, producer=producer)
  return units, next(times) / len(_graph.read(stream, STREAM, X).operations)


def test_the_search_goes_through_a_deep_stream_a_few_times(monkeypatch):
  units, share = looked_at(monkeypatch, "embed")
  assert len(units.members) == 2 + 2 * LAYERS
  assert share < 5


def test_the_search_for_one_hidden_layer_looks_at_its_neighbours_alone(monkeypatch):
  units, share = looked_at(monkeypatch, f"blocks/{LAYERS // 2}/up")
  assert len(units.members) == 2
  assert share < 0.1


def test_all_hidden_layers_are_found_in_one_trace():
  traces = []

  def traced(params, x):
    traces.append(1)
    return stream(params, x)

  found = growth.hidden(traced, STREAM, X)
  assert len(found.layers) == LAYERS and len(traces) == 1


def operations(fn, *args):
  """How often each primitive is in a program."""
  counts = collections.Counter()

  def count(program):
    for eqn in reading.opened(program)[0].eqns:
      counts[eqn.primitive.name] += 1
      for body in reading.bodies(eqn):
        count(body)

  count(jax.make_jaxpr(fn)(*args))
  return counts


def test_several_readers_of_new_units_share_the_gate_and_gradients_are_not_padded():
  def net(params, x):
    x = x @ params["in"]
    return sum((x @ params[name]).sum() for name in "abc")

  params = {"in": jnp.ones((4, 8))} | {name: jnp.ones((8, 6)) for name in "abc"}
  plan = growth.widening(params, growth.couple(net, params, X, producer="in"), by=2)
  grown = plan.apply(params, nets.fresh)
  counts = operations(growth.gated(net, plan), grown, X)
  assert counts["dot_general"] == 4 and counts["mul"] == 1
  counts = operations(jax.grad(growth.gated(net, plan)), grown, X)
  assert counts["pad"] == 0


def test_a_gate_adds_no_products_and_few_other_operations_to_a_layer():
  def net(params, x):
    x = x @ params["embed"]
    for block in params["blocks"]:
      y = x - x.mean(-1, keepdims=True)
      y = y * jax.lax.rsqrt((y**2).mean(-1, keepdims=True) + 1e-5)
      x = x + jnp.tanh(y @ block["up"]) @ block["down"]
    return (x @ params["head"]).sum()

  def of(layers):
    """Operations of the gradient behind the gate, without the gate's own, and without a gate."""
    params = STREAM | {"blocks": STREAM["blocks"][:layers]}
    plan = growth.widening(params, growth.couple(net, params, X, producer="embed"), by=2)
    grown = plan.apply(params, nets.fresh)
    gated, plain = growth.gated(net, plan), {name: grown[name] for name in params}
    scheduled = lambda params, x: gated({**params, "alpha": jax.lax.stop_gradient(alpha)}, x)
    alpha = grown["alpha"]
    pairs = (gated, grown), (scheduled, plain), (net, plain)
    return [operations(jax.grad(fn), params, X) for fn, params in pairs]

  found = [more - few for few, more in zip(of(1), of(3), strict=True)]
  assert len({counts["dot_general"] for counts in found}) == 1 and found[-1]["dot_general"] == 12
  assert not any(counts[name] for counts in found for name in ("split", "concatenate", "pad"))
  learned, scheduled, plain = (counts.total() for counts in found)
  assert plain < scheduled < 1.3 * plain < learned < 1.7 * plain


def test_what_no_unit_is_read_in_is_run_as_it_is():
  @jax.jit
  def outside(x):
    return jnp.tanh(x) * 2

  def net(params, x):
    return outside(jax.nn.relu(outside(x) @ params["in"]) @ params["out"])

  params = {"in": jnp.ones((4, 8)), "out": jnp.ones((8, 2))}
  forward, _ = growth.recycle(net, params, X)
  plain, found = operations(net, params, X), operations(forward, params, X)
  assert found["jit"] + found["pjit"] == plain["jit"] + plain["pjit"] > 2
  assert found["dot_general"] == plain["dot_general"] == 2
