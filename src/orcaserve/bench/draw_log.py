"""Draws a step log: a lane for each request, time to the right, and above them how full the engine was.

Needs matplotlib (the extra `plots`).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from orcaserve.engine.step_log import Log, Returned, Submitted
from orcaserve.sim.story import Story

# What a stretch of a lane is: its colour, its words, and how thick it is.
QUEUE, WORK = 0.4, 0.8
KINDS = {
    "rows": ("#b9c1ce", "waits: rows are taken", QUEUE),
    "tokens": ("#c9b78e", "waits: tokens are given out", QUEUE),
    "blocks": ("#d79ac0", "waits: KV blocks lack", QUEUE),
    "memory": ("#d79ac0", "waits: KV blocks lack", QUEUE),
    "preemption": ("#d79ac0", "waits: KV blocks lack", QUEUE),
    "closed": ("#93a0b4", "waits: the batch is closed", QUEUE),
    "shape": ("#c9b78e", "waits: cannot be stacked", QUEUE),
    "prefix": ("#a9cfa0", "waits: its beginning is computed", QUEUE),
    "yields": ("#dfe3e9", "waits: next iteration", QUEUE),
    "iteration": ("#dfe3e9", "waits: next iteration", QUEUE),
    "unknown": ("#dfe3e9", "waits", QUEUE),
    "prefill": ("#f2a541", "prefill", WORK),
    "decode": ("#2f6db5", "decode", WORK),
    "lost": ("#e4572e", "computes once more", WORK),
    "burned": ("#8d8496", "ended, but computes on", WORK),
}
ENDS = {"abort": ("x", "left"), "error": ("X", "failed")}
GREY = "#777777"
_LANE = 0.2  # inches
_MOST_INCHES = 60.0
_SHORTEST_PAUSE = 0.005  # of the log: shorter ones between two iterations are not drawn

Bar = tuple[str, float, float]  # kind, begin, end


def bars(story: Story) -> list[Bar]:
    """What a lane shows: phases, with the waiting in them by its reasons."""
    waits = sorted((w for w in story.waits if not w.is_left_out), key=lambda wait: wait.begin)
    found: list[Bar] = [(wait.why, wait.begin, wait.end) for wait in waits]
    for span in story.spans:
        at = span.begin
        for wait in waits:
            if span.begin <= wait.begin < span.end:
                found.append((span.kind, at, wait.begin))
                at = max(at, wait.end)
        found.append((span.kind, at, span.end))
    return [(kind, begin, end) for kind, begin, end in found if end > begin and kind != "queue"]


def lanes(axes: Axes, stories: Sequence[Story]) -> set[str]:
    """Draws a lane for each, from above; gives the kinds of stretches that occur."""
    seen: set[str] = set()
    by_kind: dict[str, list[tuple[float, float, float]]] = {}
    for lane, story in enumerate(stories):
        for kind, begin, end in bars(story):
            by_kind.setdefault(kind, []).append((lane, begin, end))
        if story.end in ENDS:
            marker = ENDS[story.end][0]
            axes.plot([story.ended], [lane], marker, color="#222", markersize=4, clip_on=False, zorder=4)
            seen.add(story.end)
        for loss in story.losses:
            axes.plot([loss.at], [lane], "|", color="#222", markersize=9, markeredgewidth=1.2, zorder=4)
            seen.add("preempted")
    for kind, of_kind in by_kind.items():
        colour, _, height = KINDS[kind]
        seen.add(kind)
        axes.barh(
            [lane for lane, _, _ in of_kind],
            [end - begin for _, begin, end in of_kind],
            left=[begin for _, begin, _ in of_kind],
            height=height,
            color=colour,
            linewidth=0,
        )
    axes.set_ylim(len(stories) - 0.4, -0.6)
    axes.set_ylabel("request")
    step = max(1, len(stories) // 60)
    axes.set_yticks(range(0, len(stories), step), [str(story.id) for story in stories[::step]])
    tidy(axes)
    return seen


def legend(figure: Figure, kinds: Iterable[str], columns: int = 5) -> None:
    """Below the figure, what its colours are; equal ones once."""
    seen = set(kinds)
    words = dict.fromkeys((KINDS[kind][0], KINDS[kind][1]) for kind in KINDS if kind in seen)
    handles: list[Patch | Line2D] = [Patch(facecolor=colour, label=label) for colour, label in words]
    marks = [("preempted", "|", "preempted"), *((end, mark, word) for end, (mark, word) in ENDS.items())]
    for kind, marker, word in marks:
        if kind in seen:
            handles.append(Line2D([], [], marker=marker, linestyle="none", color="#222", label=word, markersize=6))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)


def tidy(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.xaxis.grid(True, color="#e6e8ec")
    axes.set_axisbelow(True)


def draw(log: Log, stories: Sequence[Story], path: Path, title: str, about: Story | None = None) -> None:
    """Writes a PNG. about: only the time of this request, and those that were there then."""
    of = stories if about is None else [about]
    begin, end = min(story.arrived for story in of), max(story.ended for story in of)
    room = 0.02 * max(end - begin, 1e-3)
    begin, end = begin - room, end + room
    shown = [story for story in stories if story.arrived < end and story.ended > begin]
    height = min(_MOST_INCHES, 2.6 + _LANE * max(4, len(shown)))
    figure = Figure(figsize=(11, height), dpi=130, layout=ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.08))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.1, max(1.0, height - 2.6)])
    _load(above, log, stories)
    seen = lanes(below, shown)
    if about is not None:
        lane = shown.index(about)
        below.axhspan(lane - 0.5, lane + 0.5, color="#fff3c4", zorder=0)
    below.set_xlim(begin, end)
    below.set_xlabel("seconds")
    above.set_title(title, fontsize=10.5, loc="left")
    legend(figure, seen)
    figure.savefig(path)


def _load(axes: Axes, log: Log, stories: Sequence[Story]) -> None:
    """Rows of the iterations under way, and requests in the queue."""
    rows: list[tuple[float, float]] = [(0.0, 0.0)]
    flying: deque[Submitted] = deque()
    returned = 0.0
    least = _SHORTEST_PAUSE * (log.events[-1].at if log.events else 0.0)
    for event in log.events:
        if isinstance(event, Submitted):
            if not flying and event.at - returned > least:
                rows.append((returned, 0))
            flying.append(event)
            rows.append((event.at, sum(len(batch.rows) for batch in flying)))
        elif isinstance(event, Returned) and flying:
            flying.popleft()
            returned = event.at
    rows.append((returned, 0))
    changes: dict[float, int] = defaultdict(int)
    for wait in (wait for story in stories for wait in story.waits if not wait.is_left_out):
        changes[wait.begin] += 1
        changes[wait.end] -= 1
    waiting: list[tuple[float, float]] = [(0.0, 0.0)]
    for at in sorted(changes):
        waiting.append((at, waiting[-1][1] + changes[at]))
    axes.step(*zip(*rows, strict=True), where="post", color=KINDS["decode"][0], linewidth=1.2, label="in iterations")
    axes.step(*zip(*waiting, strict=True), where="post", color=GREY, linewidth=1.2, label="in the queue")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", ncols=2, frameon=False, fontsize=8)
    axes.tick_params(labelbottom=False)
    axes.set_ylabel("requests")
    tidy(axes)
