"""Programs for `test_sharding`, each run by itself on eight devices of the CPU.

`python tests/on_devices.py PROGRAM [NAMES]`: all that it checks, or what is named. A line is
printed for each thing checked, and one for each that is wrong.
"""

import contextlib
import functools
import hashlib
import re
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_cadence as oc

SHAPE = (8, 8, 16)
MASK = np.random.default_rng(0).choice([1, 2], SHAPE)
# Cut along the axis that is sharded (axis 1), on and across the boundaries of shards, and others.
EVERY = {
  "1": 1,
  "2": 2,
  "other axis": oc.channels([1, 2], axis=2),
  "shards": oc.channels([1, 2, 1, 2, 1, 2, 1, 2], axis=1),
  "bands": oc.channels([1, 2, 4], axis=1),
  "rectangles": oc.quadrants([[1, 2], [2, 4]], axes=(1, 2)),
  "layers": oc.stacked([1, 2] * 4),
  "mask": MASK,
  "offset": oc.Every(4, 3),
  "schedule": oc.Every(lambda t: 1 + t // 3),
  "certain": oc.until_certain(1.0, 1, 4),
  "settled": oc.as_settled(1, 4),
}
CHOSEN = sys.argv[2:]
WAYS = {"": {}, " skip": {"nonfinite": "skip"}, " latest": {"accumulate": "latest"}}


def configurations(every=EVERY):
  """Every kind of region with every treatment of gradients, and entries that are coupled."""
  for name, cadences in every.items():
    for way, options in WAYS.items():
      if way == " latest" and name in ("certain", "settled"):
        continue
      if not CHOSEN or name + way in CHOSEN:
        yield name + way, oc.cadence(oracle.relaxed(optax.adam(0.1)), cadences, **options)
  for name in ("bands", "mask"):
    if not CHOSEN or f"{name} coupled" in CHOSEN:
      yield f"{name} coupled", oc.cadence(oracle.relaxed(optax.lamb(0.1)), every[name])


def explicit():
  kind = (jax.sharding.AxisType.Explicit,)
  return jax.make_mesh((8,), ("x",), axis_types=kind)


def automatic():
  return jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


def types(tree):
  return list(map(jax.typeof, jax.tree.leaves(tree)))


def placed(avals):
  """What types say but for the mesh, of which scalars know nothing while they are traced."""
  return [(x.shape, x.dtype, x.weak_type, x.sharding.spec) for x in avals]


def gradients():
  rng = np.random.default_rng(1)
  return jnp.asarray(rng.integers(-8, 9, (5, *SHAPE)) / 8.0, jnp.float32)


def trained(tx, params, grads):
  """Parameters by `update` and by `apply`, each in one scan over the micro-steps."""

  def update(carry, g):
    updates, state = tx.update(g, carry[1], carry[0])
    return (optax.apply_updates(carry[0], updates), state), None

  def apply(carry, g):
    return tx.apply(*carry, g), None

  start = params, tx.init(params)
  return jax.lax.scan(update, start, grads)[0], jax.lax.scan(apply, start, grads)[0]


def differences(found, expected):
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
  return [1 for x, y in pairs if not np.allclose(x, y, rtol=2e-5, atol=2e-5, equal_nan=True)]


def optimizers():
  """What Optax asks of the state of its own optimizers, of every one of them in a cadence."""
  import optax_exports  # computes arguments

  sharding = NamedSharding(explicit(), P(None, "x"))
  kinds = {"2": 2, "bands": oc.channels([1, 2], axis=2), "mask": MASK}
  exported = sorted(set(optax_exports.exported()) - set(optax_exports.EXCLUDED))
  for name in CHOSEN or exported:
    for kind, every in kinds.items():
      with jax.set_mesh(sharding.mesh):
        params = jnp.zeros(SHAPE, jnp.float16, out_sharding=sharding)
        plain = optax.with_extra_args_support(optax_exports.build(name))
        extra = optax_exports.EXTRA_ARGS.get(name, {})
        try:
          plain.init(jax.ShapeDtypeStruct(SHAPE, jnp.float16))
          state = plain.init(params)
          if types(plain.update(params, state, params, **extra)[1]) != types(state):
            raise TypeError("the types change")
        except Exception as error:
          print("not in Optax:", name, type(error).__name__)
          continue
        tx = oc.cadence(plain, every)
        tx.init(jax.ShapeDtypeStruct(SHAPE, jnp.float16))
        state = tx.init(params)
        _, new = tx.update(params, state, params, **extra)
        # Tracing settles how arrays lie. That such programs compile and run is seen in `scans`.
        compiled = jax.jit(tx.init).trace(params).jaxpr.out_avals
        update = jax.jit(lambda g, s, p, fn=tx.update, extra=extra: fn(g, s, p, **extra)[1])
        stepped = update.trace(params, state, params).jaxpr.out_avals
        found = {"update": types(new), "jit of init": compiled, "jit of update": stepped}
        for what, there in found.items():
          if placed(there) != placed(types(state)):
            print("wrong:", name, kind, what)
        print("checked", name, kind)


def scans():
  """A scan over micro-steps on a mesh with explicit axes gives what it gives on one device."""
  sharding = NamedSharding(explicit(), P(None, "x"))
  params, grads = jnp.ones(SHAPE), gradients()
  # Its state does not lie as its parameters do, but what it makes of it does.
  moving = optax.GradientTransformation(lambda p: jnp.zeros(SHAPE), lambda g, s, p: (s - g, g))
  more = [("moving", oc.cadence(moving, 2))]
  for name, tx in [*configurations(), *(x for x in more if not CHOSEN or x[0] in CHOSEN)]:
    expected = jax.jit(lambda p, g, tx=tx: trained(tx, p, g))(params, grads)
    with jax.set_mesh(sharding.mesh):
      there = jax.device_put(params, sharding)
      theirs = jax.device_put(grads, NamedSharding(sharding.mesh, P(None, None, "x")))
      found = jax.jit(lambda p, g, tx=tx: trained(tx, p, g))(there, theirs)
      eager = tx.update(theirs[0], tx.init(there), there)
      compiled = jax.jit(lambda p, g, tx=tx: tx.update(g, tx.init(p), p))(there, theirs[0])
    if differences(found, expected) or types(eager) != types(compiled):
      print("wrong:", name)
    print("checked", name)


def shard_maps():
  """A scan in `shard_map` trains every shard by itself."""
  mesh = automatic()
  params, grads = jnp.ones(SHAPE), gradients()
  shape = (SHAPE[0] // 8, *SHAPE[1:])
  mask = np.random.default_rng(0).choice([1, 2], shape)
  every = EVERY | {"mask": mask, "layers": 2, "rectangles": oc.quadrants([[1, 2], [2, 4]])}
  for name, tx in configurations(every):
    fn = lambda p, g, tx=tx: tuple(p for p, _ in trained(tx, p, g))
    specs = P("x"), P(None, "x")
    found = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=P("x")))(params, grads)
    for i in (0, 7):
      alone = jax.jit(fn)(params[i : i + 1], grads[:, i : i + 1])
      if differences([x[i : i + 1] for x in found], alone):
        print("wrong:", name)
    print("checked", name)


