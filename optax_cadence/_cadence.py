"""The transformation: the settings of a cadence and the functions Optax calls.

What happens at a micro-step is in `_step`; here is what it is given.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_cadence import _layout
from optax_cadence import _paths
from optax_cadence import _schedules
from optax_cadence import _step
from optax_cadence import _windows
from optax_cadence._state import CadenceState
from optax_cadence._state import GroupState


class CadenceTransformation(optax.GradientTransformationExtraArgs):
  """A `GradientTransformationExtraArgs` with the methods of a cadence.

  Attributes:
    apply: `apply(params, state, grads, phase=None, **extra_args) -> params, state`:
      update and apply in one. Parameters and inner state of regions that are not due
      are neither read nor written. Arguments stand in the order of the results, so
      that `jax.jit(tx.apply, donate_argnums=(0, 1))` updates every buffer in place.
    flush: `flush(state, params, **extra_args) -> updates, state`: applies every window
      that is not empty, so that nothing is lost at the end of training.
    cadence: The cadence itself, for `describe` and its kin.
  """

  apply: Callable[..., tuple[optax.Params, Any]]
  flush: Callable[..., tuple[optax.Updates, Any]]
  cadence: "Cadence"

  def __new__(
    cls,
    init: Callable[..., Any],
    update: Callable[..., Any],
    apply: Callable[..., Any],
    flush: Callable[..., Any],
    cadence: "Cadence",
  ) -> "CadenceTransformation":
    self = super().__new__(cls, init, update)
    self.apply, self.flush, self.cadence = apply, flush, cadence
    return self

  @property
  def cycle(self) -> int | None:
    """Micro-steps after which the schedule repeats; None when a period is dynamic."""
    return self.cadence.cycle


def cadence(
  inner: optax.GradientTransformation,
  every: Any,
  *,
  accumulate: Literal["mean", "sum", "latest"] = "mean",
  accumulator_dtype: Any = None,
  nonfinite: Literal["propagate", "skip"] = "propagate",
  clock: Literal["updates", "micro_steps"] = "updates",
) -> CadenceTransformation:
  r"""Lets every part of the parameters accumulate gradients over its own period.

  A region with period :math:`k` is due at micro-steps :math:`t = k, 2k, \dots` and
  hands `inner` the mean gradient of its window; in between its update is exactly zero
  and nothing of its inner state changes. All regions with the same cadence form a
  group, and each group behaves as if `optax.MultiSteps(inner, k)` trained it alone.

  Args:
    inner: The optimizer that every group has an instance of.
    every: A tree prefix of the parameters whose leaves are cadences, matched by key
      path, or a callable from parameters to one. A cadence is an integer, an `Every`,
      a `Grid` (`channels`, `quadrants`, `stacked`), an integer mask that broadcasts
      against the leaf, a schedule `micro_steps_done -> period`, or a traced integer.
      One schedule for the whole tree is `Every(schedule)`.
    accumulate: `"mean"` or `"sum"` of the gradients in a window, or `"latest"`, the
      last one alone, for which no accumulator is allocated.
    accumulator_dtype: Dtype of the accumulators; by default that of the parameters,
      but at least float32.
    nonfinite: `"propagate"`: a NaN reaches the update of its own window and no other.
      `"skip"`: a micro-batch with a NaN or an infinity in a region is left out of
      that region's window and counted in `skipped`; a window left with none does not
      fire. Needs an `inner` that `optax.tree_utils.tree_map_params` understands.
    clock: What a learning-rate schedule in `inner` counts: `"updates"` of its group, as
      in `optax.MultiSteps`, or `"micro_steps"` of the whole run. Adam's own counter
      always counts updates.

  Returns:
    A `CadenceTransformation`: `init` and `update` as in Optax, where `update` takes
    `phase`, a Python int that is t modulo `cycle`, so that no branch is left in the
    program; besides them `apply`, `flush` and `cycle`.

  Raises:
    ValueError: For a bad argument, at construction, `init` or while tracing; it names
      the parameter's path, what was found and what was expected.

  References:
    Hermans et al. 2017, accumulated gradient normalization, arXiv:1710.02368.

  >>> import jax.numpy as jnp, optax, optax_cadence as oc
  >>> params = {"body": jnp.zeros(2), "head": jnp.zeros(2)}
  >>> tx = oc.cadence(optax.sgd(1.0), {"body": 2, "head": 1})
  >>> state = tx.init(params)
  >>> for _ in range(2):
  ...   updates, state = tx.update({"body": jnp.ones(2), "head": jnp.ones(2)}, state)
  ...   print(updates["body"], updates["head"])
  [0. 0.] [-1. -1.]
  [-1. -1.] [-1. -1.]
  """
  self = Cadence(inner, every, accumulate, accumulator_dtype, nonfinite, clock)
  return CadenceTransformation(self.init, self.update, self.apply, self.flush, self)


class Cadence:
  """The settings of a cadence, and the four functions that make the transformation."""

  def __init__(
    self,
    inner: optax.GradientTransformation,
    every: Any,
    accumulate: str,
    accumulator_dtype: Any,
    nonfinite: str,
    clock: str,
  ):
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
      raise ValueError(f"inner must be an optax.GradientTransformation, found {inner!r}")
    _one_of("accumulate", accumulate, ("mean", "sum", "latest"))
    _one_of("nonfinite", nonfinite, ("propagate", "skip"))
    _one_of("clock", clock, ("updates", "micro_steps"))
    if accumulator_dtype is not None and not jnp.issubdtype(accumulator_dtype, jnp.inexact):
      raise ValueError(f"accumulator_dtype must be a float dtype, found {accumulator_dtype!r}")
    if not callable(every):
      _layout.everys(every)
    self.inner = optax.with_extra_args_support(inner)
    self.every = every
    self.accumulate = accumulate
    self.accumulator_dtype = accumulator_dtype
    self.skip = nonfinite == "skip"
    self.clock = clock
    # The cadences of the last tree's groups, for where no parameters are at hand.
    self._seen: tuple[_schedules.Every, ...] | None = None

  @property
  def cycle(self) -> int | None:
    """Least common multiple of the periods; None when one is dynamic."""
    if not callable(self.every):
      return _schedules.cycle(_layout.everys(self.every))
    return _schedules.cycle(self._groups_seen("the cycle of a callable every"))

  def layout(self, tree: Any) -> _layout.Layout:
    """The groups of a tree."""
    found = _layout.layout(self.every, tree)
    self._seen = tuple(group.every for group in found.groups)
    return found

  def accumulates(self, every: _schedules.Every) -> bool:
    """Whether groups with this cadence have accumulators."""
    return self.accumulate != "latest" and not every.always

  def sum_dtype(self, dtype: Any) -> Any:
    """Dtype of the accumulator of a parameter."""
    return _windows.accumulator_dtype(dtype, self.accumulator_dtype)

  def init(self, params: optax.Params) -> CadenceState:
    if _is_placeholder(params):
      return self._init_placeholder(params)
    layout, leaves, groups = self.layout(params), _leaves(params), []
    for group in layout.groups:
      tensors = group.take(leaves)
      sums = [jnp.zeros(x.shape, self.sum_dtype(x.dtype)) for x in tensors]
      trees = layout.tree(group, tensors), layout.tree(group, sums)
      groups.append(self._init_group(group.every, *trees, len(tensors)))
    return CadenceState(jnp.int32(0), tuple(groups))

  def update(
    self,
    grads: optax.Updates,
    state: CadenceState,
    params: optax.Params | None = None,
    *,
    phase: int | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, CadenceState]:
    step, leaves = self._step(grads, state, params, extra_args), _leaves(grads)
    zeros = {i: jnp.zeros_like(g) for i, g in leaves.items()}
    updates, state = step.advance(leaves, state, zeros, self._phase(phase))
    return jax.tree.unflatten(jax.tree.structure(grads), updates.values()), state

  def apply(
    self,
    params: optax.Params,
    state: CadenceState,
    grads: optax.Updates,
    phase: int | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Params, CadenceState]:
    step = self._step(grads, state, params, extra_args, in_place=True)
    leaves, state = step.advance(_leaves(grads), state, _leaves(params), self._phase(phase))
    return jax.tree.unflatten(jax.tree.structure(params), leaves.values()), state

  def flush(
    self, state: CadenceState, params: optax.Params, **extra_args: Any
  ) -> tuple[optax.Updates, CadenceState]:
    step = self._step(params, state, params, extra_args)
    zeros = {i: jnp.zeros_like(p) for i, p in _leaves(params).items()}
    updates, state = step.flush(state, zeros)
    return jax.tree.unflatten(jax.tree.structure(params), updates.values()), state

  def _step(
    self,
    grads: Any,
    state: CadenceState,
    params: Any,
    extra_args: dict[str, Any],
    in_place: bool = False,
  ) -> _step.Step:
    layout = self.layout(grads)
    if params is not None:
      _check_same(layout, params)
    if len(state.groups) != len(layout.groups):
      raise ValueError(
        f"the state holds {len(state.groups)} groups, but every makes {len(layout.groups)} of"
        " this tree; a state goes with the cadences it was made for"
      )
    return _step.Step(
      inner=self.inner,
      layout=layout,
      dtypes={i: g.dtype for i, g in _leaves(grads).items()},
      params=None if params is None or in_place else _leaves(params),
      extra_args=extra_args,
      in_place=in_place,
      sums=self.accumulate == "sum",
      set_schedules=self.clock == "micro_steps",
    )

  def _phase(self, phase: Any) -> int | None:
    return None if phase is None else _schedules.checked_phase(phase, self.cycle)

  def _init_group(self, every: _schedules.Every, params: Any, sums: Any, n: int) -> GroupState:
    accumulates = self.accumulates(every)
    return GroupState(
      inner_state=self.inner.init(params),
      accumulators=sums if accumulates else None,
      window=jnp.zeros((n,) if self.skip else (), jnp.int32) if accumulates else None,
      remaining=None if every.always else every.first_window(),
      updates=jnp.int32(0),
      skipped=jnp.zeros((n,), jnp.int32) if self.skip else None,
    )

  def _init_placeholder(self, placeholder: Any) -> CadenceState:
    # As `optax.masked` does: `tree_map_params` probes with a stand-in for the parameters.
    everys = self._groups_seen("tree_map_params")
    groups = [self._init_group(every, placeholder, placeholder, 1) for every in everys]
    return CadenceState(jnp.int32(0), tuple(groups))

  def _groups_seen(self, what: str) -> tuple[_schedules.Every, ...]:
    if self._seen is None:
      raise ValueError(
        f"{what} depends on the parameters: call tx.init(params) first (or"
        " jax.eval_shape(tx.init, params), which allocates nothing)"
      )
    return self._seen


def _leaves(tree: Any) -> _step.Leaves:
  return dict(enumerate(map(jnp.asarray, jax.tree.leaves(tree))))


def _is_placeholder(tree: Any) -> bool:
  # By name: the class is private to Optax, the way it is used is not.
  return type(tree).__name__ == "_ParamsPlaceholder"


def _one_of(name: str, value: Any, options: tuple[str, ...]) -> None:
  if value not in options:
    raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, found {value!r}")


def _check_same(layout: _layout.Layout, params: Any) -> None:
  """Raises unless gradients and parameters have the same paths and shapes."""
  leaves, treedef = jax.tree.flatten(params)
  shapes = tuple(jnp.shape(leaf) for leaf in leaves)
  if treedef == layout.treedef and shapes == layout.shapes:
    return
  paths = (_paths.join(path) for path, _ in _paths.flatten_with_paths(params))
  given = dict(zip(paths, shapes, strict=True))
  found = dict(zip(layout.paths, layout.shapes, strict=True))
  for path in [*given, *found]:
    if given.get(path) != found.get(path):
      raise ValueError(
        f"gradient of {path!r}: expected {_shape(given.get(path))} as the parameters have,"
        f" found {_shape(found.get(path))}"
      )


def _shape(shape: tuple[int, ...] | None) -> str:
  return "nothing there" if shape is None else f"shape {shape}"
