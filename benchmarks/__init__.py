"""Times what accumulation costs: a cadence beside its peers, and beside the floor.

A peer is another way to do the same. The floor is how long it takes to move the bytes that have to
be moved, at the bandwidth of this machine.

Run `python -m benchmarks` in the folder above. No part of the library imports this.
"""
