"""Policies and `noise_scale` on several devices: the same decisions, and scalars to talk about."""

import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

# In a process of its own, which compiles everything anew.
pytestmark = pytest.mark.ci

PROGRAM = r"""
import re
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import optax_cadence as oc

mesh = Mesh(np.array(jax.devices()), ("d",))
specs = {"rows": P("d"), "columns": P(None, "d"), "bands": P("d"), "slow": P("d")}
params = {name: jnp.ones((64, 128)) for name in specs}
every = {
  "rows": oc.until_certain(1.0, 2, 8),
  "columns": oc.as_settled(2, 8),
  # Cut along the axis that is not sharded; along the other, parts move from device to device.
  "bands": oc.channels([oc.until_certain(1.0, 2, 8), 2, oc.as_settled(1, 8), 4]),
  "slow": 4,
}
tx = optax.chain(oc.noise_scale(4), oc.cadence(optax.sgd(0.05), every))
noise = jax.random.normal(jax.random.key(0), (24, 64, 128))
grads = {name: noise + i / 2 for i, name in enumerate(params)}


def trained(params, grads):
  def step(carry, g):
    params, state = carry
    updates, state = tx.update(g, state, params)
    return (optax.apply_updates(params, updates), state), oc.metrics(state)

  return jax.lax.scan(step, (params, tx.init(params)), grads)


def put(tree, lead=()):
  place = lambda name: NamedSharding(mesh, P(*lead, *specs[name]))
  return {name: jax.device_put(x, place(name)) for name, x in tree.items()}


(expected, _), told = jax.jit(trained)(params, grads)
inputs = put(params), put(grads, (None,))
program = jax.jit(trained).lower(*inputs).compile()
(found, state), heard = program(*inputs)
for name in expected:
  np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
for key in told:
  np.testing.assert_allclose(heard[key], told[key], rtol=2e-3, err_msg=key)
assert len({int(told[f"{name}/updates"][-1]) for name in ("rows", "columns", "slow")}) == 3

assert oc.metrics(state)["rows/updates"] == told["rows/updates"][-1]
pattern = r"= ([^=\n]*) (all-[a-z]+|collective-[a-z]+)(?:-start)?[(]"
for result, kind in re.findall(pattern, program.as_text()):
  print(kind, result)
"""


def test_sharded_gradients_give_the_same_decisions_and_only_scalars_travel():
  flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM],
    cwd=pathlib.Path(__file__).parents[1],
    env=os.environ | flags,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  found = [line.split(" ", 1) for line in done.stdout.splitlines()]
  # Of a policy's region two norms each, and of the four that are measured besides, too.
  assert 0 < sum(result.count("[") for _, result in found) <= 2 * (4 + 4)
  for kind, result in found:
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", result)]
    assert kind == "all-reduce" and max(sizes, default=1) <= 8
