"""`check`: small models of several architectures give the greedy tokens on the device that they give on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from orcaserve.bench.gpu.report import Line
from orcaserve.core.policy import DEFAULT
from orcaserve.core.request import NewRequest
from orcaserve.core.scheduler import Scheduler, SchedulerConfig
from orcaserve.executors.gpu_bench.crowd import crowd, draw_requests
from orcaserve.executors.gpu_bench.lab import BLOCK, Lab, config_of, scheduler, start
from orcaserve.executors.local import LocalExecutor
from orcaserve.model.config import ModelConfig
from orcaserve.model.decoder import Decoder
from orcaserve.model.plan import plan as plan_of
from orcaserve.model.random_weights import RandomWeights
from orcaserve.ops.gpu.stopwatch import stopwatch
from orcaserve.ops.kernels import Kernels
from orcaserve.ops.torch_kernels import TorchKernels
from orcaserve.parallel.group import Alone
from orcaserve.worker.worker import Worker

REQUESTS, PROMPTS = 4, (3, 70)
CHUNK = 32  # tokens of an iteration, so that prompts are cut
LONGEST = 256
SIZES = {"rows": REQUESTS, "batch_tokens": CHUNK, "longest": LONGEST, "tokens": REQUESTS * LONGEST}
HOST = torch.device("cpu")


def check(lab: Lab) -> Iterator[Line]:
    for model in lab.plan.check_models:
        config, count = config_of(model), lab.plan.checked
        requests = draw_requests(REQUESTS, PROMPTS, (count, count), config.vocab_size, temperatures=(0.0,), seed=2)
        kernels = lab.kernels("invariant", LONGEST)
        there = start(model, _decoder(config, kernels), kernels, **SIZES)
        found = crowd(there.device, scheduler(there, rows=REQUESTS, batch_tokens=CHUNK), lab.watch, requests).tokens
        expected = _on_host(config, requests)
        equal = sum(found[id] == tokens for id, tokens in expected.items())
        yield Line(
            what=f"{model}: {REQUESTS} greedy answers of {count} tokens",
            note=f"{equal} of {REQUESTS} are the same",
            wrong=equal != REQUESTS,
        )
        del there, kernels
        lab.let_go()


def _on_host(config: ModelConfig, requests: Sequence[NewRequest]) -> dict[int, list[int]]:
    """What the slow twin of everything says."""
    worker = Worker(_decoder(config, TorchKernels()), num_blocks=SIZES["tokens"] // BLOCK, block_size=BLOCK)
    executor = LocalExecutor(worker)
    decides = Scheduler(
        SchedulerConfig(
            policy=DEFAULT,
            max_batch_size=REQUESTS,
            max_batch_tokens=CHUNK,
            num_blocks=SIZES["tokens"] // BLOCK,
            block_size=BLOCK,
        )
    )
    return crowd(executor, decides, stopwatch(HOST), requests).tokens


def _decoder(config: ModelConfig, kernels: Kernels) -> Decoder:
    """The same weights on every device."""
    needed = plan_of(config, 0, config.num_layers)
    source = _Moved(RandomWeights(needed, torch.float32, HOST), kernels.device)
    return Decoder.build(config, source, needed, torch.float32, 0, config.num_layers, kernels, Alone())


class _Moved:
    """A source whose tensors are drawn on the CPU and move to where they are wanted."""

    def __init__(self, source: RandomWeights, device: torch.device) -> None:
        self._source = source
        self._device = device

    def __contains__(self, key: str) -> bool:
        return key in self._source

    def take(self, key: str) -> Tensor:
        return self._source.take(key).to(self._device)

    def take_optional(self, key: str) -> Tensor | None:
        return self.take(key) if key in self else None
