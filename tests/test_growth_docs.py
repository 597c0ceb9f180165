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


def block(word):
  """The one block of code on the page that has a word."""
  blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
  (found,) = [code for code in blocks if word in code]
  return found


def test_the_page_runs(capsys):
  if "model" not in inspect.signature(nnx.Optimizer.update).parameters:
    pytest.skip("the page is written for Flax 0.11: the optimizer's update takes the model")
  code, names = block("class Net(nnx.Module)"), {"__name__": "page"}
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    exec(code, names)
  printed = capsys.readouterr().out
  assert re.search(r"^fc1/kernel +incoming +4x8 +4x24 +\+64$", printed, re.MULTILINE)
  assert printed.endswith("(4, 24)\n")
  assert type(names["model"]) is names["Net"]


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


def test_a_model_of_one_configuration_grows():
  names = {"__name__": "page", "growth": growth, "jax": jax}
  with nets.relaxed():
    exec(block("class Config"), names)
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
