"""The rows about hostile clients at their short scale. How long /health takes is not checked: the machine says it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import ModuleType

import pytest

from torture import r07_fuzz, r08_advisories, r09_health, r16_tenants
from torture.hostile import target
from torture.rows import Outcome, Setup

SEED = int(time.time())


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    print(f"seed {SEED}")
    return Setup("short", SEED, tmp_path_factory.mktemp("torture"), sizes={"probes": 24})


@pytest.fixture(scope="module")
def shared(own: Setup) -> Iterator[Setup]:
    """One server for the rows that can be asked of any."""
    with target(own) as (url, model, *_):
        yield Setup("short", SEED, own.folder, url, model)


def outcome(row: ModuleType, setup: Setup) -> Outcome:
    [found] = row.torture(setup)
    print(found.line(), *found.trace, sep="\n")
    return found


def test_requests_and_bytes_at_random(shared: Setup) -> None:
    found = outcome(r07_fuzz, shared)
    assert found.is_met, found


def test_health_while_others_keep_the_server_busy(shared: Setup) -> None:
    found = outcome(r09_health, shared)
    assert "did not serve" not in found.cause and not any(": -1," in step or ": 5" in step for step in found.trace), (
        found
    )


def test_attacks_known_of_others(own: Setup) -> None:
    found = outcome(r08_advisories, own)
    assert found.is_met, found


def test_tenants_cannot_guess_what_others_ask(own: Setup) -> None:
    found = outcome(r16_tenants, own)
    assert "right by counts 0.500" in found.figure and "victim's own key 1.000" in found.figure, found
