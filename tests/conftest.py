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


# Of tests that many cases share, the cases that take longest, by a part of their names.
LONG_CASES = """
  test_any_bands[8]
  test_benchmarks.py::test_every_case_names_variants_that_it_has[growth
  test_benchmarks.py::test_every_case_names_variants_that_it_has[step-linen
  test_benchmarks.py::test_every_case_names_variants_that_it_has[step-nnx
  test_checkpoint.py::test_a_state_saved_in_mid_window_runs_on_bit_for_bit[bands]
  test_checkpoint.py::test_a_state_saved_in_mid_window_runs_on_bit_for_bit[latest]
  test_checkpoint.py::test_a_state_saved_in_mid_window_runs_on_bit_for_bit[mask and skip]
  test_checkpoint.py::test_a_state_saved_in_mid_window_runs_on_bit_for_bit[mask as vectors]
  test_checkpoint.py::test_a_state_saved_in_mid_window_runs_on_bit_for_bit[noise, masked away]
  test_checkpoint.py::test_a_state_saved_in_mid_window_runs_on_bit_for_bit[pieces]
  test_checkpoint.py::test_a_state_saved_in_mid_window_runs_on_bit_for_bit[policies]
  test_checkpoint.py::test_a_state_saved_in_mid_window_runs_on_bit_for_bit[policies and skip]
  test_checkpoint.py::test_a_state_saved_in_mid_window_runs_on_bit_for_bit[pruned in pieces]
  test_checkpoint.py::test_a_state_saved_in_mid_window_runs_on_bit_for_bit[pruned, bools]
  test_checkpoint.py::test_a_state_saved_in_mid_window_runs_on_bit_for_bit[pruned, memory]
  test_describe.py::test_metrics_of_many_states_are_those_of_each[grid]
  test_describe.py::test_metrics_of_many_states_are_those_of_each[policy]
  test_docs.py::test_the_code_runs[docs/
  test_dtypes.py::test_no_leaf_of_a_state_changes_its_dtype[contrib.
  test_extending.py::test_a_kind_of_region_of_ones_own[Rows-periods4]
  test_extending.py::test_a_kind_of_region_of_ones_own[Near-periods5]
  test_extending.py::test_a_kind_of_region_of_ones_own[NearInOnePass-periods6]
  test_flax.py::test_an_nnx_optimizer_is_saved_in_mid_window[pruning]
  test_flax.py::test_the_state_of_an_nnx_optimizer_is_taken_as_it_is[chain]
  test_flax.py::test_the_state_of_an_nnx_optimizer_is_taken_as_it_is[pruning]
  test_flax.py::test_the_state_of_an_nnx_optimizer_is_taken_as_it_is[quadrants]
  test_growth_docs.py::test_recipes_run
  test_masks.py::test_groups_share_what_is_updated_entry_by_entry[adagrad]
  test_masks.py::test_groups_share_what_is_updated_entry_by_entry[adamw with a schedule]
  test_masks.py::test_groups_share_what_is_updated_entry_by_entry[clipped by value]
  test_masks.py::test_groups_share_what_is_updated_entry_by_entry[compiled by itself]
  test_masks.py::test_groups_share_what_is_updated_entry_by_entry[lion]
  test_masks.py::test_groups_share_what_is_updated_entry_by_entry[rmsprop]
  test_optimizers.py::test_any_inner_optimizer_follows_the_oracle[contrib.
  test_optimizers.py::test_every_way_of_any_family_follows_the_oracle[contrib.
  test_sharding.py::test_on_several_devices[scans
  test_sparse_training.py::test_a_row_of_the_table_does_what_the_rule_of_jaxpruner_does
  test_training_step.py::test_no_gradient_of_layers_with_their_own_periods_is_held[0]
  test_training_step.py::test_no_gradient_of_layers_with_their_own_periods_is_held[1]
  test_wrappers_property.py::test_known_pitfalls[by rank under a mask
  test_wrappers_property.py::test_known_pitfalls[finite or not]
""".strip().splitlines()


def pytest_addoption(parser):
  parser.addoption(
    "--few", type=int, metavar="N", help="N cases at most of each test, which lie far apart"
  )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
  for item in items:
    if any(name.strip() in item.nodeid for name in LONG_CASES):
      item.add_marker(pytest.mark.ci)
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
