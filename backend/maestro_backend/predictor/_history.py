"""The finished past of one run: what its next call may be predicted from."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log2

from ._call import CallShape, Example

_SLOW = 0.3
"""Weight of the newest in a run's moving averages (ours)."""


@dataclass(slots=True)
class Strand:
    """Past calls of one kind in a run: log2(1 + output tokens), and prompt sizes in tokens."""

    count: int = 0
    last: float = 0.0
    before: float = 0.0
    mean: float = 0.0
    top: float = 0.0
    low: float = 0.0
    moving: float = 0.0
    square: float = 0.0
    prompt: float = 0.0
    prompt_bytes: float = 0.0
    code: float = -1.0
    residual: float = 0.0

    def add(self, call: Example, residual: float) -> None:
        value = log2(1.0 + call.length)
        first = not self.count
        self.before, self.last = (value if first else self.last), value
        self.count += 1
        self.mean += (value - self.mean) / self.count
        self.top = value if first else max(self.top, value)
        self.low = value if first else min(self.low, value)
        self.moving += (1.0 if first else _SLOW) * (value - self.moving)
        self.square += (value * value - self.square) / self.count
        self.prompt, self.code = call.outcome.prompt_tokens, call.shape.code_chars
        self.prompt_bytes = call.shape.prompt_bytes
        self.residual = residual


@dataclass(slots=True)
class History:
    """All finished calls that lie before a call, by stage and role.

    `surprise` is the run's moving average of log2(actual / usual): how much longer or shorter than
    past runs of its workflow this one writes. `previous` is the last call of the past.
    """

    all: Strand = field(default_factory=Strand)
    own: dict[tuple[str, str], Strand] = field(default_factory=dict)
    roles: dict[str, Strand] = field(default_factory=dict)
    previous: Example | None = None
    surprise: float = 0.0
    surprises: int = 0
    tokens: float = 0.0

    def add(self, call: Example, residual: float = 0.0) -> None:
        """A call has ended; `residual` is log2(actual / usual) of its output."""
        key = call.shape.stage, call.shape.role
        self.all.add(call, residual)
        self.own.setdefault(key, Strand()).add(call, residual)
        self.roles.setdefault(call.shape.role, Strand()).add(call, residual)
        self.previous = call
        self.surprises += 1
        self.surprise += max(_SLOW / 2, 1 / self.surprises) * (residual - self.surprise)
        self.tokens += call.length

    def count_of(self, shape: CallShape) -> int:
        """How many calls of the same stage and role there were."""
        own = self.own.get((shape.stage, shape.role))
        return own.count if own else 0
