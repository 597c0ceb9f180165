"""Lets the schedules inside an optimizer count the micro-steps of the run.

A schedule is set through the state that counts for it, which is recognised by its type. Counters
that serve an optimizer itself, such as Adam's for bias correction, are left alone; so an optimizer
that reads a schedule by such a counter is refused.
"""

import functools
import inspect
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import optax
import optax.contrib

from optax_cadence._inner import Inner

_INJECTED = (optax.InjectStatefulHyperparamsState, optax.InjectHyperparamsState)

# The functions of Optax that read a schedule by a count that `set_schedules` sets.
_SET = {"scale_by_schedule", "add_decayed_weights"}


def check(inner: optax.GradientTransformation) -> None:
  """Raises `ValueError` if there is a schedule in the optimizer that cannot be set.

  It is looked for in what the functions of the optimizer hold: a callable that stands for a
  parameter which a function of Optax declares to be a schedule.
  """
  seen: dict[int, Any] = {}
  waiting: list[Any] = [inner]
  while waiting:
    node = waiting.pop()
    if id(node) in seen:
      continue
    seen[id(node)] = node
    waiting += _parts_without_schedules(node) if _is_of_optax(node) else _parts(node)


def _is_of_optax(node: Any) -> bool:
  # Not by `__module__`, which `functools.wraps` copies to functions of others.
  return isinstance(node, types.FunctionType) and node.__globals__["__name__"].startswith("optax.")


def _parts(node: Any) -> Iterable[Any]:
  """What is held by an object that may be an optimizer, or hold one."""
  if isinstance(node, types.FunctionType):
    return [
      *_held(node).values(),
      *(node.__defaults__ or ()),
      *(node.__kwdefaults__ or {}).values(),
    ]
  if isinstance(node, types.MethodType):
    return [node.__func__, *getattr(node.__self__, "__dict__", {}).values()]
  if isinstance(node, functools.partial):
    return [node.func, *node.args, *node.keywords.values()]
  if isinstance(node, Inner):  # of a cadence in this one
    return [node.any]
  if isinstance(node, Mapping):
    return node.values()
  if isinstance(node, list | tuple):
    return node
  return [node.__wrapped__] if callable(node) and hasattr(node, "__wrapped__") else ()  # by jit


def _parts_without_schedules(fn: types.FunctionType) -> list[Any]:
  """What is held by a function of Optax, without its schedules; raises where one cannot be set."""
  held, maker = _held(fn), fn.__qualname__.split(".")[0]
  if maker == "inject_hyperparams":
    return _injected_into(**held)
  for name in _schedules_of(fn.__globals__.get(maker)):
    if callable(held.get(name)):
      schedule = held.pop(name)
      if maker not in _SET:
        raise ValueError(_cannot_be_set(maker, name, schedule))
  return list(held.values())


def _held(fn: types.FunctionType) -> dict[str, Any]:
  """The variables of other functions that a function reads."""
  found = {}
  for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
    try:
      found[name] = cell.cell_contents
    except ValueError:  # not assigned yet
      continue
  return found


def _schedules_of(maker: Any) -> list[str]:
  """The parameters that a function declares to take schedules."""
  if not isinstance(maker, types.FunctionType):
    return []
  declared = inspect.signature(maker).parameters.values()
  return [
    p.name
    for p in declared
    if p.annotation == optax.Schedule or optax.Schedule in typing.get_args(p.annotation)
  ]


def _injected_into(
  inner_factory: Any = None,
  other_hps: Mapping[str, Any] | None = None,
  numeric_hps: Mapping[str, Any] | None = None,
  sched_hps: Mapping[str, Any] | None = None,
  **_: Any,
) -> list[Any]:
  """The optimizer that `inject_hyperparams` makes of numbers where it was given schedules."""
  made: list[Any] = []
  numbers = {**(numeric_hps or {}), **dict.fromkeys(sched_hps or {}, 1.0)}
  try:
    # Traced, as in a jitted `init`: what it makes is looked at and never called.
    jax.eval_shape(lambda x: made.append(inner_factory(**(other_hps or {}), **x)), numbers)
  except (TypeError, ValueError):  # what it does not take, `init` will say
    return []
  return made


def _cannot_be_set(maker: str, name: str, schedule: Any) -> str:
  place = "optax.contrib" if hasattr(optax.contrib, maker) else "optax"
  found = getattr(schedule, "__name__", type(schedule).__name__)
  return (
    f'clock="micro_steps": {maker} reads {name} by a counter that it needs for itself and that'
    f" cannot be set, found a schedule, {found}; expected"
    f" optax.inject_hyperparams({place}.{maker})({name}=schedule, ...), or the same with the"
    " optimizer that it is a part of"
  )


def _counts(node: Any) -> bool:
  """Whether this is the state of a schedule: it has a count and nothing besides."""
  # By its form: not all of these types have public names.
  kind = type(node)
  return getattr(kind, "_fields", None) == ("count",) and kind.__module__.startswith("optax.")


def set_schedules(state: optax.OptState, micro_steps: jax.Array) -> optax.OptState:
  """Sets every schedule in the state of any optimizer to the micro-steps done: int32 scalar.

  Set are the counters of `ScaleByScheduleState` (every learning rate given as a schedule, but for
  those that `check` refuses), of scheduled weight decay and of `inject_hyperparams`.
  """

  def visit(node: Any) -> Any:
    if _counts(node):
      return node._replace(count=micro_steps.astype(node.count.dtype))
    if isinstance(node, _INJECTED):
      fields = {name: set_schedules(value, micro_steps) for name, value in node._asdict().items()}
      return type(node)(**fields | {"count": micro_steps.astype(node.count.dtype)})
    return node

  return jax.tree.map(visit, state, is_leaf=lambda x: _counts(x) or isinstance(x, _INJECTED))
