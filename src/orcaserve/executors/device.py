"""`build_device`: a model on a GPU, loaded, its KV cache made and its iterations recorded, as an executor.

Without a GPU the same runs under Triton's interpreter, on the CPU, for tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from orcaserve.core.batch import Batch
from orcaserve.core.config import EngineInfo, EngineOptions
from orcaserve.executors.loading import numerics_profile, policy_of, step_tokens
from orcaserve.executors.measure import measure
from orcaserve.model.config import read_config
from orcaserve.model.decoder import Decoder, compute_dtype
from orcaserve.ops.gpu.kernels import TritonKernels
from orcaserve.ops.kernels import KVCache
from orcaserve.worker.gpu.stream import CudaStream, HostStream, Stream
from orcaserve.worker.gpu.worker import DevicePending, DeviceWorker, graph_sizes, layers_sizes, scratch_bytes
from orcaserve.worker.grammars import Grammars
from orcaserve.worker.machine import available_memory
from orcaserve.worker.memory import activation_bytes, make_budget

_SHARE = 0.92  # of what is free, for the KV cache: nobody else uses this memory

Progress = Callable[[str, int, int], None]


class DeviceExecutor:
    """Owner of one DeviceWorker."""

    def __init__(self, worker: DeviceWorker) -> None:
        self._worker = worker

    @property
    def busy_seconds(self) -> tuple[float]:
        """Of the device, in the iterations that are over."""
        return (self._worker.busy_seconds,)

    @property
    def caches(self) -> Sequence[KVCache]:
        """The KV tensors of each layer."""
        return self._worker.caches

    @property
    def grammars(self) -> Grammars | None:
        return self._worker.grammars

    def submit(self, batch: Batch) -> DevicePending:
        return self._worker.submit(batch)

    def forget_all(self) -> None:
        """Makes ready for a new scheduler over the same model and KV tensors."""
        self._worker.forget_all()


def build_device(
    options: EngineOptions, device: torch.device, progress: Progress | None = None
) -> tuple[DeviceExecutor, EngineInfo]:
    """Loads a checkpoint onto a device. Raises ModelError, in one line, if it cannot be served there."""
    config = read_config(options.model)
    kernels = TritonKernels(
        device,
        options.numerics,
        quantization=options.quantization,
        max_positions=options.max_model_len or config.max_positions,
        kv_dtype=options.kv_dtype,
    )
    began = time.monotonic()
    model = Decoder.load(
        config,
        options.model,
        compute_dtype(config, options.dtype),
        progress=None if progress is None else lambda done, total: progress("weights", done, total),
        kernels=kernels,
    )
    loaded = time.monotonic() - began
    return start_device(model, kernels, options, progress, Path(options.model), (("load weights", loaded),))


def start_device(
    model: Decoder,
    kernels: TritonKernels,
    options: EngineOptions,
    progress: Progress | None = None,
    folder: Path | None = None,
    timings: tuple[tuple[str, float], ...] = (),
) -> tuple[DeviceExecutor, EngineInfo]:
    """The same for a model that is there. folder: of its tokenizer, without which no grammar can be followed."""
    config, device = model.config, kernels.device
    stream: Stream = CudaStream(device) if device.type == "cuda" else HostStream()
    block_size = -(-options.block_size // kernels.block_multiple) * kernels.block_multiple
    longest = options.max_model_len or config.max_positions
    tokens = step_tokens(options, policy_of(options), config.max_positions)
    cutter = kernels.cutter(config.num_heads, model.num_kv_heads, config.head_dim, model.dtype)
    activations = activation_bytes(
        tokens, config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim, 0
    )
    # what goes through a token's experts, between their products and behind them
    activations += tokens * config.experts_per_token * (config.expert_size + config.hidden_size) * model.dtype.itemsize
    activations += scratch_bytes(
        cutter, options.max_batch_size, longest, config.num_heads, config.head_dim, config.vocab_size
    )
    if kernels.is_quantised:  # the widest weights, gate and up, as they are for many tokens
        activations += 2 * config.hidden_size * config.intermediate_size * model.dtype.itemsize
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of whole weights that were brought to fewer bits, else it would not count as free
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory(most=options.memory)
    budget = make_budget(
        available=free + model.weight_bytes,
        weights=model.weight_bytes,
        activations=activations,
        bytes_per_token=model.num_layers * kernels.kv_bytes_per_token(model.num_kv_heads, model.head_dim, model.dtype),
        block_size=block_size,
        max_batch_size=options.max_batch_size,
        model_len=config.max_positions,
        wished_len=options.max_model_len,
        kv_memory=options.kv_memory,
        swap_space=options.swap_space,
        swap_dir=options.swap_dir,
        share=_SHARE if device.type == "cuda" else None,
    )
    began = time.monotonic()
    worker = DeviceWorker(
        model,
        kernels,
        stream,
        num_heads=config.num_heads,
        num_blocks=budget.num_blocks,
        block_size=block_size,
        max_batch_size=options.max_batch_size,
        max_model_len=budget.max_model_len,
        num_slots=budget.num_slots,
        swap_dir=options.swap_dir,
        grammars=None if folder is None else Grammars(folder, config.vocab_size),
    )
    cached = time.monotonic()
    if device.type == "cuda":
        _make_ready(worker, options.max_batch_size, tokens, progress)
    executor = DeviceExecutor(worker)
    info = EngineInfo(
        architecture=config.architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        vocab_size=config.vocab_size,
        max_model_len=budget.max_model_len,
        block_size=block_size,
        num_blocks=budget.num_blocks,
        profile=profile_of(kernels, model),
        deterministic=model.deterministic,
        device="gpu",
        overlap=True,
        swap=measure(
            executor,
            num_slots=budget.num_slots,
            num_blocks=budget.num_blocks,
            block_size=block_size,
            max_model_len=budget.max_model_len,
        ),
        budget=budget.lines,
        timings=(*timings, ("make KV cache", cached - began), ("compile and record", time.monotonic() - cached)),
    )
    return executor, info


def _make_ready(worker: DeviceWorker, max_batch_size: int, max_tokens: int, progress: Progress | None) -> None:
    """Has all kernels compiled and all graphs recorded before the first request comes."""
    # The largest first: what it takes of memory the others fit into. Up to 256 tokens each power of two has its tiles,
    # which the graphs bring in as far as they go; beyond that there are two kinds, but of experts' one for each of some
    # doublings, which hang on how many experts there are.
    powers = (1 << n for n in range(max_tokens.bit_length() - 1, 4, -1))
    prompts = [max_tokens, *(size for size in powers if max_batch_size < size < max_tokens)]
    layers = sorted(layers_sizes(max_tokens), reverse=True)
    graphs = sorted(graph_sizes(max_batch_size), reverse=True)
    for done, num_tokens in enumerate(prompts, 1):
        worker.warm(num_tokens)
        if progress is not None:
            progress("kernels", done, len(prompts))
    records = [(worker.record_layers, size) for size in layers] + [(worker.record, size) for size in graphs]
    for done, (record, size) in enumerate(records, 1):
        record(size)
        if progress is not None:
            progress("graphs", done, len(records))


def profile_of(kernels: TritonKernels, model: Decoder) -> str:
    """As `numerics_profile`, of a device."""
    device = kernels.device
    card = "" if device.type == "cpu" else torch.cuda.get_device_name(device)
    name = f"{kernels.name}-{version('triton')}-{card}-{torch.version.cuda}"
    return numerics_profile(name, str(model.dtype).removeprefix("torch."), type(model).__name__)
