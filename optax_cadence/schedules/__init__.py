"""When a region is due: periods, schedules, policies, and ways to give them to parameters."""