def training_steps():
  """A training step on meshes and in `shard_map` gives what it gives on one device."""

  def loss(params, x):
    turn = lambda h, w: (jnp.tanh(h * w[None]), None)
    return jnp.mean(jax.lax.scan(turn, x, params)[0] ** 2)

  def train(tx, params, batches, loss=loss):
    step = oc.training_step(loss, tx)
    turn = lambda carry, x: (lambda p, s, v: ((p, s), v))(*step(*carry, x))
    (params, _), values = jax.lax.scan(turn, (params, tx.init(params)), batches)
    return params, values

  params = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16)), jnp.float32)
  batches = jnp.asarray(np.random.default_rng(1).normal(size=(5, 8, 16)), jnp.float32)
  mean_of_all = lambda params, x: jax.lax.pmean(loss(params, x), "x")
  for name, options in WAYS.items():
    tx = oc.cadence(oracle.relaxed(optax.adam(0.1)), 2, **options)
    expected = jax.jit(functools.partial(train, tx))(params, batches)
    found = {}
    for kind, mesh in (("automatic", automatic()), ("explicit", explicit())):
      for axis, spec in (("rows", P(None, "x")), ("columns", P(None, None, "x"))):
        if (kind, axis) == ("explicit", "rows"):
          continue  # JAX itself has no gradient of it
        with jax.set_mesh(mesh):
          there = NamedSharding(mesh, P() if axis == "rows" else P(None, "x"))
          given = jax.device_put(params, there), jax.device_put(batches, NamedSharding(mesh, spec))
          found[f"{kind}, {axis}"] = jax.jit(functools.partial(train, tx))(*given)
    fn = functools.partial(train, tx, loss=mean_of_all)
    mapped = jax.shard_map(fn, mesh=automatic(), in_specs=(P(), P(None, "x")), out_specs=P())
    found["shard_map"] = jax.jit(mapped)(params, batches)
    for kind, results in found.items():
      if differences(results, expected):
        print("wrong:", kind, name)
      print("checked", kind, name)


