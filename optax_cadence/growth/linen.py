"""Growth of Linen models: two module definitions, old and new, and paths into their variables.

What grows comes back as the grown variables, with the gate at "params/alpha"; a function to
call in place of `new.apply` until `growth.merge(variables, plan)`; and the plan, by which
`growth.grow_state` takes the optimizer's state along.
"""

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_cadence import _paths
from optax_cadence.growth import _driver
from optax_cadence.growth import _linen_network
from optax_cadence.growth import _planners
from optax_cadence.growth import _recycle
from optax_cadence.growth import _stacking
from optax_cadence.growth import _trees
from optax_cadence.growth import _upcycling
from optax_cadence.growth import _vocabulary
from optax_cadence.growth._dimension import Dimension
from optax_cadence.growth._linen_experts import MixtureOfExperts
from optax_cadence.growth._linen_network import Grown
from optax_cadence.growth._plan import Plan
from optax_cadence.growth._recycle import Recycle

__all__ = [
  "MixtureOfExperts",
  "couple",
  "deepen",
  "enlarge",
  "heads",
  "recycle",
  "shrink",
  "stack",
  "upcycle",
  "vocabulary",
  "widen",
]


def couple(
  module: Any, variables: Any, *inputs: Any, producer: str | Sequence[str], **kwargs: Any
) -> Dimension:
  """As `growth.couple`, for the path of a layer: every axis that grows with one of its own.

  Args:
    module: The module.
    variables: Its variables.
    *inputs: Its inputs, arrays or `jax.ShapeDtypeStruct`s.
    producer: Path of the layer, or leaf, that makes the units, or a glob; several of as many units
      are one dimension.
    **kwargs: As for `growth.couple` (`axis`, `unit`, `blocks`), or of the forward pass.

  Returns:
    The `Dimension`, for the tree `variables`.
  """
  return _driver.couple(
    _linen_network.network_of(module, variables, inputs, {}), producer, **kwargs
  )


def widen(
  old: Any,
  new: Any,
  variables: Any,
  *inputs: Any,
  producer: str | Sequence[str] | None = None,
  by: int | Sequence[int] | None = None,
  axis: int = -1,
  unit: int = 1,
  blocks: int = 1,
  rngs: Any = None,
  fresh: Any = None,
  alpha: float = 0.0,
  **kwargs: Any,
) -> Grown:
  """Gives a module more units.

  Args:
    old: The module as it is.
    new: The same module, defined at its new size.
    variables: The variables of `old`: {"params": …, "batch_stats": …}.
    *inputs: Inputs of the module, arrays.
    producer: Path of the leaf that makes the units, or of a layer with one kernel:
      "params/Dense_0"; or several, as a list or as a glob: "params/block_*/up". None: whatever is
      larger in `new`, for models whose configuration sets the sizes of many layers.
    by: Number of new units, of each producer; or a list, a number for each that is named. None if
      no producer is named.
    axis: The axis of the leaf that holds the units.
    unit: Adjacent positions that make one unit.
    blocks: How often the units repeat along the axis.
    rngs: As for `new.init`, which gives the new entries; or else `fresh`.
    fresh: Where they come from instead, as for `Plan.apply`.
    alpha: Value of the gate.
    **kwargs: Further arguments of the forward pass (`train`), and of `apply` (`mutable`).

  Returns:
    The grown variables, the forward pass with its gate, and the plan.

  Raises:
    ValueError: As `growth.couple`, `growth.widening` and `Plan.apply` do, or if `new` does not run
      with its gate.
  """
  if (producer is None) != (by is None):
    raise ValueError(f"expected both producer= and by=, or neither, found {producer!r} and {by!r}")
  network = _linen_network.network_of(old, variables, inputs, kwargs, new, rngs)
  grown = _driver.widen(
    network, producer, by, axis=axis, unit=unit, blocks=blocks, fresh=fresh, alpha=alpha
  )
  return _linen_network.with_forward(old, new, grown, network, rngs)


def enlarge(
  old: Any,
  new: Any,
  variables: Any,
  *inputs: Any,
  conv: str,
  kernel_size: Sequence[int],
  causal: bool = False,
  rngs: Any = None,
  fresh: Any = None,
  alpha: float = 0.0,
  **kwargs: Any,
) -> Grown:
  """Gives a convolution a larger kernel, its new taps behind a gate.

  `conv` is the path of the convolution, or of its kernel, `kernel_size` the new spatial size;
  `causal` says that its padding is "CAUSAL", so that old taps are the last ones. All other
  arguments, and what is returned, are as for `widen`.

  Raises:
    ValueError: As `growth.enlarging` and `Plan.apply` do.
  """
  network = _linen_network.network_of(old, variables, inputs, kwargs, new, rngs)
  path = tuple(conv.split("/"))
  grown = _driver.enlarge(network, path, kernel_size, causal=causal, fresh=fresh, alpha=alpha)
  return _linen_network.with_forward(old, new, grown, network, rngs)


