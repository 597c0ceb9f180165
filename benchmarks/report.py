"""The results of a run as a JSON file and as a table of every variant.

The README's short table is made in `readme`, the picture in `picture`, both from the JSON files.
"""

import json
import pathlib
from typing import Any

import tabulate

from benchmarks.targets import TIMES

SCHEMA = 1
HEADERS = (
  "case",
  "variant",
  "ms",
  "quartiles",
  f"{TIMES} floor",
  f"{TIMES} peer",
  "temp MB",
  "peak MB",
  "per s",
  "compile s",
  "target",
  "met",
)


def table(results: dict[str, Any]) -> str:
  """Every variant of every case, a row each."""
  rows = [row for case in results["cases"] for row in case_rows(case)]
  return tabulate.tabulate(rows, HEADERS, tablefmt="simple", disable_numparse=True)


def case_rows(case: dict[str, Any]) -> list[list[str]]:
  """The rows of one case."""
  rows = []
  for i, variant in enumerate(case["variants"]):
    reached = [t for t in case["targets"] if t["variant"] == variant["name"]]
    mark = {"peer": " (peer)", "baseline": " (baseline)"}.get(variant["role"], "")
    rows.append(
      [
        case["title"] if i == 0 else "",
        variant["name"] + mark,
        number(variant["median_ms"]),
        f"{number(variant['q1_ms'])} - {number(variant['q3_ms'])}",
        number(variant.get("ratio_floor")),
        number(variant.get("ratio_peer")),
        number(megabytes(variant.get("temp_bytes"))),
        number(megabytes(variant.get("peak_bytes"))),
        f"{variant['per_s']:.0f} {case['per_s_of']}" if "per_s" in variant else "",
        number(variant.get("compile_s")),
        "\n".join(t["text"] for t in reached),
        "\n".join(map(verdict, reached)),
      ]
    )
  rows += [["", f["name"], f["failed"], *[""] * (len(HEADERS) - 3)] for f in case["failed"]]
  return rows


def verdict(target: dict[str, Any]) -> str:
  """Whether a target is met, and by what ratio."""
  if target["met"] is None:
    return "not measured"
  return f"{'yes' if target['met'] else 'NO'}, {number(target['value']) or '0'}"


def number(x: float | None) -> str:
  """A number in three digits; empty for None."""
  if x is None:
    return ""
  return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def megabytes(n: int | None) -> float | None:
  """Bytes as megabytes."""
  return None if n is None else n / 1e6


def save(results: dict[str, Any], path: pathlib.Path) -> None:
  """Writes the JSON file; if that is interrupted, the old one stays."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(".partial")
  partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
  partial.replace(path)


def load(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON file.

  Raises:
    ValueError: If it does not hold results of this schema.
  """
  results = json.loads(path.read_text(encoding="utf-8"))
  if not isinstance(results, dict) or results.get("schema") != SCHEMA:
    raise ValueError(f"{path}: expected results of schema {SCHEMA}")
  return results


def merged(old: dict[str, Any] | None, new: dict[str, Any], order: list[str]) -> dict[str, Any]:
  """Adds to new results the old cases that were not run again.

  Only if machine, versions and settings are the same; otherwise the new results are returned.

  Args:
    old: What the file held before, if anything.
    new: Results of this run.
    order: Names of all cases, in the order in which the result lists them.
  """
  same = ("machine", "versions", "settings")
  if old is None or any(old[key] != new[key] for key in same):
    return new
  cases = {case["name"]: case for case in (*old["cases"], *new["cases"])}
  ranks = {name: i for i, name in enumerate(order)}
  kept = sorted(cases.values(), key=lambda case: ranks.get(case["name"], len(ranks)))
  return new | {"cases": kept}
