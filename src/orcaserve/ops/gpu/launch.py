"""`launcher`: launches a kernel again without Triton finding out again what its arguments ask it to be compiled to.

That is most of what a launch costs the host, and an iteration that is not recorded makes hundreds.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor


class Launcher:
    """Of one kernel on one device. Owner of what the kernel was compiled to, by the keys that callers give."""

    __slots__ = ("_compiled", "_kernel")

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self, key: Hashable | None, grid: tuple[int, int, int], args: Sequence[object], options: dict[str, Any]
    ) -> None:
        """args: every argument, the constant ones too, in their order. options: as for the kernel itself.

        key: all that the kernel is compiled anew for: `kinds` of its tensors, constants, options, and integers, unless
        it is not specialised for them. None: Triton finds out.
        """
        compiled = None if key is None else self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*args)
            return
        compiled = self._kernel[grid](*args, **options)
        if key is not None and compiled is not None:  # None: it was interpreted
            self._compiled[key] = compiled


@functools.cache
def launcher(kernel: Any, device: torch.device) -> Launcher:
    return Launcher(kernel)


def kinds(*tensors: Tensor | None) -> Hashable | None:
    """What a kernel is compiled anew for of the tensors it is given; None if one is not on a boundary of 16 bytes."""
    if any(tensor is not None and tensor.data_ptr() % 16 for tensor in tensors):
        return None
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)
