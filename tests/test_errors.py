"""Bad input: always a `ValueError`, with the path, what was found and what was expected."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import optax_cadence as oc

SGD = optax.sgd(1.0)
PARAMS = {"blk": {"b": jnp.ones(6), "w": jnp.ones((4, 6))}, "head": jnp.ones(3)}


def check(call, *parts, without=()):
  """The call raises a `ValueError` whose message holds all parts, in any order."""
  with pytest.raises(ValueError) as caught:  # noqa: PT011
    call()
  message = str(caught.value)
  assert all(part in message for part in parts), message
  assert not any(part in message for part in without), message
  return message


def table(cases):
  return pytest.mark.parametrize(("make", "parts"), cases.values(), ids=list(cases))


def under_vmap(make, axis):
  """What `make` does with a traced argument."""
  return lambda: jax.vmap(make)(axis)


# Cadences that are wrong whatever the parameters are.


@table(
  {
    "period 0": (lambda: oc.Every(0), ["period", "at least 1", "found 0"]),
    "negative period": (lambda: oc.Every(-3), ["period", "at least 1", "found -3"]),
    "period True": (lambda: oc.Every(True), ["period", "integer", "found True"]),
    "period 1.5": (lambda: oc.Every(1.5), ["period", "integer", "found 1.5"]),
    "period in quotes": (lambda: oc.Every("8"), ["period", "integer", "found '8'"]),
    "period None": (lambda: oc.Every(None), ["period", "integer", "found None"]),
    "nested Every": (lambda: oc.Every(oc.Every(2)), ["period", "integer", "found Every("]),
    "grid as period": (lambda: oc.Every(oc.channels([1, 2])), ["period", "found Grid("]),
    "period of JAX below 1": (lambda: oc.Every(jnp.int32(0)), ["period", "at least 1", "found 0"]),
    "period of JAX True": (lambda: oc.Every(jnp.bool_(True)), ["period", "integer", "True"]),
    "period of JAX in floats": (lambda: oc.Every(jnp.float32(2)), ["period", "integer", "float32"]),
    "period beyond int32": (lambda: oc.Every(2**31), ["period", "at most", "int32", "2147483648"]),
    "list of periods": (lambda: oc.Every([1, 2]), ["period", "integer", "[1, 2]", "oc.channels"]),
    "offset of the period": (
      lambda: oc.Every(8, offset=8),
      ["offset", "at least 0", "below the period 8", "found 8"],
    ),
    "negative offset": (
      lambda: oc.Every(8, offset=-1),
      ["offset", "at least 0", "below the period 8", "found -1"],
    ),
    "offset True": (lambda: oc.Every(8, offset=True), ["offset", "integer", "found True"]),
    "offset 1.5": (lambda: oc.Every(8, offset=1.5), ["offset", "integer", "found 1.5"]),
    "offset of a schedule": (
      lambda: oc.Every(lambda t: 2, offset=1),
      ["offset", "integer period", "found 1"],
    ),
    "offset of a traced period": (
      under_vmap(lambda k: oc.Every(k, offset=1).period, jnp.arange(1, 3)),
      ["offset", "integer period", "found 1"],
    ),
    "traced period in floats": (
      under_vmap(lambda k: oc.Every(k).period, jnp.ones(2)),
      ["period", "integer", "float32"],
    ),
  }
)
def test_every(make, parts):
  check(make, *parts)


@table(
  {
    "axis twice": (lambda: oc.Grid([[1, 2], [1, 2]], (0, 0)), ["axes", "distinct", "(0, 0)"]),
    "no axis": (lambda: oc.Grid([1], ()), ["axes", "at least one", "()"]),
    "axes not in a sequence": (lambda: oc.Grid([1, 2], 0), ["axes", "found 0"]),
    "axes None": (lambda: oc.Grid([1, 2], None), ["axes", "found None"]),
    "axis 1.5": (lambda: oc.channels([1, 2], axis=1.5), ["ax", "integer", "1.5"]),
    "axis True": (lambda: oc.channels([1, 2], axis=True), ["ax", "integer", "True"]),
    "axis by name": (lambda: oc.channels([1, 2], axis="out"), ["ax", "integer", "'out'"]),
    "no periods": (lambda: oc.channels([]), ["periods", "non-empty", "found []"]),
    "periods not in a sequence": (lambda: oc.channels(3), ["periods", "sequence", "found 3"]),
    "periods in quotes": (lambda: oc.channels("12"), ["periods", "sequence", "found '12'"]),
    "ragged": (lambda: oc.Grid([[1, 2], [1]], (0, 1)), ["ragged", "expected 2", "found [1]"]),
    "ragged in depth": (lambda: oc.Grid([[1, 2], 3], (0, 1)), ["ragged", "expected 2", "found 3"]),
    "nested too deep": (lambda: oc.channels([[1, 2]]), ["deep", "axes", "[1, 2]"]),
    "not nested deep enough": (lambda: oc.Grid([1, 2], (0, 1)), ["2 deep", "axis", "found [1, 2]"]),
    "quadrants of six": (
      lambda: oc.quadrants([[1, 2, 3], [1, 2, 3]]),
      ["two rows of two", "found shape (2, 3)", "Grid"],
    ),
    "quadrants in a row": (lambda: oc.quadrants([1, 2]), ["2 deep", "found [1, 2]"]),
    "quadrants of three axes": (
      lambda: oc.quadrants([[1, 2], [4, 8]], axes=(0, 1, 2)),
      ["3 deep", "found [[1, 2], [4, 8]]"],
    ),
  }
)
def test_grid(make, parts):
  check(make, *parts)


# Cadences of a leaf: the path is named, whether `every` is a tree or a function.

MASK = np.ones((4, 6), np.int32)
PERIOD = ["integer", "schedule"]


@table(
  {
    "period 0": (0, ["at least 1", "found 0"]),
    "negative period": (-1, ["at least 1", "found -1"]),
    "period of NumPy below 1": (np.int32(0), ["at least 1", "found 0"]),
    "period of JAX below 1": (jnp.int32(0), ["at least 1", "found 0"]),
    "period True": (True, [*PERIOD, "found True"]),
    "period of NumPy True": (np.True_, [*PERIOD, "found", "True"]),
    "period 1.5": (1.5, [*PERIOD, "found 1.5"]),
    "period in quotes": ("8", [*PERIOD, "found '8'"]),
    "period beyond int32": (2**31, ["at most 2147483647", "found 2147483648"]),
    "cell beyond int32": (oc.channels([1, 2**40]), ["at most 2147483647", f"found {2**40}"]),
    "cells beyond int32": (oc.channels(np.array([1, 2**40])), ["at most", f"found {2**40}"]),
    "mask beyond int32": (MASK * np.int64(2**31), ["at most 2147483647", "found 2147483648"]),
    "mask of uint64": (
      MASK.astype(np.uint64) * np.uint64(2**63),
      ["at most 2147483647", f"found {2**63}"],
    ),
    "no such axis": (oc.channels([1, 2], axis=2), ["(4, 6)", "axis 2", "2 axes"]),
    "no such axis from the end": (oc.channels([1, 2], axis=-3), ["(4, 6)", "axis -3", "2 axes"]),
    "axis twice": (oc.Grid([[1, 2], [1, 2]], (1, -1)), ["(4, 6)", "(1, -1)", "twice"]),
    "finer than the axis": (oc.channels([1] * 7), ["(4, 6)", "7 bands", "axis 1", "6 entries"]),
    "too few layers": (oc.stacked([1, 2]), ["(4, 6)", "4 layers", "found 2"]),
    "too many layers": (oc.stacked([1] * 5), ["(4, 6)", "4 layers", "found 5"]),
    "one layer for all": (oc.stacked([2]), ["(4, 6)", "4 layers", "found 1"]),
    "cell 0": (oc.channels([1, 0]), ["at least 1", "found 0"]),
    "cell True": (oc.quadrants([[1, 2], [True, 4]]), [*PERIOD, "found True"]),
    "cell that is a grid": (oc.channels([1, oc.channels([1, 2])]), [*PERIOD, "found Grid("]),
    "cells in floats": (oc.channels(np.array([1.5, 2.0])), [*PERIOD, "found", "1.5"]),
    "mask in floats": (MASK * 1.5, ["mask", "integer", "float64"]),
    "mask of NaN": (MASK * np.nan, ["mask", "integer", "float64"]),
    "mask of booleans": (MASK > 0, ["mask", "integer", "bool"]),
    "mask of complex numbers": (MASK * 1j, ["mask", "integer", "complex128"]),
    "mask of strings": (MASK.astype(str), ["mask", "integer", "<U"]),
    "mask of objects": (np.array([1, None] * 3, object), ["mask", "integer", "object"]),
    "mask of another shape": (MASK[:, :5], ["mask", "broadcast", "(4, 6)", "found shape (4, 5)"]),
    "mask of a higher rank": (MASK[None], ["mask", "broadcast", "(4, 6)", "found shape (1, 4, 6)"]),
    "mask with a 0": (MASK * np.arange(6), ["at least 1", "found 0"]),
    "mask with a negative entry": (MASK - 2, ["at least 1", "found -1"]),
  }
)
@pytest.mark.parametrize("how", ["tree", "callable", "by_path"])
def test_cadence_of_a_leaf(make, parts, how):
  tree = {"blk": {"b": 1, "w": make}, "head": 2}
  every = {
    "tree": tree,
    "callable": lambda params: tree,
    "by_path": oc.by_path({"*/w": make, "*": 2}),
  }
  check(lambda: oc.cadence(SGD, every[how]).init(PARAMS), "'blk/w'", *parts)


def test_a_malformed_period_is_an_error_at_construction():
  check(lambda: oc.cadence(SGD, {"blk": 2, "head": oc.channels([1, 0])}), "'head'", "found 0")


@pytest.mark.parametrize("how", ["tree", "callable"])
def test_a_traced_mask(how):
  def make(mask):
    every = {"blk": {"b": 1, "w": mask}, "head": 2}
    return oc.cadence(SGD, every if how == "tree" else lambda params: every).init(PARAMS)

  check(under_vmap(make, jnp.ones((2, 4, 6), int)), "'blk/w'", "mask", "traced", "NumPy")


@pytest.mark.parametrize("cadence", [oc.channels([1, 2]), oc.stacked([1]), np.array([1, 2])])
def test_a_scalar_leaf_cannot_be_cut(cadence):
  tx = oc.cadence(SGD, {"s": cadence})
  check(lambda: tx.init({"s": jnp.float32(1)}), "'s'", "shape ()")


@pytest.mark.parametrize("cadence", [0, 1.5, "8", oc.channels([1, 0])])
def test_one_cadence_for_the_whole_tree_has_no_empty_name(cadence):
  check(lambda: oc.cadence(SGD, cadence).init(PARAMS), "found", without=["''"])


@table(
  {
    "shape": (lambda t: jnp.ones(2, int), ["scalar", "shape (2,)"]),
    "None": (lambda t: None, ["found None"]),
    "string": (lambda t: "8", ["found '8'"]),
  }
)
@pytest.mark.parametrize("wrap", [lambda fn: fn, oc.Every, lambda fn: oc.channels([1, fn])])
def test_a_schedule_that_returns_no_period(make, parts, wrap):
  tx = oc.cadence(SGD, {"blk": 1, "head": wrap(make)})
  check(lambda: tx.init(PARAMS), "'head'", "period", *parts)


# Trees that do not match.


@table(
  {
    "missing leaf": ({"blk": {"w": 1}, "head": 1}, ["'blk/b'", "prefix", "'blk/w', 'head'"]),
    "missing subtree": ({"head": 1}, ["'blk/b'", "prefix", "'head'"]),
    "one more": (
      {"blk": 1, "head": 1, "tail": 2},
      ["'tail'", "no parameter", "'blk/b', 'blk/w', 'head'"],
    ),
    "another name": ({"block": 1, "head": 1}, ["'blk/b'", "'block', 'head'"]),
    "deeper than the parameters": ({"blk": 1, "head": {"w": 1}}, ["'head'", "'blk', 'head/w'"]),
    "list for a dict": ([1, 2], ["'blk/b'", "prefix", "'0', '1'", "oc.channels"]),
    "list for periods": (
      {"blk": {"b": 1, "w": [1, 2]}, "head": 1},
      ["'blk/w'", "'blk/w/0'", "oc.channels"],
    ),
    "tuple for an offset": ({"blk": (8, 3), "head": 1}, ["'blk/b'", "oc.Every(period, offset)"]),
    "list from by_path": (oc.by_path({"blk/w": [1, 2]}, 1), ["'blk/w'", "oc.channels"]),
    "list from late": (oc.late(4, {"blk": [1, 2], "head": 1}), ["'blk/b'", "oc.channels"]),
    "None for a cadence": ({"blk": None, "head": 1}, ["'blk/b'", "found cadences for 'head'"]),
    "nothing": ({}, ["'blk/b'", "prefix", "nothing"]),
  }
)
@pytest.mark.parametrize("how", ["tree", "callable"])
def test_every_that_does_not_match_the_parameters(make, parts, how):
  every = make if how == "tree" or callable(make) else lambda params: make
  check(lambda: oc.cadence(SGD, every).init(PARAMS), *parts)


def test_a_list_is_a_part_of_a_tree_that_has_lists():
  tx = oc.cadence(SGD, {"blk": [1, (2, 4)]})
  params = {"blk": [jnp.ones(2), (jnp.ones(3), jnp.ones(4))]}
  assert tx.init(params).regions.names == {"1": ["blk/0"], "2": ["blk/1/0"], "4": ["blk/1/1"]}
  check(lambda: tx.init({"blk": [jnp.ones(2)]}), "'blk/1/0'", without=["oc.channels"])
  message = check(lambda: oc.cadence(SGD, [1, 2]).init(jnp.ones(2)), "oc.channels", without=["''"])
  assert "the parameter" in message


BEYOND = {
  "late begin": lambda n: oc.late(n, 2),
  "late before": lambda n: oc.late(1, 2, before=n),
  "ramp end": lambda n: oc.ramp(1, n, 2),
  "policy": lambda n: oc.until_certain(1.0, 1, n),
  "late": lambda n: oc.cadence(SGD, oc.late(1, {"w": n})).init({"w": jnp.ones(2)}),
  "noise_scale": lambda n: oc.noise_scale(n).init(jnp.ones(2)),
}


@pytest.mark.parametrize("call", BEYOND.values(), ids=BEYOND)
def test_no_count_is_beyond_int32(call):
  call(2**31 - 1)
  check(lambda: call(2**31), "at most 2147483647", "found 2147483648")


@table(
  {
    "leaf without a match": (oc.by_path({"blk": 1}), ["'head'", "no default", "'blk'"]),
    "misspelled": (oc.by_path({"haed": 1}, default=2), ["'haed'", "no parameter", "'head'"]),
  }
)
def test_by_path(make, parts):
  check(lambda: oc.cadence(SGD, make).init(PARAMS), "by_path", *parts)


def test_a_bare_schedule_says_how_it_is_written():
  tx = oc.cadence(SGD, optax.linear_schedule(1, 8, 100))
  check(lambda: tx.init(PARAMS), "function of the parameters", "Every(schedule)")


@pytest.mark.parametrize("dtype", ["bool", "complex64"])
def test_a_schedule_that_returns_no_number(dtype):
  tx = oc.cadence(SGD, {"blk": 1, "head": lambda t: jnp.ones((), dtype)})
  check(lambda: tx.init(PARAMS), "'head'", "number", f"found dtype {dtype}")


def test_a_long_list_of_paths_is_cut_short():
  params = {f"layer{i:02}": jnp.ones(2) for i in range(50)}
  message = check(lambda: oc.cadence(SGD, {"other": 2}).init(params), "'layer00'", "'other'")
  assert len(message) < 300
  every = dict.fromkeys(params, 2) | {"other": 2}
  message = check(lambda: oc.cadence(SGD, every).init(params), "'other'", "'layer00'", "…")
  assert len(message) < 300


# Settings.


@table(
  {
    "accumulate": ({"accumulate": "max"}, ["'mean'", "'sum'", "'latest'", "found 'max'"]),
    "accumulate None": ({"accumulate": None}, ["accumulate", "'mean'", "found None"]),
    "nonfinite": ({"nonfinite": "raise"}, ["'propagate'", "'skip'", "found 'raise'"]),
    "clock": ({"clock": "steps"}, ["'updates'", "'micro_steps'", "found 'steps'"]),
    "accumulator_dtype int": ({"accumulator_dtype": jnp.int32}, ["float", "found", "int32"]),
    "accumulator_dtype complex": ({"accumulator_dtype": jnp.complex64}, ["float", "complex64"]),
    "accumulator_dtype unknown": ({"accumulator_dtype": "float23"}, ["float", "found 'float23'"]),
    "accumulator_dtype 32": ({"accumulator_dtype": 32}, ["float", "found 32"]),
  }
)
def test_settings(make, parts):
  check(lambda: oc.cadence(SGD, 2, **make), *make, *parts)


@pytest.mark.parametrize(
  "inner", [optax.adam, None, 3, lambda grads: grads, tuple(SGD), [SGD], {"a": SGD}]
)
def test_inner_that_is_no_transformation(inner):
  check(lambda: oc.cadence(inner, 2), "inner", "GradientTransformation", "found")


CADENCE = oc.cadence(SGD, 2)


@table(
  {
    "nothing": ([], ["last", "found None"]),
    "optimizer last": ([CADENCE, SGD], ["last", "cadence", "found GradientTransformation"]),
    "optax.chain last": (
      [optax.chain(CADENCE)],
      ["last", "cadence", "found GradientTransformation"],
    ),
    "number first": ([3, CADENCE], ["GradientTransformation", "found 3"]),
    "not called": ([optax.adam, CADENCE], ["GradientTransformation", "found <function adam"]),
  }
)
def test_chain(make, parts):
  check(lambda: oc.chain(*make), "chain", *parts)


@pytest.mark.parametrize(
  "tx", [SGD, optax.chain(CADENCE), None, 2], ids=["optimizer", "optax.chain", "None", "number"]
)
@pytest.mark.parametrize(
  "call",
  [
    lambda tx: oc.describe(tx, PARAMS),
    lambda tx: oc.plot_score(tx, PARAMS, 4),
    lambda tx: oc.trainable(PARAMS, tx, 0),
  ],
  ids=["describe", "plot_score", "trainable"],
)
def test_functions_of_a_cadence(call, tx):
  check(lambda: call(tx), "cadence", "oc.chain", "found")


LARGE = {"blk": {"w": jnp.full((3, 4), 0.625)}, "head": np.full(5, 0.625), "lr": 0.5}


@pytest.mark.parametrize(
  ("call", "order"),
  [
    (lambda x: oc.describe(x, CADENCE), "oc.describe(tx, params)"),
    (lambda x: oc.plot_score(x, CADENCE, 4), "oc.plot_score(tx, params, steps)"),
    (lambda x: oc.trainable(CADENCE, x, 0), "oc.trainable(params, tx, phase)"),
    (lambda x: oc.cadence(x, 2), "inner"),
    (lambda x: oc.cadence(SGD, 2, nonfinite=x), "nonfinite"),
    (lambda x: oc.cadence(SGD, 2, accumulator_dtype=x), "accumulator_dtype"),
    (lambda x: oc.cadence(SGD, oc.Every(x)), "period"),
    (lambda x: oc.cadence(SGD, oc.Every(8, offset=x)), "offset"),
    (lambda x: oc.chain(SGD, x), "chain"),
    (lambda x: oc.chain(x, CADENCE), "chain"),
    (oc.channels, "periods"),
    (lambda x: oc.Grid([1, 2], x), "axes"),
    (lambda x: oc.by_path([x]), "by_path"),
    (lambda x: oc.by_depth([0, 1], output=x), "by_depth"),
    (oc.each_layer, "each_layer"),
    (lambda x: oc.until_certain(1.0, 1, x), "max_period"),
    (lambda x: oc.until_certain(x, 1, 2), "snr"),
    (oc.metrics, "cadence"),
    (lambda x: CADENCE.update(x, x), "state"),
    (lambda x: CADENCE.flush(x, x), "state"),
  ],
)
def test_no_error_prints_parameters(call, order):
  message = check(lambda: call(LARGE), order, "found", without=["0.625", "Array", "array("])
  assert len(message) < 400


def test_a_period_that_is_traced_only_afterwards():
  make = lambda every: oc.cadence(SGD, every)
  state = make(jnp.int32(2)).init(PARAMS)
  step = jax.jit(lambda every: make(every).update(PARAMS, state, PARAMS))
  check(lambda: step(2), "state", "'traced'", "'2'", "Every(lambda _: period)")


def test_cycle_of_a_function_of_the_parameters_is_asked_with_them():
  tx = oc.cadence(SGD, lambda params: 2)
  tx.init(PARAMS)
  check(lambda: tx.cycle, "cycle", "describe(tx, params)")
  assert oc.describe(tx, PARAMS).cycle == 2


def test_tree_map_params_of_noise_scale_needs_windows_that_are_known_without_parameters():
  every = lambda params: {"blk": 2, "head": 3}
  tx = oc.noise_scale(every)
  state = tx.init(PARAMS)
  check(lambda: optax.tree_utils.tree_map_params(tx, lambda x: x, state), "noise_scale", "lambda")
  same = optax.tree_utils.tree_map_params(oc.noise_scale(every(PARAMS)), lambda x: x, state)
  assert jax.tree.structure(same) == jax.tree.structure(state)
  assert same.regions == state.regions


# Phases.

METHODS = {
  "update": lambda tx, phase: tx.update(PARAMS, tx.init(PARAMS), PARAMS, phase=phase),
  "apply": lambda tx, phase: tx.apply(PARAMS, tx.init(PARAMS), PARAMS, phase=phase),
  "trainable": lambda tx, phase: oc.trainable(PARAMS, tx, phase),
}
LATEST = oc.cadence(SGD, {"blk": 4, "head": 2}, accumulate="latest")
MEAN = oc.cadence(SGD, {"blk": 4, "head": 2})


@pytest.mark.parametrize("call", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("tx", [LATEST, MEAN, oc.chain(LATEST)], ids=["latest", "mean", "chain"])
@pytest.mark.parametrize(
  ("phase", "parts"),
  [
    (-1, ["at least 0", "below 4", "found -1"]),
    (4, ["at least 0", "below 4", "found 4"]),
    (True, ["integer", "found True"]),
    (1.0, ["integer", "found 1.0"]),
    ("1", ["integer", "found '1'"]),
  ],
)
def test_phase(call, tx, phase, parts):
  check(lambda: call(tx, phase), "phase", *parts)


@pytest.mark.parametrize("call", METHODS.values(), ids=METHODS)
def test_phase_that_is_traced(call):
  check(lambda: jax.jit(lambda p: call(LATEST, p))(1), "phase", "Python int", "static_argnames")


@pytest.mark.parametrize("call", METHODS.values(), ids=METHODS)
def test_phase_without_a_cycle(call):
  scheduled = oc.cadence(SGD, oc.Every(lambda t: 2), accumulate="latest")
  check(lambda: call(scheduled, 0), "phase", "schedule")
  traced = lambda k: call(oc.cadence(SGD, k, accumulate="latest"), 0)
  check(under_vmap(traced, jnp.arange(1, 3)), "phase", "traced")


def test_trainable_needs_a_phase():
  check(lambda: oc.trainable(PARAMS, LATEST, None), "phase", "found None")


# Gradients, parameters and states of different trees.

EVERIES = {"2": 2, "1": 1, "tree": {"blk": {"b": 2, "w": oc.channels([1, 2])}, "head": 1}}
WRONG_GRADS = {
  "another shape": (PARAMS | {"head": jnp.ones(4)}, ["'head'", "(3,)", "(4,)"]),
  "another rank": (PARAMS | {"head": jnp.ones((3, 1))}, ["'head'", "(3,)", "(3, 1)"]),
  "one less": ({"blk": PARAMS["blk"]}, ["'head'", "(3,)", "nothing"]),
  "None for a leaf": (PARAMS | {"head": None}, ["'head'", "(3,)", "nothing"]),
  "one more": (PARAMS | {"tail": jnp.ones(2)}, ["'tail'", "(2,)", "nothing"]),
  "another name": ({"blk": PARAMS["blk"], "tail": jnp.ones(3)}, ["'head'", "(3,)", "nothing"]),
}


@pytest.mark.parametrize("every", EVERIES.values(), ids=EVERIES)
@pytest.mark.parametrize("method", ["update", "apply"])
@table(WRONG_GRADS)
def test_gradients_of_another_tree_than_the_parameters(make, parts, method, every):
  tx = oc.cadence(SGD, every)
  state = tx.init(PARAMS)
  call = {
    "update": lambda: tx.update(make, state, PARAMS),
    "apply": lambda: tx.apply(PARAMS, state, make),
  }
  check(call[method], "gradient", *parts, without=["zip()"])


@pytest.mark.parametrize(("grads", "parts"), WRONG_GRADS.values(), ids=list(WRONG_GRADS))
def test_gradients_of_another_tree_than_the_state_where_no_parameters_are_given(grads, parts):
  tx = oc.cadence(SGD, 2)
  state = tx.init(PARAMS)
  message = check(lambda: tx.update(grads, state), without=["zip()", "pytree"])
  # Which path is at fault is open where one leaf is called by another name.
  assert "head'" in message or "tail'" in message


OTHER = {
  "shape": (PARAMS | {"head": jnp.ones(4)}, ["head'"]),
  "less": ({"blk": PARAMS["blk"]}, ["head'"]),
  "more": (PARAMS | {"tail": jnp.ones(2)}, ["tail'"]),
  "name": ({"blk": PARAMS["blk"], "tail": jnp.ones(3)}, []),
}


@pytest.mark.parametrize("every", [1, 2])
@table(OTHER)
def test_a_state_of_another_tree(make, parts, every):
  tx = oc.cadence(oracle.relaxed(optax.adam(0.1)), every)
  state = tx.init(PARAMS)
  calls = [lambda: tx.update(make, state, make), lambda: tx.apply(make, state, make)]
  calls += [lambda: tx.flush(state, make)] if every == 2 else []
  for call in calls:
    message = check(call, *parts, without=["zip()", "pytree", "Dict key"])
    assert "init" in message or "state" in message


@table(
  {
    "more groups": ({"blk": 2, "head": 4}, ["state", "cadences"]),
    "other groups": ({"blk": 1, "head": 1}, ["state", "cadences"]),
  }
)
def test_a_state_of_other_cadences(make, parts):
  state = oc.cadence(SGD, 2).init(PARAMS)
  check(lambda: oc.cadence(SGD, make).update(PARAMS, state, PARAMS), "state", *parts)


def test_a_state_whose_periods_changed_places():
  state = oc.cadence(SGD, {"blk": 2, "head": 1}).init(PARAMS)
  tx = oc.cadence(SGD, {"blk": 1, "head": 2})
  check(lambda: tx.update(PARAMS, state, PARAMS), "state", "cadences")


@pytest.mark.parametrize("kwargs", [{"accumulate": "latest"}, {"nonfinite": "skip"}])
def test_a_state_of_other_settings(kwargs):
  state = oc.cadence(SGD, 2).init(PARAMS)
  tx = oc.cadence(SGD, 2, **kwargs)
  check(lambda: tx.update(PARAMS, state, PARAMS), "state")


CHAIN = oc.chain(optax.clip(1.0), CADENCE)


NOT_A_STATE = {
  "empty tuple": (CADENCE, ()),
  "None": (CADENCE, None),
  "state of the inner optimizer": (CADENCE, SGD.init(PARAMS)),
  "state of a chain": (CADENCE, CHAIN.init(PARAMS)),
  "gradients": (CADENCE, PARAMS),
  "state of a cadence, for a chain": (CHAIN, CADENCE.init(PARAMS)),
  "state of another chain": (CHAIN, oc.chain(CADENCE).init(PARAMS)),
}


@pytest.mark.parametrize(("tx", "state"), NOT_A_STATE.values(), ids=list(NOT_A_STATE))
def test_what_is_no_state(tx, state):
  check(lambda: tx.update(PARAMS, state, PARAMS), "state", "expected", "found")
  check(lambda: tx.apply(PARAMS, state, PARAMS), "state", "expected", "found")
  check(lambda: tx.flush(state, PARAMS), "state", "expected", "found")


def unused_loss(params, x):
  raise AssertionError("the loss is traced before the state is looked at")


# What stands first is a state with integers in it, which as gradients would be refused as such.
@pytest.mark.parametrize("tx", [CADENCE, CHAIN], ids=["cadence", "chain"])
@pytest.mark.parametrize(
  "call",
  [
    lambda tx, state: tx.update(state, PARAMS, PARAMS),
    lambda tx, state: tx.apply(state, PARAMS, PARAMS),
    lambda tx, state: tx.flush(PARAMS, state),
    lambda tx, state: oc.training_step(unused_loss, tx)(state, PARAMS, 1.0),
  ],
  ids=["update", "apply", "flush", "training_step"],
)
def test_arguments_that_changed_places(call, tx):
  check(lambda: call(tx, tx.init(PARAMS)), "state", "expected", "found", "dict", without=["float0"])


@pytest.mark.parametrize("tx", [CADENCE, oc.chain(CADENCE)], ids=["cadence", "chain"])
def test_apply_and_flush_need_parameters(tx):
  state = tx.init(PARAMS)
  if isinstance(state, tuple):
    check(lambda: tx.apply(None, state, PARAMS), "param", without=["'0'"])
  check(lambda: tx.flush(state, None), "param", without=["groups"])


def test_inner_that_needs_parameters_says_so():
  tx = oc.cadence(oracle.relaxed(optax.adamw(0.1)), 2)
  check(lambda: jax.jit(tx.update)(PARAMS, tx.init(PARAMS)), "params")


def test_skip_around_an_inner_state_that_does_not_follow_the_parameters():
  tx = oc.cadence(optax.flatten(optax.adam(0.1)), {"blk": 2, "head": 2}, nonfinite="skip")
  check(lambda: tx.init(PARAMS), "skip", "inner", without=["pytree structure"])


def test_a_state_that_another_optimizer_has_made_is_named():
  params, adam = {"a": jnp.zeros(2)}, oc.cadence(optax.adam(1.0), 1)
  # Of a state without the field that it reads, Adam itself raises an AttributeError.
  with pytest.raises(ValueError, match="state of the inner optimizer, '0/count'"):
    adam.update(params, oc.cadence(optax.sgd(1.0), 1).init(params), params)


@pytest.mark.parametrize("way", ["update", "apply", "without parameters"])
def test_a_complex_gradient_of_a_real_parameter_is_refused(way):
  """Its imaginary part would go with no more than a warning of JAX."""
  tx, params = oc.cadence(optax.sgd(1.0), 2), {"w": jnp.ones(3)}
  grads, state = {"w": jnp.ones(3, jnp.complex64)}, tx.init(params)
  arguments = {
    "apply": {"params": params, "state": state, "grads": grads},
    "update": {"grads": grads, "state": state, "params": params},
    "without parameters": {"grads": grads, "state": state},
  }[way]
  call = tx.apply if way == "apply" else tx.update
  with pytest.raises(ValueError, match="gradient of 'w': expected real numbers.*complex64"):
    call(**arguments)
