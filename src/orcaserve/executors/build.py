"""`build`: from an operator's options to an executor that is ready to run, and what there is to say about it."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from orcaserve.core.config import EngineInfo, EngineOptions, KVDtype, ModelError, Quantization
from orcaserve.core.policy import POLICIES
from orcaserve.executors.local import LocalExecutor
from orcaserve.model.load import load_model
from orcaserve.ops.kernels import Kernels
from orcaserve.ops.native_kernels import NativeKernels, instruction_sets
from orcaserve.ops.torch_kernels import TorchKernels
from orcaserve.worker.machine import available_memory, cpu_name, usable_cpus
from orcaserve.worker.memory import activation_bytes, make_budget
from orcaserve.worker.worker import Worker

_WHOLE_PROMPT = 4096  # tokens that the activations' budget allows for where a policy does not cut prompts

Progress = Callable[[str, int, int], None]


def build(options: EngineOptions, progress: Progress | None = None) -> tuple[LocalExecutor, EngineInfo]:
    """Loads the model into this process and makes the KV cache. Raises ModelError, in one line, if it cannot be served.

    Sets torch's number of threads. progress: called with (what is being done, bytes done, bytes in all).
    """
    started = time.monotonic()
    policy = POLICIES.get(options.policy)
    if policy is None:
        raise ModelError(f"there is no policy {options.policy}; there are {', '.join(POLICIES)}")
    threads = options.threads or usable_cpus()
    available = available_memory()
    _check_files(Path(options.model), available)
    kernels = make_kernels(options.kernels, options.quantization, threads, options.kv_dtype)

    model = load_model(
        options.model,
        options.dtype,
        options.backend,
        None if progress is None else lambda done, total: progress("weights", done, total),
        kernels,
    )
    loaded = time.monotonic()

    config = model.config
    step_tokens = max(options.max_batch_tokens, options.max_batch_size)
    if not policy.chunked:
        step_tokens = max(step_tokens, min(_WHOLE_PROMPT, config.max_positions))
    budget = make_budget(
        available=available,
        weights=model.weight_bytes,
        activations=activation_bytes(
            step_tokens,
            config.hidden_size,
            config.intermediate_size,
            config.num_heads * config.head_dim,
            config.vocab_size,
        ),
        bytes_per_token=model.num_layers
        * model.kernels.kv_bytes_per_token(model.num_kv_heads, model.head_dim, model.dtype),
        block_size=options.block_size,
        max_batch_size=options.max_batch_size,
        model_len=config.max_positions,
        wished_len=options.max_model_len,
        kv_memory=options.kv_memory,
    )
    worker = Worker(model, num_blocks=budget.num_blocks, block_size=options.block_size)
    dtype = str(model.dtype).removeprefix("torch.")
    info = EngineInfo(
        architecture=config.architecture,
        dtype=dtype,
        vocab_size=config.vocab_size,
        max_model_len=budget.max_model_len,
        block_size=options.block_size,
        num_blocks=budget.num_blocks,
        profile=numerics_profile(model.kernels.name, dtype, type(model).__name__),
        deterministic=model.deterministic,
        threads=threads,
        budget=budget.lines,
        timings=(("load weights", loaded - started), ("make KV cache", time.monotonic() - loaded)),
    )
    return LocalExecutor(worker), info


def make_kernels(wish: str, quantization: Quantization, threads: int, kv_dtype: KVDtype = "auto") -> Kernels:
    """ "auto": the best native kernels that run here, torch's operators where there are none; "torch"; or a name."""
    known = instruction_sets()
    if wish == "torch" or (wish == "auto" and not known):
        if quantization != "none":
            raise ModelError(f"{quantization} weights need the native kernels, which are not installed or not chosen")
        torch.set_num_threads(threads)
        return TorchKernels(kv_dtype=kv_dtype)
    if wish != "auto" and wish not in known:
        raise ModelError(f"this machine has no kernels for {wish}; there are {', '.join([*known, 'torch'])}")
    # What torch still does is small, and its threads would only stand in the way of ours.
    torch.set_num_threads(1)
    return NativeKernels(threads, None if wish == "auto" else wish, quantization=quantization, kv_dtype=kv_dtype)


def numerics_profile(kernels: str, dtype: str, backend: str) -> str:
    """Short hash of all that decides bits beside the model's files and the request.

    kernels: the set's name, which says in what weights and KV are kept; the residual has the dtype.
    """
    parts = (
        kernels,
        backend,
        dtype,
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        platform.system(),
        platform.machine(),
        cpu_name(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _check_files(folder: Path, available: int) -> None:
    """Refuses weights that cannot fit before the machine starts to swap over them."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if size > available:
        raise ModelError(
            f"not enough memory: the weights of {folder.name} take {size / 2**30:.2f} GiB, "
            f"but {available / 2**30:.2f} GiB are free"
        )
