"""Moves a training script from `optax.MultiSteps` to `oc.cadence`: before, after, and the diff.

A byte-level transformer in NNX as people train one: gradients clipped, AdamW, a cosine schedule,
computing in bfloat16, an average of the parameters, logs, and an Orbax checkpoint, here in the
middle of a window.
"""

import argparse
import difflib
import functools
import inspect
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
from flax import nnx

import optax_cadence as oc

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
QUICK = parser.parse_args().quick
WIDTH, LAYERS, ROWS, LENGTH = (32, 2, 2, 32) if QUICK else (192, 6, 4, 64)
UPDATES, EVERY = (4, 8) if QUICK else (20, 8)


def before(model, inner):
  tx = optax.MultiSteps(inner, EVERY)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit(donate_argnames=("model", "optimizer"))
  def micro_step(model, optimizer, batch):
    value, grads = nnx.value_and_grad(loss)(model, batch)
    optimizer.update(model, grads)
    return value, optimizer.opt_state.mini_step[...] == 0

  return optimizer, micro_step


def after(model, inner):
  tx = oc.cadence(inner, EVERY)
  optimizer = oc.nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit(donate_argnames=("model", "optimizer"))
  def micro_step(model, optimizer, batch):
    value = optimizer.training_step(model, loss, batch)
    return value, optimizer.has_updated()[str(EVERY)]

  return optimizer, micro_step


class Block(nnx.Module):
  def __init__(self, rngs):
    linear = functools.partial(nnx.Linear, dtype=jnp.bfloat16, rngs=rngs)
    self.norm, self.other_norm = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
    self.qkv, self.out = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
    self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

  def __call__(self, h):
    qkv = self.qkv(self.norm(h)).reshape(*h.shape[:-1], 3, 4, WIDTH // 4)
    heads = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, -3, 0), is_causal=True)
    h += self.out(heads.reshape(h.shape))
    return h + self.down(nnx.gelu(self.up(self.other_norm(h))))


class Transformer(nnx.Module):
  def __init__(self, rngs):
    embed = functools.partial(nnx.Embed, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
    self.bytes, self.places = embed(256, WIDTH), embed(LENGTH, WIDTH)
    self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.blocks = nnx.split_rngs(splits=LAYERS)(nnx.vmap(Block))(rngs)

  def __call__(self, tokens):
    h = self.bytes(tokens) + self.places(jnp.arange(tokens.shape[-1]))
    run = nnx.scan(lambda block, h: block(h), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    return self.bytes.attend(self.norm(run(self.blocks, h)))


def loss(model, tokens):
  logits = model(tokens[:, :-1]).astype(jnp.float32)
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def params_of(model):
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def train(setup):
  model = Transformer(nnx.Rngs(0))
  schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, UPDATES // 4, UPDATES)
  inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
  optimizer, micro_step = setup(model, inner)
  average_of = jax.jit(lambda new, old: optax.incremental_update(new, old, 0.1))
  average = jax.tree.map(jnp.copy, params_of(model))
  middle, updates, done = EVERY * UPDATES // 2 + EVERY // 2, 0, 0
  with tempfile.TemporaryDirectory() as folder:
    path, seconds = pathlib.Path(folder) / "state", []
    while done < EVERY * UPDATES:
      start = time.perf_counter()
      value, updated = jax.block_until_ready(micro_step(model, optimizer, batch(done)))
      seconds.append(time.perf_counter() - start)
      done += 1
      if updated:
        average, updates = average_of(params_of(model), average), updates + 1
        if updates % (UPDATES // 4) == 0:
          print(f"  update {updates:3d}  loss {value:.3f}  rate {schedule(updates):.1e}")
      if done == middle:
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
          checkpointer.save(path, nnx.state((model, optimizer)))
    # What goes on from the checkpoint arrives where the run did.
    last, expected = [batch(t) for t in range(middle, done)], params_of(model)
    structure, target = nnx.split((model, optimizer))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
      model, optimizer = nnx.merge(structure, checkpointer.restore(path, target))
    for tokens in last:
      micro_step(model, optimizer, tokens)
  same = all(map(np.array_equal, jax.tree.leaves(params_of(model)), jax.tree.leaves(expected)))
  nnx.update(model, nnx.State(average))
  print(f"  loss of the average {nnx.jit(loss)(model, held_out):.3f}")
  print(f"  resumed in the middle of a window: {'the same' if same else 'other'} parameters")
  print(f"  {1e3 * np.median(seconds):.1f} ms per micro-step of {ROWS * LENGTH} tokens")


text = np.frombuffer(pathlib.Path(argparse.__file__).read_bytes(), np.uint8).astype(np.int32)


def batch(seed, rows=ROWS):
  starts = np.random.default_rng(seed).integers(0, len(text) - LENGTH - 1, rows)
  return jnp.asarray(np.stack([text[i : i + LENGTH + 1] for i in starts]))


held_out = batch(-1 % 2**32, 16 * ROWS)
lines = [inspect.getsource(setup).splitlines()[1:] for setup in (before, after)]
changes = [x for x in difflib.ndiff(*lines) if x.startswith(("-", "+"))]
print("\n".join(changes))
for setup in (before, after):
  print(f"\n{setup.__name__}:")
  train(setup)
