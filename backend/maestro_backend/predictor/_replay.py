"""The past that each call of a run could see: live, and when recorded runs are replayed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from ._call import Example, RunExamples
from ._history import History
from ._recent import Recent
from ._tables import Keys, Tables, keys_of

_MOST_PAST = 200
"""Ancestors that a history is made of where the run forks or joins: a millisecond (ours)."""
_MOST_OPEN = 64
"""Ends of the run from which it may go on without that (ours)."""


class Pasts:
    """The histories in one run: of each call, its ancestors and nothing else.

    A chain of calls shares one history that grows; where the run forks or joins, a call's history
    is made anew from its ancestors, the last 200 of them.
    """

    def __init__(self) -> None:
        self.calls: dict[int, Example] = {}
        """Those that have ended, by index."""
        self._residuals: dict[int, float] = {}
        self._ends: Recent[int, History] = Recent(_MOST_OPEN)

    def before(self, parents: tuple[int, ...]) -> History:
        """The history of a call that waited for these, all of which have ended."""
        if len(parents) == 1 and (history := self._ends.pop(parents[0], None)):
            return history
        return self._made_of(parents)

    def end(self, call: Example, history: History, residual: float) -> None:
        """A call has ended: from now on it may be a parent. `history` is what `before` gave it."""
        self.calls[call.index], self._residuals[call.index] = call, residual
        history.add(call, residual)
        self._ends[call.index] = history

    def _made_of(self, parents: tuple[int, ...]) -> History:
        past: set[int] = set()
        agenda = [-parent for parent in parents]
        heapify(agenda)
        while agenda and len(past) < _MOST_PAST:
            index = -heappop(agenda)
            if index not in past:
                past.add(index)
                for parent in self.calls[index].parents:
                    heappush(agenda, -parent)
        history = History()
        for index in sorted(past):
            history.add(self.calls[index], self._residuals[index])
        return history


@dataclass(frozen=True, slots=True)
class Seen:
    """A call as it arrived: its keys in the tables, and the finished past of its run.

    `history` is only valid until the next call is asked for.
    """

    call: Example
    keys: Keys
    history: History


def replay_run(run: RunExamples, tables: Tables) -> Iterator[Seen]:
    """Each call of a run with the history of its ancestors, in order of arrival.

    Nothing is learned: `tables` only say how unusual each call was for those after it.
    """
    pasts = Pasts()
    for call in run.calls:
        history = pasts.before(call.parents)
        keys = keys_of(call.shape, history.count_of(call.shape), history.all.count)
        yield Seen(call, keys, history)
        pasts.end(call, history, tables.residual(keys, call.length))


def remaining(run: RunExamples) -> list[float]:
    """Of each call: output tokens on the longest chain of calls that begins with it (T_rem)."""
    rest = [call.length for call in run.calls]
    for at in range(len(run.calls) - 1, -1, -1):
        for parent in run.calls[at].parents:
            rest[parent] = max(rest[parent], run.calls[parent].length + rest[at])
    return rest
