"""How much a micro-batch counts: the `weight` that a call is given, for each leaf."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _checks
from optax_cadence import _paths
from optax_cadence import _sharding
from optax_cadence.regions.layout import Group
from optax_cadence.regions.layout import Layout
from optax_cadence.regions.layout import Leaves


def of_regions(weights: Leaves, group: Group) -> jax.Array:
  """The weights of a group's regions: float32 [R]."""
  return jnp.stack([weights[t.leaf] for t in (*group.tensors, *group.masked)])


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
  rows = [(tuple(path), x) for path, x in _paths.flatten_with_paths(weight)]
  for path, x in rows:
    _check(_paths.join(path), x)
  given, found, used = dict(rows), {}, set()
  for i, path in enumerate(layout.paths):
    prefix = next((path[:n] for n in range(len(path) + 1) if path[:n] in given), None)
    if prefix is None:
      raise ValueError(
        f"weight: expected a scalar, or a prefix of the parameters, found none for"
        f" {layout.name(i)!r} among {_paths.listed(given)}"
      )
    used.add(prefix)
    x = jnp.asarray(given[prefix]).astype(jnp.float32)
    missing = _sharding.axes_of(x) - _sharding.axes_of(grads[i])
    found[i] = jax.lax.psum(x, tuple(missing)) if missing else x
  unused = [path for path in given if path not in used]
  if unused and layout.paths:
    raise ValueError(
      f"weight of {_paths.listed(unused)}: no parameter is there; expected a prefix of"
      f" {_paths.listed(layout.paths)}"
    )
  return found


def _check(name: str, x: Any) -> None:
  where = f"weight of {name!r}" if name else "weight"
  number = isinstance(x, int | float | np.ndarray | np.generic | jax.Array)
  dtype = jax.dtypes.result_type(x) if number else np.dtype(object)
  real = any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))
  if not real or np.shape(x) != ():
    raise ValueError(f"{where}: expected a scalar, a real number, found {_checks.shown(x)}")
  if not isinstance(x, jax.core.Tracer) and not (np.isfinite(x) and float(x) >= 0):
    raise ValueError(f"{where}: expected a finite number of at least 0, found {_checks.shown(x)}")
