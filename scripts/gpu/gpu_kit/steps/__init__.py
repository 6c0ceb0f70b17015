"""The steps of the check, the most valuable first; each is a module of its own."""

from __future__ import annotations

from dataclasses import dataclass

_ALL = ("vllm", "vllm-cpu", "stub")
_REAL = ("vllm", "vllm-cpu")


@dataclass(frozen=True, slots=True)
class StepInfo:
    """A step: it is cut off after `limit_s` and not begun with less than `least_s` left.

    On a CPU, where an engine starts in a minute, it has three times as long.
    """

    name: str
    limit_s: float
    least_s: float
    engines: tuple[str, ...]
    told: str
    starts_engines: bool = True


STEPS = (
    StepInfo("environment", 30, 5, _ALL, "what this machine is", False),
    StepInfo("transfers", 90, 20, _REAL, "pinned memory and copies, without vLLM", False),
    StepInfo("serve", 150, 60, _ALL, "vLLM starts, serves, and the ledger is right"),
    StepInfo("sleep", 450, 120, _ALL, "device and host: our sleep backend against vLLM's own"),
    StepInfo("tiers", 180, 60, _ALL, "parked weights, and starts from the disk"),
    StepInfo("kv", 240, 90, _ALL, "the KV limit moves under load"),
    StepInfo("colocation", 420, 200, _ALL, "more models than room: announced against on demand"),
    StepInfo("shortage", 120, 45, ("vllm", "stub"), "a wake without enough memory rolls back"),
    StepInfo("profile", 180, 60, _ALL, "prefill and decode times for a profile of this device"),
    StepInfo("faults", 150, 60, _ALL, "what can go wrong with weights on their way"),
    StepInfo("contract", 120, 20, _REAL, "the tests of the GPU code, on this vLLM", False),
)

__all__ = ["STEPS", "StepInfo"]
