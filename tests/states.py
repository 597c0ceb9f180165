"""What tests read of the state of a cadence, so that its layout is written down once."""

import jax


def names(state):
  """The names of the groups that have regions, in order of first appearance in the tree."""
  return [name for name, regions in state.regions.names.items() if regions]


def groups(state):
  """The state of each group, in order of first appearance in the tree of parameters."""
  return [state.groups[name] for name in names(state)]


def with_groups(state, groups):
  """`state` with other states of its groups, in the same order."""
  return state._replace(groups=state.groups | dict(zip(names(state), groups, strict=True)))


def mask_states(state):
  """The states of the leaves under a mask that are trained by one pass for all periods."""
  return [] if state.masks is None else [state.masks]


def masked_leaves(state):
  """How many leaves under a mask are trained by one pass for all periods."""
  return len(state.regions.masked)


def mask_moments(state, name):
  """The moments of the leaf of this name, which is trained so."""
  flat, _ = jax.tree_util.tree_flatten_with_path(state.masks.inner_state)
  return [x for path, x in flat if path[-1] == jax.tree_util.DictKey(name)]
