"""The state of a cadence: what a checkpoint holds."""

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_cadence import _paths

if TYPE_CHECKING:
  from optax_cadence.confidence.statistics import Estimate


def per_region(regions: int) -> tuple[int, ...]:
  """The shape of what a state has for each region of a group: [R].

  A group may have no regions, as where a part of the tree is masked away. It has scalars then,
  which nobody reads or changes: checkpoints do not take arrays without entries.
  """
  return (regions,) if regions else ()


class ConfidenceState(NamedTuple):
  """What a group under a policy knows of its R regions.

  Attributes:
    squares: Sum of the squared norms of the gradients in the window: float32 [R]; of no
      meaning while the window is empty. None where the policy does not read them.
    estimate: |G|² and tr Σ, smoothed over the windows until now; None likewise.
    sample: Some entries of the parameters, as they were before the last update, in the tree that
      the inner optimizer sees; None where the policy does not read updates.
    policy: What the policy remembers.
  """

  squares: jax.Array | None
  estimate: "Estimate | None"
  sample: Any
  policy: Any


class GroupState(NamedTuple):
  """State of one group of R regions; a field that the group does not need is None.

  No array is without entries: a group without regions has scalars in the place of [R].

  Attributes:
    inner_state: State of the group's instance of the inner optimizer.
    accumulators: Sum of the gradients in the window, in the tree that the inner
      optimizer sees, or, in a dtype narrower than 32 bits, their mean; of no meaning while the
      window is empty. None for period 1 and for `accumulate="latest"`.
    window: Micro-steps in the window so far: int32 scalar, or int32 [R] with one for each
      region under `nonfinite="skip"` and with weights. None without accumulators.
    remaining: Micro-steps until the group is due, under a policy at the latest: int32
      scalar. None for period 1.
    period: Micro-steps of the window in force; under a policy, of the last one that fired, 0
      before the first: int32 scalar.
    updates: Updates applied so far: int32 scalar.
    fired: 1 if one was applied at the last micro-step, or by `flush` after it, else 0: int32
      scalar.
    skipped: Micro-batches left out so far, int32 [R]. None unless `nonfinite="skip"`.
    weight: Sum of the weights in the window, or in the last one where it is empty: float32 [R].
      None unless `weighted`, and without accumulators.
    confidence: What a policy goes by; None unless one decides.
  """

  inner_state: optax.OptState
  accumulators: Any
  window: jax.Array | None
  remaining: jax.Array | None
  period: jax.Array
  updates: jax.Array
  fired: jax.Array
  skipped: jax.Array | None
  weight: jax.Array | None = None
  confidence: ConfidenceState | None = None

  def emptied(self, fresh: "GroupState") -> "GroupState":
    """The group with an empty window, as that of a fresh one; it stays in its rhythm."""
    return self._replace(window=fresh.window)


class MaskState(NamedTuple):
  """What the groups of leaves under masks have together, in the shape of the leaves.

  Attributes:
    inner_state: A state of the inner optimizer for these leaves alone, of which only the arrays
      are kept that have a number for each entry; the rest is in the state of each group.
    accumulators: Sum or mean of the gradients of each entry's window, as in `GroupState`, in a tree
      that has these leaves alone; of no meaning while that window is empty. None for
      `accumulate="latest"`.
  """

  inner_state: optax.OptState
  accumulators: Any


class Regions(NamedTuple):
  """The regions of a state: a part of its structure, without arrays.

  Attributes:
    known: What is known of them as JSON, the only key of a dict: so that it has no leaf for
      `optax.tree_utils.tree_set`, which looks into every field, and is saved by Flax. Under "names"
      for each group the names of its regions, under "folded" the paths of the leaves whose bands
      keep their fold, under "masked" those of the leaves in `CadenceState.masks` and which arrays
      of `MaskState.inner_state` are each one's, and under "dtypes" path and dtype of every
      parameter. Empty where they are not known, as in what `tx.init` makes of the stand-in of
      `optax.tree_utils.tree_map_params`.
  """

  known: dict[str, dict[str, Any]]

  @classmethod
  def of(cls, **known: Any) -> "Regions":
    """The regions of which this is known."""
    return cls({json.dumps(known): {}})

  def _known(self, what: str) -> Any:
    return next((json.loads(text)[what] for text in self.known), [])

  @property
  def names(self) -> dict[str, list[str]]:
    """For each group the names of its regions, in order."""
    return dict(self._known("names"))

  @property
  def folded(self) -> set[tuple[str, ...]]:
    """The paths of the leaves whose bands keep their fold."""
    return set(map(tuple, self._known("folded")))

  @property
  def masked(self) -> dict[tuple[str, ...], list[int]]:
    """The paths of the leaves under masks that their groups train together.

    And for each which arrays of the state, counted among those of `MaskState.inner_state`, hold
    numbers for its entries.
    """
    return {tuple(path): places for path, places in self._known("masked")}

  @property
  def dtypes(self) -> dict[tuple[str, ...], np.dtype]:
    """The dtype of each parameter, by path."""
    return {tuple(path): jnp.dtype(name) for path, name in self._known("dtypes")}


