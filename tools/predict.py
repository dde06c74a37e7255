"""Predicts how a real server does under a load that it has not been measured under, and measures how well.

    python tools/predict.py --rates 5,20,40 --out predictions

Serves a checkpoint with a step log, puts one workload on it (--learn), then another one (--predict, with RATE for the
rate) at several rates. Fits a cost model to the first workload, predicts the other one, and prints every figure with
two real runs beside it. Nothing else should run on the machine meanwhile.

A run has several parts, each with arrivals of its own, and the two runs take turns part by part. A shared machine is
slower in some minutes than in others, so that a piece of the learned workload goes before and after each part: how long
its iterations took, beside the model of all pieces, is the pace at which the part is simulated.

What happens outside of the engine (HTTP, tokens on their way to the client) is measured in the learning run, too: from
when a request was due to when the engine took it, and from an iteration's results to when the client had them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import msgspec
from serving import Serving

from orcaserve.bench import client, measures, simulation
from orcaserve.bench.client import Record, Reply, Server
from orcaserve.bench.simulation import Fitted
from orcaserve.bench.workloads import Work, spec
from orcaserve.engine.step_log import Arrived, Log, Returned, Submitted, read
from orcaserve.sim.cost import CostModel, Door, Residuals
from orcaserve.sim.fit import fit, nnls, samples_of

FIGURES = {
    **{f"{name} p{share}": (name, share / 100) for name in ("ttft", "tpot", "normalised") for share in (50, 90, 99)},
}
LEARN = "poisson:rate=30,in=32-512,out=1-128,n=100 + burst:in=16-600,out=1-60,n=14,start=5"
RUNS = 2
DRAWS = 15
PREDICT = "poisson:rate=RATE,in=32-400,out=20-100,n=70"


def measure(work: Work, options: Sequence[str], vocab: int, keep: Path | None = None) -> tuple[list[Record], Log]:
    """A server of its own under this work: the client's records, and the step log without the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps.jsonl"
        serving = Serving(options, path)
        try:
            warm = spec.make("burst:in=200,out=20,n=4", vocab=vocab, seed=99)
            server = client.in_loop(client.usable(Server("ours", serving.url), warm))
            replies = [Reply(item) for item in work.items]
            client.in_loop(client.send(server, replies))
        finally:
            serving.close()
        data = path.read_bytes()
        [log] = read(data)
    records = [reply.record() for reply in replies]
    for record in records:
        if record.error or record.output_tokens != record.max_tokens:
            raise SystemExit(record.error or f"{record.output_tokens} tokens instead of {record.max_tokens}")
    arrived = [event for event in log.events if isinstance(event, Arrived)][len(warm.items) :]
    begin = arrived[0].at - 0.01
    events = tuple(event for event in log.events if event.at >= begin)
    if keep is not None:
        keep.write_bytes(data)
    return records, Log(log.header, events)


def matched(records: Sequence[Record], log: Log) -> list[tuple[Record, Arrived, list[tuple[float, int]]]]:
    """Each record with its arrival at the engine, and with (time, place in its batch) of each of its tokens there."""
    tokens: dict[int, list[tuple[float, int]]] = defaultdict(list)
    flying: list[Submitted] = []
    for event in log.events:
        if isinstance(event, Submitted):
            flying.append(event)
        elif isinstance(event, Returned) and flying:
            sampled = [id for id, _, _, samples in flying.pop(0).rows if samples]
            for place, id in enumerate(sampled):
                tokens[id].append((event.at, place))
    arrived = sorted((event for event in log.events if isinstance(event, Arrived)), key=lambda event: event.id)
    in_order = sorted(records, key=lambda record: record.sent)
    # Requests of one moment may change places on their way; equal lengths tell them apart well enough.
    found = []
    left = list(arrived)
    for record in in_order:
        key = (record.prompt_tokens, record.max_tokens)
        at = next(i for i, event in enumerate(left) if (event.prompt, event.max_tokens) == key)
        event = left.pop(at)
        found.append((record, event, tokens[event.id]))
    return found


