"""Room in the disk cache: least recent use, what is held, full disks, killed processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from node.model_server import CONFIG, ModelServer, model, serving

from maestro_agents.protocol import BackendError, UnsupportedError
from maestro_backend.workers._sources import Checkpoint, fetch, forget, hold, is_cached

KB = 1000
LIMIT = 100 * KB
BIG = "model.safetensors"
TESTS = Path(__file__).parents[1]


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with serving(model(b"w" * 60 * KB)) as state:
        yield state


def share(folder: Path, size: int) -> str:
    """A mounted model folder of `size` bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(CONFIG)
    (folder / BIG).write_bytes(b"w" * (size - len(CONFIG)))
    return f"file://{folder}"


async def get(source: str, cache: Path, limit: int | None = LIMIT, **more: Any) -> Checkpoint:
    return await fetch(source, cache=cache, limit_bytes=limit, pauses=(), **more)


def cached(sources: list[str], cache: Path) -> list[int]:
    return [number for number, source in enumerate(sources) if is_cached(source, cache)]


def folders(cache: Path) -> int:
    return sum(path.is_dir() for path in (cache / "models").iterdir())


class Expected:
    """Least recent use, as simple as can be."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.order: list[int] = []  # the last is the most recently used
        self.held: set[int] = set()

    def fetch(self, number: int) -> bool:
        """False where it cannot fit; then nothing has changed."""
        if number not in self.order:
            kept = list(self.order)
            while sum(self.sizes[n] for n in kept) + self.sizes[number] > LIMIT:
                free = [n for n in kept if n not in self.held]
                if not free:
                    return False
                kept.remove(free[0])
            self.order = kept
        self.use(number)
        return True

    def use(self, number: int) -> None:
        self.order = [n for n in self.order if n != number] + [number]


STEPS = st.lists(
    st.tuples(st.sampled_from(["fetch", "fetch", "hold", "drop", "forget"]), st.integers(0, 4))
)


@given(sizes=st.lists(st.integers(1, 50), min_size=5, max_size=5), steps=STEPS)
@settings(max_examples=40)
def test_room_is_made_by_least_recent_use(sizes: list[int], steps: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(play(Path(name), [size * KB for size in sizes], steps))


async def play(folder: Path, sizes: list[int], steps: list[tuple[str, int]]) -> None:
    cache, expected = folder / "cache", Expected(sizes)
    sources = [share(folder / f"m{number}", size) for number, size in enumerate(sizes)]
    holds: dict[int, ExitStack] = {}
    for step, number in steps:
        if step == "fetch":
            await _fetched(sources[number], cache, fits=expected.fetch(number))
        elif step == "hold" and number in expected.order and number not in holds:
            holds[number] = ExitStack()
            holds[number].enter_context(hold(await get(sources[number], cache)))
            expected.held.add(number)
            expected.use(number)
        elif step == "drop" and number in holds:
            holds.pop(number).close()
            expected.held.discard(number)
            expected.use(number)
        elif step == "forget":
            _forgotten(sources[number], cache, number in holds)
            expected.order = [n for n in expected.order if n != number or n in holds]
        assert cached(sources, cache) == sorted(expected.order)
    for held in holds.values():
        held.close()


async def _fetched(source: str, cache: Path, *, fits: bool) -> None:
    if fits:
        await get(source, cache)
        return
    with pytest.raises(BackendError, match="bytes are missing"):
        await get(source, cache)


def _forgotten(source: str, cache: Path, held: bool) -> None:
    if not held:
        forget(source, cache)
        return
    with pytest.raises(BackendError, match="in use"):
        forget(source, cache)


async def test_a_model_larger_than_the_limit_is_refused_before_anything_is_deleted(
    server: ModelServer, tmp_path: Path
) -> None:
    small = share(tmp_path / "small", 5 * KB)
    await get(small, tmp_path)
    with pytest.raises(BackendError, match=r"takes 60,05\d bytes .* raise disk_cache_size"):
        await get(server.url, tmp_path, limit=50 * KB)
    assert is_cached(small, tmp_path)
    assert BIG not in server.gets
    assert folders(tmp_path) == 1


async def test_the_limit_holds_where_sizes_are_told_late(
    server: ModelServer, tmp_path: Path
) -> None:
    server.heads = False
    with pytest.raises(BackendError, match="raise disk_cache_size"):
        await get(server.url, tmp_path, limit=50 * KB)
    assert folders(tmp_path) == 0


async def test_what_users_put_there_is_never_deleted(tmp_path: Path) -> None:
    mine = tmp_path / "models" / "mine"
    share(mine, 50 * KB)
    await get(share(tmp_path / "a", 60 * KB), tmp_path, limit=None)
    source = share(tmp_path / "b", 60 * KB)
    await get(source, tmp_path)
    assert is_cached(source, tmp_path)
    assert (mine / BIG).is_file()
    assert folders(tmp_path) == 2


async def test_forgetting_is_for_what_was_fetched(tmp_path: Path) -> None:
    source = share(tmp_path / "share", KB)
    folder = str(tmp_path / "share")
    for other in (folder, "hub:org/name"):
        with pytest.raises(UnsupportedError, match="only what was fetched"):
            forget(other, tmp_path)
    forget(source, tmp_path)  # nothing is there yet
    await get(source, tmp_path)
    forget(source, tmp_path)
    assert not is_cached(source, tmp_path)
    assert folders(tmp_path) == 0
    assert (tmp_path / "share" / BIG).is_file()
    with hold(await get(folder, tmp_path)) as descriptor:
        assert descriptor is None


async def test_forgetting_drops_what_an_interrupted_fetch_left(
    server: ModelServer, tmp_path: Path
) -> None:
    server.cut[BIG] = [KB, 0]
    with pytest.raises(BackendError):
        await get(server.url, tmp_path)
    assert folders(tmp_path) == 1
    forget(server.url, tmp_path)
    assert folders(tmp_path) == 0


async def test_an_interrupted_fetch_makes_room_for_others(
    server: ModelServer, tmp_path: Path
) -> None:
    server.cut[BIG] = [50 * KB, 0]
    with pytest.raises(BackendError, match="cannot fetch"):
        await get(server.url, tmp_path)
    source = share(tmp_path / "other", 70 * KB)
    await get(source, tmp_path)
    assert is_cached(source, tmp_path)
    assert folders(tmp_path) == 1


async def test_what_another_fetch_has_still_to_write_is_counted(
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
    other = share(tmp_path / "other", 50 * KB)
    with pytest.raises(BackendError, match="bytes are missing"):
        await get(other, tmp_path)
    release.set()
    await task
    assert cached([server.url, other], tmp_path) == [0]


async def test_a_deleted_checkpoint_cannot_be_held(tmp_path: Path) -> None:
    source = share(tmp_path / "share", KB)
    checkpoint = await get(source, tmp_path)
    forget(source, tmp_path)
    with pytest.raises(BackendError, match="fetch the model again"), hold(checkpoint):
        pass


async def test_whoever_inherits_the_descriptor_holds_on(tmp_path: Path) -> None:
    source = share(tmp_path / "share", KB)
    with hold(await get(source, tmp_path)) as descriptor:
        assert descriptor is not None
        child = subprocess.Popen(["sleep", "60"], pass_fds=[descriptor])
    try:
        with pytest.raises(BackendError, match="in use"):
            forget(source, tmp_path)
    finally:
        child.kill()
        child.wait()
    forget(source, tmp_path)
    assert not is_cached(source, tmp_path)


HOLDER = """
import asyncio, sys
from pathlib import Path
from maestro_backend.workers._sources import fetch, hold

