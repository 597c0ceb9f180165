"""The gate of a live NNX model: which calls go through it, and which would pass it by.

A model with a gate keeps its class. The modules that have grown carry a mark, and the methods of
their classes look for it: a method of the model itself runs through the gate, one of a module
inside, which would pass it by, says so. Python looks methods up in classes, so the look is put
there, once for each class, when a model of it first gets a gate (or a gate comes out of a
pickle). For objects without a mark the methods do what they did.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_cadence import _paths
from optax_cadence.growth import _gate
from optax_cadence.growth import _nnx_contents
from optax_cadence.growth import _nnx_model
from optax_cadence.growth import _plan
from optax_cadence.growth._nnx_contents import Contents
from optax_cadence.growth._plan import Plan

ALPHA = "alpha"
_MARK = "growth_gate"
_OBJECTS: Any = getattr(nnx, "Pytree", nnx.Object)
# What Flax itself calls to set flags. (What a class has from `nnx.Module` is left alone anyway.)
_SETTINGS = frozenset(["set_mode", "set_view"])
_PLACE = tuple[_paths.Path, str]  # path of a module, and the name of an attribute


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Gate:
  """The mark of a model with a gate.

  Attributes:
    cls: The model's class.
    plan: The plan by which it has grown.
    before: Attributes of its layers that repeat sizes, as they were before.
    contents: What its modules held before that hold something else now.
  """

  cls: type
  plan: Plan
  before: Mapping[_PLACE, Any]
  contents: Contents

  def call(self, model: Any, what: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`fn(model, *args, **kwargs)` through the gate; `what` is what it is called in errors."""
    of_model = Call(model, what, fn, args, kwargs)

    def adapt(modules: Mapping[_paths.Path, Any]) -> None:
      for (path, name), value in self.before.items():
        setattr(modules[path], name, value)

    gated = _gate.gated(of_model.function(), self.plan, old=of_model.function(adapt))
    return of_model.finish(gated(*of_model.arguments()))

  def __reduce__(self) -> Any:
    return _gate_of_pickle, (self.cls, self.plan, self.before, self.contents)

  def put_back(self, model: Any) -> None:
    """Puts back what was there before the growth, but for the arrays, and takes the gate away."""
    modules = _modules(model)
    detach(model)
    for (path, name), value in self.before.items():
      setattr(modules[path], name, value)
    _nnx_contents.restore(model, self.contents)

  def __repr__(self) -> str:
    return f"Gate({self.cls.__name__})"


