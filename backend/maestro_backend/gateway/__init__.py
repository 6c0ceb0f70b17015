"""The HTTP front door around the scheduler."""

from ._app import build_app
from ._feed import Feed
from ._records import CallRecord, CallStatus, lead_time_summary, run_view
from ._server import Serving, serving
from ._shell import Shell

__all__ = [
    "CallRecord",
    "CallStatus",
    "Feed",
    "Serving",
    "Shell",
    "build_app",
    "lead_time_summary",
    "run_view",
    "serving",
]
