"""The command `orcaserve simulate`: a workload on an engine that need not exist, in virtual time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from orcaserve.bench.simulation import Fitted
from orcaserve.cli_itl import max_itl_option
from orcaserve.cli_policy import POLICY_HELP, PolicyName
from orcaserve.cli_size import Size
from orcaserve.core.config import ModelError
from orcaserve.core.pace import LEAST_SHARE
from orcaserve.core.policy import DEFAULT, parse_policy
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.engine import step_log
from orcaserve.engine.step_log import Header, Log, StepLog
from orcaserve.sim.cost import CostModel
from orcaserve.sim.hardware import HARDWARE, Parallel, derive, hardware, kv_tokens

_VOCAB = 151936
_BLOCK = 16


def read_logs(path: Path) -> list[Log]:
    """A step log's lives. Ends the program with one line if it is none."""
    try:
        return step_log.read(path.read_bytes())
    except OSError as error:
        raise click.ClickException(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise click.ClickException(f"{path} is no step log: {error}") from None


def read_last_log(path: Path) -> Log:
    """A step log's last life. Says so if there are earlier ones, which nobody asked to leave out."""
    *earlier, last = read_logs(path)
    if earlier:
        click.echo(f"{path}: taken is the last engine's life; {len(earlier)} before it are left out.", err=True)
    return last


def read_fitted(path: Path) -> Fitted:
    """What `simulate fit` wrote. Ends the program with one line if it is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Fitted)
    except OSError as error:
        raise click.ClickException(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise click.ClickException(f"{path} is no cost model; make one with orcaserve simulate fit: {error}") from None


@click.group(invoke_without_command=True)
@click.option("--workload", "spec", metavar="SPEC", help="As of bench serve; orcaserve bench serve --help explains.")
@click.option("--log", "log", type=click.Path(path_type=Path), help="Or the requests of a step log.")
@click.option("--cost", "cost", type=click.Path(path_type=Path), help="A cost model that simulate fit wrote.")
@click.option("--hardware", "on", metavar="NAME", help=f"Or data sheets: {', '.join(HARDWARE)}.")
@click.option("--model", "shape", metavar="SHAPE", help="13B, 101B, 175B, 341B (Orca's), or a Hugging Face folder.")
@click.option("--tensor-parallel", type=click.IntRange(1), default=1, show_default=True, help="Devices of a stage.")
@click.option("--pipeline-parallel", type=click.IntRange(1), default=1, show_default=True, help="Stages of an engine.")
@click.option("--policy", type=PolicyName(), help=f"{POLICY_HELP} Default: as recorded, or default.")
@click.option("--max-batch-size", type=click.IntRange(1), help="Default: as recorded, or 64.")
@click.option("--max-batch-tokens", type=click.IntRange(1), help="Default: as recorded, or 512.")
@max_itl_option("Default: as recorded, or no limit. 0: no limit.")
@click.option("--blocks", type=click.IntRange(1), help="KV blocks of 16 tokens. Default: as recorded, or what fits.")
@click.option("--kv-memory", metavar="SIZE", help="Or bytes for KV, of all devices together: 24MiB, 4GiB.")
@click.option("--replicas", type=click.IntRange(1), default=1, show_default=True, help="Engines, in turn.")
@click.option("--slo", metavar="ttft=1.0,tpot=0.1", help="Limits, as of bench serve: goodput.")
@click.option("--noise/--no-noise", default=True, show_default=True, help="Draw from what the fit left unexplained.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of all that is drawn.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder: report.json, requests.jsonl.")
@click.option(
    "--step-log",
    "step_log_path",
    metavar="FILE",
    help="Write down every iteration, as serve does, for orcaserve explain. With replicas: FILE.0, …",
)
@click.pass_context
def simulate(context: click.Context, **options: Any) -> None:
    """Run a workload through the real scheduler on a virtual clock, and report what bench serve would.

    Iterations take what a cost model says: one fitted to a step log (--cost), or one derived from data sheets
    (--hardware and --model). Without a subcommand this simulates.
    """
    if context.invoked_subcommand is None:
        _simulate(**options)


def _simulate(
    spec: str | None,
    log: Path | None,
    cost: Path | None,
    on: str | None,
    shape: str | None,
    replicas: int,
    slo: str | None,
    noise: bool,
    seed: int,
    out: Path | None,
    step_log_path: str | None,
    **options: Any,
) -> None:
    from rich.console import Console

    from orcaserve.bench import load_report, simulation
    from orcaserve.bench.measures import limits_from
    from orcaserve.bench.workloads import spec as specs
    from orcaserve.serve.replicas import step_logs

    if (spec is None) == (log is None):
        raise click.UsageError("give the requests: either --workload or --log")
    if (cost is None) == (on is None or shape is None) or (cost is not None and (on or shape)):
        raise click.UsageError("give the costs: either --cost, or --hardware and --model")
    if cost is not None and (options["tensor_parallel"], options["pipeline_parallel"]) != (1, 1):
        name = "--tensor-parallel" if options["tensor_parallel"] != 1 else "--pipeline-parallel"
        raise click.UsageError(f"--cost is of the devices that it was fitted to; {name} goes with --hardware")
    if options["blocks"] is not None and options["kv_memory"] is not None:
        raise click.UsageError("give the KV cache once: either --blocks or --kv-memory")
    logged = None if log is None else read_last_log(log)
    try:
        limits = limits_from(slo) if slo else {}
        model, config = _engine(cost, on, shape, logged, options)
        if not noise:
            model = msgspec.structs.replace(model, residuals=())
        if logged is None:
            arrivals = simulation.arrivals_of(specs.make(spec or "", vocab=_VOCAB, seed=seed))
        else:
            arrivals = simulation.arrivals_of_log(logged)
        header = Header(config=config, machine=f"simulated: {model.made_from or cost}")
        written = [bytearray() for _ in range(replicas if step_log_path else 0)]
        witnesses = [StepLog(header, lines.extend) for lines in written]
        records = simulation.run(arrivals, config, model, seed=seed, replicas=replicas, witnesses=witnesses)
        for path, lines in zip(step_logs(step_log_path, replicas), written, strict=False):
            Path(path or "").write_bytes(lines)
        if out is not None:
            what: dict[str, object] = {"requests": spec or str(log), "replicas": replicas, "seed": seed}
            simulation.write(records, limits, what | {"config": config, "cost": model}, out)
    except (ValueError, ModelError) as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from None
    load_report.show_figures(records, limits, Console())
    click.echo(
        f"Simulated: {model.made_from or cost}; policy {config.policy.name}, at most {config.max_batch_size} requests "
        f"an iteration, {config.num_blocks} KV blocks of {config.block_size}, {replicas} replicas."
    )


def _engine(
    cost: Path | None, on: str | None, shape: str | None, logged: Log | None, options: dict[str, Any]
) -> tuple[CostModel, SchedulerConfig]:
    """The cost model and the scheduler's configuration that the options ask for."""
    base: SchedulerConfig | None = logged.header.config if logged else None
    if cost is not None:
        fitted = read_fitted(cost)
        model, base, sizes = fitted.cost, base or fitted.config, fitted.model
        blocks = base.num_blocks
    else:
        from orcaserve.model.shape import read_shape

        device, sizes = hardware(on or ""), read_shape(shape or "")
        parallel = Parallel(options["tensor_parallel"], options["pipeline_parallel"])
        model = derive(device, sizes, parallel)
        blocks = kv_tokens(device, sizes, parallel) // (base.block_size if base else _BLOCK)
    block_size = base.block_size if base else _BLOCK
    if options["blocks"] is not None:
        blocks = options["blocks"]
    elif options["kv_memory"] is not None:
        num_bytes = Size().convert(options["kv_memory"], None, None)
        if sizes is None or num_bytes is None:
            raise ValueError("--kv-memory needs a size, and a model whose shape is known; give --blocks")
        blocks = num_bytes // (sizes.kv_bytes_per_token * block_size)
    if blocks < 1:
        raise ValueError("no KV block fits: give more memory")
    max_batch_size = options["max_batch_size"] or (base.max_batch_size if base else 64)
    wished = options["max_batch_tokens"] or (base.max_batch_tokens if base else 512)
    policy = parse_policy(options["policy"]) if options["policy"] else base.policy if base else DEFAULT
    max_itl, prompt_share = options["max_itl"] or None, LEAST_SHARE
    if options["max_itl"] is None and base and policy.cuts_prompts:
        max_itl, prompt_share = base.max_itl, base.prompt_share
    config = SchedulerConfig(
        policy=policy,
        max_batch_size=max_batch_size,
        max_batch_tokens=max(wished, max_batch_size),
        num_blocks=blocks,
        block_size=block_size,
        depth=len(model.stages),
        max_itl=max_itl,
        prompt_share=prompt_share,
        swap=base.swap if base else None,
    )
    return model, config


@simulate.command("fit")
@click.argument("logs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The cost model, as JSON.")
def fit_command(logs: tuple[Path, ...], out: Path) -> None:
    """Fit a cost model to step LOGS of one engine (orcaserve serve --step-log FILE)."""
    from orcaserve.sim.fit import fit

    lives = [life for path in logs for life in read_logs(path)]
    header = lives[-1].header
    made_from = f"fitted to {', '.join(path.name for path in logs)} ({header.machine}, {header.threads} threads)"
    try:
        cost = fit(lives, made_from)
        fitted = Fitted(cost=cost, config=header.config, model=header.model, machine=header.machine)
        out.write_bytes(msgspec.json.format(msgspec.json.encode(fitted)))
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{out} cannot be written: {error.strerror}") from None
    stage = cost.stages[0]
    for name in stage.__struct_fields__:
        if value := getattr(stage, name):
            click.echo(f"{name:15} {value * 1e6:12.4f} µs")
    click.echo(f"{'turn':15} {cost.turn * 1e6:12.4f} µs, and {cost.turn_per_row * 1e6:.4f} a row")
    for band in cost.residuals:
        p10, p50, p90 = (band.factors[int(share * (len(band.factors) - 1))] for share in (0.1, 0.5, 0.9))
        click.echo(f"from {band.above:.6f} s on, observed over predicted: {p10:.3f} … {p50:.3f} … {p90:.3f}")


@simulate.command("replay")
@click.argument("log", type=click.Path(path_type=Path))
def replay_command(log: Path) -> None:
    """Give what a step LOG recorded to the scheduler again, and say whether it makes the same batches."""
    from orcaserve.sim.replay import ReplayError, replay

    count = 0
    for number, life in enumerate(read_logs(log), 1):
        try:
            count += len(replay(life))
        except (ReplayError, ValueError, RuntimeError) as error:
            raise click.ClickException(f"{log}, engine {number}: {error}") from None
    click.echo(f"{count} batches, every one as recorded")


def _requests(spec: str | None, log: Path | None, seed: int) -> Any:
    """Arrivals of a workload's text or of a step log."""
    from orcaserve.bench import simulation
    from orcaserve.bench.workloads import spec as specs

    if (spec is None) == (log is None):
        raise click.UsageError("give the requests: either --workload or --log")
    if spec is not None:
        return simulation.arrivals_of(specs.make(spec, vocab=_VOCAB, seed=seed))
    return simulation.arrivals_of_log(read_last_log(log or Path()))


def _numbers(context: click.Context, param: click.Parameter, text: str) -> list[int]:
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"{text!r} is no list of whole numbers from 1, as 1,2,4 is")
    return numbers


