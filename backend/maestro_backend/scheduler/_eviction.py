"""Which weights leave a device: what is needed last, weighed by what its coming back costs.

A resident that is needed again in `t` seconds takes up its bytes all that time, to save one coming
back: it is worth `back_s / t`. Of all sets that free enough, the one worth the least leaves. For
equal sizes and costs this is Belady's rule: the farthest next use.

`t` is from the forecasts; where there is none, from how often the model was used in the past; where
that is not known either, from how long it has been idle: least recently used first. None of these
is sure, and all are wrong by factors rather than by seconds: they are averaged as logarithms.
Formulas and constants are ours.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import exp, inf, log

DOUBT = 0.1
"""Share of the forecasts that do not come true, and of the uses that are not foreseen (ours)."""
MARGIN = 2.0
"""What comes before it is called must be worth so many times what leaves for it: against
thrashing (ours)."""
HORIZON_S = 120.0
"""How far ahead forecasts see most uses (seconds, ours); half or twice as much changes little."""
_SOON_S = 1.0
"""Added to every time (seconds): what is nearer than this is about equally near (ours)."""
_NEWEST = 0.2
"""Weight of the newest gap in the mean of the gaps between uses (ours)."""
_EXACT = 12
"""Of more residents than this, the least worthy leave without a search for the best set (ours)."""


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How often a model is used, learned from the past."""

    last: float
    """When it was used last, or when it came (seconds)."""
    gap_s: float | None = None
    """Geometric mean of the seconds between uses, newer ones counting more; None after one use."""

    def used(self, now: float) -> Rhythm:
        gap_s = _SOON_S + now - self.last
        if self.gap_s is not None:
            gap_s = self.gap_s * (gap_s / self.gap_s) ** _NEWEST
        return Rhythm(now, gap_s)

    def next_s(self, now: float) -> float:
        """Seconds to the next use: as between others, or as long as it has been idle, if that is
        more: its burst is over."""
        return max(self.gap_s or 0.0, now - self.last)


@dataclass(frozen=True, slots=True)
class Resident:
    """What may leave a device: the bytes that this frees, and what coming back would cost.

    `back_s` is the reload and the prefill of what its KV cache holds now, in seconds. `expected`
    are the times (seconds) when runs will likely call it: the next one of each run.
    """

    worker: str
    size: int
    back_s: float
    rhythm: Rhythm
    expected: tuple[float, ...] = ()


def next_use_s(resident: Resident, now: float, horizon_s: float) -> float:
    """Seconds to its next use, as far as is known. Forecasts reach `horizon_s` ahead.

    The soonest forecast that comes true counts, so that more runs make it surer; with none it is
    probably not used before the horizon.
    """
    doubt, mean = 1.0, 0.0
    for at in sorted(resident.expected):
        mean += doubt * (1.0 - DOUBT) * _log(at - now)
        doubt *= DOUBT
    alone_s = resident.rhythm.next_s(now)
    alone = DOUBT * _log(alone_s) + (1.0 - DOUBT) * _log(horizon_s + alone_s)
    return exp(mean + doubt * alone)


def worth(resident: Resident, now: float, horizon_s: float) -> float:
    """Seconds that its staying saves, per second that it stays."""
    return resident.back_s / next_use_s(resident, now, horizon_s)


def choose(
    residents: Iterable[Resident], wanted: int, now: float, horizon_s: float
) -> tuple[Resident, ...] | None:
    """The set worth the least that frees `wanted` bytes; None if all of them would not.

    Exact, by branch and bound: a device holds few models, and taking the least worth per byte one
    by one would evict small ones that a big one makes needless.
    """
    pool = sorted(
        (_Weighed(worth(one, now, horizon_s), one.size, one) for one in residents if one.size > 0),
        key=lambda w: (w.worth / w.size, w.resident.worker),
    )
    freed = list(accumulate((w.size for w in pool), initial=0))
    if freed[-1] < wanted:
        return None
    sure = max(0, bisect_left(freed, wanted) - _EXACT)
    found = _least(pool[sure : sure + _EXACT], wanted - freed[sure])
    return tuple(w.resident for w in (*pool[:sure], *found))


def worthwhile(
    newcomer: Resident, leaving: Iterable[Resident], now: float, horizon_s: float
) -> bool:
    """Whether a model should come before it is called, where others leave for it."""
    lost = sum(worth(one, now, horizon_s) for one in leaving)
    return worth(newcomer, now, horizon_s) > MARGIN * lost


@dataclass(frozen=True, slots=True)
class _Weighed:
    worth: float
    size: int
    resident: Resident

    def equals(self, other: _Weighed) -> bool:
        return (self.worth, self.size) == (other.worth, other.size)


def _least(pool: Sequence[_Weighed], wanted: int) -> tuple[_Weighed, ...]:
    """The best set out of a pool in order of worth per byte; of equal ones the smallest."""
    best: tuple[float, int] = (inf, 0)
    found: tuple[_Weighed, ...] = ()

    def look(index: int, short: int, lost: float, chosen: tuple[_Weighed, ...]) -> None:
        nonlocal best, found
        if short <= 0:
            if (lost, len(chosen)) < best:
                best, found = (lost, len(chosen)), chosen
        elif lost + _bound(pool, index, short) <= best[0]:
            one, without = pool[index], index + 1
            look(index + 1, short - one.size, lost + one.worth, (*chosen, one))
            while without < len(pool) and pool[without].equals(one):
                without += 1  # they would only do the same
            look(without, short, lost, chosen)

    look(0, wanted, 0.0, ())
    return found


def _bound(pool: Sequence[_Weighed], index: int, short: int) -> float:
    """The least that freeing `short` bytes can cost, were it possible to evict parts."""
    lost = 0.0
    for one in pool[index:]:
        if short <= one.size:
            return lost + one.worth * short / one.size
        short -= one.size
        lost += one.worth
    return inf


def _log(seconds: float) -> float:
    return log(_SOON_S + max(0.0, seconds))
