"""Floor 2: the same work for any OpenAI-compatible server, and what it took. No torch."""
