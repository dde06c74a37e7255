"""`DevicePart`: a model on a device, or one rank's part of it, loaded, and the KV cache that it has room for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch

from orcaserve.core.config import EngineOptions
from orcaserve.executors.checks import policy_of
from orcaserve.executors.loading import numerics_profile, step_tokens
from orcaserve.model.config import read_config
from orcaserve.model.decoder import Decoder, compute_dtype
from orcaserve.model.plan import ALONE, shared
from orcaserve.ops.gpu.kernels import TritonKernels
from orcaserve.parallel.group import Alone, Group
from orcaserve.parallel.split import Split
from orcaserve.worker.gpu.stream import CudaStream, HostStream
from orcaserve.worker.gpu.worker import DeviceWorker, scratch_bytes
from orcaserve.worker.grammars import Grammars
from orcaserve.worker.machine import available_memory
from orcaserve.worker.memory import Budget, activation_bytes, make_budget
from orcaserve.worker.stage import Pipe

IN_FLIGHT = 2  # iterations that are on a device's stream
_SHARE = 0.92  # of what is free, for the KV cache: nobody else uses this memory


@dataclass(frozen=True)
class DevicePart:
    """A whole model, or one rank's part of it, on its device, with room for a KV cache beside it.

    num_heads: of queries, in this part. block_size: tokens of a KV block. tokens: most of an iteration.
    profile, dtype: as EngineInfo has them.
    """

    model: Decoder
    kernels: TritonKernels
    options: EngineOptions
    num_heads: int
    block_size: int
    tokens: int
    budget: Budget
    profile: str
    dtype: str

    @classmethod
    def of(cls, model: Decoder, kernels: TritonKernels, options: EngineOptions, split: Split = ALONE) -> DevicePart:
        """split: which of the ranks that share the model's layers this is."""
        config = model.config
        block_size = device_block(options.block_size)
        tokens = step_tokens(options, policy_of(options), config.max_positions)
        return cls(
            model=model,
            kernels=kernels,
            options=options,
            num_heads=shared(config, split).num_heads,
            block_size=block_size,
            tokens=tokens,
            budget=_budget(model, kernels, options, block_size, tokens),
            profile=profile_of(kernels, model),
            dtype=str(model.dtype).removeprefix("torch."),
        )

    @classmethod
    def load(
        cls,
        options: EngineOptions,
        device: torch.device,
        progress: Callable[[int, int], None] | None = None,
        layers: tuple[int, int] | None = None,
        group: Group | None = None,
    ) -> DevicePart:
        """Loads a checkpoint, or some layers of it and of those a group's rank's part.

        Raises ModelError, in one line, if it cannot be served.
        """
        config = read_config(options.model)
        group = Alone() if group is None else group
        kernels = TritonKernels(
            device,
            options.numerics,
            quantization=options.quantization,
            max_positions=options.max_model_len or config.max_positions,
            kv_dtype=options.kv_dtype,
            ranks=group.split.size,
        )
        dtype = compute_dtype(config, options.dtype)
        first, last = (0, config.num_layers) if layers is None else layers
        model = Decoder.load(config, options.model, dtype, first, last, progress, kernels, group)
        return cls.of(model, kernels, options, group.split)

    def make_worker(
        self, num_blocks: int, num_slots: int, grammars: Grammars | None, pipe: Pipe | None = None
    ) -> DeviceWorker:
        """Makes the KV cache, of so many blocks. Otherwise as DeviceWorker."""
        device = self.kernels.device
        return DeviceWorker(
            self.model,
            self.kernels,
            CudaStream(device) if device.type == "cuda" else HostStream(),
            num_heads=self.num_heads,
            num_blocks=num_blocks,
            block_size=self.block_size,
            max_batch_size=self.options.max_batch_size,
            max_model_len=self.budget.max_model_len,
            in_flight=IN_FLIGHT,
            num_slots=num_slots,
            swap_dir=self.options.swap_dir,
            grammars=grammars,
            pipe=pipe,
        )


def device_block(block_size: int) -> int:
    """The tokens of a KV block on a device, where so many are asked for."""
    return -(-block_size // TritonKernels.block_multiple) * TritonKernels.block_multiple


def _budget(model: Decoder, kernels: TritonKernels, options: EngineOptions, block_size: int, tokens: int) -> Budget:
    config, device = model.config, kernels.device
    longest = options.max_model_len or config.max_positions
    cutter = kernels.cutter(config.num_heads, config.num_kv_heads, config.head_dim, model.dtype)
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
    return make_budget(
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


def profile_of(kernels: TritonKernels, model: Decoder) -> str:
    """As `numerics_profile`, of a device."""
    device = kernels.device
    card = "" if device.type == "cpu" else torch.cuda.get_device_name(device)
    name = f"{kernels.name}-{version('triton')}-{card}-{torch.version.cuda}"
    return numerics_profile(name, str(model.dtype).removeprefix("torch."), type(model).__name__)
