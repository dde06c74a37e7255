"""Floor 2: the engine loop, the executor protocol, and the executor that needs no model."""
