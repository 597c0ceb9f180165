"""Pruning against obvious NumPy: a full sort, ties to the lower index."""

import inspect
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from flax.training import train_state

import optax_cadence as oc
from optax_cadence import pruning
from optax_cadence.pruning import allocation
from optax_cadence.pruning import packing as bits
from optax_cadence.pruning import selection

SPECIAL = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-40, 1, 1, -1], np.float32)

ADAM = oracle.relaxed(optax.adam(0.1))


def sorted_masks(arrays, kept):
  flat = np.concatenate([np.asarray(a, np.float32).ravel() for a in arrays])
  mask = np.zeros(flat.size, bool)
  mask[np.argsort(-flat, kind="stable")[:kept]] = True
  ends = np.cumsum([a.size for a in arrays])[:-1]
  return [m.reshape(a.shape) for m, a in zip(np.split(mask, ends), arrays, strict=True)]


def by_selection(arrays, kept):
  (found,) = selection.largest([[lambda a=a: selection.order(a) for a in arrays]], [kept])
  return [mask() for mask in found]


SHAPES = [[(7, 9), (5,)], [(0,), (1,)], [(3, 3, 4), (1, 1), (8,)], [(65, 3)]]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shapes", SHAPES)
def test_masks_equal_those_of_a_full_sort(shapes, dtype):
  rng, fn = np.random.default_rng(0), jax.jit(by_selection)
  for _ in range(8):
    half = lambda s: np.where(rng.random(s) < 0.5, rng.choice(SPECIAL, s), rng.integers(-3, 4, s))
    arrays = [jnp.asarray(half(s), dtype) for s in shapes]
    size = sum(a.size for a in arrays)
    for kept in {0, size, size // 3, min(size, 2), max(0, size - 1)}:
      found, expected = fn(arrays, jnp.int32(kept)), sorted_masks(arrays, kept)
      for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_histogram_counts_what_comparisons_count():
  keys = selection.order(jax.random.normal(jax.random.key(0), (50, 7)))
  for low, step in ((-(2**31), 2**27 + 3), (0, 2**26), (5, 1)):
    args = keys, jnp.int32(low), jnp.uint32(step), 24
    np.testing.assert_array_equal(selection._compare(*args), selection._histogram(*args))


def test_the_widest_range_of_keys_takes_seven_passes_or_three():
  # 24**7 > 2**32: the widest range of keys is narrowed to one in seven passes.
  assert selection._CPU_WAYS**7 >= 2**32 > selection._CPU_WAYS**6
  assert selection._GPU_WAYS**3 >= 2**32


@pytest.mark.parametrize("shape", [(16, 3), (3, 8), (3, 3, 5), (7,), (0, 4), (1, 1), ()])
def test_packing_is_undone_and_takes_a_bit_per_weight(shape):
  mask = jnp.asarray(np.random.default_rng(0).random(shape) < 0.5)
  packed = bits.pack(mask)
  assert packed.nbytes == -(-mask.size // 8) and packed.shape == bits.packed_shape(shape)
  np.testing.assert_array_equal(bits.unpack(packed, shape), mask)


@pytest.mark.parametrize("size", [1, 7, 4096, 999_983, 2**24 + 1, 2**31 - 1])
def test_traced_count_is_exact(size):
  for s in (0.0, 1e-3, 0.25, 0.5, 0.9, 1.0):
    share = round(float(np.float32(s)) * 2**24)
    expected = (share * size + 2**23) >> 24
    assert int(allocation.pruned(jnp.float32(s), size)) == expected


@pytest.mark.parametrize("size", [8, 10, 3, 1])
def test_n_of_m_is_exact_in_every_group(size):
  x = np.random.default_rng(1).integers(-3, 4, (5, size)).astype(np.float32)
  tx = oc.prune(every=1, structure=pruning.NM(2, 4))
  params = {"w": jnp.asarray(x)}
  _, state = tx.update(params, tx.init(params), params)
  mask = np.asarray(pruning.masks(params, state)["w"])
  for row, kept in zip(np.abs(x), mask, strict=True):
    for i in range(0, size, 4):
      expected = np.zeros(len(row[i : i + 4]), bool)
      expected[np.argsort(-row[i : i + 4], kind="stable")[:2]] = True
      np.testing.assert_array_equal(kept[i : i + 4], expected)


def test_erk_follows_the_closed_form_and_clips():
  shapes = [(3, 3, 3, 16), (3, 3, 16, 64), (64, 10)]
  found = allocation.erdos_renyi(shapes, 0.7)
  traced = jax.jit(lambda s: jnp.stack(allocation.erdos_renyi(shapes, s)))(0.7)
  sizes, dense = np.array([np.prod(s) for s in shapes]), set()
  factors = np.array([sum(s) / np.prod(s) for s in shapes])
  while True:
    free = [i for i in range(3) if i not in dense]
    kept = 0.3 * sizes.sum() - sum(sizes[i] for i in dense)
    eps = kept / (factors[free] * sizes[free]).sum()
    over = [i for i in free if eps * factors[i] > 1]
    if not over:
      break
    dense.add(max(over, key=lambda i: factors[i]))
  expected = [0.0 if i in dense else 1 - eps * factors[i] for i in range(3)]
  assert dense
  np.testing.assert_allclose(found, expected, atol=1e-9)
  np.testing.assert_allclose(traced, expected, atol=1e-5)


def test_schedules_follow_their_formulas():
  schedule = pruning.cubic(0.9, 10, 110, initial=0.1)
  for t in range(130):
    left = 1 - min(max((t - 10) / 100, 0), 1)
    np.testing.assert_allclose(schedule(t), 0.9 + (0.1 - 0.9) * left**3, rtol=1e-5)
  every = [t for t in range(1, 30) if pruning.Times(4, begin=6, end=20).due(t)]
  assert every == [8, 12, 16, 20]
  assert [t for t in range(1, 30) if pruning.once(7).due(t)] == [7]


def tree(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
  return {"a": {"kernel": draw(16, 8), "bias": draw(8)}, "b": {"kernel": draw(7, 5)}}


def run(tx, steps, params=None):
  params = tree() if params is None else params
  state, update, after = tx.init(params), jax.jit(tx.update), []
  for t in range(steps):
    updates, state = update(tree(t + 1), state, params)
    params = optax.apply_updates(params, updates)
    after.append((params, state))
  return after


def zeros(params):
  return {k: int((params[k]["kernel"] == 0).sum()) for k in params}


@pytest.mark.parametrize("inner", [ADAM, oc.cadence(ADAM, 3)])
@pytest.mark.parametrize("packed", [True, False])
def test_pruned_weights_are_zero_after_every_step(inner, packed):
  tx = optax.chain(inner, oc.prune(0.75, every=5, packed=packed))
  for t, (params, state) in enumerate(run(tx, 60), start=1):
    masks = pruning.masks(params, state)
    for k in "ab":
      assert not params[k]["kernel"][~masks[k]["kernel"]].any()
    expected = {"a": 96, "b": 26} if t >= 5 else {"a": 0, "b": 0}
    assert zeros(params) == expected
  assert params["a"]["bias"].all()


def test_global_allocation_is_exact_in_total():
  tx = oc.prune(0.9, every=1, allocation="global")
  (params, _), *_ = run(tx, 1)
  scores = [np.abs(tree()[k]["kernel"]) for k in "ab"]
  masks = sorted_masks(scores, 163 - round(0.9 * 163))
  for k, mask in zip("ab", masks, strict=True):
    np.testing.assert_array_equal(params[k]["kernel"] != 0, mask)


@pytest.mark.parametrize(
  "regrow", [pruning.by_gradient(stop=50), pruning.at_random(1, fraction=0.3)]
)
def test_regrowth_keeps_sparsity_and_never_regrows_what_it_drops(regrow):
  tx = oc.prune(0.5, every=4, regrow=regrow, inner=optax.sgd(0.1))
  before, moved = None, 0
  for params, state in run(tx, 40):
    masks = {k: np.asarray(m["kernel"]) for k, m in pruning.masks(params, state).items()}
    assert {k: int((~m).sum()) for k, m in masks.items()} == {"a": 64, "b": 18}
    for k in masks if before else ():
      grown, dropped = masks[k] & ~before[k], before[k] & ~masks[k]
      assert grown.sum() == dropped.sum()
      moved += grown.sum()
    before = masks
  assert moved > 100


def test_shock_zeroes_once_and_weights_come_back():
  tx = optax.chain(optax.sgd(0.1), oc.prune(0.5, every=4, hold=False, criterion=pruning.random(0)))
  found = [zeros(params) for params, _ in run(tx, 9)]
  assert [f["a"] for f in found] == [0, 0, 0, 64, 0, 0, 0, 64, 0]


def test_straight_through_leaves_weights_dense():
  tx = optax.chain(optax.sgd(0.1), oc.prune(0.5, every=1, straight_through=True))
  params, state = run(tx, 3)[-1]
  assert zeros(params) == {"a": 0, "b": 0}
  assert zeros(pruning.masked(params, state)) == {"a": 64, "b": 18}
  grads = jax.grad(lambda p: sum(map(jnp.sum, jax.tree.leaves(pruning.masked(p, state)))))(params)
  assert all((g == 1).all() for g in jax.tree.leaves(grads))


def test_moments_are_cleared_through_a_cadence_cut_into_regions():
  cut = {"a": {"kernel": oc.quadrants([[1, 2], [2, 1]]), "bias": 1}, "b": 2}
  inner = oc.cadence(pruning.clear_moments(ADAM), cut)
  tx = optax.chain(inner, oc.prune(0.5, every=2))
  *_, (params, _) = run(tx, 8)
  assert zeros(params) == {"a": 64, "b": 18}
  adam = pruning.clear_moments(ADAM)
  held = {"w": jnp.array([[0.0, 1.0]])}
  state = adam.update({"w": jnp.ones((1, 2))}, adam.init(held), held)[1]
  _, state = adam.update({"w": jnp.zeros((1, 2))}, state, held)
  assert state[0].mu["w"][0, 0] == 0 and state[0].mu["w"][0, 1] != 0


# One line for each of JaxPruner's algorithms: the table of the documentation itself.
DOCS = pathlib.Path(__file__).parents[1] / "docs" / "pruning.md"
ALGORITHMS = dict(re.findall(r"^\| `(\w+)` \| `(.+)` \|$", DOCS.read_text(), re.MULTILINE))


def test_all_eleven_algorithms_are_in_the_table():
  assert len(ALGORITHMS) == 11


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_algorithm_is_one_line(name):
  tx = eval(ALGORITHMS[name], {"oc": oc, "optax": optax, "pruning": pruning})
  params, state = run(tx, 4)[-1]
  if name == "no_prune":
    return
  sparse = zeros(pruning.masked(params, state))
  total = 82 if "global" not in name else round(0.5 * 163)
  assert sum(sparse.values()) == total


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"sparsity": 1.5}, r"a/kernel.*found 1.5"),
    ({"sparsity": -0.1}, r"a/kernel"),
    ({"structure": pruning.NM(5, 4), "sparsity": None}, r"a/kernel.*5 of 4"),
    ({"structure": pruning.NM(2, 4, axis=2), "sparsity": None}, r"a/kernel.*axis 2"),
    ({"structure": pruning.Channel(3)}, r"a/kernel.*axis 3"),
    ({"structure": pruning.Block((3, 3))}, r"a/kernel.*\(3, 3\)"),
    ({"where": lambda path, x: False}, r"a/kernel"),
    ({"sparsity": optax.linear_schedule(0.9, 0.1, 50)}, r"a/kernel.*does not fall"),
    ({"sparsity": {"a": 0.5}}, r"b/kernel"),
  ],
)
def test_bad_input_names_the_leaf(options, match):
  with pytest.raises(ValueError, match=match):
    oc.prune(**({"sparsity": 0.5, "every": 2} | options)).init(tree())


