"""T_rem in seconds: what a run still takes, from what is predicted of it in tokens."""

from __future__ import annotations

from dataclasses import dataclass

from maestro_backend.scheduler._calls import Call
from maestro_backend.scheduler._runs import Run

_NEWEST = 0.005
"""The share of the newest call in a workflow's means of many (ours)."""
_FIRST = 2.326 / 1.282
"""How much farther from the median the 1st percentile is than the 90th, in standard deviations."""
_MOST_WORKFLOWS = 4096
"""So many are remembered, the latest ones (ours)."""


@dataclass(slots=True)
class _Pace:
    """Of a workflow: means over its calls. Seconds of service and output tokens of a call, both as
    predicted, and seconds between one call and the next that nobody could have worked in."""

    calls: int = 0
    service_s: float = 0.0
    tokens: float = 0.0
    gap_s: float = 0.0

    def learn(self, service_s: float, tokens: float, gap_s: float) -> None:
        self.calls += 1
        share = max(_NEWEST, 1 / self.calls)
        self.service_s += share * (service_s - self.service_s)
        self.tokens += share * (tokens - self.tokens)
        self.gap_s += share * (gap_s - self.gap_s)

    def seconds(self, tokens: float, calls: float) -> float:
        """What so many tokens take, with the gaps before so many further calls."""
        worked_s = tokens * self.service_s / self.tokens if self.tokens else 0.0
        return worked_s + calls * self.gap_s


class Remaining:
    """Of all runs. Told of each call that comes and each that ends well."""

    def __init__(self) -> None:
        self._paces: dict[str, _Pace] = {}
        self._ended: dict[str, float] = {}
        """Run -> when its latest call ended (seconds)."""

    def arrived(self, call: Call, run: Run, now: float) -> None:
        pace = self._paces.pop(run.workflow, None) or _Pace()
        self._paces[run.workflow] = pace
        if len(self._paces) > _MOST_WORKFLOWS:
            del self._paces[next(iter(self._paces))]
        ended = self._ended.get(run.run)
        gap_s = now - ended if ended is not None and len(run.live_calls) == 1 else 0.0
        pace.learn(call.request.service_s, call.request.length.p50, gap_s)

    def ended(self, run: Run, now: float) -> None:
        self._ended[run.run] = now

    def over(self, run: Run) -> None:
        self._ended.pop(run.run, None)

    def of(self, call: Call, run: Run | None) -> tuple[float, float]:
        """Seconds from the start of `call` to the run's end: the optimistic 1st percentile and the
        median, both alone on idle engines.

        The longer of two ways to say it: the likely path of the forecast, which is exact but does
        not reach far, and the tokens that are left by experience.
        """
        request = call.request
        length = request.length
        near_s = request.service_s + (run.future_s if run else 0.0)
        least_s = near_s * _optimism(length.p50, length.p90)
        if run is None or run.rest is None or run.workflow not in self._paces:
            return least_s, near_s
        rest = run.rest
        far_s = self._paces[run.workflow].seconds(rest.p50, rest.calls)
        return max(least_s, far_s * _optimism(rest.p50, rest.p90)), max(near_s, far_s)


def _optimism(p50: float, p90: float) -> float:
    """The 1st percentile over the median, of a log-normal with this 90th."""
    return float((p50 / p90) ** _FIRST) if p90 > p50 > 0.0 else 1.0
