"""Ranks with a GPU each, as real worker processes: they answer as one GPU does, and a request alone as in a crowd.

Without GPUs they compute under Triton's interpreter and exchange by Gloo, not NCCL.
"""

import random
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_device_worker import CROWD, ON_GPU, SHAPE, any_params, draw_request, on_cpu, on_device, save_random, serve
from transformers import Qwen3Config

from orcaserve.core.config import EngineOptions, ModelError
from orcaserve.executors import placement, workers
from orcaserve.executors.build import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = Qwen3Config(**{**SHAPE, "num_hidden_layers": 2}, tie_word_embeddings=True)
    return save_random(config, tmp_path_factory.mktemp("ranks"))


@contextmanager
def ranks(folder, tensor, pipeline):
    """The executor of so many. They load as they would for a server."""
    with pytest.MonkeyPatch.context() as context:
        if not ON_GPU:
            here = Path(__file__).parent
            context.setattr(workers, "COMMAND", (sys.executable, str(here / "interpreted_rank.py")))
            context.setattr(placement, "count_gpus", lambda: 4)
        elif torch.cuda.device_count() < tensor * pipeline:
            pytest.skip(f"{tensor * pipeline} ranks need as many GPUs")
        executor, info = build(
            EngineOptions(
                model=str(folder), dtype="float32", device="cuda", tensor_parallel=tensor, pipeline_parallel=pipeline,
                max_batch_size=4, max_batch_tokens=64, kv_memory=1 << 22, max_model_len=384, block_size=16, threads=2,
            )
        )  # fmt: skip
    assert info.device == "gpu" and info.block_size == 64 and not info.overlap and info.deterministic
    try:
        yield executor
    finally:
        executor.close()


def test_stages_answer_as_one_device_does(folder, device):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    requests = [draw_request(rng, id, **any_params(rng)) for id in range(CROWD)]
    whole = serve(on_device(folder, device), requests)
    with ranks(folder, 1, 2) as executor:
        cut = serve(executor, requests, overlap=False, depth=2)
    assert cut.tokens == whole.tokens and cut.logprobs == whole.logprobs


def test_ranks_that_share_layers_answer_as_the_cpu_does_alone_and_in_a_crowd(folder):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    requests = [draw_request(rng, id, temperature=0, logprobs=1) for id in range(CROWD)]
    requests.append(draw_request(rng, CROWD, **any_params(rng)))
    here = serve(on_cpu(folder), requests[:CROWD], overlap=False)
    with ranks(folder, 2, 2) as executor:
        crowd = serve(executor, requests, overlap=False, depth=2, tokens=33)
        for request in (requests[0], requests[CROWD]):
            alone = serve(executor, [request], overlap=False)
            assert alone.tokens[request.id] == crowd.tokens[request.id], request
            assert alone.logprobs[request.id] == crowd.logprobs[request.id], request
    for request in requests[:CROWD]:
        assert crowd.tokens[request.id] == here.tokens[request.id]


def test_ranks_need_a_gpu_each(folder, monkeypatch):
    monkeypatch.setattr(placement, "count_gpus", lambda: 1)
    two = {"model": str(folder), "tensor_parallel": 2}
    assert placement.find_device(EngineOptions(**two)) == "cpu"
    with pytest.raises(ModelError, match="2 ranks on this host need a GPU each, and it has 1"):
        placement.find_device(EngineOptions(**two, device="cuda"))
    monkeypatch.setattr(placement, "count_gpus", lambda: 2)
    with pytest.raises(ModelError, match="leave out --control-plane mixed"):
        placement.find_device(EngineOptions(**two, device="cuda", control_plane="mixed"))
