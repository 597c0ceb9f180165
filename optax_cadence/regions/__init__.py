"""Which entries of the parameters share a cadence: grids, their cuts, and the groups of a tree."""
