"""Training steps: a loss, its gradient and the cadence in one function.

`training_step` lets the backward pass add to the windows where it can; `why_stored` says where it
cannot. `trainable` cuts parameters out of the backward pass where their gradient would go unused.
`phases` says which regions are due at each micro-step.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any, TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cadence import _cadence
from optax_cadence import _checks
from optax_cadence import _control
from optax_cadence import _paths
from optax_cadence import _step
from optax_cadence import _window
from optax_cadence._state import cadence_states
from optax_cadence._state import State
from optax_cadence.regions import cuts
from optax_cadence.regions import layout as layouts
from optax_cadence.schedules import phases as _phases
from optax_cadence.schedules.phases import Phase
from optax_cadence.schedules.phases import Phases

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

  In some cases the gradient is stored all the same, and `oc.describe(tx, params)` says why: of
  leaves in other regions (bands, quadrants, masks), where a window is not of the parameter's dtype,
  where something looks at the gradient (`nonfinite="skip"`, a policy such as `until_certain`,
  transformations before the cadence in an `oc.chain`), and in JAX before 0.10. In others that is
  only known when the step is called: under `jax.vmap` and differentiation, in `jax.shard_map`, on
  meshes with explicit axes, in a step that is not compiled, for a loss with effects such as
  `jax.debug.print`, where a scan, a branch or a call takes a leaf (or one row of it) twice, and
  where every leaf has a weight of its own.

  Args:
    loss: `loss(params, *args)` returns a scalar; with `has_aux` a pair of that and anything else.
    tx: A cadence, or an `oc.chain` that ends in one.
    has_aux: Whether `loss` returns a pair.

  Returns:
    `step(params, state, *args, phase=None, weight=None, **extra_args) -> params, state, value`: the
    value is what `loss` returns; `phase`, `weight` and `extra_args` are as in `tx.apply`, so that
    the loss is given all its arguments by position. To update every buffer in place,
    `jax.jit(step, donate_argnums=(0, 1), static_argnames="phase")`. With a phase, regions that
    cannot use this gradient (`accumulate="latest"`) are not differentiated.

  Raises:
    ValueError: If `tx` is no cadence or `loss` no function; and in `step` as `tx.apply` does, or if
      a keyword is meant for the loss.

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
  chain, apply = _cadence.chain_of(tx), tx.apply
  alone, owner = chain is None, chain or cadence
  if not callable(loss):
    raise ValueError(f"loss must be a function, found {_checks.shown(loss)}")

  def step(
    params: optax.Params,
    state: Any,
    *args: Any,
    phase: int | Phase | None = None,
    weight: Any = None,
    **extra_args: Any,
  ) -> tuple[optax.Params, Any, Any]:
    check_extra_args(loss, 1 + len(args), extra_args)
    # Before the loss is traced, which could only say that it has got something else.
    state = owner.plain(state, params)

    def loss_of(leaves: layouts.Leaves) -> Any:
      given = layouts.with_leaves(params, leaves)
      # Of others somebody looks at the gradient: to clip it, or to count that it is not finite.
      if phase is not None and cadence.accumulate == "latest" and alone and not cadence.skip:
        given = trainable(given, tx, phase)
      return loss(given, *args)

    leaves, one_weight = layouts.leaves_of(params), _is_number(weight)
    traced = _backward.trace(loss_of, leaves, has_aux)

    def differentiate(call: _step.Call, state: State) -> tuple[Any, layouts.Leaves, Any, Any]:
      # Of one weight for all leaves the whole backward pass is a multiple.
      factor = jnp.asarray(weight, jnp.float32) if cadence.weighted and one_weight else None
      sums = {}
      if one_weight or not cadence.weighted:
        sums = _sums(cadence, call, state, leaves, traced)
      parts = _parts(call.layout, sums)
      value, grads, given = _backward.value_and_sums(traced, leaves, sums, parts, factor)
      # In the place of a gradient that does not exist stands what has its shape, and is not read.
      return value, leaves | grads, given, sums.keys()

    if alone:
      return cadence.train(params, state, differentiate, phase, weight, **extra_args)
    value, found, _ = _backward.value_and_sums(traced, leaves, {})
    grads = layouts.with_leaves(params, found)
    return *apply(params, state, grads, phase=phase, weight=weight, **extra_args), value

  return step


def check_extra_args(loss: Callable[..., Any], given: int, extra_args: Collection[str]) -> None:
  """Raises `ValueError` where a keyword is meant for the loss, which gets none.

  The inner optimizer would take it, and most drop what they do not know: a loss with a default for
  it would go on without a word.

  Args:
    loss: The loss.
    given: How many arguments it is given, all by position.
    extra_args: The keywords.
  """
  try:
    signature = inspect.signature(loss)
    filled = signature.bind_partial(*[None] * given).arguments
  except (TypeError, ValueError):  # no signature is known, or calling the loss says what is wrong
    return
  by_name = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
  for name, parameter in signature.parameters.items():
    if name in extra_args and name not in filled and parameter.kind in by_name:
      raise ValueError(
        f"training_step: {name}= is an argument of the loss, and keywords go to the inner"
        f" optimizer: expected it by position, or the loss as functools.partial(loss, {name}=...)"
      )


def _sums(
  cadence: _cadence.Cadence,
  call: _step.Call,
  state: State,
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
      if window.by_region:
        lengths = [window.length[i] for i, t in enumerate(group.tensors) if t in mine]
        pairs = zip(lengths, mine.values(), strict=True)
        cleared = [_control.maybe(n == 0, _cleared, [x], None)[0] for n, x in pairs]
      else:
        cleared = _control.maybe(window.length == 0, _cleared, list(mine.values()), None)
      sums |= zip(mine, cleared, strict=True)
  return sums


def _is_number(x: Any) -> bool:
  return isinstance(x, int | float | np.generic | np.ndarray | jax.Array) and np.ndim(x) == 0


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

  It is said by the position of the leaf, of those that have a window, for a cadence with no other
  transformation before it; dtypes are those of the parameters.
  """
  regions = [t for group in layout.groups for t in group.regions]
  scattered = {t.leaf for t in regions if not _is_run(t.cut, layout.shapes[t.leaf])}
  reasons: dict[int, str | None] = {}
  for group in filter(lambda group: cadence.accumulates(group.every), layout.groups):
    for t in group.regions:
      own = _why_stored(cadence, group, dtypes[t.leaf])
      reason = "regions that are no runs of layers" if t.leaf in scattered else own
      reasons[t.leaf] = reasons.get(t.leaf) or reason
  return reasons


