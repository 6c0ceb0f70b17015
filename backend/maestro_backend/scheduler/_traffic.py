"""What calls of each model ask for, and how workers slow down under them: learned while serving.

All of it is ours. A call's time on a worker is its predicted service alone times

    1 + beside * (calls beside it) + shared * (calls on the other workers of the device),

both numbers as the mean of its start and its end. The two factors are least squares over the
model's ended calls, weighed by their service; they start at what `_PRIOR_S` seconds of service
would have taught. What a token of a prompt costs is least squares over predicted services, which
are alone and without a cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ._calls import Call

_MEMORY_S = 180.0
"""Rates are means over about so long."""
_KEPT = 0.998
"""What a call's teaching is still worth after the next one."""
_NEWEST = 0.02
"""The share of the newest call in the mean of services."""
_PRIOR_S = 50.0
_PRIOR_BESIDE = 0.1
_PRIOR_SHARED = 0.3
_LEAST = 0.01
_MOST_TIMES = 20.0
"""A call that took more times its prediction was predicted wrong: it counts as so many."""
_INDEPENDENT = 1e-6
"""Least squares are trusted where the two causes are not all but one."""


@dataclass(frozen=True, slots=True)
class Slowdown:
    """How much longer a call takes for each call beside it, and for each on its device's other
    workers, as a share of its time alone."""

    beside: float = _PRIOR_BESIDE
    shared: float = _PRIOR_SHARED

    def of(self, beside: float, shared: float) -> float:
        """What is added to the time alone, as a share of it."""
        return self.beside * beside + self.shared * shared


class Traffic:
    """Of all models. `seen` and `ended` are told of each call."""

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}

    def seen(self, call: Call, now: float) -> None:
        """A call has come."""
        model = call.request.model
        about = self._models.get(model)
        if about is None:
            about = self._models[model] = _Model(now)
        about.add(call, now)

    def ended(self, call: Call, beside: float, shared: float, now: float) -> None:
        """A call has ended well, on a worker with so many others on it and on its device."""
        if about := self._models.get(call.request.model):
            alone_s = max(call.request.service_s, 0.01)
            times = min((now - call.started) / alone_s, _MOST_TIMES)
            about.pace.learn(beside, shared, times - 1.0, alone_s)
            about.slowdown = Slowdown(*about.pace.factors)

    def busy(self, model: str, now: float) -> float:
        """Predicted seconds of service that come per second."""
        about = self._models.get(model)
        return 0.0 if about is None else about.busy(now)

    def service_s(self, model: str) -> float:
        """Mean predicted seconds of service of the calls that came lately; 1 where none did."""
        about = self._models.get(model)
        return 1.0 if about is None else max(about.service_s, 0.01)

    def prefill_s(self, model: str) -> float:
        """Seconds alone for each token of a prompt that is not cached."""
        about = self._models.get(model)
        return 0.0 if about is None else about.service.factors[0]

    def slowdown(self, model: str) -> Slowdown:
        about = self._models.get(model)
        return _UNKNOWN if about is None else about.slowdown


class _Model:
    """What is known of one model."""

    __slots__ = ("_at", "_since", "_work_s", "pace", "service", "service_s", "slowdown")

    def __init__(self, now: float) -> None:
        self._since = self._at = now
        self._work_s = 0.0
        self.service_s = 0.0
        self.pace = _TwoFactors(_PRIOR_BESIDE, _PRIOR_SHARED, _PRIOR_S)
        self.service = _TwoFactors(0.0, 0.0, 0.0)
        self.slowdown = _UNKNOWN

    def add(self, call: Call, now: float) -> None:
        request = call.request
        if not self.service_s:
            self.service_s = request.service_s
        self._work_s = self._work_s * math.exp((self._at - now) / _MEMORY_S) + request.service_s
        self._at = now
        self.service_s += _NEWEST * (request.service_s - self.service_s)
        weight = 1.0 / max(request.service_s, 0.01)
        self.service.learn(request.prompt_tokens, request.length.p50, request.service_s, weight)

    def busy(self, now: float) -> float:
        seconds = max(now - self._since, 1.0)
        window_s = _MEMORY_S * (1.0 - math.exp(-seconds / _MEMORY_S))
        return self._work_s * math.exp((self._at - now) / _MEMORY_S) / window_s


class _TwoFactors:
    """Least squares for y = a * p + b * q, with neither factor below zero (`_LEAST`, if it starts
    from something)."""

    __slots__ = ("_least", "_pp", "_pq", "_py", "_qq", "_qy", "factors")

    def __init__(self, a: float, b: float, weight: float) -> None:
        self._pp = self._qq = weight
        self._pq = 0.0
        self._py, self._qy = weight * a, weight * b
        self._least = _LEAST if weight else 0.0
        self.factors = (a, b)

    def learn(self, p: float, q: float, y: float, weight: float) -> None:
        self._pp = self._pp * _KEPT + weight * p * p
        self._pq = self._pq * _KEPT + weight * p * q
        self._qq = self._qq * _KEPT + weight * q * q
        self._py = self._py * _KEPT + weight * p * y
        self._qy = self._qy * _KEPT + weight * q * y
        spread = self._pp * self._qq - self._pq * self._pq
        if spread > _INDEPENDENT * self._pp * self._qq:
            a = (self._py * self._qq - self._qy * self._pq) / spread
            b = (self._pp * self._qy - self._pq * self._py) / spread
            self.factors = max(self._least, a), max(self._least, b)


_UNKNOWN = Slowdown()
