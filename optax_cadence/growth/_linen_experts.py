"""Mixtures of experts of Linen modules."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from optax_cadence.growth import _upcycling


class MixtureOfExperts(nn.Module):
  """Experts, all of one kind, and a router that sends each token to some of them.

  Its parameters are those of an expert, under "experts" and with a first axis of experts, and
  "router/kernel", [features, experts]. How unevenly the experts are loaded is sown as
  "load_balance" among the "intermediates", see `growth.load_balance`.

  Attributes:
    expert: What makes an expert, called with the keyword `name`: its class, or
      `functools.partial(Mlp, hidden=16)`.
    number: Number of experts.
    top_k: Number of experts for each token, see `growth.mixture_of_experts`.
    capacity: Places of every expert; None: one for every token.
  """

  expert: Callable[..., Any]
  number: int = 8
  top_k: int = 2
  capacity: float | None = None

  @nn.compact
  def __call__(self, x: Any, *args: Any, **kwargs: Any) -> jax.Array:
    """What the experts make of tokens [..., features]; they get all other arguments as they are."""
    # Whatever collections an expert has, all have an axis of experts; each draws its own numbers.
    run = nn.vmap(
      lambda expert, tokens: expert(tokens, *args, **kwargs),
      variable_axes={True: 0},
      split_rngs={True: True},
    )
    experts = self.expert(name="experts")
    router = _Router(self.number, name="router")(x)
    self.sow("intermediates", "load_balance", _upcycling.load_balance(router, x))
    return _upcycling.mixture_of_experts(
      lambda tokens: run(experts, tokens), router, x, top_k=self.top_k, capacity=self.capacity
    )


class _Router(nn.Module):
  """The weights of a router, [features, experts], as Komatsuzaki et al. have them at first."""

  experts: int

  @nn.compact
  def __call__(self, x: Any) -> Any:
    return self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.experts))
