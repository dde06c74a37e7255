"""The command `orcaserve`: serve a model, generate without a server, chat with a server, list models."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from msgspec import Struct

from orcaserve import __version__
from orcaserve.cli_bench import bench
from orcaserve.cli_client import ServerUrl, key_header
from orcaserve.cli_config import config_option
from orcaserve.cli_engine import engine_of, engine_options
from orcaserve.cli_explain import explain
from orcaserve.cli_simulate import simulate
from orcaserve.cli_top import top
from orcaserve.core.config import EngineInfo, EngineOptions, ModelError
from orcaserve.core.router import ROUTERS

_STRANGER = "the server answers, but not as an OpenAI-compatible one"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="orcaserve")
def main() -> None:
    """Serve language models by continuous batching; answers do not depend on the load."""


@main.command()
@click.argument("model", default="orcaserve-tiny")
@click.option("--host", default="127.0.0.1", show_default=True, help="A public address needs --api-key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@config_option
@engine_options
@click.option(
    "--replicas", type=click.IntRange(1), default=1, show_default=True, help="Engines, which share threads and memory."
)
@click.option(
    "--router",
    type=click.Choice(sorted(ROUTERS)),
    default="prefix",
    show_default=True,
    help="Who of them gets a request: whoever knows most of its prompt and is not overrun, or each in turn.",
)
@click.option(
    "--replicas-join",
    metavar="HOST:PORT",
    help="Replicas run on other hosts (orcaserve replica), which join here: replica i at PORT + i.",
)
@click.option(
    "--ray", metavar="ADDRESS", help="Place replicas, or the hosts of ranks, on a Ray cluster: auto, HOST:PORT."
)
@click.option(
    "--max-queue-requests",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="That may wait for their first iteration; who comes then gets 429.",
)
@click.option(
    "--max-queue-tokens", type=click.IntRange(1), default=1 << 20, show_default=True, help="Of their prompts together."
)
@click.option(
    "--tenant-queue-share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="Of both, what one tenant may have. A tenant is an API key or, without keys, a request's user.",
)
@click.option("--tenant-requests-per-minute", type=click.FloatRange(0, min_open=True), help="Of each tenant.")
@click.option(
    "--tenant-tokens-per-minute", type=click.FloatRange(0, min_open=True), help="Of each tenant; prompts and outputs."
)
@click.option(
    "--api-key",
    multiple=True,
    metavar="[NAME=]KEY",
    help="Clients must send one of them; may be given several times. NAME is the tenant's.",
)
@click.option(
    "--operator",
    metavar="NAME",
    help="The tenant whose keys open the live page, which shows everybody's requests. "
    "[default: the only tenant; nobody, if there are several]",
)
@click.option(
    "--served-model-name", multiple=True, help="What clients call the model; given several times, all of them are it."
)
@click.option(
    "--cors-origin", multiple=True, metavar="ORIGIN", help="Web pages that may call from a browser: https://… or *."
)
@click.option("--grpc-port", type=click.IntRange(0, 65535), help="Serve gRPC there, too; needs orcaserve[grpc].")
@click.option(
    "--otlp-traces-endpoint",
    "--otlp-endpoint",
    "otlp_traces_endpoint",
    metavar="URL",
    help="Send OpenTelemetry spans there by OTLP/HTTP, such as http://127.0.0.1:4318; needs orcaserve[otel].",
)
@click.option("--metrics-prefix", default="vllm", show_default=True, help="Of the names at /metrics.")
@click.option("--ssl-certfile", type=click.Path(dir_okay=False), help="A certificate in PEM, for TLS; of gRPC, too.")
@click.option("--ssl-keyfile", type=click.Path(dir_okay=False), help="Its key.")
@click.option("--drain-seconds", type=click.FloatRange(0), default=60.0, show_default=True, help="Grace after SIGTERM.")
@click.option("--nnodes", type=click.IntRange(1), default=1, show_default=True, help="Hosts that share the ranks.")
@click.option("--node-rank", type=click.IntRange(0), default=0, help="Of this host; 0 is the head, which serves HTTP.")
@click.option("--head-address", metavar="HOST:PORT", help="Where the other hosts find the head.")
@click.option("--secret-file", type=click.Path(dir_okay=False), help="What all hosts know: openssl rand -hex 32.")
@click.option("--end-with-parent", is_flag=True, hidden=True)
@click.option("--check", is_flag=True, help="Verify the scheduler's invariants after every step.")
@click.option(
    "--step-log",
    type=click.Path(dir_okay=False),
    help="Write down every iteration, for explain and simulate: lengths and times, no text. With replicas: FILE.0, …",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="The least that is said.",
)
def serve(
    model: str,
    replicas: int,
    router: str,
    replicas_join: str | None,
    ray: str | None,
    api_key: tuple[str, ...],
    served_model_name: tuple[str, ...],
    cors_origin: tuple[str, ...],
    node_rank: int,
    end_with_parent: bool,
    **options: Any,
) -> None:
    """Serve MODEL over HTTP: a Hugging Face folder, a hub name such as Qwen/Qwen3-0.6B, or the built-in model."""
    from contextlib import ExitStack

    from orcaserve.serve.admission import Limits
    from orcaserve.serve.cluster import elsewhere
    from orcaserve.serve.console import Console
    from orcaserve.serve.frontend import HttpOptions
    from orcaserve.serve.replicas import Replication, step_logs
    from orcaserve.serve.server import run

    if replicas > 1 and options["nnodes"] > 1:
        raise click.ClickException("replicas are engines of one host each: give --replicas or --nnodes")
    for step_log in step_logs(options["step_log"], replicas):
        if step_log is None:
            continue
        try:
            Path(step_log).open("ab").close()  # it is emptied once the start is certain: it may be a running server's
        except OSError as error:
            raise click.ClickException(f"the step log {step_log} cannot be written: {error.strerror}") from None
    limits = Limits(**_taken(Limits, options))
    wishes = _taken(HttpOptions, options)
    if end_with_parent:
        from orcaserve.worker.process import die_with_parent

        die_with_parent()  # before what may take long, such as a download
    name, engine = engine_of(model, options)
    if node_rank >= engine.nnodes:
        raise click.ClickException(f"of {engine.nnodes} hosts there is none of rank {node_rank}")
    if node_rank:
        return _join(engine, node_rank)
    http = HttpOptions(
        api_keys=api_key, served_model_names=served_model_name or (name,), cors_origins=cors_origin, **wishes
    )
    console = Console()
    commands = None

    def on_ready(info: EngineInfo, url: str) -> None:
        console.on_ready(info, replicas if commands is None else 1)
        console.say(f"serving {', '.join(http.served_model_names)} on {url}")

    with ExitStack() as stack:
        stack.callback(console.close)
        try:
            engine, commands = stack.enter_context(elsewhere(ray, replicas_join, model, engine, replicas))
        except ModelError as error:
            raise click.ClickException(str(error)) from None
        code = run(
            engine,
            http,
            replication=Replication(replicas=replicas, router=router, commands=commands),
            limits=limits,
            on_progress=console.on_progress,
            on_ready=on_ready,
        )
    sys.exit(code)


def _taken(group: type[Struct], options: dict[str, Any]) -> dict[str, Any]:
    """Takes the fields of a group out of the options."""
    return {name: options.pop(name) for name in group.__struct_fields__ if name in options}


def _join(engine: EngineOptions, node_rank: int) -> None:
    """Serves as another host's ranks, until it is ended."""
    from orcaserve.executors.hosts import shared_secret
    from orcaserve.executors.node import join

    try:
        address, secret = shared_secret(engine)
    except ModelError as error:
        raise click.ClickException(str(error)) from None
    join(engine.model, node_rank, address, secret, lambda line: click.echo(f"host {node_rank}: {line}", err=True))


