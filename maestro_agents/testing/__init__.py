"""The stub engine: one OpenAI-compatible test double for adapters, gateway and load tests."""

from ._engine import RecordedRequest
from ._faults import FaultKind
from ._latency import Latency
from ._reply import OutputTokens, ReasoningTokens
from ._server import StubEngine

__all__ = [
    "FaultKind",
    "Latency",
    "OutputTokens",
    "ReasoningTokens",
    "RecordedRequest",
    "StubEngine",
]
