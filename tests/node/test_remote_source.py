"""A model in a folder elsewhere: fetched once, resumed, checked; every fault has its line."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from node.model_server import CONFIG, ModelServer, model, serving, sums

from maestro_agents.protocol import BackendError, ConfigError, MaestroError
from maestro_backend.workers._sources import Checkpoint, fetch, is_cached, known_checkpoint

WEIGHTS = bytes(range(256)) * 400
BIG = "model.safetensors"


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with serving(model(WEIGHTS)) as state:
        yield state


async def get(source: str, cache: Path, **settings: Any) -> Checkpoint:
    return await fetch(source, cache=cache, pauses=(0.0, 0.0), **settings)


def content(checkpoint: Checkpoint) -> dict[str, bytes]:
    folder = Path(checkpoint.path)
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def leftovers(cache: Path) -> list[str]:
    """What a fetch left but the checkpoints and their locks."""
    return sorted(path.name for path in (cache / "models").glob(".[dp]*"))


async def test_a_folder_of_a_web_server_is_fetched_once(
    server: ModelServer, tmp_path: Path
) -> None:
    assert not is_cached(server.url, tmp_path)
    assert known_checkpoint(server.url, tmp_path) is None
    checkpoint = await get(server.url, tmp_path)
    assert content(checkpoint) == {"config.json": CONFIG, BIG: WEIGHTS}
    assert (checkpoint.stored_bytes, checkpoint.max_model_len) == (len(WEIGHTS), 64)
    assert leftovers(tmp_path) == []
    asked = len(server.requests)
    assert await get(f"{server.url}/", tmp_path) == checkpoint
    assert known_checkpoint(server.url, tmp_path) == checkpoint
    assert is_cached(server.url, tmp_path)
    assert len(server.requests) == asked


async def test_folders_below_and_odd_names(server: ModelServer, tmp_path: Path) -> None:
    files = {"config.json": CONFIG, BIG: b"w", "sub/a b%#?.txt": b"x", "empty": b""}
    server.files = {f"models/m/{name}": data for name, data in files.items()}
    listed = sums(files).replace(b"  config", b" *./config") + sums({"SHA256SUMS": b""})
    server.files["models/m/SHA256SUMS"] = listed
    assert content(await get(f"{server.url}/models/m/", tmp_path)) == files


async def test_two_addresses_are_two_models(server: ModelServer, tmp_path: Path) -> None:
    for at, weights in (("a/b", b"one"), ("a-b", b"two")):
        server.files |= {f"{at}/{name}": data for name, data in model(weights).items()}
    found = [content(await get(f"{server.url}/{at}", tmp_path))[BIG] for at in ("a/b", "a-b")]
    assert found == [b"one", b"two"]


async def test_a_cut_connection_goes_on_where_it_was(server: ModelServer, tmp_path: Path) -> None:
    """More cuts than tries: progress starts the tries afresh."""
    server.cut[BIG] = [10_000, 20_000, 1000, 5000]
    assert content(await get(server.url, tmp_path))[BIG] == WEIGHTS
    starts = [headers.get("range") for headers in server.asked(BIG)]
    assert starts == [None, "bytes=10000-", "bytes=30000-", "bytes=31000-", "bytes=36000-"]


async def test_without_progress_it_gives_up_and_a_later_fetch_resumes(
    server: ModelServer, tmp_path: Path
) -> None:
    server.cut[BIG] = [50_000, 0, 0]
    with pytest.raises(BackendError, match=r"cannot fetch from http://127"):
        await get(server.url, tmp_path)
    assert not is_cached(server.url, tmp_path)
    assert len(server.asked(BIG)) == 3
    assert content(await get(server.url, tmp_path))[BIG] == WEIGHTS
    assert server.asked(BIG)[-1]["range"] == "bytes=50000-"
    assert server.gets.count("config.json") == 1
    assert leftovers(tmp_path) == []


async def test_a_server_without_ranges_starts_the_file_again(
    server: ModelServer, tmp_path: Path
) -> None:
    server.ranges = False
    server.cut[BIG] = [50_000]
    assert content(await get(server.url, tmp_path))[BIG] == WEIGHTS


async def test_a_range_may_be_answered_in_parts(server: ModelServer, tmp_path: Path) -> None:
    server.cut[BIG] = [10_000]
    server.span = 40_000
    assert content(await get(server.url, tmp_path))[BIG] == WEIGHTS
    starts = [headers.get("range") for headers in server.asked(BIG)]
    assert starts == [None, "bytes=10000-", "bytes=50000-", "bytes=90000-"]


async def test_a_date_of_change_serves_as_well_as_an_etag(
    server: ModelServer, tmp_path: Path
) -> None:
    server.validator = "Last-Modified"
    server.cut[BIG] = [50_000]
    assert content(await get(server.url, tmp_path))[BIG] == WEIGHTS
    assert [headers.get("range") for headers in server.asked(BIG)] == [None, "bytes=50000-"]


async def test_without_a_validator_the_file_starts_again(
    server: ModelServer, tmp_path: Path
) -> None:
    server.validator = "weak"
    server.cut[BIG] = [50_000]
    assert content(await get(server.url, tmp_path))[BIG] == WEIGHTS
    assert [headers.get("range") for headers in server.asked(BIG)] == [None, None]


@pytest.mark.parametrize("listed", [True, False])
async def test_a_file_that_changed_meanwhile_starts_again(
    server: ModelServer, tmp_path: Path, listed: bool
) -> None:
    if not listed:
        del server.files["SHA256SUMS"]
    server.cut[BIG] = [50_000, 0, 0]
    with pytest.raises(BackendError):
        await get(server.url, tmp_path)
    fresh = WEIGHTS[::-1]
    server.files |= {BIG: fresh} if not listed else model(fresh)
    assert content(await get(server.url, tmp_path))[BIG] == fresh
    assert server.asked(BIG)[-1]["range"] == "bytes=50000-"


async def test_what_a_new_list_does_not_name_is_dropped(
    server: ModelServer, tmp_path: Path
) -> None:
    old = {"dropped": b"x", "config.json": CONFIG, BIG: WEIGHTS}
    server.files = {**old, "SHA256SUMS": sums(old)}
    server.status[BIG] = [500, 500, 500]
    with pytest.raises(BackendError, match="answers 500"):
        await get(server.url, tmp_path)
    assert "dropped" in server.gets
    server.files |= model(WEIGHTS, extra=b"z")
    assert set(content(await get(server.url, tmp_path))) == {"config.json", BIG, "extra"}


async def test_a_wrong_hash_is_fetched_once_more(server: ModelServer, tmp_path: Path) -> None:
    right = server.files["SHA256SUMS"]
    server.files["SHA256SUMS"] = sums({"config.json": CONFIG, BIG: b"other"})
    told: list[str] = []
    with pytest.raises(BackendError, match=r"model\.safetensors does not have the hash"):
        await get(server.url, tmp_path, progress=told.append)
    assert len(server.asked(BIG)) == 2
    assert any("wrong hash" in line for line in told)
    assert not is_cached(server.url, tmp_path)
    server.files["SHA256SUMS"] = right
    assert content(await get(server.url, tmp_path))[BIG] == WEIGHTS


async def test_damage_on_the_own_disk_is_found_and_mended(
    server: ModelServer, tmp_path: Path
) -> None:
    server.cut[BIG] = [50_000, 0, 0]
    with pytest.raises(BackendError):
        await get(server.url, tmp_path)
    (partial,) = (tmp_path / "models").glob(f".partial-*/**/{BIG}")
    partial.write_bytes(b"?" * 50_000)
    assert content(await get(server.url, tmp_path))[BIG] == WEIGHTS


@pytest.mark.parametrize("shards", [1, 2])
async def test_without_a_list_the_usual_files_are_tried(
    server: ModelServer, tmp_path: Path, shards: int, caplog: pytest.LogCaptureFixture
) -> None:
    names = [BIG] if shards == 1 else ["m-1.safetensors", "m-2.safetensors"]
    files = {"config.json": CONFIG, "tokenizer.json": b"{}", **dict.fromkeys(names, WEIGHTS)}
    if shards > 1:
        index = {"weight_map": {"a": names[0], "b": names[1], "c": names[0]}}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
    server.files = {**files, "notes.txt": b"not asked for"}
    told: list[str] = []
    checkpoint = await get(server.url, tmp_path, progress=told.append)
    assert content(checkpoint) == files
    assert any("cannot be checked" in line for line in told)
    assert "cannot be checked" in caplog.text


async def test_sizes_need_not_be_told_in_advance(server: ModelServer, tmp_path: Path) -> None:
    server.heads = False
    assert content(await get(server.url, tmp_path))[BIG] == WEIGHTS


@pytest.mark.parametrize(("size", "fits"), [(1_000_000, True), (65 * 2**20, False)])
async def test_a_file_whose_size_is_never_told_has_to_be_small(
    server: ModelServer, tmp_path: Path, size: int, fits: bool
) -> None:
    server.files |= model(bytes(size))
    server.lengths = False
    if fits:
        assert len(content(await get(server.url, tmp_path))[BIG]) == size
        return
    with pytest.raises(BackendError, match=r"safetensors .* without a Content-Length"):
        await get(server.url, tmp_path)


@pytest.mark.parametrize("status", [408, 429, 500, 503])
async def test_errors_that_pass_are_tried_again(
    server: ModelServer, tmp_path: Path, status: int
) -> None:
    server.status = {"SHA256SUMS": [status], BIG: [status, status]}
    assert content(await get(server.url, tmp_path))[BIG] == WEIGHTS


EVIL = {
    "absolute": "/etc/passwd",
    "above": "../../config.json",
    "above within": "a/../../b",
    "windows": "a\\..\\b",
    "empty part": "a//b",
    "dot": "a/./b",
}


@pytest.mark.parametrize("case", EVIL)
@pytest.mark.parametrize("listed", [True, False])
async def test_no_name_leads_out_of_the_folder(
    server: ModelServer, tmp_path: Path, case: str, listed: bool
) -> None:
    if listed:
        server.files["SHA256SUMS"] += sums({EVIL[case]: b"x"})
    else:
        del server.files["SHA256SUMS"]
        index = json.dumps({"weight_map": {"a": EVIL[case]}})
        server.files["model.safetensors.index.json"] = index.encode()
    with pytest.raises(ConfigError, match="no file in the folder"):
        await get(server.url, tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


BROKEN = {
    "not a list": ({"SHA256SUMS": b"<html>"}, "line 1: not what `sha256sum"),
    "empty list": ({"SHA256SUMS": b"\n"}, "0 files"),
    "two hashes": ({"SHA256SUMS": sums({"a": b"1"}) + sums({"a": b"2"})}, "'a' twice"),
    "no config": ({"SHA256SUMS": sums({BIG: WEIGHTS})}, "no config.json"),
    "no weights": ({"SHA256SUMS": sums({"config.json": CONFIG})}, "no weights"),
    "a listed file is missing": (model(other=b"x"), r"/other is not there \(status 404\)"),
    "no index": ({"model.safetensors.index.json": b"[]"}, "not an index"),
}


@pytest.mark.parametrize("case", BROKEN)
async def test_a_broken_folder_is_told(server: ModelServer, tmp_path: Path, case: str) -> None:
    files, expected = BROKEN[case]
    if case == "no index":
        del server.files["SHA256SUMS"]
    server.files |= {name: data for name, data in files.items() if name != "other"}
    with pytest.raises(ConfigError, match=expected):
        await get(server.url, tmp_path)
    assert not is_cached(server.url, tmp_path)


async def test_what_is_no_model_config_never_appears(server: ModelServer, tmp_path: Path) -> None:
    server.files = {"config.json": b"?", BIG: b"w"}
    with pytest.raises(ConfigError, match="not a model folder"):
        await get(server.url, tmp_path)
    assert not is_cached(server.url, tmp_path)


async def test_a_wrong_address_is_told(server: ModelServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere/config.json is not there .* address right"):
        await get(f"{server.url}/nowhere", tmp_path)


async def test_a_server_that_is_down_is_told(tmp_path: Path) -> None:
    with serving({}) as server:
        pass
    told: list[str] = []
    with pytest.raises(BackendError, match="Is the address right"):
        await get(server.url, tmp_path, progress=told.append)
    assert sum("trying again" in line for line in told) == 2


async def test_tls_that_fails_is_told_at_once(server: ModelServer, tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(BackendError, match="SSL_CERT_FILE"):
        await get(server.url.replace("http:", "https:"), tmp_path, progress=told.append)
    assert not any("trying again" in line for line in told)


@pytest.mark.parametrize(("status", "error"), [(401, BackendError), (418, BackendError)])
async def test_a_refusal_is_not_tried_again(
    server: ModelServer, tmp_path: Path, status: int, error: type[MaestroError]
) -> None:
    server.status["SHA256SUMS"] = [status]
    with pytest.raises(error, match="MAESTRO_SOURCE_TOKEN" if status == 401 else "418"):
        await get(server.url, tmp_path)
    assert server.gets == ["SHA256SUMS"]


async def test_a_login_is_sent_to_its_own_server_and_told_to_nobody(
    server: ModelServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    told: list[str] = []
    source = f"http://me:s%40cret@{server.address}"
    with serving(server.files) as other:
        server.redirect[BIG] = f"{other.url}/{BIG}"
        server.status["config.json"] = [503]
        checkpoint = await get(source, tmp_path, progress=told.append)
    assert content(checkpoint)[BIG] == WEIGHTS
    assert {headers["authorization"] for _, _, headers in server.requests} == {"Basic bWU6c0BjcmV0"}
    assert other.gets == [BIG]
    assert not any("authorization" in headers for _, _, headers in other.requests)
    for secret in ("s%40cret", "s@cret", "bWU6"):
        assert secret not in f"{told} {caplog.text} {os.listdir(tmp_path / 'models')}"
    server.files.clear()
    with pytest.raises(MaestroError) as raised:
        await get(f"{source}/gone", tmp_path)
    assert "cret" not in str(raised.value)
    assert await get(server.url, tmp_path) == checkpoint


async def test_the_token_is_not_sent_in_the_clear(
    server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAESTRO_SOURCE_TOKEN", "t0ken")
    await get(server.url, tmp_path)
    assert not any("authorization" in headers for _, _, headers in server.requests)


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """Of servers at 127.0.0.1 whose certificate this process trusts."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-keyout", key, "-out", certificate, "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