class _NotYetKnown:
  """Stands for regions that are not known: equal to any, and from then on for those.

  `tree_map_params` compares the structure of a state with that of one without parameters, and
  gives back its own state in the structure of the latter.
  """

  text = ""

  def __eq__(self, other: object) -> bool:
    if not self.text and isinstance(other, str):
      self.text = other
    return True

  def __hash__(self) -> int:
    return 0


def _regions_from(text: Any, _: Any) -> Regions:
  text = text.text if isinstance(text, _NotYetKnown) else text
  return Regions({text: {}} if text else {})


jax.tree_util.register_pytree_node(
  Regions, lambda regions: ((), next(iter(regions.known), _NotYetKnown())), _regions_from
)


class CadenceState(NamedTuple):
  """State of `cadence`.

  Attributes:
    micro_step: Micro-steps done: int32 scalar.
    groups: State of each group, by name: "8" for period 8, "8 (offset 3)", or what a schedule
      or policy is called.
    regions: The names of each group's regions, and how they are laid out.
    masks: State of the leaves under masks that their groups train together, which they do
      where the inner optimizer is elementwise. None where no cadence is a mask; without arrays
      where one is, but no leaf is trained so.
  """

  micro_step: jax.Array
  groups: dict[str, GroupState]
  regions: Regions
  masks: MaskState | None = None


class _Elsewhere(NamedTuple):
  """Stands where a part was taken out that follows the parameters."""

  def __repr__(self) -> str:
    return "<in FoundState.like_parameters; FoundState.groups and masks have it in its place>"


def _is_elsewhere(node: Any) -> bool:
  return isinstance(node, _Elsewhere)


def _is_found(node: Any) -> bool:
  return isinstance(node, FoundState)


def _is_end(node: Any) -> bool:
  return _is_found(node) or _is_elsewhere(node)


def _is_place(node: Any) -> bool:
  """Whether a part was taken out here.

  Of the state of a cadence inside, which has such places of its own, the parts that it took out are
  one part.
  """
  return _is_elsewhere(node.like_parameters if _is_found(node) else node)


def _without_places(node: Any) -> bool:
  """Whether nothing was taken out of a tree."""
  return not any(map(_is_place, jax.tree.leaves(node, is_leaf=_is_end)))


def _put_back(node: Any, parts: Iterator[Any]) -> Any:
  """A tree with the next parts in its places.

  What has none in it is the same object: what is set in a dict of it, such as the hyperparameters
  of `optax.inject_hyperparams`, is set in the state.
  """
  if _is_place(node):
    part = next(parts)
    return node._replace(like_parameters=part) if _is_found(node) else part
  if _without_places(node):
    return node
  return jax.tree.map(lambda x: _put_back(x, parts), node, is_leaf=lambda x: x is not node)


class _Parts(NamedTuple):
  micro_step: Any
  like_parameters: Any
  others: Any
  regions: Regions


