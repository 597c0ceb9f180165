"""What tests read of the state of a cadence, so that its layout is written down once."""


def groups(state):
  """The state of each group, in order of first appearance in the tree of parameters."""
  return list(state.groups)


def with_groups(state, groups):
  """`state` with other states of its groups, in the same order."""
  return state._replace(groups=tuple(groups))


def mask_states(state):
  """The states of the leaves under a mask whose groups share what they have for each entry."""
  return list(state.shared)
