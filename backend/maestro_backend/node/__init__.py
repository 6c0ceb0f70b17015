"""The node level: an agent per host that owns the workers, and the handles to talk to it."""

from ._handle import NodeHandle, NodeLostError
from ._local import LocalNode
from ._nvml import GpuMemory, read_gpus

__all__ = ["GpuMemory", "LocalNode", "NodeHandle", "NodeLostError", "read_gpus"]
