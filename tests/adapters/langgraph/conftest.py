from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from sdk.recording_backend import RecordingBackend

from maestro_agents import _adapters, _log, _openai_hook
from maestro_agents._control import control
from maestro_agents.testing import StubEngine

MODELS = ("stub", "smollm2-135m", "tiny-llama")


@pytest.fixture(scope="session", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The adapter's entry point, also where the distribution is not installed.

    Yields a folder that a child process may put on its path to find it too.
    """
    folder = tmp_path_factory.mktemp("site")
    info = folder / "maestro_mas-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: maestro-mas\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[maestro_agents.adapters]\nlanggraph = maestro_langgraph:adapter\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        if "langgraph" not in entry_points(group=_adapters.GROUP).names:
            patch.syspath_prepend(folder)
        _adapters.installed.cache_clear()
        yield folder


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    names = ("BASE_URL", "API_KEY", "ENABLED", "FALLBACK_BASE_URL", "FALLBACK_API_KEY")
    for name in (*names, "SEND_CONTENT"):
        monkeypatch.delenv(f"MAESTRO_{name}", raising=False)
        monkeypatch.delenv(f"OPENAI_{name}", raising=False)
    monkeypatch.setattr(_log, "_seen", set())
    yield
    control.flush(5)
    _openai_hook.uninstall()


@pytest.fixture(scope="session")
def stub() -> Iterator[StubEngine]:
    with StubEngine(models=MODELS, output_tokens=4) as stub:
        yield stub


@pytest.fixture
def backend(stub: StubEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingBackend]:
    """A Maestro to look at: MAESTRO_BASE_URL names it, its chats go on to the stub."""
    with RecordingBackend(stub.base_url) as backend:
        monkeypatch.setenv("MAESTRO_BASE_URL", backend.base_url)
        yield backend
        control.flush(5)
