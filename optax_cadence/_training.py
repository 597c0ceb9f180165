"""Training steps: a loss, its gradient and the cadence in one function.

`training_step` lets the backward pass add to the windows where it can; `why_stored` says where it
cannot. `trainable` cuts parameters out of the backward pass where their gradient would go unused.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _cadence
from optax_cadence import _checks
from optax_cadence import _control
from optax_cadence import _sharding
from optax_cadence import _step
from optax_cadence import _window
from optax_cadence._state import CadenceState
from optax_cadence.regions import cuts
from optax_cadence.regions import layout as layouts
from optax_cadence.schedules import phases

if TYPE_CHECKING:
  from optax_cadence import _backward

# In an older one a scan in reverse may add to the wrong rows of a reference (github.com/jax-ml/jax,
# issue 32411), or a backward pass takes none.
OLDEST_JAX_WITH_REFERENCES = (0, 10, 0)


def training_step(
  loss: Callable[..., Any], tx: _cadence.CadenceTransformation, has_aux: bool = False
) -> Callable[..., tuple[optax.Params, Any, Any]]:
  """A micro-step in one function: differentiates, accumulates and applies.

  It does what `jax.value_and_grad(loss)` and `tx.apply` do one after the other, to the same state:
  either may take the next micro-step. But the backward pass adds to the windows, and no gradient of
  a leaf that accumulates exists as an array of its own. Of layers that are stacked in a leaf and
  run by a scan, that saves the memory of the gradient and the time to write and read it; of layers
  that are leaves it saves nothing and costs nothing. The sums are equal to the last bit; where a
  leaf is used several times, up to rounding, since every use is added by itself.

  Where layers have a period each (`oc.stacked`), the scan that reads them runs as several, one for
  each run of layers with one period; layers of period 1 have a gradient of their own size. Nothing
  but that scan may read the leaf.

  Where it cannot be, the gradient is stored as ever, and `oc.describe(tx, params)` says why: of
  leaves in other regions (bands, quadrants, masks), where a window is not of the parameter's dtype,
  where something looks at the gradient (`nonfinite="skip"`, a policy such as `until_certain`,
  transformations before the cadence in an `oc.chain`), and in JAX before 0.10. So it is also, which
  only the call knows, under `jax.vmap` and differentiation, in `jax.shard_map`, on meshes with
  explicit axes, in a step that is not compiled, and for a loss with effects such as
  `jax.debug.print`.

  Args:
    loss: `loss(params, *args)` returns a scalar; with `has_aux` a pair of that and anything else.
    tx: A cadence, or an `oc.chain` that ends in one.
    has_aux: Whether `loss` returns a pair.

  Returns:
    `step(params, state, *args, phase=None, **extra_args) -> params, state, value`: the value is
    what `loss` returns; `phase` and `extra_args` are as in `tx.apply`. To update every buffer in
    place, `jax.jit(step, donate_argnums=(0, 1), static_argnames="phase")`. With a phase, regions
    that cannot use this gradient (`accumulate="latest"`) are not differentiated.

  Raises:
    ValueError: If `tx` is no cadence or `loss` no function.

  >>> import jax, jax.numpy as jnp, optax, optax_cadence as oc
  >>> tx = oc.cadence(optax.sgd(0.5), 2)
  >>> step = jax.jit(oc.training_step(lambda w, x: (w - x) ** 2, tx))
  >>> w = jnp.float32(0.0)
  >>> state = tx.init(w)
  >>> for x in (1.0, 3.0):
  ...   w, state, value = step(w, state, x)
  ...   print(value, w)
  1.0 0.0
  9.0 2.0
  """
  from optax_cadence import _backward

  cadence = _cadence.of(tx, "oc.training_step(loss, tx)")
  alone, apply = _cadence.stands_alone(tx), tx.apply
  if not callable(loss):
    raise ValueError(f"loss must be a function, found {_checks.shown(loss)}")

  def step(
    params: optax.Params, state: Any, *args: Any, phase: int | None = None, **extra_args: Any
  ) -> tuple[optax.Params, Any, Any]:
    def loss_of(leaves: layouts.Leaves) -> Any:
      given = jax.tree.unflatten(jax.tree.structure(params), leaves.values())
      # Of others somebody looks at the gradient: to clip it, or to count that it is not finite.
      if phase is not None and cadence.accumulate == "latest" and alone and not cadence.skip:
        given = trainable(given, tx, phase)
      return loss(given, *args)

    leaves = layouts.leaves_of(params)
    traced = _backward.trace(loss_of, leaves, has_aux)

    def differentiate(
      call: _step.Call, state: CadenceState
    ) -> tuple[Any, layouts.Leaves, Any, Any]:
      sums = _sums(cadence, call, state, leaves, traced)
      parts = _parts(call.layout, sums)
      value, grads, given = _backward.value_and_sums(traced, leaves, sums, parts)
      # In the place of a gradient that does not exist stands what has its shape, and is not read.
      return value, leaves | grads, given, sums.keys()

    if alone:
      return cadence.train(params, state, differentiate, phase, **extra_args)
    value, found, _ = _backward.value_and_sums(traced, leaves, {})
    grads = jax.tree.unflatten(jax.tree.structure(params), found.values())
    return *apply(params, state, grads, phase=phase, **extra_args), value

  return step


def _sums(
  cadence: _cadence.Cadence,
  call: _step.Call,
  state: CadenceState,
  leaves: layouts.Leaves,
  loss: "_backward.Loss",
) -> dict[layouts.Tensor, jax.Array]:
  """The sums that the backward pass adds to; zero where a window is empty."""
  reasons = why_stored(cadence, call.layout, call.param_dtypes)
  sums: dict[layouts.Tensor, jax.Array] = {}
  for group in filter(lambda group: cadence.accumulates(group.every), call.layout.groups):
    window = _window.so_far(state.groups[group.name], call.layout.tree(group, group.take(leaves)))
    mine = {}
    for t, total in zip(group.tensors, window.sums, strict=True):
      read = loss.scanned if isinstance(t.cut, cuts.Whole) else loss.by_rows
      if reasons[t.leaf] is None and t.leaf in read and total.dtype == leaves[t.leaf].dtype:
        mine[t] = total
    if mine:
      # What a window that has fired leaves behind may be NaN. One micro-step of a window clears it.
      cleared = _control.maybe(window.length == 0, _cleared, list(mine.values()), None)
      sums |= zip(mine, cleared, strict=True)
  return sums


def _parts(layout: layouts.Layout, sums: Collection[layouts.Tensor]) -> list[layouts.Tensor]:
  """All runs of rows of the leaves of which some have a sum."""
  leaves = {t.leaf for t in sums if not isinstance(t.cut, cuts.Whole)}
  return [t for group in layout.groups for t in group.tensors if t.leaf in leaves]


def _cleared(sums: list[jax.Array], _: None) -> list[jax.Array]:
  return jax.tree.map(jnp.zeros_like, sums)


def why_stored(
  cadence: _cadence.Cadence, layout: layouts.Layout, dtypes: Sequence[Any]
) -> dict[int, str | None]:
  """Why `training_step` stores the gradient of a leaf that accumulates, None where it does not.

  Args:
    cadence: The cadence, with no other transformation before it.
    layout: The groups of the parameters.
    dtypes: The dtype of each parameter.

  Returns:
    The reasons by the position of the leaf, of those that have a window.
  """
  scattered = set()
  for group in layout.groups:
    for t in (*group.tensors, *group.masked):
      if not (isinstance(t.cut, cuts.Whole) or _is_run(t.cut, layout.shapes[t.leaf])):
        scattered.add(t.leaf)
  reasons: dict[int, str | None] = {}
  for group in filter(lambda group: cadence.accumulates(group.every), layout.groups):
    for t in (*group.tensors, *group.masked):
      own = _why_stored(cadence, group, dtypes[t.leaf])
      reason = "regions that are no runs of layers" if t.leaf in scattered else own
      reasons[t.leaf] = reasons.get(t.leaf) or reason
  return reasons


def _is_run(cut: cuts.Cut, shape: tuple[int, ...]) -> bool:
  """Whether a part of a leaf is a run of its rows."""
  if not isinstance(cut, cuts.Box):
    return False
  return all(found == (0, n) for found, n in zip(cut.intervals[1:], shape[1:], strict=True))


def _why_stored(cadence: _cadence.Cadence, group: layouts.Group, dtype: Any) -> str | None:
  """The same of a leaf that a group has all or a part of."""
  policy, window = group.every.policy, cadence.sum_dtype(dtype)
  if cadence.skip:
    return 'nonfinite="skip"'
  if policy is not None and policy.reads_gradients:
    return str(policy)
  if window != dtype:
    return f"a window in {window} of a parameter in {dtype}"
  if window.itemsize < 4:
    return f"a window in {window}, which holds a mean"
  if jax.__version_info__ < OLDEST_JAX_WITH_REFERENCES:
    return f"JAX {jax.__version__}"
  return None


def trainable(params: optax.Params, tx: _cadence.CadenceTransformation, phase: int) -> optax.Params:
  """Stops the gradient of regions that cannot use this micro-step's.

  With `accumulate="latest"` only the gradient of the micro-step that is due counts. Take
  the gradient of `loss(oc.trainable(params, tx, phase), batch)` and the compiler drops
  the rest from the backward pass. Other cadences use every gradient: nothing is stopped.

  Args:
    params: Parameters, as given to `tx.init`.
    tx: A cadence, or an `oc.chain` that ends in one.
    phase: t modulo `tx.cycle`, a Python int.

  Returns:
    The parameters, with the same values.

  Raises:
    ValueError: If the phase is traced or outside the cycle.

  >>> import jax, jax.numpy as jnp, optax, optax_cadence as oc
  >>> params = {"body": jnp.float32(2.0), "head": jnp.float32(3.0)}
  >>> tx = oc.cadence(optax.sgd(0.1), {"body": 2, "head": 1}, accumulate="latest")
  >>> loss = lambda p: p["body"] * p["head"]
  >>> grads = jax.grad(lambda p: loss(oc.trainable(p, tx, phase=1)))(params)
  >>> print(grads["body"], grads["head"])
  0.0 2.0
  """
  cadence = _cadence.of(tx, "oc.trainable(params, tx, phase)")
  layout = cadence.groups_of(params)
  static_phase = phases.checked_phase(phase, layout.cycle)
  if cadence.accumulate != "latest":
    return params
  leaves = layouts.leaves_of(params)
  for group in layout.groups:
    if group.every.due(static_phase):
      continue
    for t in group.tensors:
      leaf = leaves[t.leaf]
      whole = cuts.gathered(leaf, [t.cut])
      stopped = t.cut.put(t.cut.view(whole), jax.lax.stop_gradient(t.cut.take(whole)))
      leaves[t.leaf] = _sharding.lying_as(stopped.reshape(leaf.shape), leaf)
  return layout.treedef.unflatten(leaves.values())
