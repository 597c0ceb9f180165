"""What is laid out over devices stays so when it grows, is merged, and shrinks."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.ci

PROGRAM = r"""
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from optax_cadence import growth

kind = AxisType[sys.argv[1]]
mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
use_mesh = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh
specs = {"a": P(None, "d"), "b": P("d"), "c": P("d", None), "stem": P("d", None)}
if kind == AxisType.Explicit:  # sums over an axis that is laid out would have to say what they give
  specs |= {"c": P(), "stem": P()}
shapes = {"stem": (4, 4), "a": (4, 6), "b": (6,), "c": (6, 4)}


def layout(tree):
  found = {name: x.sharding.spec for name, x in tree.items()}
  for name, spec in specs.items():
    axes = tuple(found[name]) + (None,) * (len(shapes[name]) - len(found[name]))
    assert axes == tuple(spec) + (None,) * (len(shapes[name]) - len(spec)), (name, found)


def fn(p, x):
  x = jnp.tanh(x @ p["stem"].T)
  return jax.nn.relu(x @ p["a"] + p["b"][None]) @ p["c"]


def main():
  x = jax.device_put(jnp.ones((3, 4)), NamedSharding(mesh, P()))
  params = {
    name: jax.device_put(
      jax.random.normal(jax.random.key(i), shape), NamedSharding(mesh, specs[name])
    )
    for i, (name, shape) in enumerate(shapes.items())
  }
  tx = optax.adam(1e-2)
  grads = jax.jit(jax.grad(lambda p: (fn(p, x) ** 2).mean()))(params)
  state = tx.update(grads, tx.init(params), params)[1]
  units = growth.couple(fn, params, x, producer="a")
  plan = growth.widening(params, units, by=2)
  fresh = lambda path, shape, dtype: np.full(shape, 0.5, dtype)
  grown = plan.apply(params, fresh)
  layout(grown)
  gated = growth.gated(fn, plan)
  np.testing.assert_allclose(
    jax.jit(gated)(grown, x), jax.jit(fn)(params, x), rtol=1e-5, atol=1e-6
  )
  grown_state = growth.grow_state(tx, state, params, grown, plan)
  layout(grown_state[0].mu)
  np.testing.assert_array_equal(np.asarray(grown_state[0].mu["a"])[:, :6], state[0].mu["a"])
  layout(growth.merge({**grown, "alpha": jnp.float32(0.5)}, plan))
  small = plan.inverse().apply({n: v for n, v in grown.items() if n != "alpha"})
  layout(small)
  for name in small:
    np.testing.assert_array_equal(small[name], params[name])
  layout(growth.grow_state(tx, grown_state, growth.merge(
    {**grown, "alpha": jnp.float32(1)}, plan), small, plan.inverse())[0].mu)
  try:
    growth.widening(params, units, by=1).apply(params, fresh)
  except ValueError as error:
    print("says", error)


with use_mesh(mesh):
  main()
"""


LAYERS = r"""
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from optax_cadence import growth

mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType[sys.argv[1]],))
use_mesh = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh
shapes = {"embed": (6, 4), "up": (3, 4, 6), "down": (3, 6, 4)}
specs = {"embed": P("d"), "up": P(None, None, "d"), "down": P()}


def laid_out(tree, specs):
  for name, x in tree.items():
    found = tuple(x.sharding.spec) + (None,) * (x.ndim - len(x.sharding.spec))
    assert found == tuple(specs[name]) + (None,) * (x.ndim - len(specs[name])), (name, found)


def main():
  params = {
    name: jax.device_put(np.random.rand(*shape), NamedSharding(mesh, specs[name]))
    for name, shape in shapes.items()
  }
  tx = optax.adam(1e-2)
  state = tx.update(params, tx.init(params), params)[1]
  params = {"embed": params["embed"], "mlp": {"up": params["up"], "down": params["down"]}}
  state = tx.update(params, tx.init(params), params)[1]
  expert = {name: P(None, *spec) for name, spec in specs.items()}
  for plan, inner in [
    (growth.stacking(params, "mlp", times=2), specs),
    (growth.adding_tokens(params, 2, embed="embed"), specs),
    (growth.upcycling(params, "mlp", experts=2, features=4), expert),
  ]:
    fresh = lambda path, shape, dtype: np.zeros(shape, dtype)
    grown = plan.apply(params, fresh)
    found = growth.grow_state(tx, state, params, grown, plan)
    for tree in (grown, found[0].mu):
      laid_out({"embed": tree["embed"]}, specs)
      mlp = tree["mlp"].get("experts", tree["mlp"])
      laid_out(mlp, inner)
    old = growth.undo(grown, plan)
    for tree in (old, growth.grow_state(tx, found, grown, old, plan.inverse())[0].mu):
      laid_out({"embed": tree["embed"]}, specs)
      laid_out(tree["mlp"], specs)


with use_mesh(mesh):
  main()
"""


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_layouts_of_layers_tokens_and_experts_stay(kind):
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  done = subprocess.run(
    [sys.executable, "-c", LAYERS, kind], env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_layouts_stay_and_what_does_not_divide_says_so(kind):
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, kind], env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert done.stdout.startswith("says 'a' is laid out over devices by")
  assert "divides among them, found (4, 7) in place of (4, 6)" in done.stdout
