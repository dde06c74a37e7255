"""`load_part`: what one rank computes, its weights loaded, and the KV cache that it has room for beside them."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from orcaserve.core.config import EngineOptions, KVDtype, ModelError, Quantization
from orcaserve.core.policy import Policy
from orcaserve.executors.checks import policy_of
from orcaserve.model.config import read_config
from orcaserve.model.decoder import Decoder, compute_dtype
from orcaserve.model.load import load_model
from orcaserve.ops.kernels import Kernels
from orcaserve.ops.native_kernels import NativeKernels, instruction_sets
from orcaserve.ops.torch_kernels import TorchKernels
from orcaserve.parallel.group import Group
from orcaserve.worker.machine import cpu_name
from orcaserve.worker.memory import Budget, activation_bytes, make_budget

if TYPE_CHECKING:
    from orcaserve.model.transformers_backend import TransformersDecoder

_WHOLE_PROMPT = 4096  # tokens that the activations' budget allows for where a policy does not cut prompts

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Part:
    """A rank's model and its budget. profile, dtype: as EngineInfo has them."""

    model: Decoder | TransformersDecoder
    budget: Budget
    profile: str
    dtype: str


def load_part(
    options: EngineOptions,
    *,
    available: int,
    threads: int,
    progress: Progress | None,
    layers: tuple[int, int] | None = None,
    group: Group | None = None,
) -> Part:
    """Loads the whole model, or some of its layers and of those a group's rank's part. Sets torch's number of threads.

    available: bytes of memory that this rank may take. progress: called with (bytes loaded, bytes in all).
    Raises ModelError, in one line, if it cannot be served.
    """
    policy = policy_of(options)
    kernels = make_kernels(options.kernels, options.quantization, threads, options.kv_dtype)
    model: Decoder | TransformersDecoder
    if layers is None:
        model = load_model(options.model, options.dtype, options.backend, progress, kernels)
        if not isinstance(model, Decoder):
            torch.set_num_threads(threads)  # it computes with torch, whatever kernels there are
    else:
        config = read_config(options.model)
        dtype = compute_dtype(config, options.dtype)
        model = Decoder.load(config, options.model, dtype, *layers, progress, kernels, group)

    whole = model.config
    budget = make_budget(
        available=available,
        weights=model.weight_bytes,
        activations=activation_bytes(
            step_tokens(options, policy, whole.max_positions),
            whole.hidden_size,
            whole.intermediate_size,
            whole.num_heads * whole.head_dim,
            whole.vocab_size,
        ),
        bytes_per_token=model.num_layers
        * model.kernels.kv_bytes_per_token(model.num_kv_heads, model.head_dim, model.dtype),
        block_size=options.block_size,
        max_batch_size=options.max_batch_size,
        model_len=whole.max_positions,
        wished_len=options.max_model_len,
        kv_memory=options.kv_memory,
        swap_space=options.swap_space,
        swap_dir=options.swap_dir,
    )
    dtype_name = str(model.dtype).removeprefix("torch.")
    by_torch = isinstance(model.kernels, TorchKernels) or not isinstance(model, Decoder)
    profile = numerics_profile(model.kernels.name, dtype_name, type(model).__name__, threads if by_torch else None)
    return Part(model, budget, profile, dtype_name)


def step_tokens(options: EngineOptions, policy: Policy, max_positions: int) -> int:
    """Tokens of an iteration that the activations' budget allows for."""
    tokens = max(options.max_batch_tokens, options.max_batch_size)
    return tokens if policy.chunked else max(tokens, min(_WHOLE_PROMPT, max_positions))


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


def numerics_profile(kernels: str, dtype: str, backend: str, torch_threads: int | None = None) -> str:
    """Short hash of all that decides bits beside the model's files and the request.

    kernels: the set's name, which says in what weights and KV are kept; the residual has the dtype. torch_threads: over
    which torch divides products on the CPU, and for some shapes their sums; None: others compute them.
    """
    parts = (
        kernels,
        backend,
        dtype,
        torch.__version__,
        version("llguidance"),
        torch.backends.cpu.get_cpu_capability(),
        platform.system(),
        platform.machine(),
        cpu_name(),
        *([] if torch_threads is None else [f"{torch_threads} threads"]),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
