"""What the scheduler hears of the wire's messages themselves. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from maestro_agents.protocol import (
    Announcement,
    RunEnded,
    RunEvent,
    RunPaused,
    RunResumed,
    StageEnded,
    StageStarted,
    ToolEnded,
    ToolStarted,
)
from maestro_backend import scheduler as core


def announced(run: str, stage: str, announcement: Announcement) -> core.Announced:
    certain = tuple(s.stage for s in announcement.successors if s.certain)
    candidates = tuple(s.stage for s in announcement.successors if not s.certain)
    return core.Announced(run, stage, certain, candidates)


def told(run: str, event: RunEvent) -> Iterator[core.Event]:
    """What the scheduler hears of the event itself."""
    match event:
        case StageStarted():
            yield core.StageStarted(run, event.stage, event.instance)
        case StageEnded():
            yield core.StageEnded(run, event.stage, event.instance)
        case ToolStarted():
            yield core.ToolStarted(run, event.stage, event.tool)
        case ToolEnded():
            yield core.ToolEnded(run, event.stage, event.tool, event.duration_s)
        case RunPaused():
            yield core.RunPaused(run)
        case RunResumed():
            yield core.RunResumed(run)
        case RunEnded():
            yield core.RunEnded(run)
