"""`Launcher`: launches a kernel again without Triton finding out again what its arguments ask it to be compiled to."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any


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

        key: whatever the kernel is compiled anew for: dtypes, constants, which arguments are None, which integers are
        multiples of 16. All pointers are multiples of 16; None: it is not known what they are.
        """
        compiled = self._compiled.get(key) if key is not None else None
        if compiled is not None:
            compiled[grid](*args)
            return
        compiled = self._kernel[grid](*args, **options)
        if key is not None and compiled is not None:  # None: it was interpreted
            self._compiled[key] = compiled
