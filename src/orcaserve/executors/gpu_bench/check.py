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
from orcaserve.executors.gpu_bench.lab import AS_IT_IS, BLOCK, Lab, config_of, scheduler, start
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

CHUNK = 32  # tokens of an iteration, so that prompts are cut
LONGEST = 256  # tokens of a request
HOST = torch.device("cpu")


def check(lab: Lab) -> Iterator[Line]:
    count, length = lab.plan.check_requests, lab.plan.checked
    for model in lab.plan.check_models:
        config = config_of(model)
        requests = draw_requests(
            count, lab.plan.check_prompts, (length, length), config.vocab_size, temperatures=(0.0,), seed=2
        )
        found, expected = _on_device(lab, model, config, requests), _on_host(config, requests)
        equal = sum(found[id] == tokens for id, tokens in expected.items())
        yield Line(
            what=f"{model}: {count} greedy answers of {length} tokens",
            note=f"{equal} of {count} are the same",
            wrong=equal != count,
        )


def _on_device(lab: Lab, model: str, config: ModelConfig, requests: Sequence[NewRequest]) -> dict[int, list[int]]:
    lab.let_go()
    kernels, rows = lab.kernels(AS_IT_IS, LONGEST), len(requests)
    engine = start(
        model,
        _decoder(config, kernels),
        kernels,
        rows=rows,
        batch_tokens=CHUNK,
        longest=LONGEST,
        tokens=rows * LONGEST,
    )
    return crowd(engine.device, scheduler(engine, rows=rows, batch_tokens=CHUNK), lab.watch, requests).tokens


def _on_host(config: ModelConfig, requests: Sequence[NewRequest]) -> dict[int, list[int]]:
    """What the slow twin of everything says."""
    rows, num_blocks = len(requests), len(requests) * LONGEST // BLOCK
    worker = Worker(_decoder(config, TorchKernels()), num_blocks=num_blocks, block_size=BLOCK)
    decides = Scheduler(
        SchedulerConfig(
            policy=DEFAULT, max_batch_size=rows, max_batch_tokens=CHUNK, num_blocks=num_blocks, block_size=BLOCK
        )
    )
    return crowd(LocalExecutor(worker), decides, stopwatch(HOST), requests).tokens


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
