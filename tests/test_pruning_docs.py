"""What `docs/pruning.md` promises under "How to choose": its rows, run as they are written."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cadence as oc
from optax_cadence import pruning

pytestmark = pytest.mark.ci

DOCS = (pathlib.Path(__file__).parents[1] / "docs" / "pruning.md").read_text()
ROWS = dict(re.findall(r"^\| (.+?) \| `(oc\.prune.+|optax\.chain.+)` \|$", DOCS, re.MULTILINE))

STEPS = {"begin": 2, "end": 8, "epoch": 2, "step": 6}


def draw(*shape, seed):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) / shape[-2], jnp.float32)


PARAMS = {
  "attention": {
    "query": {"kernel": draw(8, 2, 4, seed=0)},
    "out": {"kernel": draw(2, 4, 8, seed=1)},
  },
  "blocks": {"kernel": draw(3, 8, 8, seed=2) * jnp.array([1.0, 3.0, 9.0])[:, None, None]},
  "table": draw(5, 8, seed=3),
  "head": {"kernel": draw(8, 12, seed=4), "bias": jnp.zeros(12)},
}
X = jnp.arange(5)


def fn(p, ids):
  x = p["table"][ids]
  heads = jnp.einsum("bd,dhk->bhk", x, p["attention"]["query"]["kernel"])
  x = x + jnp.einsum("bhk,hkd->bd", heads, p["attention"]["out"]["kernel"])
  x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["blocks"]["kernel"])
  return x @ p["head"]["kernel"] + p["head"]["bias"][None]


def loss(p):
  return jnp.mean((fn(p, X) - jnp.eye(5, 12)) ** 2)


def trained(row, steps=12):
  """The parameters after each step, and the last state, of the program in a row."""
  names = {"oc": oc, "optax": optax, "pruning": pruning, "fn": fn, "params": PARAMS, "x": X}
  names |= {"attention": lambda path, x: path.startswith("attention/out")} | STEPS
  names["others"] = lambda path, x: path.startswith("head/kernel")
  tx = optax.chain(optax.sgd(0.01), eval(ROWS[row], names))
  params, state, update, after = PARAMS, tx.init(PARAMS), jax.jit(tx.update), []
  for _ in range(steps):
    updates, state = update(jax.grad(loss)(params), state, params)
    params = optax.apply_updates(params, updates)
    after.append(params)
  return after, state


def sparsity(x):
  return float((x == 0).mean())


def groups(x, axes):
  """How many weights of each group of four are not zero."""
  rows = np.moveaxis(np.asarray(x) != 0, axes, range(-len(axes), 0))
  return rows.reshape(-1, 4).sum(1)


def test_little_by_little():
  after, _ = trained("a network that ends sparse, pruned little by little")
  found = [sparsity(params["head"]["kernel"]) for params in after]
  assert found[0] == 0 and sorted(found) == found and len(set(found)) >= 4
  assert round(found[-1] * 96) == round(0.9 * 96)


def test_one_cut_and_then_training_with_what_is_left():
  after, _ = trained("one cut, and then training with what is left")
  found = [round(sparsity(params["head"]["kernel"]) * 96) for params in after]
  assert found == [0] * 5 + [86] * 7
  assert loss(after[-1]) < loss(after[5])


def test_two_of_four_along_what_products_sum_over():
  row = "the 2:4 pattern that some hardware is fast with"
  params = trained(row, 2)[0][-1]
  assert (groups(params["attention"]["query"]["kernel"], (0,)) == 2).all()
  assert (groups(params["attention"]["out"]["kernel"], (0, 1)) == 2).all()
  assert (groups(params["blocks"]["kernel"], (1,)) == 2).all()
  assert (groups(params["head"]["kernel"], (0,)) == 2).all()


def test_two_of_four_through_three_of_four():
  after, _ = trained("the same, reached through 3:4")
  found = [set(groups(params["head"]["kernel"], (0,)).tolist()) for params in after]
  # Masks are due every second micro-step.
  assert found[0] == {4} and {3} in found and found[-1] == {2}
  assert all(len(kept) == 1 for kept in found)


def test_whole_channels():
  after, _ = trained("whole channels, which [`growth`](growth.md) can remove", 7)
  zero = np.asarray(after[-1]["head"]["kernel"] == 0)
  assert zero.all(0).sum() == 6 and zero.any(0).sum() == 6


@pytest.mark.parametrize(
  "name", ["one budget for all leaves", "a budget for each leaf by its shape"]
)
def test_one_budget(name):
  after, state = trained(name, 2)
  found = pruning.summary(after[-1], state)
  assert found.size == 64 + 64 + 192 + 40 + 96 and abs(found.sparsity - 0.9) < 0.01
  shares = {round(leaf.zeros / leaf.size, 3) for leaf in found.pruned.values()}
  assert len(shares) > 1


def test_exactly_the_kernels_and_layers_by_themselves():
  after, state = trained("exactly the kernels, and layers that are stacked each by itself", 2)
  assert "table" in PARAMS and pruning.prunable("table", PARAMS["table"])
  pruned = set(pruning.summary(after[-1], state).pruned)
  layers = {"blocks/kernel", "head/kernel", "attention/query/kernel", "attention/out/kernel"}
  assert pruned == layers
  # The weights of the last layer are the largest, and yet as many of it go.
  zeros = (np.asarray(after[-1]["blocks"]["kernel"]) == 0).sum((1, 2))
  assert zeros.tolist() == [58, 58, 58]


def test_another_structure_in_other_leaves():
  after, state = trained("another structure in other leaves", 2)
  masks = pruning.masks(after[-1], state)
  assert (groups(masks["attention"]["out"]["kernel"], (1,)) == 2).all()
  assert round((1 - masks["head"]["kernel"].mean()) * 96) == 86
  assert pruning.summary(after[-1], state).stray == 0
  assert masks["blocks"]["kernel"].all()


def test_evaluation_parameters_are_evaluated_under_the_masks():
  """The section on the summary: an average, and schedule-free, both with masks that come late."""
  tx = optax.contrib.schedule_free(
    optax.chain(optax.sgd(0.1), oc.prune(0.75, every=pruning.once(4))), 0.1, b1=0.9
  )
  params, update = PARAMS, jax.jit(tx.update)
  state = tx.init(params)
  for _ in range(6):
    updates, state = update(jax.grad(loss)(params), state, params)
    params = optax.apply_updates(params, updates)
  dense = optax.contrib.schedule_free_eval_params(state, params)
  assert pruning.summary(dense, state).stray > 0
  sparse = pruning.masked(dense, state)
  found = pruning.summary(sparse, state)
  assert found.stray == 0 and abs(found.sparsity - 0.75) < 0.01
