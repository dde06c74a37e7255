"""GPU kernels are tested on the GPU that is there, else under Triton's interpreter (see the conftest above)."""

from collections.abc import Iterator

import interpreted
import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> Iterator[None]:
    with interpreted.quick(), interpreted.like_a_gpu():
        yield
