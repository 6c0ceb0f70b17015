"""Runs, forecasts, learned transitions."""

from ._book import WorkflowBook
from ._forecast import Expected, forecast, next_stages
from ._memory import StageFacts, StageMemory
from ._run import Run
from ._transitions import Transitions

__all__ = [
    "Expected",
    "Run",
    "StageFacts",
    "StageMemory",
    "Transitions",
    "WorkflowBook",
    "forecast",
    "next_stages",
]
