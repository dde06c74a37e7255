"""The sampler against a plain reference of one row, and its promises: ties, noise, isolation of rows."""

import math
import random

import kernel_sets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orcaserve.core.request import SamplingParams
from orcaserve.ops import sampler
from orcaserve.ops.noise import HIGHEST, LOWEST, gumbel
from orcaserve.ops.sampler import NOT_A_NUMBER, NOTHING_LEFT, SamplingState

torch.set_num_threads(1)


def sample(logits, states):
    """By every kernel set: they draw the same tokens, and their log-probabilities differ by rounding only."""
    found = [sampler.sample(logits, states, kernel_sets.make(name, 2)) for name in kernel_sets.EVERY]
    for other in found[1:]:
        assert all(a == b if isinstance(a, str) else alike(a[1], b[1]) for a, b in zip(found[0], other, strict=True))
        assert [a[0] for a in found[0]] == [b[0] for b in other]
    return found[-1]


def prompt_logprobs(logits, next_ids, top):
    found = [sampler.prompt_logprobs(logits, next_ids, top, kernel_sets.make(name, 2)) for name in kernel_sets.EVERY]
    for other in found[1:]:
        assert isinstance(other, str) == isinstance(found[0], str)
        assert other == found[0] or all(alike(a, b) for a, b in zip(found[0], other, strict=True))
    return found[-1]


def alike(a, b):
    if a is None or b is None:
        return a is b
    return a.token_id == b.token_id and a.rank == b.rank and math.isclose(a.logprob, b.logprob, abs_tol=1e-5)


def state(params=None, *, seed=1, choice=0, prompt=(0,), generated=(), end=(), **options):
    return SamplingState(
        params or SamplingParams(**options), seed, choice, len(prompt), [*prompt, *generated], tuple(end)
    )


def reference(logits, s):
    """The token, in plain Python floats, one rule after the other."""
    p, generated = s.params, list(s.token_ids[s.num_prompt :])
    scores = [float(x) for x in logits]
    for t in set(s.token_ids):
        scores[t] = scores[t] * p.repetition_penalty if scores[t] < 0 else scores[t] / p.repetition_penalty
    for t in set(generated):
        scores[t] -= p.presence_penalty + p.frequency_penalty * generated.count(t)
    for t, addend in p.logit_bias:
        scores[t] += addend
    if len(generated) < p.min_tokens:
        for t in s.end_token_ids:
            scores[t] = -math.inf
    order = sorted(range(len(scores)), key=lambda t: (-scores[t], t))
    if p.temperature == 0:
        return order[0]
    mass = {t: math.exp((scores[t] - scores[order[0]]) / p.temperature) for t in order}
    if p.top_k:
        order = order[: p.top_k]
    total, run, kept = sum(mass[t] for t in order), 0.0, []
    for t in order:
        if run < p.top_p * total or not kept:
            kept.append(t)
        run += mass[t]
    kept = [t for t in kept if mass[t] >= p.min_p * mass[order[0]]]
    noise = gumbel(s.seed, s.choice, len(s.token_ids), torch.arange(len(scores))).tolist()
    return max(kept, key=lambda t: (scores[t] / p.temperature + noise[t], -t))


