"""The summary as tables in Markdown, one for each load and deadline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from ._summary import REFERENCE

Entry = Mapping[str, Any]

_GIB_H = 1 / (2**30 * 3600)
COLUMNS: tuple[tuple[str, str, float, int], ...] = (
    ("goodput, runs/s", "goodput", 1, 3),
    ("latency p50, s", "latency_s.p50", 1, 1),
    ("p95, s", "latency_s.p95", 1, 1),
    ("p99, s", "latency_s.p99", 1, 1),
    ("slowdown", "slowdown.mean", 1, 2),
    ("calls/s", "throughput.calls_s", 1, 2),
    ("KV reserved, GiB h", "kv_reserved_byte_s", _GIB_H, 2),
    ("stalls", "stalls", 1, 0),
    ("recomputed tokens", "recomputed_tokens", 1, 0),
    ("cold starts", "cold_starts", 1, 0),
    ("switch hidden, %", "switch_time_hidden", 100, 1),
    ("lead, s", "lead_time_s", 1, 1),
    ("Jain", "jain", 1, 3),
    ("longest wait, s", "max_wait_s", 1, 0),
)
"""Heading, figure, what it is multiplied with, digits."""


def markdown(entries: Sequence[Entry]) -> str:
    """Means over seeds; +- is half of the 95 % interval."""
    return "\n".join(_lines(entries)) + "\n"


def _lines(entries: Sequence[Entry]) -> Iterator[str]:
    key: Callable[[Entry], tuple[str, float]] = lambda e: (e["deadline"], e["load"])  # noqa: E731
    for (deadline, load), rows in groupby(sorted(entries, key=key), key):
        yield f"### Deadline {deadline}, load {load:g}"
        yield ""
        yield from _table(list(rows))
        yield ""
    yield (
        "Means over seeds, with half of the 95 % interval (Student's t). "
        f"`- {REFERENCE}`: difference of attainment, paired by seed. "
        "`bound`: knows what nobody can, and need not be the best."
    )


def _table(rows: Sequence[Entry]) -> Iterator[str]:
    first = ("rank", "policy", "in time, %", f"- {REFERENCE}, points")
    heads = (*first, *(name for name, *_ in COLUMNS))
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "|".join("---" if head == "policy" else "---:" for head in heads) + "|"
    for row in rows:
        yield "| " + " | ".join(_cells(row)) + " |"


def _cells(row: Entry) -> Iterator[str]:
    yield "bound" if row["bound"] else str(row["rank"])
    yield row["policy"]
    yield _spread(row["figures"]["slo_attainment"])
    against = row[f"minus_{REFERENCE}"]
    yield _spread(against["slo_attainment"], sign="+") if against else "-"
    for _, path, scale, digits in COLUMNS:
        mean = row["figures"][path]["mean"]
        yield "-" if mean is None else f"{mean * scale:,.{digits}f}"


def _spread(figure: Mapping[str, float | None], sign: str = "") -> str:
    mean, high = figure["mean"], figure["high"]
    if mean is None:
        return "-"
    half = "" if high is None else f" ± {100 * (high - mean):.1f}"
    return f"{100 * mean:{sign}.1f}{half}"
