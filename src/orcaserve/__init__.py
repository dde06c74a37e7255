"""OrcaServe: continuous batching whose answers do not depend on the load."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from orcaserve.core.request import SamplingParams
    from orcaserve.llm import LLM, AsyncLLM


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first asked for: the command line must start at once."""
    if name in ("LLM", "AsyncLLM"):
        from orcaserve import llm

        return getattr(llm, name)
    if name == "SamplingParams":
        from orcaserve.core.request import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'orcaserve' has no attribute {name!r}")