def deepen(
  old: Any,
  new: Any,
  variables: Any,
  *inputs: Any,
  outgoing: Iterable[str] = (),
  moved: Mapping[str, str] | None = None,
  rngs: Any = None,
  fresh: Any = None,
  alpha: float = 0.0,
  **kwargs: Any,
) -> Grown:
  """Adds layers, what they add to the residual stream behind a gate.

  `outgoing` are the paths of those new layers, or leaves, that α multiplies: the last of a
  residual block. None: the new layers are the identity as they are (Net2Deeper). `moved` says which
  old layers have another name in `new`: with `{"params/block_1": "params/block_2"}` the block put
  before them is the new one, and weights, moments and windows go with the old. Without it a layer
  is the one that has its name. All other arguments, and what is returned, are as for `widen`.

  Raises:
    ValueError: If what is new counts although the gate is closed, or as `growth.deepening` does.
  """
  network = _linen_network.network_of(old, variables, inputs, kwargs, new, rngs)
  deeper = _linen_network.network_of(
    new, network.init() if fresh is None else fresh, inputs, kwargs
  )
  grown = _driver.deepen(network, deeper, outgoing=outgoing, moved=moved, alpha=alpha)
  return _linen_network.with_forward(old, new, grown, network, rngs)


def stack(
  old: Any,
  new: Any,
  variables: Any,
  *inputs: Any,
  layers: str,
  times: int | None = None,
  by: int | None = None,
  where: str | int = "end",
  outgoing: Iterable[str] = (),
  copy_state: bool | None = None,
  rngs: Any = None,
  fresh: Any = None,
  alpha: float = 0.0,
  **kwargs: Any,
) -> Grown:
  """Adds layers to a stack that `nn.scan` or `nn.vmap` has made along axis 0.

  `layers` is the path of the stack, "params/blocks". `times` or `by`, `where`, `outgoing` (layers
  through which a layer adds to its residual stream: α multiplies what is new in them; none: no
  gate) and `copy_state` are as for `growth.stacking`. New layers are copies of old ones, unless
  `rngs` or `fresh` say where they come from. All other arguments, and what is returned, are as for
  `widen`; without a gate the forward pass is `new.apply`.

  Raises:
    ValueError: If `new` has not as many layers, if new ones count although the gate is closed, or
      as `growth.stacking` does.
  """
  network = _linen_network.network_of(old, variables, inputs, kwargs, new, rngs)
  copies = rngs is None and fresh is None
  # Other collections, such as running statistics, have the stack at the same path.
  inside = tuple(layers.split("/"))[1:]
  others = {
    _paths.join((path[0], *inside))
    for path in _trees.shapes(variables)
    if path[1 : 1 + len(inside)] == inside and inside
  }
  plan = _stacking.stacking(
    variables,
    [layers, *sorted(others - {layers})],
    times=times,
    by=by,
    where=where,
    outgoing=outgoing,
    copy=copies,
    copy_state=copy_state,
    alpha=network.alpha,
  )
  grown = _driver.grow(network, plan, {} if copies else fresh, alpha)
  return _linen_network.with_forward(old, new, grown, network, rngs)


def heads(
  old: Any,
  new: Any,
  variables: Any,
  *inputs: Any,
  attn: str | Sequence[str],
  by: int,
  of: str = "heads",
  rngs: Any = None,
  fresh: Any = None,
  alpha: float = 0.0,
  **kwargs: Any,
) -> Grown:
  """Gives attention layers more heads, or larger ones, behind one gate.

  `attn` is the path of a layer, "params/attention", a glob, or a list; `by` how many more there are
  of its "heads" (with the queries that they serve), of the "queries" of each group, or of the
  entries of a head, its "size", as `of` says. All other arguments, and what is returned, are as for
  `widen`.

  Raises:
    ValueError: As `growth.couple_heads`, `growth.widening` and `Plan.apply` do.
  """
  network = _linen_network.network_of(old, variables, inputs, kwargs, new, rngs)
  names = [attn] if isinstance(attn, str) else attn
  grown = _driver.heads(network, names, by, of, fresh=fresh, alpha=alpha)
  return _linen_network.with_forward(old, new, grown, network, rngs)


def vocabulary(
  new: Any,
  variables: Any,
  *inputs: Any,
  by: int,
  embed: str,
  head: str | None = None,
  given: Mapping[str, Any] | None = None,
  **kwargs: Any,
) -> Grown:
  """Adds tokens after the last one. Logits of old ones stay; there is no gate.

  Args:
    new: The module, defined with more tokens.
    variables: The variables of the old one.
    *inputs: Inputs of the module.
    by: Number of new tokens.
    embed: Path of the `nn.Embed`, "params/embed".
    head: Path of the layer that makes the logits; None for a tied one.
    given: New entries by the path of their leaf. By default a new token is the mean of the old
      ones, see `growth.mean_tokens`.
    **kwargs: Further arguments of the forward pass.

  Returns:
    The grown variables, `new.apply`, and the plan.

  Raises:
    ValueError: If `new` is of another size, or as `growth.adding_tokens` does.
  """
  network = _linen_network.network_of(new, variables, inputs, kwargs, new)
  plan = _vocabulary.adding_tokens(variables, by, embed=embed, head=head, alpha=network.alpha)
  grown = _driver.grow(network, plan, _vocabulary.mean_tokens(variables, plan, given))
  return _linen_network.with_forward(new, new, grown, network, None)


