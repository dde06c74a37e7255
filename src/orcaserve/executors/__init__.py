"""Floor 6: who runs a batch. Today the worker of one device, inside the engine process."""
