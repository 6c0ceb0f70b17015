"""The stub as a Maestro worker: the control API under `/maestro/`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from maestro_agents.testing import StubEngine

ROOT = Path(__file__).parents[2]
BLOCK = 16 * 1024
SMALL = ("--kv-blocks", "100", "--max-model-len", "160")
"""100 blocks, of which one longest request takes 10."""


class Stub:
    """A client of a stub process."""

    def __init__(self, process: subprocess.Popen[str], base_url: str) -> None:
        self.process = process
        self.http = httpx.Client(base_url=base_url, timeout=30)
        self._threads = ThreadPoolExecutor()

    def worker(self) -> dict[str, Any]:
        told: dict[str, Any] = self.http.get("/maestro/worker").json()
        return told

    def kv(self) -> dict[str, int]:
        """In blocks."""
        sizes = self.worker()["kv"].items()
        return {
            name.removesuffix("_bytes"): size // BLOCK for name, size in sizes if name != "groups"
        }

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(f"/maestro/{path}", json=body)

    def move(self, residency: str, budget: int | None = None) -> httpx.Response:
        return self.post("residency", residency=residency, host_budget_bytes=budget)

    def chat(self, call: str, text: str = "x") -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}]}
        headers = {"x-request-id": call}
        return self.http.post("/v1/chat/completions", json=body, headers=headers)

    def begin(self, call: str, text: str = "x") -> Future[httpx.Response]:
        """A call that runs meanwhile; returns once the stub knows of it."""
        before = self.worker()["requests"]
        begun = self._threads.submit(self.chat, call, text)
        while self.worker()["requests"] == before:
            assert not begun.done()
        return begun

    def close(self) -> None:
        self.process.kill()
        self._threads.shutdown()
        self.http.close()


@contextmanager
def stub(*options: str, **environment: str) -> Iterator[Stub]:
    with subprocess.Popen(
        [sys.executable, "-m", "maestro_agents.testing", "--port", "0", *options],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        client = Stub(process, process.stdout.readline().rsplit(" ", 1)[1].strip())
        try:
            yield client
        finally:
            client.close()


def test_moves_tell_where_the_weights_are_and_what_they_freed() -> None:
    size = 50_000_000
    with stub("--weights-bytes", str(size)) as engine:
        assert engine.worker()["tiers"] == ["device", "host", "parked"]
        for residency, copy, freed in (
            ("device", 0, 0),
            ("host", size, size),
            ("device", size, 0),
            ("host", size, size),
            ("parked", 0, 0),
            ("host", size, 0),
            ("device", size, 0),
            ("parked", 0, size),
        ):
            told = engine.move(residency).json()
            assert told["residency"] == residency == engine.worker()["residency"]
            weights = {"device_bytes": size, "host_bytes": copy, "host_copy_bytes": size}
            assert told["weights"] == weights
            assert told["freed_bytes"] == freed


def test_the_memory_of_the_process_follows_the_weights() -> None:
    size = 80_000_000
    with stub("--weights-bytes", str(size)) as engine:
        process = psutil.Process(engine.process.pid)
        full = process.memory_info().rss
        for residency in ("host", "parked"):
            engine.move(residency)
            assert full - process.memory_info().rss > 0.9 * size
        engine.move("device")
        assert full - process.memory_info().rss < 0.1 * size


def test_refused_moves_change_nothing() -> None:
    with stub("--weights-bytes", "1000", "--fail-resume", "1") as engine:
        assert engine.move("host", 999).status_code == 422
        assert engine.move("disk").status_code == 422
        assert engine.move("host", 1000).status_code == 200
        failed = engine.move("device")
        assert (failed.status_code, failed.json()) == (
            409,
            {"error": "planned failure of a resume"},
        )
        assert engine.worker()["residency"] == "host"
        assert engine.http.delete("/maestro/host-copy").status_code == 409
        assert engine.move("device").status_code == 200
        assert engine.http.delete("/maestro/host-copy").status_code == 200
        assert engine.worker()["weights"]["host_bytes"] == 0


@pytest.mark.parametrize("body", [b"{}", b"[]", b"no JSON", b'{"limit_bytes": "x"}'])
def test_malformed_bodies_are_told(body: bytes) -> None:
    with stub() as engine:
        assert engine.http.post("/maestro/kv", content=body).status_code == 400


def test_a_call_waits_until_the_weights_are_back() -> None:
    with stub("--weights-bytes", "1000") as engine:
        engine.move("parked")
        call = engine.begin("c1")
        assert engine.post("prefix/keep", call="c1", seconds=60).status_code == 404
        assert not call.done()
        engine.move("device")
        assert call.result().status_code == 200


def test_progress_names_the_calls() -> None:
    options = ("--decode-tokens-s", "20", "--output-tokens", "400", "--max-num-seqs", "1")
    with stub(*options) as engine:
        engine.begin("first", "x" * 4000)
        engine.begin("second")
        seen: list[dict[str, Any]] = []
        while not seen or seen[0]["generated_tokens"] < 2:
            seen = engine.http.get("/maestro/progress").json()["requests"]
        first, second = seen
        assert (first["call"], first["running"]) == ("first", True)
        assert first["computed_tokens"] == 1001 + first["generated_tokens"]
        assert first["kv_bytes"] == -(-first["computed_tokens"] // 16) * BLOCK
        assert second == {
            "call": "second",
            "computed_tokens": 0,
            "generated_tokens": 0,
            "kv_bytes": 0,
            "running": False,
        }


def test_the_limit_moves_between_floor_and_built() -> None:
    with stub(*SMALL, MAESTRO_KV_LIMIT=str(20 * BLOCK)) as engine:
        kv = engine.kv()
        assert (kv["built"], kv["floor"], kv["limit"], kv["held"]) == (100, 10, 20, 20)
        for limit, status in ((9, 422), (10, 200), (100, 200), (101, 422)):
            assert engine.post("kv", limit_bytes=limit * BLOCK).status_code == status
        assert engine.kv()["limit"] == 100
    with stub("--no-elastic") as engine:
        assert not engine.worker()["elastic"]
        assert engine.post("kv", limit_bytes=10 * BLOCK).status_code == 422


def test_a_shrink_evicts_what_is_cached_and_waits_for_what_runs() -> None:
    with stub(*SMALL, "--output-tokens", "1") as engine:
        for i in range(5):
            engine.chat(f"c{i}", "x" * 500)
        assert engine.kv()["cached"] == 5 * 8
        engine.http.post("/stub/fault", json={"kind": "hang", "after_tokens": 1, "times": 2})
        engine.begin("r1", "x" * 500)
        engine.begin("r2", "x" * 500)
        while engine.kv()["used"] < 16:
            pass
        engine.post("kv", limit_bytes=10 * BLOCK)
        kv = engine.kv()
        assert (kv["limit"], kv["held"], kv["cached"]) == (10, 16, 0)


def test_only_calls_and_kept_prefixes_hold_kv_while_the_weights_are_away() -> None:
    with stub(*SMALL, "--output-tokens", "1") as engine:
        for call in ("kept", "cached"):
            engine.chat(call, "x" * 500)
        engine.post("prefix/keep", call="kept", seconds=600)
        engine.http.post("/stub/fault", json={"kind": "hang", "after_tokens": 1})
        engine.begin("holds", "x" * 500)
        while engine.kv()["used"] < 8:
            pass
        engine.move("parked")
        kv = engine.kv()
        assert (kv["limit"], kv["held"], kv["used"]) == (100, 8 + 8, 8)
        assert (kv["pinned"], kv["cached"]) == (8, 8)
        late = engine.begin("late", "x" * 500)
        assert engine.kv()["held"] == 16
        engine.post("prefix/drop", call="kept")
        assert engine.kv()["held"] == 8
        told = engine.post("residency", residency="device", kv_limit_bytes=20 * BLOCK).json()["kv"]
        assert (told["limit_bytes"], told["held_bytes"]) == (20 * BLOCK, 20 * BLOCK)
        assert late.result().status_code == 200


def test_a_limit_comes_back_with_the_weights() -> None:
    with stub(*SMALL) as engine:
        engine.move("host")
        assert engine.kv()["held"] == 0
        assert engine.post("kv", limit_bytes=9 * BLOCK).status_code == 422
        told = engine.post("kv", limit_bytes=30 * BLOCK).json()["kv"]
        assert (told["limit_bytes"], told["held_bytes"]) == (30 * BLOCK, 0)
        engine.move("parked")
        wrong = engine.post("residency", residency="device", kv_limit_bytes=101 * BLOCK)
        assert (wrong.status_code, engine.worker()["residency"]) == (422, "parked")
        engine.move("device")
        assert (engine.kv()["limit"], engine.kv()["held"]) == (30, 30)


def test_a_full_cache_makes_calls_wait() -> None:
    with stub(*SMALL, "--output-tokens", "1") as engine:
        engine.post("kv", limit_bytes=10 * BLOCK)
        engine.http.post("/stub/fault", json={"kind": "hang", "after_tokens": 1})
        engine.begin("holds", "x" * 500)
        while engine.kv()["used"] < 8:
            pass
        waits = engine.begin("waits", "x" * 500)
        [_, told] = engine.http.get("/maestro/progress").json()["requests"]
        assert (told["call"], told["running"]) == ("waits", False)
        engine.post("kv", limit_bytes=20 * BLOCK)
        assert waits.result().status_code == 200


def test_kept_prefixes_stay_and_leave_room_for_one_request() -> None:
    with stub(*SMALL, "--output-tokens", "1") as engine:
        engine.post("kv", limit_bytes=20 * BLOCK)
        engine.chat("c1", "x" * 500)
        assert engine.post("prefix/keep", call="c1", seconds=600).json() == {
            "pinned_bytes": 8 * BLOCK
        }
        for i in range(5):
            engine.chat(f"more{i}", "x" * 500)
        assert (engine.kv()["pinned"], engine.kv()["cached"]) == (8, 16)
        assert engine.post("prefix/keep", call="more4", seconds=600).status_code == 409
        assert engine.post("prefix/keep", call="more0", seconds=600).status_code == 404
        engine.post("prefix/drop", call="c1")
        assert engine.kv()["pinned"] == 0
        warm = {"messages": [{"role": "user", "content": "x" * 500}], "seconds": 600}
        warmed = engine.post("prefix/warm", call="coming", **warm)
        assert warmed.json() == {"pinned_bytes": engine.kv()["pinned"] * BLOCK}
        engine.post("prefix/keep", call="coming", seconds=0.001)
        while engine.kv()["pinned"]:
            pass


def test_a_lease_that_is_not_renewed_ends_the_process() -> None:
    with stub(MAESTRO_LEASE_S="600") as engine:
        assert engine.post("lease", seconds=0.01).status_code == 200
        assert engine.process.wait(30) == 0
    with stub(MAESTRO_LEASE_S="1") as engine:
        assert engine.process.wait(30) == 0


def test_without_the_control_api_or_a_process_of_its_own() -> None:
    with stub("--no-control") as engine:
        assert engine.http.get("/maestro/worker").status_code == 404
    with StubEngine() as inside:
        assert httpx.post(f"{inside.url}/maestro/lease", json={"seconds": 1}).status_code == 409
