"""How many tokens: a distribution as people write it."""

from __future__ import annotations

import math
import random
import re
from typing import Self

import msgspec

FORMS = "128 (always), 32-512 (uniform) or exp128max512 (exponential, mean 128, redrawn above 512)"


class Lengths(msgspec.Struct, frozen=True):
    """Uniform in [low, high]; with a mean, exponential instead, drawn again while it is above `high`. In tokens."""

    low: int
    high: int
    mean: int | None = None

    @classmethod
    def of(cls, text: str) -> Self:
        """ValueError if it is none of FORMS."""
        if match := re.fullmatch(r"(\d{1,7})(?:-(\d{1,7}))?", text):
            low, high, mean = int(match[1]), int(match[2] or match[1]), None
        elif match := re.fullmatch(r"exp(\d{1,7})max(\d{1,7})", text):
            low, high, mean = 1, int(match[2]), int(match[1])
        else:
            raise ValueError(f"{text!r} is none of {FORMS}")
        if not 1 <= low <= high or mean == 0:
            raise ValueError(f"{text!r}: lengths begin at 1 and do not run backwards")
        return cls(low, high, mean)

    def __str__(self) -> str:
        if self.mean is not None:
            return f"exp{self.mean}max{self.high}"
        return f"{self.low}" if self.low == self.high else f"{self.low}-{self.high}"

    def draw(self, rng: random.Random) -> int:
        if self.mean is None:
            return rng.randint(self.low, self.high)
        # The inverse of its distribution function gives what drawing again would, in one draw.
        share = rng.random() * -math.expm1(-(self.high + 0.5) / self.mean)
        return min(self.high, max(1, round(-self.mean * math.log1p(-share))))
