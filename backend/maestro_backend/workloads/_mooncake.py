"""Agentic Mooncake, the JSON lines that NVIDIA Dynamo replays: one LLM request a line. Reading.

Read from Dynamo's documentation (docs/agents, "Agentic Row Semantics"): `request_id`; `session_id`,
one agent's trajectory; `wait_for`, requests that must end before; then `delay` and `tool_wait_ms`
pass, in milliseconds; `timestamp`, milliseconds, where nothing is waited for; `input_length`,
`output_length` in tokens; `hash_ids`, one number per block of the prompt, equal numbers for equal
beginnings. `branches`, `prefix_reset` and `tool_events` describe and do not schedule: of them,
`branches` alone is read, since it tells which requests belong together.

What the form has no word for (workflow, stage, role, model, a person's pause) we write under the
one key `maestro`, which Dynamo passes over; a file without it is read all the same: a run is then
all requests that sessions, `wait_for` and `branches` tie together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from maestro_agents.protocol import ConfigError
from maestro_backend.simulator import SimCall, SimRun, Template

Count = Annotated[int, Field(ge=0)]
Milliseconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Ours(BaseModel):
    """What we add to a row. `block` is how many tokens a hash stands for."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    source: str = ""
    run: str = ""
    workflow: str = ""
    stage: str = ""
    role: str = ""
    model: str = ""
    human: bool = False
    block: Annotated[int, Field(gt=0)] | None = None


class Row(BaseModel):
    """One request. Other keys may be there: the form grows."""

    model_config = ConfigDict(frozen=True)

    request_id: str
    session_id: str | None = None
    wait_for: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()
    timestamp: Annotated[
        Milliseconds | None, Field(validation_alias=AliasChoices("timestamp", "created_time"))
    ] = None
    delay: Annotated[
        Milliseconds | None, Field(validation_alias=AliasChoices("delay", "delay_ms"))
    ] = None
    tool_wait_ms: Milliseconds | None = None
    input_length: Annotated[
        Count | None, Field(validation_alias=AliasChoices("input_length", "input_tokens"))
    ] = None
    output_length: Annotated[
        Count, Field(validation_alias=AliasChoices("output_length", "output_tokens"))
    ]
    hash_ids: tuple[int, ...] = ()
    maestro: Ours = Ours()


def read_mooncake(path: Path) -> tuple[SimRun, ...]:
    """The file's runs, earliest first, at the times it gives (from 0 on). No deadline is set.

    Raises:
        ConfigError: the file cannot be read, or a line is no such request.
    """
    rows = list(_rows(path))
    if not rows:
        raise ConfigError(f"{path} has no request")
    block = _block(rows)
    runs = [_run(path.stem, group, block) for group in _groups(rows, path)]
    first = min(at for at, _ in runs)
    ordered = sorted(runs, key=lambda run: run[0])
    return tuple(SimRun(template.name, at - first, template) for at, template in ordered)


def _rows(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _row(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _row(line: str, where: str) -> Row:
    try:
        return Row.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the line"
        hint = (
            " (plain Mooncake has none: convert to the agentic form)"
            if field == "request_id"
            else ""
        )
        raise ConfigError(f"{where}: {field}: {first['msg']}{hint}") from None


def _groups(rows: list[Row], path: Path) -> list[list[Row]]:
    """Rows by run: what sessions, dependencies and branches tie together, in the file's order."""
    at = {row.request_id: index for index, row in enumerate(rows)}
    if len(at) < len(rows):
        raise ConfigError(f"{path} has a request_id twice: each request needs its own")
    root = list(range(len(rows)))

    def find(index: int) -> int:
        while root[index] != index:
            root[index] = root[root[index]]
            index = root[index]
        return index

    sessions: dict[str, int] = {}
    for index, row in enumerate(rows):
        ties = [at[other] for other in (*row.wait_for, *row.branches) if other in at]
        if missing := [other for other in row.wait_for if other not in at]:
            raise ConfigError(
                f"{path}: {row.request_id} waits for {missing[0]}, which is not there"
            )
        if row.session_id is not None:
            ties.append(sessions.setdefault(row.session_id, index))
        if row.maestro.run:
            ties.append(sessions.setdefault(f"{row.maestro.source}\n{row.maestro.run}", index))
        for other in ties:
            root[find(other)] = find(index)
    groups: dict[int, list[Row]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[find(index)].append(row)
    return [_ordered(group, path) for group in groups.values()]


def _ordered(rows: list[Row], path: Path) -> list[Row]:
    """What waits comes after what it waits for; else the file's order holds."""
    done: dict[str, Row] = {}
    waiting = rows
    while waiting:
        left = []
        for row in waiting:
            if all(other in done for other in row.wait_for):
                done[row.request_id] = row
            else:
                left.append(row)
        if len(left) == len(waiting):
            raise ConfigError(f"{path}: {left[0].request_id} waits for itself, in a circle")
        waiting = left
    return list(done.values())


def _run(stem: str, rows: list[Row], block: int) -> tuple[float, Template]:
    """Start in seconds, and the run. Requests that wait for nothing start at their own times."""
    starts = [row.timestamp for row in rows if not row.wait_for and row.timestamp is not None]
    start = min(starts, default=0.0)
    at = {row.request_id: index for index, row in enumerate(rows)}
    main = rows[0].session_id
    owners: dict[int, int] = {}
    calls: list[SimCall] = []
    for index, row in enumerate(rows):
        prompt = row.input_length if row.input_length is not None else len(row.hash_ids) * block
        of, tokens = _prefix(row, prompt, block, owners)
        owners.update(dict.fromkeys(row.hash_ids, index))
        wait_ms = (row.delay or 0.0) + (row.tool_wait_ms or 0.0)
        if not row.wait_for and row.timestamp is not None:
            wait_ms = row.timestamp - start
        ours = row.maestro
        calls.append(
            SimCall(
                stage=ours.stage or ("turn" if row.session_id == main else "branch"),
                model=ours.model,
                prompt_tokens=prompt,
                output_tokens=row.output_length,
                role=ours.role,
                after=tuple(sorted({at[other] for other in row.wait_for})),
                gap_s=wait_ms / 1000.0,
                human=ours.human,
                prefix_of=of,
                prefix_tokens=tokens,
            )
        )
    ours = rows[0].maestro
    name = ours.run or main or rows[0].request_id
    return start / 1000.0, Template(ours.source or stem, name, tuple(calls), ours.workflow)


def _prefix(row: Row, prompt: int, block: int, owners: dict[int, int]) -> tuple[int | None, int]:
    """The latest request that has the longest beginning in common, by hashes. A half-filled block
    counts as far as it is filled here."""
    shared, of = 0, None
    for number, owner in enumerate(map(owners.get, row.hash_ids), 1):
        if owner is None:
            break
        shared, of = number, owner
    tokens = min(prompt, shared * block)
    return (of, tokens) if of is not None and tokens else (None, 0)


def _block(rows: list[Row]) -> int:
    """Tokens per hash: as we wrote it, else the least power of two that holds every prompt."""
    for row in rows:
        if row.maestro.block is not None:
            return row.maestro.block
    least = max(
        (
            -(-row.input_length // len(row.hash_ids))
            for row in rows
            if row.hash_ids and row.input_length
        ),
        default=1,
    )
    return 1 << max(0, least - 1).bit_length()
