"""`answer`: from the hidden values of an iteration to what each row gave: tokens, scores and vectors of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from orcaserve.core.batch import RowResult
from orcaserve.core.request import TokenLogprobs
from orcaserve.ops.kernels import Kernels, KVCache
from orcaserve.ops.layout import Layout
from orcaserve.ops.sampler import SamplingState, prompt_logprobs, sample
from orcaserve.worker.grammars import NOT_FOLLOWED, GrammarError
from orcaserve.worker.pooling import pool
from orcaserve.worker.requests import Job

LOGIT_ROWS = 32  # rows whose logits exist at a time: a bound on memory, where a vocabulary is large


class Model(Protocol):
    """What a worker needs of a decoder: a row of `forward` and `logits` depends on its own request alone."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def kernels(self) -> Kernels: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...

    def forward(self, x: Tensor, layout: Layout, kv: Sequence[KVCache]) -> Tensor:
        """Token ids int64 [ΣL] -> hidden values [ΣL, H]; writes the keys and values of these tokens."""
        ...

    def logits(self, hidden: Tensor) -> Tensor | None:
        """[R, H] -> float32 [R, V]; None on a rank that is not the first of those that share the model."""
        ...

    def final(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, E], the values that logits are made of; the same on every rank that shares the model."""
        ...


def answer(model: Model, hidden: Tensor, layout: Layout, jobs: Sequence[Job]) -> list[RowResult]:
    """One result for each job, whose tokens' hidden values [ΣL, H] lie as in `layout`.

    Every rank that shares the model has to ask; the results are right on the first one only.
    """
    ends = [(job, row.first + row.num_tokens - 1) for job, row in zip(jobs, layout.rows, strict=True)]
    sampled = _sample(model, hidden, [(job, last) for job, last in ends if job.row.samples])
    results = []
    for job, row in zip(jobs, layout.rows, strict=True):
        outcome = sampled.get(job.row.id, (None, None))
        own = hidden[row.first : row.first + row.num_tokens]
        scores, pooled = _score_prompt(model, own, job), pool(model, own, job)
        if isinstance(outcome, str):
            results.append(RowResult(id=job.row.id, error=outcome))
        elif isinstance(scores, str):
            results.append(RowResult(id=job.row.id, error=scores))
        elif isinstance(pooled, str):
            results.append(RowResult(id=job.row.id, error=pooled))
        else:
            token_id, logprobs = outcome
            results.append(
                RowResult(id=job.row.id, token_id=token_id, logprobs=logprobs, prompt_logprobs=scores, pooled=pooled)
            )
    return results


def _sample(
    model: Model, hidden: Tensor, asking: Sequence[tuple[Job, int]]
) -> dict[int, tuple[int, TokenLogprobs | None] | str]:
    """What each job that samples got, by request; with each comes the row of `hidden` behind its last token."""
    sampled: dict[int, tuple[int, TokenLogprobs | None] | str] = {}
    for first in range(0, len(asking), LOGIT_ROWS):
        some = asking[first : first + LOGIT_ROWS]
        logits = model.logits(hidden[[last for _, last in some]])
        if logits is None:
            continue
        states: list[SamplingState] = []
        for job, _ in some:
            try:
                states.append(job.request.sampling_state())
            except GrammarError as error:
                sampled[job.row.id] = f"{NOT_FOLLOWED}: {error}"
                states.append(job.request.free_state())
        for (job, _), outcome in zip(some, sample(logits, states, model.kernels), strict=True):
            sampled.setdefault(job.row.id, outcome)
    return sampled


def _score_prompt(model: Model, hidden: Tensor, job: Job) -> tuple[TokenLogprobs, ...] | str:
    """Log-probabilities of the prompt tokens that follow the row's own tokens, if the request asks for them."""
    new = job.request.new
    if new.params.prompt_logprobs is None:
        return ()
    following = job.request.token_ids[job.row.start + 1 : min(job.end + 1, new.num_prompt)]
    scores: tuple[TokenLogprobs, ...] = ()
    wrong: str | None = None
    for first in range(0, len(following), LOGIT_ROWS):
        some = following[first : first + LOGIT_ROWS]
        logits = model.logits(hidden[first : first + len(some)])
        if logits is not None:
            found = prompt_logprobs(logits, some, new.params.prompt_logprobs, model.kernels)
            if isinstance(found, str):
                wrong = found  # the other ranks go on asking
            else:
                scores += found
    return scores if wrong is None else wrong