@main.command()
@click.argument("model", default="orcaserve-tiny")
@click.option("--join", "address", metavar="HOST:PORT", required=True, help="Where the frontend waits for replicas.")
@click.option("--secret-file", type=click.Path(dir_okay=False), required=True, help="What frontend and hosts know.")
@click.option("--end-with-parent", is_flag=True, hidden=True)
def replica(model: str, address: str, secret_file: str, end_with_parent: bool) -> None:
    """Run an engine on this host for a frontend elsewhere, which says how; MODEL is this host's copy."""
    from orcaserve.executors.hosts import read_secret
    from orcaserve.executors.link import parse_address
    from orcaserve.serve.find_model import find_model
    from orcaserve.serve.replica_host import offer
    from orcaserve.worker.process import die_with_parent

    if end_with_parent:
        die_with_parent()
    try:
        _, folder = find_model(model)
        secret, where = read_secret(secret_file), parse_address(address)
    except (ModelError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    offer(str(folder), where, secret, lambda line: click.echo(f"replica: {line}", err=True))


@main.command()
@click.argument("prompt")
@click.option("--model", "-m", default="orcaserve-tiny", show_default=True, help="As of serve.")
@click.option("--chat", is_flag=True, help="Ask the prompt as a user would, through the model's chat template.")
@click.option("--max-tokens", type=click.IntRange(1), help="Default: until the answer ends.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="Default: the model's own.")
@click.option("--seed", type=int, help="With one the same prompt gets the same answer; default: one is drawn.")
@engine_options
def generate(
    prompt: str,
    model: str,
    chat: bool,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    **options: Any,
) -> None:
    """Generate from PROMPT, without a server; the text goes to stdout as it comes."""
    import asyncio

    from orcaserve.llm import AsyncLLM, RequestError

    wishes = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    given = {name: value for name, value in wishes.items() if value is not None}

    async def stream() -> None:
        name, engine = engine_of(model, options)
        async with AsyncLLM.of(name, engine) as llm:
            asked: Any = [{"role": "user", "content": prompt}] if chat else prompt
            async for piece in llm.stream(asked, **given):
                click.echo(piece.text, nl=False)
        click.echo()

    try:
        asyncio.run(stream())
    except (ModelError, RequestError) as error:
        raise click.ClickException(str(error)) from None


@main.command()
@click.argument("source", metavar="IN.jsonl", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("target", metavar="OUT.jsonl", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--model", "-m", default="orcaserve-tiny", show_default=True, help="As of serve.")
@engine_options
def batch(source: Path, target: Path, model: str, **options: Any) -> None:
    """Answer a file of requests in OpenAI's batch format, without a server.

    Answers are appended to OUT.jsonl as they come. What it has already is not asked again: a batch that was
    interrupted goes on.
    """
    import asyncio

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from orcaserve.serve.batch import BatchError, run_batch
    from orcaserve.serve.pool import EngineFailed

    options["max_itl"] = options["max_itl"] or 0.0  # nobody reads along
    name, engine = engine_of(model, options)
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None)
        try:
            failed = asyncio.run(
                run_batch(
                    name,
                    engine,
                    source,
                    target,
                    at_once=4 * engine.max_batch_size,
                    on_answer=lambda done, total: progress.update(task, completed=done, total=total),
                )
            )
        except (BatchError, ModelError, EngineFailed) as error:
            raise click.ClickException(str(error)) from None
        except OSError as error:
            raise click.ClickException(f"{target}: {error.strerror}") from None
    if failed:
        click.echo(f"{failed} answers are errors; see their status_code", err=True)
        sys.exit(1)


@main.command()
@click.option("--url", type=ServerUrl(), default="http://127.0.0.1:8000", show_default=True, help="A running server.")
@click.option("--api-key", help="If the server wants one.")
@click.option("--system", help="A system message.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="Default: the model's own.")
def chat(url: str, api_key: str | None, system: str | None, temperature: float | None) -> None:
    """Talk to a running server. An empty line or Ctrl-D ends."""
    import httpx

    messages = [{"role": "system", "content": system}] if system else []
    with httpx.Client(base_url=url, headers=key_header(api_key), timeout=httpx.Timeout(10, read=None)) as client:
        try:
            while question := click.prompt("you", default="", show_default=False, prompt_suffix="> ").strip():
                messages.append({"role": "user", "content": question})
                body = {"messages": messages, "stream": True}
                if temperature is not None:
                    body["temperature"] = temperature
                answer = ""
                for text in _answer(client, body):
                    click.echo(text, nl=False)
                    answer += text
                click.echo()
                messages.append({"role": "assistant", "content": answer})
        except click.Abort:
            click.echo()
        except httpx.HTTPError as error:
            raise click.ClickException(f"no answer from {url} ({error}); is a server running there?") from None


def _answer(client: Any, body: dict[str, Any]) -> Iterator[str]:
    """The text of one streamed chat completion. Ends the program with one line if the server refuses."""
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise click.ClickException(_error_line(response.read()))
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            try:
                chunk = json.loads(data)
                error = chunk["error"]["message"] if "error" in chunk else None
                texts = [] if error else [choice["delta"].get("content") or "" for choice in chunk["choices"]]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise click.ClickException(_STRANGER) from None
            if error:
                raise click.ClickException(error)
            yield from texts


def _error_line(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return _STRANGER


@main.command()
def models() -> None:
    """List what can be served without a download: the built-in model and the local Hugging Face cache."""
    from orcaserve.serve.find_model import local_models

    for name, note in local_models():
        click.echo(f"{name:40} {note}")


main.add_command(bench)
main.add_command(top)
main.add_command(simulate)
main.add_command(explain)

if __name__ == "__main__":
    main()