async def main():
    with hold(await fetch(sys.argv[1], cache=Path(sys.argv[2]))):
        print("held", flush=True)
        sys.stdin.read()

asyncio.run(main())
"""


def holder(source: str, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, source, str(cache)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


async def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    source = share(tmp_path / "share", KB)
    with holder(source, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BackendError, match="in use"):
            forget(source, tmp_path)
        process.kill()
    forget(source, tmp_path)
    assert not is_cached(source, tmp_path)


async def test_a_killed_fetch_is_resumed(server: ModelServer, tmp_path: Path) -> None:
    pids: list[int] = []
    started = threading.Event()

    def halfway(path: str) -> None:
        if path == BIG:
            started.wait(30)
            os.kill(pids[0], signal.SIGKILL)

    server.halfway = halfway
    with holder(server.url, tmp_path) as process:
        pids.append(process.pid)
        started.set()
    assert process.returncode == -signal.SIGKILL
    assert not is_cached(server.url, tmp_path)
    server.halfway = lambda path: None
    checkpoint = await get(server.url, tmp_path)
    assert (Path(checkpoint.path) / BIG).read_bytes() == b"w" * 60 * KB
    assert server.gets.count("config.json") == 1
    assert folders(tmp_path) == 1


FULL = """
import asyncio, json, os, sys, time
from pathlib import Path
from maestro_agents.protocol import BackendError
from maestro_backend.workers._sources import fetch, hold, is_cached
from node.model_server import model, serving

