"""The stub's weights: real bytes, so that the memory of its process follows its residency."""

from __future__ import annotations

import tempfile
from typing import IO

TIERS = ("device", "host", "parked")


class Weights:
    """`size` bytes in one of the `TIERS`. A copy in host memory outlives a resume.

    The copy lies outside the process's own memory, as a real engine's may.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.residency = "device"
        self._device = _filled(size)
        self._copy: IO[bytes] | None = None

    @property
    def host_bytes(self) -> int:
        """What the copy takes now."""
        return 0 if self._copy is None else self.size

    def bring(self, residency: str) -> int:
        """Move them; returns how many bytes left the device."""
        freed = len(self._device) if residency != "device" else 0
        if residency == "host" and self._copy is None:
            self._copy = tempfile.TemporaryFile()  # noqa: SIM115  closed by drop_copy
            self._copy.write(self._device or _filled(self.size))
        if residency == "parked":
            self.drop_copy()
        self._device = _filled(self.size) if residency == "device" else bytearray()
        self.residency = residency
        return freed

    def drop_copy(self) -> None:
        """Give up the copy in host memory."""
        if self._copy is not None:
            self._copy.close()
            self._copy = None


def _filled(size: int) -> bytearray:
    return bytearray(b"\1") * size  # zeros would take no memory before they are written
