"""`Metrics`: what /metrics says, under vLLM's names, so that dashboards and gateways made for it work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from orcaserve.core.config import EngineInfo
from orcaserve.core.timing import Timing
from orcaserve.engine.messages import Stats, Step
from orcaserve.serve.replica import Replica
from orcaserve.serve.replicas import Replicas

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_LONG = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Metrics:
    """Owner of the counters and histograms. Called from the event loop.

    What the engine knows (queue, KV cache, preemptions) is read through `stats` and `info` when somebody asks.
    """

    def __init__(self, model_name: str, prefix: str = "vllm") -> None:
        """prefix: of all names but those that vLLM has not, which are orcaserve's."""
        self._model_name = model_name
        self._prefix = prefix
        self._registry = CollectorRegistry(auto_describe=False)
        labels, values = ["model_name"], {"model_name": model_name}

        def counter(name: str, help: str) -> Counter:
            return Counter(f"{prefix}:{name}", help, labels, registry=self._registry).labels(**values)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(f"{prefix}:{name}", help, labels, registry=self._registry, buckets=buckets)
            return family.labels(**values)

        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests whose prompt has been computed.")
        self._generation_tokens = counter("generation_tokens", "Generated tokens.")
        self._success = Counter(
            f"{prefix}:request_success",
            "Choices that ended, by reason.",
            [*labels, "finished_reason"],
            registry=self._registry,
        )
        self._rejections = Counter(
            f"{prefix}:admission_rejections",
            "Requests that were not taken, by reason.",
            [*labels, "reason"],
            registry=self._registry,
        )
        self._spans = Counter("orcaserve:spans", "Spans for the OTLP endpoint.", ["outcome"], registry=self._registry)
        self._first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self._gap = histogram("inter_token_latency_seconds", "Between two tokens of a choice.", _GAPS)
        self._per_token = histogram(
            "request_time_per_output_token_seconds", "Mean time between two tokens of a choice.", _GAPS
        )
        self._latency = histogram("e2e_request_latency_seconds", "From arrival to the end.", _LONG)
        self._queue = histogram("request_queue_time_seconds", "From joining the queue to the first iteration.", _LONG)
        self._prefill = histogram("request_prefill_time_seconds", "From the first iteration to the first token.", _LONG)
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last.", _LONG)
        self._lost = Histogram(
            "orcaserve:request_lost_time_seconds",
            "From preemptions and crashes until as much had been computed again; in none of the other times.",
            labels,
            registry=self._registry,
            buckets=_LONG,
        ).labels(**values)
        self._num_prompt = histogram("request_prompt_tokens", "Prompt tokens per request.", _TOKENS)
        self._num_generated = histogram("request_generation_tokens", "Generated tokens per choice.", _TOKENS)
        self._iteration = histogram("iteration_tokens_total", "Tokens per iteration.", _ITERATION)

    def watch(self, stats: Callable[[], Stats], info: Callable[[], EngineInfo | None], replicas: Replicas) -> None:
        """Reports the state of all engines together from now on, and under names of our own that of each replica."""
        self._registry.register(_EngineCollector(self._model_name, self._prefix, stats, info))
        self._registry.register(_ReplicaCollector(self._model_name, replicas))

    def rejected(self, reason: str) -> None:
        self._rejections.labels(model_name=self._model_name, reason=reason).inc()

    def accepted(self, num_prompt: int) -> None:
        self._num_prompt.observe(num_prompt)

    def computed(self, num_prompt: int) -> None:
        """A prompt, whole, for the first of its choices."""
        self._prompt_tokens.inc(num_prompt)

    def queued(self, seconds: float) -> None:
        self._queue.observe(seconds)

    def first_token(self, seconds: float, num_tokens: int) -> None:
        """seconds: since the arrival. num_tokens: that came together."""
        self._first_token.observe(seconds)
        self._generation_tokens.inc(num_tokens)

    def more_tokens(self, seconds: float, num_tokens: int) -> None:
        """num_tokens that came together, so long after the one before them."""
        self._generation_tokens.inc(num_tokens)
        for _ in range(num_tokens):
            self._gap.observe(seconds / num_tokens)

    def finished(
        self, reason: str, seconds: float, decode_seconds: float, num_tokens: int, timing: Timing | None
    ) -> None:
        """A choice has ended. seconds: since its arrival; decode_seconds: from its first token to its last.

        timing: the engines' own account, if they gave one.
        """
        self._success.labels(model_name=self._model_name, finished_reason=reason).inc()
        self._latency.observe(seconds)
        self._num_generated.observe(num_tokens)
        if num_tokens > 1:
            self._per_token.observe(decode_seconds / (num_tokens - 1))
        if timing is not None:
            self._prefill.observe(timing.prefill_seconds)
            self._decode.observe(timing.decode_seconds)
            self._lost.observe(timing.lost_seconds)

    def aborted(self) -> None:
        """A choice whose client has gone, or that ended with another one's error."""
        self._success.labels(model_name=self._model_name, finished_reason="abort").inc()

    def spans(self, outcome: str, count: int) -> None:
        """So many were "sent", have "failed" to be, or were "dropped" because too many waited. From any thread."""
        self._spans.labels(outcome=outcome).inc(count)

    def on_step(self, step: Step) -> None:
        if step.num_tokens:
            self._iteration.observe(step.num_tokens)

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector:
    """The engines' own numbers, asked for at every scrape."""

    def __init__(
        self, model_name: str, prefix: str, stats: Callable[[], Stats], info: Callable[[], EngineInfo | None]
    ) -> None:
        self._model_name = model_name
        self._prefix = prefix
        self._stats = stats
        self._info = info
        self._created = time.time()

    def collect(self) -> Iterator[Metric]:
        stats, prefix = self._stats(), self._prefix
        share = stats.num_held_blocks / stats.num_blocks if stats.num_blocks else 0.0
        for name, help, value in (
            ("num_requests_running", "Choices that take part in iterations.", stats.num_running),
            ("num_requests_waiting", "Choices that wait for an iteration.", stats.num_waiting),
            ("kv_cache_usage_perc", "Share of the KV cache's blocks that requests hold, 0 to 1.", share),
        ):
            gauge = GaugeMetricFamily(f"{prefix}:{name}", help, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, help, value in (
            (f"{prefix}:num_preemptions", "Choices that were preempted.", stats.num_preemptions),
            ("orcaserve:num_swapped", "Of these, choices whose KV was moved to the swap space.", stats.num_swapped),
            (f"{prefix}:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
            (f"{prefix}:prefix_cache_hits", "Prompt tokens that were found there.", stats.prefix_hits),
        ):
            counter = CounterMetricFamily(name, help, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter
        info = self._info()
        if info is not None:
            config = GaugeMetricFamily(
                f"{prefix}:cache_config_info",
                "The KV cache: tokens per block, and blocks.",
                labels=["model_name", "block_size", "num_gpu_blocks"],
            )
            config.add_metric([self._model_name, str(info.block_size), str(info.num_blocks)], 1)
            yield config


_REPLICA_GAUGES: tuple[tuple[str, str, Callable[[Replica], float]], ...] = (
    ("requests_running", "Choices that take part in the replica's iterations.", lambda one: one.stats.num_running),
    ("requests_waiting", "Choices that wait for an iteration there.", lambda one: one.stats.num_waiting),
    (
        "kv_cache_usage_perc",
        "Share of the replica's KV blocks that requests hold, 0 to 1.",
        lambda one: one.stats.num_held_blocks / max(1, one.stats.num_blocks),
    ),
)
_REPLICA_COUNTERS: tuple[tuple[str, str, Callable[[Replica], float]], ...] = (
    ("restarts", "Engines that got ready after the replica's first one.", lambda one: one.num_restarts),
    ("prefix_cache_queries", "Prompt tokens looked up in its prefix cache.", lambda one: one.stats.prefix_queries),
    ("prefix_cache_hits", "Prompt tokens that were found there.", lambda one: one.stats.prefix_hits),
)


class _ReplicaCollector:
    """What each replica says of itself."""

    def __init__(self, model_name: str, replicas: Replicas) -> None:
        self._model_name = model_name
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        labels = ["model_name", "replica"]
        lacking = self._replicas.not_ready
        help = "Whether the replica gets requests, 1 or 0."
        ready = GaugeMetricFamily("orcaserve:replica_ready", help, labels=labels)
        for replica in self._replicas:
            ready.add_metric([self._model_name, str(replica.index)], replica.index not in lacking)
        yield ready
        for name, help, read in _REPLICA_GAUGES:
            gauge = GaugeMetricFamily(f"orcaserve:replica_{name}", help, labels=labels)
            for replica in self._replicas:
                gauge.add_metric([self._model_name, str(replica.index)], read(replica))
            yield gauge
        for name, help, read in _REPLICA_COUNTERS:
            counter = CounterMetricFamily(f"orcaserve:replica_{name}", help, labels=labels)
            for replica in self._replicas:
                counter.add_metric([self._model_name, str(replica.index)], read(replica))
            yield counter
        busy = CounterMetricFamily(
            "orcaserve:rank_busy_seconds",
            "Seconds that a rank of the replica's engine has worked, not waited for another; ranks stage by stage.",
            labels=[*labels, "rank"],
        )
        for replica in self._replicas:
            for rank, seconds in enumerate(replica.busy_seconds):
                busy.add_metric([self._model_name, str(replica.index), str(rank)], seconds)
        yield busy
