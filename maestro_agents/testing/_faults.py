"""What can go wrong on purpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from ._errors import ApiError

FaultKind = Literal["die", "drop", "error", "hang"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One planned failure of one request.

    `die` ends the process, `drop` cuts the connection, `hang` stops sending, each after
    `after_tokens` computed tokens; `error` answers `status` before the first byte.
    """

    kind: FaultKind
    after_tokens: int = 0
    status: int = 500

    @classmethod
    def parse(cls, body: dict[str, Any]) -> tuple[Fault, ...]:
        """The faults of a `POST /stub/fault` body: the fields above and `times`."""
        kind: Any = body.get("kind")
        if kind not in get_args(FaultKind):
            raise ApiError(400, f"kind: expected one of {get_args(FaultKind)}", param="kind")
        numbers = {"after_tokens": 0, "status": 500, "times": 1}
        for name, default in numbers.items():
            numbers[name] = value = body.get(name, default)
            if not isinstance(value, int) or value < 0:
                raise ApiError(400, f"{name}: expected a number of 0 or more", param=name)
        times = numbers.pop("times")
        return (cls(kind=kind, **numbers),) * times
