"""What a cadence does not use is not on the way of its micro-steps: which modules a call passes."""

import os
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_cadence as oc

ONE_PERIOD = {"_cadence", "_control", "_paths", "_state", "_step", "_window", "regions/layout"}


def modules_of(every, **settings):
  """The modules of the package that functions lie in which a traced `apply` calls."""
  params = {"w": jnp.ones((8, 8))}
  tx = oc.cadence(optax.sgd(0.1, momentum=0.9), every, **settings)
  state, root, found = tx.init(params), os.path.dirname(oc.__file__) + os.sep, set()

  def look(frame, event, _):
    file = frame.f_code.co_filename
    if event == "call" and file.startswith(root):
      found.add(file.removeprefix(root).removesuffix(".py").replace(os.sep, "/"))

  before = sys.getprofile()
  sys.setprofile(look)
  try:
    jax.make_jaxpr(tx.apply)(params, state, params)
  finally:
    sys.setprofile(before)
  return found


def test_one_period_passes_few_modules():
  assert modules_of(4) == ONE_PERIOD


def test_quadrants_pass_their_cuts_besides():
  quadrants = oc.quadrants([[1, 2], [4, 8]])
  assert modules_of(quadrants) == ONE_PERIOD | {"regions/cuts", "regions/grids"}


@pytest.mark.parametrize(
  ("every", "settings", "adds"),
  [
    (4, {"nonfinite": "skip"}, "_weights"),
    (4, {"clip_norm": 1.0}, "_clipping"),
    (4, {"clock": "micro_steps"}, "_clocks"),
    (oc.until_certain(1.0, 2, 8), {}, "confidence/deciding"),
    (oc.Every(lambda _: 4), {}, "schedules/every"),
  ],
  ids=["skip", "clip_norm", "clock", "policy", "schedule"],
)
def test_what_a_cadence_uses_adds_itself(every, settings, adds):
  found = modules_of(every, **settings)
  assert found > ONE_PERIOD
  assert adds in found
