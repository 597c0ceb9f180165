"""Times every case on this machine, prints a table, and saves it with a picture.

  python -m benchmarks                        every case, at sizes that fit the device
  python -m benchmarks --quick                small sizes, within a minute; says little
  python -m benchmarks --cases "uniform*,vmap"
  python -m benchmarks --table                the table in the README, from the saved files

The same command serves CPU, GPU and TPU. Results of cases that are not run again are kept.
"""

import argparse
import fnmatch
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

# JAX reserves only three quarters of a GPU's memory by default.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")

import jax
import tqdm

from benchmarks import builds
from benchmarks import cases
from benchmarks import confidence_cases
from benchmarks import flax_step_cases
from benchmarks import growth_cases
from benchmarks import machine
from benchmarks import measure
from benchmarks import picture
from benchmarks import pruning_cases
from benchmarks import readme
from benchmarks import report
from benchmarks import sizes
from benchmarks import step_cases

FOLDER = pathlib.Path(__file__).parent
BAR = "{percentage:3.0f}%|{bar:20}| {n:.1f}/{total_fmt} [{elapsed}] {desc}"


def main(argv: Sequence[str] | None = None) -> int:
  """Runs what was asked for; returns the exit code."""
  arguments = parse(argv)
  if arguments.table:
    return write_readme(arguments)
  jax.config.update("jax_enable_compilation_cache", False)
  memory, accelerator = machine.memory(), jax.default_backend() != "cpu"
  chosen = sizes.choose(memory, accelerator, arguments.quick)
  available = all_cases(chosen, accelerator, arguments.jaxpruner)
  names = [name for name in available if wanted(name, arguments.cases)]
  if arguments.list or not names:
    print("\n".join(available))
    return 0 if arguments.list else 2
  settings = {
    "quick": arguments.quick,
    "rounds": arguments.rounds or (3 if arguments.quick else 9),
    "least_s": 0.02 if arguments.quick else 0.2,
    "bandwidth_entries": chosen.bandwidth,
  }
  results = run(
    {name: available[name] for name in names},
    settings,
    memory,
    lambda results: save(results, arguments, list(available)),
  )
  print(report.table(results))
  return finish(save(results, arguments, list(available)), results)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--quick", action="store_true", help="small sizes and few rounds")
  add("--cases", default="*", help="patterns of names, separated by commas")
  add("--list", action="store_true", help="print the names of the cases")
  add("--rounds", type=int, help="how often each variant is timed")
  add("--jaxpruner", type=pathlib.Path, help="folder of JaxPruner's source, to time it too")
  add("--out", type=pathlib.Path, default=FOLDER / "results", help="folder of the results")
  add("--machine", help="name of the files; by default the device's own")
  add("--table", action="store_true", help="write the README's table from the results")
  add("--readme", type=pathlib.Path, default=FOLDER.parent / "README.md", help="where to")
  return parser.parse_args(argv)


def all_cases(
  chosen: sizes.Sizes, accelerator: bool, jaxpruner: pathlib.Path | None = None
) -> dict[str, Callable[[], Any]]:
  """For each case a function that builds it, in the order in which they run."""
  return (
    step_cases.all_cases(chosen)
    | flax_step_cases.all_cases(chosen)
    | cases.all_cases(chosen, accelerator)
    | confidence_cases.all_cases(chosen)
    | pruning_cases.all_cases(chosen, jaxpruner)
    | growth_cases.all_cases(chosen)
  )


def wanted(name: str, patterns: str) -> bool:
  """Whether a name matches one of the patterns."""
  return any(fnmatch.fnmatchcase(name, pattern.strip()) for pattern in patterns.split(","))


def run(
  makers: dict[str, Callable[[], Any]],
  settings: dict[str, Any],
  memory: int,
  saved: Callable[[dict[str, Any]], Any],
) -> dict[str, Any]:
  """Runs the cases one after another.

  Args:
    makers: For each case a function that builds it.
    settings: How to time them; saved with the results.
    memory: Bytes on the device.
    saved: Called with the results so far after each case.

  Returns:
    The results, as the JSON file holds them.
  """
  results = {
    "schema": report.SCHEMA,
    "machine": machine.describe(),
    "versions": machine.versions(),
    "settings": settings,
    "cases": [],
    "errors": [],
  }
  with tqdm.tqdm(total=len(makers), bar_format=BAR, mininterval=0.2, miniters=0) as bar:
    for name, make in makers.items():
      start = time.perf_counter()
      result = run_one(name, make, settings, memory, ticker(bar), results["errors"])
      if result is not None:
        results["cases"].append(result | {"wall_s": round(time.perf_counter() - start, 1)})
      bar.n = len(results["cases"]) + len(results["errors"])
      saved(results)
    bar.set_description_str("done")
  return results


def ticker(bar: Any) -> Callable[[str], None]:
  """Returns a function that moves the bar a part of the way to the end of the current case.

  How many calls there will be is not known, so each covers 5 % of what is left.
  """
  done = bar.n

  def tick(text: str) -> None:
    bar.n += 0.05 * (done + 1 - bar.n)
    bar.set_description_str(text, refresh=False)
    bar.update(0)

  return tick


def run_one(
  name: str,
  make: Callable[[], Any],
  settings: dict[str, Any],
  memory: int,
  tick: Callable[[str], None],
  errors: list[str],
) -> dict[str, Any] | None:
  """Builds and times one case; None, and an entry in `errors`, if a variant computes wrongly."""
  tick(f"{name}: building")
  case = make()
  if isinstance(case, builds.BuildCase):
    return measure.run_build_case(case, 2 if settings["quick"] else 5, tick)
  timing = settings["bandwidth_entries"], settings["rounds"], settings["least_s"]
  try:
    return measure.run_case(case, *timing, memory, tick)
  except measure.Mismatch as error:
    errors.append(str(error))
    return None


def save(results: dict[str, Any], arguments: argparse.Namespace, order: list[str]) -> pathlib.Path:
  """Saves results and picture under the name of the machine."""
  name = machine.slug(arguments.machine or machine.title(results["machine"]))
  path = arguments.out / f"{name}{'-quick' if arguments.quick else ''}.json"
  old = report.load(path) if path.exists() else None
  results = report.merged(old, results, order)
  dropped = {case["name"] for case in old["cases"]} if old else set()
  dropped -= {case["name"] for case in results["cases"]}
  if dropped:
    names = ", ".join(sorted(dropped))
    print(f"{path}: of another machine, versions or settings, now gone: {names}", file=sys.stderr)
  report.save(results, path)
  picture.draw(results, path.with_suffix(".png"))
  return path


def finish(path: pathlib.Path, results: dict[str, Any]) -> int:
  """Prints where the results are and which cases were wrong; returns the exit code."""
  print(f"\n{path}\n{path.with_suffix('.png')}")
  for error in results["errors"]:
    print(f"WRONG: {error}", file=sys.stderr)
  return 1 if results["errors"] else 0


def write_readme(arguments: argparse.Namespace) -> int:
  """Writes the README's table."""
  try:
    n = readme.write(arguments.out, arguments.readme)
  except (OSError, ValueError) as error:
    print(error, file=sys.stderr)
    return 2
  print(f"{arguments.readme}: table of {n} machine{'s' if n != 1 else ''} written")
  return 0


if __name__ == "__main__":
  sys.exit(main())
