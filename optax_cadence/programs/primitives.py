"""The table of primitives: which axes of an operation's operands and results go together.

Every reader of programs asks it: masks (is an operation elementwise?), forward order (does it
contract?), growth (which axes have to grow together?). To add a primitive, add its name to one of
the sets, or to a line of `_RULES`. Nothing here knows about parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from optax_cadence.programs.reading import shape


class Tie(NamedTuple):
  """Axes that run over the same units.

  Attributes:
    operands: Pairs (operand, axis).
    results: Pairs (result, axis).
    summed: Whether the operation adds up over the axis, which then is in no result.
    groups: The number of groups of a grouped convolution, else 1. Each of the axes falls into that
      many pieces, and pieces with the same number run over the same units. Of a sum, only the first
      axis falls into pieces, and each of them runs over the same units as the second axis.
  """

  operands: tuple[tuple[int, int], ...]
  results: tuple[tuple[int, int], ...] = ()
  summed: bool = False
  groups: int = 1


class Product(NamedTuple):
  """The axes of the two operands of a product, a tuple of them for each operand.

  Those that are none of these slide over positions, as the spatial ones of a convolution do.

  Attributes:
    summed: What it sums over.
    batched: What runs over separate products, one for each position.
    free: What is in the result.
  """

  summed: tuple[tuple[int, ...], tuple[int, ...]]
  batched: tuple[tuple[int, ...], tuple[int, ...]]
  free: tuple[tuple[int, ...], tuple[int, ...]]


ELEMENTWISE = frozenset(
  """
  abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
  bitcast_convert_type cbrt ceil clamp clz complex conj convert_element_type copy cos cosh digamma
  div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow
  igamma_grad_a is_finite le le_to lgamma log log1p logistic lt lt_to max min mul mulhi name ne neg
  nextafter not optimization_barrier or polygamma population_count pow real reduce_precision
  regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic
  shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
  """.split()  # noqa: SIM905
)
# Sums over an axis that two operands share.
PRODUCTS = frozenset(["conv_general_dilated", "dot_general"])
# What makes a layer of a table of weights: products, their like, and look-ups.
CONTRACTIONS = PRODUCTS | frozenset(
  ["gather", "ragged_dot", "ragged_dot_general", "scaled_dot", "scaled_matmul"]
)
# Their result holds the entries of their first operand, each as it is but for its dtype.
REARRANGEMENTS = frozenset(
  ["broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "transpose"]
)
# Their result has the axes of their operands, of which some are cut, joined or turned round.
PARTS = frozenset(
  ["concatenate", "dynamic_slice", "pad", "rev", "slice", "split", "stack", "unstack"]
)
_REDUCTIONS = frozenset(
  ["reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum", "reduce_xor"]
)
# What costs one pass over memory.
ONE_PASS = ELEMENTWISE | REARRANGEMENTS | PARTS | _REDUCTIONS
# Operands and results have the same axes, but for those that this parameter names.
_ALONG = {
  "concatenate": "dimension",
  "cumlogsumexp": "axis",
  "cummax": "axis",
  "cummin": "axis",
  "cumprod": "axis",
  "cumsum": "axis",
  "rev": "dimensions",
  "sort": "dimension",
  "split": "axis",
}


# What a reader says of an operation that has no row here.
WANTED = (
  "the table of primitives has no row for it: one that names the axes of its operands and results"
  " which run over the same entries, in optax_cadence/programs/primitives.py"
)


def ties(eqn: Any) -> list[Tie] | None:
  """The ties of an operation; None for one that is not in the table.

  An axis in no tie is not shared with any other: it is reduced in a way that is no sum,
  cut, padded, or new in the result.
  """
  name = eqn.primitive.name
  rule = _RULES.get(name)
  if rule is not None:
    return rule(eqn)
  if name in ELEMENTWISE:
    return _same_shape(eqn)
  if name in _REDUCTIONS:
    return _reduce(eqn)
  if name in _ALONG:
    along = np.atleast_1d(eqn.params[_ALONG[name]]).tolist()
    return [t for t in _same_shape(eqn) if t.results[0][1] not in along]
  return None


def product(eqn: Any) -> Product | None:
  """The axes of a product of two operands; None for any other operation."""
  name, params = eqn.primitive.name, eqn.params
  if name == "conv_general_dilated":
    lhs, rhs, _ = params["dimension_numbers"]
    return Product(((lhs[1],), (rhs[1],)), ((), ()), ((lhs[0],), (rhs[0],)))
  if name == "dot_general":
    summed, batched = params["dimension_numbers"]
  elif name in ("ragged_dot", "ragged_dot_general"):
    numbers = params["ragged_dot_dimension_numbers"]
    summed, (lhs, rhs) = numbers.dot_dimension_numbers
    batched = lhs, (*rhs, *numbers.rhs_group_dimensions)
  else:
    return None
  free = [
    [a for a in range(len(shape(var))) if a not in (*in_sum, *in_batch)]
    for var, in_sum, in_batch in zip(eqn.invars[:2], summed, batched, strict=True)
  ]
  return Product(_pair(summed), _pair(batched), _pair(free))


def _pair(axes: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
  left, right = axes
  return tuple(left), tuple(right)


def _same_shape(eqn: Any) -> list[Tie]:
  """All operands and results have the same axes, but for scalars."""
  tied = []
  for axis in range(len(shape(eqn.outvars[0]))):
    operands = tuple((i, axis) for i, v in enumerate(eqn.invars) if len(shape(v)) > axis)
    tied.append(Tie(operands, tuple((i, axis) for i in range(len(eqn.outvars)))))
  return tied


def _each(eqn: Any) -> list[Tie]:
  """Each result is what its operand is."""
  return [
    Tie(((i, axis),), ((i, axis),))
    for i, v in enumerate(eqn.invars)
    for axis in range(len(shape(v)))
  ]


def _reduce(eqn: Any) -> list[Tie]:
  """Some axes go, and the others stay in their order."""
  params = eqn.params
  axes = set(params["axes"] if "axes" in params else params["dimensions"])
  kept = [a for a in range(len(shape(eqn.invars[0]))) if a not in axes]
  tied = [Tie(((0, a),), ((0, i),)) for i, a in enumerate(kept)]
  if eqn.primitive.name == "reduce_sum":
    tied += [Tie(((0, a),), summed=True) for a in sorted(axes)]
  return tied


def _dot(eqn: Any) -> list[Tie]:
  axes = product(eqn)
  assert axes is not None
  tied = [Tie(((0, a), (1, b)), summed=True) for a, b in zip(*axes.summed, strict=True)]
  # The second operand of `ragged_dot` has an axis of groups besides.
  batch = list(zip(*axes.batched, strict=False))
  tied += [Tie(((0, a), (1, b)), ((0, i),)) for i, (a, b) in enumerate(batch)]
  free = [(i, a) for i, side in enumerate(axes.free) for a in side]
  return tied + [Tie((pair,), ((0, len(batch) + i),)) for i, pair in enumerate(free)]


def _conv(eqn: Any) -> list[Tie]:
  lhs, rhs, out = eqn.params["dimension_numbers"]
  tied = [Tie(((0, lhs[0]),), ((0, out[0]),))]
  if eqn.params["batch_group_count"] != 1:
    return tied
  groups = eqn.params["feature_group_count"]
  tied += [
    Tie(((0, lhs[1]), (1, rhs[1])), summed=True, groups=groups),
    Tie(((1, rhs[0]),), ((0, out[1]),)),
  ]
  if groups > 1:
    tied.append(Tie(((0, lhs[1]), (1, rhs[0])), ((0, out[1]),), groups=groups))
  return tied


def of_groups(ties: list[Tie], whole: bool) -> list[Tie]:
  """The ties of a grouped convolution if units are whole groups, or else if they lie in each.

  All others stay as they are.
  """
  groups = [tie for tie in ties if tie.groups > 1 and not tie.summed]
  if not groups:
    return ties
  within = [tie for tie in ties if tie.summed or tie.results == groups[0].results]
  left_out = [tie for tie in within if tie not in groups] if whole else groups
  return [tie for tie in ties if tie not in left_out]


def _broadcast_in_dim(eqn: Any) -> list[Tie]:
  source, target = shape(eqn.invars[0]), shape(eqn.outvars[0])
  pairs = enumerate(eqn.params["broadcast_dimensions"])
  return [Tie(((0, i),), ((0, o),)) for i, o in pairs if source[i] == target[o]]


def _transpose(eqn: Any) -> list[Tie]:
  return [Tie(((0, a),), ((0, i),)) for i, a in enumerate(eqn.params["permutation"])]


def _whole_axes(eqn: Any) -> list[Tie]:
  """Axes that keep their size."""
  source, target = shape(eqn.invars[0]), shape(eqn.outvars[0])
  return [Tie(((0, a),), ((0, a),)) for a in range(len(source)) if source[a] == target[a]]


def _stack(eqn: Any) -> list[Tie]:
  new, operands = eqn.params["axis"], range(len(eqn.invars))
  axes = range(len(shape(eqn.invars[0])))
  return [Tie(tuple((i, a) for i in operands), ((0, a + (a >= new)),)) for a in axes]


def _unstack(eqn: Any) -> list[Tie]:
  gone, results = eqn.params["axis"], range(len(eqn.outvars))
  axes = range(len(shape(eqn.outvars[0])))
  return [Tie(((0, a + (a >= gone)),), tuple((i, a) for i in results)) for a in axes]


def _gather(eqn: Any) -> list[Tie]:
  numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
  operand, indices, out = shape(eqn.invars[0]), shape(eqn.invars[1]), shape(eqn.outvars[0])
  paired = dict(_batching(numbers, "start_indices_batching_dims"))
  gone = {*numbers.collapsed_slice_dims, *paired.values()}
  window = [a for a in range(len(operand)) if a not in gone]
  pairs = zip(window, numbers.offset_dims, strict=True)
  tied = [Tie(((0, a),), ((0, o),)) for a, o in pairs if sizes[a] == operand[a]]
  batch = [o for o in range(len(out)) if o not in numbers.offset_dims]
  for a, o in zip(range(len(indices) - 1), batch, strict=True):
    tied.append(Tie(((0, paired[a]), (1, a)) if a in paired else ((1, a),), ((0, o),)))
  return tied


def _batching(numbers: Any, of_indices: str) -> list[tuple[int, int]]:
  """Pairs (axis of the indices, axis of the operand) over which a gather or scatter is mapped."""
  of_operand = getattr(numbers, "operand_batching_dims", ())
  return list(zip(getattr(numbers, of_indices, ()), of_operand, strict=True))


def _scatter(eqn: Any) -> list[Tie]:
  """Axes that lie whole in the updates run along the same axis of operand, updates and result."""
  numbers = eqn.params["dimension_numbers"]
  operand, indices, updates = (shape(v) for v in eqn.invars)
  paired = dict(_batching(numbers, "scatter_indices_batching_dims"))
  gone = {*numbers.inserted_window_dims, *paired.values()}
  window = [a for a in range(len(operand)) if a not in gone]
  pairs = zip(window, numbers.update_window_dims, strict=True)
  tied = [Tie(((0, a), (2, u)), ((0, a),)) for a, u in pairs if operand[a] == updates[u]]
  batch = [u for u in range(len(updates)) if u not in numbers.update_window_dims]
  for i, u in zip(range(len(indices) - 1), batch, strict=True):
    if i in paired:
      tied.append(Tie(((0, paired[i]), (1, i), (2, u)), ((0, paired[i]),)))
  return tied


def _dynamic_update_slice(eqn: Any) -> list[Tie]:
  operand, update = shape(eqn.invars[0]), shape(eqn.invars[1])
  whole = [a for a in range(len(operand)) if operand[a] == update[a]]
  return [Tie(((0, a), (1, a)), ((0, a),)) for a in whole]


def _leading(eqn: Any, matrix: int) -> list[Tie]:
  """An operation on the last axes, mapped over all before them."""
  batch = len(shape(eqn.invars[0])) - matrix
  operands, results = range(len(eqn.invars)), range(len(eqn.outvars))
  return [
    Tie(tuple((i, a) for i in operands), tuple((i, a) for i in results)) for a in range(batch)
  ]


def _fft(eqn: Any) -> list[Tie]:
  return _leading(eqn, len(eqn.params["fft_lengths"]))


def _matrix(eqn: Any) -> list[Tie]:
  return _leading(eqn, 2)


def _triangular_solve(eqn: Any) -> list[Tie]:
  free = len(shape(eqn.invars[1])) - (1 if eqn.params["left_side"] else 2)
  return [*_leading(eqn, 2), Tie(((1, free),), ((0, free),))]


def _tridiagonal_solve(eqn: Any) -> list[Tie]:
  """Diagonals [..., n] and right sides [..., n, k]."""
  free = len(shape(eqn.invars[3])) - 1
  return [*_leading(eqn, 2)[: free - 1], Tie(((3, free),), ((0, free),))]


def _ragged_dot(eqn: Any) -> list[Tie]:
  """Rows [n, k], which fall into groups, times matrices [groups, k, m]."""
  groups = eqn.params["ragged_dot_dimension_numbers"].rhs_group_dimensions
  # Without that axis it sums over each group alone, as only a derivative does.
  return _dot(eqn) if len(groups) == 1 else []


def _top_k(eqn: Any) -> list[Tie]:
  axis = eqn.params.get("axis", eqn.params.get("reduction_dimension", -1))
  along = axis % len(shape(eqn.invars[0]))
  return [tie for tie in _same_shape(eqn) if tie.results[0][1] != along]


def _reduce_window(eqn: Any) -> list[Tie]:
  source = shape(eqn.invars[0])
  p = eqn.params
  return [
    Tie(tuple((i, a) for i in range(len(eqn.invars)) if shape(eqn.invars[i])), ((0, a),))
    for a in range(len(source))
    if p["window_dimensions"][a] == p["window_strides"][a] == 1 and tuple(p["padding"][a]) == (0, 0)
  ]


def _none(eqn: Any) -> list[Tie]:
  del eqn
  return []


# The operations of each rule.
_RULES: dict[str, Callable[[Any], list[Tie]]] = {
  name: rule
  for rule, names in (
    (_broadcast_in_dim, "broadcast_in_dim"),
    (_conv, "conv_general_dilated"),
    (_dot, "dot_general"),
    (_dynamic_update_slice, "dynamic_update_slice"),
    (_each, "device_put optimization_barrier"),
    (_fft, "fft"),
    (_gather, "gather"),
    (_matrix, "cholesky eig eigh hessenberg householder_product lu qr schur svd tridiagonal"),
    # The axes of a reshape merge and split: see `reshape_groups`.
    (
      _none,
      "iota random_bits random_fold_in random_seed random_split random_unwrap random_wrap reshape",
    ),
    (_ragged_dot, "ragged_dot ragged_dot_general"),
    (_reduce, "argmax argmin reduce squeeze"),
    (_reduce_window, "reduce_window_max reduce_window_min reduce_window_sum"),
    (_same_shape, "mesh_cast reshard sharding_constraint"),
    (_scatter, "scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub"),
    (_stack, "stack"),
    (_top_k, "approx_top_k top_k"),
    (_transpose, "transpose"),
    (_triangular_solve, "triangular_solve"),
    (_tridiagonal_solve, "tridiagonal_solve"),
    (_unstack, "unstack"),
    (_whole_axes, "dynamic_slice pad slice tile"),
  )
  for name in names.split()
}


def reshape_groups(
  source: tuple[int, ...], target: tuple[int, ...]
) -> list[tuple[list[int], list[int]]]:
  """The smallest runs of axes that a reshape turns into each other.

  >>> from optax_cadence.programs import primitives
  >>> primitives.reshape_groups((2, 3, 4, 5), (2, 12, 5))
  [([0], [0]), ([1, 2], [1]), ([3], [2])]
  >>> primitives.reshape_groups((2, 3, 1), (6,))
  [([0, 1, 2], [0])]
  """
  groups: list[tuple[list[int], list[int]]] = []
  i = j = 0
  while i < len(source) or j < len(target):
    ins: list[int] = []
    outs: list[int] = []
    n = m = 1
    while not (ins and outs and n == m):
      if i < len(source) and (not ins or n < m or j == len(target)):
        n *= source[i]
        ins.append(i)
        i += 1
      elif j < len(target):
        m *= target[j]
        outs.append(j)
        j += 1
      else:
        break
    if groups and not (ins and outs):  # axes of size 1, with no other side of their own
      groups[-1][0].extend(ins)
      groups[-1][1].extend(outs)
    else:
      groups.append((ins, outs))
  return groups
