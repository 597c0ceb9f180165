"""What a cadence will do, does and did: a table, scalars for a logger, pictures."""
