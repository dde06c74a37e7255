"""`build_device`: a model on a GPU, loaded, its KV cache made and its iterations recorded, as an executor.

`build_rank` does the same for one of several GPUs that share a model. Without a GPU the same runs under Triton's
interpreter, on the CPU, for tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from orcaserve.core.batch import Batch
from orcaserve.core.config import EngineInfo, EngineOptions
from orcaserve.executors.device_part import IN_FLIGHT, DevicePart
from orcaserve.executors.measure import measure
from orcaserve.model.decoder import Decoder
from orcaserve.ops.gpu.kernels import TritonKernels
from orcaserve.ops.kernels import KVCache
from orcaserve.worker.gpu.stage import DeviceStage
from orcaserve.worker.gpu.worker import DevicePending, DeviceWorker, graph_sizes, layers_sizes
from orcaserve.worker.grammars import Grammars
from orcaserve.worker.stage import Pipe

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
    began = time.monotonic()
    part = DevicePart.load(options, device, None if progress is None else partial(progress, "weights"))
    loaded = time.monotonic() - began
    return _start(part, progress, Path(options.model), (("load weights", loaded),))


def start_device(
    model: Decoder, kernels: TritonKernels, options: EngineOptions, progress: Progress | None = None
) -> tuple[DeviceExecutor, EngineInfo]:
    """The same for a model that is there, and has no tokenizer: no grammar can be followed."""
    return _start(DevicePart.of(model, kernels, options), progress, None, ())


def build_rank(part: DevicePart, num_blocks: int, num_slots: int, grammars: Grammars | None, pipe: Pipe) -> DeviceStage:
    """One rank of several, which all do this at the same time: its KV cache is made, its kernels are compiled.

    grammars: of the rank that answers, and of no other.
    """
    worker = part.make_worker(num_blocks, num_slots, grammars, pipe)
    if part.kernels.device.type == "cuda":
        sizes = {*_powers(part.tokens), *layers_sizes(part.tokens), *graph_sizes(min(part.tokens, 256))}
        for size in sorted(sizes, reverse=True):
            worker.warm(size)
    return DeviceStage(worker, answers=grammars is not None, in_flight=IN_FLIGHT)


def _start(
    part: DevicePart, progress: Progress | None, folder: Path | None, timings: tuple[tuple[str, float], ...]
) -> tuple[DeviceExecutor, EngineInfo]:
    """folder: of the tokenizer."""
    model, budget, config = part.model, part.budget, part.model.config
    began = time.monotonic()
    grammars = None if folder is None else Grammars(folder, config.vocab_size)
    read = time.monotonic()
    worker = part.make_worker(budget.num_blocks, budget.num_slots, grammars)
    cached = time.monotonic()
    if part.kernels.device.type == "cuda":
        _make_ready(worker, part.options.max_batch_size, part.tokens, progress)
    executor = DeviceExecutor(worker)
    info = EngineInfo(
        architecture=config.architecture,
        dtype=part.dtype,
        vocab_size=config.vocab_size,
        max_model_len=budget.max_model_len,
        block_size=part.block_size,
        num_blocks=budget.num_blocks,
        profile=part.profile,
        deterministic=model.deterministic,
        device="gpu",
        overlap=True,
        swap=measure(
            executor,
            num_slots=budget.num_slots,
            num_blocks=budget.num_blocks,
            block_size=part.block_size,
            max_model_len=budget.max_model_len,
        ),
        budget=budget.lines,
        timings=(
            *timings,
            ("read vocabulary", read - began),
            ("make KV cache", cached - read),
            ("compile and record", time.monotonic() - cached),
        ),
    )
    return executor, info


def _powers(most: int) -> Iterator[int]:
    """`most`, and the powers of two below it, the greatest first."""
    yield most
    yield from (size for size in (1 << n for n in range(most.bit_length() - 1, -1, -1)) if size < most)


def _make_ready(worker: DeviceWorker, max_batch_size: int, max_tokens: int, progress: Progress | None) -> None:
    """Has all kernels compiled and all graphs recorded before the first request comes."""
    # The largest first: what it takes of memory the others fit into. Up to 2048 tokens the graphs bring in all tiles of
    # products, beyond that there is one kind; of experts' there is one for each of some doublings, which hang on how
    # many experts there are.
    prompts = [size for size in _powers(max_tokens) if size == max_tokens or size > max(max_batch_size, 31)]
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
