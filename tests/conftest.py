"""Options of the test run."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--promised", type=int, default=100, help="requests that must have the same bits alone and in a crowd"
    )
