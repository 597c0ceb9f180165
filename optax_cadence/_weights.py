"""How much a micro-batch counts: by the `weight` of a call, by `skip`, and where it is finite."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _checks
from optax_cadence import _paths
from optax_cadence import _sharding
from optax_cadence import _window
from optax_cadence.regions.layout import Group
from optax_cadence.regions.layout import Layout
from optax_cadence.regions.layout import Leaves


def of_regions(of_leaves: Leaves, group: Group) -> jax.Array:
  """For each of a group's R regions what there is for its leaf: [R]."""
  return jnp.stack([of_leaves[t.leaf] for t in group.regions])


class Counting(NamedTuple):
  """Where a micro-batch counts, and how much.

  Attributes:
    weights: How much it counts for each leaf; None where all count alike.
    usable: Whether it is to be used for each leaf; None where it is for all.
    skips: Whether it is left out of a region where its gradient or weight is not finite.
    entries: Whether the entries that a group has of its leaves under masks are finite, by the name
      of the group.
  """

  weights: Leaves | None
  usable: Leaves | None
  skips: bool
  entries: Mapping[str, Sequence[jax.Array]]

  def of(
    self, group: Group, tensors: Sequence[jax.Array]
  ) -> tuple[jax.Array | None, jax.Array | None]:
    """Whether it is usable in each of a group's R regions, bool [R], and how much it counts.

    The weights are float32 [R]; None stands for all, and for 1 in all.
    """
    counts, weights = None, None if self.weights is None else of_regions(self.weights, group)
    if self.skips:
      entries = self.entries.get(group.name, ())
      counts = jnp.stack([*map(_window.all_finite, tensors), *entries])
      counts = counts if weights is None else counts & jnp.isfinite(weights)
    if self.usable is not None:
      usable = of_regions(self.usable, group)
      counts = usable if counts is None else counts & usable
    return counts, weights


def of_leaves(weight: Any, layout: Layout, grads: Leaves) -> dict[int, jax.Array]:
  """The weight of a micro-batch for each leaf: float32 scalars.

  In `jax.shard_map` the weights of devices are added up over axes that the leaf's gradient does not
  vary over: it is the gradient of all their micro-batches.

  Args:
    weight: A scalar, or a tree prefix of the parameters with such leaves, matched by key path.
    layout: The groups of the parameters.
    grads: The gradients.

  Raises:
    ValueError: If there is none, a leaf has no weight or a weight no leaf, or one is no number, or
      below 0.
  """
  if weight is None:
    raise ValueError(
      "weighted=True: expected weight=, a scalar or a prefix of the parameters that says how much"
      " the micro-batch counts, found none"
    )
  found = _spread("weight", weight, layout, _check)
  for i, given in found.items():
    x = jnp.asarray(given).astype(jnp.float32)
    missing = _sharding.axes_of(x) - _sharding.axes_of(grads[i])
    # In one order, so that all processes of a run compile the same program.
    found[i] = jax.lax.psum(x, _sharding.in_order(missing)) if missing else x
  return found


def usable(skip: Callable[[Any, Any], Any], grads: Any, params: Any, layout: Layout) -> Leaves:
  """Whether a micro-batch is to be used for each leaf, by what a predicate says.

  Raises:
    ValueError: If that is no truth value, or tree prefix of the parameters of such.
  """
  found = _spread("what skip returns", skip(grads, params), layout, _check_flag)
  return {i: ~jnp.asarray(flag) for i, flag in found.items()}


def _spread(
  what: str, tree: Any, layout: Layout, check: Callable[[str, Any], None]
) -> dict[int, Any]:
  """For each leaf what a tree prefix of the parameters has for it.

  Raises:
    ValueError: If it has nothing for a leaf, or something for none.
  """
  given, found, used = _paths.by_path(tree), {}, set()
  for path, x in given.items():
    name = _paths.join(path)
    check(f"{what} of {name!r}" if name else what, x)
  for i, path in enumerate(layout.paths):
    prefix = _paths.prefix_of(path, given)
    if prefix is None:
      raise ValueError(
        f"{what}: expected a scalar, or a prefix of the parameters, found none for"
        f" {layout.name(i)!r} among {_paths.listed(given)}"
      )
    used.add(prefix)
    found[i] = given[prefix]
  unused = [path for path in given if path not in used]
  if unused and layout.paths:
    raise ValueError(
      f"{what} of {_paths.listed(unused)}: no parameter is there; expected a prefix of"
      f" {_paths.listed(layout.paths)}"
    )
  return found


def _check(where: str, x: Any) -> None:
  number = isinstance(x, int | float | np.ndarray | np.generic | jax.Array)
  dtype = jax.dtypes.result_type(x) if number else np.dtype(object)
  real = any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))
  if not real or np.shape(x) != ():
    raise ValueError(f"{where}: expected a scalar, a real number, found {_checks.shown(x)}")
  if not isinstance(x, jax.core.Tracer) and not (np.isfinite(x) and float(x) >= 0):
    raise ValueError(f"{where}: expected a finite number of at least 0, found {_checks.shown(x)}")


def _check_flag(where: str, x: Any) -> None:
  is_flag = isinstance(x, bool) or getattr(x, "dtype", None) == np.bool_
  if not is_flag or np.shape(x) != ():
    raise ValueError(f"{where}: expected a truth value, found {_checks.shown(x)}")
