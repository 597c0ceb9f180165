"""The page about confidence: its code runs, its tables are those of the file."""

import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cadence as oc

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "confidence.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_there_are_blocks():
  assert len(BLOCKS) == 3


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_makes_a_transformation_that_trains(block):
  names: dict[str, Any] = {"oc": oc, "optax": optax}
  exec(block, names)
  tx, params = names["tx"], {"body": {"w": jnp.ones((2, 3))}, "head": {"w": jnp.ones(3)}}

  def step(carry, _):
    return tx.apply(*carry, jax.tree.map(jnp.ones_like, params)), None

  with jax.numpy_dtype_promotion("standard"):
    state = tx.init(params)
    (found, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=70))((params, state))
  assert all((x < 1).all() for x in jax.tree.leaves(found))


def test_the_tables_are_those_of_the_file():
  results = json.loads((DOCS / "confidence.json").read_text(encoding="utf-8"))
  for name, rows in results.items():
    table = re.search(rf"<!-- {name} -->\n(.*?)<!-- end {name} -->", PAGE, re.DOTALL)[1]
    found = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    assert found[0] == list(rows[0])
    for cells, row in zip(found[2:], rows, strict=True):
      for cell, value in zip(cells, row.values(), strict=True):
        if isinstance(value, str):
          assert cell == value
        else:
          np.testing.assert_allclose(float(cell), value, atol=0.0051)