async def test_the_token_is_sent_over_tls_to_its_own_server(
    server: ModelServer, tls: ssl.SSLContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAESTRO_SOURCE_TOKEN", "t0ken")
    with serving(server.files, tls) as first, serving(server.files, tls) as other:
        first.redirect[BIG] = f"{other.url}/{BIG}"
        assert content(await get(first.url, tmp_path / "cache"))[BIG] == WEIGHTS
        assert {headers["authorization"] for _, _, headers in first.requests} == {"Bearer t0ken"}
        assert other.gets == [BIG]
        assert not any("authorization" in headers for _, _, headers in other.requests)


async def test_nothing_leaves_tls_by_a_redirect(
    server: ModelServer, tls: ssl.SSLContext, tmp_path: Path
) -> None:
    with serving(server.files, tls) as secure:
        secure.redirect[BIG] = f"{server.url}/{BIG}"
        with pytest.raises(BackendError, match="redirects from https to http"):
            await get(secure.url, tmp_path / "cache")


async def test_a_stopped_fetch_leaves_what_it_has_and_resumes(
    server: ModelServer, tmp_path: Path
) -> None:
    loop = asyncio.get_running_loop()
    arrived, release = asyncio.Event(), threading.Event()

    def halfway(path: str) -> None:
        if path == BIG:
            loop.call_soon_threadsafe(arrived.set)
            release.wait(30)

    server.halfway = halfway
    task = asyncio.create_task(get(server.url, tmp_path))
    await arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    release.set()
    assert not is_cached(server.url, tmp_path)
    assert len(leftovers(tmp_path)) == 1
    server.halfway = lambda path: None
    assert content(await get(server.url, tmp_path))[BIG] == WEIGHTS
    assert server.gets.count("config.json") == 1


async def test_two_fetches_of_one_model_download_it_once(
    server: ModelServer, tmp_path: Path
) -> None:
    first, second = await asyncio.gather(get(server.url, tmp_path), get(server.url, tmp_path))
    assert first == second
    assert server.gets.count(BIG) == 1


def shared(folder: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return f"file://{folder}"


@pytest.mark.parametrize("listed", [True, False])
async def test_a_mounted_folder_is_copied(tmp_path: Path, listed: bool) -> None:
    files = model(WEIGHTS)
    if not listed:
        files = {"config.json": CONFIG, BIG: WEIGHTS, "sub/more.txt": b"x"}
    source = shared(tmp_path / "a share", {**files, ".git/index": b"hidden"})
    checkpoint = await get(source.replace(" ", "%20"), tmp_path / "cache")
    files.pop("SHA256SUMS", None)
    assert content(checkpoint) == files
    assert Path(checkpoint.path).is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize("changed", [False, True])
async def test_a_stopped_copy_resumes_unless_the_file_has_changed(
    tmp_path: Path, changed: bool
) -> None:
    """Without a list, so that no hash would mend it. The first chunk of a file is told at once."""
    name, weights = "a.safetensors", b"w" * 3_000_000
    source = shared(tmp_path / "share", {"config.json": CONFIG, name: weights})

    def stop(told: str) -> None:
        task = asyncio.current_task()
        if told.startswith("fetching") and task is not None:
            task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(get(source, tmp_path / "cache", progress=stop))
    (partial,) = (tmp_path / "cache" / "models").glob(f".partial-*/**/{name}")
    held = partial.stat().st_size
    assert 0 < held < len(weights)
    partial.write_bytes(b"h" * held)  # what is here already shows in what comes out
    if changed:
        (tmp_path / "share" / name).write_bytes(b"n" * 3_000_000)
        os.utime(tmp_path / "share" / name, (0, 0))
    copied = content(await get(source, tmp_path / "cache"))[name]
    assert copied == (b"n" * len(weights) if changed else b"h" * held + weights[held:])


async def test_a_mounted_folder_with_a_wrong_hash(tmp_path: Path) -> None:
    source = shared(tmp_path / "share", {**model(b"right"), BIG: b"wrong"})
    with pytest.raises(BackendError, match="does not have the hash"):
        await get(source, tmp_path / "cache")
    shared(tmp_path / "share", {BIG: b"right"})
    assert content(await get(source, tmp_path / "cache"))[BIG] == b"right"


async def test_a_share_that_is_not_mounted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a model folder"):
        await get(f"file://{tmp_path}/nowhere", tmp_path / "cache")
    with pytest.raises(ConfigError, match="file:///folder"):
        await get("file://host/folder", tmp_path / "cache")
