"""Settings for the whole suite: strict promotion, and programs that compile fast.

Silent broadcasting and silent promotion are errors. Most of what the compiler does to make a
program fast is left out, since a test runs a program a few times, unless the environment has
JAX_DISABLE_MOST_OPTIMIZATIONS=0. Tests that count what is in a program ask for
`optimized_programs`.
"""

import collections
import gc
import math
import os
import subprocess
import sys

import hypothesis
import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
FAST = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") != "0"
jax.config.update("jax_disable_most_optimizations", FAST)

# What old versions read back from their persistent cache on CPUs does not run its loops.
if jax.__version_info__ < (0, 10):
  jax.config.update("jax_enable_compilation_cache", False)

# With these a program compiles four times faster, and runs slower.
FLAGS = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
DEFAULTS = {"xla_cpu_use_fusion_emitters": True, "xla_cpu_parallel_codegen_split_count": 32}


def use_flags():
  """Sets the flags for this process and those it starts, if this version of XLA knows them."""
  flags = " ".join(f"--{name}={str(value).lower()}" for name, value in FLAGS.items())
  known = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
  command = [sys.executable, "-c", "import jax; jax.devices('cpu')"]
  if subprocess.run(command, env=known, capture_output=True).returncode == 0:
    os.environ["XLA_FLAGS"] = known["XLA_FLAGS"]


if FAST and "PYTEST_XDIST_WORKER" not in os.environ:
  use_flags()

# Tracing makes many objects, and what JAX keeps of the tests before is looked through in vain.
gc.set_threshold(100_000, 20, 100)

# Compiling takes longer than any deadline; a run that gates a change must be repeatable.
hypothesis.settings.register_profile(
  "suite",
  deadline=None,
  derandomize=bool(os.environ.get("CI")),
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True, scope="module")
def what_is_there_stays():
  """Lets the collector pass over what JAX keeps of the tests before."""
  gc.freeze()


@pytest.fixture
def optimized_programs(monkeypatch):
  """Compiles as users do, for tests that count copies, fusions, bytes or operations."""
  jax.config.update("jax_disable_most_optimizations", False)
  if "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
    compile_plainly = jax.stages.Lowered.compile
    monkeypatch.setattr(
      jax.stages.Lowered, "compile", lambda lowered: compile_plainly(lowered, DEFAULTS)
    )
  yield
  jax.config.update("jax_disable_most_optimizations", FAST)


def pytest_addoption(parser):
  parser.addoption(
    "--few", type=int, metavar="N", help="N cases at most of each test, which lie far apart"
  )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
  few = config.getoption("--few")
  if few:
    cases = collections.defaultdict(list)
    for item in items:
      # What is left to CI is chosen, or not, by its marker.
      kind = bool(item.get_closest_marker("ci")), item.nodeid.split("[")[0]
      cases[kind].append(item)
    kept = {id(x) for found in cases.values() for x in found[:: math.ceil(len(found) / few)]}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]