@simulate.command("plan")
@click.option("--workload", "spec", metavar="SPEC", help="As of bench serve.")
@click.option("--log", "log", type=click.Path(path_type=Path), help="Or the requests of a step log.")
@click.option("--slo", required=True, metavar="ttft=1.0,tpot=0.1", help="Limits in seconds, as of bench serve.")
@click.option("--prices", required=True, type=click.Path(path_type=Path), help="TOML or JSON: hardware = per hour.")
@click.option("--model", "shape", required=True, metavar="SHAPE", help="As of simulate: 13B, or a folder.")
@click.option(
    "--tensor-parallel",
    "tensor",
    default="1,2,4,8",
    show_default=True,
    callback=_numbers,
    help="Devices that share every layer; all of the list are tried.",
)
@click.option(
    "--pipeline-parallel",
    "pipeline",
    default="1",
    show_default=True,
    callback=_numbers,
    help="Stages; all of the list are tried.",
)
@click.option(
    "--max-batch-size",
    "batches",
    default="32,128",
    show_default=True,
    callback=_numbers,
    help="Requests in an iteration; all of the list are tried.",
)
@click.option(
    "--policy",
    "policies",
    type=PolicyName(),
    multiple=True,
    default=("default",),
    show_default=True,
    help="May be given several times; all are tried.",
)
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Of the requests, that has to meet the limits.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of all that is drawn.")
@click.option("--figure", type=click.Path(dir_okay=False, path_type=Path), help="Also draw it: a PNG.")
def plan_command(
    spec: str | None,
    log: Path | None,
    slo: str,
    prices: Path,
    shape: str,
    tensor: list[int],
    pipeline: list[int],
    batches: list[int],
    policies: tuple[str, ...],
    share: float,
    seed: int,
    figure: Path | None,
) -> None:
    """Find the cheapest devices, and how to use them, for a workload within limits.

    Every hardware of the price table is tried with every tensor and pipeline parallelism, batch size and policy; each
    with the fewest replicas that let --share of the requests meet the limits. Costs come from data sheets.
    """
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from orcaserve.bench import planner
    from orcaserve.bench.measures import limits_from
    from orcaserve.bench.report import number
    from orcaserve.model.shape import read_shape

    try:
        limits, table = limits_from(slo), planner.read_prices(prices)
        arrivals = _requests(spec, log, seed)
        among = list(planner.candidates(list(table), tensor, pipeline, batches, policies))
        sizes = read_shape(shape)
        bar = iter(track(range(len(among)), "simulate", console=Console(stderr=True), transient=True))
        next(bar, None)
        choices = planner.choose(
            arrivals,
            sizes,
            limits,
            table,
            among,
            share=share,
            seed=seed,
            on_candidate=lambda: void(next(bar, None)),
        )
        if figure is not None:
            planner.draw(choices, figure)
    except (ValueError, ModelError) as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from None
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("per hour", "replicas", "hardware", "parallel", "batch", "policy", "within", "TTFT p99", "TPOT p99"):
        shown.add_column(name)
    for choice in choices:
        of = choice.candidate
        shown.add_row(
            number(choice.price),
            str(choice.replicas or "—"),
            of.hardware,
            str(of.parallel),
            str(of.max_batch_size),
            of.policy,
            "—" if choice.met is None else f"{choice.met:.1%}",
            *((number(choice.ttft_p99), number(choice.tpot_p99)) if not choice.why else (choice.why, "")),
        )
    Console(width=None if Console().is_terminal else 160).print(shown)
    if not choices or choices[0].price is None:
        raise click.ClickException("nothing meets the limits; try more devices, smaller batches or weaker limits")
    click.echo(f"The cheapest: {choices[0].replicas} x ({choices[0].candidate}), {choices[0].price:.2f} an hour.")