def door(records: Sequence[Record], log: Log) -> Door:
    """What passes outside of the engine. The two clocks are set by the quickest arrival and the quickest delivery.

    Only their sum can be told apart from the clocks' difference; it is halved between the two ways.
    """
    pairs = matched(records, log)
    looked = looks(log)
    ways_out, rows = [], []
    for record, _, tokens in pairs:
        for seen, (at, place) in zip(record.token_times, tokens, strict=True):
            ways_out.append(seen - at)
            rows.append([1.0, float(place)])
    quickest_in, quickest_out = min(event.at - record.due for record, event, _ in pairs), min(ways_out)
    offset = (quickest_in - quickest_out) / 2  # of the log's clock before the client's
    typical = statistics.median(ways_out) + offset
    kept = [(row, way + offset) for row, way in zip(rows, ways_out, strict=True) if way + offset <= 4 * typical]
    deliver, per_row = nnls([row for row, _ in kept], [way for _, way in kept], [1.0] * len(kept))
    spans = [
        (record.due, looked[event.id][0] - offset - record.due, looked[event.id][1] - offset - record.due)
        for record, event, _ in pairs
    ]
    arrive, busy = way_in(sorted(spans))
    return Door(arrive=arrive, busy=busy, deliver=deliver, per_row=per_row)


def looks(log: Log) -> dict[int, tuple[float, float]]:
    """When the engine looked in vain for each request for the last time, and when it took it.

    It looks between iterations: a request that comes during one has arrived some time before it is taken.
    """
    found = {}
    last_look, previous = 0.0, None
    for event in log.events:
        if isinstance(event, Submitted):
            last_look = event.at
        elif isinstance(event, Arrived):
            did_wait = isinstance(previous, Returned) and event.at - previous.at > 2e-3
            found[event.id] = (event.at - 0.2e-3 if did_wait else last_look, event.at)
        previous = event
    return found


