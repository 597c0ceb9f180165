"""Writes the table of results into the README, from the JSON files alone.

It has a row for every variant with a target that is about time, and below it a line for each
machine. Everything else that was measured is in the JSON files.
"""

import pathlib
from typing import Any

import tabulate

from benchmarks import machine
from benchmarks import report
from benchmarks.targets import TIMES

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
HEADERS = ("case", "machine", "ours", f"{TIMES} floor", f"{TIMES} peer", "peer", "target", "met")


def write(folder: pathlib.Path, readme: pathlib.Path) -> int:
  """Replaces what stands between the two markers.

  Returns:
    From how many files the table is made.

  Raises:
    ValueError: If a marker is missing, or there are no results.
  """
  text = readme.read_text(encoding="utf-8")
  begin, end = text.find(BEGIN), text.find(END)
  if begin == -1 or end < begin:
    raise ValueError(f"{readme}: expected a line {BEGIN} and after it a line {END}, found none")
  results = load_all(folder)
  if not results:
    raise ValueError(f"{folder}: expected results of a full run (*.json), found none")
  written = f"{text[: begin + len(BEGIN)]}\n\n{section(results)}\n\n{text[end:]}"
  readme.write_text(written, encoding="utf-8")
  return len(results)


def load_all(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The results of full runs; those of quick ones say little."""
  results = [report.load(path) for path in sorted(folder.glob("*.json"))]
  return [r for r in results if not r["settings"]["quick"]]


def section(results: list[dict[str, Any]]) -> str:
  """All that stands between the markers."""
  lines = [f"- {machine_line(r)}" for r in results]
  return "\n".join([short_table(results), "", *lines])


def short_table(results: list[dict[str, Any]]) -> str:
  """The rows of all machines, those of a case together."""
  order = list(dict.fromkeys(case["name"] for r in results for case in r["cases"]))
  order.sort(key=lambda name: not name.startswith("step-"))  # whole steps are what people feel
  rows = []
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
