"""The code of the page on growth runs as it is printed."""

import inspect
import pathlib
import re

import growth_nets as nets
import jax
import optax
import pytest
from flax import nnx
from flax.training import train_state

from optax_cadence import growth

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "growth.md"


def sections():
  """The blocks of Python below each heading."""
  found, heading, inside = {}, "", False
  for line in PAGE.read_text().splitlines():
    if line.startswith("```"):
      inside = line == "```python"
      if inside:
        found.setdefault(heading, []).append("")
    elif inside:
      found[heading][-1] += line + "\n"
    elif line.startswith("#"):
      heading = line.lstrip("# ")
  return found


BLOCKS = sections()


def block(word):
  """The one block below "Which function" that has a word."""
  (found,) = [code for code in BLOCKS["Which function"] if word in code]
  return found


RECIPES = [
  "New tokens",
  "Heads",
  "Stacking",
  "A mixture of experts",
  "One number in the config",
  "Going back",
  "Which numbers to trust",
]
PRINTED = {
  "New tokens": "gate: none",
  "Heads": "3 (3, 4, 8)",
  "Stacking": "(6, 8, 16)",
  "A mixture of experts": "(4, 8, 16)",
}
new_flax = pytest.mark.skipif(
  not hasattr(nnx, "List"), reason="the page is written for Flax 0.12, which has nnx.List"
)


@pytest.mark.ci
@new_flax
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_run(recipe, capsys):
  (beginning,), code = BLOCKS["Recipes"], "\n".join(BLOCKS[recipe])
  names = {"__name__": "page"}
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    exec(beginning, names)
    exec(code, names)
  assert PRINTED.get(recipe, "") in capsys.readouterr().out
  if "forward" in names:  # of a Linen module, which stays as it was
    expected = names["old"].apply(names["variables"], names["x"])
    nets.close(names["forward"](names["grown"], names["x"]), expected)
  assert not hasattr(names["model"], "alpha") or recipe == "Which numbers to trust"


def test_the_page_runs(capsys):
  if "model" not in inspect.signature(nnx.Optimizer.update).parameters:
    pytest.skip("the page is written for Flax 0.11: the optimizer's update takes the model")
  (code,) = BLOCKS["Growing a network while it trains"]
  names = {"__name__": "page"}
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    exec(code, names)
  printed = capsys.readouterr().out
  assert re.search(r"^fc1/kernel +incoming +4x8 +4x24 +\+64$", printed, re.MULTILINE)
  assert printed.endswith("(4, 24)\n")
  assert type(names["model"]) is names["Net"]


@pytest.mark.ci
def test_a_train_state_follows():
  code = block("state.replace(apply_fn=forward")
  old, new, x = nets.Transformer(), nets.Transformer(hidden=32), nets.TOKENS
  with nets.relaxed():
    state = train_state.TrainState.create(
      apply_fn=old.apply, params=nets.init(old, 0)["params"], tx=optax.adam(1e-2)
    )
    expected = state.apply_fn({"params": state.params}, x)
    names = {**locals(), "growth": growth, "key": jax.random.key(1)}
    exec(code, names)
    state = names["state"]
    nets.close(state.apply_fn({"params": state.params}, x), expected)
    state.apply_gradients(grads=state.params)


@pytest.mark.ci
def test_a_model_of_one_configuration_grows():
  names = {"__name__": "page", "growth": growth, "jax": jax}
  with nets.relaxed():
    exec(block("class Model(nn.Module)"), names)
    nets.close(
      names["forward"](names["grown"], names["x"]),
      names["old"].apply(names["variables"], names["x"]),
    )
    assert "params/up_1/kernel" in str(names["plan"])
    both = names["Model"](names["Config"](width=12, hidden=24))
    named = {"producer": ["params/embed", "params/up_*"], "by": [4, 8]}
    plans = [
      growth.linen.widen(
        names["old"], both, names["variables"], names["x"], fresh=nets.fresh, **told
      )[2]
      for told in (named, {})
    ]
    assert len({frozenset((c.path, c.after) for c in plan.changes) for plan in plans}) == 1
