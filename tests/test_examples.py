"""The examples run to their end and learn; the CIFAR-10 reader reads what the format says."""

import importlib.util
import inspect
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def run(name, *arguments, cwd, optimized=False):
  """What an example prints. Most take so few steps that to optimize them takes longer."""
  command = [sys.executable, EXAMPLES / name, "--quick", *arguments]
  env = {"JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(not optimized))} | os.environ
  done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def layer_cadence():
  spec = importlib.util.spec_from_file_location("layer_cadence", EXAMPLES / "layer_cadence.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def cifar10(tmp_path):
  """A folder in CIFAR-10's binary format, and the arrays that it was written from."""
  rng = np.random.default_rng(0)
  written = {}
  for name, n in [("data_batch_1.bin", 12), ("data_batch_2.bin", 20), ("test_batch.bin", 6)]:
    images = rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, n, np.uint8)
    planes = images.transpose(0, 3, 1, 2).reshape(n, -1)
    np.concatenate([labels[:, None], planes], axis=1).tofile(tmp_path / name)
    written[name] = images, labels
  (tmp_path / "batches.meta.txt").write_text("airplane\n")
  return tmp_path, written


def test_cifar10_is_read_as_written(layer_cadence, cifar10):
  folder, written = cifar10
  (images, labels), test = layer_cadence.load_cifar10(folder)
  first, second = written["data_batch_1.bin"], written["data_batch_2.bin"]
  np.testing.assert_array_equal(images, np.concatenate([first[0], second[0]]))
  np.testing.assert_array_equal(labels, np.concatenate([first[1], second[1]]))
  np.testing.assert_array_equal(test[0], written["test_batch.bin"][0])
  np.testing.assert_array_equal(test[1], written["test_batch.bin"][1])
  assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


def test_cifar10_without_its_folder(layer_cadence, tmp_path):
  with pytest.raises(ValueError, match=r"nowhere: expected a folder .* found none"):
    layer_cadence.load_cifar10(tmp_path / "nowhere")


@pytest.mark.parametrize("missing", ["data_batch_*.bin", "test_batch.bin"])
def test_cifar10_without_a_file(layer_cadence, cifar10, missing):
  folder, _ = cifar10
  for path in folder.glob(missing):
    path.unlink()
  expected = f"expected {re.escape(missing)} .* found batches.meta.txt"
  with pytest.raises(ValueError, match=expected):
    layer_cadence.load_cifar10(folder)


@pytest.mark.parametrize("size", [0, 3072, 3 * 3073 + 1])
def test_cifar10_truncated(layer_cadence, cifar10, size):
  folder, _ = cifar10
  path = folder / "data_batch_2.bin"
  path.write_bytes(bytes(size))
  with pytest.raises(ValueError, match=rf"data_batch_2.bin: expected whole .* found {size} bytes"):
    layer_cadence.load_cifar10(folder)


def test_cifar10_with_other_labels(layer_cadence, cifar10):
  folder, _ = cifar10
  (folder / "test_batch.bin").write_bytes(bytes([10]) + bytes(3072))
  with pytest.raises(ValueError, match=r"test_batch.bin: expected labels from 0 to 9, found 10"):
    layer_cadence.load_cifar10(folder)


@pytest.mark.ci
def test_layer_cadence_on_the_digits(layer_cadence, tmp_path):
  printed = run("layer_cadence.py", "--out", "made/score.png", cwd=tmp_path)
  picture = (tmp_path / "made" / "score.png").read_bytes()
  assert picture.startswith(b"\x89PNG\r\n\x1a\n")
  assert len(picture) > 20_000
  # 404 micro-steps: 50 whole windows of 8, and the flush of the half one that is left.
  updates = {
    "uniform": ["101"] * 4,
    "fast output": ["51", "101", "202", "404"],
    "fast input": ["404", "202", "101", "51"],
    "quadrants": ["101", "101", "404 202 101 51", "101"],
  }
  for name in layer_cadence.CADENCES:
    row = re.search(rf"^{name}  .*$", printed, re.MULTILINE)
    assert row, printed
    _, accuracy, _, *counts, seen = re.split(r"\s{2,}", row.group().strip())
    assert float(accuracy.split(" ± ")[0]) > 85
    assert counts == updates[name]
    assert seen == "404"


@pytest.mark.ci
def test_layer_cadence_on_cifar10(cifar10, tmp_path):
  folder, _ = cifar10
  printed = run("layer_cadence.py", "--data", folder, "--steps", "8", cwd=tmp_path)
  assert "32 training and 6 test images of (32, 32, 3)" in printed
  assert (tmp_path / "results" / "layer_cadence.png").exists()


@pytest.mark.ci
def test_linen_cadence(tmp_path):
  printed = run("linen_cadence.py", cwd=tmp_path)
  assert float(re.search(r"test accuracy after \d+ micro-steps: ([\d.]+)", printed)[1]) > 0.85


@pytest.mark.ci
@pytest.mark.parametrize(
  ("name", "says"), [("grow.py", r"filters 3x3 to 5x5"), ("continuous_kernels.py", r"10 x 10")]
)
def test_the_examples_of_growth_run(name, says, tmp_path):
  if "model" not in inspect.signature(nnx.Optimizer.update).parameters:
    pytest.skip("these examples need Flax 0.11: the optimizer's update takes the model since then")
  assert re.search(says, run(name, "--out", "picture.png", cwd=tmp_path))
  assert (tmp_path / "picture.png").exists()


@pytest.mark.ci
def test_prune_and_shock(tmp_path):
  printed = run("prune_and_shock.py", "--out", "made/shock.png", cwd=tmp_path)
  assert (tmp_path / "made" / "shock.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
  zeros = {
    name: float(re.search(rf"^{name}  .*? ([\d.]+)$", printed, re.MULTILINE)[1])
    for name in ("dense", "pruned every epoch", "shock, magnitude", "shock, random", "RigL")
  }
  assert zeros["dense"] == 0 and zeros["pruned every epoch"] == zeros["RigL"] == 90
  # All but the weights of pixels that are blank in every image have come back.
  assert zeros["shock, magnitude"] < 10 and zeros["shock, random"] < 10
  # By fill: the first task, the last one, the change, no interval of one seed, and dead units.
  tasks = {name: [] for name in ("no shock", "zero", "init", "shrink")}
  for name in tasks:
    row = re.search(rf"^{name}  .*$", printed, re.MULTILINE).group().removeprefix(name)
    tasks[name] = list(map(float, row.split()))
    assert len(tasks[name]) == 6 and min(tasks[name][:2]) > 85
  # The first task comes before any shock, and zeros leave the most dead units.
  assert len({tuple(x[::4]) for x in tasks.values()}) == 1
  assert max(tasks, key=lambda name: tasks[name][5]) == "zero"


@pytest.mark.ci
@pytest.mark.parametrize("policy", ["certain", "late", "patient"])
def test_confidence(policy, tmp_path):
  printed = run(
    "confidence.py", "--policy", policy, "--out", "made.png", cwd=tmp_path, optimized=True
  )
  assert float(re.search(r"test accuracy ([\d.]+)", printed)[1]) > 0.9
  rows = re.findall(r"^ *\d+ +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
  assert len(rows) == 10
  if policy == "late":
    assert rows[0] == ("4", "4", "4", "4")
    assert rows[-1] == ("16", "8", "4", "2")
    # 640 micro-steps at period 4, then 640 at 16, 8, 4 and 2.
    assert re.search(r"^updates +200 +240 +320 +480$", printed, re.MULTILINE)
  assert (tmp_path / "made.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.ci
def test_from_multisteps(tmp_path):
  if "model" not in inspect.signature(nnx.Optimizer.update).parameters:
    pytest.skip("this example needs Flax 0.11: the optimizer's update takes the model since then")
  printed = run("multisteps_to_cadence.py", cwd=tmp_path, optimized=True)
  diff, before, after = re.split(r"\n(?:before|after):\n", printed)
  assert 0 < len(re.findall(r"^- ", diff, re.MULTILINE)) <= 5
  assert 0 < len(re.findall(r"^\+ ", diff, re.MULTILINE)) <= 5
  for lines in (before, after):
    assert len(re.findall(r"update +\d", lines)) == 4
    assert "resumed in the middle of a window: the same parameters" in lines
  losses = [re.findall(r"loss(?: of the average)? ([\d.]+)", lines) for lines in (before, after)]
  assert len(losses[0]) == 5
  # They add up in another order, and compute in bfloat16.
  np.testing.assert_allclose(*(list(map(float, x)) for x in losses), rtol=1e-2)