@settings(max_examples=150, deadline=None, derandomize=True)  # the reference rounds otherwise: no chance here
@given(st.data())
def test_against_the_reference(data):
    v = data.draw(st.sampled_from([5, 40, 1500]))
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    one_of = rng.choice
    tokens = [rng.randrange(v) for _ in range(rng.randint(1, 30))]
    states = [
        SamplingState(
            SamplingParams(
                temperature=one_of([0.0, 0.5, 1.0, 2.0]),
                top_k=one_of([0, 0, 1, 3, 2 * v]),
                top_p=one_of([1.0, 1.0, 0.0, 0.3, 0.9, 0.999]),
                min_p=one_of([0.0, 0.0, 0.05, 0.5, 1.0]),
                repetition_penalty=one_of([1.0, 1.3, 0.7]),
                presence_penalty=one_of([0.0, 0.5, -1.0]),
                frequency_penalty=one_of([0.0, 0.4, -0.3]),
                logit_bias=tuple((rng.randrange(v), rng.uniform(-5, 5)) for _ in range(rng.choice([0, 0, 3]))),
                min_tokens=one_of([0, 0, 10]),
                logprobs=one_of([None, 0, 4]),
            ),
            rng.randrange(1 << 64),
            rng.randrange(4),
            rng.randint(1, len(tokens)),
            tokens,
            tuple(rng.sample(range(v), 2)),
        )
        for _ in range(5)
    ]
    logits = torch.randn(5, v, generator=torch.Generator().manual_seed(rng.randrange(10**6))) * 3
    kept = logits.clone()
    outcomes = sample(logits, states)
    assert torch.equal(logits, kept), "the sampler must leave the logits as they are"
    for row, s, outcome in zip(logits, states, outcomes, strict=True):
        assert outcome[0] == reference(row, s), s
        assert sample(row[None], [s]) == [outcome], "a row alone and among others"
        assert (outcome[1] is None) == (s.params.logprobs is None)
        if outcome[1] is not None:
            want = torch.log_softmax(row.double(), -1)
            assert outcome[1].token_id == outcome[0]
            assert math.isclose(outcome[1].logprob, want[outcome[0]], abs_tol=1e-5)
            order = sorted(range(v), key=lambda t: (-float(row[t]), t))
            assert order[outcome[1].rank - 1] == outcome[0]
            assert [t for t, _ in outcome[1].top] == order[: s.params.logprobs]
            assert dict(outcome[1].top).get(outcome[0], outcome[1].logprob) == outcome[1].logprob


def test_ties_go_to_the_lower_id():
    logits = torch.zeros(1, 5000)
    logits[0, [4000, 70, 900]] = 2.0
    greedy = state(temperature=0.0, logprobs=5)
    [(token, logprobs)] = sample(logits, [greedy])
    assert token == 70
    assert [t for t, _ in logprobs.top] == [70, 900, 4000, 0, 1]
    assert logprobs.rank == 1 and logprobs.logprob == logprobs.top[0][1]
    for k in range(1, 4):
        drawn = {sample(logits, [state(top_k=k, seed=seed)])[0][0] for seed in range(60)}
        assert drawn == set([70, 900, 4000][:k])
    [second] = prompt_logprobs(logits, [900], 2)
    assert second.rank == 2


def test_a_peak_wider_than_the_short_list_is_sorted_whole():
    v = 9000
    logits = torch.zeros(1, v)
    drawn = {sample(logits, [state(top_p=0.5, seed=seed)])[0][0] for seed in range(200)}
    assert max(drawn) < v // 2 and max(drawn) > 2048


def test_noise_follows_the_distribution():
    """Chi-square of 5 000 draws with fixed seeds: over positions, over seeds and over choices alike."""
    probabilities = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
    logits = probabilities.log()
    n = 5_000
    ids = torch.arange(6)
    ways = {
        "position": lambda i: gumbel(7, 0, i, ids),
        "seed": lambda i: gumbel(i, 0, 12, ids),
        "choice": lambda i: gumbel(99, i, 12, ids),
    }
    for way, noise in ways.items():
        counts = torch.zeros(6)
        for i in range(n):
            counts[(logits + noise(i)).argmax()] += 1
        chi2 = float(((counts - n * probabilities) ** 2 / (n * probabilities)).sum())
        assert chi2 < 20.5, (way, chi2)  # 99.9 % of the distribution with 5 degrees of freedom


def test_noise_is_gumbel_and_bounded():
    noise = gumbel(3, 1, 4, torch.arange(200_000))
    assert float(noise.min()) > LOWEST and float(noise.max()) < HIGHEST
    grid = torch.linspace(-2, 6, 30, dtype=torch.float64)
    empirical = (noise[None] <= grid[:, None]).double().mean(1)
    assert float((empirical - torch.exp(-torch.exp(-grid))).abs().max()) < 0.004
    neighbours = torch.corrcoef(torch.stack([noise[:-1], noise[1:]]))[0, 1]
    assert abs(float(neighbours)) < 0.01
    extremes = torch.tensor([0.0, 2.0**52 - 1], dtype=torch.float64).add(0.5).mul(2.0**-52)
    bounds = -torch.log(-torch.log(extremes))
    assert float(bounds[0]) > LOWEST and float(bounds[1]) < HIGHEST


