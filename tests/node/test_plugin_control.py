"""Our plugin's control of an engine that fails: where the weights are then, and who may go on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from maestro_backend.workers.vllm_plugin._control import Control, RefusedError

KV = {"requests": 0, "elastic": False, "limit_bytes": 8, "held_bytes": 8}


class Engine:
    """What `Control` uses of vLLM's `AsyncLLM`. `fails` maps a method to what it answers, or raises
    where that is an error."""

    def __init__(self, **fails: Any) -> None:
        self.fails = fails
        self.done: list[str] = []
        self.arguments: dict[str, tuple[Any, ...]] = {}
        self.on_device = True
        self.host_bytes = 0
        self.engine_core = self

    async def call_utility_async(self, method: str, *arguments: Any) -> Any:
        self.arguments[method] = arguments
        return self._do(method) or dict(KV)

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "maestro_memory":
            weights = {"tiers": ["device"], "host_bytes": self.host_bytes, "device_bytes": 5}
            return [{**weights, "on_device": self.on_device, "kv_resident_bytes": 0}]
        if (answer := self._do(method)) is not None:
            return [answer]
        self.on_device = method != "maestro_suspend"
        return [{"freed_bytes": 5}]

    async def pause_generation(self, **how: Any) -> None:
        self._do("pause")

    async def resume_generation(self) -> None:
        self._do("go on")

    def _do(self, what: str) -> Any:
        self.done.append(what)
        answer = self.fails.get(what)
        if isinstance(answer, Exception):
            raise answer
        return answer


async def test_the_cache_leaves_after_the_weights_and_calls_go_on_after_it_is_back() -> None:
    engine = Engine()
    control = Control(engine)
    assert (await control.move("parked", None))["residency"] == "parked"
    assert engine.done[:3] == ["pause", "maestro_suspend", "maestro_trim"]
    engine.done.clear()
    assert (await control.move("device", None))["residency"] == "device"
    assert engine.done[:3] == ["maestro_resume", "maestro_restored", "go on"]


async def test_a_limit_is_in_force_before_calls_go_on() -> None:
    engine = Engine()
    control = Control(engine)
    await control.move("host", None)
    engine.done.clear()
    await control.move("device", None, 6)
    limited = ["maestro_limit_kv", "maestro_resume", "maestro_restored", "go on"]
    assert engine.done[:4] == limited
    assert engine.arguments["maestro_limit_kv"] == (6,)


async def test_a_resume_with_an_impossible_limit_moves_nothing() -> None:
    engine = Engine()
    control = Control(engine)
    await control.move("host", None)
    engine.done.clear()
    engine.fails["maestro_limit_kv"] = {"error": "more than was built", "status": 422}
    with pytest.raises(RefusedError, match="more than was built"):
        await control.move("device", None, 99)
    assert engine.done == ["maestro_limit_kv"]
    assert (await control.state())["residency"] == "host"


@pytest.mark.parametrize("tier", ["host", "parked"])
async def test_a_refused_suspend_leaves_the_calls_running(tier: str) -> None:
    engine = Engine(maestro_suspend={"error": "no room for a copy"})
    control = Control(engine)
    with pytest.raises(RefusedError, match="no room"):
        await control.move(tier, 0)
    assert engine.done == ["pause", "maestro_suspend", "go on"]
    assert (await control.state())["residency"] == "device"


@pytest.mark.parametrize(("host_bytes", "where"), [(0, "parked"), (5, "host")])
async def test_a_suspend_that_breaks_half_way_is_where_the_weights_are(
    host_bytes: int, where: str
) -> None:
    """Nobody goes on without weights; a resume brings them back."""
    engine = Engine(maestro_suspend=RuntimeError("a rank is gone"))
    engine.on_device, engine.host_bytes = False, host_bytes
    control = Control(engine)
    with pytest.raises(RuntimeError, match="rank"):
        await control.move("parked", None)
    assert "go on" not in engine.done
    assert (await control.state())["residency"] == where
    assert (await control.move("device", None))["residency"] == "device"


async def test_a_park_that_fails_leaves_the_copy_where_it_was() -> None:
    engine = Engine()
    control = Control(engine)
    engine.host_bytes = 5
    await control.move("host", None)
    engine.fails["maestro_suspend"] = OSError("the copy cannot be closed")
    with pytest.raises(OSError, match="closed"):
        await control.move("parked", None)
    assert (await control.state())["residency"] == "host"
    assert "go on" not in engine.done


async def test_a_cache_that_cannot_be_given_back_keeps_no_move_from_its_end() -> None:
    control = Control(Engine(maestro_trim=RuntimeError("quarantined pages")))
    assert (await control.move("parked", None))["residency"] == "parked"


async def test_calls_do_not_go_on_before_the_cache_is_back() -> None:
    engine = Engine()
    control = Control(engine)
    await control.move("parked", None)
    engine.fails["maestro_resume"] = {"error": "out of memory"}
    with pytest.raises(RefusedError, match="out of memory"):
        await control.move("device", None)
    assert "go on" not in engine.done
    assert (await control.state())["residency"] == "parked"


async def test_weights_on_their_way_back_are_told_as_away_with_the_cache_as_it_was() -> None:
    """A state between the two would be a worker on the device without a cache."""

    class Ends(Engine):
        async def call_utility_async(self, method: str, *arguments: Any) -> Any:
            control._tier = "device"  # a resume that was under way is over
            return {**KV, "held_bytes": 0}

    control = Control(Ends())
    control._tier = "host"
    told = await control.state()
    assert (told["residency"], told["kv"]["held_bytes"]) == ("host", 0)


async def test_moves_take_turns() -> None:
    engine = Engine()
    control = Control(engine)
    await asyncio.gather(control.move("parked", None), control.move("device", None))
    moves = [what for what in engine.done if what != "maestro_kv"]
    assert moves == [
        *("pause", "maestro_suspend", "maestro_trim"),
        *("maestro_resume", "maestro_restored", "go on"),
    ]


@pytest.mark.parametrize(("expected", "asked"), [(3, 4), (6, 6), (99, 8)])
async def test_the_first_limit_is_one_that_the_built_cache_can_have(
    monkeypatch: pytest.MonkeyPatch, expected: int, asked: int
) -> None:
    """It was reckoned before the start: pages of kvcached may be larger than a floor."""
    monkeypatch.setenv("MAESTRO_KV_LIMIT", str(expected))
    monkeypatch.setitem(KV, "floor_bytes", 4)
    monkeypatch.setitem(KV, "built_bytes", 8)
    engine = Engine()
    control = Control(engine)
    await control.start()
    for task in control._tasks:
        task.cancel()
    assert engine.arguments["maestro_limit_kv"] == (asked,)


async def test_a_checksum_is_of_all_ranks_or_refused() -> None:
    engine = Engine(maestro_checksum={"checksum": "abc"})
    assert await Control(engine).checksum() == "abc"
    engine.fails["maestro_checksum"] = {"error": "the weights are not on the device", "status": 409}
    with pytest.raises(RefusedError, match="not on the device"):
        await Control(engine).checksum()
