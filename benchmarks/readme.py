"""Writes the tables of results into the README, from the JSON files alone.

The first has a row for every whole training step, beside all ways to accumulate. The second has
one for every variant of the other cases with a target that is about time, and below it a line for
each machine. Everything else that was measured is in the JSON files.
"""

import pathlib
from typing import Any

import tabulate

from benchmarks import machine
from benchmarks import report
from benchmarks.targets import TIMES

STEPS, CASES = "whole-steps", "benchmarks"
WAYS = {
  "training_step": "`training_step`",
  "training_step in lax.scan": "`training_step` in `lax.scan`",
  "gradients and apply": "gradients and `apply`",
  "MultiSteps": "`MultiSteps`",
  "lax.scan over micro-batches": "`lax.scan` over micro-batches",
  "optax.microbatch": "`optax.microbatch`",
  "AdamW at every micro-step": "AdamW at every micro-step",
}
HEADERS = ("case", "machine", "ours", f"{TIMES} floor", f"{TIMES} peer", "peer", "target", "met")


def write(folder: pathlib.Path, readme: pathlib.Path) -> int:
  """Replaces what stands between the markers of both tables.

  Returns:
    From how many files the tables are made.

  Raises:
    ValueError: If a marker is missing, or there are no results.
  """
  results = load_all(folder)
  if not results:
    raise ValueError(f"{folder}: expected results of a full run (*.json), found none")
  text = readme.read_text(encoding="utf-8")
  for name, written in ((STEPS, step_table(results)), (CASES, section(results))):
    first, last = marks(name)
    begin, end = text.find(first), text.find(last)
    if begin == -1 or end < begin:
      raise ValueError(f"{readme}: expected a line {first} and after it a line {last}, found none")
    text = f"{text[: begin + len(first)]}\n\n{written}\n\n{text[end:]}"
  readme.write_text(text, encoding="utf-8")
  return len(results)


def marks(name: str) -> tuple[str, str]:
  """The lines of the README between which a table stands."""
  return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def load_all(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The results of full runs; those of quick ones say little."""
  results = [report.load(path) for path in sorted(folder.glob("*.json"))]
  return [r for r in results if not r["settings"]["quick"]]


def is_step(case: dict[str, Any]) -> bool:
  """Whether a case is a whole training step."""
  return bool(case["name"].startswith("step-"))


def step_table(results: list[dict[str, Any]]) -> str:
  """The time and the temporaries of every way to take a whole step."""
  headers = ["whole step", *WAYS.values(), "`training_step`, per s", "machine"]
  rows = []
  for r in results:
    for case in filter(is_step, r["cases"]):
      by_name = {variant["name"]: variant for variant in case["variants"]}
      rate = f"{by_name[case['ours']]['per_s']:,.0f} {case['per_s_of']}"
      title = case["title"].removeprefix("whole step").removeprefix(",").strip()
      cells = [step_cell(by_name.get(name)) for name in WAYS]
      rows.append([title, *cells, rate, machine.title(r["machine"])])
  return tabulate.tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def step_cell(variant: dict[str, Any] | None) -> str:
  """The time of a way to take a step, and what it needs beside parameters and state."""
  if variant is None:
    return ""
  return f"{milliseconds(variant)}, {variant['temp_bytes'] / 1e6:.0f} MB"


def section(results: list[dict[str, Any]]) -> str:
  """The table of all other cases, and a line for each machine."""
  lines = [f"- {machine_line(r)}" for r in results]
  return "\n".join([short_table(results), "", *lines])


def short_table(results: list[dict[str, Any]]) -> str:
  """The rows of all machines, those of a case together."""
  every = sorted((c for r in results for c in r["cases"]), key=lambda case: not is_step(case))
  order, rows = dict.fromkeys(case["name"] for case in every), []
  for name in order:
    for r in results:
      title = machine.title(r["machine"])
      rows += [row for c in r["cases"] if c["name"] == name for row in short_rows(c, title)]
  return tabulate.tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True)


def short_rows(case: dict[str, Any], where: str) -> list[list[str]]:
  """A row for every variant of a case that has a target for its time."""
  by_name = {variant["name"]: variant for variant in case["variants"]}
  peer, rows = by_name.get(case["peer"]), []
  headlines = [t for t in case["targets"] if t["headline"]]
  names = dict.fromkeys(t["variant"] for t in headlines)
  for name in names:
    ours, reached = by_name.get(name, {}), [t for t in headlines if t["variant"] == name]
    rows.append(
      [
        case["title"] + (f", {name}" if len(names) > 1 and name != "apply" else ""),
        where,
        milliseconds(ours),
        report.number(ours.get("ratio_floor")),
        report.number(ours.get("ratio_peer")),
        f"{case['peer']}, {milliseconds(peer)}",
        "; ".join(t["text"] for t in reached),
        "; ".join(map(report.verdict, reached)),
      ]
    )
  return rows


def milliseconds(variant: dict[str, Any] | None) -> str:
  """A median with its unit."""
  return f"{report.number(variant['median_ms'])} ms" if variant else "not run"


def machine_line(results: dict[str, Any]) -> str:
  """Machine and versions of a run, its bandwidths, and whether its other targets are met."""
  versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
  bandwidths = [c["bandwidth_gb_s"] for c in results["cases"] if "bandwidth_gb_s" in c]
  rest = [t for c in results["cases"] for t in c["targets"] if not t["headline"]]
  claims = [
    share("a static phase is no slower than a dynamic one", [t for t in rest if t["noise"]]),
    share(
      "a held micro-step accesses no byte beyond its floor",
      [t for t in rest if t["against"] == "held bytes"],
    ),
    share("temporaries stay in bounds", [t for t in rest if t["against"] == "temporaries"]),
  ]
  if bandwidths:
    lowest, highest = report.number(min(bandwidths)), report.number(max(bandwidths))
    claims.insert(0, f"measured bandwidth {lowest} to {highest} GB/s")
  return f"{machine.title(results['machine'])} ({versions}): {'; '.join(filter(None, claims))}."


def share(claim: str, tested: list[dict[str, Any]]) -> str:
  """A claim, and in how many cases it holds; empty if that is not known of any."""
  known = [t for t in tested if t["met"] is not None]
  return f"{claim} in {sum(t['met'] for t in known)} of {len(known)} cases" if known else ""
