"""What the operator asks for (`EngineOptions`), what came of it (`EngineInfo`), and what the scheduler is told."""

from __future__ import annotations

from typing import Literal

import msgspec

Dtype = Literal["auto", "bfloat16", "float32"]
Quantization = Literal["none", "int8", "int4"]
KVDtype = Literal["auto", "int8"]
StageSplit = Literal["balanced", "equal"]
ControlPlane = Literal["separate", "mixed"]
Device = Literal["auto", "cpu", "cuda"]
Numerics = Literal["invariant", "fast"]


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """An operator's wishes, as they travel to the engine process. Every default needs no thought.

    model: folder of a Hugging Face checkpoint.
    max_batch_size: requests per iteration. max_batch_tokens: tokens per iteration (chunked prefill cuts to it).
    kv_memory: bytes for the KV cache of each rank; None: a share of what is free.
    memory: bytes that the engine's ranks on this host may take together; None: what is free.
    swap_space: bytes of each rank to which KV may be moved when the cache is full; 0: what is preempted is recomputed.
    swap_dir: folder of a file for them; None: they are memory.
    max_model_len: longest prompt + output in tokens; None: what the model and the KV cache allow.
    block_size: tokens of a KV block; kernels that need a multiple of something take the next one.
    tensor_parallel: ranks that share every layer; pipeline_parallel: stages that share out the layers.
    stage_split: stages that take equally long ("balanced"), or have equally many layers, as in the paper ("equal").
    control_plane: batches travel beside the activations ("separate", the paper's), or with them ("mixed", for
        comparison).
    nnodes: hosts that share the ranks evenly. Those beside this one join at head_address (HOST:PORT of this one) and
        know what is in secret_file.
    depth: batches in flight, where that is to be more than there are stages.
    max_itl: seconds between two tokens of a running stream, at most; prompts are read in chunks short enough for that.
        0: in chunks of max_batch_tokens. None: what is sensible on the device.
    threads: compute threads of all ranks of a host; None: as many as the process may use.
    backend: "native" (our decoder), "transformers" (the optional backend), "auto" (native where there is one).
    quantization: what linear maps are kept in: "none" (the dtype), or "int8" or "int4" (made while it loads).
    kernels: "auto" (the best native kernels that the machine runs), "torch" (operators of torch), or the name of an
        instruction set.
    kv_dtype: what keys and values are kept in: "auto" (the dtype), or "int8" (with a scale for every token and head).
    device: what computes: "auto" is the GPU if there is one that our kernels run on, else the CPU.
    numerics: on a GPU, "invariant" keeps the promise, "fast" leaves products to the vendor's library.
    check: verify the scheduler's invariants after every step.
    step_log: file to which every iteration is written down, for `orcaserve simulate`.
    """

    model: str
    dtype: Dtype = "auto"
    max_batch_size: int = 64
    max_batch_tokens: int = 512
    kv_memory: int | None = None
    memory: int | None = None
    swap_space: int = 0
    swap_dir: str | None = None
    max_model_len: int | None = None
    block_size: int = 16
    policy: str = "default"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    stage_split: StageSplit = "balanced"
    control_plane: ControlPlane = "separate"
    nnodes: int = 1
    head_address: str | None = None
    secret_file: str | None = None
    depth: int = 1
    max_itl: float | None = None
    threads: int | None = None
    backend: Literal["auto", "native", "transformers"] = "auto"
    quantization: Quantization = "none"
    kernels: str = "auto"
    kv_dtype: KVDtype = "auto"
    device: Device = "auto"
    numerics: Numerics = "invariant"
    check: bool = False
    step_log: str | None = None


class BudgetLine(msgspec.Struct, frozen=True):
    """One line of the start-up memory table."""

    name: str
    num_bytes: int
    note: str = ""


class SwapSpace(msgspec.Struct, frozen=True, kw_only=True):
    """Room for KV outside of the cache, and what using it costs, as measured when the engine started.

    num_slots: KV blocks that it holds. copy_seconds: to copy a block there, or back. token_seconds: to compute a
        token's K and V again, as part of a long prompt.
    """

    num_slots: int
    copy_seconds: float
    token_seconds: float


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine that has loaded its model can do.

    profile: hash of everything that decides bits: weights' dtype and quantisation, residual and KV dtype,
        instruction-set path, kernel version. Streams resume only on an equal profile.
    deterministic: whether the promise (a response is a pure function of model, profile and request) holds.
    device: what computes. overlap: the next iteration can be scheduled while one runs (see SchedulerConfig).
    swap: room for KV outside of the cache, if there is any.
    budget: the memory table; timings: how long each part of the start took, in seconds.
    """

    architecture: str
    dtype: str
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    profile: str
    deterministic: bool = True
    device: Literal["cpu", "gpu"] = "cpu"
    overlap: bool = False
    swap: SwapSpace | None = None
    threads: int = 1
    budget: tuple[BudgetLine, ...] = ()
    timings: tuple[tuple[str, float], ...] = ()


class ModelError(Exception):
    """The model cannot be served; the message is one clear line for the operator."""
