"""New tokens: more rows of an embedding, and more columns of the head that predicts them."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths
from optax_cadence.growth import _trees
from optax_cadence.growth._fresh import Fresh
from optax_cadence.growth._plan import LeafChange
from optax_cadence.growth._plan import Plan


def adding_tokens(
  variables: Any, by: int, *, embed: str, head: str | None = None, alpha: str = "alpha"
) -> Plan:
  """Plans tokens after the last one. Logits of old ones do not change, so there is no gate.

  Args:
    variables: Tree of arrays or `jax.ShapeDtypeStruct`.
    by: Number of new tokens.
    embed: Path of the embedding, [tokens, features], or of its layer.
    head: Path of the layer that makes the logits, or of its kernel, [features, tokens]; its
      bias is found beside the kernel. None for a tied head, which reads the embedding.
    alpha: Path at which a gate would be; for variables of Linen "params/alpha".

  Returns:
    A `Plan`. Its fresh values are those of `mean_tokens`, or yours.

  Raises:
    ValueError: If the head does not have as many tokens as the embedding.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> params = {"embed": jnp.ones((5, 3)), "head": {"kernel": jnp.ones((3, 5))}}
  >>> print(growth.adding_tokens(params, by=2, embed="embed", head="head"))
  leaf         role    before  after  parameters
  embed        tokens  5x3     7x3            +6
  head/kernel  tokens  3x5     3x7            +6
  total                                      +12
  gate: none
  """
  if not isinstance(by, int | np.integer) or isinstance(by, bool) or by < 1:
    raise ValueError(f"by must be a positive integer, found {by!r}")
  shapes = _trees.shapes(variables)
  table = _trees.kernel(variables, tuple(embed.split("/")))
  if len(shapes[table]) != 2:
    raise ValueError(
      f"embed {_paths.join(table)!r}: expected shape [tokens, features], found {shapes[table]}"
    )
  tokens = shapes[table][0]
  axes = {table: 0}
  if head is not None:
    kernel = _trees.kernel(variables, tuple(head.split("/")))
    if kernel == table:
      raise ValueError(
        f"head {_paths.join(kernel)!r} is the embedding: expected None for a tied head, or a layer"
        " of its own"
      )
    bias = (*kernel[:-1], "bias")
    for path in [kernel, bias] if bias in shapes else [kernel]:
      axes[path] = len(shapes[path]) - 1
      if shapes[path][-1:] != (tokens,):
        raise ValueError(
          f"head {_paths.join(path)!r} of shape {shapes[path]}: expected {tokens} tokens along its"
          f" last axis, as many as {_paths.join(table)!r} of shape {shapes[table]} has"
        )
  changes = []
  for path, axis in axes.items():
    before = shapes[path]
    after = tuple(n + by if a == axis else n for a, n in enumerate(before))
    changes.append(LeafChange(path, before, after, "tokens", {axis: np.arange(tokens)}))
  return Plan(tuple(changes), True, tuple(alpha.split("/")), gate=False)


def mean_tokens(variables: Any, plan: Plan, given: Mapping[str, Any] | None = None) -> Fresh:
  """Fresh values for `adding_tokens`: every new token is the mean of the old ones.

  So at first it is as likely as the old ones are on (geometric) average, and the distribution
  over the old ones changes little: no new token can outweigh them all, as one with a random row
  can in a model whose logits are mostly negative (Hewitt 2021, "Initializing new word
  embeddings for pretrained language models").

  Args:
    variables: The tree before it grows.
    plan: The plan that will be applied.
    given: For the path of a leaf its new entries, in place of the mean: an array of the leaf's
      shape with as many entries along the axis of tokens as are new.

  Returns:
    Fresh values for `plan.apply`.

  Raises:
    ValueError: If a path is not in the plan, or given entries have another shape.
  """
  leaves, changes = _paths.by_path(variables), plan.by_path
  values = {_trees.find(changes, name): value for name, value in (given or {}).items()}

  def read(path: _paths.Path, shape: tuple[int, ...], dtype: Any) -> Any:
    old, ((axis, _),) = np.asarray(leaves[path]), changes[path].positions.items()
    more = shape[axis] - old.shape[axis]
    wanted = (*old.shape[:axis], more, *old.shape[axis + 1 :])
    # Added up in single precision at least, whatever the leaf has.
    exact = np.promote_types(np.float32, np.float32 if old.dtype.itemsize < 4 else old.dtype)
    mean = old.astype(exact).mean(axis, keepdims=True)
    new = np.asarray(values[path]) if path in values else np.repeat(mean, more, axis)
    if new.shape != wanted:
      raise ValueError(
        f"new entries of {_paths.join(path)!r}: expected shape {wanted}, found {new.shape}"
      )
    return jnp.asarray(np.concatenate([old, new.astype(old.dtype)], axis), dtype)

  return read
