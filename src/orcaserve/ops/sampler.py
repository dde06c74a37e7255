"""From logits to tokens and log-probabilities; a row's outcome depends on that row's logits and request alone.

Log-probabilities are the model's own: taken before penalties, bias and temperature. The draw is the argmax of
logits / temperature + Gumbel noise over the tokens that top_k, top_p and min_p leave, in this order. Ties go to the
lower token id everywhere. Sums over the vocabulary run over spans of fixed size, then over the spans in order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orcaserve.core.request import SamplingParams, TokenLogprobs
from orcaserve.ops.kernels import Kernels
from orcaserve.ops.noise import HIGHEST, LOWEST, gumbel
from orcaserve.ops.vocabulary import ordered_sum

_COLDEST = 1e-30  # a positive temperature that float32 would round to 0 is taken as this one
_FEW = 2048  # most likely tokens to look at before a whole vocabulary is sorted for top_p

NOT_A_NUMBER = "the model produced NaN or infinite logits for this request"
NOTHING_LEFT = "the sampling parameters leave no token to choose from"

Sampled = tuple[int, TokenLogprobs | None]


@dataclass(frozen=True, slots=True)
class SamplingState:
    """What decides one row's draw. token_ids: prompt and generated tokens so far (num_prompt of them the prompt)."""

    params: SamplingParams
    seed: int
    choice: int
    num_prompt: int
    token_ids: Sequence[int]
    end_token_ids: tuple[int, ...] = ()


def sample(logits: Tensor, states: Sequence[SamplingState], kernels: Kernels) -> list[Sampled | str]:
    """One outcome per row of float32 [R, V]: the token, with log-probabilities if asked for, or why the row failed."""
    if not states:
        return []
    peaks, likeliest = kernels.peaks(logits)
    sound, greedy = peaks.isfinite().tolist(), likeliest.tolist()
    tokens = [_draw(logits[i], state, greedy[i]) if sound[i] else NOT_A_NUMBER for i, state in enumerate(states)]
    asking = [
        i for i, (state, token) in enumerate(zip(states, tokens, strict=True))
        if state.params.logprobs is not None and not isinstance(token, str)
    ]  # fmt: skip
    reported: dict[int, TokenLogprobs] = {}
    if asking:
        logprobs = _log_softmax(logits[asking], peaks[asking], kernels)
        for row, i in zip(logprobs, asking, strict=True):
            token = tokens[i]
            if isinstance(token, int):
                reported[i] = _report(row, token, states[i].params.logprobs or 0)
    return [token if isinstance(token, str) else (token, reported.get(i)) for i, token in enumerate(tokens)]


def prompt_logprobs(
    logits: Tensor, next_ids: Sequence[int], top: int, kernels: Kernels
) -> tuple[TokenLogprobs, ...] | str:
    """What each row of float32 [n, V] said of the token that follows it, or why the rows failed."""
    if not next_ids:
        return ()
    peaks, _ = kernels.peaks(logits)
    if not bool(peaks.isfinite().all()):
        return NOT_A_NUMBER
    logprobs = _log_softmax(logits, peaks, kernels)
    return tuple(_report(row, token, top) for row, token in zip(logprobs, next_ids, strict=True))


def _log_softmax(logits: Tensor, peaks: Tensor, kernels: Kernels) -> Tensor:
    """float32 [R, V]; peaks [R] are the rows' greatest logits."""
    return (logits - peaks[:, None]) - kernels.masses(logits, peaks).log()[:, None].float()


def _report(logprobs: Tensor, token: int, top: int) -> TokenLogprobs:
    own = logprobs[token]
    ahead = int((logprobs > own).sum()) + int((logprobs[:token] == own).sum())
    ids = _likeliest(logprobs, top)
    return TokenLogprobs(token, float(own), ahead + 1, tuple(zip(ids.tolist(), logprobs[ids].tolist(), strict=True)))


