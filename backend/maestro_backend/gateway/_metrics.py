"""Prometheus metrics of the gateway. Names follow `maestro_<noun>_<unit>`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from maestro_backend.scheduler import Scheduler, WorkerState

from ._records import CallRecord

disable_created_metrics()  # type: ignore[no-untyped-call]  # untyped upstream

_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class _SchedulerState(Collector):
    """Read from the scheduler at scrape time."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        calls, ledger = self._scheduler.calls, self._scheduler.ledger
        queued = GaugeMetricFamily("maestro_calls_queued", "Calls waiting", labels=["model"])
        for model, queue in calls.queues.items():
            queued.add_metric([model], len(queue))
        running = GaugeMetricFamily("maestro_calls_running", "Calls in engines", labels=["worker"])
        ready = GaugeMetricFamily("maestro_worker_ready", "1 if it takes calls", labels=["worker"])
        for name, info in self._scheduler.workers.items():
            running.add_metric([name], len(calls.on_worker(name)))
            ready.add_metric([name], float(info.state is WorkerState.READY))
        limit = GaugeMetricFamily("maestro_kv_limit_bytes", "KV memory allowed", labels=["worker"])
        held = GaugeMetricFamily("maestro_kv_reserved_bytes", "KV memory held", labels=["worker"])
        kept = GaugeMetricFamily("maestro_kv_kept_bytes", "Prefixes kept", labels=["worker"])
        for name, claim in ledger.claims.items():
            kept.add_metric([name], claim.kv_kept)
            limit.add_metric([name], claim.kv_limit)
            held.add_metric([name], claim.kv_reserved)
        free = GaugeMetricFamily("maestro_device_free_bytes", "Not promised", labels=["device"])
        for device in ledger.capacity:
            free.add_metric([device], ledger.free(device))
        used = GaugeMetricFamily("maestro_device_used_bytes", "As measured", labels=["device"])
        for device, size in ledger.measured.items():
            used.add_metric([device], size)
        host = GaugeMetricFamily("maestro_host_free_bytes", "Not promised", labels=["node"])
        for node in ledger.host_capacity:
            host.add_metric([node], ledger.host_free(node))
        yield from (queued, running, ready, limit, held, kept, free, used, host)
        actions = CounterMetricFamily(
            "maestro_actions", "What was done to memory and calls", labels=["action"]
        )
        for action, count in self._scheduler.counts.items():
            actions.add_metric([action.value], count)
        yield actions


class Metrics:
    """Counters and histograms, in a registry of their own."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_SchedulerState(scheduler))
        registry = self._registry
        self._calls = Counter(
            "maestro_calls", "Calls ended", ["model", "status"], registry=registry
        )
        self._tokens = Counter(
            "maestro_tokens", "Tokens served", ["model", "kind"], registry=registry
        )
        self._hints = Counter(
            "maestro_bad_hints", "Hints ignored as unusable", ["hint"], registry=registry
        )
        self._queue = Histogram(
            "maestro_queue_seconds",
            "Arrival to dispatch",
            ["model"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._lead = Histogram(
            "maestro_lead_seconds", "Foreseen to arrival", registry=registry, buckets=_SECONDS
        )

    def bad_hints(self, hints: Iterable[str]) -> None:
        for hint in hints:
            self._hints.labels(hint).inc()

    def call_ended(self, record: CallRecord) -> None:
        self._calls.labels(record.model, record.status.value).inc()
        self._tokens.labels(record.model, "prompt").inc(record.prompt_tokens)
        self._tokens.labels(record.model, "output").inc(record.output_tokens)
        if record.dispatched is not None:
            self._queue.labels(record.model).observe(record.queued_s())
        if record.lead_s is not None:
            self._lead.observe(record.lead_s)

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self._registry)
