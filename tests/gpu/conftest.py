"""GPU kernels are tested on the GPU that is there, else under Triton's interpreter (see the conftest above)."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
