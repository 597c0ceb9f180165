"""Meshes with automatic and explicit axes, `shard_map`, and what is settled before any backend."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

# What the programs ask JAX for: types that say how arrays lie, and the number of devices.
pytestmark = pytest.mark.skipif(
  jax.__version_info__ < (0, 8, 1), reason="shardings are no part of types yet"
)

FEW = ["2 skip", "bands", "mask", "moving"]


def on_devices(program, names=(), **flags):
  """The lines that a program of `on_devices` prints."""
  file = pathlib.Path(__file__).with_name("on_devices.py")
  flags |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  done = subprocess.run(
    [sys.executable, str(file), program, *names],
    env=os.environ | flags,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout.splitlines()


@pytest.mark.parametrize(
  ("program", "names", "at_least"),
  [
    ("eager", [], 30),
    pytest.param("scans", FEW, len(FEW), marks=pytest.mark.ci),
    pytest.param("training_steps", [], 12, marks=pytest.mark.ci),
    pytest.param("weights", [], 4, marks=pytest.mark.ci),
    ("conversions", [], 6),
    ("pruning", ["regrown"], 3),
    pytest.param("pruning", [], 21, marks=pytest.mark.ci),
    pytest.param("scans", [], 30, marks=pytest.mark.ci),
    pytest.param("shard_maps", [], 30, marks=pytest.mark.ci),
    pytest.param("optimizers", [], 150, marks=pytest.mark.ci),
  ],
)
def test_on_several_devices(program, names, at_least):
  lines = on_devices(program, names)
  assert [line for line in lines if line.startswith("wrong")] == []
  assert sum(line.startswith("checked") for line in lines) >= at_least


@pytest.mark.ci
def test_only_what_is_cut_across_shards_travels():
  counts = dict(line.split(": ") for line in on_devices("collectives"))
  assert {name for name, n in counts.items() if n == "0"} == {"2", "other axis", "layers", "mask"}


def test_leaves_of_one_pool_vary_over_the_same_axes():
  (said,) = on_devices("refused")
  assert "'a' over x and 'b' over none" in said and "allocation='uniform'" in said


def test_every_process_compiles_the_same_program():
  """Sets of names come in another order in every process; programs do not."""
  assert on_devices("text", PYTHONHASHSEED="1") == on_devices("text", PYTHONHASHSEED="3")


def test_distributed_starts_after_the_import():
  program = (
    "import optax_cadence, jax; jax.distributed.initialize('localhost:12357', 1, 0);"
    " print(len(jax.devices()))"
  )
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