def weights():
  """Micro-batches of different numbers of tokens on each device: the mean of all their tokens."""
  mesh, rng = automatic(), np.random.default_rng(0)
  params = {"a": jnp.ones(3), "b": jnp.ones((4, 3))}
  tokens = jnp.asarray(rng.normal(size=(4, 8, 5, 3)), jnp.float32)  # micro-steps, devices, tokens
  seen = jnp.asarray(rng.integers(0, 2, (4, 8, 5)), jnp.float32).at[2].set(0)  # none in one

  def loss(params, x, seen):
    return ((params["a"] + params["b"].sum(0)) * x * seen[..., None]).sum()

  def run(tx, params, gradient):
    state = tx.init(params)
    for t in range(4):
      grads, weight = gradient(params, tokens[t], seen[t])
      updates, state = tx.update(grads, state, params, weight=weight)
      params = optax.apply_updates(params, updates)
    return params

  def of_all(params, x, seen):
    total = seen.sum()
    return jax.tree.map(lambda g: g / total, jax.grad(loss)(params, x, seen)), total

  def in_shard_map(tx, params, tokens, seen):
    state = tx.init(params)
    for t in range(4):
      # The gradient of what all devices have in common is that of the sum of their losses.
      total = jax.lax.psum(seen[t].sum(), "x")
      grads = jax.grad(lambda p, t=t, total=total: loss(p, tokens[t], seen[t]) / total)(params)
      updates, state = tx.update(grads, state, params, weight=seen[t].sum())
      params = optax.apply_updates(params, updates)
    return params

  for name, every in {"one": 2, "parts": {"a": 1, "b": oc.channels([1, 4])}}.items():
    tx = oc.cadence(optax.sgd(0.1), every, weighted=True)
    expected = jax.jit(functools.partial(run, tx, gradient=of_all))(params)
    fn = jax.shard_map(
      functools.partial(in_shard_map, tx),
      mesh=mesh,
      in_specs=(P(), P(None, "x"), P(None, "x")),
      out_specs=P(),
    )
    if differences(jax.jit(fn)(params, tokens, seen), expected):
      print("wrong: shard_map", name)
    print("checked shard_map", name)
    sharded = jax.device_put((tokens, seen), NamedSharding(mesh, P(None, "x")))

    def jitted(params, tokens, seen, tx=tx):
      state = tx.init(params)
      for t in range(4):
        grads, weight = of_all(params, tokens[t], seen[t])
        updates, state = tx.update(grads, state, params, weight=weight)
        params = optax.apply_updates(params, updates)
      return params

    if differences(jax.jit(jitted)(params, *sharded), expected):
      print("wrong: sharded", name)
    print("checked sharded", name)


