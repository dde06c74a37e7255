"""`Frontend`: what every endpoint needs: the pool, the served model once it is loaded, metrics, and options."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from orcaserve.core.config import EngineInfo
from orcaserve.serve import errors
from orcaserve.serve.decode_body import UnknownFields
from orcaserve.serve.metrics import Metrics
from orcaserve.serve.pool import Pool
from orcaserve.serve.served_model import ServedModel
from orcaserve.serve.terms import api_key

if TYPE_CHECKING:
    from orcaserve.serve.tracing import Tracing

LOADING_RETRY_SECONDS = 2.0


class HttpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """An operator's wishes for the HTTP side.

    api_keys: KEY or NAME=KEY; one of them is required of every client, if there are any. operator: the tenant of theirs
    that may see what all do; None: the only one, or none of several. served_model_names: how clients may call the
    model; responses and metrics have the first. None given: the last part of its path.
    max_body_bytes: larger requests are refused. whole_bytes: of responses that are no streams, which are kept until
    they are whole: of all together, and of one that may come to so much by itself. drain_seconds: how long running
    requests may go on after SIGTERM. stuck_seconds: /health fails when no iteration has ended for so long, with work
    waiting. cors_origins: web pages that may call from a browser. log_seconds: one log line per so many seconds of
    work. metrics_prefix: of the metrics' names. grpc_port: of the gRPC endpoint; None: there is none, 0: any free one.
    otlp_traces_endpoint: where spans go.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    operator: str | None = None
    served_model_names: tuple[str, ...] = ()
    max_body_bytes: int = 32 << 20
    whole_bytes: int = 160 << 20
    drain_seconds: float = 60.0
    stuck_seconds: float = 60.0
    cors_origins: tuple[str, ...] = ()
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    log_level: str = "info"
    log_seconds: float = 10.0
    metrics_prefix: str = "vllm"
    grpc_port: int | None = None
    otlp_traces_endpoint: str | None = None

    @property
    def tenants(self) -> tuple[str, ...]:
        """Of the API keys, each once."""
        return tuple(dict.fromkeys(api_key(text).tenant for text in self.api_keys))

    def may_watch(self, tenant: str | None) -> bool:
        """Whether a tenant may see everybody's requests, and end them. None: there are no keys."""
        tenants = self.tenants
        return not tenants or tenant == (self.operator or (tenants[0] if len(tenants) == 1 else None))


class Frontend:
    """Shared by the endpoints. `model` is set once, when it is loaded, by who started it; `tracing` before that, if
    spans are made.

    model_names: by which clients may call it; model_name: the first of them.
    """

    def __init__(self, model_name: str, pool: Pool, metrics: Metrics, options: HttpOptions) -> None:
        self.model_name = model_name
        self.model_names = options.served_model_names or (model_name,)
        self.pool = pool
        self.metrics = metrics
        self.options = options
        self.model: ServedModel | None = None
        self.tracing: Tracing | None = None
        self.created = int(time.time())
        self.unknown_fields = UnknownFields()

    @property
    def info(self) -> EngineInfo | None:
        return self.pool.info

    @property
    def state(self) -> str:
        """The pool's, but "loading" also while the tokenizer is."""
        state = self.pool.state
        return "loading" if state == "ready" and self.model is None else state

    def available(self, name: str | None) -> tuple[ServedModel, EngineInfo]:
        """The model that a request asks for. Raises ApiError: unknown, or not there now."""
        if name is not None and name not in self.model_names:
            raise errors.model_not_found(name, self.model_name)
        model, info = self.model, self.pool.info
        if model is not None and info is not None:
            return model, info
        if self.state == "failed":
            raise errors.unavailable("failed", None)
        raise errors.unavailable("loading", LOADING_RETRY_SECONDS)

    @property
    def is_stuck(self) -> bool:
        return self.pool.state == "failed" or self.pool.step_age > self.options.stuck_seconds
