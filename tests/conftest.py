"""Options of the test run, and Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

# Triton reads this when it is first imported, by whomever.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--promised", type=int, default=100, help="requests that must have the same bits alone and in a crowd"
    )
    parser.addoption(
        "--whole-grid", action="store_true", help="every tensor- and pipeline-parallel size with every shape"
    )
