"""The section on units that are born again: its code runs, its figures are those of the file."""

import json
import pathlib
import re

import growth_nets as nets
import pytest

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "growth.md").read_text(encoding="utf-8")
SECTION = re.search(r"## Units born again\n(.*?)\n## ", PAGE, re.DOTALL)[1]
ROWS = json.loads((DOCS / "recycle.json").read_text(encoding="utf-8"))


def test_the_code_runs(capsys):
  (code,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
  names: dict[str, object] = {}
  with nets.relaxed():
    exec(code, names)
  assert "w1: 8 units" in capsys.readouterr().out
  assert names["state"].micro_step == 1


def test_the_table_is_that_of_the_file():
  table = re.search(r"<!-- recycle -->\n(.*?)<!-- end recycle -->", SECTION, re.DOTALL)[1]
  found = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
  assert found[0] == list(ROWS[0])
  expected = [[x if isinstance(x, str) else f"{x:.2f}" for x in row.values()] for row in ROWS]
  assert found[2:] == expected


def row(tasks, optimizer):
  (found,) = [r for r in ROWS if (r["tasks"], r["optimizer"]) == (tasks, optimizer)]
  return found


def lost(row):
  """How much accuracy the twentieth task has lost, and half of the first one's interval."""
  return row["first task %"] - row["twentieth task %"], row["± first"]


def test_the_figures_say_what_the_page_says():
  loss, half = lost(row("long", "Adam"))
  assert loss > half + row("long", "Adam")["± twentieth"]
  assert row("long", "Adam")["at last %"] > 40
  loss, half = lost(row("long", "ReDo"))
  assert loss <= half
  assert half < lost(row("long", "continual backprop"))[0] < lost(row("long", "Adam"))[0] / 4
  assert row("long", "ReDo")["at most %"] < 5
  assert row("fast", "ReDo")["at most %"] < 6
  loss, half = lost(row("fast", "ReDo"))
  assert half < loss < lost(row("fast", "Adam"))[0]


@pytest.mark.parametrize("figure", ["40 epochs at a learning rate of 0.002", "10 epochs at 0.005"])
def test_the_settings_are_those_of_the_script(figure):
  script = (DOCS / "recycle_experiments.py").read_text(encoding="utf-8")
  assert figure in " ".join(SECTION.split())
  assert '"long": (40, 2e-3), "fast": (10, 5e-3)' in script
