"""What accumulation costs: cadence beside its peers and the floor that memory sets.

Run `python -m benchmarks` in the folder above. No part of the library imports this.
"""
