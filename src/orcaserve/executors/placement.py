"""`find_device`: where a model runs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from orcaserve.core.config import EngineOptions, ModelError
from orcaserve.model.config import find_row, read_raw_config


def find_device(options: EngineOptions) -> torch.device:
    """Where a model runs. Raises ModelError for a GPU that is not there, or an option that it has no kernels for."""
    there = torch.cuda.is_available() and find_spec("triton") is not None
    row = find_row(read_raw_config(Path(options.model)))
    others = (
        options.tensor_parallel * options.pipeline_parallel * options.nnodes > 1
        or options.backend == "transformers"
        or (options.backend == "auto" and row is None)
    )
    reduced = row is not None and row.experts and options.quantization != "none"
    chosen = options.kernels != "auto"
    if options.device == "cpu" or (options.device == "auto" and (not there or others or reduced or chosen)):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ModelError("there is no GPU that torch can use; leave out --device")
    if not there:
        raise ModelError("a GPU needs Triton: pip install 'orcaserve[gpu]'")
    if others:
        raise ModelError("on a GPU a model runs on one device, by our own decoder: leave out what shares it out")
    if reduced:
        raise ModelError("on a GPU experts keep the model's dtype: leave out --quantization, or say --device cpu")
    if chosen:
        raise ModelError("on a GPU kernels are Triton's: leave out --kernels, or say --device cpu")
    if options.numerics == "fast" and options.quantization != "none":
        raise ModelError(f"the vendor's products take no {options.quantization} weights; leave out --numerics fast")
    return torch.device("cuda", torch.cuda.current_device())
