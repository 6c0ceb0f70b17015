"""The true future of a run, for bounds only: no policy that is ranked may see it."""

from __future__ import annotations

from bisect import bisect_right

from maestro_backend.scheduler import ForecastCall, Length, Rest

from ._layout import Service
from ._workload import Template

_NEXT_CALLS = 16
"""As many calls ahead are told, and the one that ends last (ours)."""


class Truth:
    """When each call of a template starts and ends if every engine is idle, its prefixes cached."""

    def __init__(self, template: Template, service: Service) -> None:
        self._calls = template.calls
        self._service_s: list[float] = []
        self._starts: list[float] = []
        ends: list[float] = []
        for call in template.calls:
            cached = call.prefix_tokens
            took_s = service(call.model, call.prompt_tokens, call.output_tokens, cached)
            start = max((ends[before] for before in call.after), default=0.0) + call.gap_s
            self._service_s.append(took_s)
            self._starts.append(start)
            ends.append(start + took_s)
        self._order = sorted(range(len(ends)), key=lambda i: (self._starts[i], i))
        self._sorted = [self._starts[i] for i in self._order]
        self._last = max(range(len(ends)), key=lambda i: ends[i])
        self._rest = _remaining(template)

    def ahead(self, index: int) -> tuple[ForecastCall, ...]:
        """The calls after this one, counted from its arrival."""
        first = bisect_right(self._sorted, self._starts[index])
        coming = self._order[first : first + _NEXT_CALLS]
        if self._last not in coming and self._starts[self._last] > self._starts[index]:
            coming = [*coming, self._last]
        return tuple(self._expected(i, self._starts[i] - self._starts[index]) for i in coming)

    def rest(self, index: int) -> Rest:
        tokens, calls = self._rest[index]
        return Rest(tokens, tokens, calls)

    def _expected(self, index: int, in_s: float) -> ForecastCall:
        call = self._calls[index]
        tokens = float(call.output_tokens)
        return ForecastCall(
            stage=call.stage,
            role=call.role,
            model=call.model,
            probability=1.0,
            earliest_start_s=in_s,
            prompt_tokens=call.prompt_tokens,
            length=Length(tokens, tokens, tokens, tokens),
            service_s=self._service_s[index],
        )


def _remaining(template: Template) -> list[tuple[float, float]]:
    """Of each call: output tokens on the longest way from it, itself included; calls after it."""
    rest = [(float(call.output_tokens), 0.0) for call in template.calls]
    for index in range(len(rest) - 1, -1, -1):
        tokens, calls = rest[index]
        for before in template.calls[index].after:
            own = float(template.calls[before].output_tokens)
            rest[before] = max(rest[before], (own + tokens, calls + 1.0))
    return rest
