"""OrcaServe: continuous batching whose answers do not depend on the load."""

__version__ = "0.1.0"
