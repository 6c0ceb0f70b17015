"""The simulated node agents: engines, moves of weights, KV limits. What they take is virtual time.

Moves of one device go one after the other, as the node agent does it. Engines that compute on one
device at the same time share it: each takes as much longer as there are of them (time slices, as
processes without MPS have them; ours). Moving weights slows nobody down.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any

from maestro_agents.protocol import MaestroError
from maestro_backend.scheduler import (
    CommandApplied,
    DropPrefix,
    Event,
    KeepPrefix,
    Residency,
    SetKvLimit,
    SetResidency,
    WorkerChanged,
    WorkerInfo,
    WorkerState,
)

from ._agenda import Agenda
from ._engine import Engine
from ._layout import Place
from ._outcome import MemorySample, Outcome


class Server:
    """One worker. Its engine is there while the worker is ready."""

    __slots__ = ("busy", "due", "engine", "info", "place", "shrinking")

    def __init__(self, place: Place, max_batched_tokens: int) -> None:
        self.place = place
        self.info = place.info
        self.engine = Engine(
            place.costs,
            place.info.kv_limit_bytes // place.block_bytes,
            place.model.block_tokens,
            place.info.max_inflight,
            max_batched_tokens,
        )
        self.busy = False
        self.due = inf
        """When the engine is looked at next."""
        self.shrinking = False
        """Whether a lower limit is still to come into force."""


class Nodes:
    """All workers.

    What they report goes out through `tell`; `arm` hears of engines whose next stop may have moved.
    """

    def __init__(
        self,
        agenda: Agenda,
        places: dict[str, Place],
        max_batched_tokens: int,
        outcome: Outcome,
        tell: Callable[[Event], None],
        arm: Callable[[Server], None],
    ) -> None:
        self._agenda = agenda
        self._arm = arm
        self._outcome = outcome
        self._tell = tell
        self.servers = {name: Server(place, max_batched_tokens) for name, place in places.items()}
        self._free_at: dict[tuple[str, str], float] = {}
        self._on_device: dict[tuple[str, str], list[Server]] = {}
        for server in self.servers.values():
            self._on_device.setdefault((server.info.node, server.info.device), []).append(server)
        self._ready = dict.fromkeys((p.info.model for p in places.values()), 0)
        self._queued: dict[str, int] = defaultdict(int)
        self._starved: dict[str, float] = {}
        """Models whose calls wait while no worker of theirs is ready, and since when."""
        for server in self.servers.values():
            self._ready[server.info.model] += server.info.state is WorkerState.READY

    # --- engines that share a device ------------------------------------------------------------

    def work(self, server: Server, busy: bool) -> None:
        """The engine has something to do, or nothing more: the others of its device feel it."""
        server.busy = busy
        here = self._on_device[server.info.node, server.info.device]
        if len(here) == 1:
            return
        working = [one for one in here if one.busy]
        for one in working:
            one.engine.share(len(working), self._agenda.now)
            self._arm(one)

    # --- calls that wait for weights ------------------------------------------------------------

    def queued(self, model: str, change: int) -> None:
        """So many calls of the model more wait in the queue."""
        self._queued[model] += change
        if self._ready.get(model):
            return
        if change > 0 and self._queued[model] == change:
            self._starved.setdefault(model, self._agenda.now)
        elif not self._queued[model]:
            self._starved.pop(model, None)

    def ready(self, model: str) -> bool:
        return self._ready.get(model, 0) > 0

    # --- commands -------------------------------------------------------------------------------

    def move(self, command: SetResidency) -> None:
        """Bring weights to another tier."""
        server = self.servers[command.worker]
        start, end = server.info, command.residency
        if server.engine.running and end is not Residency.DEVICE:
            raise MaestroError(f"{command.worker} was to leave the device with calls running")
        now = self._agenda.now
        device = (start.node, start.device)
        began = max(now, self._free_at.get(device, 0.0))
        took_s = self._move_s(server, end)
        self._free_at[device] = at = began + took_s
        state, on_the_way = _states(start, end)
        self._agenda.at(now, self._change, (server, {"state": on_the_way}))
        changes: dict[str, Any] = {"state": state, "residency": end}
        if command.kv_limit_bytes is not None:
            changes["kv_limit_bytes"] = command.kv_limit_bytes
        elif not start.elastic:  # a cache of one size goes and comes with the weights
            changes["kv_limit_bytes"] = start.kv_max_bytes if end is Residency.DEVICE else 0
        elif end is not Residency.DEVICE:
            changes["kv_limit_bytes"] = 0
        if end is Residency.DEVICE:
            self._outcome.activations[start.residency] += 1
            if not self._ready[start.model]:  # else it is a further worker: nothing is switched
                self._outcome.activation_s += took_s
            self._agenda.at(at, self._came, (server, began))
        else:
            changes["host_bytes"] = start.host_copy_bytes if end is Residency.HOST else 0
        self._agenda.at(at, self._change, (server, changes))
        self._agenda.at(at, self._reply, command.id)

    def limit_kv(self, command: SetKvLimit) -> None:
        at = self._agenda.now + self.servers[command.worker].place.profile.limit_s
        self._agenda.at(at, self._set_limit, command)

    def keep(self, command: KeepPrefix, entry: tuple[str, int]) -> None:
        engine = self.servers[command.worker].engine
        engine.pin(entry, self._agenda.now + command.seconds)
        self._agenda.at(self._agenda.now, self._reply, command.id)

    def drop(self, command: DropPrefix, entry: tuple[str, int]) -> None:
        self.servers[command.worker].engine.unpin(entry)
        self._agenda.at(self._agenda.now, self._reply, command.id)

    # --- what they do in time -------------------------------------------------------------------

    def _set_limit(self, command: SetKvLimit) -> None:
        server = self.servers[command.worker]
        block_bytes = server.place.block_bytes
        server.engine.set_blocks(command.limit_bytes // block_bytes, self._agenda.now)
        self._arm(server)
        server.shrinking = not server.engine.settled()
        held = max(command.limit_bytes, server.engine.blocks_in_use * block_bytes)
        self._change((server, {"kv_limit_bytes": held}))
        self._reply(command.id)

    def settle(self, server: Server) -> None:
        """See whether a limit below what was in use has come into force."""
        if server.engine.settled():
            server.shrinking = False
            limit = server.engine.blocks * server.place.block_bytes
            self._agenda.at(self._agenda.now, self._change, (server, {"kv_limit_bytes": limit}))

    def _came(self, about: tuple[Server, float]) -> None:
        """Weights have come to the device: for how long of that were calls waiting for them?"""
        server, began = about
        if (since := self._starved.pop(server.info.model, None)) is not None:
            self._outcome.exposed_s += self._agenda.now - max(since, began)

    def _change(self, about: tuple[Server, dict[str, Any]]) -> None:
        server, changes = about
        before = server.info
        server.info = info = replace(before, **changes)
        if before.state is not info.state:
            self._ready[info.model] += (info.state is WorkerState.READY) - (
                before.state is WorkerState.READY
            )
            if info.state is not WorkerState.READY:
                server.engine.clear_cache()
                if self._queued[info.model] and not self._ready[info.model]:
                    self._starved.setdefault(info.model, self._agenda.now)
        if "kv_limit_bytes" in changes and not server.shrinking:
            blocks = info.kv_limit_bytes // server.place.block_bytes
            server.engine.set_blocks(blocks, self._agenda.now)
            self._arm(server)
        self._tell(WorkerChanged(info))

    def _reply(self, command: int) -> None:
        self._tell(CommandApplied(command))

    def _move_s(self, server: Server, end: Residency) -> float:
        info, profile = server.info, server.place.profile
        if end is Residency.DEVICE:
            return info.activation_s[info.residency]
        on_device = info.state is WorkerState.READY
        if end is Residency.HOST and on_device:
            share = info.weights_bytes / server.place.model.tensor_parallel
            return profile.wake_s + share / profile.to_host
        if end is Residency.HOST or (end is Residency.PARKED and not on_device):
            from_disk = info.residency in (Residency.DISK, Residency.REMOTE)
            return profile.start_s if from_disk else 0.0
        return profile.wake_s if on_device else 0.0

    # --- memory over time -----------------------------------------------------------------------

    def kv_used_byte_s(self) -> float:
        """Integral of the KV bytes that running calls have held, as of each engine's last stop."""
        servers = self.servers.values()
        return sum(one.engine.used_block_s * one.place.block_bytes for one in servers)

    def sample(self, reserved: Callable[[str], int]) -> list[MemorySample]:
        """What each device holds now; `reserved` says it of a worker's KV."""
        sums: dict[str, list[int]] = {}
        for name, server in self.servers.items():
            info = server.info
            held = sums.setdefault(f"{info.node}/{info.device}", [0, 0, 0, 0])
            if info.state is not WorkerState.SUSPENDED and info.state is not WorkerState.STOPPED:
                held[0] += info.weights_bytes
            if info.elastic or info.state is WorkerState.READY:
                held[1] += info.kv_limit_bytes
            held[2] += reserved(name)
            held[3] += server.engine.blocks_in_use * server.place.block_bytes
        now = self._agenda.now
        return [MemorySample(now, device, *held) for device, held in sums.items()]


def _states(info: WorkerInfo, end: Residency) -> tuple[WorkerState, WorkerState]:
    """A worker's state after a move, and on the way there."""
    alive = info.state in (WorkerState.READY, WorkerState.SUSPENDED)
    match end:
        case Residency.DEVICE:
            return WorkerState.READY, WorkerState.RESUMING if alive else WorkerState.STARTING
        case Residency.HOST | Residency.PARKED:
            on_the_way = WorkerState.SUSPENDING if alive else WorkerState.STARTING
            if info.state is WorkerState.SUSPENDED:
                on_the_way = WorkerState.SUSPENDED
            return WorkerState.SUSPENDED, on_the_way
        case _:
            return WorkerState.STOPPED, WorkerState.STOPPING
