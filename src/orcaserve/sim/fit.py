"""`fit`: a cost model from a step log: least squares of relative errors, terms at least 0, outliers held back.

Plain Python: the system has some eight unknowns whatever the log's length, so that only its sums are long.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from orcaserve.engine.step_log import Arrived, Left, Log, Returned, Submitted
from orcaserve.sim.cost import CostModel, Residuals, Size, StageCost, size_of

HUBER = 1.345  # spreads from which on a residual counts by its size, not its square: 95 % efficient on normal noise
ROUNDS = 4
KNEES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
BANDS = 6
KEPT = 100  # residuals of a band that stand for all
FEWEST = 20

Sample = tuple[Size, float]


def samples_of(log: Log) -> list[Sample]:
    """What each iteration held, and its seconds. Those that began with copies are left out: no term is for them."""
    found: list[Sample] = []
    flying: list[Submitted] = []
    for event in log.events:
        if isinstance(event, Submitted):
            flying.append(event)
        elif isinstance(event, Returned) and flying:
            flown = flying.pop(0)
            if not flown.swaps:
                rows = [(start, count, samples) for _, start, count, samples in flown.rows]
                found.append((size_of(rows), event.seconds))
    return found


def turns_of(log: Log) -> list[tuple[int, float]]:
    """Rows of each iteration that followed another one without a wait, and the host's seconds between the two."""
    found = []
    budget: dict[int, int] = {}
    flying: list[Submitted] = []
    last: float | None = None  # when the last result came back, if somebody was left then
    for event in log.events:
        if isinstance(event, Arrived):
            budget[event.id] = event.max_tokens - event.done
        elif isinstance(event, Left):
            budget.pop(event.id, None)
        elif isinstance(event, Submitted):
            if last is not None:
                found.append((len(event.rows), event.at - last))
            flying.append(event)
        elif isinstance(event, Returned) and flying:
            for id, _, _, samples in flying.pop(0).rows:
                if samples and id in budget:
                    budget[id] -= 1
                    if budget[id] <= 0:
                        del budget[id]
            for id in (*event.stopped, *event.failed):
                budget.pop(id, None)
            last = event.at if budget else None
    return found


def fit(logs: Sequence[Log], made_from: str = "") -> CostModel:
    """The cost model of an engine that ran these logs on one device. ValueError if they tell too little."""
    if any(log.header.config.depth > 1 for log in logs):
        raise ValueError("a log with several batches in flight does not tell what one costs: record with depth 1")
    samples = [sample for log in logs for sample in samples_of(log) if sample[1] > 0]
    if len(samples) < FEWEST:
        raise ValueError(f"{len(samples)} iterations are too few to fit a cost model: record at least {FEWEST}")
    turns = [turn for log in logs for turn in turns_of(log)]
    turn, turn_per_row = _host(turns)
    return msgspec.structs.replace(fit_stages([samples]), turn=turn, turn_per_row=turn_per_row, made_from=made_from)


def fit_stages(samples: Sequence[Sequence[Sample]]) -> CostModel:
    """The cost model of the stages that took so long, without the host's time; ValueError if one tells nothing."""
    stages = tuple(fit_stage(own) for own in samples)
    pairs = [(stage(of), seconds) for stage, own in zip(stages, samples, strict=True) for of, seconds in own]
    return CostModel(stages=stages, residuals=_residuals(pairs))


