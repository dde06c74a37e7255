"""`RandomWeights`: the tensors of a plan, drawn instead of read; something to measure, not to talk to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from orcaserve.model.plan import TensorSpec


class RandomWeights:
    """Makes each tensor when it is taken, on its device, the same for the same seed and order of calls.

    Matrices are normal with variance 1 / inputs, so that values keep their size through the layers; the weights of
    norms are ones, and biases zeros.
    """

    def __init__(self, plan: Mapping[str, TensorSpec], dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self._plan = plan
        self._dtype = dtype
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def __contains__(self, key: str) -> bool:
        return key in self._plan

    def take(self, key: str) -> Tensor:
        spec = self._plan[key]
        if len(spec.shape) == 1:
            make = torch.zeros if key.endswith(".bias") else torch.ones
            return make(spec.shape, dtype=self._dtype, device=self._device)
        made = torch.randn(spec.shape, generator=self._generator, dtype=self._dtype, device=self._device)
        return made.mul_(spec.shape[1] ** -0.5)

    def take_optional(self, key: str) -> Tensor | None:
        return self.take(key) if key in self._plan else None
