"""The GPU's engine: scheduled one iteration ahead, it answers as the CPU's does, and a request alone as in a crowd."""

import random

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from orcaserve.core.config import EngineOptions
from orcaserve.core.invariants import CheckedScheduler
from orcaserve.core.policy import DEFAULT
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.engine.loop import EngineLoop
from orcaserve.engine.messages import Submit
from orcaserve.executors.device import build_device, start_device
from orcaserve.executors.local import LocalExecutor
from orcaserve.model.config import read_config
from orcaserve.model.decoder import Decoder
from orcaserve.ops.gpu.kernels import TritonKernels
from orcaserve.worker.worker import Worker

# Triton's interpreter takes a second for what a GPU does in a millisecond.
ON_GPU = torch.cuda.is_available()
SIZE, LAYERS, CROWD = (64, 3, 24) if ON_GPU else (32, 1, 3)
VOCAB = 160
LONGEST = 384
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": LONGEST,
    "eos_token_id": 0,
    "bos_token_id": 1,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=SIZE, n_layer=LAYERS, n_head=2, n_positions=LONGEST, eos_token_id=0, bos_token_id=1
    ),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **SHAPE, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True
    ),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small random checkpoints, as transformers saves them."""
    return {name: save_random(config(), tmp_path_factory.mktemp(name)) for name, config in CONFIGS.items()}


def save_random(config, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # far from uniform, so that a slip changes tokens
        if parameter.dim() > 1:
            parameter.data.mul_(3.0)
    model.save_pretrained(folder)
    return folder


def on_device(folder, device, dtype=torch.float32, numerics="invariant", batch=4, tokens=64, kv_dtype="auto"):
    kernels = TritonKernels(device, numerics, max_positions=LONGEST, kv_dtype=kv_dtype)
    model = Decoder.load(read_config(folder), folder, dtype, kernels=kernels)
    options = EngineOptions(
        model=str(folder), max_batch_size=batch, max_batch_tokens=tokens, kv_memory=1 << 22, max_model_len=LONGEST
    )
    executor, info = start_device(model, kernels, options)
    assert info.block_size == 64 and info.overlap
    return executor


def on_cpu(folder, kernels=None):
    model = Decoder.load(read_config(folder), folder, torch.float32, kernels=kernels)
    return LocalExecutor(Worker(model, num_blocks=64, block_size=64))


class Clients:
    """All requests at once; keeps what comes back."""

    def __init__(self, requests):
        self.coming = [Submit(request) for request in requests]
        self.tokens = {request.id: [] for request in requests}
        self.logprobs = {request.id: [] for request in requests}
        self.open = len(requests)

    def take(self, block):
        coming, self.coming = self.coming, []
        return coming

    def put(self, step):
        for output in step.outputs:
            assert output.error is None
            self.tokens[output.id] += output.token_ids
            self.logprobs[output.id] += [(one.token_id, one.logprob) for one in output.logprobs]
            self.open -= output.finish_reason is not None


def serve(executor, requests, *, batch=4, tokens=64, blocks=24, overlap=True, depth=1):
    executor.forget_all()
    scheduler = CheckedScheduler(
        SchedulerConfig(
            policy=DEFAULT,
            max_batch_size=batch,
            max_batch_tokens=tokens,
            num_blocks=blocks,
            block_size=64,
            depth=2 if overlap else depth,
            overlap=overlap,
        )
    )
    clients = Clients(requests)
    loop = EngineLoop(scheduler, executor, clients, clients, lambda: 0.0)
    while clients.open:
        loop.step()
    return clients


def draw_request(rng, id, longest=300 if ON_GPU else 70, **params):
    n = rng.choice([1, 3, rng.randint(10, longest)])
    return NewRequest(
        id=id,
        token_ids=tuple(rng.randrange(VOCAB) for _ in range(n)),
        num_prompt=n,
        max_tokens=rng.randint(1, 64 if ON_GPU else 4),
        seed=rng.randrange(1 << 60),
        choice=rng.randrange(3),
        params=SamplingParams(**params),
    )


def any_params(rng):
    plain = {
        "temperature": rng.choice([0.0, 0.7, 1.3]),
        "top_p": rng.choice([1.0, 0.9]),
        "top_k": rng.choice([0, 20]),
        "min_p": rng.choice([0.0, 0.01]),
    }
    if rng.random() < 0.7:
        return plain
    return plain | rng.choice([{"repetition_penalty": 1.3}, {"logprobs": 2}, {"logit_bias": ((5, 2.0),)}])


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_the_cpu(folders, device, name):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    requests = [draw_request(rng, id, temperature=0) for id in range(CROWD)]
    there = serve(on_device(folders[name], device), requests)
    here = serve(on_cpu(folders[name]), requests, overlap=False)
    assert there.tokens == here.tokens


@pytest.mark.parametrize(
    ("name", "dtype"), [("qwen3", torch.float32), ("llama", torch.bfloat16), ("qwen3-moe", torch.bfloat16)]
)
def test_a_request_alone_gets_what_it_gets_in_a_crowd(folders, device, name, dtype):
    """Little memory, so that some are preempted; small chunks against whole prompts."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    requests = [draw_request(rng, id, **any_params(rng)) for id in range(CROWD)]
    executor = on_device(folders[name], device, dtype)
    crowd = serve(executor, requests, tokens=33, blocks=5 if ON_GPU else 3)
    for request in rng.sample(requests, CROWD // 2 + 1):
        alone = serve(executor, [request], overlap=False)
        assert alone.tokens[request.id] == crowd.tokens[request.id], request
        assert alone.logprobs[request.id] == crowd.logprobs[request.id], request


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
def test_a_recorded_iteration_gives_what_its_kernels_give_one_by_one(folders, device, name):
    rng = random.Random(5)
    requests = [draw_request(rng, id, temperature=rng.choice([0.0, 1.0])) for id in range(CROWD)]
    executor = on_device(folders[name], device)
    plain = serve(executor, requests)
    for size in (2, 4):
        executor._worker.record(size)
    assert serve(executor, requests).tokens == plain.tokens
    for num_tokens in (64, 40, 16) if ON_GPU else (64, 24):
        executor._worker.record_layers(num_tokens)
    assert serve(executor, requests).tokens == plain.tokens


def test_recorded_layers_serve_whom_the_host_samples_for(folders, device):
    """Log-probabilities of every token, the prompt's too, from hidden values that the next iteration writes over."""
    rng = random.Random(9)
    size = {} if ON_GPU else {"batch": 2, "tokens": 16}
    requests = [
        draw_request(rng, id, longest=300 if ON_GPU else 20, logprobs=2, prompt_logprobs=1) for id in range(CROWD)
    ]
    executor = on_device(folders["llama"], device, **size)
    plain = serve(executor, requests, **size)
    for num_tokens in (64, 24) if ON_GPU else (16, 9):
        executor._worker.record_layers(num_tokens)
    recorded = serve(executor, requests, **size)
    assert recorded.tokens == plain.tokens and recorded.logprobs == plain.logprobs


def test_what_was_warmed_up_leaves_no_trace(folders, device):
    requests = [draw_request(random.Random(6), id, temperature=1.0) for id in range(2)]
    executor = on_device(folders["llama"], device, batch=2, tokens=32)
    plain = serve(executor, requests, batch=2, tokens=32)
    executor._worker.warm(20)
    assert serve(executor, requests, batch=2, tokens=32).tokens == plain.tokens


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_a_mixture_is_loaded_once(folders, device, name):
    options = EngineOptions(
        model=str(folders[name]), dtype="float32", max_batch_size=1, max_batch_tokens=32, kv_memory=1 << 22
    )
    _, info = build_device(options, device)
    with safe_open(folders[name] / "model.safetensors", framework="pt") as file:
        there = sum(4 * file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118 - it is no mapping
    assert {line.name: line.num_bytes for line in info.budget}["weights"] == there