class FoundState(_Parts):
  """State of a `cadence` whose groups a function of the parameters has found.

  It has the attributes of a `CadenceState`, and is another tree. `tree_map_params` matches a state
  with what `init` makes of a stand-in for the parameters, of which such a function does not know
  the groups. So this tree has four parts, however many groups there are.

  Attributes:
    micro_step: As in `CadenceState`.
    like_parameters: Every part of groups and masks that follows the parameters (moments,
      accumulators), in order.
    others: Groups and masks without these parts.
    regions: As in `CadenceState`.
  """

  @classmethod
  def of(cls, state: CadenceState, init: Callable[[Any], Any]) -> "FoundState":
    """The state with what follows the parameters apart.

    Args:
      state: The state.
      init: What makes groups and masks of a stand-in for the parameters.
    """
    parts = []

    def taken(part: Any) -> _Elsewhere:
      parts.append(part)
      return _Elsewhere()

    held = state.groups, state.masks
    others = optax.tree_utils.tree_map_params(init, taken, held, is_leaf=lambda _: True)
    return cls(state.micro_step, tuple(parts), others, state.regions)

  @functools.cached_property
  def _whole(self) -> tuple[dict[str, GroupState], MaskState | None]:
    ends = jax.tree.leaves(self.others, is_leaf=_is_end)
    places = sum(map(_is_place, ends))
    if places != len(self.like_parameters):
      raise ValueError(
        f"FoundState: expected {len(self.like_parameters)} places for what follows the parameters,"
        f" found {places}; optax.tree_utils.tree_set can set numbers in it, but no moments: do so"
        " in its groups, state._replace(groups=...), or give the cadence a tree of cadences"
      )
    return _put_back(self.others, iter(self.like_parameters))

  @property
  def groups(self) -> dict[str, GroupState]:
    """State of each group, as in `CadenceState`."""
    return self._whole[0]

  @property
  def masks(self) -> MaskState | None:
    """State of the leaves under masks, as in `CadenceState`."""
    return self._whole[1]

  def _replace(self, **fields: Any) -> "FoundState":
    """With other values of these fields; they may be those of a `CadenceState`."""
    if not fields.keys() & {"groups", "masks"}:
      return super()._replace(**fields)
    parts = []

    def taken(place: Any, node: Any) -> Any:
      if not _is_place(place):
        return node
      parts.append(node.like_parameters if _is_found(place) else node)
      return node._replace(like_parameters=_Elsewhere()) if _is_found(place) else place

    held = fields.pop("groups", self.groups), fields.pop("masks", self.masks)
    others = jax.tree.map(taken, self.others, held, is_leaf=_is_end)
    return super()._replace(like_parameters=tuple(parts), others=others, **fields)


# The state of a cadence.
State = CadenceState | FoundState


def opened(state: Any) -> Any:
  """The state of an optimizer, with a `CadenceState` in the place of each `FoundState`."""

  def one(node: Any) -> Any:
    if _is_found(node):
      groups, masks = opened((node.groups, node.masks))
      return CadenceState(node.micro_step, groups, node.regions, masks)
    return node

  return jax.tree.map(one, state, is_leaf=_is_found)


def closed(state: Any, like: Any) -> Any:
  """An opened state, with a `FoundState` again where there is one in the state that it is like."""

  def one(node: Any, part: Any) -> Any:
    if not _is_found(node):
      return part
    groups, masks = closed((part.groups, part.masks), (node.groups, node.masks))
    return node._replace(**part._asdict() | {"groups": groups, "masks": masks})

  return jax.tree.map(one, like, state, is_leaf=_is_found)


def is_stand_in(params: Any) -> bool:
  """Whether these are no parameters, but what `optax.tree_utils.tree_map_params` gives `init`.

  It asks which parts of a state follow the parameters: those in whose place this stands.
  """
  # By name: the class is private to Optax, the way it is used is not.
  return type(params).__name__ == "_ParamsPlaceholder"


def cadence_states(state: Any) -> list[State]:
  """The states of all cadences in the state of an optimizer."""
  return states_of(state, CadenceState, FoundState)


def states_of(state: Any, *kinds: type) -> list[Any]:
  """The states of these kinds in the state of an optimizer."""

  def is_state(node: Any) -> bool:
    return isinstance(node, kinds)

  return [node for node in jax.tree.leaves(state, is_leaf=is_state) if is_state(node)]


def plain(init: Callable[[Any], Any], state: optax.OptState, params: Any) -> optax.OptState:
  """The state in the containers that `init` makes, if it is that of an `nnx.Optimizer`.

  There each array of it is in a variable, and a variable like a parameter's is one of another kind.
  The parameters are read for their shapes.

  Raises:
    ValueError: If it is the state of other parameters.
  """
  if isinstance(getattr(state, "micro_step", None), jax.Array | np.ndarray):
    return state
  nodes = jax.tree.leaves(state, is_leaf=_paths.is_optimizer_variable)
  if not any(map(_paths.is_optimizer_variable, nodes)):
    return state
  expected, found = jax.eval_shape(init, params), _paths.arrays(state)
  want = jax.tree.leaves(expected)
  if list(map(np.shape, want)) != list(map(np.shape, found)):
    raise ValueError(
      f"state: expected {len(want)} arrays as init makes them for these parameters, found"
      f" {len(found)}, or others; a state goes with the parameters and settings it was made for"
    )
  return jax.tree.unflatten(jax.tree.structure(expected), found)
