"""Floor 5: one rank. Holds the KV tensors, turns a Batch into tensors, runs the model, samples."""