def pruning():
  """Pruning on meshes gives what it gives on one device, in `shard_map` what it gives a shard."""
  where, adam = lambda path, x: x.ndim > 1, optax.adam(0.1)
  ways = {
    "held": optax.chain(adam, oc.prune(0.5, every=2, where=where)),
    "bools": optax.chain(adam, oc.prune(0.5, every=2, where=where, packed=False)),
    "movement": oc.prune(0.5, every=2, where=where, criterion=oc.pruning.movement(), inner=adam),
    "regrown": oc.prune(
      0.5, every=2, where=where, regrow=oc.pruning.by_gradient(stop=9), inner=adam
    ),
    "shocks": oc.prune(0.5, every=2, where=where, hold=False, fill="init", inner=adam),
    "NM": optax.chain(adam, oc.prune(every=2, where=where, structure=oc.pruning.NM(2, 4))),
    "in a cadence": oc.cadence(oc.prune(0.5, every=1, where=where, inner=adam), 2),
  }
  rng = np.random.default_rng(0)
  # Of the bytes of masks as many as there are shards, fewer, and none that stand for one axis.
  shapes = {"a": (64, 3), "b": (8, 16), "c": (5, 8, 3), "d": (5,)}
  specs = {"a": P("x"), "b": P("x"), "c": P(None, "x"), "d": P()}
  params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
  grads = {k: jnp.asarray(rng.normal(size=(5, *s)), jnp.float32) for k, s in shapes.items()}

  def train(tx, params, grads):
    def turn(carry, g):
      updates, state = tx.update(g, carry[1], carry[0])
      return (optax.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(turn, (params, tx.init(params)), grads)[0][0]

  for name, tx in ways.items():
    if CHOSEN and name not in CHOSEN:
      continue
    tx = oracle.relaxed(tx)
    fn = functools.partial(train, tx)
    expected = jax.jit(fn)(params, grads)
    for kind, mesh in (("automatic", automatic()), ("explicit", explicit())):
      with jax.set_mesh(mesh):
        there = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
        theirs = {k: NamedSharding(mesh, P(None, *spec)) for k, spec in specs.items()}
        given = jax.device_put(params, there), jax.device_put(grads, theirs)
        if differences(jax.jit(fn)(*given), expected):
          print("wrong:", kind, name)
        for x in jax.tree.leaves(tx.init(given[0])):
          if x.size >= 64 and x.sharding.is_fully_replicated:
            print("wrong:", kind, name, "lies whole", x.shape)
      print("checked", kind, name)
    alone = {k: params[k] for k in "ab"}, {k: grads[k] for k in "ab"}
    mapped = jax.shard_map(fn, mesh=automatic(), in_specs=(P("x"), P(None, "x")), out_specs=P("x"))
    found = jax.tree.map(lambda x: x[: len(x) // 8], jax.jit(mapped)(*alone))
    shard = [
      jax.tree.map(lambda x, a=a: x.take(jnp.arange(x.shape[a] // 8), a), tree)
      for a, tree in enumerate(alone)
    ]
    if differences(found, jax.jit(fn)(*shard)):
      print("wrong: shard_map", name)
    print("checked shard_map", name)


def conversions():
  """A converted state holds what it holds on one device, and lies as one that `init` makes."""
  adam = oracle.relaxed(optax.adam(0.1))
  old = oc.cadence(adam, {"a": oc.stacked([1, 2, 2, 1] * 2), "b": 1})
  params = {"a": jnp.ones(SHAPE), "b": jnp.ones(16)}
  specs = {"a": P(None, "x"), "b": P("x")}
  for name, every in {"whole": 2, "bands": {"a": oc.channels([1, 2], axis=1), "b": 2}}.items():
    to, results = oc.cadence(adam, every), []
    for mesh in (None, automatic(), explicit()):
      with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        given = params
        if mesh is not None:
          given = jax.device_put(params, {k: NamedSharding(mesh, s) for k, s in specs.items()})
        state = old.init(given)
        for _ in range(2):
          _, state = jax.jit(old.update)(given, state, given)
        results.append(oc.convert(state, old, given, to=to, counters="most"))
        pairs = zip(*map(jax.tree.leaves, (results[-1], to.init(given))), strict=True)
        if mesh is not None and any(
          x.ndim and not x.sharding.is_equivalent_to(like.sharding, x.ndim) for x, like in pairs
        ):
          print("wrong: lies elsewhere", name)
      if differences(results[-1], results[0]):
        print("wrong:", name)
      print("checked", name)


def refused():
  """What is said where shards cannot agree."""
  tx = oc.prune(0.5, every=1, allocation="global", where=lambda path, x: True)
  params = {"a": jnp.ones((8, 4)), "b": jnp.ones((8, 4))}
  specs = {"a": P("x"), "b": P()}
  fn = lambda p: tx.update(p, tx.init(p), p)[0]
  try:
    jax.jit(jax.shard_map(fn, mesh=automatic(), in_specs=(specs,), out_specs=specs))(params)
  except ValueError as error:
    print(error)


def text():
  """A hash of a program with sums over several axes."""
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  tx, params = oc.cadence(optax.sgd(0.1), 2, weighted=True, skip=lambda g, p: False), jnp.ones(3)

  def fn(params, weight):
    return tx.update(params, tx.init(params), params, weight=weight[0, 0])[0]

  mapped = jax.shard_map(fn, mesh=mesh, in_specs=(P(), P("data", "model")), out_specs=P())
  lowered = jax.jit(mapped).lower(params, jnp.ones((4, 2)))
  print(hashlib.md5(lowered.as_text().encode()).hexdigest())


def eager():
  """A state that is made without `jit` lies where its parameters lie."""
  sharding = NamedSharding(automatic(), P(None, "x"))
  params = jax.device_put(jnp.ones(SHAPE), sharding)
  for name, tx in configurations():
    for x in jax.tree.leaves(tx.init(params)):
      if x.size >= params.size // 8 and len(x.sharding.device_set) < 8:
        print("wrong:", name, x.shape)
    print("checked", name)


def collectives():
  """How many collectives a micro-step compiles to, for leaves sharded along axis 1."""
  sharding = NamedSharding(automatic(), P(None, "x"))
  params = jax.device_put(jnp.ones(SHAPE), sharding)
  for name in ("2", "other axis", "layers", "shards", "bands", "rectangles", "mask"):
    tx = oc.cadence(oracle.relaxed(optax.adam(0.1)), EVERY[name])
    state = jax.jit(tx.init)(params)
    program = jax.jit(tx.apply, donate_argnums=(0, 1)).lower(params, state, params).compile()
    kinds = re.findall(r" (all-[a-z]+|collective-[a-z]+)(?:-start)?\(", program.as_text())
    print(f"{name}: {len(kinds)}")


if __name__ == "__main__":
  warnings.simplefilter("ignore")
  # After the import of the library: nothing has started a backend.
  jax.config.update("jax_num_cpu_devices", 8)
  globals()[sys.argv[1]]()
