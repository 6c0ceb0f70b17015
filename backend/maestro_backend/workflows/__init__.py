"""Runs, forecasts, learned transitions."""

from ._book import WorkflowBook
from ._following import next_stages
from ._forecast import forecast
from ._memory import StageFacts, StageMemory
from ._nouns import Expected, Habits, Past
from ._position import Position
from ._run import Run
from ._transitions import Numbers, Transitions

__all__ = [
    "Expected",
    "Habits",
    "Numbers",
    "Past",
    "Position",
    "Run",
    "StageFacts",
    "StageMemory",
    "Transitions",
    "WorkflowBook",
    "forecast",
    "next_stages",
]
