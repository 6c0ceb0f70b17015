"""What was predicted of a run's calls, and why, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def explanation_lines(answer: Mapping[str, Any]) -> Iterator[str]:
    """Of what `GET /v1/maestro/runs/{run}/explain` answers."""
    yield f"run {answer['run']}: {len(answer['calls'])} calls"
    yield f"{'stage':<24} {'tokens':>7} {'p50':>7} {'p90':>7} {'p99':>7}  by"
    for call in answer["calls"]:
        yield from _call_lines(call)
    if answer["forecast"]:
        yield ""
        yield f"{'expected':<24} {'P':>7} {'p50':>7} {'p90':>7} {'in s':>7}"
    for call in answer["forecast"]:
        length = call["length"]
        figures = (length["p50"], length["p90"], call["earliest_start_s"])
        shown = " ".join(f"{figure:7.0f}" for figure in figures)
        yield f"{call['stage']:<24} {call['probability']:7.2f} {shown}"


def _call_lines(call: Mapping[str, Any]) -> Iterator[str]:
    made = call.get("predicted") or {}
    ended = call["status"] == "done"
    tokens = f"{call['output_tokens']}" if ended else call["status"]
    p50 = made.get("p50")
    figures = [call["predicted_tokens"] if p50 is None else p50, made.get("p90"), made.get("p99")]
    shown = " ".join("      -" if f is None else f"{f:7.0f}" for f in figures)
    by = call.get("version", "-") or "plain tables"
    yield f"{call['stage'] or call['role'] or '(no stage)':<24} {tokens:>7} {shown}  {by}"
    if (why := call.get("why")) is not None:
        yield f"    usual {why['usual']:.0f} tokens{_reasons(why)}"


def _reasons(why: Mapping[str, Any]) -> str:
    named = [
        f", x{reason['factor']:.2f} by {reason['feature']}"
        + ("" if reason["value"] is None else f" = {reason['value']:g}")
        for reason in why["reasons"]
    ]
    return "".join(named) + f", x{why['others']:.2f} by all others"