@dataclasses.dataclass(frozen=True)
class Inside:
  """The mark of a module that has grown inside a model with a gate.

  Attributes:
    cls: Its class.
    path: Where it stands.
    model: The name of the model's class.
  """

  cls: type
  path: str
  model: str

  def call(self, model: Any, what: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Refuses a call."""
    del model, fn, args, kwargs
    raise ValueError(
      f"{what} of {self.path!r} was called from outside its {self.model}, whose gate it would pass"
      f" by: expected a call of a method of the {self.model}, or"
      " growth.nnx.call(function, model, ...), which calls any function of it through the gate"
    )

  def __reduce__(self) -> Any:
    return _inside_of_pickle, (self.cls, self.path, self.model)


def _gate_of_pickle(
  cls: type, plan: Plan, before: Mapping[_PLACE, Any], contents: Contents
) -> Gate:
  _look_for_marks(cls)
  return Gate(cls, plan, before, contents)


def _inside_of_pickle(cls: type, path: str, model: str) -> Inside:
  _look_for_marks(cls)
  return Inside(cls, path, model)


def mark_of(module: Any) -> Gate | Inside | None:
  """The mark of a module, if it has one."""
  return vars(module).get(_MARK)


def attach(
  model: nnx.Module, plan: Plan, alpha: Any, before: Mapping[_PLACE, Any], contents: Contents
) -> None:
  """Attaches the gate to a model whose arrays have grown: a parameter, and the marks."""
  floats = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
  grown = {change.path[:n] for change in plan.changes for n in range(len(change.path))}
  for path, module in _modules(model).items():
    if path == ():
      setattr(module, _MARK, Gate(type(module), plan, before, contents))
    elif path in grown:
      name = type(model).__name__
      setattr(module, _MARK, Inside(type(module), _paths.join(path), name))
    if path in grown:
      _look_for_marks(type(module))
  setattr(model, ALPHA, nnx.Param(jnp.asarray(alpha, _plan.float_dtype(floats))))


def detach(model: nnx.Module) -> None:
  """Takes the gate away."""
  delattr(model, ALPHA)
  _unmark(_modules(model))


def _unmark(modules: Mapping[_paths.Path, Any]) -> None:
  for module in modules.values():
    if mark_of(module) is not None:
      delattr(module, _MARK)


def attributes(model: nnx.Module) -> dict[_PLACE, Any]:
  """What the modules of a model have in attributes but variables and modules."""
  return _attributes(_modules(model))


def _attributes(modules: Mapping[_paths.Path, Any]) -> dict[_PLACE, Any]:
  found = {}
  for path, module in modules.items():
    for name, value in vars(module).items():
      if not name.startswith(("_pytree__", "_object__")) and not isinstance(
        value, (nnx.Variable, _OBJECTS)
      ):
        found[path, name] = value
  return found


def changed(before: Mapping[_PLACE, Any], after: Mapping[_PLACE, Any]) -> dict[_PLACE, Any]:
  """The attributes that are no more what they were, and what they were: None if not there."""
  return {
    place: before.get(place)
    for place in {**before, **after}
    if before.get(place) is not after.get(place) and not _equal(before.get(place), after.get(place))
  }


def _equal(a: Any, b: Any) -> bool:
  try:
    return bool(a == b)
  except (TypeError, ValueError):  # arrays
    return False


def _modules(model: Any) -> dict[_paths.Path, Any]:
  """The modules in a model, by path; lists and dicts of them hold no forward pass."""
  return _looked_through(model)[0]


_Modules = dict[_paths.Path, Any]
_Variables = list[tuple[Any, _paths.Path]]


def _looked_through(model: Any) -> tuple[_Modules, _Variables]:
  """The modules in a model and its variables: as one, for it takes long in a deep one."""
  containers = tuple(getattr(nnx, name) for name in ("List", "Dict") if hasattr(nnx, name))
  modules: _Modules = {}
  variables: _Variables = []
  for names, node in nnx.iter_graph(model):
    if isinstance(node, nnx.Variable):
      variables.append((node, tuple(map(str, names))))
    elif isinstance(node, nnx.Module) and not isinstance(node, containers):
      modules[tuple(map(str, names))] = node
  return modules, variables


class _Inputs:
  """The arguments of a call, of which some may be objects with variables: `nnx.Rngs`.

  Attributes:
    others: All others, with None in place of those objects.
  """

  def __init__(self, args: Any, kwargs: Any):
    flat, self._structure = jax.tree.flatten(
      (args, kwargs), is_leaf=lambda x: isinstance(x, _OBJECTS)
    )
    self._objects = {i: x for i, x in enumerate(flat) if isinstance(x, _OBJECTS)}
    self.others = [None if i in self._objects else x for i, x in enumerate(flat)]

  def states(self) -> list[Any]:
    """The variables of the objects."""
    return [_nnx_model.variables(x) for x in self._objects.values()]

  def rebuilt(self, states: list[Any], others: list[Any]) -> tuple[Any, Any, list[Any]]:
    """The arguments, and the objects among them, with other arrays."""
    flat, objects = list(others), []
    for (i, x), tree in zip(self._objects.items(), states, strict=True):
      graphdef, state = nnx.split(x)
      flat[i] = nnx.merge(graphdef, _nnx_model.filled(state, tree))
      objects.append(flat[i])
    args, kwargs = jax.tree.unflatten(self._structure, flat)
    return args, kwargs, objects

  def put(self, changed: list[dict[str, Any]]) -> None:
    """Puts what a call has changed into the objects."""
    for x, arrays in zip(self._objects.values(), changed, strict=True):
      _put(x, arrays)


class Call:
  """A call of a function of a live model, as one of the model's variables."""

  def __init__(self, model: Any, what: str, fn: Callable[..., Any], args: Any, kwargs: Any):
    """Takes what is called: `fn(model, *args, **kwargs)`; `what` is what errors call it."""
    self._model, self._what, self._fn = model, what, fn
    self._inputs = _Inputs(args, kwargs)
    self._added: dict[_PLACE, type] = {}

  def arguments(self) -> tuple[Any, Any, Any]:
    """What `function` is called with."""
    return _nnx_model.variables(self._model), self._inputs.states(), self._inputs.others

  def function(self, adapt: Callable[[Any], None] = lambda modules: None) -> Callable[..., Any]:
    """The call as a function; `adapt` adapts copies of modules to the sizes of their variables."""
    return _function(self._model, self._what, self._fn, self._inputs, self._added, adapt)

  def finish(self, result: Any) -> Any:
    """Puts what the function has changed into the model and the arguments; returns its output."""
    output, changed, of_inputs, more = result
    _put(self._model, changed)
    self._inputs.put(of_inputs)
    modules = _modules(self._model)
    for (path, name), value in zip(self._added, more, strict=True):
      setattr(modules[path], name, self._added[path, name](value))
    return output


def _function(
  model: Any,
  what: str,
  fn: Callable[..., Any],
  inputs: _Inputs,
  added: dict[_PLACE, type],
  adapt: Callable[[Any], None] = lambda modules: None,
) -> Callable[..., Any]:
  """A call as a function of the model's variables and of the arguments.

  Args:
    model: The model.
    what: What the function is called in errors.
    fn: A function of the model and the arguments.
    inputs: The arguments.
    added: Gets the kinds of the variables that the call adds, which `sow` does.
    adapt: Adapts the modules of a copy, by path, to the sizes of the variables.

  Returns:
    A function that returns the output of the call; the variables that it changed, of the model
    and of each object among the arguments, by path; and the values of those that it added.
  """
  graphdef, state = nnx.split(model)

  def run(tree: Any, states: list[Any], others: list[Any]) -> Any:
    copy = nnx.merge(graphdef, _nnx_model.filled(state, tree))
    modules, variables = _looked_through(copy)
    _unmark(modules)
    adapt(modules)
    args, kwargs, objects = inputs.rebuilt(states, others)
    before = [_arrays(variables), *map(_arrays_of, objects)]
    attributes_before = _attributes(modules)
    output = fn(copy, *args, **kwargs)
    modules, variables = _looked_through(copy)
    different = changed(attributes_before, _attributes(modules))
    if different:
      listed = _paths.listed((*path, name) for path, name in different)
      raise ValueError(
        f"{what} sets the attributes {listed}, which a model with a gate cannot follow: set them"
        " outside, or merge the gate first"
      )
    after = [_arrays(variables), *map(_arrays_of, objects)]
    differing = [
      {name: x for name, x in new.items() if name in old and old[name] is not x}
      for old, new in zip(before, after, strict=True)
    ]
    kinds = {p: type(variable) for variable, p in variables}
    more = {p: kind for p, kind in kinds.items() if _paths.join(p) not in before[0]}
    added.update({(path[:-1], path[-1]): kind for path, kind in more.items()})
    return output, differing[0], differing[1:], [after[0][_paths.join(p)] for p in more]

  return run


def _arrays(variables: _Variables) -> dict[str, Any]:
  """What the variables hold, by path."""
  return {_paths.join(path): _nnx_model.get_array(variable) for variable, path in variables}


def _arrays_of(model: Any) -> dict[str, Any]:
  return _arrays(_nnx_model.paths_of_variables(model))


def _put(model: Any, arrays: Mapping[str, Any]) -> None:
  """Puts arrays into the variables at some paths."""
  if arrays:
    for variable, path in _nnx_model.paths_of_variables(model):
      if _paths.join(path) in arrays:
        _nnx_model.set_array(variable, arrays[_paths.join(path)])


def _look_for_marks(cls: type) -> None:
  """Makes the methods of a class look whether their object has a mark."""
  for base in cls.__mro__:
    if base in nnx.Module.__mro__ or base.__module__.split(".")[0] in sys.stdlib_module_names:
      continue
    for name, method in list(vars(base).items()):
      if _may_compute(name, method):
        setattr(base, name, _looking(name, method))


def _may_compute(name: str, method: Any) -> bool:
  """Whether an attribute of a class is a method that may use the weights."""
  if (name.startswith("__") and name != "__call__") or hasattr(method, "looks_for_marks"):
    return False
  of_module = name in _SETTINGS or (name != "__call__" and hasattr(nnx.Module, name))
  is_method = callable(method) and hasattr(type(method), "__get__")
  return is_method and not of_module and not isinstance(method, (type, staticmethod, classmethod))


def _looking(name: str, method: Any) -> Any:
  """A method that looks for a mark before it runs."""

  @functools.wraps(method)
  def look(self: Any, *args: Any, **kwargs: Any) -> Any:
    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
      return method.__get__(model, type(model))(*args, **kwargs)

    mark = mark_of(self)
    if mark is None:
      return call(self, *args, **kwargs)
    return mark.call(self, f"{type(self).__name__}.{name}", call, args, kwargs)

  look.looks_for_marks = True  # type: ignore[attr-defined]
  return look
