"""Floor 0 and 1: values and decisions. Plain Python: no torch, clock, thread, randomness or logging."""
