"""Draws the parts of the report. Needs matplotlib (the extra `plots`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from orcaserve.bench.draw import COLOURS, GREY
from orcaserve.bench.paper.alone import Alone
from orcaserve.bench.paper.curves import Curves, capacity
from orcaserve.bench.paper.ladder import Ladder
from orcaserve.bench.paper.memory import Memory
from orcaserve.bench.paper.report import Report
from orcaserve.bench.paper.variance import SYSTEMS, Variance
from orcaserve.bench.report import number

BLUE, AMBER, GREEN, PURPLE, RED, SLATE = COLOURS
INK = "#222222"
# Request-level in warm colours, the paper's in blues, ours in green; a larger batch is darker.
KINDS = {"static": ("#f7c98b", AMBER, RED), "orca": ("#a9c7e8", "#6ea0d4", BLUE, "#1b4172"), "default": (GREEN,)}
MARKERS = {"static": "s", "orca": "o", "default": "D"}


def draw(report: Report, folder: Path) -> dict[str, str]:
    """Writes a PNG for each part that ran; gives their names by part."""
    found = report.found
    drawn = {
        "alone": _alone(found.alone) if found.alone else None,
        "mixed": _curves(found.mixed) if found.mixed else None,
        "equal": _curves(found.equal) if found.equal else None,
        "variance": _variance(found.variance) if found.variance else None,
        "ladder": _ladder(found.ladder) if found.ladder else None,
        "memory": _memory(found.memory) if found.memory else None,
    }
    names = {}
    foot = f"{report.model.name}, {report.threads} thread{'s' * (report.threads != 1)}; {report.machine}; {report.date}"
    for part, figure in drawn.items():
        if figure is not None:
            figure.supxlabel(foot, fontsize=7, color=GREY, x=0.99, ha="right")
            names[part] = f"{part}.png"
            figure.savefig(folder / names[part])
    return names


def _panels(
    count: int, width: float, height: float = 4.4, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    axes = list(figure.subplots(1, count, squeeze=False, sharex=sharex, sharey=sharey)[0])
    for panel in axes:
        panel.grid(True, color="#e6e8ec")
        panel.set_axisbelow(True)
        panel.tick_params(length=0, labelsize=8.5)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    return figure, axes


def _head(panel: Axes, title: str, below: str) -> None:
    panel.set_title(title, fontsize=11, loc="left", pad=18)
    panel.text(0, 1.02, below, transform=panel.transAxes, fontsize=8.5, color=GREY)


def _alone(found: Alone) -> Figure:
    prompts = sorted({point.prompt for point in found.points})
    figure, axes = _panels(len(prompts), 4.6 * len(prompts))
    for panel, prompt in zip(axes, prompts, strict=True):
        points = [point for point in found.points if point.prompt == prompt]
        sizes = [point.batch for point in points]
        one = points[0].orca
        panel.plot(sizes, [one * size for size in sizes], color=GREY, linestyle=(0, (2, 3)), linewidth=1)
        panel.text(sizes[2], one * sizes[2] * 1.25, "one by one", fontsize=8, color=GREY, ha="right")
        panel.plot(sizes, [p.static for p in points], "s-", color=AMBER, markersize=7, label="static (request-level)")
        panel.plot(sizes, [p.orca for p in points], "o-", color=BLUE, markersize=4, label="orca (iteration-level)")
        _head(panel, f"{prompt} tokens in, {found.output} out", "seconds per batch: lower is better")
        _powers(panel, sizes)
        _logarithmic(panel)
        panel.set_xlabel("requests in the batch", fontsize=9)
    axes[0].legend(frameon=False, fontsize=8.5, loc="upper left")
    return figure


def _powers(panel: Axes, sizes: list[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.minorticks_off()


def _logarithmic(panel: Axes) -> None:
    """A scale of 1, 2, 3, 5, 7, 10, …, in plain numbers."""
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "2357" else "")
    panel.tick_params(axis="y", which="minor", length=0, labelsize=8.5)


def _styles(names: list[str]) -> Iterator[tuple[str, str, str]]:
    """(setup, colour, marker)."""
    for kind, of_kind in itertools.groupby(names, key=lambda name: name.partition("(")[0]):
        members = list(of_kind)
        colours = KINDS[kind][-len(members) :]
        yield from ((name, colour, MARKERS[kind]) for name, colour in zip(members, colours, strict=False))


def _curves(found: list[Curves]) -> Figure:
    figure, axes = _panels(len(found), 7.6 if len(found) == 1 else 5.2 * len(found), 4.8)
    for panel, curves in zip(axes, found, strict=True):
        bound = 1000 * curves.bound
        panel.axhline(bound, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        for name, colour, marker in _styles(curves.setups):
            points = curves.of(name)
            x, y = [point.throughput for point in points], [1000 * point.latency for point in points]
            panel.plot(x, y, color=colour, marker=marker, markersize=4.5, linewidth=1.6, label=name)
            at_bound = capacity(points, curves.bound)
            if at_bound.rate is not None and not at_bound.is_least:
                panel.plot([at_bound.rate], [bound], "|", color=colour, markersize=15, markeredgewidth=2.2)
        _logarithmic(panel)
        panel.set_xlim(left=0)
        label = f" {number(bound)} ms"
        panel.text(0.005, bound, label, transform=panel.get_yaxis_transform(), fontsize=8, va="bottom")
        _head(
            panel,
            f"Requests of {_lengths(curves.lengths)}",
            "ms per generated token (median): lower and further right is better",
        )
        panel.set_xlabel("requests answered per second", fontsize=9)
    axes[-1].legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _lengths(text: str) -> str:
    """in=32-512,out=1-128 in words."""
    prompt, output = (part.partition("=")[2].replace("-", " to ") for part in text.split(","))
    return f"{prompt} tokens in, {output} out"


def _variance(found: Variance) -> Figure:
    figure, (bars, left, right) = _panels(3, 12.5)
    width = 0.27
    for i, (name, colour) in enumerate(zip(SYSTEMS, (AMBER, BLUE, GREEN), strict=True)):
        places = [x + (i - 1) * width for x in range(len(found.rows))]
        rates = [row.rates[i] for row in found.rows]
        bars.bar(places, rates, width * 0.92, color=colour, label=name)
    bars.set_xticks(range(len(found.rows)), [str(row.limit) for row in found.rows])
    bars.grid(False, axis="x")
    bars.legend(frameon=False, fontsize=8.5)
    bars.margins(y=0.3)
    _head(bars, "Throughput", "prompt and output tokens/s: higher is better")
    bars.set_xlabel("limit of the output, tokens", fontsize=9)
    for panel, which, title in ((left, 0, "continuous by static"), (right, 1, "with paged KV by without")):
        x = range(len(found.rows))
        panel.axhline(1, color=INK, linewidth=0.8)
        panel.plot(
            x,
            [row.note_ratios[which] for row in found.rows],
            "o--",
            color=GREY,
            markersize=4,
            label="the note (OPT-13B, one GPU)",
        )
        ours = [row.ratios[which] for row in found.rows]
        panel.plot(x, ours, "o-", color=(BLUE, GREEN)[which], markersize=5, label="here")
        for place, row, value in zip(x, found.rows, ours, strict=True):
            above = 7 if value > row.note_ratios[which] else -14  # away from the note's line
            panel.annotate(
                f"{value:.2f}×", (place, value), (0, above), textcoords="offset points", ha="center", fontsize=8
            )
        panel.set_xticks(x, [str(row.limit) for row in found.rows])
        panel.margins(0.12, 0.25)
        panel.legend(frameon=False, fontsize=8.5, loc="upper left")
        _head(panel, title[0].upper() + title[1:], "how many times the throughput")
        panel.set_xlabel("limit of the output, tokens", fontsize=9)
    return figure


def _ladder(found: Ladder) -> Figure:
    figure, (rate, gap) = _panels(2, 10.5, 4.2, sharey=True)
    names = [rung.name for rung in found.rungs]
    colours = (AMBER, SLATE, "#6ea0d4", BLUE, "#1b4172", GREEN)
    places = range(len(names))
    base = found.rungs[0].throughput
    rate.barh(places, [rung.throughput for rung in found.rungs], 0.66, color=colours)
    for place, rung in zip(places, found.rungs, strict=True):
        rate.text(
            rung.throughput,
            place,
            f"  {number(rung.throughput)}  ({rung.throughput / base:.2f}×)",
            va="center",
            fontsize=8.5,
        )
    gap.barh(places, [0, *(1000 * (rung.gap or 0) for rung in found.rungs[1:])], 0.66, color=colours)
    for place, rung in zip(places, found.rungs, strict=True):
        text = (
            f"  {number(1000 * rung.gap)}"
            if place and rung.gap is not None
            else "  everything comes at the batch's end"
        )
        gap.text(
            1000 * (rung.gap or 0) if place else 0, place, text, va="center", fontsize=8.5, color=INK if place else GREY
        )
    rate.set_yticks(places, names, fontsize=9.5)
    rate.invert_yaxis()
    _head(rate, "Throughput", "requests/s (by static): higher is better")
    _head(gap, "Gaps between tokens", "p99, ms: lower is better")
    for panel in (rate, gap):
        panel.grid(False, axis="y")
        panel.margins(x=0.28)
        panel.spines["left"].set_visible(False)
    return figure


def _memory(found: Memory) -> Figure:
    figure, axes = _panels(len(found.lines), 4.1 * len(found.lines), 3.9, sharey=True, sharex=True)
    for panel, line, colour in zip(axes, found.lines, (AMBER, BLUE, GREEN), strict=True):
        at = [sample[0] for sample in line.samples]
        panel.fill_between(at, [100 * sample[2] for sample in line.samples], step="post", color="#e3e6eb", linewidth=0)
        panel.fill_between(at, [100 * sample[1] for sample in line.samples], step="post", color=colour, linewidth=0)
        _head(
            panel, line.name[0].upper() + line.name[1:], f"{100 * line.stored:.0f} % holds tokens while requests wait"
        )
        panel.set_ylim(0, 100)
        panel.set_xlim(left=0)
        panel.set_xlabel("seconds", fontsize=9)
    axes[0].set_ylabel("% of the KV memory: coloured holds tokens,\ngrey is only set aside", fontsize=9)
    return figure
