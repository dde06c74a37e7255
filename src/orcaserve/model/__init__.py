"""Floor 4: one decoder, a table of architectures, and the weights of a Hugging Face folder."""
