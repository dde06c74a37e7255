"""The factor that nearly all of what comes stays within is found, and stays within its bounds."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from orcaserve.core.slack import Slack


def test_it_is_the_quantile_of_what_comes() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    slack = Slack(0.9, most=5.0, step=0.01)
    seen = []
    for number in range(20_000):
        foretold = rng.uniform(0.1, 10)
        slack.learn(foretold * rng.uniform(1, 2), foretold)
        if number >= 2000:
            seen.append(slack.value)
    assert 1.85 < sum(seen) / len(seen) < 1.95
    for _ in range(20_000):  # another pace, and it is followed
        slack.learn(rng.uniform(2, 4), 1.0)
    assert 3.5 < slack.value < 4.0


@given(st.lists(st.floats(0, 1e9)), st.floats(0.5, 0.99), st.floats(1, 4), st.floats(0.001, 0.1))
def test_no_ratio_moves_it_further_than_a_step_or_past_its_bounds(ratios, share, most, step) -> None:
    slack = Slack(share, most, step)
    for ratio in ratios:
        before = slack.value
        slack.learn(ratio, 1.0)
        assert 1 <= slack.value <= most
        assert (slack.value > before) <= (ratio > before) and abs(slack.value - before) <= step
