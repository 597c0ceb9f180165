"""What a cadence can do where the inner optimizer provably treats entries one by one.

Leaves under a random mask then keep their shape, and one pass serves all periods; bands of an axis
keep the fold in which they are read. `proof` decides whether it is so, from the optimizer's traced
program; `choice` which leaves it holds for; `masks` and `lanes` run it. Nothing here is imported by
cadences without masks or bands.
"""
