"""Patterns, depths and the order of the forward pass, against answers written by hand."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_cadence as oc
from optax_cadence._cadence import of


def w(*shape):
  """A parameter or input of which only the shape matters."""
  return jax.ShapeDtypeStruct(shape, jnp.float32)


X = w(4, 3)
PARAMS = {
  "head": w(3),
  "stem": {"conv": {"bias": w(3), "kernel": w(3, 3)}, "norm": w(3)},
  "stem2": w(3),
}


class TestByPath:
  def test_first_match_wins_and_prefixes_match(self):
    tree = oc.by_path({"*/bias": 1, "stem": 8, "*": 2})(PARAMS)
    assert tree == {
      "head": 2,
      "stem": {"conv": {"bias": 1, "kernel": 8}, "norm": 8},
      "stem2": 2,
    }

  def test_prefix_ends_at_a_slash(self):
    tree = oc.by_path({"stem/conv/": 8}, default=3)(PARAMS)
    assert tree["stem"] == {"conv": {"bias": 8, "kernel": 8}, "norm": 3}
    assert tree["stem2"] == 3

  def test_star_crosses_slashes_and_case_matters(self):
    assert oc.by_path({"s*l": 5}, default=1)(PARAMS)["stem"]["conv"] == {"bias": 1, "kernel": 5}
    with pytest.raises(ValueError, match="'Head' matches no parameter"):
      oc.by_path({"Head": 5}, default=1)(PARAMS)

  def test_leaf_without_cadence_is_named(self):
    with pytest.raises(ValueError, match=r"'stem/norm'.*no default.*\['head', 'stem/conv'"):
      oc.by_path({"head": 1, "stem/conv": 1, "stem2": 1})(PARAMS)

  def test_misspelled_pattern_is_named_with_the_paths(self):
    with pytest.raises(ValueError, match="'hed' matches no parameter.*'stem/conv/bias'"):
      oc.by_path({"hed": 1}, default=1)(PARAMS)

  @pytest.mark.parametrize("masked", [None, optax.MaskedNode()])
  def test_masked_parts_stay_and_switch_the_check_off(self, masked):
    tree = oc.by_path({"head": 1, "stem": 2})({"head": masked, "stem": [w(3), masked]})
    assert tree == {"head": masked, "stem": [2, masked]}

  def test_shadowed_pattern_and_empty_tree(self):
    assert oc.by_path({"*": 1, "head": 2})(PARAMS)["head"] == 1
    assert oc.by_path({"head": 2})({}) == {}

  def test_cadences_are_opaque(self):
    class Opaque:
      __hash__ = None

      def __eq__(self, other):
        raise AssertionError("compared")

      __bool__ = __eq__

    grid, periods = Opaque(), np.arange(3)
    tree = oc.by_path({"stem": grid, "head": periods}, default=max)(PARAMS)
    assert tree["stem"]["norm"] is grid and tree["head"] is periods and tree["stem2"] is max
    assert oc.by_path({"stem": grid}, 1) != oc.by_path({"stem": grid}, 1)
    assert isinstance(hash(oc.by_path({"stem": grid})), int)

  def test_traced_cadence(self):
    assert jax.jit(lambda k: oc.by_path({"*": k})({"a": w(2)}))(7)["a"] == 7

  def test_later_changes_of_the_mapping_have_no_effect(self):
    cadences = {"*": 1}
    build = oc.by_path(cadences)
    cadences["*"] = 2
    assert build({"a": w(2)}) == {"a": 1}

  def test_nnx_state_and_linen_params_share_patterns(self):
    _, state = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    tree = oc.by_path({"kernel": 4, "bias": 1})(state)
    assert jax.tree.structure(tree) == jax.tree.structure(state)
    assert jax.tree.leaves(tree) == [1, 4]
    frozen = flax.core.freeze({"kernel": w(2, 3), "bias": w(3)})
    tree = oc.by_path({"kernel": 4, "bias": 1})(frozen)
    assert tree == flax.core.freeze({"kernel": 4, "bias": 1})

  @pytest.mark.parametrize("bad", [8, [("stem", 8)], {0: 8}, {0: 8, "stem": 8}])
  def test_not_a_mapping_from_strings(self, bad):
    with pytest.raises(ValueError, match="expected a mapping"):
      oc.by_path(bad)


class TestByDepth:
  def test_geometric_both_ways(self):
    assert oc.by_depth([0, 1, 2, 3, 4]) == [16, 8, 4, 2, 1]
    assert oc.by_depth([0, 1, 2], output=16, input=1) == [1, 4, 16]
    assert oc.by_depth([5, 7, 6], output=1, input=100, rounding="integer") == [100, 1, 10]

  def test_structure_and_gaps(self):
    depth = {"a": (3, 7), "b": None, "c": optax.MaskedNode(), "d": np.int32(5)}
    assert oc.by_depth(depth, 2, 8) == {"a": (8, 2), "b": None, "c": optax.MaskedNode(), "d": 4}

  def test_ends_are_rounded_to_powers_of_two(self):
    assert oc.by_depth([0, 1], output=3, input=12) == [16, 4]
    assert oc.by_depth([0, 1], output=3, input=12, rounding="integer") == [12, 3]

  def test_one_depth_takes_output(self):
    assert oc.by_depth({"a": 2, "b": 2}, output=4) == {"a": 4, "b": 4}
    assert oc.by_depth(1, output=5, rounding="integer") == 5
    assert oc.by_depth({}) == {}

  @pytest.mark.parametrize("rounding", ["power_of_two", "integer"])
  @pytest.mark.parametrize("ends", [(1, 1), (1, 64), (128, 2), (7, 1000)])
  def test_periods_are_monotonic_ints(self, rounding, ends):
    output, input = ends
    periods = oc.by_depth(list(range(23)), output, input, rounding=rounding)
    assert all(type(p) is int and p >= 1 for p in periods)
    assert periods == sorted(periods, reverse=input > output)
    if rounding == "integer":
      assert (periods[0], periods[-1]) == (input, output)

  @pytest.mark.parametrize("bad", [0, -4, 1.5, True, "8"])
  def test_bad_period(self, bad):
    with pytest.raises(ValueError, match="from 1 up as the output period, found"):
      oc.by_depth([0, 1], output=bad)
    with pytest.raises(ValueError, match="from 1 up as the input period, found"):
      oc.by_depth([0, 1], input=bad)

  @pytest.mark.parametrize("bad", [1.0, "a", False, np.float32(2), np.ones(2, int), np.True_])
  def test_bad_depth_is_named(self, bad):
    with pytest.raises(ValueError, match="whole number as the depth of 'a/1'"):
      oc.by_depth({"a": [0, bad]})

  def test_bad_rounding(self):
    with pytest.raises(ValueError, match="'power_of_two' or 'integer', found 'up'"):
      oc.by_depth([0, 1], rounding="up")


class TestForwardOrder:
  def test_names_do_not_matter(self):
    params = {"m": w(3, 5), "a": w(5, 5), "z": w(5, 5), "c": w(5, 2)}
    fn = lambda p, x: x @ p["m"] @ p["z"] @ p["a"] @ p["c"]
    assert oc.forward_order(fn, params, X) == {"m": 0, "z": 1, "a": 2, "c": 3}

  def test_bias_and_norm_share_the_depth_of_their_kernel(self):
    def fn(p, x):
      for kernel, bias, scale in p:
        x = x @ kernel + bias[None]
        x = jax.nn.gelu(scale[None] * x / jnp.sqrt((x**2).mean(-1, keepdims=True)))
      return x

    assert oc.forward_order(fn, [(w(3, 3), w(3), w(3))] * 3, X) == [(0,) * 3, (1,) * 3, (2,) * 3]

  def test_reparametrized_weights_stay_pending(self):
    def fn(p, x):
      normed = p["g"][None] * p["v"] / jnp.linalg.norm(p["v"], axis=0, keepdims=True)
      low_rank = p["cls"].astype(jnp.float16).T @ p["up"].astype(jnp.float16)
      return x @ p["first"] @ (normed.T.reshape(3, 3) + low_rank.astype(jnp.float32))

    params = {"cls": w(2, 3), "first": w(3, 3), "g": w(3), "up": w(2, 3), "v": w(3, 3)}
    depth = oc.forward_order(fn, params, X)
    assert depth == {"cls": 1, "first": 0, "g": 1, "up": 1, "v": 1}

  def test_masked_weights_and_stored_statistics(self):
    mask, var = np.ones((3, 3), np.float32), jnp.ones(3)

    def fn(p, x, mean):
      for kernel, scale, shift in p:
        x = x @ (kernel * mask)
        x = (x - mean[None]) * (jax.lax.rsqrt(var) * scale)[None] + (shift - mean)[None]
      return x

    depth = oc.forward_order(fn, [(w(3, 3), w(3), w(3))] * 2, X, w(3))
    assert depth == [(0, 0, 0), (1, 1, 1)]

  def test_rows_of_a_masked_parameter_stay_pending(self):
    mask = np.ones((4, 3), np.float32)
    fn = lambda p, x: x @ p[0] @ p[1] + (p[2] * mask)[jnp.arange(4)]
    assert oc.forward_order(fn, [w(3, 3), w(3, 3), w(4, 3)], X) == [0, 1, 1]

  def test_residual_and_attention(self):
    def attend(p, x):
      q, k, v = (x @ p[name] for name in "qkv")
      return x + jax.nn.softmax(q @ k.T) @ v @ p["out"]

    def fn(p, x):
      x = x @ p["in"] + p["pos"]
      for block in p["blocks"]:
        x = attend(block, x)
      return x @ p["head"]

    block = {name: w(3, 3) for name in ("q", "k", "v", "out")}
    depth = oc.forward_order(
      fn, {"blocks": [block] * 2, "head": w(3, 2), "in": w(3, 3), "pos": w(4, 3)}, X
    )
    assert depth == {
      "in": 0,
      "pos": 0,
      "head": 5,
      "blocks": [{"q": 1, "k": 1, "v": 1, "out": 2}, {"q": 3, "k": 3, "v": 3, "out": 4}],
    }

  def test_class_token_joins_where_it_meets_data(self):
    fn = lambda p, x: jnp.concatenate([p["cls"] @ p["proj"], x @ p["patch"]]) @ p["head"]
    params = {"cls": w(1, 3), "head": w(3, 2), "patch": w(3, 3), "proj": w(3, 3)}
    assert oc.forward_order(fn, params, X) == {"cls": 0, "head": 1, "patch": 0, "proj": 0}

  def test_tied_embedding_has_the_depth_of_first_use(self):
    fn = lambda p, ids: (p["table"][ids] + p["pos"]) @ p["mid"] @ p["table"].T @ p["post"]
    params = {"mid": w(3, 3), "pos": w(4, 3), "post": w(9, 2), "table": w(9, 3)}
    depth = oc.forward_order(fn, params, jax.ShapeDtypeStruct((4,), jnp.int32))
    assert depth == {"mid": 1, "pos": 0, "post": 2, "table": 0}

  def test_scale_of_the_raw_input(self):
    assert oc.forward_order(lambda p, x: x * p[0] + p[1], [w(4, 3), w(4, 3)], X) == [0, 0]
    fn = lambda p, x: (x * p[0]) + (x * p[0]) @ p[1] @ p[2]
    assert oc.forward_order(fn, [w(4, 3), w(3, 3), w(3, 3)], X) == [0, 0, 1]

  def test_data_closed_over(self):
    x = np.ones((4, 3), np.float32)
    fn = lambda p: jax.jit(lambda z: x @ p["b"] @ z)(p["a"])
    assert oc.forward_order(fn, {"a": w(3, 3), "b": w(3, 3)}) == {"a": 1, "b": 0}

  @pytest.mark.parametrize(
    "wrap",
    [
      jax.jit,
      jax.checkpoint,
      lambda f: jax.vmap(f, (None, 0)),
      lambda f: lambda p, x: jax.lax.map(functools.partial(f, p), x),
      lambda f: lambda p, x: jax.lax.cond(x.sum() > 0, f, lambda p, x: x, p, x),
      lambda f: lambda p, x: jax.lax.cond(x.sum() > 0, lambda p, x: x, f, p, x),
      lambda f: lambda p, x: jax.lax.fori_loop(0, 3, lambda i, y: f(p, y), x),
      lambda f: lambda p, x: jax.lax.while_loop(lambda y: y.sum() > 0, lambda y: f(p, y), x),
    ],
    ids=["jit", "remat", "vmap", "map", "cond", "cond2", "fori", "while"],
  )
  def test_inside_a_transformation(self, wrap):
    block = wrap(lambda p, x: jax.nn.relu(x @ p["z"]) @ p["b"] + p["y"])
    fn = lambda p, x: block(p[1], block(p[0], x))
    depth = oc.forward_order(fn, [{"b": w(3, 3), "y": w(), "z": w(3, 3)}] * 2, X)
    assert depth == [{"b": 1, "y": 1, "z": 0}, {"b": 3, "y": 3, "z": 2}]

  @pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.gelu, jax.nn.silu, jax.nn.softmax])
  def test_activations(self, activation):
    fn = lambda p, x: activation(x @ p[1] * p[2]) @ p[0]
    assert oc.forward_order(fn, [w(3, 3), w(3, 3), w()], X) == [1, 0, 0]

  def test_custom_vjp(self):
    @jax.custom_vjp
    def matmul(x, kernel):
      return x @ kernel

    matmul.defvjp(lambda x, k: (x @ k, (x, k)), lambda res, g: (g @ res[1].T, res[0].T @ g))
    fn = lambda p, x: matmul(matmul(x, p[1]), p[0])
    assert oc.forward_order(fn, [w(3, 3), w(3, 3)], X) == [1, 0]

  def test_gradient_inside_the_forward_pass(self):
    energy = lambda p, x: jnp.tanh(x @ p[2]).sum()
    fn = lambda p, x: jax.grad(energy, 1)(p, x @ p[1]) @ p[0]
    depth = oc.forward_order(fn, [w(3, 3)] * 3, X)
    assert depth[1] < depth[2] < depth[0]

  def test_recurrent_network(self):
    def fn(p, xs):
      def cell(h, x):
        h = jnp.tanh(x @ p["x"] + h @ p["h"])
        return h, h @ p["y"]

      return jax.lax.scan(cell, p["h0"], xs)[1] @ p["out"]

    params = {"h": w(3, 3), "h0": w(3), "out": w(3, 2), "x": w(3, 3), "y": w(3, 3)}
    assert oc.forward_order(fn, params, X) == {"h": 0, "h0": 0, "x": 0, "y": 1, "out": 2}

  def test_data_reaches_a_parameter_through_the_carry(self):
    def fn(p, xs):
      def cell(carry, x):
        newest, older = carry
        return (x @ p["new"], newest), older @ p["old"]

      return jax.lax.scan(cell, (jnp.zeros(3), jnp.zeros(3)), xs)[1]

    assert oc.forward_order(fn, {"new": w(3, 3), "old": w(3, 3)}, X) == {"new": 0, "old": 1}

  def test_parameters_sliced_by_a_loop_counter(self):
    def fn(p, x):
      x = jax.lax.fori_loop(0, 5, lambda i, y: y @ p["stack"][i], x @ p["in"])
      return x @ p["head"]

    params = {"head": w(3, 3), "in": w(3, 3), "stack": w(5, 3, 3)}
    assert oc.forward_order(fn, params, X) == {"in": 0, "stack": 1, "head": 2}

  def test_parameter_in_the_condition_of_a_loop(self):
    fn = lambda p, x: jax.lax.while_loop(
      lambda y: (y @ p["gate"]).sum() > 0, lambda y: y @ p["body"], x @ p["in"]
    )
    depth = oc.forward_order(fn, {"body": w(3, 3), "gate": w(3, 1), "in": w(3, 3)}, X)
    assert depth == {"body": 1, "gate": 1, "in": 0}

  def test_opaque_operation_with_a_program_inside(self):
    def fn(p, x):
      solve = lambda matvec, b: matvec(b)
      first = lambda y: jax.lax.custom_linear_solve(
        lambda v: p["a"] @ v, y, solve, transpose_solve=solve, symmetric=False
      )
      return p["z"] @ first(p["m"] @ x)

    depth = oc.forward_order(fn, {"a": w(3, 3), "m": w(3, 3), "z": w(3, 3)}, w(3))
    assert depth == {"m": 0, "a": 1, "z": 2}

  def test_any_output_and_dead_code(self):
    def fn(p, x):
      (x @ p["a"]) @ p["dead"]
      return {"y": x @ p["b"], "name": "a string", "none": None}

    assert oc.forward_order(fn, {k: w(3, 3) for k in ("a", "b", "dead")}, X) == {
      "a": 0,
      "b": 0,
      "dead": 1,
    }

  def test_arrays_masked_parts_and_frozen_dicts(self):
    params = {"a": jnp.ones((3, 3)), "b": None, "c": optax.MaskedNode()}
    fn = lambda p, x: x @ p["a"]
    expected = {"a": 0, "b": None, "c": optax.MaskedNode()}
    assert oc.forward_order(fn, params, jnp.ones((4, 3))) == expected
    frozen = flax.core.freeze({"a": w(3, 3)})
    assert oc.forward_order(fn, frozen, X) == flax.core.freeze({"a": 0})

  @pytest.mark.parametrize(
    "use",
    [
      lambda p, x: x,
      lambda p, x: p["un"]["used"] * 2,
      lambda p, x: x @ p["a"] + 0 * p["un"]["b"],
    ],
  )
  def test_unplaced_parameter_is_named(self, use):
    params = {"a": w(3, 3), "un": {"used": w(3, 3), "b": w(4, 3)}}
    with pytest.raises(ValueError, match="un/used.*leave them out"):
      oc.forward_order(lambda p, x: (use(p, x), x @ p["a"]), params, X)

  def test_feeds_by_depth(self):
    fn = lambda p, x: x @ p["z"] @ p["y"] @ p["a"]
    depth = oc.forward_order(fn, {"a": w(3, 3), "y": w(3, 3), "z": w(3, 3)}, X)
    assert oc.by_depth(depth, output=1, input=4) == {"z": 4, "y": 2, "a": 1}


class LinenNet(nn.Module):
  """Convolutions under misleading names, norms in both modes, attention, a tied head."""

  train: bool = True

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (3, 3), name="z_conv")(x)
    x = nn.relu(nn.BatchNorm(not self.train, name="b_norm")(x))
    y = nn.Conv(8, (3, 3), use_bias=False, name="y_conv")(x)
    x = x + nn.gelu(nn.LayerNorm(name="a_norm")(y))
    x = x.reshape(x.shape[0], -1, 8)
    x = x + nn.MultiHeadDotProductAttention(2, name="m_attention")(x)
    return nn.Dense(2, name="a_head")(x.mean(1))


class NnxNet(nnx.Module):
  """The same network."""

  def __init__(self, rngs):
    self.z_conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
    self.b_norm = nnx.BatchNorm(8, rngs=rngs)
    self.y_conv = nnx.Conv(8, 8, (3, 3), use_bias=False, rngs=rngs)
    self.a_norm = nnx.LayerNorm(8, rngs=rngs)
    self.m_attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
    self.a_head = nnx.Linear(8, 2, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.b_norm(self.z_conv(x)))
    x = x + nnx.gelu(self.a_norm(self.y_conv(x)))
    x = x.reshape(x.shape[0], -1, 8)
    x = x + self.m_attention(x)
    return self.a_head(x.mean(1))


IMAGES = w(2, 4, 4, 3)
PROJECTION = {"bias": 2, "kernel": 2}
NET_DEPTHS = {
  "a_head": {"bias": 4, "kernel": 4},
  "a_norm": {"bias": 1, "scale": 1},
  "b_norm": {"bias": 0, "scale": 0},
  "m_attention": {
    "key": PROJECTION,
    "out": {"bias": 3, "kernel": 3},
    "query": PROJECTION,
    "value": PROJECTION,
  },
  "y_conv": {"kernel": 1},
  "z_conv": {"bias": 0, "kernel": 0},
}


@pytest.fixture(scope="module")
def variables():
  return jax.eval_shape(LinenNet().init, jax.random.key(0), IMAGES)


class TestForwardOrderOnFlax:
  def test_linen(self, variables):
    def fn(params, x):
      variables_now = {"params": params, "batch_stats": stats}
      return LinenNet().apply(variables_now, x, mutable=["batch_stats"])

    stats = jax.tree.map(lambda s: jnp.ones(s.shape), variables["batch_stats"])
    assert oc.forward_order(fn, variables["params"], IMAGES) == NET_DEPTHS

  def test_linen_with_stored_statistics(self, variables):
    def fn(params, stats, x):
      return LinenNet(train=False).apply({"params": params, "batch_stats": stats}, x)

    stats = variables["batch_stats"]
    assert oc.forward_order(fn, variables["params"], stats, IMAGES) == NET_DEPTHS

  @pytest.mark.parametrize("train", [True, False])
  def test_nnx(self, train):
    model = nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0)))
    (model.train if train else model.eval)()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    # Running statistics that change have to come in as an argument: nnx lets no trace write others.
    fn = lambda p, stats, x: nnx.merge(graphdef, p, stats)(x)
    depth = oc.forward_order(fn, params, rest, IMAGES)
    assert jax.tree.structure(depth) == jax.tree.structure(params)
    assert jax.tree.leaves(depth) == jax.tree.leaves(NET_DEPTHS)
    assert max(jax.tree.leaves(oc.by_depth(depth))) == 16

  def test_nnx_without_a_filter(self):
    graphdef, params = nnx.split(
      nnx.Sequential(
        nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1))
      )
    )
    depth = oc.forward_order(lambda p, x: nnx.merge(graphdef, p)(x), params, X)
    assert jax.tree.leaves(depth) == [0, 0, 1, 1]

  @pytest.mark.parametrize("remat", [False, True])
  def test_linen_scan_and_tied_embedding(self, remat):
    class Block(nn.Module):
      @nn.compact
      def __call__(self, x):
        y = nn.Dense(8, name="up")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(4, name="down")(nn.gelu(y)), None

    class Net(nn.Module):
      @nn.compact
      def __call__(self, ids):
        embed = nn.Embed(7, 4, name="vocabulary")
        block = nn.remat(Block, prevent_cse=False) if remat else Block
        stack = nn.scan(block, {"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="blocks")(embed(ids))
        return embed.attend(nn.LayerNorm(name="final")(x))

    ids = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    params = jax.eval_shape(Net().init, jax.random.key(0), ids)["params"]
    assert params["blocks"]["up"]["kernel"].shape == (3, 4, 8)
    assert oc.forward_order(lambda p, x: Net().apply({"params": p}, x), params, ids) == {
      "blocks": {
        "down": {"bias": 2, "kernel": 2},
        "norm": {"bias": 0, "scale": 0},
        "up": {"bias": 1, "kernel": 1},
      },
      "final": {"bias": 2, "scale": 2},
      "vocabulary": {"embedding": 0},
    }


TWINS = {
  "bare": lambda k, a: k(4),
  "Every": lambda k, a: oc.Every(k(4), offset=k(3)),
  "tree": lambda k, a: {"b": k(1), "w": oc.Every(k(4), 3)},
  "channels": lambda k, a: {"b": 2, "w": oc.channels(a([1, 2, 1, 2]), axis=k(1))},
  "channels of scalars": lambda k, a: {"b": 2, "w": oc.channels([k(1), k(2), k(1)])},
  "quadrants": lambda k, a: {"b": 2, "w": oc.quadrants(a([[1, 2], [2, 1]]), axes=a([0, 1]))},
  "rows of a grid": lambda k, a: {"b": 2, "w": oc.Grid([a([1, 2]), a([2, 4])], (0, 1))},
  "stacked": lambda k, a: {"b": 2, "w": oc.stacked(a([1, 2, 2, 4]))},
  "mask that is a grid": lambda k, a: {"b": 2, "w": a([1, 2, 1, 2, 1, 2])},
  "mask": lambda k, a: {"b": 2, "w": a(np.arange(24).reshape(4, 6) % 5 % 3 + 1)},
  "by_path": lambda k, a: oc.by_path({"b": k(2), "w": a([1, 2, 1, 2, 1, 2])}, default=k(8)),
  "by_depth": lambda k, a: oc.by_depth({"b": k(0), "w": k(1)}, output=k(2), input=k(8)),
  "late": lambda k, a: oc.late(k(4), {"b": k(2), "w": oc.channels(a([1, 2]))}, before=k(2)),
}


@pytest.mark.parametrize("make", TWINS.values(), ids=TWINS)
def test_numbers_of_jax_are_cadences_like_those_of_numpy_and_python(make):
  params = {"b": w(6), "w": w(4, 6)}

  def seen(scalar, array):
    tx = oc.cadence(optax.sgd(0.1), make(scalar, array))
    state = jax.eval_shape(tx.init, params)
    due = [
      (group.every.static, group.every.score(8).tolist())
      for group in of(tx).groups_of(params).groups
    ]
    return tx.cycle, due, jax.tree.structure(state), oc.describe(tx, params)

  expected = seen(np.int64, np.asarray)
  for scalar in (jnp.int32, jnp.asarray, lambda x: jnp.ones(4, jnp.uint8)[0] * jnp.uint8(x)):
    assert seen(scalar, jnp.asarray) == expected
  assert seen(int, np.asarray) == expected


def test_a_traced_period_is_dynamic():
  def init(k):
    tx = oc.cadence(optax.sgd(0.1), {"b": k, "w": oc.Every(k)})
    assert tx.cycle is None
    return tx.init({"b": jnp.ones(2), "w": jnp.ones(2)})

  assert list(jax.jit(init)(2).groups) == ["traced"]
  assert list(jax.vmap(init)(jnp.arange(2, 4)).groups) == ["traced"]