def void(_: object) -> None:
    """Drops a value."""


@simulate.command("fleet")
@click.option("--azure", "trace", required=True, type=click.Path(path_type=Path), help="A trace of Azure, as CSV.")
@click.option("--hourly", type=click.FloatRange(1), default=1e6, show_default=True, help="Requests of all engines.")
@click.option("--devices", type=click.IntRange(1), default=10000, show_default=True, help="Of the whole fleet.")
@click.option("--sampled", type=click.IntRange(1), default=8, show_default=True, help="Engines that are simulated.")
@click.option("--hardware", "on", required=True, metavar="NAME", help=f"One of {', '.join(HARDWARE)}.")
@click.option("--model", "shape", required=True, metavar="SHAPE", help="As of simulate: 13B, or a folder.")
@click.option("--tensor-parallel", type=click.IntRange(1), default=1, show_default=True, help="Devices of a stage.")
@click.option("--pipeline-parallel", type=click.IntRange(1), default=1, show_default=True, help="Stages of an engine.")
@click.option("--max-batch-size", type=click.IntRange(1), default=64, show_default=True, help="Requests.")
@click.option("--policy", type=PolicyName(), default="default", show_default=True, help=POLICY_HELP)
@click.option("--seed", type=int, default=0, show_default=True, help="Of all that is drawn.")
def fleet_command(
    trace: Path,
    hourly: float,
    devices: int,
    sampled: int,
    on: str,
    shape: str,
    tensor_parallel: int,
    pipeline_parallel: int,
    max_batch_size: int,
    policy: str,
    seed: int,
) -> None:
    """Simulate a fleet behind a router that deals at random, from a sample of its engines, with the error that has."""
    from rich.console import Console
    from rich.progress import track

    from orcaserve.bench import fleet
    from orcaserve.bench.workloads import traces
    from orcaserve.model.shape import read_shape

    try:
        rows = traces.azure(trace)
        device, sizes, parallel = hardware(on), read_shape(shape), Parallel(tensor_parallel, pipeline_parallel)
        slots = kv_tokens(device, sizes, parallel)
        if parallel.devices > devices:
            raise ValueError(f"{devices} devices make no engine of {parallel.devices}")
        of = fleet.Fleet(devices // parallel.devices, hourly, min(sampled, devices // parallel.devices), seed)
        config = SchedulerConfig(
            policy=parse_policy(policy),
            max_batch_size=max_batch_size,
            max_batch_tokens=max(512, max_batch_size),
            num_blocks=max(1, slots // _BLOCK),
            block_size=_BLOCK,
            depth=parallel.pipeline,
        )
        bar = iter(track(range(of.sampled), "simulate", console=Console(stderr=True), transient=True))
        next(bar, None)
        engines = fleet.simulate(rows, of, config, derive(device, sizes, parallel), lambda: void(next(bar, None)))
        found = fleet.estimates(engines, seed)
    except (ValueError, ModelError) as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from None
    count = sum(map(len, engines))
    click.echo(
        f"{of.engines} engines of {parallel.devices} x {on} ({parallel}), {hourly:g} requests an hour; {of.sampled} "
        f"engines simulated, with {count} requests; seconds, and 95 % intervals of the sample"
    )
    for one in found:
        click.echo(f"{one.name:15} {one.value:10.4f}   {one.low:.4f} … {one.high:.4f}")
