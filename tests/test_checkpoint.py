"""States on disk: saved in mid-window, restored, and run on bit for bit."""

import flax
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import oracle
import orbax.checkpoint
import pytest
from small_tree import assert_identical
from small_tree import BATCHES
from small_tree import cadence
from small_tree import PARAMS

import optax_cadence as oc

ADAM = oracle.relaxed(optax.adam(0.1))
MASK = {"body": {"bias": 4, "kernel": 2 ** (np.indices((4, 6)).sum(0) % 3)}, "head": 1}
BANDS = {"body": {"bias": 2, "kernel": oc.channels([4, 2, 4, 1])}, "head": 5}
QUARTERS = {"body": {"bias": 2, "kernel": oc.quadrants([[2, 2], [2, 2]])}, "head": 2}
POLICIES = {
  "body": {"bias": 2, "kernel": oc.channels([oc.as_settled(2, 4), oc.until_certain(1.0, 2, 5)])},
  "head": oc.until_certain(1.0, 2, 4),
}
MOVEMENT = {"criterion": oc.pruning.movement(), "inner": ADAM}
HEAD_ALONE = {"body": {"bias": False, "kernel": False}, "head": True}

KINDS = {
  "period 1": cadence(optax.adamw(0.1), 1),
  "pieces": cadence(optax.adamw(0.1)),
  "pieces and skip": cadence(optax.adamw(0.1), nonfinite="skip"),
  "bands": cadence(optax.adamw(0.1), BANDS),
  "mask in one pass": cadence(optax.adam(0.1), MASK),
  "mask as vectors": cadence(optax.lamb(0.1), MASK),
  "mask and skip": cadence(optax.contrib.muon(0.1), MASK, nonfinite="skip"),
  "latest": cadence(optax.adamw(0.1), accumulate="latest", nonfinite="skip"),
  "policies": cadence(optax.adamw(0.1), POLICIES),
  "policies and skip": cadence(optax.adamw(0.1), POLICIES, nonfinite="skip"),
  "schedule": cadence(optax.adamw(0.1), oc.Every(lambda t: 2 + t // 2)),
  # Most groups have no leaf here.
  "masked away": optax.masked(cadence(optax.adamw(0.1), POLICIES, nonfinite="skip"), HEAD_ALONE),
  "noise, masked away": optax.chain(
    optax.masked(oc.noise_scale({"body": 2, "head": 3}), HEAD_ALONE), ADAM
  ),
  "scaled": cadence(optax.chain(optax.adam(0.1), oc.scale_by_cadence())),
  "pruned": optax.chain(cadence(optax.adam(0.1)), oc.prune(0.5, every=2)),
  "pruned, bools": optax.chain(ADAM, oc.prune(0.5, every=2, packed=False)),
  "pruned, memory": oc.prune(0.5, every=2, **MOVEMENT),
  "shocks": oc.prune(0.5, every=2, hold=False, **MOVEMENT),
  "pruned in pieces": cadence(oc.prune(0.5, every=1, **MOVEMENT), QUARTERS, nonfinite="skip"),
}
STOP = 3  # A window of every kind is open here, but for period 1.


def standard(carry, template, path):
  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, carry)
    checkpointer.wait_until_finished()
    return checkpointer.restore(path, template)


def pytree(carry, template, path):
  with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(path, carry)
    how = orbax.checkpoint.checkpoint_utils.construct_restore_args(template)
    return checkpointer.restore(path, item=template, restore_args=how)


def flax_bytes(carry, template, path):
  path.write_bytes(flax.serialization.to_bytes(carry))
  return flax.serialization.from_bytes(template, path.read_bytes())


def flax_dict(carry, template, path):
  return flax.serialization.from_state_dict(template, flax.serialization.to_state_dict(carry))


# What the others hold besides is arranged as in one of these.
OFTEN = {
  "masked away",
  "mask in one pass",
  "period 1",
  "pieces and skip",
  "pruned",
  "scaled",
  "schedule",
  "shocks",
}


@pytest.mark.parametrize(
  "kind", [pytest.param(kind, marks=[pytest.mark.ci] * (kind not in OFTEN)) for kind in KINDS]
)
def test_a_state_saved_in_mid_window_runs_on_bit_for_bit(kind, tmp_path):
  tx = KINDS[kind]

  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  carry = PARAMS, tx.init(PARAMS)
  for grads in BATCHES[:STOP]:
    carry = step(*carry, grads)
  empty = [x.shape for x in jax.tree.leaves(carry) if x.size == 0]
  assert not empty, "checkpoints do not take arrays without entries"
  last = run_on(step, carry)
  for i, save in enumerate((standard, pytree, flax_bytes, flax_dict)):
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    loaded = save(carry, (zeros, tx.init(zeros)), tmp_path / str(i))
    assert_identical(loaded, carry)
    assert_identical(run_on(step, loaded), last)


def test_a_restore_compiles_nothing_if_the_run_began_with_committed_arrays(tmp_path):
  tx = cadence(optax.sgd(0.1), 2)
  for i, put in enumerate((lambda tree: tree, lambda tree: jax.device_put(tree, jax.devices()[0]))):
    step = jax.jit(lambda *carry: tx.apply(*carry))
    fresh = put((PARAMS, tx.init(PARAMS)))
    carry = step(*step(*fresh, BATCHES[0]), BATCHES[1])
    restored = standard(carry, fresh, tmp_path / str(i))
    step(*step(*restored, BATCHES[2]), BATCHES[3])
    assert step._cache_size() == 2 - i


def run_on(step, carry):
  for grads in BATCHES[STOP : STOP + 3]:
    carry = step(*carry, grads)
  return carry


def test_groups_without_leaves_are_left_alone():
  hole = {"bias": optax.MaskedNode(), "kernel": optax.MaskedNode()}
  params, batches = ({**tree, "body": hole} for tree in (PARAMS, BATCHES[0]))
  tx = cadence(optax.adamw(0.1), POLICIES, nonfinite="skip")
  alone = cadence(optax.adamw(0.1), POLICIES["head"], nonfinite="skip")
  start, head = tx.init(params), alone.init(PARAMS["head"])
  carry, other = (params, start), (PARAMS["head"], head)
  for _ in range(3):
    carry = jax.jit(tx.apply)(*carry, batches)
    other = jax.jit(alone.apply)(*other, BATCHES[0]["head"])
  assert_identical(carry[0]["head"], other[0])
  assert_identical(
    jax.jit(tx.flush)(*carry[::-1])[0]["head"], jax.jit(alone.flush)(*other[::-1])[0]
  )
  # Metrics are of regions, and these groups have none.
  assert not [name for name in oc.metrics(carry[1]) if name.startswith("body")]
  for name, group in carry[1].groups.items():
    if not carry[1].regions.names[name]:
      assert group.skipped.shape == () and not group.skipped
      assert_identical(group.confidence, start.groups[name].confidence)
