"""The scheduler on virtual time: the same object that the gateway drives."""

from ._cluster import Cluster, SimDevice, SimNode
from ._foresight import CallForesight, Foresight
from ._hardware import DeviceProfile, ModelGeometry
from ._layout import Service, idle_service
from ._outcome import CallSpan, MemorySample, Outcome, RunOutcome
from ._simulator import simulate
from ._steps import StepCosts, step_costs
from ._system import System
from ._systems import ABLATIONS, SYSTEMS, system
from ._workload import SimCall, SimRun, Template

__all__ = [
    "ABLATIONS",
    "SYSTEMS",
    "CallForesight",
    "CallSpan",
    "Cluster",
    "DeviceProfile",
    "Foresight",
    "MemorySample",
    "ModelGeometry",
    "Outcome",
    "RunOutcome",
    "Service",
    "SimCall",
    "SimDevice",
    "SimNode",
    "SimRun",
    "StepCosts",
    "System",
    "Template",
    "idle_service",
    "simulate",
    "step_costs",
    "system",
]
