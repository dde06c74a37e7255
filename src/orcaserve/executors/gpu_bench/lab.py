"""`Lab`: makes the engines that the sections measure, one at a time, since each takes a good part of the card."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import msgspec
import torch

from orcaserve.bench.gpu.models import MODELS
from orcaserve.bench.gpu.plan import Plan
from orcaserve.bench.gpu.roofline import Card
from orcaserve.bench.paper.engine import Engine
from orcaserve.core.config import EngineOptions, KVDtype, Numerics, Quantization
from orcaserve.core.policy import DEFAULT
from orcaserve.core.scheduler import Scheduler, SchedulerConfig
from orcaserve.executors.device import start_device
from orcaserve.executors.experiment import engine_of
from orcaserve.model.config import Generation, ModelConfig, make_config
from orcaserve.model.decoder import Decoder, compute_dtype
from orcaserve.model.shape import shape_of
from orcaserve.ops.gpu.kernels import TritonKernels
from orcaserve.ops.gpu.stopwatch import Stopwatch
from orcaserve.sim.shape import ModelShape

BLOCK = 64  # tokens of a block of the KV cache


@dataclass(frozen=True)
class Kept:
    """How a model is kept and computed, as `EngineOptions` has it."""

    numerics: Numerics = "invariant"
    quantization: Quantization = "none"
    kv_dtype: KVDtype = "auto"


AS_IT_IS = Kept()


@dataclass(frozen=True)
class Lab:
    """A device, what it can do, and how much is to be measured of it."""

    device: torch.device
    watch: Stopwatch
    card: Card
    plan: Plan

    def kernels(self, kept: Kept, max_positions: int) -> TritonKernels:
        return TritonKernels(
            self.device,
            kept.numerics,
            quantization=kept.quantization,
            max_positions=max_positions,
            kv_dtype=kept.kv_dtype,
        )

    def engine(
        self, model: str, *, kept: Kept = AS_IT_IS, rows: int, batch_tokens: int, longest: int, tokens: int
    ) -> Engine:
        """A model with random weights, ready to run. Whoever holds the one before has to have let it go.

        rows, batch_tokens: of an iteration at most. longest: tokens of a request. tokens: that the KV cache holds.
        """
        self.let_go()
        config, kernels = config_of(model), self.kernels(kept, longest)
        decoder = Decoder.random(config, compute_dtype(config, "auto"), kernels)
        return start(model, decoder, kernels, rows=rows, batch_tokens=batch_tokens, longest=longest, tokens=tokens)

    def let_go(self) -> None:
        """Gives back to the device what nobody holds any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()


def config_of(model: str) -> ModelConfig:
    return make_config(MODELS[model], model, Generation())


def sizes_of(model: str, kept: Kept = AS_IT_IS) -> ModelShape:
    """For the roofline."""
    config = config_of(model)
    dtype = "float32" if config.dtype == "float32" else "bfloat16"
    shape = shape_of(config, model, dtype, kept.quantization)
    return shape if kept.kv_dtype == "auto" else msgspec.structs.replace(shape, value_bytes=1)


def start(
    name: str, model: Decoder, kernels: TritonKernels, *, rows: int, batch_tokens: int, longest: int, tokens: int
) -> Engine:
    """An engine of a model that is there; sizes as `Lab.engine` has them."""
    per_token = model.num_layers * kernels.kv_bytes_per_token(model.num_kv_heads, model.head_dim, model.dtype)
    options = EngineOptions(
        model=name,
        max_batch_size=rows,
        max_batch_tokens=max(rows, batch_tokens),
        max_model_len=longest,
        block_size=BLOCK,
        kv_memory=-(-tokens // BLOCK) * BLOCK * per_token,
    )
    return engine_of(name, *start_device(model, kernels, options))


def scheduler(engine: Engine, *, rows: int, batch_tokens: int) -> Scheduler:
    """As in serving: an iteration is decided while the one before is computed."""
    return Scheduler(
        SchedulerConfig(
            policy=DEFAULT,
            max_batch_size=rows,
            max_batch_tokens=max(rows, batch_tokens),
            num_blocks=engine.num_blocks,
            block_size=engine.block_size,
            depth=2,
            overlap=True,
        )
    )
