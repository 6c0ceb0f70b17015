"""What the agent tells of its memory: the ledger beside the last measurements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maestro_backend.scheduler import DeviceMeasured

from ._learned import LearnedState
from ._ledger import Ledger
from ._measure import HOST


def memory_report(
    ledger: Ledger, told: Mapping[str, DeviceMeasured], learned: LearnedState
) -> dict[str, Any]:
    """JSON-ready; all sizes in bytes, None for what has not been measured yet."""

    def used(device: str) -> int | None:
        return told[device].used_bytes if device in told else None

    return {
        "devices": {
            device: {
                "capacity_bytes": capacity,
                "free_bytes": ledger.free_bytes(device),
                "measured_bytes": used(device),
            }
            for device, capacity in ledger.capacity.items()
        },
        "host": {
            "capacity_bytes": ledger.host_capacity,
            "free_bytes": ledger.host_room(""),
            "measured_bytes": used(HOST),
        },
        "workers": {
            model: {
                "device": held.device,
                "weights_bytes": held.memory.weights_bytes,
                "kv_bytes": held.memory.kv_bytes,
                "residual_bytes": held.memory.residual_bytes,
                "headroom_bytes": learned.headroom_bytes(model),
                "host_bytes": ledger.host_held.get(model, 0),
                "measured_bytes": held.measured_bytes,
            }
            for model, held in ledger.held.items()
        },
        "expected": {
            model: {
                "device": most.device,
                "device_bytes": most.device_bytes,
                "host_bytes": most.host_bytes,
            }
            for model, most in ledger.expected.items()
        },
    }
