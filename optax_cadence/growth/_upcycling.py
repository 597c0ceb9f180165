"""Sparse upcycling: a trained MLP becomes a mixture of experts, which begin as its copies."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_cadence import _paths
from optax_cadence.growth import _trees
from optax_cadence.growth._plan import LeafChange
from optax_cadence.growth._plan import Plan


def upcycling(
  variables: Any,
  mlps: str | Sequence[str],
  *,
  experts: int,
  features: int,
  axis: int = 0,
  inside: str = "experts",
  router: str = "router/kernel",
  copy_state: bool = True,
  alpha: str = "alpha",
) -> Plan:
  """Plans mixtures of experts in place of MLPs (Komatsuzaki et al. 2022, arXiv:2212.05055).

  Every leaf of an MLP goes one level down, gets an axis of experts, and is the same in all of them.
  Beside them there is a new leaf, the weights of the router. There is no gate: a mixture whose
  weights sum to one, as `mixture_of_experts` has them, computes what the MLP did.

  Args:
    variables: Tree of arrays or `jax.ShapeDtypeStruct`.
    mlps: Path of what holds the leaves of an MLP, or of several.
    experts: Number of experts.
    features: Number of entries of what the MLPs, and so the routers, read.
    axis: Where the axis of experts stands: 1 in layers that are stacked along axis 0.
    inside: Path of the experts' leaves in a mixture.
    router: Path of the router's weights, [features, experts], in a mixture.
    copy_state: Whether what an optimizer keeps is copied to all experts too; otherwise it is as
      `init` makes it.
    alpha: Path at which a gate would be; for variables of Linen "params/alpha".

  Returns:
    A `Plan`. Of its fresh values only the routers' are read. `growth.undo` leaves the first expert.

  Raises:
    ValueError: If there is no such MLP, one is named twice, or there are fewer than two experts.

  >>> import jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> params = {"mlp": {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 3))}}
  >>> plan = growth.upcycling(params, "mlp", experts=4, features=3)
  >>> grown = plan.apply(params, lambda path, shape, dtype: jnp.zeros(shape))
  >>> print({path: x.shape for path, x in grown["mlp"]["experts"].items()})
  {'down': (4, 8, 3), 'up': (4, 3, 8)}
  """
  if not isinstance(experts, int | np.integer) or isinstance(experts, bool) or experts < 2:
    raise ValueError(f"experts must be an integer, 2 or more, found {experts!r}")
  shapes = _trees.shapes(variables)
  changes: list[LeafChange] = []
  moved: dict[_paths.Path, _paths.Path] = {}
  for name in [mlps] if isinstance(mlps, str) else mlps:
    prefix = tuple(name.split("/"))
    under = [path for path in shapes if path[: len(prefix)] == prefix and path != prefix]
    if not under:
      raise ValueError(f"mlp {name!r}: expected what holds leaves of {_paths.listed(shapes)}")
    if moved.keys() & set(under):
      raise ValueError(f"mlp {name!r}: expected each once, and none in another")
    stacks = {shapes[path][:axis] for path in under}
    if len(stacks) != 1 or len(next(iter(stacks))) != axis:
      listed = ", ".join(f"{_paths.join(path)!r} of shape {shapes[path]}" for path in under)
      raise ValueError(
        f"mlp {name!r}: expected leaves that are the same along {axis} first axes, found {listed}"
      )
    for path in under:
      moved[path] = (*prefix, *inside.split("/"), *path[len(prefix) :])
      changes.append(
        LeafChange(
          moved[path],
          shapes[path],
          (*shapes[path][:axis], experts, *shapes[path][axis:]),
          "experts",
          {axis: np.arange(1)},
          layers=True,
          sources=np.zeros(experts, int),
          copies_state=copy_state,
        )
      )
    path = (*prefix, *router.split("/"))
    changes.append(LeafChange(path, None, (*stacks.pop(), features, experts), "added"))
  return Plan(tuple(changes), True, tuple(alpha.split("/")), moved=moved, gate=False)


def mixture_of_experts(
  experts: Callable[[Any], Any],
  router: Any,
  x: Any,
  *,
  top_k: int = 2,
  capacity: float | None = None,
) -> jax.Array:
  """Sends every token to the experts that the router likes best, and adds up what they make of it.

  The weights of a token's experts sum to one, so that experts that are all alike compute what one
  of them does.

  Args:
    experts: A function from [experts, places, features] to [experts, places, outputs]: every expert
      on tokens of its own. `lambda x: jax.vmap(mlp)(params["experts"], x)`.
    router: Weights of the router, [features, experts].
    x: The tokens, [..., features].
    top_k: Number of experts for each token. (With one, its weight is 1, and the router learns
      nothing from the loss.)
    capacity: Of every expert, how many times the places that it needs if all have as many tokens.
      A token that finds no place in an expert gets nothing from it; first choices come first. None:
      a place for every token in every expert, which is exact, and costs as much as all experts do.

  Returns:
    [..., outputs].

  Raises:
    ValueError: If there are fewer experts than `top_k`, the router does not fit, or no expert has a
      place.

  >>> import jax, jax.numpy as jnp
  >>> from optax_cadence import growth
  >>> kernels = jnp.stack([jnp.ones((3, 2))] * 4)
  >>> run = lambda x: jnp.einsum("epi,eio->epo", x, kernels)
  >>> router = jax.random.normal(jax.random.key(0), (3, 4))
  >>> print(growth.mixture_of_experts(run, router, jnp.arange(3.0)).round(5))
  [3. 3.]
  """
  number = router.shape[-1]
  if router.shape[0] != x.shape[-1] or not 1 <= top_k <= number:
    raise ValueError(
      f"router of shape {router.shape}: expected [{x.shape[-1]}, experts], with at least top_k ="
      f" {top_k} experts"
    )
  if capacity is not None and not capacity > 0:
    raise ValueError(f"capacity: expected a number above 0, or None, found {capacity!r}")
  tokens = x.reshape(-1, x.shape[-1])
  n = len(tokens)
  liked, chosen = jax.lax.top_k(_scores(router, tokens), top_k)  # [tokens, top_k]
  weights = jax.nn.softmax(liked).T.reshape(-1)
  chosen = chosen.T.reshape(-1)  # all first choices, then all second ones
  places = n if capacity is None else min(n, math.ceil(capacity * top_k * n / number))
  # The place of a choice is the number of earlier choices of the same expert.
  before = jnp.cumsum(jax.nn.one_hot(chosen, number, dtype=jnp.int32), axis=0)
  place = jnp.take_along_axis(before, chosen[:, None], 1)[:, 0] - 1
  token = jnp.tile(jnp.arange(n), top_k)
  # A token of zeros, appended as number n, fills the places that stay empty.
  table = jnp.full((number, places), n).at[chosen, place].set(token, mode="drop")
  padded = jnp.concatenate([tokens, jnp.zeros((1, tokens.shape[1]), tokens.dtype)])
  outputs = experts(padded[table])
  weights = jnp.where(place < places, weights, jnp.zeros((), weights.dtype)).astype(outputs.dtype)
  gathered = outputs[chosen, jnp.minimum(place, places - 1)]
  total = (weights[:, None] * gathered).reshape(top_k, n, -1).sum(0)
  return total.reshape(*x.shape[:-1], -1)


def load_balance(router: Any, x: Any) -> jax.Array:
  """How unevenly a router loads its experts: 1 if evenly, and up to their number.

  The loss of Fedus et al. 2021, arXiv:2101.03961: the number of experts times the sum over them of
  the share of tokens that like the expert best and the mean probability of it. Add a small multiple
  of it (0.01) to the loss.

  Args:
    router: Weights of the router, [features, experts].
    x: The tokens, [..., features].
  """
  scores = _scores(router, x.reshape(-1, x.shape[-1]))
  share = jax.nn.one_hot(scores.argmax(-1), router.shape[-1], dtype=scores.dtype).mean(0)
  return router.shape[-1] * (share * jax.nn.softmax(scores).mean(0)).sum()


def _scores(router: Any, tokens: Any) -> jax.Array:
  """The logits of a router, in single precision: [tokens, experts]."""
  return tokens.astype(jnp.float32) @ router.astype(jnp.float32)
