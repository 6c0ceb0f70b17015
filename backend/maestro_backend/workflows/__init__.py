"""Runs, forecasts, learned transitions."""

from ._book import WorkflowBook
from ._branches import NEW, Branches
from ._critical_path import critical_path
from ._following import next_stages
from ._forecast import forecast
from ._futures import Future, Futures
from ._journey import Journey
from ._journeys import Journeys, Step, steps
from ._memory import StageFacts, StageMemory
from ._nouns import Expected, Habits, Past
from ._position import Position
from ._rest_mix import RestMix
from ._run import Run
from ._transitions import Numbers, Transitions

__all__ = [
    "NEW",
    "Branches",
    "Expected",
    "Future",
    "Futures",
    "Habits",
    "Journey",
    "Journeys",
    "Numbers",
    "Past",
    "Position",
    "RestMix",
    "Run",
    "StageFacts",
    "StageMemory",
    "Step",
    "Transitions",
    "WorkflowBook",
    "critical_path",
    "forecast",
    "next_stages",
    "steps",
]