def way_in(spans: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Seconds from due to arrival, and for how long one request shuts the door: what is least often impossible.

    spans: when each request was due, and after how many seconds it had not arrived yet, and had.
    """
    best = (float("inf"), 0.0, 0.0)
    for busy in (i * 0.25e-3 for i in range(24)):
        shut, waited = 0.0, []
        for due, early, late in spans:
            begin = max(due, shut)
            shut = begin + busy
            waited.append((early - (begin - due), late - (begin - due)))
        for arrive in (i * 0.25e-3 for i in range(1, 81)):
            wrong = sum(max(0.0, early - arrive, arrive - late) for early, late in waited)
            best = min(best, (wrong, arrive, busy))
    return best[1], best[2]


def mean_door(doors: Sequence[Door]) -> Door:
    return Door(**{name: statistics.mean(getattr(one, name) for one in doors) for name in Door.__struct_fields__})


def predicted(parts: Sequence[Work], fitted: Fitted, paces: Sequence[Sequence[float]]) -> dict[str, float]:
    """The median of each figure over draws of the noise: one draw is one run, and may be any.

    paces: of each run, by part.
    """
    arrivals = [simulation.arrivals_of(work) for work in parts]
    runs = []
    for seed in range(DRAWS):
        costs = [at_pace(fitted.cost, pace) for pace in paces[seed % len(paces)]]
        pairs = zip(arrivals, costs, strict=True)
        runs.append(figures([simulation.run(part, fitted.config, cost, seed=seed) for part, cost in pairs]))
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def at_pace(cost: CostModel, pace: float) -> CostModel:
    """The same where everything takes `pace` times as long."""
    bands = tuple(Residuals(band.above, tuple(pace * factor for factor in band.factors)) for band in cost.residuals)
    return msgspec.structs.replace(cost, residuals=bands)


def paces_of(logs: Sequence[Log], cost: CostModel) -> list[float]:
    """How long each log's iterations took, all together, beside what the model says; of all logs together it is 1."""
    sums = []
    for log in logs:
        samples = samples_of(log)
        sums.append((sum(seconds for _, seconds in samples), sum(cost.stages[0](of) for of, _ in samples)))
    whole = sum(took for took, _ in sums) / sum(expected for _, expected in sums)
    return [took / expected / whole for took, expected in sums]


def figures(parts: Sequence[Sequence[Record]]) -> dict[str, float]:
    """Of all requests of a run's parts together."""
    records = [record for part in parts for record in part]
    found = {
        title: value
        for title, (name, share) in FIGURES.items()
        if (value := measures.quantile(measures.times(name, records), share)) is not None
    }
    output = sum(record.output_tokens for record in records)
    return found | {"output tokens/s": output / sum(map(measures.wall, parts))}


def row(rate: str, run: int, part: int, record: Record) -> list[object]:
    """[rate, run, part, due, first token, last token, prompt tokens, output tokens] of a request, times in seconds."""
    times = (round(time, 6) for time in (record.due, record.first, record.last))
    return [rate, run, part, *times, record.prompt_tokens, record.output_tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learn", default=LEARN)
    parser.add_argument("--predict", default=PREDICT)
    parser.add_argument("--rates", default="5,20,40")
    parser.add_argument("--parts", type=int, default=3, help="of each of the two runs")
    parser.add_argument("--vocab", type=int, default=3072)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the cost model, the figures and all records")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=["--threads", "1"], help="of `orcaserve serve`")
    arguments = parser.parse_args()
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)

    def work_of(text: str, seed: int) -> Work:
        return spec.make(text, vocab=arguments.vocab, seed=seed)

    works = {
        rate: [
            work_of(arguments.predict.replace("RATE", rate), arguments.seed + 1000 + i) for i in range(arguments.parts)
        ]
        for rate in arguments.rates.split(",")
    }
    turns = [(part, run, rate) for part in range(arguments.parts) for run in range(RUNS) for rate in works]
    pieces = [work_of(arguments.learn, arguments.seed + number) for number in range(len(turns) + 1)]
    logs, doors, raw = [], [], []
    learned: list[list[Record]] = []
    runs: dict[str, list[list[list[Record]]]] = {rate: [[] for _ in range(RUNS)] for rate in works}
    for number, piece in enumerate(pieces):
        print(f"{number} of {len(turns)} parts are measured", file=sys.stderr)
        keep = arguments.out / f"learned-{number}.jsonl" if arguments.out else None
        records, log = measure(piece, arguments.serve, arguments.vocab, keep)
        logs.append(log)
        doors.append(door(records, log))
        learned.append(records)
        raw += [row("learned", 0, number, record) for record in records]
        if number < len(turns):
            part, run, rate = turns[number]
            records = measure(works[rate][part], arguments.serve, arguments.vocab)[0]
            runs[rate][run].append(records)
            raw += [row(rate, run, part, record) for record in records]
    cost = msgspec.structs.replace(fit(logs, "the learning runs"), door=mean_door(doors))
    fitted = Fitted(cost=cost, config=logs[0].header.config, model=logs[0].header.model, machine=logs[0].header.machine)
    around = dict(zip(turns, map(statistics.mean, itertools.pairwise(paces_of(logs, cost))), strict=True))
    paces = {
        rate: [[around[part, run, rate] for part in range(arguments.parts)] for run in range(RUNS)] for rate in works
    }
    table = []
    print("| rate | pace | figure | predicted | real runs | error | spread of the runs |")
    print("|---|---|---|---|---|---|---|")
    for rate, parts in works.items():
        seen = [figures(run) for run in runs[rate]]
        shown_paces = "; ".join(" ".join(f"{pace:.2f}" for pace in run) for run in paces[rate])
        for name, value in predicted(parts, fitted, paces[rate]).items():
            real = [run[name] for run in seen]
            middle = statistics.mean(real)
            error, spread = value / middle - 1, (max(real) - min(real)) / middle
            shown = " / ".join(f"{one:.4g}" for one in real)
            print(f"| {rate} | {shown_paces} | {name} | {value:.4g} | {shown} | {error:+.1%} | {spread:.1%} |")
            table.append({"rate": rate, "figure": name, "predicted": value, "real": real, "paces": paces[rate]})
    if arguments.out:
        (arguments.out / "cost.json").write_bytes(msgspec.json.format(msgspec.json.encode(fitted)))
        (arguments.out / "predictions.json").write_text(json.dumps(table, indent=2))
        (arguments.out / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in raw))


if __name__ == "__main__":
    main()
