"""The code of the README and of the pages beside it runs as it is printed."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
# What is printed in the README as a fragment, with dots for what is the reader's own.
FRAGMENTS = ("before", "each_layer", "cubic", "growth")


PAGES = ("README.md", "docs/training.md", "docs/from_multisteps.md", "docs/inside.md")


@pytest.mark.parametrize(
  "page", [pytest.param(page, marks=[pytest.mark.ci] * page.startswith("docs/")) for page in PAGES]
)
def test_the_code_runs(page):
  blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
  whole = blocks
  if page == "README.md":
    whole = [code for code in blocks if not any(word in code for word in FRAGMENTS)]
  assert whole
  names = {"__name__": "page"}
  with jax.numpy_dtype_promotion("standard"):
    for code in whole:
      exec(code, names)