def _is_run(cut: cuts.Cut, shape: tuple[int, ...]) -> bool:
  """Whether a part of a leaf is a run of its rows, or the whole of it."""
  if not isinstance(cut, cuts.Box):
    return isinstance(cut, cuts.Whole)
  return all(found == (0, n) for found, n in zip(cut.intervals[1:], shape[1:], strict=True))


def _why_stored(cadence: _cadence.Cadence, group: layouts.Group, dtype: Any) -> str | None:
  """The same of a leaf that a group has all or a part of."""
  policy, window = group.every.policy, cadence.sum_dtype(dtype)
  if cadence.skip:
    return 'nonfinite="skip"' if cadence.skips_nonfinite else "skip"
  if policy is not None and policy.reads_gradients:
    return str(policy)
  if window != dtype:
    return f"a window in {window} of a parameter in {dtype}"
  if window.itemsize < 4:
    return f"a window in {window}, which holds a mean"
  if jax.__version_info__ < OLDEST_JAX_WITH_REFERENCES:
    return f"JAX {jax.__version__}"
  return None


def trainable(
  params: optax.Params, tx: _cadence.CadenceTransformation, phase: int | Phase
) -> optax.Params:
  """Stops the gradient of regions that cannot use this micro-step's.

  With `accumulate="latest"` only the gradient of the micro-step that is due counts. Take
  the gradient of `loss(oc.trainable(params, tx, phase), batch)` and the compiler drops
  the rest from the backward pass. Other cadences use every gradient: nothing is stopped.

  Args:
    params: Parameters, as given to `tx.init`.
    tx: A cadence, or an `oc.chain` that ends in one.
    phase: Of `oc.phases`, or t modulo `tx.cycle`, a Python int.

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
  due = _phases.checked(phase, layout.everys).due
  if cadence.accumulate != "latest":
    return params
  leaves = layouts.leaves_of(params)
  for group in layout.groups:
    if group.name in due:
      continue
    for t in group.tensors:
      stopped = jax.lax.stop_gradient(cuts.read(leaves[t.leaf], t.cut))
      leaves[t.leaf] = cuts.written(leaves[t.leaf], t.cut, stopped)
  return layouts.with_leaves(params, leaves)


def phases(
  tx: _cadence.CadenceTransformation, params: optax.Params, state: optax.OptState | None = None
) -> Phases:
  """The phase of each micro-step, without an end: what to give `update` or `apply` as `phase`.

  A `phase` says which regions are due while the program is traced, so that no branch is left in
  it. Make it a static argument: `jax.jit(step, static_argnames="phase")`. Phases at which the same
  regions are due are equal, so that period 8 compiles two programs, and periods 8, 4 and 1 compile
  three. How many there will be is `oc.phases(tx, params).programs`.

  Args:
    tx: A cadence, or an `oc.chain` that ends in one.
    params: Parameters, as given to `tx.init`; only shapes are read.
    state: The optimizer's state, to go on where it stands, as after a resume; it may be the
      `opt_state` of an `nnx.Optimizer`. None begins with the first micro-step.

  Returns:
    An iterator of `Phase`s, with the attributes `programs` and `cycle`.

  Raises:
    ValueError: If a period is not static, or there is no cadence in the state.

  >>> import jax.numpy as jnp, optax, optax_cadence as oc
  >>> params = {"body": jnp.zeros(2), "head": jnp.zeros(2)}
  >>> tx = oc.cadence(optax.sgd(1.0), {"body": 3, "head": 1})
  >>> phases = oc.phases(tx, params)
  >>> phases
  Phases(programs=2, cycle=3)
  >>> [sorted(next(phases).due) for _ in range(4)]
  [['1'], ['1'], ['1', '3'], ['1']]
  """
  layout = _cadence.of(tx, "oc.phases(tx, params)").groups_of(params)
  if state is None:
    return Phases(layout.everys, 1)
  steps = [_paths.without_variables(node.micro_step) for node in cadence_states(state)]
  if not steps:
    raise ValueError(f"oc.phases: expected a cadence in the state, found {_checks.shown(state)}")
  done = np.unique(np.concatenate([np.ravel(x) for x in steps]))
  if len(done) > 1:
    raise ValueError(f"oc.phases: expected a state of one micro-step, found {done.tolist()}")
  return Phases(layout.everys, int(done[0]) + 1)
