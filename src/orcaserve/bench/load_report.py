"""What a server did under a load: figures, errors by kind, and whether the client kept up; as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from orcaserve import __version__
from orcaserve.bench import measures
from orcaserve.bench.client import INTERRUPTED, Record, Server
from orcaserve.bench.measures import TIMES
from orcaserve.bench.report import Machine, Workload, markdown_table, number

SHARES = (0.5, 0.9, 0.99)
# A client that sends one request in a hundred later than this, or computes for so much of its time, measures itself.
LATE, BUSY = 0.05, 0.9
# Random prompts begin alike by chance, but not for so many tokens.
_KNOWN = 16
_TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "inter-token latency", "latency": "latency, end to end"}
_HEAD = ("seconds", "p50", "p90", "p99")
_TENANTS = ("tenant", "sent", "failed", "tokens/s", "s/token", "TTFT p50", "TTFT p99", "TPOT p50", "goodput")


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was done and what came of it. client_cpu: the share of one core that the client took.

    records: of the requests that were sent. shares_prompts: whether the workload lets a prefix cache find something.
    """

    date: str
    machine: Machine
    server: Server
    workload: Workload
    shares_prompts: bool
    seed: int
    vocab: int
    warm_up: int
    limits: dict[str, float]
    records: list[Record]
    is_interrupted: bool
    client_cpu: float
    orcaserve: str = __version__


class Quantiles(msgspec.Struct, frozen=True):
    """In seconds. None if there is nothing to measure."""

    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        return cls(*(measures.quantile(values, share) for share in SHARES))


class Goodput(msgspec.Struct, frozen=True):
    """Requests that meet all limits: how many, their share of all, and how many a second."""

    met: int
    share: float
    rate: float | None


class Summary(msgspec.Struct, frozen=True):
    """Figures of the requests that were answered. wall: seconds from the first arrival to the last token, or to the end
    of the last request that failed; those of all tenants, so that their rates add up.

    Rates are per second of wall; normalised_latency is the median, in seconds per token. times: by the names of TIMES.
    cached_tokens: prompt tokens that the server already knew.
    """

    requests: int
    answered: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    wall: float | None
    request_rate: float | None
    output_rate: float | None
    total_rate: float | None
    normalised_latency: float | None
    times: dict[str, Quantiles]
    goodput: Goodput | None

    @property
    def failed(self) -> int:
        return self.requests - self.answered


class Errors(msgspec.Struct, frozen=True):
    """How many requests failed in one way, and what the first of them said."""

    kind: str
    count: int
    first: str


class Lag(msgspec.Struct, frozen=True):
    """How late the client sent requests, in seconds."""

    p50: float
    p99: float
    most: float


def ended(records: Sequence[Record]) -> list[Record]:
    """Those that count: all but the ones that an interruption cut off."""
    return [record for record in records if record.error_kind != INTERRUPTED.kind]


def wall(records: Sequence[Record]) -> float | None:
    """Of requests that have ended, failed ones among them: time in which a server answers nobody counts, too."""
    if not records:
        return None
    return max(map(_end, records)) - min(record.due for record in records) or None


def _end(record: Record) -> float:
    """The last token of one that was answered; when one failed, as far as that is known."""
    if record.error and record.ended is not None:
        return record.ended
    return record.last if record.token_times else record.sent


def summary(records: Sequence[Record], limits: dict[str, float], seconds: float | None = None) -> Summary:
    """Of requests that have ended. seconds: the wall time that they share with others; None: it is their own."""
    answered = [record for record in records if not record.error and record.token_times]
    seconds = seconds or wall(records)

    def rate(count: int) -> float | None:
        return count / seconds if seconds else None

    prompt_tokens = sum(map(measures.prompt_tokens, answered))
    output_tokens = sum(record.output_tokens for record in answered)
    goodput = None
    if limits and records:
        met = sum(measures.meets(record, limits) for record in records)
        goodput = Goodput(met, met / len(records), rate(met))
    return Summary(
        requests=len(records),
        answered=len(answered),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        cached_tokens=sum(record.cached_tokens for record in answered),
        wall=seconds,
        request_rate=rate(len(answered)),
        output_rate=rate(output_tokens),
        total_rate=rate(prompt_tokens + output_tokens),
        normalised_latency=measures.normalised_latency(answered) if answered else None,
        times={name: Quantiles.of(measures.times(name, answered)) for name in TIMES},
        goodput=goodput,
    )


