"""`Size`: a number of bytes on the command line."""

from __future__ import annotations

import re
from typing import Any

import click

_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_SIZES["ti"] = 1 << 40


class Size(click.ParamType):
    """Bytes as people write them: 24MiB, 4GiB, 500MB, 1048576; "auto" is None."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value is None or isinstance(value, int):
            return value
        text = str(value).strip().lower()
        if text == "auto":
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text)
        if match is None or match[2] not in _SIZES:
            self.fail(f"{value!r} is not a size; write for example 24MiB, 4GiB or auto", param, ctx)
        return int(float(match[1]) * _SIZES[match[2]])