disk, held = Path(sys.argv[1]), sys.argv[2] == "held"
SIZES = {"old": 2_000_000, "new": 1_000_000}

def written():
    return sum(path.stat().st_size for path in disk.glob("models/.partial*/**/*.safetensors"))

def fill(path):
    if path == "new/model.safetensors" and not (disk / "filler").exists():
        while not written():
            time.sleep(0.01)
        with (disk / "filler").open("wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass

async def main(server):
    server.halfway = fill
    for name, size in SIZES.items():
        server.files |= {f"{name}/{at}": data for at, data in model(os.urandom(size)).items()}
    old, new = f"{server.url}/old", f"{server.url}/new"
    checkpoint = await fetch(old, cache=disk)
    error = ""
    with hold(checkpoint) as _:
        if held:
            error = await attempt(new)
    if not held:
        error = await attempt(new)
    print(json.dumps({
        "error": error, "old": is_cached(old, disk), "new": is_cached(new, disk),
        "partial": [path.name for path in (disk / "models").glob(".[pd]*")],
        "gets": server.gets.count("new/model.safetensors"),
        "resumed": "range" in server.asked("new/model.safetensors")[-1],
    }))

async def attempt(source):
    try:
        await fetch(source, cache=disk)
    except BackendError as error:
        return str(error)
    return ""

with serving({}) as server:
    asyncio.run(main(server))
"""
OWN_DISK = 'mount -t tmpfs -o size=4m none "$1" && shift && exec "$@"'


def on_a_full_disk(folder: Path, case: str) -> dict[str, Any]:
    """The script's report; it runs on a disk of 4 MB, which only an own mount namespace has."""
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", OWN_DISK, "sh"]
    try:
        possible = subprocess.run([*inside, str(folder), "true"], capture_output=True)
    except OSError:
        pytest.skip("there is no unshare")
    if possible.returncode:
        pytest.skip("no mounts in user namespaces here")
    run = subprocess.run(
        [*inside, str(folder), sys.executable, "-c", FULL, str(folder), case],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(TESTS)])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    report: dict[str, Any] = json.loads(run.stdout)
    return report


def test_a_disk_that_fills_up_makes_room_and_resumes(tmp_path: Path) -> None:
    report = on_a_full_disk(tmp_path, "free")
    assert report == {
        "error": "",
        "old": False,
        "new": True,
        "partial": [],
        "gets": 2,
        "resumed": True,
    }


def test_a_full_disk_is_left_as_it_was(tmp_path: Path) -> None:
    report = on_a_full_disk(tmp_path, "held")
    assert "bytes are missing" in report.pop("error")
    assert report == {"old": True, "new": False, "partial": [], "gets": 1, "resumed": False}
