"""One rank on a GPU: an iteration is put on the device's stream while the one before it still runs there."""
