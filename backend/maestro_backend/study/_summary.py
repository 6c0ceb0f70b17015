"""What the cells say together: means over seeds, differences to a reference, ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from math import inf, isfinite
from typing import Any

from maestro_backend.evaluation import plain
from maestro_backend.simulator import System

from ._estimates import Estimate, estimate

REFERENCE = "edf"
"""The system that others are compared with, seed by seed, where it is among them."""

FIGURES = (
    "slo_attainment",
    "goodput",
    "latency_s.mean",
    "latency_s.p50",
    "latency_s.p95",
    "latency_s.p99",
    "slowdown.mean",
    "slowdown.p95",
    "throughput.calls_s",
    "throughput.output_tokens_s",
    "cached_prompt_share",
    "kv_reserved_byte_s",
    "kv_used_byte_s",
    "stalls",
    "preemptions",
    "recomputed_tokens",
    "cold_starts",
    "activation_s",
    "switch_time_hidden",
    "lead_time_s",
    "jain",
    "max_wait_s",
    "unfinished",
)

Rows = Sequence[Mapping[str, Any]]


def summary(cells: Rows, systems: Iterable[System]) -> list[dict[str, Any]]:
    """One entry for each policy, load and deadline: within a load and deadline by rank, and those
    that are no rivals (`bound`) last, without one."""
    bounds = {system.name: not system.ranked for system in systems}
    found: list[dict[str, Any]] = []
    for load, deadline in _settings(cells):
        here = [c for c in cells if (c["load"], c["deadline"]) == (load, deadline)]
        entries = [_entry(name, here, bounds[name]) for name in bounds]
        entries = [entry for entry in entries if entry["seeds"]]
        entries.sort(key=lambda entry: (entry["bound"], -_attained(entry)))
        for rank, entry in enumerate(entries, 1):
            entry["rank"] = None if entry["bound"] else rank
            found.append({"load": load, "deadline": deadline, **entry})
    return found


def value(figures: Mapping[str, Any], path: str) -> float | None:
    """`latency_s.p95` of a cell's figures; None where there is none."""
    found: Any = figures
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return None if found is None else float(found)


def _settings(cells: Rows) -> list[tuple[float, str]]:
    return list(dict.fromkeys((cell["load"], cell["deadline"]) for cell in cells))


def _entry(policy: str, cells: Rows, bound: bool) -> dict[str, Any]:
    mine = [cell for cell in cells if cell["policy"] == policy]
    reference = [cell for cell in cells if cell["policy"] == REFERENCE]
    against = {path: _plain(_difference(mine, reference, path)) for path in FIGURES}
    return {
        "policy": policy,
        "bound": bound,
        "seeds": len(mine),
        "figures": {path: _plain(estimate([value(c, path) for c in mine])) for path in FIGURES},
        f"minus_{REFERENCE}": against if reference and policy != REFERENCE else None,
    }


def _difference(mine: Rows, theirs: Rows, path: str) -> Estimate:
    """Paired: of the seeds that both have."""
    other = {cell["seed"]: value(cell, path) for cell in theirs}
    gaps = []
    for cell in mine:
        a, b = value(cell, path), other.get(cell["seed"])
        if a is not None and b is not None:
            gaps.append(a - b)
    return estimate(gaps)


def _attained(entry: Mapping[str, Any]) -> float:
    mean = entry["figures"]["slo_attainment"]["mean"]
    return mean if mean is not None and isfinite(mean) else -inf


def _plain(found: Estimate) -> dict[str, Any]:
    return dict(plain(asdict(found)))