def _likeliest(values: Tensor, k: int) -> Tensor:
    """int64 ids of the k greatest of [V], greatest first, ties to the lower id (torch.topk promises no order)."""
    k = min(k, values.shape[0])
    if k == 0:
        return torch.empty(0, dtype=torch.int64)
    ids = (values >= values.topk(k).values[-1]).nonzero().flatten()
    return ids[values[ids].sort(descending=True, stable=True).indices[:k]]


def _draw(logits: Tensor, state: SamplingState, greedy: int) -> int | str:
    """The token drawn from float32 [V], which is left as it is; `greedy` is the likeliest."""
    params = state.params
    scores = _adjusted(logits, state)
    if scores is logits and params.temperature == 0.0:
        return greedy
    peak = scores.amax()
    if not bool(peak.isfinite()):
        return NOTHING_LEFT
    if params.temperature == 0.0:
        return int((scores == peak).nonzero()[0])
    # the peak becomes 0, so that no temperature, however small, overflows
    scaled = (scores - peak) / max(params.temperature, _COLDEST)
    ids = _allowed(scaled, params)
    noisy = scaled[ids].double() + gumbel(state.seed, state.choice, len(state.token_ids), ids)
    return int(ids[noisy == noisy.amax()].amin())


def _adjusted(logits: Tensor, state: SamplingState) -> Tensor:
    """Logits after penalties, bias and the ban on ending early; the very same tensor where nothing applies."""
    params = state.params
    generated = state.token_ids[state.num_prompt :]
    scores = logits
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(state.token_ids)), dtype=torch.int64)
        there = scores[seen]
        scores = scores.index_copy(
            0, seen, torch.where(there < 0, there * params.repetition_penalty, there / params.repetition_penalty)
        )
    if generated and (params.presence_penalty or params.frequency_penalty):
        ids, counts = torch.tensor(generated, dtype=torch.int64).unique(return_counts=True)
        toll = params.frequency_penalty * counts.float() + params.presence_penalty
        scores = scores.index_copy(0, ids, scores[ids] - toll)
    if params.logit_bias:
        scores = scores.clone() if scores is logits else scores
        for token, addend in params.logit_bias:
            scores[token] += addend
    if len(generated) < params.min_tokens and state.end_token_ids:
        scores = scores.index_fill(0, torch.tensor(state.end_token_ids, dtype=torch.int64), -torch.inf)
    return scores


def _allowed(scaled: Tensor, params: SamplingParams) -> Tensor:
    """int64 ids that may be drawn, from scaled logits [V] whose greatest is 0."""
    if params.top_k:
        ids = _likeliest(scaled, params.top_k)
        if params.top_p < 1.0:
            ids = _reaching(scaled[ids], ids, params.top_p * float(scaled[ids].exp().double().cumsum(0)[-1]))
    elif params.top_p < 1.0:
        ids = _nucleus(scaled, params.top_p)
    else:
        ids = (scaled >= LOWEST - HIGHEST).nonzero().flatten()  # what lies below cannot win, whatever its noise
    if params.min_p > 0.0:
        ids = ids[scaled[ids] >= math.log(params.min_p)]
    return ids


def _nucleus(scaled: Tensor, top_p: float) -> Tensor:
    """int64 ids of the fewest likeliest tokens whose share of the mass reaches top_p, likeliest first."""
    wanted = top_p * float(ordered_sum(scaled.exp()[None]))
    few = _likeliest(scaled, _FEW)
    found = _reaching(scaled[few], few, wanted)
    if found.shape[0] < few.shape[0]:
        return found
    every = _likeliest(scaled, scaled.shape[0])
    return _reaching(scaled[every], every, wanted)


def _reaching(sorted_scaled: Tensor, ids: Tensor, wanted: float) -> Tensor:
    """The ids up to and including the one that makes the running sum of masses reach `wanted`; one at least."""
    reached = sorted_scaled.exp().double().cumsum(0)
    return ids[: int((reached < wanted).sum()) + 1]
