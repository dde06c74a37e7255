"""Draws and log-probabilities of the native kernels against their twin, and that a row's depend on that row alone."""

import dataclasses
import math
import random

import kernel_sets
import numpy as np
import pytest
import torch
from kernel_sets import NEEDS_NATIVE

from orcaserve.core.request import SamplingParams
from orcaserve.ops.draw import Draw
from orcaserve.ops.native_kernels import instruction_sets
from orcaserve.ops.noise import gumbel, noise_key
from orcaserve.ops.sampler import NOT_A_NUMBER, NOTHING_LEFT, SamplingState, sample

torch.set_num_threads(1)

VOCABULARY = 151_936
PIECES = 40_000  # of which a kernel makes three pieces
KINDS = ["normal", "peaked", "flat", "equal", "few", "steps", "holes"]
every_isa = pytest.mark.parametrize("isa", instruction_sets())


def row_of(kind, v, generator):
    noise = torch.randn(v, generator=generator)
    if kind == "peaked":
        noise[int(torch.randint(v, (1,), generator=generator))] += 20.0
    elif kind == "flat":
        noise *= 1e-3
    elif kind == "equal":
        noise.fill_(1.5)
    elif kind == "few":
        noise = (noise * 2).round()
    elif kind == "steps":
        noise = (noise * 16).round() / 8 - 30.0
    elif kind == "holes":
        noise[torch.rand(v, generator=generator) < 0.7] = -torch.inf
        noise[int(torch.randint(v, (1,), generator=generator))] = 0.5
    return noise * 3 if kind == "normal" else noise


def some_state(rng, v):
    one_of = rng.choice
    tokens = [rng.randrange(v) for _ in range(rng.randint(1, 30))]
    params = SamplingParams(
        temperature=one_of([0.0, 1e-40, 0.01, 0.7, 1.0, 1.0, 3.0, 1e6]),
        top_k=one_of([0, 0, 0, 1, 3, 50, max(1, v - 1), v, 2 * v]),
        top_p=one_of([1.0, 1.0, 0.0, 1e-6, 0.3, 0.9, 0.999, 1.0 - 1e-9]),
        min_p=one_of([0.0, 0.0, 1e-4, 0.05, 0.5, 1.0]),
        repetition_penalty=one_of([1.0, 1.0, 1.3, 0.7]),
        presence_penalty=one_of([0.0, 0.0, 0.5, -1.0]),
        frequency_penalty=one_of([0.0, 0.0, 0.4, -0.3]),
        logit_bias=tuple((rng.randrange(v), rng.uniform(-5, 5)) for _ in range(one_of([0, 0, 3]))),
        min_tokens=one_of([0, 0, 100]),
    )
    end = tuple(rng.sample(range(v), min(v, 2)))
    return SamplingState(
        params, rng.randrange(1 << 64), rng.randrange(4), rng.randint(1, len(tokens)), tokens, end, some_allowed(rng, v)
    )


