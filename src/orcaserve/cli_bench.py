"""The commands `orcaserve bench …`: servers, kernels and the paper's experiments, measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from orcaserve.bench.gpu import SECTIONS
from orcaserve.bench.paper import PARTS
from orcaserve.bench.workloads.spec import explained
from orcaserve.cli_policy import PolicyName
from orcaserve.core.config import KVDtype, ModelError, Quantization


@click.group()
def bench() -> None:
    """Measure servers that are running, and the kernels of this machine."""


@bench.command()
@click.option("--server", "servers", multiple=True, required=True, metavar="NAME=URL[#MODEL]", help="Once for each.")
@click.option("--offline", "commands", multiple=True, metavar="NAME=COMMAND", help="An engine without a server.")
@click.option("--works", default="decode,trace,poisson", show_default=True, help="Also one by one: decode-4.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Each in turn.")
@click.option("--requests", type=click.IntRange(1), default=32, show_default=True, help="Of trace and poisson.")
@click.option(
    "--rate",
    "rates",
    type=click.FloatRange(0, min_open=True),
    multiple=True,
    default=(0.63, 1.26),
    show_default=True,
    help="Of poisson, in requests a second.",
)
@click.option("--vocab", type=click.IntRange(200), default=151936, show_default=True, help="Token ids lie below it.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of lengths, arrivals and prompts.")
@click.option("--concurrency", "limits", multiple=True, metavar="NAME=16", help="For servers that need a limit.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for report.md, .json and .png.")
def compare(
    servers: tuple[str, ...],
    commands: tuple[str, ...],
    works: str,
    rounds: int,
    requests: int,
    rates: tuple[float, ...],
    vocab: int,
    seed: int,
    limits: tuple[str, ...],
    out: Path | None,
) -> None:
    """Give running OpenAI-compatible servers the same works in turn; the first is the one to compare with.

    decode: 1, 4 and 16 requests at once, 32 tokens in, 128 out. trace: requests as in Orca's paper, all at once.
    poisson: such requests at random times, so many a second (--rate, may be given several times).
    An engine without a server takes part by a command that reads works and writes times (docs/benchmarks.md).
    """
    from rich.console import Console

    from orcaserve.bench import report, workloads
    from orcaserve.bench.client import BenchError, servers_from
    from orcaserve.bench.compare import Plan, run
    from orcaserve.bench.offline import offline_from

    try:
        named = (*servers_from(servers, limits), *offline_from(commands, servers))
        names = workloads.names(works.split(","), rates)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    plan = Plan(named, tuple(names), rounds=rounds, requests=requests, vocab=vocab, seed=seed)
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        found = run(plan, out, Console(stderr=True))
    except (BenchError, OSError) as error:
        raise click.ClickException(str(error)) from None
    report.show(found, Console())
    if report.problems(found):
        raise click.ClickException("the comparison is flawed; the lines above say where")


@bench.command("serve", epilog="\b\n" + "\n".join(explained()))
@click.option("--url", required=True, metavar="URL[#MODEL]", help="A running server.")
@click.option("--workload", "spec", required=True, metavar="SPEC", help="What to send it; see below.")
@click.option(
    "--slo", metavar="ttft=1.0,tpot=0.1", help="Limits in seconds, also of itl, latency, normalised: goodput."
)
@click.option("--warm-up", type=click.IntRange(0), default=1, show_default=True, help="Requests that do not count.")
@click.option(
    "--timeout",
    "silence",
    type=click.FloatRange(0, min_open=True),
    default=600,
    show_default=True,
    help="Seconds without a byte after which a reply has failed.",
)
@click.option("--api-key", help="If the server wants one.")
@click.option("--vocab", type=click.IntRange(200), default=151936, show_default=True, help="Token ids lie below it.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of lengths, arrivals and prompts.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for reports and requests.jsonl.")
def bench_serve(
    url: str,
    spec: str,
    slo: str | None,
    warm_up: int,
    silence: float,
    api_key: str | None,
    vocab: int,
    seed: int,
    out: Path | None,
) -> None:
    """Put a workload on a running OpenAI-compatible server and report latencies, throughput and goodput.

    Requests are sent when they are due, whatever has been answered. --timeout is how many seconds a reply may be
    silent. Ctrl-C reports what there is.

    SPEC is KIND:key=value,key=value; several joined by " + " run together.
    """
    from rich.console import Console

    from orcaserve.bench import load_report
    from orcaserve.bench.client import BenchError, server_from
    from orcaserve.bench.load import Plan, run
    from orcaserve.bench.measures import limits_from
    from orcaserve.bench.workloads import spec as specs

    try:
        server, limits = server_from("server", url), limits_from(slo) if slo else {}
        work = specs.make(spec, vocab=vocab, seed=seed)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        raise click.ClickException(str(error)) from None
    plan = Plan(server, work, limits, warm_up, vocab, seed, silence, api_key)
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        found = run(plan, out, Console(stderr=True))
    except (BenchError, OSError) as error:
        raise click.ClickException(str(error)) from None
    load_report.show(found, Console())
    if found.is_interrupted:
        sys.exit(130)  # as shells say of Ctrl-C
    if all(record.error for record in found.records):
        raise click.ClickException("no request was answered; the lines above say why")


@bench.command()
@click.option("--shape", default="qwen3-0.6b", show_default=True, help="Or llama-3.1-8b.")
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True, help="Of the weights."
)
@click.option("--quantization", type=click.Choice(["none", "int8", "int4"]), default="none", help="Of our weights.")
@click.option("--kv-cache-dtype", "kv_dtype", type=click.Choice(["auto", "int8"]), default="auto", help="Of our KV.")
@click.option("--kernels", "isa", metavar="ISA", help="An instruction set: avx2, portable, …; default: the best.")
@click.option("--threads", type=click.IntRange(1), help="Default: all the process may use.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Of each measurement.")
@click.option("--quick", is_flag=True, help="Fewer rows, smaller copies, shorter times: to see that it works.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for kernels.md, .json and .png.")
def kernels(
    shape: str,
    dtype: str,
    quantization: Quantization,
    kv_dtype: KVDtype,
    isa: str | None,
    threads: int | None,
    rounds: int,
    quick: bool,
    out: Path | None,
) -> None:
    """Measure our kernels beside torch's operators, against the memory's bandwidth and the peak of products.

    Every kernel of a layer at the sizes of a real model, with 1 to 512 rows; takes minutes, and the machine to itself.
    """
    from datetime import UTC, datetime

    from rich.console import Console

    from orcaserve.bench import kernel_report
    from orcaserve.bench.kernels import SHAPES
    from orcaserve.bench.report import Machine

    if shape not in SHAPES:
        raise click.UsageError(f"no shape is called {shape}; there are {', '.join(SHAPES)}")
    machine, date = Machine.this(), f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"

    import torch

    from orcaserve.ops.benchmark import FULL, QUICK, Benchmark
    from orcaserve.ops.native_kernels import instruction_sets

    if not (known := instruction_sets()):
        raise click.ClickException("no native kernels to measure: OrcaServe was installed without a C++ compiler")
    if isa is not None and isa not in known:
        raise click.ClickException(f"this machine has no kernels for {isa}; there are {', '.join(known)}")
    isa, threads = isa or known[0], threads or machine.cores
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    effort = QUICK if quick else FULL
    benchmark = Benchmark(
        *(SHAPES[shape], getattr(torch, dtype), threads, isa, effort), quantization=quantization, kv_dtype=kv_dtype
    )
    samples = benchmark.samples(rounds)
    found = kernel_report.Report(
        date=date,
        machine=machine,
        shape=SHAPES[shape],
        dtype=dtype,
        isa=isa,
        threads=threads,
        torch=str(torch.__version__),
        is_quick=quick,
        bandwidth=benchmark.bandwidth.name,
        peak=benchmark.peak.name,
        works=benchmark.works,
        samples=kernel_report.watched(samples, benchmark.num_samples(rounds), Console(stderr=True)),
        quantization=quantization,
        kv_dtype=kv_dtype,
    )
    kernel_report.show(found, Console())
    if out is not None:
        kernel_report.save(found, out)


@bench.command("gpu")
@click.option("--only", metavar="SECTION[,…]", help=f"Of {', '.join(SECTIONS)}; default: all.")
@click.option("--tiny", is_flag=True, help="A small run, also without a GPU: to see that it works.")
@click.option(
    "--draw",
    "drawn",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="GPU.JSON",
    help="Only draw the figure of what was measured before.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for gpu.md and gpu.json.")
def bench_gpu(only: str | None, tiny: bool, drawn: Path | None, out: Path | None) -> None:
    """Measure what a GPU can do, and how near our kernels and the whole engine come to it.

    Models are made on the spot, with random weights. Takes minutes, and the GPU to itself. What is measured is printed
    and written at once, so that a run may be cut short. --draw measures nothing: it draws the figure of such a file,
    and puts it on the page beside it.
    """
    from orcaserve.bench.gpu import report
    from orcaserve.bench.gpu.run import run

    if drawn is not None:
        try:
            from orcaserve.bench.gpu.draw import draw
        except ImportError:
            raise click.ClickException("the figure needs matplotlib: pip install 'orcaserve[plots]'") from None
        try:
            found = report.read(drawn)
            draw(found, drawn.with_name(report.FIGURE))
        except ValueError as error:
            raise click.ClickException(f"{drawn} cannot be drawn: {error}") from None
        report.write(found, drawn.parent)
        return
    wanted = only.split(",") if only else list(SECTIONS)
    if unknown := [name for name in wanted if name not in SECTIONS]:
        raise click.UsageError(f"there is no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    try:
        from orcaserve.executors.gpu_bench.sections import sections
    except ImportError as error:
        raise click.ClickException(f"the GPU's kernels need Triton: pip install 'orcaserve[gpu]' ({error})") from None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    try:
        found, measures = sections([name for name in SECTIONS if name in wanted], tiny)
    except ModelError as error:
        raise click.ClickException(str(error)) from None
    run(found, measures, out, click.echo)
    if report.problems(found):
        raise click.ClickException("not all went well; the lines above say where")


@bench.command("paper")
@click.argument("model", required=False)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the report.")
@click.option("--quick", is_flag=True, help="Fewer points, fewer and shorter requests: minutes, not half an hour.")
@click.option("--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="Only these; default: all.")
@click.option("--requests", type=click.IntRange(1), help="Of a curve's point; other runs have a multiple.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of lengths, arrivals and prompts.")
@click.option("--threads", type=click.IntRange(1), help="Compute threads; default: all the process may use.")
def bench_paper(
    model: str | None,
    out: Path,
    quick: bool,
    parts: tuple[str, ...],
    requests: int | None,
    seed: int,
    threads: int | None,
) -> None:
    """Run the Orca paper's experiments on this machine, and write a report with figures.

    MODEL is a folder or a name, as for `serve`; by default a small random model of Llama's architecture, made on the
    spot. It runs in this process, without HTTP, and wants the machine to itself.
    """
    import msgspec
    from rich.console import Console

    from orcaserve.bench.client import BenchError
    from orcaserve.bench.paper import lab, report
    from orcaserve.bench.paper import run as paper
    from orcaserve.executors import experiment
    from orcaserve.serve.find_model import find_model
    from orcaserve.worker.process import keep_freed_memory

    try:
        from orcaserve.bench.paper.figures import draw
    except ImportError:
        raise click.ClickException("the figures need matplotlib: pip install 'orcaserve[plots]'") from None
    effort = lab.QUICK if quick else lab.FULL
    if requests is not None:
        effort = msgspec.structs.replace(effort, requests=requests)
    terminal = Console(stderr=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.md").touch()  # better now than after an hour
        if model is None:
            with experiment.random_model() as folder:
                engine = experiment.engine_for(experiment.RANDOM, folder, threads)
        else:
            engine = experiment.engine_for(*find_model(model), threads)
        keep_freed_memory()
        plan = paper.Plan(engine=engine, effort=effort, seed=seed, versions=experiment.versions())
        if parts:
            plan = msgspec.structs.replace(plan, parts=tuple(part for part in PARTS if part in parts))
        found = paper.run(plan, out, draw, terminal)
    except (ModelError, BenchError, OSError) as error:
        raise click.ClickException(str(error)) from None
    report.show(found, Console())
    click.echo(f"The report is {out / 'report.md'}.")


@bench.command("parallel")
@click.argument("model", required=False)
@click.option("--requests", type=click.IntRange(2), default=96, show_default=True, help="Of the trace.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Most requests of a batch.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Each in turn.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of lengths, arrivals and prompts.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="A JSON file for the figures.")
def bench_parallel(model: str | None, requests: int, batch: int, rounds: int, seed: int, out: Path | None) -> None:
    """Set two stages, and two ranks that share layers, beside one rank, each of one thread, without HTTP.

    MODEL is a folder or a name, as for `serve`; by default a small random model of Llama's architecture, made on the
    spot. Wants two cores to itself.
    """
    from contextlib import ExitStack

    from rich.console import Console

    from orcaserve.bench import parallel
    from orcaserve.bench.client import BenchError
    from orcaserve.engine.executor import WorkerLost
    from orcaserve.executors import experiment, join_cost
    from orcaserve.model.config import read_config
    from orcaserve.serve.find_model import find_model

    terminal = Console(stderr=True)
    try:
        with ExitStack() as stack:
            if model is None:
                name, folder = experiment.RANDOM, stack.enter_context(experiment.random_model())
            else:
                name, folder = find_model(model)

            def ranks(tensor: int, pipeline: int, threads: int, control: str) -> Any:
                return experiment.engine_of_ranks(
                    name, folder, tensor=tensor, pipeline=pipeline, threads=threads, control=control
                )

            plan = parallel.Plan(
                inside=experiment.engine_for(name, folder, 1),
                ranks=ranks,
                layers=lambda stages: experiment.layers_of_stages(folder, stages),
                joins=lambda: join_cost.measure(read_config(folder).hidden_size),
                requests=requests,
                batch=batch,
                rounds=rounds,
                seed=seed,
            )
            with terminal.status("") as status:
                found = parallel.run(plan, status.update)
    except (ModelError, BenchError, WorkerLost, OSError) as error:
        raise click.ClickException(str(error)) from None
    parallel.show(found, Console(width=None if Console().is_terminal else 120))
    if out is not None:
        parallel.save(found, out)


@bench.command("scheduler")
@click.option(
    "--policy", "policies", multiple=True, type=PolicyName(), help="May be given several times; default: all."
)
@click.option(
    "--rows",
    multiple=True,
    type=click.IntRange(1),
    default=(1, 16, 64, 256),
    show_default=True,
    help="Requests that run; may be given several times.",
)
@click.option(
    "--waiting",
    multiple=True,
    type=click.IntRange(0),
    default=(0, 10_000),
    show_default=True,
    help="Requests in the queue; may be given several times.",
)
@click.option("--iterations", type=click.IntRange(10), default=300, show_default=True, help="Of each case.")
def bench_scheduler(
    policies: tuple[str, ...], rows: tuple[int, ...], waiting: tuple[int, ...], iterations: int
) -> None:
    """Measure what deciding takes: schedule() and update() at so many rows and waiting requests, without a model."""
    from rich.console import Console
    from rich.progress import Progress

    from orcaserve.bench import scheduler

    among = list(scheduler.cases(policies or scheduler.policies(), rows, waiting))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measure", total=len(among))
        found = scheduler.run(among, iterations, lambda: progress.advance(task))
    scheduler.show(found, Console(width=None if Console().is_terminal else 120))