def upcycle(
  old: Any,
  new: Any,
  variables: Any,
  *inputs: Any,
  mlp: str | Sequence[str],
  inside: str = "experts",
  router: str = "router/kernel",
  copy_state: bool = True,
  rngs: Any = None,
  fresh: Any = None,
  **kwargs: Any,
) -> Grown:
  """Makes mixtures of experts of MLPs (arXiv:2212.05055); the outputs stay, and there is no gate.

  `new` has a `MixtureOfExperts` of the same name where the MLP was, or a module of your own that
  calls `growth.mixture_of_experts`. `mlp` is the path of the MLP, "params/mlp", a glob, or a list;
  it may be one of layers that are stacked along axis 0. `inside` and `router` say where a mixture
  has its experts and the router's weights, [features, experts]; `rngs` or `fresh` gives these.
  `copy_state` says whether the optimizer's state is copied to all experts, or begins anew in them.
  All other arguments are as for `widen`.

  Returns:
    The grown variables, `new.apply`, and the plan, whose `growth.undo` leaves the first expert.

  Raises:
    ValueError: If there is no router in `new`, if its experts are not as the MLP is, or as
      `growth.upcycling` does.
  """
  network = _linen_network.network_of(old, variables, inputs, kwargs, new, rngs)
  if network.defined is None:
    raise ValueError("expected inputs of the module, on which new is defined, found none")
  names = [mlp] if isinstance(mlp, str) else mlp
  paths = [path for name in names for path in _trees.layers(variables, name)]
  if not paths:
    raise ValueError(f"mlp: expected the path of one or more MLPs, found {mlp!r}")
  shapes, plans = _trees.shapes(network.defined()), []
  for path in paths:
    place = (*path, *router.split("/"))
    if len(shapes.get(place, ())) < 2:
      raise ValueError(
        f"mlp {_paths.join(path)!r}: expected {_paths.join(place)!r} in the new module, the weights"
        f" of a router [features, experts], found {_paths.described(shapes.get(place))}"
      )
    *stack, features, experts = shapes[place]
    plans.append(
      _upcycling.upcycling(
        variables,
        _paths.join(path),
        experts=experts,
        features=features,
        axis=len(stack),
        inside=inside,
        router=router,
        copy_state=copy_state,
        alpha=network.alpha,
      )
    )
  grown = _driver.grow(network, functools.reduce(operator.add, plans), fresh)
  return _linen_network.with_forward(old, new, grown, network, rngs)


def shrink(
  old: Any,
  new: Any,
  variables: Any,
  *inputs: Any,
  producer: str,
  keep: Any = None,
  remove: Any = None,
  axis: int = -1,
  unit: int = 1,
  blocks: int = 1,
  **kwargs: Any,
) -> tuple[Any, Plan]:
  """Removes units, such as those that a channel mask has pruned.

  `keep` says which units stay: indices, or a bool mask over the units; or `remove`, which go. `new`
  is the module at its smaller size. All other arguments are as for `widen`.

  Returns:
    The smaller variables, for `new`, and the plan.

  Raises:
    ValueError: If `new` does not run with what is left, or as `growth.shrinking` does.
  """
  network = _linen_network.network_of(old, variables, inputs, kwargs)
  units = _driver.couple(network, producer, axis=axis, unit=unit, blocks=blocks)
  plan = _planners.shrinking(variables, units, keep=keep, remove=remove)
  smaller = plan.apply(variables)
  resized = network._replace(forward=_linen_network.forward_of(new), variables=smaller)
  _driver.check_runs(resized, type(new).__name__)
  _driver.check_layout(resized, plan, type(new).__name__)
  return smaller, plan


def recycle(
  module: Any,
  variables: Any,
  *inputs: Any,
  init: Callable[[jax.Array], Any] | None = None,
  **settings: Any,
) -> Recycle:
  """As `growth.recycle`, for a module: fresh weights come from its own initializers.

  Args:
    module: The module.
    variables: Its variables.
    *inputs: Its inputs, arrays or `jax.ShapeDtypeStruct`s.
    init: `init(key)`, fresh parameters; by default those of `module.init`.
    **settings: As for `growth.recycle` (`inner`, `utility`, `rate` and so on), or of `apply`
      (`rngs`, `mutable`) and the forward pass (`train`).

  Returns:
    `Recycle(forward, transformation)`. `forward(variables, *inputs)` takes what `module.apply`
    does, and returns `(result, activity)`. The transformation is for `variables["params"]`.
  """
  of_recycle = inspect.signature(_recycle.recycle).parameters
  of_call = {name: value for name, value in settings.items() if name not in of_recycle}

  def fresh(key: jax.Array) -> Any:
    names = ["params", *(of_call.get("rngs") or {})]
    rngs = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
    return module.init(rngs, *zeros, **_linen_network.of_init(of_call))["params"]

  settings["init"] = fresh if init is None else init
  return _recycle.recycle(module.apply, variables, *inputs, within="params", **settings)
