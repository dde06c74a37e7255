"""Options of the test run."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--promised", type=int, default=100, help="requests that must have the same bits alone and in a crowd"
    )
    parser.addoption(
        "--whole-grid", action="store_true", help="every tensor- and pipeline-parallel size with every shape"
    )