def test_criterion_that_reads_gradients_needs_inner():
  with pytest.raises(ValueError, match="inner"):
    oc.prune(0.5, every=1, criterion="saliency")


def test_vmap_over_sparsities_equals_single_runs():
  def final(s):
    tx, params = oc.prune(s, every=2), tree()
    state = tx.init(params)
    body = lambda c, g: ((lambda u, st: (optax.apply_updates(c[0], u), st))(
      *tx.update(g, c[1], c[0])), None)  # fmt: skip
    grads = jax.tree.map(lambda *x: jnp.stack(x), *[tree(t) for t in range(4)])
    return jax.lax.scan(body, (params, state), grads)[0][0]

  batch = jax.jit(jax.vmap(final))(jnp.array([0.0, 0.25, 1.0]))
  for i, s in enumerate((0.0, 0.25, 1.0)):
    single = final(jnp.float32(s))
    jax.tree.map(lambda b, x, i=i: np.testing.assert_array_equal(b[i], x), batch, single)


def test_nnx_optimizer_and_train_state():
  model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(
    model, optax.chain(optax.sgd(0.1), oc.prune(0.5, every=1)), wrt=nnx.Param
  )
  grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 8))) ** 2))(model)
  # The model became an argument in Flax 0.11.
  takes_model = "model" in inspect.signature(optimizer.update).parameters
  optimizer.update(*[model] * takes_model, grads)
  assert int((model.kernel[...] == 0).sum()) == 32
  tx = optax.chain(optax.sgd(0.1), oc.prune(0.5, every=1))
  state = train_state.TrainState.create(apply_fn=None, params=tree(), tx=tx)
  assert zeros(state.apply_gradients(grads=tree(1)).params) == {"a": 64, "b": 18}


