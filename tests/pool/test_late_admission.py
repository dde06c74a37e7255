"""Where first tokens come later than is foretold, fewer are let in, and where they come in time again, more."""

from __future__ import annotations

import itertools
import time

import pytest

from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.serve.admission import Admission, Claim, Limits, Refused
from orcaserve.serve.resume import Choice
from orcaserve.serve.terms import Terms

FORETOLD = 1.0  # seconds: one runs, which has 100 tokens to generate, each in 10 ms
PLACE = SamplingParams(max_tokens=100, ignore_eos=True)
NUMBERS = itertools.count()


def choice_of(first_by: float | None) -> Choice:
    new = NewRequest(id=0, token_ids=(1,), num_prompt=1, max_tokens=100, params=PLACE)
    return Choice(next(NUMBERS), new, (), Terms(first_by=first_by))


def busy() -> Admission:
    admission = Admission(Limits(), max_batch_size=1, max_batch_tokens=64)
    for _ in range(200):
        admission.iterated(0, 1, 0.01)
    running = choice_of(None)
    admission.arrive(running)
    admission.start(running)
    return admission


def is_taken(admission: Admission, seconds: float) -> bool:
    """Whether a request would be whose first token is due in so many."""
    now = time.monotonic()
    try:
        admission.check(Claim(first_by=now + seconds, longest_prompt=1), now)
    except Refused as refused:
        assert refused.reason == "deadline_unreachable"
        return False
    return True


def come(admission: Admission, count: int, due: float, took: float, answers: bool = True) -> None:
    """One after the other are let in whose first tokens are due in `due` seconds and come after `took`, if at all."""
    for _ in range(count):
        choice = choice_of(time.monotonic() + due)
        choice.arrived = choice.terms.first_by - due
        admission.arrive(choice)
        admission.start(choice)
        if answers:
            admission.generated(choice, 1, 0, choice.arrived + took)
            choice.has_output = True
        admission.leave(choice, choice.arrived + took)


@pytest.mark.parametrize("answers", [True, False], ids=["late", "given up"])
def test_who_would_be_late_is_refused_until_waits_are_as_foretold_again(answers: bool) -> None:
    admission = busy()
    assert is_taken(admission, 1.3) and not is_taken(admission, 0.9 * FORETOLD)
    come(admission, 50, due=1.3, took=1.8, answers=answers)
    assert not is_taken(admission, 1.3) and is_taken(admission, 2.0)
    come(admission, 500, due=2.0, took=0.9)
    assert is_taken(admission, 1.3)


def test_who_has_time_to_spare_or_never_had_a_chance_says_nothing() -> None:
    admission = busy()
    come(admission, 200, due=60.0, took=50.0)
    come(admission, 200, due=0.1, took=9.0)  # as an idle server lets them in
    come(admission, 200, due=1.3, took=0.2, answers=False)  # they went away
    assert is_taken(admission, 1.1)
