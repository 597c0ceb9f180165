"""Settings for the whole suite: silent broadcasting and silent promotion are errors."""

import os

import hypothesis
import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Compiling takes longer than any deadline; a run that gates a change must be repeatable.
hypothesis.settings.register_profile(
  "suite",
  deadline=None,
  derandomize=bool(os.environ.get("CI")),
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")