def test_a_draw_depends_on_seed_choice_position_and_nothing_else():
    logits = torch.zeros(1, 50_000)
    same = state(seed=5, choice=1, prompt=range(10))
    token = sample(logits, [same])[0][0]
    batch = [state(seed=s) for s in range(3)] + [same] + [state(seed=9)]
    assert sample(logits.expand(5, -1), batch)[3][0] == token
    assert sample(logits, [state(seed=5, choice=1, prompt=range(3), generated=range(7))])[0][0] == token
    others = [
        state(seed=6, choice=1, prompt=range(10)), state(seed=5, choice=2, prompt=range(10)),
        state(seed=5, choice=1, prompt=range(11)), state(seed=-5, choice=1, prompt=range(10)),
    ]  # fmt: skip
    drawn = [sample(logits, [other])[0][0] for other in others]
    assert len({token, *drawn}) == 5
    assert torch.equal(gumbel(5, 1, 10, torch.arange(100))[40:41], gumbel(5, 1, 10, torch.tensor([40])))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_of_logprobs_do_not_depend_on_the_batch(threads):
    torch.set_num_threads(threads)
    try:
        logits = torch.randn(9, 50_257, generator=torch.Generator().manual_seed(4)) * 5
        states = [state(seed=i, logprobs=3, top_p=0.95, temperature=0.8) for i in range(9)]
        together = sample(logits, states)
        scores = prompt_logprobs(logits, list(range(9)), 3)
        torch.set_num_threads(1)
        for i in range(9):
            assert sample(logits[i : i + 1], states[i : i + 1]) == [together[i]]
            assert prompt_logprobs(logits[i : i + 1], [i], 3) == (scores[i],)
    finally:
        torch.set_num_threads(1)


def test_a_row_that_is_not_sound_fails_alone():
    logits = torch.randn(5, 3000)
    logits[1, 17] = torch.nan
    logits[2, :] = -torch.inf
    logits[3, 5] = torch.inf
    states = [state(temperature=t, logprobs=1) for t in (0.0, 1.0, 0.0, 1.0, 1.0)]
    outcomes = sample(logits, states)
    assert outcomes[1:4] == [NOT_A_NUMBER] * 3
    assert [outcomes[0], outcomes[4]] == sample(logits[[0, 4]], [states[0], states[4]])
    assert prompt_logprobs(logits[1:2], [0], 0) == NOT_A_NUMBER


def test_masking_every_token_is_an_error_of_that_row():
    logits = torch.randn(2, 4)
    assert sample(logits, [state(min_tokens=1, end=range(4)), state(temperature=0.0)])[0] == NOTHING_LEFT


def test_end_tokens_return_once_there_are_enough():
    logits = torch.tensor([[0.0, 9.0, 1.0]])
    for count, token in ((0, 2), (1, 2), (2, 1)):
        # a tokenizer may name an end that the vocabulary has no place for
        row = state(temperature=0.0, min_tokens=2, end=[1, 70], generated=[0] * count)
        assert sample(logits, [row])[0][0] == token


@pytest.mark.parametrize("temperature", [1e-45, 1e-300, 1e-6, 1e30])
def test_extreme_temperatures(temperature):
    logits = torch.tensor([[0.0, 9.0, 1.0]])
    drawn = {sample(logits, [state(temperature=temperature, seed=s)])[0][0] for s in range(30)}
    assert drawn == ({1} if temperature < 1 else {0, 1, 2})


def test_nothing_to_do():
    assert sample(torch.empty(0, 7), []) == []
    assert prompt_logprobs(torch.empty(0, 7), [], 3) == ()
