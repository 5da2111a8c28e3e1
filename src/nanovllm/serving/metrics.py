"""What Prometheus reads at /metrics, under vLLM's names where the meaning is the same.

Times are those of the engine: from the call of `generate` (tokenization and waiting included) to
the step that yielded a token. They are recorded in the output thread.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector

from nanovllm.serving.async_llm import AsyncLLM
from nanovllm.serving.step_thread import Advance

_SHORT_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
_LONG_S = (
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
    480,
    960,
)
_TOKENS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
LABELS = ("model_name", "engine")


class Metrics:
    """Watches an AsyncLLM. `text` is what /metrics answers."""

    def __init__(self, llm: AsyncLLM, model_name: str) -> None:
        self._llm, self._labels = llm, (model_name, "0")
        self.registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=self.registry)

        def histogram(name: str, what: str, buckets: Iterable[float]) -> Any:
            made = Histogram(name, what, LABELS, buckets=tuple(buckets), registry=self.registry)
            return made.labels(*self._labels)

        def counter(name: str, what: str) -> Any:
            return Counter(name, what, LABELS, registry=self.registry).labels(*self._labels)

        self._first_token = histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _SHORT_S
        )
        self._between_tokens = histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of an answer.", _SHORT_S
        )
        self._per_token = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time between the tokens of an answer.",
            _SHORT_S,
        )
        self._whole = histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the last token.", _LONG_S
        )
        self._decode = histogram(
            "vllm:request_decode_time_seconds", "From the first token to the last.", _LONG_S
        )
        self._prompt_size = histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS
        )
        self._answer_size = histogram(
            "vllm:request_generation_tokens", "Tokens of an answer.", _TOKENS
        )
        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens computed or found.")
        self._tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self._ended = Counter(
            "vllm:request_success",
            "Answers that ended, by reason.",
            (*LABELS, "finished_reason"),
            registry=self.registry,
        )
        self._refused = Counter(
            "nanovllm:requests_refused",
            "Requests that were answered with an error, by HTTP status.",
            (*LABELS, "status"),
            registry=self.registry,
        )
        self.registry.register(self)  # type: ignore[arg-type]
        llm.observers.append(self.observe)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def refused(self, status: int) -> None:
        self._refused.labels(*self._labels, str(status)).inc()

    def observe(self, now: float, advances: list[Advance]) -> None:
        """After a step. `answer.last_token_time` is still that of the step before."""
        for answer, num_tokens, reason in advances:
            seq = answer.seq
            times = seq.metrics
            if reason != "abort":
                self._tokens.inc()
                if answer.last_token_time is None:
                    self._first_token.observe(now - times.arrival_time)
                    self._prompt_tokens.inc(seq.num_prompt_tokens)
                else:
                    self._between_tokens.observe(now - answer.last_token_time)
            if reason is None:
                continue
            self._ended.labels(*self._labels, reason).inc()
            if reason == "abort":
                continue
            self._prompt_size.observe(seq.num_prompt_tokens)
            self._answer_size.observe(num_tokens)
            self._whole.observe(now - times.arrival_time)
            if times.first_token_time is not None and num_tokens > 1:
                took_s = now - times.first_token_time
                self._decode.observe(took_s)
                self._per_token.observe(took_s / (num_tokens - 1))

    def collect(self) -> Iterator[Metric]:
        """What the engine knows at this moment. Called by the registry."""
        engine = self._llm.engine
        scheduler, stats = engine.scheduler, engine.scheduler.stats
        blocks = scheduler.blocks
        gauges = {
            "vllm:num_requests_running": (
                "Requests in the batch.",
                len(scheduler.prefilling) + len(scheduler.decoding),
            ),
            "vllm:num_requests_waiting": ("Requests in the queue.", len(scheduler.waiting)),
            "vllm:kv_cache_usage_perc": (
                "Share of KV blocks in use, 0 to 1.",
                1 - blocks.num_free / blocks.num_blocks,
            ),
            "nanovllm:engine_alive": ("1 while the engine takes requests.", not self._llm.errored),
        }
        counters = {
            "vllm:num_preemptions": ("Requests that gave their blocks back.", stats.preemptions),
            "vllm:prefix_cache_queries": (
                "Prompt tokens looked up in the prefix cache.",
                stats.prefix_lookup_tokens,
            ),
            "vllm:prefix_cache_hits": (
                "Prompt tokens found in the prefix cache.",
                stats.prefix_hit_tokens,
            ),
            "nanovllm:steps": ("Steps of the engine.", stats.steps),
        }
        for name, (what, value) in gauges.items():
            gauge = GaugeMetricFamily(name, what, labels=LABELS)
            gauge.add_metric(self._labels, float(value))
            yield gauge
        for name, (what, value) in counters.items():
            counter = CounterMetricFamily(name, what, labels=LABELS)
            counter.add_metric(self._labels, float(value))
            yield counter
