"""What the lives of the workers taught: a JSON file in the state folder, which no fault stops."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maestro_backend.config import ModelConfig
from maestro_backend.scheduler import Residency

log = logging.getLogger(__name__)

_KEPT = 5
"""Of each kind of activation so many times count, the latest."""

_HALF_LIFE_S = 24 * 3600.0
"""Headroom that is not needed again loses half of itself in this time."""

_SLACK_BYTES = 8 * 1024**2
"""Less than this is not worth a line in the log, a write or a promise."""


class _Entry(BaseModel):
    """One model, with the settings under which it was learned."""

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    activation_s: dict[Residency, list[float]] = {}
    weights_bytes: int | None = None
    headroom_bytes: int = Field(default=0, ge=0)
    headroom_at: float = 0.0
    """When it was last needed: seconds of the wall clock, which a restart does not reset."""


class _File(BaseModel):
    version: int = 1
    models: dict[str, _Entry] = {}


class LearnedState:
    """The `Learned` of the workers. `promised` is the residual of each model by its engine's word.

    A model whose `fingerprints` entry is not the one in the file is learned anew. A file that
    cannot be read is set aside, one that cannot be written is tried again at the next change.
    """

    def __init__(
        self, file: Path, fingerprints: Mapping[str, str], promised: Mapping[str, int]
    ) -> None:
        self._file = file
        self._promised = promised
        self._known = _read(file)
        for model, fingerprint in fingerprints.items():
            entry = self._known.models.get(model)
            if entry is None or entry.fingerprint != fingerprint:
                self._known.models[model] = _Entry(fingerprint=fingerprint)

    def activation_s(self, model: str) -> Mapping[Residency, float]:
        """Seconds to bring `model` to the device from each residency: the median of the last."""
        times = self._known.models[model].activation_s
        return {start: median(seconds) for start, seconds in times.items()}

    def moved(self, model: str, start: Residency, end: Residency, seconds: float) -> None:
        """A move took so long. Only moves to the device are kept."""
        if end is Residency.DEVICE:
            times = self._known.models[model].activation_s
            times[start] = [*times.get(start, ()), seconds][-_KEPT:]
            self._write()

    def weights_bytes(self, model: str) -> int | None:
        """What its weights take by the engine's own count, None while unknown."""
        return self._known.models[model].weights_bytes

    def weighed(self, model: str, weights_bytes: int) -> None:
        """Its weights take so much."""
        entry = self._known.models[model]
        if entry.weights_bytes != weights_bytes:
            entry.weights_bytes = weights_bytes
            self._write()

    def residual_bytes(self, model: str) -> int | None:
        """The engine's promise with learned headroom on top; None while that is enough."""
        headroom = self.headroom_bytes(model)
        return self._promised[model] + headroom if headroom else None

    def headroom_bytes(self, model: str) -> int:
        """What it took beyond its engine's promise: the most of late."""
        entry = self._known.models[model]
        age_s = max(0.0, time.time() - entry.headroom_at)
        left = int(entry.headroom_bytes * 0.5 ** (age_s / _HALF_LIFE_S))
        return left if left >= _SLACK_BYTES else 0

    def residual_measured(self, model: str, residual_bytes: int) -> None:
        """So much was seen beside its weights and KV cache."""
        headroom = residual_bytes - self._promised[model]
        if headroom >= self.headroom_bytes(model) + _SLACK_BYTES:
            log.warning("%s takes %d bytes more than its engine promises", model, headroom)
            entry = self._known.models[model]
            entry.headroom_bytes, entry.headroom_at = headroom, time.time()
            self._write()

    def _write(self) -> None:
        fresh = self._file.with_name(f"{self._file.name}.new")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(self._known.model_dump_json(), encoding="utf-8")
            os.replace(fresh, self._file)
        except OSError as error:
            log.warning("what was learned could not be written to %s: %s", self._file, error)


def settings_fingerprint(settings: ModelConfig, engine: str) -> str:
    """Changes with anything that may change what is learned of a model."""
    text = json.dumps([settings.model_dump(mode="json"), engine], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(file: Path) -> _File:
    try:
        return _File.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return _File()
    except (OSError, ValidationError) as error:
        aside = file.with_name(f"{file.name}.broken")
        log.warning("cannot read %s, set aside as %s: %s", file, aside.name, error)
        try:
            os.replace(file, aside)
        except OSError as failure:
            log.warning("cannot set %s aside: %s", file, failure)
        return _File()
