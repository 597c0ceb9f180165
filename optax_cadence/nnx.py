"""The optimizer of a live NNX model: updates in place, and whole training steps.

It keeps its state where `nnx.Optimizer` does, so that checkpoints of one are read by the other.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
from flax import nnx

from optax_cadence import _backward
from optax_cadence import _cadence
from optax_cadence import _paths
from optax_cadence import _training
from optax_cadence.report import metrics as reports
from optax_cadence.schedules.phases import Phase

__all__ = ["Optimizer", "convert"]


class Optimizer(nnx.Optimizer):
  """An `nnx.Optimizer` whose updates go through `tx.apply`.

  Parameters and optimizer state of regions that are not due are neither read nor written, if the
  buffers are donated: `nnx.jit(fn, donate_argnames=("model", "optimizer"))`. As in Flax, `step` is
  the number of micro-steps so far, and `tx`, `opt_state` and `wrt` are what they are there. The
  model is an argument of every method, in Flax before 0.11 too.

  Args:
    model: The model.
    tx: A cadence, or an `oc.chain` that ends in one.
    wrt: Which variables of the model are trained, a filter of NNX.

  Raises:
    ValueError: If `tx` is no cadence.

  >>> import jax, jax.numpy as jnp, optax, optax_cadence as oc
  >>> from flax import nnx
  >>> zeros = nnx.initializers.zeros
  >>> model = nnx.Linear(1, 1, use_bias=False, kernel_init=zeros, rngs=nnx.Rngs(0))
  >>> optimizer = oc.nnx.Optimizer(model, oc.cadence(optax.sgd(0.5), 2))
  >>> @nnx.jit(donate_argnames=("model", "optimizer"))
  ... def step(model, optimizer, x, y):
  ...   return optimizer.training_step(model, lambda m, x, y: ((m(x) - y) ** 2).sum(), x, y)
  >>> for y in (1.0, 3.0):
  ...   value = step(model, optimizer, jnp.ones((1, 1)), y)
  ...   print(value, *jax.tree.leaves(nnx.state(model)))
  1.0 [[0.]]
  9.0 [[2.]]
  """

  def __init__(
    self, model: Any, tx: _cadence.CadenceTransformation, wrt: Any = nnx.Param, **options: Any
  ):
    _cadence.of(tx, "oc.nnx.Optimizer(model, tx)")
    super().__init__(model, tx, wrt=wrt, **options)
    # Flax before 0.11 keeps the model, which here is given to every method.
    vars(self).pop("model", None)

  def update(self, model: Any, grads: Any, /, **extra_args: Any) -> None:
    """Takes a micro-step with these gradients.

    Args:
      model: The model, whose parameters are updated in place.
      grads: What `nnx.grad` gives of it; of parameters that are not trained nothing is read.
      **extra_args: As for `tx.apply`: `phase`, `weight`, and what the inner optimizer takes.

    Raises:
      ValueError: As `tx.apply` does.
    """
    params = nnx.state(model, self.wrt)
    of_state = isinstance(grads, nnx.State)
    grads = nnx.filter_state(grads, self.wrt) if of_state else nnx.state(grads, self.wrt)
    self._put(model, *self.tx.apply(params, self.opt_state, grads, **extra_args))
    self._count()

  def training_step(
    self,
    model: Any,
    loss: Callable[..., Any],
    *args: Any,
    phase: int | Phase | None = None,
    has_aux: bool = False,
    **extra_args: Any,
  ) -> Any:
    """Takes a micro-step with the gradient of a loss; see `oc.training_step`.

    It does what `nnx.value_and_grad(loss)(model, *args)` and `update` do one after the other. What
    the loss changes besides, such as statistics of a `BatchNorm` and counters of random numbers, is
    changed, in the model and in modules, metrics and `nnx.Rngs` among the further arguments. If it
    changes parameters (`nnx.SpectralNorm` does) or makes new variables (`sow` does), all gradients
    are stored, since nothing but `nnx.value_and_grad` knows how to carry that.

    Args:
      model: The model, whose parameters are updated in place.
      loss: `loss(model, *args)` returns a scalar; with `has_aux` a pair of that and anything else.
      *args: Further arguments of the loss, all by position.
      phase: As for `tx.apply`.
      has_aux: Whether `loss` returns a pair.
      **extra_args: As for `tx.apply`: `weight`, and what the inner optimizer takes.

    Returns:
      What the loss returns.

    Raises:
      ValueError: If `loss` does not return what it should, and as `tx.apply` does.
    """
    _training.check_extra_args(loss, 1 + len(args), extra_args)
    flat, structure = jax.tree.flatten(args, is_leaf=_is_live)
    places = [i for i, x in enumerate(flat) if _is_live(x)]
    live = (model, [flat[i] for i in places])
    is_trained = nnx.filterlib.to_predicate(self.wrt)

    def of_model(path: Any, value: Any) -> bool:
      return path[0] == 0 and is_trained(path[1:], value)

    split: Any = nnx.split
    graph, params, others = split(live, of_model, ...)

    def of_arrays(given: Any, others: Any) -> tuple[Any, tuple[Any, Any]]:
      params_given = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(given))
      # Fresh variables: those in `others` may not be changed in here.
      copies: Any = nnx.merge(graph, params_given, jax.tree.map(lambda x: x, others))
      filled = dict(enumerate(flat)) | dict(zip(places, copies[1], strict=True))
      returned: Any = loss(copies[0], *jax.tree.unflatten(structure, filled.values()))
      value, aux = _backward.value_and_aux(returned) if has_aux else (returned, None)
      changed, params_after, others = split(copies, of_model, ...)
      pairs = zip(jax.tree.leaves(params_after), jax.tree.leaves(given), strict=False)
      if changed != graph or any(after is not before for after, before in pairs):
        raise _ChangesMoreThanState
      return value, (others, aux)

    step = _training.training_step(of_arrays, self.tx, has_aux=True)
    try:
      old: Any = nnx.state(model, self.wrt)
      new, state, returned = step(old, self.opt_state, others, phase=phase, **extra_args)
    except _ChangesMoreThanState:
      of_model_alone: Any = nnx.DiffState(0, self.wrt)
      differentiate = nnx.value_and_grad(loss, argnums=of_model_alone, has_aux=has_aux)
      returned, grads = differentiate(model, *args)
      self.update(model, grads, phase=phase, **extra_args)
      return returned
    value, (others, aux) = returned
    nnx.update(live, others)
    self._put(model, new, state)
    self._count()
    return (value, aux) if has_aux else value

  def flush(self, model: Any, **extra_args: Any) -> None:
    """Applies every window that is not empty; see `tx.flush`.

    Args:
      model: The model, whose parameters are updated in place.
      **extra_args: Extra arguments for the inner optimizer.
    """
    params = nnx.state(model, self.wrt)
    updates, state = self.tx.flush(self.opt_state, params, **extra_args)
    self._put(model, optax.apply_updates(params, updates), state)

  def has_updated(self) -> dict[str, Any]:
    """Which groups fired at the last micro-step; see `oc.has_updated`."""
    return reports.has_updated(self.opt_state)

  def metrics(self, *args: Any, **options: Any) -> dict[str, Any]:
    """The values of the cadence for a logger; as `oc.metrics` of the state."""
    return reports.metrics(self.opt_state, *args, **options)

  def _put(self, model: Any, params: Any, state: Any) -> None:
    """Puts new parameters and a new state where the old ones are."""
    nnx.update(model, params)
    _paths.set_arrays(self.opt_state, jax.tree.leaves(state))

  def _count(self) -> None:
    _paths.set_arrays(self.step, [x + 1 for x in _paths.arrays(self.step)])


def convert(
  optimizer: nnx.Optimizer,
  model: Any,
  *,
  to: _cadence.CadenceTransformation,
  counters: Literal["equal", "most", "least"] = "equal",
) -> Optimizer:
  """The optimizer of another cadence, which goes on where this one is, in mid-window too.

  Args:
    optimizer: An `nnx.Optimizer` with `optax.MultiSteps` or a cadence as its `tx`, or one of ours.
      It is not changed.
    model: Its model.
    to: The cadence.
    counters: As for `oc.convert`.

  Returns:
    A new optimizer of the same variables of the model.

  Raises:
    ValueError: As `oc.convert` does, which converts the state.

  >>> import jax.numpy as jnp, optax, optax_cadence as oc
  >>> from flax import nnx
  >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
  >>> old = nnx.Optimizer(model, optax.MultiSteps(optax.sgd(0.5), 8), wrt=nnx.Param)
  >>> new = oc.nnx.convert(old, model, to=oc.cadence(optax.sgd(0.5), {"kernel": 8, "bias": 2}))
  >>> list(new.opt_state.groups)
  ['2', '8']
  """
  from optax_cadence.conversion.convert import convert as converted

  params = nnx.to_pure_dict(nnx.state(model, optimizer.wrt))
  state = converted(optimizer.opt_state, optimizer.tx, params, to=to, counters=counters)
  new = Optimizer(model, to, wrt=optimizer.wrt)
  _paths.set_arrays(new.opt_state, jax.tree.leaves(state))
  _paths.set_arrays(new.step, _paths.arrays(optimizer.step))
  return new


class _ChangesMoreThanState(Exception):
  """A loss changes parameters, or which variables there are."""


def _is_live(x: Any) -> bool:
  """Whether an argument has variables that a function may change."""
  return isinstance(x, nnx.Variable) or nnx.graph.is_graph_node(x)
