"""Floor 6: who runs a batch. The worker of one device inside the engine process, or a process for each rank."""
