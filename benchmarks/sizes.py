"""How large the cases are, chosen by the memory of the device.

What is measured at these sizes is in `cases`.
"""

import dataclasses

# Of float32 parameters, when one variant runs at a time: state 16, gradients 4, the parameters that
# the check compares with 4, and temporaries of a peer 24.
_BYTES_PER_PARAMETER = 48


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of the cases.

  Attributes:
    uniform: Parameters of the uniform case, one case for each.
    skip: Parameters of the cases about non-finite gradients.
    bfloat16: Parameters of the bfloat16 case.
    control: Parameters of the case about branches.
    layer: Width of each of twelve layers, as leaves or stacked.
    matrix: Width of the matrix that is cut into regions.
    configuration: Parameters of each configuration of the vmap case.
    configurations: Number of configurations.
    compiled_leaves: Leaves in the compilation case, of width `compiled_width`.
    compiled_width: Width of a leaf in the compilation and tracing cases.
    traced_leaves: Leaves in the tracing case.
    pruned: Weights of the matrix whose mask is made.
    pruned_globally: Weights of the forty leaves whose masks are made together.
    step_width: Features of the scanned layers whose whole steps are timed.
    step_model: Features of the transformer; eight times the channels of the ResNet.
    step_tokens: Rows and length of a micro-batch of the transformer: a small one, and a large one.
    step_images: Images of a micro-batch of the ResNet.
    grown_layers: Layers of the transformer that grows.
    grown_width: Its width.
    grown_tokens: Tokens of one step of it, a multiple of 16.
    bandwidth: Entries of each array in the bandwidth measurement.
  """

  uniform: tuple[int, ...] = (12_000_000,)
  skip: int = 12_000_000
  bfloat16: int = 12_000_000
  control: int = 12_000_000
  layer: int = 2048
  matrix: int = 4096
  configuration: int = 2**18
  configurations: int = 64
  compiled_leaves: int = 96
  compiled_width: int = 64
  traced_leaves: int = 1000
  pruned: int = 2**24
  pruned_globally: int = 100_000_000
  step_width: int = 1024
  step_model: int = 256
  step_tokens: tuple[tuple[int, int], tuple[int, int]] = ((1, 64), (8, 128))
  step_images: int = 16
  grown_layers: int = 48
  grown_width: int = 64
  grown_tokens: int = 1024
  bandwidth: int = 2**26


QUICK = Sizes(
  uniform=(3_000_000,),
  skip=3_000_000,
  bfloat16=3_000_000,
  control=3_000_000,
  layer=512,
  matrix=1024,
  configuration=2**14,
  compiled_leaves=24,
  traced_leaves=128,
  pruned=2**20,
  pruned_globally=2**20,
  step_width=128,
  step_model=64,
  step_tokens=((1, 16), (4, 32)),
  step_images=2,
  grown_layers=4,
  grown_tokens=256,
  bandwidth=2**24,
)


def choose(memory: int, accelerator: bool, quick: bool) -> Sizes:
  """The sizes for a device.

  Args:
    memory: Bytes that arrays may take there.
    accelerator: Whether it is a GPU or TPU.
    quick: Whether to end within a minute.
  """
  if quick:
    return QUICK
  wanted = [12_000_000, 100_000_000, *([1_000_000_000] if accelerator else [])]
  fitting = [n for n in wanted if fits(n, memory)] or [wanted[0]]
  large = max(n for n in fitting if n <= 100_000_000)
  return Sizes(
    uniform=tuple(fitting),
    bfloat16=large,
    control=large if accelerator else 12_000_000,
    bandwidth=2**28 if accelerator and fits(100_000_000, memory) else 2**26,
  )


def fits(parameters: int, memory: int) -> bool:
  """Whether a case of this many parameters fits, one variant at a time."""
  return parameters * _BYTES_PER_PARAMETER <= 0.8 * memory