def tenants(report: Report) -> dict[str, Summary]:
    """The same for each tenant, if there are several; "" are the requests of none."""
    return by_tenants(ended(report.records), report.limits)


def by_tenants(records: Sequence[Record], limits: dict[str, float]) -> dict[str, Summary]:
    """`tenants`, of requests that have ended."""
    by_tenant: dict[str, list[Record]] = {}
    for record in records:
        by_tenant.setdefault(record.tenant or "", []).append(record)
    if len(by_tenant) < 2:
        return {}
    return {name: summary(of_one, limits, wall(records)) for name, of_one in sorted(by_tenant.items())}


def errors(records: Sequence[Record]) -> list[Errors]:
    """By kind, the most frequent first."""
    by_kind: dict[str, list[str]] = {}
    for record in records:
        if record.error:
            by_kind.setdefault(record.error_kind or "other", []).append(record.error)
    found = [Errors(kind, len(said), said[0]) for kind, said in by_kind.items()]
    return sorted(found, key=lambda one: -one.count)


def lag(records: Sequence[Record]) -> Lag | None:
    """None if nothing was sent."""
    late = [max(0.0, record.sent - record.due) for record in records]
    if not late:
        return None
    return Lag(measures.quantile(late, 0.5) or 0.0, measures.quantile(late, 0.99) or 0.0, max(late))


def problems(report: Report) -> list[str]:
    """What makes figures wrong or incomplete, a line each."""
    records, lines = ended(report.records), []
    if report.is_interrupted:
        cut, unsent = len(report.records) - len(records), report.workload.requests - len(report.records)
        lines.append(
            f"Interrupted: {cut} requests were under way and {unsent} had not been sent; none of them counts anywhere."
        )
    late = lag(report.records)
    if late is not None and late.p99 > LATE:
        lines.append(
            f"The client did not keep up: it sent requests up to {late.most:.3f} s late (p99 {late.p99:.3f} s), so "
            f"that the load was not the one that was asked for."
        )
    if report.client_cpu > BUSY:
        lines.append(f"The client was busy for {report.client_cpu:.0%} of the time: times are partly its own.")
    if short := [one for one in records if not one.error and one.output_tokens != one.max_tokens]:
        lines.append(
            f"{len(short)} requests got another number of tokens than asked for: {short[0].output_tokens} instead of "
            f"{short[0].max_tokens}."
        )
    known = [record for record in records if record.cached_tokens >= _KNOWN]
    if known and not report.shares_prompts:
        lines.append(
            f"{len(known)} requests had a prompt that the server knew, though no two of this workload begin alike: "
            f"restart the server, or give another --seed."
        )
    return lines


def notes(report: Report) -> list[str]:
    """What a reader should know."""
    answered = [record for record in ended(report.records) if not record.error]
    lines = ["Times begin when a request is due, not when it is sent."]
    if late := lag(report.records):
        lines.append(
            f"The client sent requests {late.p50 * 1000:.1f} ms late (p50), {late.p99 * 1000:.1f} ms (p99), "
            f"{late.most * 1000:.1f} ms at most, and took {report.client_cpu:.0%} of one core."
        )
    counted = [record.counted for record in answered]
    if count := counted.count("usage"):
        lines.append(
            f"In {count} of {len(counted)} replies the chunks did not show as many tokens as `usage` counts; their "
            f"times are spread evenly over the tokens."
        )
    if count := counted.count("guess"):
        lines.append(f"{count} of {len(counted)} replies came without `usage`: a chunk is a token.")
    lines.append(f"The load average of the client's machine was {report.machine.load:.2f} at the start.")
    return lines