def some_allowed(rng, v):
    """Bits of all tokens, a few or none, with others behind them that mean nothing."""
    share = rng.choice([None, None, 0.9, 0.1, 2 / v, 0.0])
    if share is None:
        return None
    allowed = np.random.default_rng(rng.randrange(1 << 32)).random(-(-v // 32) * 32) < share
    allowed[v:] = True
    return np.packbits(allowed, bitorder="little").view(np.uint32)


def some_rows(seed, v, n):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    kinds = [rng.choice(KINDS) for _ in range(n)]
    return torch.stack([row_of(kind, v, generator) for kind in kinds]), [some_state(rng, v) for _ in kinds], kinds


@every_isa
@pytest.mark.parametrize("v", [1, 2, 5, 16, 17, 100, 1500, 16_384, 16_385, PIECES])
def test_the_twin_draws_the_same(isa, v):
    for seed in range(3 if v > 10_000 else 25):
        logits, states, kinds = some_rows(seed * 1000 + v, v, 8)
        kept = logits.clone()
        want = sample(logits, states, kernel_sets.make("torch"))
        got = sample(logits, states, kernel_sets.make(isa, 2))
        for i in range(8):
            assert got[i] == want[i], (seed, kinds[i], states[i])
        assert torch.equal(logits, kept), "changed scores must not stay in the logits"


@pytest.mark.parametrize("name", kernel_sets.EVERY)
def test_what_is_not_allowed_might_as_well_be_impossible(name):
    kernels, v = kernel_sets.make(name, 2), 1500
    for seed in range(25):
        logits, states, kinds = some_rows(seed, v, 8)
        got = sample(logits, states, kernels)
        for row, state in zip(logits, states, strict=True):
            if state.allowed is not None:
                bits = np.unpackbits(state.allowed.view(np.uint8), count=v, bitorder="little")
                row[torch.from_numpy(bits == 0)] = -torch.inf
        want = sample(logits, [dataclasses.replace(state, allowed=None) for state in states], kernels)
        for i, state in enumerate(states):
            assert got[i] == (NOTHING_LEFT if want[i] == NOT_A_NUMBER else want[i]), (seed, kinds[i], state)


@NEEDS_NATIVE
def test_the_twin_draws_the_same_from_a_large_vocabulary():
    logits, states, kinds = some_rows(11, VOCABULARY, 12)
    want = sample(logits, states, kernel_sets.make("torch"))
    assert sample(logits, states, kernel_sets.make(instruction_sets()[0], 2)) == want, kinds


@every_isa
def test_the_race_is_won_by_the_greatest_noise(isa):
    """Where all logits are equal nothing but noise decides, and every token may win."""
    n, v = 200, 3000
    draws = [Draw(row, noise_key(row, 0, 5), 1.0) for row in range(n)]
    found = kernel_sets.make(isa, 2).draw(torch.zeros(n, v), draws)
    assert found == [int(gumbel(row, 0, 5, torch.arange(v)).argmax()) for row in range(n)]


@every_isa
def test_the_token_that_reaches_top_p_is_the_last(isa):
    """Of equal tokens exactly half have half of the mass, and more is not reached without one more of them."""
    kernels = kernel_sets.make(isa, 2)
    for top_k, top_p, allowed in ((0, 0.5, 5), (8, 0.5, 4), (0, 0.51, 6), (8, 0.51, 5), (3, 1.0, 3), (0, 0.0, 1)):
        draws = [Draw(row, noise_key(row, 0, 5), 1.0, top_k=top_k, top_p=top_p) for row in range(300)]
        assert set(kernels.draw(torch.zeros(300, 10), draws)) == set(range(allowed)), (top_k, top_p)


@every_isa
def test_rows_and_threads_do_not_matter(isa):
    logits, states, _ = some_rows(5, PIECES, 10)
    states = [
        SamplingState(
            SamplingParams(temperature=0.9, top_p=one.params.top_p, top_k=one.params.top_k, logprobs=4),
            one.seed, 0, one.num_prompt, one.token_ids,
        ) for one in states
    ]  # fmt: skip
    together = sample(logits, states, kernel_sets.make(isa, 2))
    for threads in (1, 2, 3):
        kernels = kernel_sets.make(isa, threads)
        assert sample(logits, states, kernels) == together
        assert sample(logits.flip(0), states[::-1], kernels) == together[::-1]
        for i in range(10):
            assert sample(logits[i : i + 1], states[i : i + 1], kernels) == [together[i]]


@every_isa
def test_rows_that_are_not_sound_fail_alone(isa):
    logits, states, _ = some_rows(6, PIECES, 6)
    kernels = kernel_sets.make(isa, 2)
    want = sample(logits, states, kernels)
    logits[1, 39_990], logits[3, 0], logits[4, 20_000] = torch.nan, torch.inf, torch.nan
    got = sample(logits, states, kernels)
    assert [got[i] for i in (1, 3, 4)] == [NOT_A_NUMBER] * 3
    assert [got[i] for i in (0, 2, 5)] == [want[i] for i in (0, 2, 5)]


@every_isa
@pytest.mark.parametrize("kind", ["few", "equal", "holes", "peaked"])
@pytest.mark.parametrize("v", [1, 7, 300, PIECES])
def test_the_twin_gives_the_same_logprobs(isa, kind, v):
    generator = torch.Generator().manual_seed(v)
    logits = torch.stack([row_of(kind, v, generator) for _ in range(4)])
    rows, tokens = [2, 0, 3], [int(logits[2].argmax()), v - 1, v // 2]
    for top in (0, 1, 5, 700, 2 * v if v < 1000 else 0):
        want, got = (
            kernels.logprobs(logits, kernels.peaks(logits)[0], rows, tokens, top)
            for kernels in (kernel_sets.make("torch"), kernel_sets.make(isa, 2))
        )
        torch.testing.assert_close(got.own, want.own, rtol=0, atol=1e-5)
        torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-5)
        if kind in ("few", "equal"):  # elsewhere rounding alone may tell two tokens apart
            assert torch.equal(got.ranks, want.ranks) and torch.equal(got.ids, want.ids)
        assert bool((got.ranks - want.ranks).abs().max() <= 2)


@every_isa
@pytest.mark.parametrize("top_k", [0, 4])
def test_frequencies_follow_the_softmax(isa, top_k):
    n = 20_000
    scores = torch.tensor([1.0, 2.5, 0.0, 2.0, -1.0, 1.5, 0.5, 2.2])
    temperature = 0.8
    draws = [Draw(row, noise_key(row, 0, 3), temperature, top_k=top_k) for row in range(n)]
    counts = np.bincount(kernel_sets.make(isa, 2).draw(scores.expand(n, -1), draws), minlength=8)
    allowed = scores.argsort(descending=True)[: top_k or 8]
    expected = (scores[allowed].double() / temperature).softmax(0).numpy() * n
    assert counts[allowed].sum() == n
    chi2 = float(((counts[allowed] - expected) ** 2 / expected).sum())
    bound = {7: 24.3, 3: 16.3}[allowed.shape[0] - 1]  # 99.9 % of the distribution with so many degrees of freedom
    assert math.isfinite(chi2) and chi2 < bound


@every_isa
def test_what_lies_outside_of_the_vocabulary_is_refused(isa):
    kernels, logits = kernel_sets.make(isa), torch.zeros(1, 9)
    for ids in ([-1, 3], [3, 9]):
        changed = Draw(0, 1, 1.0, ids=np.array(ids), scores=np.zeros(2, dtype=np.float32))
        with pytest.raises(IndexError):
            kernels.draw(logits, [changed])
    with pytest.raises(IndexError):
        kernels.draw(torch.zeros(1, 33), [Draw(0, 1, 1.0, allowed=np.ones(1, dtype=np.uint32))])
    with pytest.raises(IndexError):
        kernels.logprobs(logits, torch.zeros(1), [0], [9], 2)
