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
from optax_cadence.growth._nnx_model import is_object
from optax_cadence.growth._nnx_model import parts
from optax_cadence.growth._nnx_model import Place
from optax_cadence.growth._plan import Plan

ALPHA = "alpha"
_MARK = "growth_gate"
# What Flax itself calls to set flags. (What a class has from `nnx.Module` is left alone anyway.)
_SETTINGS = frozenset(["set_mode", "set_view"])


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
  before: Mapping[Place, Any]
  contents: Contents

  def __post_init__(self) -> None:
    _look_for_marks(self.cls)

  def call(self, model: Any, what: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`fn(model, *args, **kwargs)` through the gate; `what` is what it is called in errors."""
    of_model = Call(model, what, fn, args, kwargs)
    old = of_model.function(functools.partial(_set_attributes, values=self.before))
    gated = _gate.gated(of_model.function(), self.plan, old=old)
    return of_model.finish(gated(*of_model.arguments()))

  def __reduce__(self) -> Any:
    # A pickle that is read makes it anew, so that the methods of its class look for it there too.
    return Gate, (self.cls, self.plan, self.before, self.contents)

  def put_back(self, model: Any) -> None:
    """Puts back what was there before the growth, but for the arrays, and takes the gate away."""
    detach(model)
    _set_attributes(parts(model).modules, self.before)
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

  def __post_init__(self) -> None:
    _look_for_marks(self.cls)

  def call(self, model: Any, what: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Refuses a call."""
    del model, fn, args, kwargs
    raise ValueError(
      f"{what} of {self.path!r} was called from outside its {self.model}, whose gate it would pass"
      f" by: expected a call of a method of the {self.model}, or"
      " growth.nnx.call(function, model, ...), which calls any function of it through the gate"
    )

  def __reduce__(self) -> Any:
    return Inside, (self.cls, self.path, self.model)


def mark_of(module: Any) -> Gate | Inside | None:
  """The mark of a module, if it has one."""
  return vars(module).get(_MARK)


def gate_of(model: Any) -> Gate:
  """The mark of a model with a gate.

  Raises:
    ValueError: If it has none.
  """
  gate = mark_of(model)
  if not isinstance(gate, Gate):
    raise ValueError(f"{type(model).__name__} has no gate: it has not grown, or is merged already")
  return gate


def attach(
  model: nnx.Module, plan: Plan, alpha: Any, before: Mapping[Place, Any], contents: Contents
) -> None:
  """Attaches the gate to a model whose arrays have grown: a parameter, and the marks."""
  floats = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
  grown = {change.path[:n] for change in plan.changes for n in range(len(change.path))}
  for path, module in parts(model).modules.items():
    if path == ():
      setattr(module, _MARK, Gate(type(module), plan, before, contents))
    elif path in grown:
      name = type(model).__name__
      setattr(module, _MARK, Inside(type(module), _paths.join(path), name))
  setattr(model, ALPHA, nnx.Param(jnp.asarray(alpha, _plan.float_dtype(floats))))


def detach(model: nnx.Module) -> None:
  """Takes the gate away."""
  delattr(model, ALPHA)
  _unmark(parts(model).modules)


def _unmark(modules: Mapping[_paths.Path, Any]) -> None:
  for module in modules.values():
    if mark_of(module) is not None:
      delattr(module, _MARK)


def _set_attributes(modules: Mapping[_paths.Path, Any], values: Mapping[Place, Any]) -> None:
  for (path, name), value in values.items():
    setattr(modules[path], name, value)


def changed(before: Mapping[Place, Any], after: Mapping[Place, Any]) -> dict[Place, Any]:
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


class Call:
  """A call of a function of a live model, as a function of variables.

  Arguments may be objects that have variables too, such as `nnx.Rngs`: they are followed as the
  model is.
  """

  def __init__(self, model: Any, what: str, fn: Callable[..., Any], args: Any, kwargs: Any):
    """Takes what is called: `fn(model, *args, **kwargs)`; `what` is what errors call it."""
    self._what, self._fn = what, fn
    flat, self._structure = jax.tree.flatten(((model, *args), kwargs), is_leaf=is_object)
    self._objects = {i: x for i, x in enumerate(flat) if is_object(x)}  # the model is the first
    self._others = [None if is_object(x) else x for x in flat]
    self._added: dict[_paths.Path, type] = {}  # of what kind variables are that the call adds

  def arguments(self) -> tuple[Any, list[Any], list[Any]]:
    """What `function` is called with: variables of the model, and of other objects; all else."""
    tree, *states = map(_nnx_model.variables, self._objects.values())
    return tree, states, self._others

  def function(self, adapt: Callable[[Any], None] = lambda modules: None) -> Callable[..., Any]:
    """The call as a function of `arguments`.

    Args:
      adapt: Adapts the modules of a copy of the model, by path, to the sizes of its variables.

    Returns:
      A function that returns the output of the call; by path the variables that it changed, of each
      object; and the values of those that it added to the model, which `sow` does.
    """
    split = [nnx.split(x) for x in self._objects.values()]

    def run(tree: Any, states: list[Any], others: list[Any]) -> Any:
      copies = [
        nnx.merge(graphdef, _nnx_model.filled(state, arrays))
        for (graphdef, state), arrays in zip(split, [tree, *states], strict=True)
      ]
      objects = dict(zip(self._objects, copies, strict=True))
      flat = [objects.get(i, x) for i, x in enumerate(others)]
      args, kwargs = jax.tree.unflatten(self._structure, flat)
      of_model, *of_others = map(parts, copies)
      _unmark(of_model.modules)
      adapt(of_model.modules)
      before = [_arrays(x) for x in (of_model, *of_others)]
      attributes_before = _nnx_model.attributes(of_model.modules)
      output = self._fn(*args, **kwargs)
      of_model, *of_others = map(parts, copies)
      different = changed(attributes_before, _nnx_model.attributes(of_model.modules))
      if different:
        listed = _paths.listed((*path, name) for path, name in different)
        raise ValueError(
          f"{self._what} sets the attributes {listed}, which a model with a gate cannot follow: set"
          " them outside, or merge the gate first"
        )
      after = [_arrays(x) for x in (of_model, *of_others)]
      differing = [
        {name: x for name, x in new.items() if name in old and old[name] is not x}
        for old, new in zip(before, after, strict=True)
      ]
      added = {p: x for p, x in of_model.variables.items() if _paths.join(p) not in before[0]}
      self._added.update({path: type(variable) for path, variable in added.items()})
      return output, differing, [_nnx_model.get_array(variable) for variable in added.values()]

    return run

  def finish(self, result: Any) -> Any:
    """Puts what the function has changed into the model and the arguments; returns its output."""
    output, differing, added = result
    for x, arrays in zip(self._objects.values(), differing, strict=True):
      if arrays:
        for path, variable in parts(x).variables.items():
          if _paths.join(path) in arrays:
            _nnx_model.set_array(variable, arrays[_paths.join(path)])
    if added:
      modules = parts(self._objects[0]).modules
      for (path, kind), value in zip(self._added.items(), added, strict=True):
        setattr(modules[path[:-1]], path[-1], kind(value))
    return output


def _arrays(x: _nnx_model.Parts) -> dict[str, Any]:
  """What the variables hold, by names as in `_couple.outputs_of`, which tells it from outputs."""
  return {_paths.join(path): _nnx_model.get_array(v) for path, v in x.variables.items()}


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
