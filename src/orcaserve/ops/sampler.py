"""From logits to tokens and log-probabilities; a row's outcome depends on that row's logits and request alone.

Log-probabilities are the model's own: taken before penalties, bias and temperature. The draw is the argmax of
logits / temperature + Gumbel noise over the tokens that top_k, top_p and min_p leave, in this order. Ties go to the
lower token id everywhere. Sums over the vocabulary run over spans of fixed size, then over the spans in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from orcaserve.core.request import SamplingParams, TokenLogprobs
from orcaserve.ops.draw import Draw
from orcaserve.ops.kernels import Kernels
from orcaserve.ops.noise import noise_key
from orcaserve.ops.vocabulary import Logprobs

COLDEST = 1e-30  # a positive temperature that float32 would round to 0 is taken as this one

NOT_A_NUMBER = "the model produced NaN or infinite logits for this request"
NOTHING_LEFT = "the sampling parameters leave no token to choose from"

Sampled = tuple[int, TokenLogprobs | None]


@dataclass(frozen=True, slots=True)
class SamplingState:
    """What decides one row's draw. token_ids: prompt and generated tokens so far (num_prompt of them the prompt).

    allowed: the tokens that may be drawn, as in `Draw`.
    """

    params: SamplingParams
    seed: int
    choice: int
    num_prompt: int
    token_ids: Sequence[int]
    end_token_ids: tuple[int, ...] = ()
    allowed: np.ndarray | None = None


def sample(logits: Tensor, states: Sequence[SamplingState], kernels: Kernels) -> list[Sampled | str]:
    """One outcome per row of float32 [R, V]: the token, with log-probabilities if asked for, or why the row failed."""
    if not states:
        return []
    peaks, likeliest = kernels.peaks(logits)
    sound = peaks.isfinite().tolist()
    tokens: list[int | str] = [token if sound[i] else NOT_A_NUMBER for i, token in enumerate(likeliest.tolist())]
    draws = [
        draw for i, state in enumerate(states)
        if sound[i] and (draw := _draw(i, logits[i], state)) is not None
    ]  # fmt: skip
    for draw, drawn in zip(draws, kernels.draw(logits, draws), strict=True):
        tokens[draw.row] = NOTHING_LEFT if drawn is None else drawn
    asking = [
        (i, token, state.params.logprobs) for i, (state, token) in enumerate(zip(states, tokens, strict=True))
        if state.params.logprobs is not None and not isinstance(token, str)
    ]  # fmt: skip
    reported: dict[int, TokenLogprobs] = {}
    if asking:
        rows, chosen, tops = zip(*asking, strict=True)
        found = kernels.logprobs(logits, peaks, rows, chosen, max(tops))
        reported = dict(zip(rows, _reports(chosen, found, tops), strict=True))
    return [token if isinstance(token, str) else (token, reported.get(i)) for i, token in enumerate(tokens)]


def prompt_logprobs(
    logits: Tensor, next_ids: Sequence[int], top: int, kernels: Kernels
) -> tuple[TokenLogprobs, ...] | str:
    """What each row of float32 [n, V] said of the token that follows it, or why the rows failed."""
    n = len(next_ids)
    if not n:
        return ()
    peaks, _ = kernels.peaks(logits)
    if not bool(peaks.isfinite().all()):
        return NOT_A_NUMBER
    found = kernels.logprobs(logits, peaks, range(n), next_ids, top)
    return tuple(_reports(next_ids, found, [top] * n))


def _reports(tokens: Sequence[int], found: Logprobs, tops: Sequence[int]) -> list[TokenLogprobs]:
    """tops: how many of the likeliest each asked for."""
    own, ranks, ids, logprobs = (tensor.tolist() for tensor in found)
    return [
        TokenLogprobs(token, own[i], ranks[i], (*zip(ids[i][:top], logprobs[i][:top], strict=True),))
        for i, (token, top) in enumerate(zip(tokens, tops, strict=True))
    ]


def _draw(row: int, logits: Tensor, state: SamplingState) -> Draw | None:
    """What decides the draw from float32 [V]; None if that is simply the likeliest."""
    params = state.params
    ids, scores = _changed(logits, state)
    if params.temperature == 0.0:
        is_plain = ids.shape[0] == 0 and state.allowed is None
        return None if is_plain else Draw(row, 0, 0.0, ids=ids, scores=scores, allowed=state.allowed)
    return Draw(
        row, noise_key(state.seed, state.choice, len(state.token_ids)), max(params.temperature, COLDEST),
        params.top_k, params.top_p, params.min_p, ids, scores, state.allowed,
    )  # fmt: skip


def _changed(logits: Tensor, state: SamplingState) -> tuple[np.ndarray, np.ndarray]:
    """Ascending ids of [V] whose logits penalties, bias and the ban on ending early change, and their scores."""
    params = state.params
    num_generated = len(state.token_ids) - state.num_prompt
    seen = generated = biased = banned = np.empty(0, dtype=np.int64)
    if params.repetition_penalty != 1.0:
        seen = np.array(state.token_ids, dtype=np.int64)
    if num_generated > 0 and (params.presence_penalty or params.frequency_penalty):
        generated = np.array(state.token_ids[state.num_prompt :], dtype=np.int64)
    if params.logit_bias:
        biased = np.array([token for token, _ in params.logit_bias], dtype=np.int64)
    if num_generated < params.min_tokens:
        # a tokenizer may name ends beyond the vocabulary, which are never drawn anyway
        banned = np.array([id for id in state.end_token_ids if id < logits.shape[0]], dtype=np.int64)
    ids = _distinct(np.concatenate((seen, generated, biased, banned)))
    if ids.shape[0] == 0:
        return ids, np.empty(0, dtype=np.float32)
    scores = logits.numpy()[ids]
    places = np.searchsorted(ids, seen)
    there = scores[places]
    scores[places] = np.where(there < 0, there * params.repetition_penalty, there / params.repetition_penalty)
    repeated, counts = np.unique(generated, return_counts=True)
    toll = params.frequency_penalty * counts.astype(np.float32) + params.presence_penalty
    scores[np.searchsorted(ids, repeated)] -= toll
    addends = np.array([addend for _, addend in params.logit_bias], dtype=np.float32)
    np.add.at(scores, np.searchsorted(ids, biased), addends)
    scores[np.searchsorted(ids, banned)] = -np.inf
    return ids, scores


def _distinct(ids: np.ndarray) -> np.ndarray:
    """In ascending order; numpy's own `unique` takes several times as long."""
    ordered = np.sort(ids)
    return ordered[np.append(ordered[1:] != ordered[:-1], True)] if ids.shape[0] else ids
