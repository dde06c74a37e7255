"""`find_device`: where a model runs."""

from __future__ import annotations

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from orcaserve.core.config import EngineOptions, ModelError
from orcaserve.model.config import find_row, read_raw_config
from orcaserve.worker.process import uncollected


def count_gpus() -> int:
    """GPUs that torch can use. To import it takes a second, so it is not asked where the system has no driver."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            return 0
    with uncollected("torch"):
        import torch

    return torch.cuda.device_count()


def find_device(options: EngineOptions) -> Literal["cpu", "cuda"]:
    """Where a model runs. Raises ModelError for a GPU that is not there, or an option that it has no kernels for.

    Of several GPUs each rank has one; to ask here which is the current one would take memory of it.
    """
    count = 0 if options.device == "cpu" else count_gpus()
    there = count > 0 and find_spec("triton") is not None
    row = find_row(read_raw_config(Path(options.model)))
    others = options.backend == "transformers" or (options.backend == "auto" and row is None)
    ranks = max(1, options.tensor_parallel * options.pipeline_parallel // options.nnodes)  # of this host
    is_mixed = ranks > 1 and options.control_plane == "mixed"
    reduced = row is not None and row.experts and options.quantization != "none"
    chosen = options.kernels != "auto"
    too_few = ranks > 1 and there and count < ranks
    unfit = others or reduced or chosen or is_mixed or too_few
    if options.device == "cpu" or (options.device == "auto" and (not there or unfit)):
        return "cpu"
    if not count:
        raise ModelError("there is no GPU that torch can use; leave out --device")
    if not there:
        raise ModelError("a GPU needs Triton: pip install 'orcaserve[gpu]'")
    if others:
        raise ModelError("on a GPU a model runs by our own decoder: leave out --backend, or say --device cpu")
    if too_few:
        raise ModelError(f"{ranks} ranks on this host need a GPU each, and it has {count}: say --device cpu")
    if is_mixed:
        raise ModelError("batches travel with activations between CPUs only: leave out --control-plane mixed")
    if reduced:
        raise ModelError("on a GPU experts keep the model's dtype: leave out --quantization, or say --device cpu")
    if chosen:
        raise ModelError("on a GPU kernels are Triton's: leave out --kernels, or say --device cpu")
    if options.numerics == "fast" and options.quantization != "none":
        raise ModelError(f"the vendor's products take no {options.quantization} weights; leave out --numerics fast")
    return "cuda"
