"""`run`: the server from its start to its end: socket, model, signals, and the exit code.

The socket is bound first, so that an occupied port is known before anything is loaded, and answers 503 until the model
is there. The first SIGTERM (or Ctrl-C) lets running requests end, the second one does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import resource
import signal
import socket
import ssl
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from orcaserve.core.config import BudgetLine, EngineInfo, EngineOptions, ModelError
from orcaserve.engine.messages import Step
from orcaserve.serve import timeline
from orcaserve.serve.admission import Limits
from orcaserve.serve.app import make_app
from orcaserve.serve.bodies import most_bytes
from orcaserve.serve.frontend import Frontend, HttpOptions
from orcaserve.serve.metrics import Metrics
from orcaserve.serve.page import Page, changed_options
from orcaserve.serve.pool import EngineFailed, Pool
from orcaserve.serve.replicas import Replication, step_logs
from orcaserve.serve.served_model import ServedModel
from orcaserve.serve.terms import api_key
from orcaserve.worker.process import tell

_log = logging.getLogger("orcaserve.serve")
_FLUSH_SECONDS = 5  # what a slow reader gets to fetch the rest of a response that has ended
_RPC_FLUSH_SECONDS = 1  # the same for gRPC, where probes that watch would stay for ever
_KEEP_ALIVE_SECONDS = 75  # longer than clients and proxies keep an idle connection, so that they close it, not we
_WATCH_SECONDS = 0.5
_BACKLOG = 2048
_UNSENT_BYTES = 32 << 10  # of a connection that the kernel may hold beside what is under way; else it takes megabytes
_UNREAD_BYTES = 16 << 10  # of a connection: then its stream waits. As small events they cost several times as much
_TOKEN_BYTES = 80  # of a token of a prompt: a number, and a place for it where it waits and where it goes
_PARTS = ("longest context",)  # lines of an engine's table that are part of others
_MOST_FILES = 1 << 16
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.\-]*://[^/?#@\sA-Z]+")  # as browsers write it
_METRICS_PREFIX = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class StartError(Exception):
    """The server cannot start; the message is one clear line."""


def run(
    engine: EngineOptions,
    http: HttpOptions | None = None,
    *,
    replication: Replication | None = None,
    limits: Limits | None = None,
    command: Sequence[str] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    on_ready: Callable[[EngineInfo, str], None] | None = None,
) -> int:
    """Serves until a signal ends it; returns the exit code: 0 after a drain, 1 with one line on stderr otherwise.

    replication: how many engines, and who gets what. command: argv of the engine process (the pool's).
    on_progress: how far loading has come: (stage, done, total). on_ready: called once with
    the engine and the server's URL, when requests are taken.
    """
    http = http or HttpOptions()
    logging.basicConfig(
        level=http.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    # The library's only switch for its own threads, which would take the model's cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        _check(http)
        _allow_many_connections()
        with _bind(http.host, http.port) as listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(
                _serve(
                    engine,
                    http,
                    listener,
                    replication=replication,
                    limits=limits,
                    command=command,
                    on_progress=on_progress,
                    on_ready=on_ready,
                )
            )
    except (StartError, ModelError, EngineFailed) as error:
        tell(f"orcaserve: {error}")
        return 1


def _check(http: HttpOptions) -> None:
    if not http.api_keys and not _is_loopback(http.host):
        raise StartError(
            f"{http.host} can be reached from outside, so an API key is needed: give one with --api-key, "
            "or listen on 127.0.0.1"
        )
    keys = [api_key(text).key for text in http.api_keys]
    if any(not key.strip() for key in keys):
        raise StartError("an API key is empty")
    if len(set(keys)) < len(keys):
        raise StartError("an API key is given twice")
    if http.operator is not None and http.operator not in http.tenants:
        raise StartError(f"no API key is the operator's: give one with --api-key {http.operator}=KEY")
    if (http.ssl_certfile is None) != (http.ssl_keyfile is None):
        raise StartError("TLS needs both a certificate and a key file")
    for origin in http.cors_origins:
        if not _ORIGIN.fullmatch(origin):
            raise StartError(f"{origin!r} is no origin: give --cors-origin * or scheme://host[:port], in lower case")
    if not _METRICS_PREFIX.fullmatch(http.metrics_prefix):
        raise StartError(f"{http.metrics_prefix!r} cannot begin the name of a metric")
    for name in (http.ssl_certfile, http.ssl_keyfile):
        if name is not None and not Path(name).is_file():
            raise StartError(f"there is no file {name}")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bind(host: str, port: int) -> socket.socket:
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise StartError(f"cannot listen on {host} port {port}: {error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # the connections take it over
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        listener.bind(address)
        listener.listen(_BACKLOG)  # clients may connect from now on, and wait
    except (OSError, OverflowError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StartError(f"cannot listen on {host} port {port}: {reason}") from None
    return listener


def _allow_many_connections() -> None:
    """The soft limit of open files is 1024 in most shells; past it nobody could even be refused."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _empty_step_logs(engine: EngineOptions, replicas: int) -> None:
    """Engines append to theirs, so that one that dies does not take its log along.

    Not before the port is ours: of a server that is started twice the second one leaves the first one's log alone.
    """
    for step_log in step_logs(engine.step_log, replicas):
        if step_log is None:
            continue
        try:
            Path(step_log).write_bytes(b"")
        except OSError as error:
            raise StartError(f"the step log {step_log} cannot be written: {error.strerror}") from None


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def whole_budget(
    engine: Sequence[BudgetLine], engines: int, http: HttpOptions, limits: Limits
) -> tuple[BudgetLine, ...]:
    """An engine's memory table, continued by this process's part, and by the sum.

    engines: of the same size, on this host. Of this process: what it takes now, and what it may hold of requests before
    they run, of what happened, and of responses that are no streams: all of them, and one that is beyond that.
    """
    bodies = 2 * most_bytes(http.max_body_bytes)  # as bytes, and decoded
    prompts = limits.max_queue_tokens * _TOKEN_BYTES
    responses = 2 * http.whole_bytes
    frontend = _resident() + bodies + prompts + responses + timeline.MOST_BYTES
    total = engines * sum(line.num_bytes for line in engine if line.name not in _PARTS) + frontend
    note = (
        f"{_size(bodies)} of it for request bodies, {_size(prompts)} for prompts that wait, {_size(responses)} for "
        "responses that are kept until they are whole"
    )
    return (
        *engine,
        BudgetLine("HTTP process", frontend, note),
        BudgetLine("total", total, f"of {engines} engines and the HTTP process" if engines > 1 else ""),
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.0f} MiB"


def _resident() -> int:
    """Bytes of memory that this process takes now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class _Connection(AutoHTTPProtocol):
    """Uvicorn's, which has its stream wait sooner."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        transport.set_write_buffer_limits(high=_UNREAD_BYTES)
        super().connection_made(transport)


class _Uvicorn(uvicorn.Server):
    """Uvicorn without its own ideas about signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Signals:
    """The wish to end, as SIGTERM and SIGINT say it. Owns the loop's handlers of both."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._arrived)

    def _arrived(self) -> None:
        (self.second if self.first.is_set() else self.first).set()

    def close(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)


class _WorkLog:
    """Counts what iterations do, and says so in one log line per while of work."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._num_tokens = 0
        self._num_generated = 0

    def on_step(self, step: Step) -> None:
        self._num_steps += 1
        self._num_tokens += step.num_tokens
        self._num_generated += sum(len(output.token_ids) for output in step.outputs)

    async def write(self, pool: Pool, seconds: float) -> None:
        """For as long as the server lives."""
        began = time.monotonic()
        while True:
            await asyncio.sleep(seconds)
            now = time.monotonic()
            if self._num_steps:
                stats = pool.stats
                _log.info(
                    "%d running, %d waiting, KV %.0f %%, %.1f tokens/s generated, %.1f computed, %.1f iterations/s",
                    stats.num_running,
                    stats.num_waiting,
                    100 * stats.num_held_blocks / max(1, stats.num_blocks),
                    self._num_generated / (now - began),
                    self._num_tokens / (now - began),
                    self._num_steps / (now - began),
                )
            began = now
            self._num_steps = self._num_tokens = self._num_generated = 0


async def _serve(
    engine: EngineOptions,
    http: HttpOptions,
    listener: socket.socket,
    *,
    replication: Replication | None,
    limits: Limits | None,
    command: Sequence[str] | None,
    on_progress: Callable[[str, int, int], None] | None,
    on_ready: Callable[[EngineInfo, str], None] | None,
) -> int:
    """Returns the exit code. Raises ModelError or EngineFailed if there is no engine, or no more."""
    name = http.served_model_names[0] if http.served_model_names else Path(os.path.abspath(engine.model)).name
    metrics = Metrics(name, http.metrics_prefix)
    work = _WorkLog()

    def on_step(step: Step) -> None:
        metrics.on_step(step)
        work.on_step(step)

    if len(http.tenants) == 1:  # there is nobody to share the queue with
        limits = msgspec.structs.replace(limits or Limits(), tenant_queue_share=1.0)
    events = timeline.Timeline()
    pool = Pool(
        engine,
        replication=replication,
        limits=limits,
        command=command,
        on_progress=on_progress,
        on_step=on_step,
        timeline=events,
    )
    metrics.watch(lambda: pool.stats, lambda: pool.info, pool.replicas)
    frontend = Frontend(name, pool, metrics, http)
    changed = changed_options(engine, http, limits or Limits(), replication or Replication())
    page = Page(frontend, events, engine, changed)
    if http.otlp_traces_endpoint is not None:
        frontend.tracing = _tracing(http.otlp_traces_endpoint, name, metrics)
    config = _uvicorn_config(make_app(frontend, page), http)
    try:
        config.load()
    except (OSError, ssl.SSLError):
        raise StartError(f"the certificate {http.ssl_certfile} and its key cannot be used") from None
    web = _Uvicorn(config)
    rpc = await _start_rpc(frontend) if http.grpc_port is not None else None
    signals = _Signals()
    serving = asyncio.create_task(web.serve([listener]))
    logging_work = asyncio.create_task(work.write(pool, http.log_seconds))

    async def load_and_watch() -> None:
        _empty_step_logs(engine, 1 if replication is None else replication.replicas)
        await pool.start()
        frontend.model = await asyncio.to_thread(ServedModel, name, engine.model)
        info = await pool.ready()
        if on_ready is not None:
            engines = 1 if replication is None or replication.commands is not None else replication.replicas
            budget = whole_budget(info.budget, engines, http, limits or Limits())
            on_ready(msgspec.structs.replace(info, budget=budget), _url(listener, http))
        while pool.state != "failed":
            await asyncio.sleep(_WATCH_SECONDS)
        raise EngineFailed(pool.failure or "the engine failed")

    async def drain() -> None:
        if pool.num_unfinished:
            _log.info("finishing %d running requests; a second signal ends them", pool.num_unfinished)
        if not await pool.drain(http.drain_seconds):
            _log.warning("not everything that ran could be finished in time")

    try:
        await _until(signals.first, load_and_watch())
        await _until(signals.second, drain())
    finally:
        await pool.close()
        page.close()  # who looks on would keep the server from its end
        logging_work.cancel()
        web.force_exit = signals.second.is_set()
        web.should_exit = True
        if rpc is not None:
            await rpc.stop(0 if signals.second.is_set() else _RPC_FLUSH_SECONDS)
        await asyncio.wait([serving, logging_work])
        if frontend.tracing is not None:
            await frontend.tracing.close()
        signals.close()
    return 1 if signals.second.is_set() else 0


def _tracing(endpoint: str, model_name: str, metrics: Metrics) -> Any:
    try:
        from orcaserve.serve.tracing import Tracing
    except ImportError:
        raise StartError("--otlp-traces-endpoint needs OpenTelemetry: pip install 'orcaserve[otel]'") from None
    try:
        return Tracing(endpoint, model_name, metrics.spans)
    except ValueError as error:
        raise StartError(str(error)) from None


async def _start_rpc(frontend: Frontend) -> Any:
    """The gRPC server."""
    try:
        from orcaserve.serve.rpc.server import start
    except ImportError:
        raise StartError("--grpc-port needs gRPC: pip install 'orcaserve[grpc]'") from None
    try:
        server, port = await start(frontend)
    except OSError as error:
        raise StartError(error.strerror or str(error)) from None
    _log.info("gRPC on port %d of %s", port, frontend.options.host)
    return server


async def _until(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Works until it is done or the event comes; what the work raises is raised."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for other in (task, watcher):
            other.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


def _uvicorn_config(app: ASGIApp, http: HttpOptions) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_Connection,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_FLUSH_SECONDS,
        ssl_certfile=http.ssl_certfile,
        ssl_keyfile=http.ssl_keyfile,
    )


def _url(listener: socket.socket, http: HttpOptions) -> str:
    host = f"[{http.host}]" if ":" in http.host else http.host
    return f"{'https' if http.ssl_certfile else 'http'}://{host}:{listener.getsockname()[1]}"
