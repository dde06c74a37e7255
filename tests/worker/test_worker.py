"""The worker under a scheduler's whims: every request gets the bits of its solo run, and what fails fails alone."""

import random

import kernel_sets
import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from orcaserve.core.batch import Batch, ScheduledRequest
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.executors.local import LocalExecutor
from orcaserve.model.config import read_config
from orcaserve.model.decoder import Decoder
from orcaserve.ops.sampler import NOT_A_NUMBER
from orcaserve.worker.worker import FAILED, Worker

torch.set_num_threads(1)
VOCAB = 300
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "eos_token_id": 0,
    "bos_token_id": 1,
}
ALL = 1 << 30


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Small random checkpoints, as transformers saves them."""
    folders = {}
    for name, config in (("llama", LlamaConfig(**SHAPE)), ("qwen3", Qwen3Config(**SHAPE, tie_word_embeddings=True))):
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp(name)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # far from uniform, so that a slip changes tokens
            parameter.data.mul_(3.0)
        model.save_pretrained(folders[name])
    return folders


def load(checkpoints, name, dtype, kernels="torch", threads=1):
    config = read_config(checkpoints[name])
    return Decoder.load(config, checkpoints[name], dtype, kernels=kernel_sets.make(kernels, threads))


def draw_request(rng, id):
    n = rng.choice([1, 5, 17, 40, rng.randint(100, 200)])
    return NewRequest(
        id=id,
        token_ids=tuple(rng.randrange(VOCAB) for _ in range(n)),
        num_prompt=n,
        max_tokens=rng.randint(1, 12),
        seed=rng.randrange(1 << 60),
        choice=rng.randrange(3),
        params=SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.0, 1.5]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 20]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            frequency_penalty=rng.choice([0.0, 0.5]),
            logprobs=rng.choice([None, 0, 3]),
            prompt_logprobs=rng.choice([None, None, 2]),
        ),
    )


class Life:
    """Plays the scheduler for one worker: draws batches, sends only what the worker cannot know, keeps the answers."""

    def __init__(self, worker, num_blocks, block_size, rng):
        self.executor, self.block_size, self.rng = LocalExecutor(worker), block_size, rng
        self.free = list(range(num_blocks))
        rng.shuffle(self.free)
        self.step = 0
        self.freed = []
        self.requests, self.running, self.answers = {}, {}, {}

    def add(self, new):
        self.requests[new.id] = new
        self.answers[new.id] = {"tokens": list(new.token_ids), "logprobs": [], "prompt": []}

    def stop(self, id):
        """Takes the KV away: the request has ended, or is preempted and will be described again."""
        self.free += self.running.pop(id)["table"]
        self.rng.shuffle(self.free)
        self.freed.append(id)
        if not self.finished(id):
            self.answers[id]["prompt"] = []

    def finished(self, id):
        return len(self.answers[id]["tokens"]) - self.requests[id].num_prompt >= self.requests[id].max_tokens

    def run(self, grants):
        """One iteration of rows (id, tokens at most)."""
        new, rows = [], []
        for id, most in grants:
            tokens = self.answers[id]["tokens"]
            if id not in self.running:
                self.running[id] = {"table": [], "computed": 0, "told": len(tokens), "told_blocks": 0}
                new.append(msgspec.structs.replace(self.requests[id], token_ids=tuple(tokens)))
            state = self.running[id]
            start = state["computed"]
            end = min(start + most, len(tokens))
            while len(state["table"]) * self.block_size < end:
                state["table"].append(self.free.pop())
            new_blocks, token_ids = state["table"][state["told_blocks"] :], tokens[state["told"] :]
            rows.append(
                ScheduledRequest(id, start, end - start, tuple(new_blocks), tuple(token_ids), end == len(tokens))
            )
            state.update(computed=end, told=len(tokens), told_blocks=len(state["table"]))
        self.step += 1
        result = self.executor.submit(Batch(self.step, tuple(rows), tuple(new), tuple(self.freed))).result()
        self.freed = []
        assert [got.id for got in result.rows] == [row.id for row in rows]
        for row, got in zip(rows, result.rows, strict=True):
            assert got.error is None
            assert (got.token_id is None) == (not row.samples)
            answer = self.answers[row.id]
            answer["prompt"] += got.prompt_logprobs
            if row.samples:
                answer["tokens"].append(got.token_id)
                answer["logprobs"].append(got.logprobs)
            if self.finished(row.id):
                self.stop(row.id)


def solo(model, new, block_size=16):
    """The oracle: alone, the whole prompt at once, then token by token."""
    life = Life(Worker(model, num_blocks=64, block_size=block_size), 64, block_size, random.Random(0))
    life.add(new)
    while not life.finished(new.id):
        life.run([(new.id, ALL)])
    return life.answers[new.id]


@pytest.mark.parametrize("kernels", kernel_sets.TWIN_AND_BEST)
@pytest.mark.parametrize(
    ("name", "dtype", "threads"),
    [
        ("llama", torch.float32, 1),
        ("llama", torch.bfloat16, 1),
        ("qwen3", torch.float32, 1),
        ("qwen3", torch.bfloat16, 2),
    ],
)
def test_in_the_crowd_as_alone(checkpoints, name, dtype, threads, kernels):
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    model = load(checkpoints, name, dtype, kernels, threads)
    block_size = rng.choice([1, 3, 16]) if kernels == "torch" else rng.choice([16, 48])
    num_blocks = 16 * 220 // block_size
    life = Life(Worker(model, num_blocks=num_blocks, block_size=block_size), num_blocks, block_size, rng)
    waiting = [draw_request(rng, id) for id in range(10)]
    torch.set_num_threads(threads)
    try:
        while waiting or any(not life.finished(id) for id in life.requests):
            for _ in range(min(len(waiting), rng.choice([0, 1, 3]))):
                life.add(waiting.pop())
            alive = [id for id in life.requests if not life.finished(id)]
            for id in alive:
                if id in life.running and rng.random() < 0.05:
                    life.stop(id)
            chosen = rng.sample(alive, min(len(alive), rng.randint(1, 8)))
            if chosen:
                life.run([(id, rng.choice([1, rng.randint(1, 60), ALL])) for id in chosen])
        assert len(life.free) == num_blocks
    finally:
        torch.set_num_threads(1)
    model = load(checkpoints, name, dtype, kernels)  # alone and on one thread
    for id, new in life.requests.items():
        alone = solo(model, new)
        assert life.answers[id] == alone, (seed, id)
        scored = new.token_ids[1:] if new.params.prompt_logprobs is not None else ()
        assert tuple(entry.token_id for entry in alone["prompt"]) == scored


def row(id, n, blocks, samples=True):
    return ScheduledRequest(id, 0, n, tuple(blocks), (), samples)


def request(id, token_ids, **params):
    params = SamplingParams(**{"temperature": 0.0, "logprobs": 1, **params})
    return NewRequest(id=id, token_ids=tuple(token_ids), num_prompt=len(token_ids), max_tokens=3, params=params)


@pytest.mark.parametrize("kernels", kernel_sets.TWIN_AND_BEST)
def test_rows_that_make_no_sense_fail_alone(checkpoints, kernels):
    model = load(checkpoints, "llama", torch.float32, kernels)
    size = max(4, model.kernels.block_multiple)
    worker = Worker(model, num_blocks=20, block_size=size)
    n = size + 1  # tokens of a request: they need two blocks
    new = [request(id, [id, *range(2, n + 1)]) for id in range(1, 6)] + [request(6, [*range(1, n), VOCAB])]
    rows = (
        row(99, 1, [0]),  # never described
        row(2, n + 4, [1, 2, 3]),  # more tokens than there are
        row(3, n, [4]),  # more tokens than its blocks hold
        row(1, n, [10, 11]),  # nothing wrong
        row(4, n, [5, 400]),  # a block that does not exist
        row(5, 3, [6, 7]),  # samples before its last token
        row(6, n, [8, 9]),  # a token beyond the vocabulary
    )
    results = worker.run(Batch(1, rows, tuple(new))).rows
    assert [got.id for got in results] == [99, 2, 3, 1, 4, 5, 6]
    assert [got.error for got in results] == [FAILED] * 3 + [None] + [FAILED] * 3
    alone = Worker(model, num_blocks=20, block_size=size).run(Batch(1, (row(1, n, [0, 1]),), (new[0],))).rows[0]
    assert results[3] == alone
    after = Batch(2, (row(7, n, [12, 13]),), (msgspec.structs.replace(new[0], id=7),), (99, 1, 2, 3, 4, 5, 6))
    assert msgspec.structs.replace(worker.run(after).rows[0], id=1) == alone


def test_nan_fails_its_own_request(checkpoints):
    """The real decoder, but for NaN in what it makes of one token: who holds it fails, the others keep their bits."""
    model = load(checkpoints, "llama", torch.float32)

    class Poisoned:
        vocab_size, kernels = VOCAB, model.kernels
        dtype, num_layers, num_kv_heads, head_dim = torch.float32, model.num_layers, model.num_kv_heads, model.head_dim
        logits = staticmethod(model.logits)

        def forward(self, x, layout, kv):
            return model.forward(x, layout, kv).masked_fill((x == 9)[:, None], torch.nan)

    worker = Worker(Poisoned(), num_blocks=20, block_size=4)
    new = (request(1, [5, 6, 9]), request(2, [5, 6, 7]), request(3, [5, 9, 7], prompt_logprobs=1))
    rows = (row(1, 3, [0]), row(2, 3, [2]), row(3, 3, [4], samples=False))
    results = worker.run(Batch(1, rows, new)).rows
    assert [got.error for got in results] == [NOT_A_NUMBER, None, NOT_A_NUMBER]
    alone = Worker(model, num_blocks=20, block_size=4).run(Batch(1, (row(2, 3, [8]),), (new[1],))).rows[0]
    assert results[1] == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", kernel_sets.EVERY)
def test_nan_left_in_a_block_harms_nobody_after(checkpoints, kernels, dtype):
    """A block that a failed request filled with NaN is given to another, which reads only what it wrote itself."""
    model = load(checkpoints, "llama", dtype, kernels)
    worker = Worker(model, num_blocks=4, block_size=16)
    new = request(1, range(2, 19))
    clean = worker.run(Batch(1, (row(1, 17, [0, 1]),), (new,))).rows[0]
    for cache in worker._kv:
        kernel_sets.fill_cache(cache, torch.nan)
    assert worker.run(Batch(2, (row(1, 17, [3, 2]),), (new,), (1,))).rows[0] == clean


def test_scores_stop_where_the_prompt_ends(checkpoints):
    """A resumed request's generated tokens are no prompt."""
    model = load(checkpoints, "llama", torch.float32)
    resumed = msgspec.structs.replace(request(1, range(2, 12), prompt_logprobs=0), num_prompt=7)
    got = Worker(model, num_blocks=8, block_size=4).run(Batch(1, (row(1, 10, [0, 1, 2]),), (resumed,))).rows[0]
    assert [entry.token_id for entry in got.prompt_logprobs] == [3, 4, 5, 6, 7, 8]
    assert got.token_id is not None
