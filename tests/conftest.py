"""Settings for the whole suite: strict promotion, and programs that compile fast.

Silent broadcasting and silent promotion are errors. Most of what the compiler does to make a
program fast is left out, since a test runs a program a few times, unless the environment has
JAX_DISABLE_MOST_OPTIMIZATIONS=0. Tests that count what is in a program ask for
`optimized_programs`.
"""

import os

import hypothesis
import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
FAST = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") != "0"
jax.config.update("jax_disable_most_optimizations", FAST)
if jax.__version_info__ < (0, 10):
  # What JAX 0.6 reads back from its compilation cache does not compute what was compiled: loops
  # that should run once do not run.
  jax.config.update("jax_enable_compilation_cache", False)

# Compiling takes longer than any deadline; a run that gates a change must be repeatable.
hypothesis.settings.register_profile(
  "suite",
  deadline=None,
  derandomize=bool(os.environ.get("CI")),
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def optimized_programs():
  """Compiles as users do, for tests that count copies, fusions, bytes or operations."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", FAST)
