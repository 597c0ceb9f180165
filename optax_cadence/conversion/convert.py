"""The state of one way of accumulating, made from that of another with the same optimizer.

Both states are read as regions: parts of a leaf, each with what is kept for it (`reading`). What is
kept in the shape of a region is put back into the shape of its leaf, and the new regions are cut
out of that. What belongs to no parameter (counters, hyperparameters) is a group's, and goes where
its entries go (`merging`). The new state is one of `init` with that in it (`writing`).
"""

from typing import Any, Literal

import jax
import numpy as np
import optax

from optax_cadence import _cadence
from optax_cadence import _checks
from optax_cadence import _control
from optax_cadence import _paths
from optax_cadence._state import plain
from optax_cadence.conversion import reading
from optax_cadence.conversion import writing


def convert(
  state: optax.OptState,
  tx: Any,
  params: optax.Params,
  *,
  to: Any,
  counters: Literal["equal", "most", "least"] = "equal",
) -> optax.OptState:
  """The state of another cadence of the same optimizer, or of `optax.MultiSteps`, in mid-window.

  Training goes on with `to` where `tx` left it:

  - Every entry of a parameter keeps its moments and what its window has gathered. A window may be
    longer than the period that it now has. One that is read as a mean (`optax.MultiSteps`) and kept
    as a sum is equal up to rounding, everything else to the bit.
  - Micro-steps are counted on (of `optax.MultiSteps` those that it did not skip), so that a static
    period is due at t ≡ offset (mod period), and `oc.phases(to, params, state)` is right. A window
    under a schedule has the length that the schedule gives for the micro-step at which it began;
    one that is over is due next.
  - A group has the counters (Adam's, `updates`) and hyperparameters of the group its entries come
    from. With `inner` a function of the window's length, a hyperparameter that is as `init` made it
    is as `init` makes it for the new group.
  - A policy goes on where it decides for the same region. For another it does not know the norms of
    gradients that it has not seen: an open window then lasts its `max_period`.

  It is called outside of `jax.jit`. The new state shares buffers with the old one, so donate only
  one of them.

  Args:
    state: The state.
    tx: What made it: a cadence, an `oc.chain` that ends in one, or an `optax.MultiSteps` (or its
      `gradient_transformation()`).
    params: The parameters.
    to: What it is to be a state of; likewise. In an `oc.chain` what stands before the cadence has
      to be the same in both.
    counters: What is right where groups merge that have counted differently, as after periods of 4
      and 2: `"equal"`: it is an error; `"most"`, `"least"`: those of the group with the most or the
      fewest updates (Adam's bias correction is then that of older or younger moments).

  Returns:
    The state of `to`.

  Raises:
    ValueError: If something cannot be carried, before anything is changed: groups that merge and
      have counted differently; regions that merge, or a group without `nonfinite="skip"` and
      weights, whose windows differ in length; a window that is not empty, for a region that has
      none (period 1, `accumulate="latest"`), or a narrower one; weights that count no longer; an
      array that an optimizer keeps for a region that is now another, in another shape than it.

  >>> import jax.numpy as jnp, optax, optax_cadence as oc
  >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
  >>> old = oc.cadence(optax.adam(0.1), 4)
  >>> updates, state = old.update(params, old.init(params), params)
  >>> new = oc.cadence(optax.adam(0.1), {"a": 4, "b": 2})
  >>> state = oc.convert(state, old, params, to=new)
  >>> {name: int(group.remaining) for name, group in state.groups.items()}
  {'2': 1, '4': 3}
  """
  if counters not in ("equal", "most", "least"):
    raise ValueError(
      f"counters must be 'equal', 'most' or 'least', found {_checks.shown(counters)}"
    )
  if _control.is_traced((state, params)):
    raise ValueError("convert: expected arrays, found traced ones; call it outside of jax.jit")
  return _without_aliases(_converted(state, tx, params, to, counters))


def _converted(state: Any, tx: Any, params: Any, to: Any, counters: str) -> Any:
  """`convert`, of which one result may stand in several places."""
  old, new = (_cadence.chain_of(x) for x in (tx, to))
  if old is not None:
    state = _in_containers(state, old.init, params)
  if old is not None and new is not None and _same_before(old, new, params):
    return (*state[:-1], _converted(state[-1], old.last, params, new.last, counters))
  if old is not None and not old.before:
    return _converted(state[-1], old.last, params, to, counters)
  if new is not None and not new.before:
    return (_converted(state, tx, params, new.last, counters),)
  if old is not None or new is not None:
    raise ValueError(
      "convert: expected the same transformations before the cadence in tx and in to, found"
      " others; what stands before optax.MultiSteps belongs in an optimizer of its own"
    )
  before, after = _accumulating("tx", tx), _accumulating("to", to)
  state = _in_containers(state, before.init, params)
  return writing.written(reading.read(before, state, params), after, params, counters)


def _same_before(old: _cadence.Chain, new: _cadence.Chain, params: Any) -> bool:
  """Whether what stands before the cadences has the same states."""
  states = [[jax.eval_shape(tx.init, params) for tx in chain.before] for chain in (old, new)]
  forms = [(jax.tree.structure(x), [*map(np.shape, jax.tree.leaves(x))]) for x in states]
  return forms[0] == forms[1]


def _accumulating(name: str, tx: Any) -> Any:
  """The `MultiSteps`, or the `Cadence`, behind a transformation."""
  owner = getattr(getattr(tx, "update", None), "__self__", None)
  if isinstance(owner, optax.MultiSteps):
    return owner
  if not isinstance(tx, _cadence.CadenceTransformation):
    raise ValueError(
      f"convert: expected a cadence, an oc.chain that ends in one or an optax.MultiSteps as {name},"
      f" found {_checks.shown(tx)}; of a larger optimizer convert the part of the state that is"
      " the cadence's"
    )
  return _cadence.of(tx)


def _in_containers(state: Any, init: Any, params: Any) -> Any:
  """The state as `init` makes it.

  Raises:
    ValueError: If it is that of something else.
  """
  state = plain(init, state, params)
  difference = _paths.mismatch(jax.eval_shape(init, params), state)
  if difference is not None:
    raise ValueError(f"convert: expected the state of tx, which has {difference}")
  return state


def _without_aliases(tree: Any) -> Any:
  """The tree, with a copy of each array that stands in several places: it may be donated."""
  seen: set[int] = set()
  leaves, treedef = jax.tree.flatten(tree)
  for i, x in enumerate(leaves):
    leaves[i] = x.copy() if id(x) in seen and isinstance(x, jax.Array) else x
    seen.add(id(x))
  return jax.tree.unflatten(treedef, leaves)