def show(report: Report, terminal: Console) -> None:
    """Tables, errors, what is wrong, and what a reader should know."""
    show_figures(ended(report.records), report.limits, terminal)
    for one in errors(ended(report.records)):
        said = f"{one.count} failed by {one.kind!r}; the first one: {one.first}"
        terminal.print(said, style="red", markup=False, highlight=False, soft_wrap=True)
    for line in problems(report):
        terminal.print(f"⚠ {line}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    for line in notes(report):
        terminal.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def show_figures(records: Sequence[Record], limits: dict[str, float], terminal: Console) -> None:
    """The tables alone: of all requests, and of each tenant if there are several."""
    whole = summary(records, limits)
    terminal.print(_table(("", ""), _figures(limits, whole), show_header=False))
    terminal.print(_table(_HEAD, _times(whole)))
    if by_tenant := by_tenants(records, limits):
        terminal.print(_table(_TENANTS, _tenants(by_tenant)))


def markdown(report: Report) -> str:
    """The page."""
    return "\n".join(_markdown(report)) + "\n"


def write(report: Report, folder: Path) -> None:
    """Writes report.md and report.json. The records are in a file of their own."""
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    found = {
        "summary": summary(ended(report.records), report.limits),
        "tenants": tenants(report),
        "errors": errors(ended(report.records)),
        "lag": lag(report.records),
        "problems": problems(report),
        "notes": notes(report),
    }
    given = msgspec.structs.asdict(report)
    del given["records"]
    (folder / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(found | given)))


def _markdown(report: Report) -> Iterator[str]:
    whole = summary(ended(report.records), report.limits)
    yield from ("# A server under load", "", f"{report.date}, {report.machine}; orcaserve bench {report.orcaserve}.")
    if wrong := problems(report):
        yield from ("", "## ⚠ Before you quote this", "", *(f"- **{line}**" for line in wrong))
    yield from ("", "## Figures", "")
    yield from markdown_table(("figure", "value"), list(_figures(report.limits, whole)))
    yield ""
    yield from markdown_table(_HEAD, list(_times(whole)))
    if by_tenant := tenants(report):
        yield from ("", "## Tenants", "")
        yield from markdown_table(_TENANTS, list(_tenants(by_tenant)))
    if failed := errors(ended(report.records)):
        yield from ("", "## Errors", "")
        yield from markdown_table(
            ("requests", "kind", "the first one said"), [(str(one.count), one.kind, one.first) for one in failed]
        )
    work, server = report.workload, report.server
    yield from ("", "## Server and workload", "")
    yield from markdown_table(
        ("what", "is"),
        [
            ("server", f"{server.url}, model {server.model}, version {server.version or 'unknown'}"),
            ("workload", f"`{work.name}`"),
            ("size", f"{work.requests} requests, {work.prompt_tokens} prompt and {work.output_tokens} output tokens"),
            ("token ids", f"below {report.vocab}, seed {report.seed}"),
            ("warm-up", f"{report.warm_up} requests"),
        ],
    )
    yield from (f"\n{note}" for note in notes(report))


def _figures(given: dict[str, float], of: Summary) -> Iterator[tuple[str, str]]:
    yield "requests", f"{of.answered} answered, {of.failed} failed, in {number(of.wall)} s"
    yield (
        "throughput",
        f"{number(of.request_rate)} requests/s, {number(of.output_rate)} output tokens/s, {number(of.total_rate)} "
        f"total tokens/s",
    )
    yield "normalised latency (median)", f"{number(of.normalised_latency)} s/token"
    if of.goodput is not None:
        limits = ", ".join(f"{name} ≤ {seconds:g} s" for name, seconds in given.items())
        yield f"goodput ({limits})", f"{of.goodput.share:.1%} of requests, {number(of.goodput.rate)} requests/s"
    if of.cached_tokens:
        yield "prompt tokens from the prefix cache", f"{of.cached_tokens / of.prompt_tokens:.1%}"


def _times(of: Summary) -> Iterator[tuple[str, ...]]:
    for name, title in _TITLES.items():
        yield title, *map(number, msgspec.structs.astuple(of.times[name]))


def _tenants(by_tenant: dict[str, Summary]) -> Iterator[tuple[str, ...]]:
    for name, of in by_tenant.items():
        ttft, tpot = of.times["ttft"], of.times["tpot"]
        figures = (of.output_rate, of.normalised_latency, ttft.p50, ttft.p99, tpot.p50)
        met = "—" if of.goodput is None else f"{of.goodput.share:.1%}"
        yield name or "—", str(of.requests), str(of.failed), *map(number, figures), met


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]], *, show_header: bool = True) -> Table:
    table = Table(box=SIMPLE_HEAD, show_header=show_header)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i and show_header else "left")
    for row in rows:
        table.add_row(*row)
    return table
