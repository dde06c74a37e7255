"""Draws a report: bars side by side for every server, a panel for each kind of work.

Needs matplotlib (the extra `plots`).
"""

from __future__ import annotations

import itertools
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from orcaserve.bench.report import Line, Report, number, summary

COLOURS = ("#2f6db5", "#f2a541", "#5aa469", "#8e6bbf", "#e4572e", "#7a8190")
GREY = "#777777"
# The figure of each kind that is drawn, its panel's title, and what a group of bars is called.
PANELS = {
    "decode": ("decode", "Decoding", "batch {}"),
    "trace": ("output", "Orca trace", "{}"),
    "poisson": ("normalised latency", "Poisson arrivals", "{} requests/s"),
}


def draw(report: Report, path: Path) -> None:
    """Writes a PNG. Dots are the rounds, bars their medians."""
    lines = summary(report)
    panels = {
        kind: chosen
        for kind, (figure, _, _) in PANELS.items()
        if (chosen := [line for line in lines if line.kind == kind and line.figure == figure])
    }
    widths = [max(2.6, len(chosen) * (0.35 + 0.5 * len(report.servers))) for chosen in panels.values()]
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(max(5.0, 0.8 + sum(widths) + 0.5 * len(widths)), 4.4), dpi=150, layout=layout)
    axes = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    for panel, (kind, chosen) in zip(axes, panels.items(), strict=True):
        _, title, group = PANELS[kind]
        better = "higher is better" if chosen[0].is_rate else "lower is better"
        panel.set_title(title, fontsize=11, loc="left", pad=18)
        panel.text(
            0,
            1.02,
            f"{chosen[0].figure}, {chosen[0].unit}: {better}",
            transform=panel.transAxes,
            fontsize=8.5,
            color=GREY,
        )
        panel.set_xticks(range(len(chosen)), [group.format(line.work.partition("-")[2]) for line in chosen])
        _bars(panel, chosen)
    colours = zip(report.servers, itertools.cycle(COLOURS), strict=False)
    figure.legend(
        handles=[Patch(facecolor=colour, label=server.name) for server, colour in colours],
        loc="outside upper left",
        ncols=max(1, int(sum(widths) / 1.6)),
        frameon=False,
    )
    figure.supxlabel(f"{report.machine}; {report.date}", fontsize=7.5, color=GREY, x=0.99, ha="right")
    figure.savefig(path)


def _bars(panel: Axes, lines: list[Line]) -> None:
    count = len(lines[0].cells)
    width = min(0.3, 0.84 / count)
    top = max((cell.median or 0 for line in lines for cell in line.cells), default=0)
    for x, line in enumerate(lines):
        for i, cell in enumerate(line.cells):
            place = x + (i - (count - 1) / 2) * width
            known = [value for value in cell.by_round if value is not None]
            panel.bar(place, cell.median or 0, width * 0.92, color=COLOURS[i % len(COLOURS)])
            if len(known) > 1:
                panel.plot([place] * len(known), known, "o", color="#222", markersize=2.5, alpha=0.7)
            label = number(cell.median) + " ⚠" * cell.is_flawed
            height = max([0, *known])
            panel.text(place, height + 0.015 * top, label, ha="center", va="bottom", fontsize=8)
    panel.margins(y=0.12)
    panel.set_xlim(-0.5, len(lines) - 0.5)
    panel.set_ylim(bottom=0)
    panel.tick_params(length=0)
    panel.yaxis.grid(True, color="#e6e8ec")
    panel.set_axisbelow(True)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
