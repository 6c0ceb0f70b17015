"""The records of running workers: how a new agent finds what an earlier one has started."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

_CLOCK_S = 1.0
"""Create times are told through the wall clock, which may be set a little in between."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """A started process. Times are seconds since the epoch; `pid` is also its process group.

    `most_bytes` is what it may take of `device` at most, `host_bytes` of the host.
    """

    model: str
    pid: int
    create_time: float
    address: str
    fingerprint: str
    log: str
    started: float
    device: str = ""
    most_bytes: int = 0
    host_bytes: int = 0

    def write(self, path: Path) -> None:
        """Put it at `path`, whole or not at all.

        Raises:
            OSError: the disk does not take it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}.new")
        draft.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        draft.replace(path)

    def lives(self) -> bool:
        """Whether that very process runs: not a later one that was given its pid."""
        return is_same_process(self.pid, self.create_time)


def is_same_process(pid: int, create_time: float) -> bool:
    """Whether `pid` still runs (a zombie does not) and was created at `create_time`."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - create_time) < _CLOCK_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def read_record(path: Path) -> WorkerRecord | None:
    """The record at `path`; None where there is none that can be read."""
    try:
        return WorkerRecord(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError) as error:
        log.warning("%s is no record of a worker and is left alone: %s", path, error)
        return None


def read_records(folder: Path) -> dict[Path, WorkerRecord]:
    """All records in `folder` by their files; empty where there is no such folder."""
    found = {file: read_record(file) for file in sorted(folder.glob("*.json"))}
    return {file: record for file, record in found.items() if record is not None}
