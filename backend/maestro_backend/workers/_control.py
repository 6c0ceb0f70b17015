"""The client of a worker's control API: weights, KV limit, kept prefixes, lease."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from maestro_agents.protocol import BackendError
from maestro_backend.scheduler import KvGeometry, KvGroup, Residency

_ASK_TIMEOUT_S = 60.0  # an answer waits for the engine step, or the move, that is under way
_MOVE_TIMEOUT_S = 600.0
"""A move, and a warm-up of a prefix, take as long as they take; this only ends what hangs."""


class WorkerRefusedError(BackendError):
    """The worker said no, or tried and failed; it is where its status says."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker as it sees itself. Sizes in bytes.

    `kv_held` is what its KV cache may occupy now: more than `kv_limit` while a shrink waits for
    blocks in use, and only what is in use or kept while the weights of an elastic worker are away;
    `kv_limit` comes back with them. All KV sizes are 0 where the engine does not tell them, and
    `kv_geometry` is None.
    """

    residency: Residency
    tiers: tuple[Residency, ...]
    elastic: bool
    kv_block: int
    kv_built: int
    kv_floor: int
    kv_limit: int
    kv_held: int
    weights: int
    host_bytes: int
    host_copy: int
    kv_geometry: KvGeometry | None = None

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> Self:
        """Read the answer of `GET /maestro/worker`."""
        kv, weights = body["kv"], body["weights"]
        return cls(
            residency=Residency(body["residency"]),
            tiers=tuple(Residency(tier) for tier in body["tiers"]),
            elastic=bool(body["elastic"]),
            **{f"kv_{name}": int(kv[f"{name}_bytes"]) for name in _KV_SIZES},
            weights=int(weights["device_bytes"]),
            host_bytes=int(weights["host_bytes"]),
            host_copy=int(weights["host_copy_bytes"]),
            kv_geometry=_geometry(kv),
        )


_KV_SIZES = ("block", "built", "floor", "limit", "held")


def _geometry(kv: Mapping[str, Any]) -> KvGeometry | None:
    """None of a worker that an earlier version of ours has started: it tells of no groups."""
    told = kv.get("groups", ())
    groups = tuple(KvGroup(int(g["block_tokens"]), int(g["most_blocks"])) for g in told)
    return KvGeometry(int(kv["block_bytes"]), groups) if groups else None


class Control:
    """A client of one worker. Use it as an async context manager."""

    def __init__(self, address: Path) -> None:
        self.address = str(address)
        transport = httpx.AsyncHTTPTransport(uds=str(address))
        self._http = httpx.AsyncClient(
            transport=transport, base_url="http://worker/maestro", timeout=_ASK_TIMEOUT_S
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def status(self) -> WorkerStatus | None:
        """The worker now; None where its engine has no control API.

        Raises:
            BackendError: it does not answer.
        """
        try:
            return WorkerStatus.parse(await self._ask("GET", "worker"))
        except _UnknownError:
            return None

    async def move(
        self, residency: Residency, host_budget_bytes: int, kv_limit_bytes: int | None = None
    ) -> WorkerStatus:
        """Bring its weights to a tier. Calls that run are paused and go on after the resume.

        `kv_limit_bytes` is in force before they go on; None: the last one is.

        Raises:
            WorkerRefusedError: it failed; `status` tells where it is.
            BackendError: it does not answer.
        """
        body = {
            "residency": residency.value,
            "host_budget_bytes": host_budget_bytes,
            "kv_limit_bytes": kv_limit_bytes,
        }
        return WorkerStatus.parse(await self._ask("POST", "residency", body, _MOVE_TIMEOUT_S))

    async def limit_kv(self, limit_bytes: int) -> int:
        """Set what its KV cache may hold; returns what it holds for now.

        Raises:
            WorkerRefusedError: the limit is too small or too large.
        """
        return int(
            (await self._ask("POST", "kv", {"limit_bytes": limit_bytes}))["kv"]["held_bytes"]
        )

    async def drop_host_copy(self) -> None:
        """Give up the copy of the weights in host memory.

        Raises:
            WorkerRefusedError: the weights are nowhere else.
        """
        await self._ask("DELETE", "host-copy")

    async def keep_prefix(self, call: str, seconds: float) -> int:
        """Keep the KV blocks of an ended call; returns their bytes.

        Raises:
            WorkerRefusedError: they are gone, or too little would be left.
        """
        answer = await self._ask("POST", "prefix/keep", {"call": call, "seconds": seconds})
        return int(answer["pinned_bytes"])

    async def drop_prefix(self, call: str) -> None:
        """Keep them no longer."""
        await self._ask("POST", "prefix/drop", {"call": call})

    async def warm_prefix(
        self, call: str, messages: Sequence[Mapping[str, Any]], seconds: float
    ) -> int:
        """Compute the prefix of a coming call and keep it; returns its bytes."""
        body = {"call": call, "messages": list(messages), "seconds": seconds}
        answer = await self._ask("POST", "prefix/warm", body, _MOVE_TIMEOUT_S)
        return int(answer["pinned_bytes"])

    async def renew_lease(self, seconds: float) -> None:
        """Let it live for so long without us."""
        await self._ask("POST", "lease", {"seconds": seconds})

    async def _ask(
        self, method: str, path: str, body: Any = None, timeout_s: float = _ASK_TIMEOUT_S
    ) -> dict[str, Any]:
        try:
            answer = await self._http.request(method, f"/{path}", json=body, timeout=timeout_s)
        except httpx.TransportError as error:
            raise BackendError(f"the engine does not answer /maestro/{path}: {error!r}") from error
        if answer.is_success:
            return dict(answer.json())
        told = _error_text(answer)
        if answer.is_server_error:
            raise BackendError(
                f"the engine failed at /maestro/{path}: {told or answer.status_code}"
            )
        if told is None:
            raise _UnknownError(f"the engine has no /maestro/{path} ({answer.status_code})")
        raise WorkerRefusedError(told)


class _UnknownError(WorkerRefusedError):
    """The engine has no such path."""


def _error_text(answer: httpx.Response) -> str | None:
    """What the worker says; None where it is no worker's answer."""
    try:
        told = answer.json()["error"]
    except (KeyError, TypeError, ValueError):
        return None
    return told if isinstance(told, str) else None
