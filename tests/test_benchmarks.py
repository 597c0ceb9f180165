"""The benchmark measures what it says; how fast anything is, no test asks."""

import dataclasses
import itertools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import __main__ as command
from benchmarks import cases
from benchmarks import floors
from benchmarks import machine
from benchmarks import measure
from benchmarks import picture
from benchmarks import readme
from benchmarks import report
from benchmarks import sizes
from benchmarks import targets
from benchmarks import variants

TINY = sizes.Sizes(
  uniform=(768,),
  skip=768,
  bfloat16=768,
  control=768,
  layer=8,
  matrix=64,
  configuration=16,
  configurations=8,
  compiled_leaves=4,
  compiled_width=2,
  traced_leaves=8,
  pruned=2**12,
  pruned_globally=2**12,
  step_width=8,
  step_model=16,
  step_tokens=((1, 4), (2, 4)),
  step_images=2,
  grown_layers=2,
  grown_width=8,
  grown_tokens=32,
  bandwidth=256,
)
MEMORY = 2**30


@pytest.fixture(autouse=True)
def ordinary_promotion():
  """What Optax's own peers rely on."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def tiny(name, accelerator=False):
  return command.all_cases(TINY, accelerator)[name]()


def run(case, rounds=3, memory=MEMORY):
  ticks = []
  result = measure.run_case(case, TINY.bandwidth, rounds, 0.0, memory, ticks.append)
  return result, ticks


# --------------------------------------------------------------------------------- floors


def test_floors_of_float32_are_the_documented_bytes():
  assert (floors.held(), floors.firing(), floors.every_micro_step()) == (12, 32, 28)
  assert (floors.held_update(), floors.firing_update()) == (28, 44)


def test_floors_of_bfloat16_keep_a_wide_accumulator():
  widths = floors.BFLOAT16
  # Held: gradient 2, accumulator 4 + 4. Firing: 2 + 4, and three arrays of 2 read and written.
  assert floors.held(widths) == 10
  assert floors.firing(widths) == 18
  assert floors.every_micro_step(widths) == 14
  assert floors.held_update(widths) == 10 + 2 + 2 + 2 + 2
  assert floors.firing_update(widths) == 18 + 2 + 2 + 2


def test_mean_bytes_over_a_cycle():
  assert floors.mean_bytes({8: 100}) == 100 * (7 * 12 + 32) / 8
  assert floors.mean_bytes({1: 10, 2: 10, 4: 10, 8: 10}) == 10 * (28 + 22 + 17 + 14.5)
  assert floors.mean_bytes({8: 100}, separate_updates=True) == 100 * (7 * 28 + 44) / 8
  assert floors.mean_bytes({1: 100}, separate_updates=True) == 100 * 28


# ---------------------------------------------------------------------------------- cases


LONG = ("growth", "step-linen", "step-nnx")


# An accelerator makes a difference to the cases of one module alone.
@pytest.mark.parametrize(
  ("name", "accelerator"),
  [
    pytest.param(name, False, marks=[pytest.mark.ci] * name.startswith(LONG))
    for name in command.all_cases(TINY, False)
  ]
  + [(name, True) for name in cases.all_cases(TINY, True)],
)
def test_every_case_names_variants_that_it_has(name, accelerator):
  case = tiny(name, accelerator)
  names = [variant.name for variant in case.variants]
  blend = getattr(case, "blend", None)
  known = {*names, *([blend.name] if blend else [])}
  assert len(set(names)) == len(names)
  assert case.name == name and {case.ours, case.peer} <= known
  for target in case.targets:
    assert target.variant in known
    assert target.against in {"floor", "seconds", "temporaries", "held bytes", *known}
    assert target.against != "temporaries" or target.allowance > 0
  for variant in case.variants:
    assert getattr(variant, "reference", None) in {None, *names}


@pytest.mark.parametrize("name", ["uniform-768", "layers", "quadrants", "bands-first", "mask"])
def test_static_phase_is_there_for_every_cadence(name):
  case = tiny(name)
  by_name = {variant.name: variant for variant in case.variants}
  dynamic, static = by_name["apply"], by_name["apply, static phase"]
  assert len(set(dynamic.steps)) == 1
  assert len(dynamic.steps) == len(static.steps) == 8
  # Of the eight phases, those with the same groups due share a program.
  due = {"uniform-768": 2, "layers": 3}.get(name, 4)
  assert len(set(static.steps)) == due


@pytest.mark.parametrize(
  ("name", "parameters"),
  [
    ("quadrants", {1: 1024, 2: 1024, 4: 1024, 8: 1024}),
    ("bands-last", {1: 1024, 2: 1024, 4: 1024, 8: 1024}),
    ("bands-first", {1: 1024, 2: 1024, 4: 1024, 8: 1024}),
    ("stacked", {8: 256, 4: 256, 1: 256}),
    ("layers", {8: 256, 4: 256, 1: 256}),
  ],
)
def test_floor_of_a_case_counts_its_entries(name, parameters):
  case = tiny(name)
  ours = next(variant for variant in case.variants if variant.name == "apply")
  assert case.parameters == sum(parameters.values())
  assert ours.floor_bytes == floors.mean_bytes(parameters)


def test_baseline_of_regions_updates_as_many_entries():
  blend = tiny("quadrants").blend
  assert blend.share == (1 + 1 / 2 + 1 / 4 + 1 / 8) / 4
  assert blend.floor_bytes == 64 * 64 * (12 + 20 * blend.share)


def test_twelve_leaves_hold_about_as_many_parameters_as_asked():
  for n in (12_000_000, 100_000_000, 1_000_000_000):
    shapes = cases.twelve(n)
    assert len(shapes) == 12
    assert cases.count(shapes) == pytest.approx(n, rel=2e-3)


def test_splitting_by_hand_can_be_undone():
  mask = np.array([[1, 2, 1], [4, 4, 2]])
  whole = variants.inputs_of({"w": (2, 3)})
  split = variants.split_inputs(whole, {"w": mask})
  parts = split.params()
  assert {p: x.shape for p, x in parts["w"].items()} == {"1": (2,), "2": (2,), "4": (2,)}
  np.testing.assert_array_equal(split.restore(parts)["w"], whole.params()["w"])
  assert variants.entries_of({"w": mask}) == {1: 2, 2: 2, 4: 2}


# ------------------------------------------------------------------------------ measuring


@pytest.mark.ci
@pytest.mark.parametrize("name", ["uniform-768", "bfloat16", "quadrants", "stacked", "vmap"])
def test_a_case_is_checked_and_timed(name):
  case = tiny(name)
  result, ticks = run(case)
  by_name = {row["name"]: row for row in result["variants"]}
  expected = {variant.name for variant in case.variants} | (
    {case.blend.name} if case.blend else set()
  )
  assert by_name.keys() == expected and result["failed"] == []
  assert len(ticks) == 2 * len(case.variants) + 3 * (len(case.variants) + 1)
  for variant in case.variants:
    row = by_name[variant.name]
    assert len(row["samples_ms"]) == 3 and row["q1_ms"] <= row["median_ms"] <= row["q3_ms"]
    assert row["floor_bytes"] == variant.floor_bytes
    assert row["programs"] == len(set(variant.steps))
    assert (row["error"] is None) == (variant.reference is None)
    assert row["error"] is None or 0 <= row["error"] <= 1
  assert by_name[case.peer]["ratio_peer"] == 1
  assert all(target["value"] is not None for target in result["targets"])
  assert json.loads(json.dumps(result)) == result


@pytest.mark.usefixtures("optimized_programs")
@pytest.mark.ci
def test_a_held_micro_step_accesses_its_floor():
  result, _ = run(tiny("uniform-768"), rounds=1)
  row = next(row for row in result["variants"] if row["name"] == "apply, static phase")
  # Scalars count at this size.
  assert 1 <= row["ratio_held_bytes"] < 1.1


@pytest.mark.ci
def test_variants_that_do_not_fit_beside_each_other_run_one_at_a_time(monkeypatch):
  starts = []
  start = measure.Run.start
  monkeypatch.setattr(measure.Run, "start", lambda self: (starts.append(self), start(self))[1])
  case = tiny("control")
  checked, timed = len(case.variants), len(case.variants) + 1
  run(case, rounds=2)
  assert len(starts) == checked + timed
  starts.clear()
  run(case, rounds=2, memory=1)
  assert len(starts) == checked + 2 * timed


@pytest.mark.ci
def test_a_wrong_variant_is_not_timed():
  case = tiny("control")
  wrong = dataclasses.replace(case.variants[0], steps=case.variants[0].steps[:4])
  case = dataclasses.replace(case, variants=[wrong, *case.variants[1:]])
  with pytest.raises(measure.Mismatch, match="control: while_loop differs from MultiSteps"):
    run(case)


@pytest.mark.ci
def test_a_variant_that_runs_out_of_memory_is_noted_and_left_out():
  case = tiny("control")

  def init(params, grads):
    if not isinstance(jax.tree.leaves(params)[0], jax.core.Tracer):
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    return case.variants[1].init(params, grads)

  greedy = dataclasses.replace(case.variants[1], init=init)
  others = [variant for variant in case.variants if variant.name != "cond"]
  result, _ = run(dataclasses.replace(case, variants=[greedy, *others]))
  assert result["failed"] == [{"name": "cond", "failed": "out of memory"}]
  assert "cond" not in {row["name"] for row in result["variants"]}


def test_rounding_is_allowed_and_more_is_not():
  x = jnp.full((4,), 0.02, jnp.float32)
  assert measure.worst({"w": x * (1 + 1e-6)}, {"w": x}) < 1
  assert measure.worst({"w": x * 1.001}, {"w": x}) > 1
  assert np.isnan(measure.worst({"w": x * jnp.nan}, {"w": x}))


@pytest.mark.ci
@pytest.mark.parametrize("name", ["compile", "trace", "growth-search", "growth-compile"])
def test_building_programs_is_timed(name):
  case = tiny(name)
  result = measure.run_build_case(case, 2, lambda text: None)
  assert result["unit"] == f"ms to {case.stage}"
  assert [len(row["samples_ms"]) for row in result["variants"]] == [2] * len(case.variants)
  assert all(target["value"] > 0 for target in result["targets"])


# -------------------------------------------------------------------------------- targets


def row(median, q1=None, q3=None, **rest):
  return {"median_ms": median, "q1_ms": q1 or median, "q3_ms": q3 or median, **rest}


def test_a_target_compares_with_a_variant_or_the_floor():
  found = {"apply": row(2.0, ratio_floor=1.25), "peer": row(10.0)}
  beside = targets.evaluate(targets.Target("apply", "peer", 0.1), found)
  assert beside["value"] == 0.2 and beside["met"] is False
  assert targets.evaluate(targets.Target("apply", "floor", 1.3), found)["met"] is True
  missing = targets.evaluate(targets.Target("apply", "gone", 1.0), found)
  assert missing["value"] is None and missing["met"] is None


def test_not_slower_allows_for_the_spread_and_nothing_else_does():
  found = {"static": row(1.05, 0.9, 1.2), "dynamic": row(1.0, 0.95, 1.1)}
  assert targets.evaluate(targets.Target("static", "dynamic", 1.0, noise=True), found)["met"]
  assert not targets.evaluate(targets.Target("static", "dynamic", 1.0), found)["met"]


def test_scalars_are_no_temporaries():
  target = targets.Target("apply", "temporaries", 1.0, allowance=100)
  assert targets.evaluate(target, {"apply": row(1.0, temp_bytes=4096)})["value"] == 0
  assert not targets.evaluate(target, {"apply": row(1.0, temp_bytes=4096 + 101)})["met"]


# ---------------------------------------------------------------------------------- sizes


def test_sizes_follow_the_memory():
  small = sizes.choose(2 * 10**9, accelerator=False, quick=False)
  cpu = sizes.choose(24 * 10**9, accelerator=False, quick=False)
  gpu = sizes.choose(72 * 10**9, accelerator=True, quick=False)
  assert small.uniform == (12_000_000,) and small.bfloat16 == 12_000_000
  assert cpu.uniform == (12_000_000, 100_000_000)
  assert gpu.uniform == (12_000_000, 100_000_000, 1_000_000_000)
  assert gpu.bandwidth > cpu.bandwidth
  assert sizes.choose(72 * 10**9, accelerator=True, quick=True) == sizes.QUICK


def test_a_file_name_is_made_of_the_device():
  found = machine.describe()
  assert found["cores"] >= 1 and found["memory_gb"] > 0 and found["backend"] == "cpu"
  assert machine.slug("AMD EPYC 9654 (96-Core), 2 cores") == "amd-epyc-9654-96-core-2-cores"
  assert machine.versions().keys() == {"python", "jax", "jaxlib", "optax"}


# --------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """The folder and the file of a whole run of the command on three tiny cases."""
  folder = tmp_path_factory.mktemp("results")
  with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
    patch.setattr(sizes, "choose", lambda *_: TINY)
    names = "uniform*,quadrants,trace"
    arguments = ["--rounds", "2", "--out", str(folder), "--machine", "My Box", "--cases", names]
    assert command.main(arguments) == 0
  return folder, folder / "my-box.json"


@pytest.mark.ci
def test_json_holds_machine_versions_sizes_medians_and_spread(saved):
  results = report.load(saved[1])
  assert results["schema"] == report.SCHEMA and results["errors"] == []
  assert results["machine"] == machine.describe()
  assert results["versions"]["jax"] == jax.__version__
  assert results["settings"]["rounds"] == 2 and results["settings"]["bandwidth_entries"] == 256
  assert [case["name"] for case in results["cases"]] == ["uniform-768", "quadrants", "trace"]
  for case in results["cases"][:2]:
    assert case["bandwidth_gb_s"] > 0 and case["parameters"] > 0
    for variant in case["variants"]:
      assert {"median_ms", "q1_ms", "q3_ms", "ratio_floor", "ratio_peer"} <= variant.keys()


@pytest.mark.ci
def test_picture_is_saved_beside_the_json(saved):
  assert saved[1].with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.ci
def test_table_has_a_row_for_every_variant(saved):
  results = report.load(saved[1])
  text = report.table(results)
  for case in results["cases"]:
    assert case["title"] in text
    assert len(report.case_rows(case)) == len(case["variants"])
  assert all(
    len(row) == len(report.HEADERS) for c in results["cases"] for row in report.case_rows(c)
  )


@pytest.mark.ci
def test_cases_that_are_not_run_again_are_kept(saved):
  old = report.load(saved[1])
  new = old | {"cases": [old["cases"][1] | {"title": "again"}]}
  order = ["uniform-768", "quadrants", "trace"]
  both = report.merged(old, new, order)
  assert [case["name"] for case in both["cases"]] == order
  assert both["cases"][1]["title"] == "again"
  assert report.merged(old | {"versions": {}}, new, order) == new
  assert report.merged(None, new, order) == new


STEPS, CASES = ("\n".join(readme.marks(name)) for name in (readme.STEPS, readme.CASES))


@pytest.mark.ci
def test_readme_tables_come_from_the_files_and_can_be_written_again(saved, tmp_path):
  text = tmp_path / "README.md"
  old = CASES.replace("\n", "\nold\n")
  text.write_text(f"before\n\n{STEPS}\n\nbetween\n\n{old}\n\nafter\n", encoding="utf-8")
  arguments = ["--table", "--out", str(saved[0]), "--readme", str(text)]
  assert command.main(arguments) == 0
  once = text.read_text(encoding="utf-8")
  assert once.startswith("before\n\n") and once.endswith("\n\nafter\n") and "\nold\n" not in once
  assert command.main(arguments) == 0
  assert text.read_text(encoding="utf-8") == once
  rows = [x for x in once[once.index("between") :].splitlines() if x.startswith("| ")]
  results = report.load(saved[1])
  names = {t["variant"] for t in results["cases"][0]["targets"] if t["headline"]}
  assert names == {"apply", "update"}
  # A header; `apply` and `update`; quadrants; tracing one group, and four.
  assert len(rows) == 1 + 2 + 1 + 2
  ours = {v["name"]: v for v in results["cases"][0]["variants"]}["apply"]
  cells = [cell.strip() for cell in rows[1].split("|")[1:-1]]
  assert cells[:2] == [results["cases"][0]["title"], machine.title(results["machine"])]
  assert cells[2] == f"{report.number(ours['median_ms'])} ms"
  assert cells[3:5] == [report.number(ours["ratio_floor"]), report.number(ours["ratio_peer"])]


def test_readme_shows_every_whole_step_that_is_committed_beside_all_its_peers():
  results = readme.load_all(command.FOLDER / "results")
  steps = [(r, case) for r in results for case in r["cases"] if readme.is_step(case)]
  rows = readme.step_table(results).splitlines()[2:]
  assert len(rows) == len(steps) > 0
  for (r, case), row in zip(steps, rows, strict=True):
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[0] in case["title"] and cells[-1] == machine.title(r["machine"])
    for variant in case["variants"]:
      if variant["name"] in readme.WAYS:
        cell = cells[1 + list(readme.WAYS).index(variant["name"])]
        assert cell.startswith(f"{report.number(variant['median_ms'])} ms, ")
  assert readme.step_table(results) in (command.FOLDER.parent / "README.md").read_text("utf-8")


@pytest.mark.ci
@pytest.mark.parametrize(
  ("text", "missing"),
  [
    ("", readme.STEPS),
    (CASES, readme.STEPS),
    (f"{STEPS}\n{readme.marks(readme.CASES)[0]}", readme.CASES),
    ("\n".join([STEPS, *readme.marks(readme.CASES)[::-1]]), readme.CASES),
  ],
)
def test_readme_without_markers_is_an_error_that_names_them(saved, tmp_path, text, missing, capsys):
  path = tmp_path / "README.md"
  path.write_text(text, encoding="utf-8")
  assert command.main(["--table", "--out", str(saved[0]), "--readme", str(path)]) == 2
  message = capsys.readouterr().err
  assert all(mark in message for mark in (*readme.marks(missing), path.name))
  assert path.read_text(encoding="utf-8") == text


@pytest.mark.ci
def test_quick_results_do_not_reach_the_readme(saved, tmp_path):
  results = report.load(saved[1])
  results["settings"]["quick"] = True
  report.save(results, tmp_path / "box-quick.json")
  assert readme.load_all(tmp_path) == []
  path = tmp_path / "README.md"
  path.write_text(f"{STEPS}\n{CASES}\n", encoding="utf-8")
  with pytest.raises(ValueError, match="expected results of a full run"):
    readme.write(tmp_path, path)


def test_a_file_of_another_kind_is_refused(tmp_path):
  path = tmp_path / "x.json"
  path.write_text("{}", encoding="utf-8")
  with pytest.raises(ValueError, match="schema"):
    report.load(path)


def test_labels_of_the_picture_never_touch():
  rng = np.random.default_rng(0)
  for n in (1, 2, 8, 16):
    heights = sorted(rng.uniform(0.2, 0.4, n), reverse=True)
    placed = picture.spread(list(heights))
    gap = min(picture.LABEL_HEIGHT, 1 / max(1, n - 1))
    assert all(a - b >= gap - 1e-9 for a, b in itertools.pairwise(placed))
    assert min(placed) >= -1e-9 and max(placed) <= 1 + 1e-9


def test_unknown_cases_are_refused_with_the_names_there_are(capsys, monkeypatch):
  monkeypatch.setattr(sizes, "choose", lambda *_: TINY)
  assert command.main(["--cases", "nothing"]) == 2
  assert "quadrants" in capsys.readouterr().out
  assert command.main(["--list"]) == 0
