"""Continuous kernels: a small network with sine activations is the kernel, at any size.

CKConv (Romero et al. 2021, arXiv:2102.02611) in one and two dimensions. The functions work on
a plain tree of parameters; `CKConv` is the NNX layer. Coordinates run from -1 to 1 along every
axis of a kernel, whatever its size.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from optax_cadence.growth import _nnx_model


def init_kernel(
  key: jax.Array,
  dims: int,
  in_features: int,
  out_features: int,
  *,
  hidden: int = 32,
  layers: int = 2,
  omega: float = 1.5,
) -> dict[str, Any]:
  """Parameters of a kernel network, initialized as a SIREN (arXiv:2006.09661).

  Args:
    key: Random key.
    dims: Number of spatial axes: 1 or 2.
    in_features: Input channels of the kernel.
    out_features: Its output channels.
    hidden: Width of the network.
    layers: Number of sine layers.
    omega: Frequency of the first one: the larger, the finer the structure of a kernel.

  Returns:
    Dict of "w0", "b0", …: weights [inputs, outputs] and biases [outputs].

  Raises:
    ValueError: If a number is out of range.
  """
  if dims not in (1, 2) or min(in_features, out_features, hidden, layers) < 1 or omega <= 0:
    raise ValueError(
      "expected dims 1 or 2, and positive sizes, found"
      f" dims={dims}, in_features={in_features}, out_features={out_features}, hidden={hidden},"
      f" layers={layers}, omega={omega}"
    )
  sizes = [dims, *[hidden] * layers, in_features * out_features]
  params = {}
  for i, (n, m) in enumerate(itertools.pairwise(sizes)):
    key, weight_key, bias_key = jax.random.split(key, 3)
    bound = omega / n if i == 0 else math.sqrt(6 / n)
    if i == layers:  # so that a kernel's variance is that of a usual initializer
      bound = math.sqrt(6 / (n * in_features))
    params[f"w{i}"] = jax.random.uniform(weight_key, (n, m), minval=-bound, maxval=bound)
    phase = math.pi if i < layers else 0.0
    params[f"b{i}"] = jax.random.uniform(bias_key, (m,), minval=-phase, maxval=phase)
  return params


def sample_kernel(
  params: dict[str, Any],
  size: Sequence[int],
  in_features: int,
  out_features: int,
  *,
  fitted: Sequence[int] | None = None,
) -> jax.Array:
  """The kernel at a size.

  Args:
    params: As `init_kernel` makes them.
    size: Number of taps along each axis.
    in_features: Input channels.
    out_features: Output channels.
    fitted: The size at which the kernel's values are right. At another, taps stand for
      another distance; they are scaled so that their sum stays about the same.

  Returns:
    Array [*size, in_features, out_features], as Flax's convolutions have it.

  Raises:
    ValueError: If the size has another number of axes than the kernel.

  >>> import jax
  >>> from optax_cadence.growth import ckconv
  >>> params = ckconv.init_kernel(jax.random.key(0), 2, 3, 8)
  >>> ckconv.sample_kernel(params, (5, 7), 3, 8).shape
  (5, 7, 3, 8)
  """
  dims = params["w0"].shape[0]
  if len(size) != dims or min(size) < 1:
    raise ValueError(f"expected {dims} positive numbers as the kernel's size, found {tuple(size)}")
  axes = [jnp.linspace(-1.0, 1.0, n) if n > 1 else jnp.zeros(1) for n in size]
  x = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1)
  last = len(params) // 2 - 1
  for i in range(last + 1):
    x = x @ params[f"w{i}"] + jnp.expand_dims(params[f"b{i}"], tuple(range(dims)))
    x = jnp.sin(x) if i < last else x
  scale = 1.0 if fitted is None else math.prod(fitted) / math.prod(size)
  return scale * x.reshape(*size, in_features, out_features)


def smooth(size: Sequence[int]) -> float:
  """A frequency at which a kernel does not swing between its taps."""
  return 0.3 * max(size)


def fit_kernel(
  kernel: Any, key: jax.Array, *, steps: int = 3000, learning_rate: float = 3e-3, **settings: Any
) -> tuple[dict[str, Any], float]:
  """Fits a kernel network to a discrete kernel.

  Args:
    kernel: Array [*spatial, in, out].
    key: Random key of the initialization.
    steps: Adam steps; with a cosine decay of the learning rate.
    learning_rate: At the start.
    **settings: As for `init_kernel`.

  Returns:
    The parameters, and the error that is left: norm of the difference over that of the kernel.

  Raises:
    ValueError: If the kernel has not one or two spatial axes.
  """
  kernel = jnp.asarray(kernel)
  *size, n, m = kernel.shape
  if settings.get("omega") is None:
    settings["omega"] = smooth(size)
  params = init_kernel(key, len(size), n, m, **settings)
  tx = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
  spread = jnp.std(kernel) + jnp.finfo(kernel.dtype).tiny

  def loss(params: Any) -> Any:
    return jnp.mean(((sample_kernel(params, size, n, m) - kernel) / spread) ** 2)

  @jax.jit
  def fit(params: Any) -> Any:
    def step(carry: Any, _: None) -> Any:
      params, state = carry
      updates, state = tx.update(jax.grad(loss)(params), state, params)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), None, length=steps)[0][0]

  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    params = fit(params)
  left = jnp.linalg.norm(jnp.ravel(sample_kernel(params, size, n, m) - kernel))
  return params, float(left / jnp.linalg.norm(jnp.ravel(kernel)))


class CKConv(nnx.Module):
  """A convolution, in one or two dimensions, whose kernel is a network of its coordinates.

  Args:
    in_features: Input channels.
    out_features: Output channels.
    kernel_size: Taps along each axis: a sequence of one number or of two. `resample` changes it.
    padding: "SAME", "VALID" or "CAUSAL" (one dimension).
    use_bias: Whether a bias is added.
    hidden: Width of the kernel network.
    layers: Its number of sine layers.
    omega: Frequency of the first of them, in radians per unit; by default 0.3 times the largest
      number of taps, which keeps a kernel smooth between them.
    rngs: Random numbers.

  References:
    Romero et al. 2021, arXiv:2102.02611.

  >>> import jax.numpy as jnp
  >>> from flax import nnx
  >>> from optax_cadence import growth
  >>> layer = growth.CKConv(3, 8, (5, 5), rngs=nnx.Rngs(0))
  >>> layer(jnp.ones((2, 16, 16, 3))).shape
  (2, 16, 16, 8)
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    kernel_size: Sequence[int],
    *,
    padding: str = "SAME",
    use_bias: bool = True,
    hidden: int = 32,
    layers: int = 2,
    omega: float | None = None,
    rngs: nnx.Rngs,
  ):
    if padding not in ("SAME", "VALID", "CAUSAL") or (padding == "CAUSAL" and len(kernel_size) > 1):
      raise ValueError(
        f'padding must be "SAME", "VALID", or in one dimension "CAUSAL", found {padding!r}'
      )
    self.in_features, self.out_features = in_features, out_features
    self.kernel_size = self.fitted_size = tuple(kernel_size)
    self.padding = padding
    omega = smooth(self.kernel_size) if omega is None else omega
    settings: Any = {"hidden": hidden, "layers": layers, "omega": omega}
    dims = len(self.kernel_size)
    params = init_kernel(rngs.params(), dims, in_features, out_features, **settings)
    params[f"w{layers}"] = params[f"w{layers}"] / math.sqrt(math.prod(self.kernel_size))
    self.depth = layers + 1
    for name, value in params.items():
      setattr(self, name, nnx.Param(value))
    self.bias = nnx.Param(jnp.zeros(out_features)) if use_bias else None

  @property
  def kernel(self) -> jax.Array:
    """The kernel at the present size: [*kernel_size, in, out]."""
    names = [f"{kind}{i}" for i in range(self.depth) for kind in "wb"]
    params = {name: _nnx_model.get_array(getattr(self, name)) for name in names}
    return sample_kernel(
      params, self.kernel_size, self.in_features, self.out_features, fitted=self.fitted_size
    )

  def resample(self, kernel_size: Sequence[int]) -> None:
    """Reads the kernel at another number of taps from now on: another resolution."""
    if len(kernel_size) != len(self.kernel_size) or min(kernel_size) < 1:
      raise ValueError(
        f"expected a size with as many axes as {self.kernel_size}, found {tuple(kernel_size)}"
      )
    self.kernel_size = tuple(kernel_size)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Convolves `x`, [batch, *spatial, in]."""
    size = self.kernel_size
    padding: Any = [(size[0] - 1, 0)] if self.padding == "CAUSAL" else self.padding
    spec = ("NWC", "WIO", "NWC") if len(size) == 1 else ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
      x, self.kernel, (1,) * len(size), padding, dimension_numbers=spec
    )
    if self.bias is None:
      return y
    return y + jnp.expand_dims(_nnx_model.get_array(self.bias), tuple(range(y.ndim - 1)))


def to_continuous(
  kernel: Any,
  *,
  bias: Any = None,
  padding: str = "SAME",
  rngs: nnx.Rngs,
  steps: int = 3000,
  learning_rate: float = 3e-3,
  hidden: int = 32,
  layers: int = 2,
  omega: float | None = None,
) -> tuple[CKConv, float]:
  """A `CKConv` whose kernel is that of a trained convolution.

  Args:
    kernel: Array [*spatial, in, out].
    bias: Its bias, [out], or None.
    padding: As for `CKConv`.
    rngs: Random numbers.
    steps: Adam steps of the fit.
    learning_rate: Of the fit, at its start.
    hidden: Width of the kernel network.
    layers: Its number of sine layers.
    omega: Frequency of the first of them, in radians per unit; by default 0.3 times the largest
      number of taps, which keeps a kernel smooth between them.

  Returns:
    The layer, and the error that is left: norm of the difference over that of the kernel.
  """
  *size, n, m = jnp.shape(kernel)
  settings: Any = {"hidden": hidden, "layers": layers, "omega": omega}
  params, error = fit_kernel(
    kernel, rngs.params(), steps=steps, learning_rate=learning_rate, **settings
  )
  layer = CKConv(n, m, size, padding=padding, use_bias=bias is not None, rngs=rngs, **settings)
  for name, value in params.items():
    _nnx_model.set_array(getattr(layer, name), value)
  if layer.bias is not None:
    _nnx_model.set_array(layer.bias, jnp.asarray(bias))
  return layer, error