def test_masks_follow_new_shapes():
  params, state = run(oc.prune(0.5, every=pruning.once(1)), 1)[-1]
  pad = lambda x, v: jnp.pad(x, [(0, 3)] * x.ndim, constant_values=v)
  state = pruning.with_masks(
    state, jax.tree.map(lambda m: pad(m, True), pruning.masks(params, state))
  )
  wide = jax.tree.map(lambda p: pad(p, 1.0), params)
  updates, _ = oc.prune(0.5, every=pruning.once(1)).update(wide, state, wide)
  assert zeros(optax.apply_updates(wide, updates)) == {"a": 64, "b": 18}


def test_held_step_copies_no_leaf():
  tx, params = oc.prune(0.5, every=4), {"w": jnp.ones((256, 256))}

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  args = params, tx.init(params), params
  text = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile().as_text()
  assert not [line for line in text.splitlines() if "f32[256,256]" in line and " copy(" in line]


def test_checkpoint_resumes_exactly():
  tx = oc.prune(0.5, every=2, regrow=pruning.at_random(0), inner=optax.sgd(0.1))
  params, state = run(tx, 3)[-1]
  leaves, treedef = jax.tree.flatten((params, state))
  saved = [np.asarray(x) for x in leaves]
  resumed = jax.tree.map(jnp.asarray, jax.tree.unflatten(treedef, saved))
  for t in range(3):
    grads = tree(t)
    for which in ("kept", "resumed"):
      p, s = (params, state) if which == "kept" else resumed
      updates, s = jax.jit(tx.update)(grads, s, p)
      p = optax.apply_updates(p, updates)
      if which == "kept":
        params, state = p, s
      else:
        resumed = p, s
  jax.tree.map(np.testing.assert_array_equal, (params, state), resumed)


SHARDED = """
import re, jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np, optax_cadence as oc
mesh = Mesh(np.array(jax.devices()), ("d",))
params = {f"w{i}": jax.random.normal(jax.random.key(i), (64, 32)) for i in range(3)}
sharded = jax.device_put(params, NamedSharding(mesh, P("d", None)))
tx = oc.prune(0.9, every=2, allocation="global")
update = jax.jit(tx.update)
state = tx.init(sharded)
for _ in range(2):
  updates, state = update(sharded, state, sharded)
other = tx.init(params)
for _ in range(2):
  expected, other = update(params, other, params)
assert all((a == b).all() for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected)))
text = update.lower(sharded, state, sharded).compile().as_text()
for name in ("all-reduce", "all-gather", "all-to-all"):
  print(len(re.findall(rf" {name}(?:-start)?[(]", text)))
"""


def test_global_allocation_gathers_no_sharded_leaf():
  root = pathlib.Path(__file__).parents[1]
  flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", SHARDED],
    cwd=root,
    env=os.environ | flags,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  reduces, gathers, exchanges = map(int, done.stdout.split())
  # A pass of each of the two searches; at most one per leaf where the compiler joins none.
  assert 0 < reduces <= 6
  assert gathers == 0 and exchanges == 0
