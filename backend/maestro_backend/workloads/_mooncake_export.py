"""Runs as agentic Mooncake JSON lines, for NVIDIA Dynamo's replay and for `read_mooncake`.

The form counts prefixes in whole blocks and by prompts alone: what a call shares with an earlier
answer is not in it. Runs share no prefix with each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from maestro_agents.protocol import ConfigError
from maestro_backend.simulator import SimRun

BLOCK_TOKENS = 64
"""Of one hash. Give Dynamo the same: `--trace-block-size 64`."""

Json = dict[str, Any]


def export_mooncake(
    path: str | Path, runs: Iterable[SimRun], block_tokens: int = BLOCK_TOKENS
) -> int:
    """Write the runs, in their order, at their times; how many requests were written.

    Raises:
        ConfigError: the file cannot be written.
    """
    written = 0
    try:
        with Path(path).open("w", encoding="utf-8") as file:
            for row in _rows(runs, block_tokens):
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
                written += 1
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
    return written


def _rows(runs: Iterable[SimRun], block: int) -> Iterator[Json]:
    free = 0
    for run in runs:
        hashes, free = _hashes(run, block, free)
        first: dict[str, int] = {}
        for index, call in enumerate(run.template.calls):
            first.setdefault(call.role, index)
        for index in range(len(run.template.calls)):
            yield _row(run, index, first, hashes[index], block)


def _hashes(run: SimRun, block: int, free: int) -> tuple[list[list[int]], int]:
    """By call, the numbers of its prompt's blocks; and the next number that is free.

    A block that an answer fills has a number, too: a later prompt may have it.
    """
    chains: list[list[int]] = []
    prompts = []
    for call in run.template.calls:
        of_prompt = -(-call.prompt_tokens // block)
        in_all = -(-(call.prompt_tokens + call.output_tokens) // block)
        before = chains[call.prefix_of] if call.prefix_of is not None else []
        shared = before[: min(call.prefix_tokens // block, of_prompt)]
        fresh = in_all - len(shared)
        chains.append([*shared, *range(free, free + fresh)])
        prompts.append(chains[-1][:of_prompt])
        free += fresh
    return prompts, free


def _row(run: SimRun, index: int, first: dict[str, int], hashes: list[int], block: int) -> Json:
    """One request. Each role of a run has a session of its own; `first` is where it begins."""
    template, call = run.template, run.template.calls[index]
    wait_ms = round(call.gap_s * 1000.0, 3)
    row: Json = {
        "request_id": _request(run, index),
        "session_id": f"{run.run}:{call.role}",
        "input_length": call.prompt_tokens,
        "output_length": call.output_tokens,
        "hash_ids": hashes,
    }
    if not call.after:
        row["timestamp"] = round(run.at * 1000.0 + wait_ms, 3)
    else:
        row["wait_for"] = [_request(run, before) for before in call.after]
        if wait_ms:
            row["delay" if call.human else "tool_wait_ms"] = wait_ms
    begun = [f for f in template.followers[index] if first[template.calls[f].role] == f]
    if begun:
        row["branches"] = [_request(run, follower) for follower in begun]
    if first[call.role] == index:
        row["prefix_reset"] = True
    row["maestro"] = {
        "source": template.source,
        "run": run.run,
        "workflow": template.workflow,
        "stage": call.stage,
        "role": call.role,
        "model": call.model,
        "human": call.human,
        "block": block,
    }
    return row


def _request(run: SimRun, index: int) -> str:
    return f"{run.run}/{index}"
