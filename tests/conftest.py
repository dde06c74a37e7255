"""Options of the test run, hypothesis without deadlines, and Triton's interpreter where there is no GPU."""

import os

import hypothesis
import pytest
import torch

# Triton reads this when it is first imported, by whomever.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("without deadlines", deadline=None)
hypothesis.settings.load_profile("without deadlines")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--promised", type=int, help="requests of each kind that must have the same bits alone and in a crowd"
    )
    parser.addoption(
        "--whole-grid", action="store_true", help="every tensor- and pipeline-parallel size with every shape"
    )
