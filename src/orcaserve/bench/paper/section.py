"""`Section`: one part of the report as a reader meets it: what to look for, what was found, and the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from orcaserve.bench.report import markdown_table


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """look: one sentence that says what should be seen. found: sentences made of the measured numbers.

    surprises: what did not come out in the expected order. head, rows: the table. notes: how it was measured.
    """

    title: str
    look: str
    found: list[str]
    surprises: list[str]
    head: list[str]
    rows: list[list[str]]
    notes: list[str]

    def markdown(self, figure: str | None, seconds: float) -> Iterator[str]:
        yield from (f"## {self.title}", "", f"**What to see.** {self.look}", "")
        yield f"**What was found.** {' '.join(self.found)}"
        for line in self.surprises:
            yield from ("", f"**⚠ Not as expected.** {line}")
        if figure:
            yield from ("", f"![{self.title}]({figure})")
        yield ""
        yield from markdown_table(self.head, self.rows)
        yield from ("", " ".join([*self.notes, f"It took {seconds:.0f} s."]), "")


def times(value: float | None) -> str:
    """A ratio as it is written; "—" for one that there is not."""
    return "—" if value is None else f"{value:.2f}×"


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)
