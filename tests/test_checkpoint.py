"""States on disk."""

import flax
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import pytest
from small_tree import assert_identical
from small_tree import BATCHES
from small_tree import cadence
from small_tree import PARAMS


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_a_state_saved_in_mid_window_resumes_bit_for_bit(nonfinite):
  tx = cadence(optax.adamw(0.1), nonfinite=nonfinite)
  step = jax.jit(tx.apply)
  steps = [(PARAMS, tx.init(PARAMS))]
  for grads in BATCHES:
    steps.append(step(*steps[-1], grads))
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  for stop in (1, 3, 6):
    saved = flax.serialization.to_bytes(steps[stop])
    loaded = flax.serialization.from_bytes((zeros, tx.init(zeros)), saved)
    assert_identical(loaded, steps[stop])
    for grads in BATCHES[stop:]:
      loaded = step(*loaded, grads)
    assert_identical(loaded, steps[-1])