def _residuals(pairs: list[tuple[float, float]]) -> tuple[Residuals, ...]:
    """What predictions do not explain of seconds, in bands of equally many iterations."""
    pairs = sorted(pair for pair in pairs if pair[0] > 0)
    count = max(1, min(BANDS, len(pairs) // FEWEST))
    bands = []
    for number in range(count):
        own = pairs[number * len(pairs) // count : (number + 1) * len(pairs) // count]
        factors = sorted(seconds / predicted for predicted, seconds in own)
        if len(factors) > KEPT:
            factors = [factors[(2 * i + 1) * len(factors) // (2 * KEPT)] for i in range(KEPT)]
        bands.append(Residuals(own[0][0] if number else 0.0, tuple(factors)))
    return tuple(bands)


def fit_stage(samples: Sequence[Sample]) -> StageCost:
    """The stage whose terms explain these iterations best. The roofline's knee is tried out, all else is solved for."""
    # A long log says the same again and again: an even choice of it is enough.
    step = -(-len(samples) // 4000)
    chosen = samples[::step]
    most = max(of.tokens for of, _ in chosen)
    best: tuple[float, StageCost] | None = None
    for knee in KNEES:
        if knee > most:
            break
        loss, stage = _fit_with(chosen, knee)
        if best is None or loss < best[0] * (1 - 1e-9):
            best = loss, stage
    if best is None:
        raise ValueError("no iteration to fit a cost model to")
    return best[1]


def _fit_with(samples: Sequence[Sample], knee: int) -> tuple[float, StageCost]:
    """The fit for linear maps that wait for their weights up to `knee` tokens; and its loss, the less the better."""
    rows = [_features(of, knee) for of, _ in samples]
    seconds = [time for _, time in samples]
    weights = [1.0] * len(rows)
    coefficients: list[float] = []
    spread = 0.0
    errors: list[float] = []
    for _ in range(ROUNDS):
        # Relative errors: a decode of a millisecond says as much as a prefill of a second.
        scaled = [[value / time for value in row] for row, time in zip(rows, seconds, strict=True)]
        coefficients = nnls(scaled, [1.0] * len(rows), weights)
        errors = [sum(map(_times, coefficients, row)) - 1.0 for row in scaled]
        spread = 1.4826 * statistics.median(map(abs, errors)) + 1e-9
        weights = [1.0 if abs(error) <= HUBER * spread else HUBER * spread / abs(error) for error in errors]
    loss = sum(min(abs(error), 3 * spread + 0.05) ** 2 for error in errors)
    fixed, linear, per_row, context, attended, head, per_sample = coefficients
    stage = StageCost(
        fixed=fixed,
        weights=knee * linear,
        per_token=linear,
        per_row=per_row,
        per_context=context,
        per_attended=attended,
        head=head,
        per_sample=per_sample,
    )
    return loss, stage


def _times(a: float, b: float) -> float:
    return a * b


def _features(of: Size, knee: int) -> list[float]:
    return [
        1.0,
        max(of.tokens, knee),
        of.rows,
        of.context,
        of.attended,
        1.0 if of.samples else 0.0,
        of.samples,
    ]


def _host(turns: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Seconds before an iteration, and so much per row: medians, since a garbage collection is not the rule."""
    if len(turns) < FEWEST:
        return 0.0, 0.0
    typical = statistics.median(seconds for _, seconds in turns)
    kept = [(rows, seconds) for rows, seconds in turns if 0 < seconds <= 5 * typical]
    if not kept:
        return 0.0, 0.0
    fixed, per_row = nnls([[1.0, float(rows)] for rows, _ in kept], [seconds for _, seconds in kept], [1.0] * len(kept))
    return fixed, per_row


def nnls(rows: Sequence[Sequence[float]], wanted: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Coefficients from 0 on with the least weighted squares of rows x coefficients - wanted.

    The active-set method of Lawson and Hanson (1974, chapter 23) on the normal equations; a handful of columns.
    """
    count = len(rows[0])
    gram = [[0.0] * count for _ in range(count)]
    right = [0.0] * count
    for row, value, weight in zip(rows, wanted, weights, strict=True):
        for i in range(count):
            if row[i]:
                scaled = weight * row[i]
                right[i] += scaled * value
                line = gram[i]
                for j in range(i, count):
                    line[j] += scaled * row[j]
    for i in range(count):
        for j in range(i):
            gram[i][j] = gram[j][i]
    # Columns differ by orders of magnitude: each is brought to length 1.
    scale = [gram[i][i] ** -0.5 if gram[i][i] > 0 else 0.0 for i in range(count)]
    gram = [[gram[i][j] * scale[i] * scale[j] for j in range(count)] for i in range(count)]
    right = [right[i] * scale[i] for i in range(count)]
    x = [0.0] * count
    passive: list[int] = []
    for _ in range(10 * count):
        slope = [right[i] - sum(gram[i][j] * x[j] for j in passive) for i in range(count)]
        free = [i for i in range(count) if i not in passive and slope[i] > 1e-10 * (abs(right[i]) + 1e-30)]
        if not free:
            break
        passive.append(max(free, key=lambda i: slope[i]))
        while True:
            trial = _solve([[gram[i][j] for j in passive] for i in passive], [right[i] for i in passive])
            below = [(x[i] / (x[i] - t), i) for i, t in zip(passive, trial, strict=True) if t <= 0]
            if not below:
                for i, value in zip(passive, trial, strict=True):
                    x[i] = value
                break
            reach, last = min(below)
            for i, value in zip(passive, trial, strict=True):
                x[i] += reach * (value - x[i])
            x[last] = 0.0
            passive = [i for i in passive if i != last and x[i] > 0]
            if not passive:
                break
    return [x[i] * scale[i] for i in range(count)]


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """A small symmetric system, by elimination with a trace of a ridge, for columns that say the same."""
    count = len(right)
    lines = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(count):
        lines[i][i] += 1e-12
    for i in range(count):
        pivot = max(range(i, count), key=lambda k: abs(lines[k][i]))
        lines[i], lines[pivot] = lines[pivot], lines[i]
        for k in range(i + 1, count):
            factor = lines[k][i] / lines[i][i]
            for j in range(i, count + 1):
                lines[k][j] -= factor * lines[i][j]
    x = [0.0] * count
    for i in reversed(range(count)):
        x[i] = (lines[i][count] - sum(lines[i][j] * x[j] for j in range(i + 1, count))) / lines[i][i]
    return x
