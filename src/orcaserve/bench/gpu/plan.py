"""`Plan`: how much `bench gpu` does, as data: the whole on a GPU, or a tiny run that shows that every part works."""

from __future__ import annotations

import msgspec

from orcaserve.bench.gpu.models import SMALL
from orcaserve.bench.kernels import Shape
from orcaserve.bench.paper.ladder import LONGEST
from orcaserve.core.config import KVDtype


class Decode(msgspec.Struct, frozen=True):
    """Decode attention of so many requests at a context, heads and kv heads of head_dim values, KV kept in a dtype."""

    batch: int
    context: int
    heads: int
    kv_heads: int
    kv_dtype: KVDtype = "auto"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in tokens, rows or requests; ends of ranges included. Models by their names in `MODELS`.

    memory: bytes that are copied or read for the ceilings. rotated: bytes that the buffers of a kernel take together at
        least, so that no cache holds one until its turn comes. side: of the square product. samples: of each timing.
    batches, context: of decodes that are timed, so many after some that warm up. prefill: of as many prompts.
    short_model: measured with weights, keys and values in fewer bits, too. mixture: of experts.
    arriving: of prompts that come one an iteration, beside so many decodes.
    shared_…: requests at once, their prompts and outputs, and most of them running.
    promised: requests, prompts, outputs. trace: requests of Orca's trace. sessions: chats of the ladder, whose requests
        have paper_longest tokens at most.
    peer_seconds: what another engine may take. check_…: requests whose first tokens are compared with the CPU's.
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
    short_model: str
    mixture: str
    batches: tuple[int, ...]
    context: int
    warm: int
    timed: int
    arriving: tuple[int, ...]
    beside: int
    prefill: int
    prompts: int
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
    check_models: tuple[str, ...]
    check_requests: int
    check_prompts: tuple[int, int]
    checked: int


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
        Decode(256, 800, 16, 8, "int8"),
        Decode(16, 8192, 32, 8, "int8"),
    ),
    prompt=8192,
    sampled=(1, 64, 256),
    step_models=("Qwen3-0.6B", "Qwen3-8B", "Llama-3.1-8B"),
    short_model="Qwen3-8B",
    mixture="Qwen3-30B-A3B",
    batches=(256, 64, 16, 1),
    context=800,
    warm=3,
    timed=12,
    arriving=(64, 256, 1024),
    beside=16,
    prefill=8192,
    prompts=8,
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
    check_models=SMALL,
    check_requests=4,
    check_prompts=(3, 70),
    checked=64,
)
TINY = Plan(
    memory=1 << 20,
    rotated=1,
    side=64,
    samples=1,
    head_dim=16,
    linear=Shape("tiny", 64, 96, 4, 2, 16, 300),
    rows=(1, 3),
    decodes=(Decode(2, 40, 4, 2), Decode(1, 300, 4, 2), Decode(1, 40, 4, 2, "int8")),
    prompt=8,
    sampled=(2,),
    step_models=("toy",),
    short_model="toy",
    mixture="toy mixture",
    batches=(2,),
    context=40,
    warm=1,
    timed=1,
    arriving=(3,),
    beside=2,
    prefill=4,
    prompts=2,
    shared_models=("toy",),
    shared_requests=2,
    shared_prompts=(2, 4),
    shared_outputs=(2, 3),
    shared_rows=2,
    batch_tokens=64,
    alone=2,
    peer_model="toy",
    peer_seconds=60.0,
    promise_model="toy",
    promised=2,
    promise_prompts=(2, 4),
    promise_outputs=(2, 2),
    paper_model="toy",
    trace="burst:n=2,in=3-8,out=1-2",
    sessions=1,
    paper_longest=64,
    check_models=("toy",),
    check_requests=2,
    check_prompts=(2, 4),
    checked=2,
)
