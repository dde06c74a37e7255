"""`load_model`: the decoder of a folder by the backend that the operator asks for, or that there is."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from orcaserve.core.config import Dtype, ModelError
from orcaserve.model.config import find_row, read_config, read_raw_config
from orcaserve.model.decoder import Decoder, compute_dtype
from orcaserve.model.weights import Progress
from orcaserve.ops.kernels import Kernels

if TYPE_CHECKING:
    from orcaserve.model.transformers_backend import TransformersDecoder


def load_model(
    folder: str | Path,
    dtype: Dtype = "auto",
    backend: Literal["auto", "native", "transformers"] = "auto",
    progress: Progress | None = None,
    kernels: Kernels | None = None,
) -> Decoder | TransformersDecoder:
    """Loads a whole model. Raises ModelError, in one line, if it cannot be served.

    backend: "auto" is our decoder for the architectures in the table, and transformers for others if it is installed.
    kernels: what our decoder computes with; None: torch's operators.
    """
    native = backend == "native" or (backend == "auto" and find_row(read_raw_config(Path(folder))) is not None)
    installed = find_spec("transformers") is not None
    if native or (backend == "auto" and not installed):
        config = read_config(folder)
        return Decoder.load(config, folder, compute_dtype(config, dtype), progress=progress, kernels=kernels)
    if not installed:
        raise ModelError("the transformers backend needs the extra: pip install 'orcaserve[transformers]'")
    if kernels is not None and kernels.kv_dtype != "auto":
        raise ModelError(
            f"the transformers backend keeps keys and values in the model's dtype, not in {kernels.kv_dtype}; "
            "leave out --kv-cache-dtype"
        )
    if kernels is not None and kernels.is_quantised:
        raise ModelError(
            "the transformers backend computes with the weights as they are; leave out --quantization, or --backend"
        )
    from orcaserve.model.transformers_backend import TransformersDecoder  # an optional dependency

    wanted = None if dtype == "auto" else {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    return TransformersDecoder.load(folder, wanted, progress)
