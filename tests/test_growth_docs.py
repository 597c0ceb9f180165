"""The code of the page on growth runs as it is printed."""

import inspect
import pathlib
import re

import jax
import pytest
from flax import nnx

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "growth.md"


def test_the_page_runs(capsys):
  if "model" not in inspect.signature(nnx.Optimizer.update).parameters:
    pytest.skip("the page is written for Flax 0.11: the optimizer's update takes the model")
  (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
  names = {"__name__": "page"}
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    exec(code, names)
  printed = capsys.readouterr().out
  assert re.search(r"^fc1/kernel +incoming +4x8 +4x24 +\+64$", printed, re.MULTILINE)
  assert printed.endswith("(4, 24)\n")
  assert type(names["model"]) is names["Net"]
