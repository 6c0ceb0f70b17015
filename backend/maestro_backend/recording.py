"""The flight recorder: every event and what the scheduler answered, one JSON line each.

Line 1 is a header `{"maestro_recording": 2, "policy": ..., "settings": {...}}`; each further line
is `{"now": seconds, "event": {...}, "commands": [...]}`. Predictions are in the events, so a
recording replays to the same decisions after any retraining.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter

from maestro_agents.protocol import ConfigError
from maestro_backend.scheduler import Command, Event, Scheduler, Settings, decode_event, encode
from maestro_backend.scheduler.policies import policy

_log = logging.getLogger("maestro.recording")

VERSION = 2
_SETTINGS = TypeAdapter(Settings)


class Recorder:
    """Writes a file, line by line. Never holds prompt text: events carry only counts.

    A disk that fails later on ends the recording, not the serving; it is logged once.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(self, path: Path, scheduler: Scheduler) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] | None = path.open("w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise ConfigError(f"cannot record to {path}: {error.strerror}") from error
        self.path = path
        self._write(
            {
                "maestro_recording": VERSION,
                "policy": scheduler.policy.name,
                "settings": asdict(scheduler.settings),
            }
        )

    def record(self, now: float, event: Event, commands: Iterable[Command]) -> None:
        line = {"now": now, "event": encode(event), "commands": [encode(c) for c in commands]}
        self._write(line)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        except OSError as error:
            _log.error("recording to %s ends here: %s", self.path, error.strerror)
            self.close()


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a replay decided otherwise; `line` counts from 1."""

    line: int
    recorded: list[dict[str, Any]]
    replayed: list[dict[str, Any]]


def replay(path: Path, *, validate: bool = True) -> tuple[int, Divergence | None]:
    """Drive a fresh scheduler with the recorded events.

    Returns the number of events replayed and the first divergence, if any.

    Raises:
        ConfigError: the file is no recording of this version.
    """
    with path.open(encoding="utf-8") as file:
        scheduler = _scheduler_of(file.readline(), path)
        count = 0
        for number, text in enumerate(file, start=2):
            if not text.endswith("\n"):  # cut off by a crash in mid-write
                break
            line = _parse(text, path, number)
            commands = scheduler.handle(decode_event(line["event"]), line["now"])
            if validate:
                scheduler.validate()
            count += 1
            # Through JSON once, as the recorded side went: tuples become lists.
            replayed = json.loads(json.dumps([encode(c) for c in commands]))
            if replayed != line["commands"]:
                return count, Divergence(number, line["commands"], replayed)
    return count, None


def _scheduler_of(header: str, path: Path) -> Scheduler:
    data = _parse(header, path, 1)
    if data.get("maestro_recording") != VERSION:
        raise ConfigError(f"{path} is no Maestro recording of version {VERSION}")
    return Scheduler(policy(data["policy"]), _SETTINGS.validate_python(data["settings"]))


def _parse(text: str, path: Path, number: int) -> dict[str, Any]:
    try:
        line: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}, line {number}: not JSON ({error}); is it cut off?") from error
    return line
