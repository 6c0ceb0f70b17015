import os
from collections.abc import Iterator

import pytest
from sdk.recording_backend import RecordingBackend

from maestro_agents import _log


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("MAESTRO_", "OPENAI_")) and name != "MAESTRO_TEST_SESSION":
            monkeypatch.delenv(name)
    monkeypatch.setattr(_log, "_seen", set())


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingBackend]:
    with RecordingBackend() as backend:
        monkeypatch.setenv("MAESTRO_BASE_URL", backend.base_url)
        yield backend
