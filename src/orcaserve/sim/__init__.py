"""Floor 2: the engine's own scheduler and loop, in virtual time."""
