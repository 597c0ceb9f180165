"""What `import optax_cadence` brings, and what waits until it is used."""

import subprocess
import sys

import pytest

import optax_cadence as oc

WAITING = ("confidence", "conversion", "entrywise", "growth", "pruning", "report")


def test_the_import_brings_what_a_cadence_needs_and_no_more():
  code = f"""
import sys
import optax_cadence as oc
loaded = {{name.split(".")[1] for name in sys.modules if name.startswith("optax_cadence.")}}
assert "_step" in loaded, loaded
assert not loaded & {{*{WAITING}, "_backward", "_training", "linen", "nnx"}}, loaded
oc.convert
assert "optax_cadence.conversion.convert" in sys.modules
assert "flax" not in sys.modules
"""
  subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there():
  names: dict[str, object] = {}
  exec("from optax_cadence import *", names)
  assert len(oc.__all__) > 40
  for name in oc.__all__:
    assert names[name] is getattr(oc, name)
    assert name in dir(oc)
  for name in ("ScaleByCadenceState", "Statistics", "convert", "by_path", "training_step"):
    assert getattr(oc, name).__name__ == name
  with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
    _ = oc.no_such_name
