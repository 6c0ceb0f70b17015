"""The systems that are compared, by name. `maestro:paged` is `maestro` with one thing changed.

Fairness: whoever predicts uses the same predictions; whoever is told of routing is told the same;
all have the same engines, the same tiers of memory and the same virtual time for moving weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from maestro_agents.protocol import ConfigError

from ._system import System

_BLIND: dict[str, Any] = {"lengths": "none", "future": "none"}
_ENGINES: dict[str, Any] = {**_BLIND, "weights": "lru", "elastic": False, "preempts": False}

_BASE = (
    System(
        "fcfs",
        "calls in order of arrival, on our node and cluster levels without any prediction; load "
        "1.0 is where it saturates",
        order="fcfs",
        **_BLIND,
    ),
    System(
        "sjf",
        "the call with the shortest predicted service first (SSJF, 2404.08509, with our predictor "
        "instead of a proxy model), on our node and cluster levels",
        order="sjf",
    ),
    System(
        "las",
        "the run with the least attained service first, decayed by half-life (llm-d's "
        "program-aware fairness, with runs for programs), on our node and cluster levels",
        order="las",
    ),
    System(
        "plas",
        "Agentix/Autellix PLAS: multi-level queues on a program's attained service, promotion of "
        "the starved; calls are not preempted between levels; on our node and cluster levels",
        order="plas",
    ),
    System(
        "atlas",
        "Agentix/Autellix ATLAS: as plas, on the longest completed path; its locality rule is "
        "left out; on our node and cluster levels",
        order="atlas",
    ),
    System(
        "kairos",
        "Kairos (2508.06948): agents by the remaining latency learned of them, then by the run's "
        "start; what it knows it learns inside the cell; its memory packing is left out; on our "
        "node and cluster levels",
        order="kairos",
    ),
    System(
        "edf",
        "earliest deadline first, KV reserved for max_tokens (4,096), weights on demand and the "
        "least recently used out, caches of one size: the paper's baseline as we read it, but with "
        "our tiers of memory: a copy of weights in host memory comes back in seconds",
        order="edf",
        kv="max_tokens",
        **_ENGINES,
    ),
    System(
        "edf+vllm",
        "as edf, with vLLM's paged KV: nothing reserved but the prompt, recompute when blocks run "
        "out",
        order="edf",
        kv="paged",
        **_ENGINES,
    ),
    System(
        "edf+node",
        "earliest deadline first on our node and cluster levels, with our predictions",
        order="edf",
    ),
    System(
        "affinity",
        "the strong practical baseline (vLLM and llm-d routers): paged KV, prefix cache, the "
        "worker that has the session's KV, yielding to the least loaded; order of arrival; weights "
        "on demand, least recently used out",
        order="fcfs",
        kv="paged",
        placement="affinity",
        **_ENGINES,
    ),
    System(
        "static",
        "one model per device, never moved: vLLM servers behind the affinity router",
        order="fcfs",
        kv="paged",
        placement="affinity",
        **{**_ENGINES, "weights": "static"},
    ),
    System("maestro", "ours: everything on"),
    System(
        "oracle",
        "true lengths, true futures and Belady's weights, least slack first: not ranked, for it "
        "knows what nobody can; no upper bound: it works on our node level, and others beat it at "
        "times",
        order="oracle",
        weights="belady",
        lengths="true",
        future="true",
        ranked=False,
    ),
)

_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lru": ("weights on demand, least recently used out", {"weights": "lru"}),
    "prefetch-all": ("weights of every forecast call are brought in", {"weights": "prefetch-all"}),
    "belady": (
        "weights by the true future, which nobody knows: not ranked",
        {"weights": "belady", "future": "true", "ranked": False},
    ),
    "static": ("one model per device, never moved", {"weights": "static"}),
    "max_tokens": ("KV reserved for max_tokens (4,096)", {"kv": "max_tokens"}),
    "paged": ("KV reserved for the prompt only, recompute when blocks run out", {"kv": "paged"}),
    "quantile+growth": ("KV reserved for the 90th percentile, growing", {"kv": "quantile+growth"}),
    "median": ("lengths from a table of medians by role", {"lengths": "median"}),
    "no-announcements": ("apps say nothing of their routing", {"future": "learned"}),
    "no-predictor": (
        "lengths by class default, no learned future; apps still say what their routing decides",
        {"lengths": "none", "future": "routed"},
    ),
    "no-prefetch": ("weights on demand, least recently used out", {"weights": "lru"}),
    "no-elastic": ("caches of one size", {"elastic": False}),
    "no-preempt": ("no call gives up its KV memory for another", {"preempts": False}),
    "no-order": ("order of arrival", {"order": "fcfs"}),
    "whole-device": (
        "one model at a time on a device, with all of its memory",
        {"whole_device": True, "elastic": False},
    ),
}

ABLATIONS = (
    "maestro:no-announcements",
    "maestro:no-predictor",
    "maestro:no-prefetch",
    "maestro:no-elastic",
    "maestro:no-order",
)
"""One part of ours left out each."""


def system(name: str) -> System:
    """The system called `name`, such as `edf+vllm` or `maestro:no-elastic`; several changes go as
    `maestro:paged:lru`.

    Raises:
        ConfigError: there is none of that name.
    """
    base, *changes = name.split(":")
    found = SYSTEMS.get(name) or SYSTEMS.get(base)
    if found is None:
        raise ConfigError(_unknown("policy", base, [one.name for one in _BASE]))
    if name in SYSTEMS:
        return found
    for change in changes:
        if change not in _VARIANTS:
            raise ConfigError(_unknown(f"variant of {base}", change, _VARIANTS))
        found = _changed(found, change)
    return found


def _changed(base: System, change: str) -> System:
    about, fields = _VARIANTS[change]
    if not base.ranked:
        fields = {**fields, "ranked": False}
    return replace(base, name=f"{base.name}:{change}", about=f"{base.name}, but: {about}", **fields)


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = get_close_matches(name, known, 1)
    hint = f": did you mean {near[0]!r}?" if near else f": choose of {', '.join(known)}"
    return f"unknown {kind} {name!r}{hint}"


SYSTEMS: dict[str, System] = {one.name: one for one in _BASE}
SYSTEMS |= {name: _changed(SYSTEMS["maestro"], name.partition(":")[2]) for name in ABLATIONS}
SYSTEMS["affinity:whole-device"] = _changed(SYSTEMS["affinity"], "whole-device")
SYSTEMS |= {
    f"maestro:{change}": _changed(SYSTEMS["maestro"], change)
    for change in ("median", "prefetch-all", "belady", "max_tokens", "paged")
}
