"""`Plan`: how much `bench gpu` does, as data: the whole on a GPU, or a tiny run that shows that every part works."""

from __future__ import annotations

import msgspec

from orcaserve.bench.gpu.models import SMALL
from orcaserve.bench.kernels import Shape
from orcaserve.bench.paper.ladder import LONGEST


class Decode(msgspec.Struct, frozen=True):
    """Decode attention of so many requests at a context, heads and kv heads of head_dim values."""

    batch: int
    context: int
    heads: int
    kv_heads: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in tokens, rows or requests; ends of ranges included. Models by their names in `MODELS`.

    memory: bytes that are copied or read for the ceilings. rotated: bytes that the buffers of a kernel take together at
        least, so that no cache holds one until its turn comes. side: of the square product. samples: of each timing.
    batches, context, prefill: of the iterations that are timed.
    shared_…: requests at once, their prompts and outputs, and most of them running.
    promised: requests, prompts, outputs. trace: requests of Orca's trace. sessions: chats of the ladder, whose requests
        have paper_longest tokens at most.
    peer_seconds: what another engine may take. checked: tokens that are compared with the CPU's.
    """

    memory: int
    rotated: int
    side: int
    samples: int
    head_dim: int
    linear: Shape
    rows: tuple[int, ...]
    decodes: tuple[Decode, ...]
    prompt: int
    sampled: tuple[int, ...]
    step_models: tuple[str, ...]
    batches: tuple[int, ...]
    context: int
    prefill: int
    shared_models: tuple[str, ...]
    shared_requests: int
    shared_prompts: tuple[int, int]
    shared_outputs: tuple[int, int]
    shared_rows: int
    batch_tokens: int
    alone: int
    peer_model: str
    peer_seconds: float
    promise_model: str
    promised: int
    promise_prompts: tuple[int, int]
    promise_outputs: tuple[int, int]
    paper_model: str
    trace: str
    sessions: int
    paper_longest: int
    check_models: tuple[str, ...] = SMALL
    checked: int = 64


FULL = Plan(
    memory=4 << 30,
    rotated=256 << 20,
    side=8192,
    samples=20,
    head_dim=128,
    linear=Shape("Qwen3-8B", 4096, 12288, 32, 8, 128, 151936),
    rows=(1, 16, 64, 256, 2048, 8192),
    decodes=(
        Decode(256, 800, 16, 8),
        Decode(16, 1024, 32, 8),
        Decode(16, 8192, 32, 8),
        Decode(1, 1024, 32, 8),
        Decode(1, 8192, 32, 8),
    ),
    prompt=8192,
    sampled=(1, 64, 256),
    step_models=("Qwen3-0.6B", "Qwen3-8B", "Llama-3.1-8B"),
    batches=(256, 64, 16, 1),
    context=800,
    prefill=8192,
    shared_models=("Qwen3-0.6B", "Qwen3-8B"),
    shared_requests=256,
    shared_prompts=(100, 1024),
    shared_outputs=(100, 1024),
    shared_rows=256,
    batch_tokens=8192,
    alone=256,
    peer_model="Qwen3-0.6B",
    peer_seconds=90.0,
    promise_model="Qwen3-0.6B",
    promised=500,
    promise_prompts=(16, 700),
    promise_outputs=(16, 48),
    paper_model="Qwen3-8B",
    trace="burst:n=32,in=32-512,out=1-128",
    sessions=12,
    paper_longest=LONGEST,
)
TINY = Plan(
    memory=1 << 20,
    rotated=1 << 16,
    side=64,
    samples=2,
    head_dim=16,
    linear=Shape("tiny", 64, 96, 4, 2, 16, 1000),
    rows=(1, 16),
    decodes=(Decode(4, 40, 4, 2), Decode(1, 300, 4, 2)),
    prompt=64,
    sampled=(1, 4),
    step_models=("tiny Qwen3",),
    batches=(4, 1),
    context=40,
    prefill=64,
    shared_models=("tiny Qwen3",),
    shared_requests=6,
    shared_prompts=(5, 40),
    shared_outputs=(2, 8),
    shared_rows=4,
    batch_tokens=64,
    alone=4,
    peer_model="tiny Qwen3",
    peer_seconds=60.0,
    promise_model="tiny Qwen3",
    promised=6,
    promise_prompts=(4, 80),
    promise_outputs=(2, 5),
    paper_model="tiny Llama",
    trace="burst:n=4,in=8-32,out=1-6",
    sessions=2,
    paper_longest=64,
    checked=8,
)
