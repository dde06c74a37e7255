"""One server for the tests that only talk to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import Serving


@pytest.fixture(scope="session")
def served() -> Iterator[Serving]:
    with Serving("--kv-memory", "16MiB") as server:
        yield server
