"""Floor 3: one model on several ranks: who has which part of it, and how what they compute is put together."""
