"""The code of the README and of the page on training runs as it is printed."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
# What is printed in the README as a fragment, with dots for what is the reader's own.
FRAGMENTS = ("before", "each_layer", "cubic", "growth")


def blocks():
  for name in ("README.md", "docs/training.md"):
    text = (ROOT / name).read_text()
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
      if not any(word in code for word in FRAGMENTS):
        yield pytest.param(code, id=f"{name}-{i}")


@pytest.mark.parametrize("code", list(blocks()))
def test_the_code_runs(code):
  with jax.numpy_dtype_promotion("standard"):
    exec(code, {"__name__": "page"})
