"""The scheduler on virtual time: the same object that the gateway drives."""

from ._engine_model import EngineModel
from ._simulator import CallTimes, Result, Simulator
from ._workload import SimCall, SimRun

__all__ = ["CallTimes", "EngineModel", "Result", "SimCall", "SimRun", "Simulator"]
