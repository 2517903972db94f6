"""What Prometheus reads: vLLM's names and meanings, with a prefix of our own.

answers, refusals, the engine's counts --Metrics, one registry--> text (version 0.0.4)
                                                           '--aliases--> the same as vllm:...
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from llava_mini_jax.inference.ticket import Usage

PREFIX, ALIAS = "llava_mini:", "vllm:"
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

# Seconds. vLLM's, and finer ones below: tokens here take milliseconds.
_TO_FIRST = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_BETWEEN = (
    *(0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4),
    *(0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
_PHASE = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15),
    *(20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680),
)
_TOKENS = tuple(1 << n for n in range(18))

HISTOGRAMS: dict[str, tuple[tuple[float, ...], str]] = {
    "time_to_first_token_seconds": (_TO_FIRST, "from the request's arrival to its first token"),
    "inter_token_latency_seconds": (_BETWEEN, "between two outputs of an answer"),
    "request_time_per_output_token_seconds": (_BETWEEN, "of an answer, behind its first token"),
    "e2e_request_latency_seconds": (_PHASE, "from the request's arrival to its last byte"),
    "request_queue_time_seconds": (_PHASE, "from the request's arrival to its first work"),
    "request_inference_time_seconds": (_PHASE, "from the first work to the last token"),
    "request_prefill_time_seconds": (_PHASE, "from the first work to the first token"),
    "request_decode_time_seconds": (_PHASE, "from the first token to the last one"),
    "vision_encode_seconds": (_PHASE, "calls that encoded a request's frames"),
    "media_decode_seconds": (_PHASE, "reading a request's images and videos, fetching included"),
    "media_fetch_seconds": (_PHASE, "fetching a request's remote images and videos"),
    "iteration_tokens_total": (_TOKENS, "tokens of an engine's step"),
    "request_prompt_tokens": (_TOKENS, "positions of prompts"),
    "request_generation_tokens": (_TOKENS, "tokens of answers"),
    "request_params_n": ((1, 2, 4, 8, 16), "choices asked for"),
    "request_params_max_tokens": (_TOKENS, "tokens allowed to answers"),
}
COUNTERS: dict[str, tuple[str, ...]] = {  # and the label that each has beside model_name
    "prompt_tokens": (),
    "generation_tokens": (),
    "prompt_tokens_cached": (),
    "prefix_cache_queries": (),
    "prefix_cache_hits": (),
    "mm_cache_queries": (),
    "mm_cache_hits": (),
    "frames": (),
    "request_success": ("finished_reason",),
    "admission_rejections": ("reason",),
}


@dataclass(frozen=True)
class Load:
    """What is in the house now."""

    running: int
    waiting: int  # admitted, and not running
    deferred: int  # of these, not yet with the engine: their media are being read
    slots: int
    slots_in_use: int
    kv_usage: float
    compilations: int
    media: int
    media_bytes: int


class Metrics:
    """`load` is called whenever somebody reads."""

    def __init__(self, model: str, load: Callable[[], Load], *, aliases: bool = False):
        self._model, self._aliases = model, aliases
        disable_created_metrics()  # a series more for each, which no dashboard reads
        self.registry = CollectorRegistry()
        self._histograms = {
            name: Histogram(
                PREFIX + name, told, ["model_name"], buckets=buckets, registry=self.registry
            ).labels(model)
            for name, (buckets, told) in HISTOGRAMS.items()
        }
        self._counters = {
            name: Counter(
                PREFIX + name, name.replace("_", " "), ["model_name", *more], registry=self.registry
            )
            for name, more in COUNTERS.items()
        }
        self._http = Counter(
            "http_requests", "answered", ["handler", "method", "status"], registry=self.registry
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "until the last byte",
            ["handler", "method"],
            registry=self.registry,
        )
        for name, more in COUNTERS.items():
            if not more:  # so that it is 0, and not absent
                self._counters[name].labels(model)
        ProcessCollector(registry=self.registry)
        self.registry.register(_Engine(model, load))

    def observe(self, name: str, value: float | None) -> None:
        """A value of one of HISTOGRAMS; None: it has none."""
        if value is not None:
            self._histograms[name].observe(value)

    def count(self, name: str, *labels: str, by: int = 1) -> None:
        """One more of one of COUNTERS."""
        self._counters[name].labels(self._model, *labels).inc(by)

    def asked(self, prompt: Usage) -> None:
        """A prompt has been answered, or given up."""
        self.count("prompt_tokens", by=prompt.prompt)
        self.count("prompt_tokens_cached", by=prompt.cached)
        self.count("prefix_cache_queries", by=prompt.prompt)
        self.count("prefix_cache_hits", by=prompt.cached)
        self.count("mm_cache_queries", by=prompt.frames)
        self.count("mm_cache_hits", by=prompt.recalled)
        self.count("frames", by=prompt.frames)
        self.observe("request_prompt_tokens", prompt.prompt)
        if prompt.frames > prompt.recalled:
            self.observe("vision_encode_seconds", prompt.vision)

    def answered(self, usage: Usage, tokens: int, arrived: float, reason: str) -> None:
        """One answer is over, for a request that arrived at `arrived` (time.perf_counter)."""
        now = time.perf_counter()
        first = usage.first

        def since(start: float | None, end: float | None) -> float | None:
            return None if start is None or end is None else max(0.0, end - start)

        self.count("request_success", reason)
        self.count("generation_tokens", by=tokens)
        if reason in ("abort", "error"):
            return
        decoding = since(first, usage.last)
        self.observe("request_generation_tokens", tokens)
        self.observe("e2e_request_latency_seconds", now - arrived)
        self.observe("time_to_first_token_seconds", since(arrived, first))
        self.observe("request_queue_time_seconds", since(arrived, usage.begun))
        self.observe("request_inference_time_seconds", since(usage.begun, usage.last))
        self.observe("request_prefill_time_seconds", since(usage.begun, first))
        self.observe("request_decode_time_seconds", decoding)
        if decoding is not None and tokens > 1:
            self.observe("request_time_per_output_token_seconds", decoding / (tokens - 1))

    def answered_http(self, handler: str, method: str, status: int, seconds: float) -> None:
        self._http.labels(handler, method, str(status)).inc()
        self._http_seconds.labels(handler, method).observe(seconds)

    def text(self) -> bytes:
        text = generate_latest(self.registry)
        if not self._aliases:
            return text
        mine, theirs = PREFIX.encode(), ALIAS.encode()
        own = [line for line in text.splitlines(keepends=True) if mine in line]
        return text + b"".join(own).replace(mine, theirs)


class _Engine:
    """A collector: what the engine is doing is asked for when somebody reads."""

    def __init__(self, model: str, load: Callable[[], Load]):
        self._model, self._load = model, load

    def collect(self) -> Iterable[Metric]:
        load = self._load()
        for name, value, told in (
            ("num_requests_running", load.running, "answers in the batch"),
            ("num_requests_waiting", load.waiting, "answers that wait"),
            ("kv_cache_usage_perc", load.kv_usage, "share of the KV cache in use, 0 to 1"),
            ("slots", load.slots, "answers that the batch has room for"),
            ("slots_in_use", load.slots_in_use, "of these, taken"),
            ("media_known", load.media, "images and videos in memory"),
            ("media_known_bytes", load.media_bytes, "bytes that they take"),
        ):
            family = GaugeMetricFamily(PREFIX + name, told, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family
        reasons = {"capacity": load.waiting - load.deferred, "deferred": load.deferred}
        family = self._family(GaugeMetricFamily, "num_requests_waiting_by_reason", ["reason"])
        for reason, value in reasons.items():
            family.add_metric([self._model, reason], value)
        yield family
        compiled = self._family(CounterMetricFamily, "compilations", [])
        compiled.add_metric([self._model], load.compilations)
        yield compiled
        # Gateways look for it; the model takes no adapters.
        names = ["running_lora_adapters", "waiting_lora_adapters", "max_lora"]
        adapters = GaugeMetricFamily(f"{PREFIX}lora_requests_info", "adapters", labels=names)
        adapters.add_metric(["", "", "0"], time.time())
        yield adapters

    def _family(self, kind: Any, name: str, labels: list[str]) -> Any:
        return kind(PREFIX + name, name.replace("_", " "), labels=["model_name", *labels])
