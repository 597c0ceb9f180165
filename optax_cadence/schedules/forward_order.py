"""How deep in the network a parameter stands, read from the traced program.

An abstract interpretation of the forward pass: every value has a level, the number
of contractions with parameters behind it. Nothing here is about time or optimizers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from optax_cadence import _paths
from optax_cadence.programs import primitives
from optax_cadence.programs import reading


def forward_order(fn: Callable[..., Any], params: Any, *args: Any) -> Any:
  r"""Depth of every parameter, read from the program that `fn(params, *args)` traces.

  Names and the order of the tree play no part. The program is walked in the order
  in which it runs, through every branch and three iterations of every loop:

  1. Data is what is computed from `args` or from an array that `fn` closes over;
     it has a level, 0 at the start. Scalar constants, literals and `iota` are
     neutral. The result of an operation on data has the highest level of its inputs.
  2. What is computed from parameters alone is pending (casts, reshapes, weight
     normalization, LoRA products). It remains pending when it meets nothing but data
     of level 0 entry by entry: a constant mask or a stored statistic is no layer.
  3. An operation between something pending and data of level :math:`l` places
     each parameter in it that has no depth yet: at :math:`l + 1` for a
     contraction (matrix product, convolution, table look-up), otherwise at
     :math:`l`, which is 1 or more. The result is data of that level.
  4. A parameter that met data of level 0 entry by entry and nothing else has depth 0.
  5. The levels that occur are renumbered 0, 1, 2, … .

  So a kernel, its bias and the norm that follows share one depth, as do parallel
  branches (query, key and value); a tied embedding has the depth of its first use;
  layers stacked for a scan, and cells of a recurrent network, count as one
  iteration. Code whose result is thrown away counts as well. A weight that is
  multiplied as a matrix by a constant (power iteration in spectral normalization)
  reads as a layer on that constant: give such a depth by hand.

  Args:
    fn: the forward pass; it may return any tree. It is traced, never run.
    params: tree of arrays or `jax.ShapeDtypeStruct`.
    *args: further arguments of `fn`, trees of arrays or `jax.ShapeDtypeStruct`;
      they are traced, so let `fn` close over flags. State that an `nnx` model
      changes (running statistics) belongs here, since a trace writes no other.

  Returns:
    Tree of ints like `params`; 0 is nearest the input.

  Raises:
    ValueError: for a parameter that never meets data.

  >>> import jax.numpy as jnp, optax_cadence as oc
  >>> params = {"a": jnp.ones((8, 1)), "b": jnp.ones((1, 8)), "z": jnp.ones((3, 8))}
  >>> def fn(p, x):
  ...   return jnp.tanh(x @ p["z"] + p["b"]) @ p["a"]
  >>> oc.forward_order(fn, params, jnp.ones((4, 3)))
  {'a': 1, 'b': 0, 'z': 0}
  """
  leaves, structure = jax.tree.flatten(params)
  program = reading.trace(fn, params, *args)
  pending = [_Value(None, frozenset([i])) for i in range(len(leaves))]
  data = [_Value(0, frozenset())] * (len(program.jaxpr.invars) - len(leaves))
  reader = _Reader()
  reader.run(program, pending + data)
  _check_all_placed(params, reader.levels)
  rank = {level: i for i, level in enumerate(sorted(set(reader.levels.values())))}
  return jax.tree.unflatten(structure, [rank[reader.levels[i]] for i in range(len(leaves))])


def _check_all_placed(params: Any, levels: Mapping[int, int]) -> None:
  names = _paths.names(path for path, _ in _paths.flatten_with_paths(params))
  missing = [name for i, name in enumerate(names) if i not in levels]
  if missing:
    raise ValueError(
      f"forward_order: expected fn to combine every parameter with data, found {missing} "
      "unused or combined with other parameters alone; leave them out of params or give "
      "their depths by hand"
    )


class _Value(NamedTuple):
  """What is known of a variable: its level if it is data, and the parameters pending in it.

  With neither it is neutral. These are the words of `forward_order`.
  """

  level: int | None
  pending: frozenset[int]


_NEUTRAL = _Value(None, frozenset())
_LOOP_PASSES = 3


class _Reader(reading.Reader):
  """Reads a program by the rules of `forward_order`.

  Attributes:
    levels: The level of each parameter that has met data; 0 until an operation places it.
  """

  def __init__(self) -> None:
    self.levels: dict[int, int] = {}

  def constant(self, numbers: tuple[Any, ...]) -> _Value:
    """An array that the program holds is data; a scalar is neutral."""
    return _Value(0, frozenset()) if np.ndim(numbers[0]) else _NEUTRAL

  def operation(self, eqn: Any, inputs: list[_Value]) -> list[_Value]:
    operands = [value for value in inputs if value != _NEUTRAL]
    level, pending = result = self.joined(operands)
    if level is not None and pending and len(operands) > 1:  # rule 3
      level += _contracts(eqn)
      for i in pending:
        self.levels[i] = self.levels.get(i) or level
      result = _Value(level, frozenset()) if level else result
    return [result] * len(eqn.outvars)

  def joined(self, values: Sequence[_Value]) -> _Value:
    """What is known of something that depends on all of these values."""
    levels = [value.level for value in values if value.level is not None]
    pending = frozenset().union(*(value.pending for value in values))
    return _Value(max(levels, default=None), pending)

  def loop(self, step: Callable[..., list[_Value]], carry: list[_Value]) -> list[_Value]:
    # A parameter may meet data only in a later iteration, through the carry. A pass that
    # places nothing is dropped, so that the levels after a loop are those of one iteration.
    outputs = latest = step(carry)
    for _ in range(_LOOP_PASSES - 1):
      before = dict(self.levels)
      latest = step(latest[: len(carry)])
      outputs = latest if self.levels != before else outputs
    return outputs


def _contracts(eqn: Any) -> bool:
  """Whether an operation, or one inside it, takes data through a table of weights."""
  if eqn.primitive.name in primitives.CONTRACTIONS:
    return True
  return any(_contracts(e) for body in reading.bodies(eqn) for e in reading.opened(body)[0].eqns)
