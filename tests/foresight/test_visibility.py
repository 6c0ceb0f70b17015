"""Foresight of a call rests on its ancestors and on past runs, on nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from foresight.worlds import chain, foreseen, fork, longer, of, step

from maestro_backend.predictor import RunExamples
from maestro_backend.simulator import CallForesight


def blind(one: CallForesight) -> CallForesight:
    """Without what the app tells when the call has ended."""
    return replace(one, confirmed=())


def other_future(run: RunExamples, last: int) -> RunExamples:
    """The same up to a call, and then other stages, lengths, gaps and a fork."""
    calls = [
        *run.calls[: last + 1],
        step(run.run, last + 1, "deploy", last, tokens=7, gap_s=90.0),
        step(run.run, last + 2, "plan", last, tokens=9999, gap_s=0.0),
        step(run.run, last + 3, "plan", last + 1, last + 2),
    ]
    return replace(run, calls=tuple(calls))


@pytest.mark.parametrize("last", range(5))
def test_runs_that_begin_alike_are_foreseen_alike(last: int) -> None:
    run = chain("a", "plan", "code", "review", "code", "review", "code", "review")
    one, other = of(run), of(other_future(run, last))
    assert one[:last] == other[:last]
    assert blind(one[last]) == blind(other[last])
    assert one[last].confirmed != other[last].confirmed
    assert blind(one[last + 1]) != blind(other[last + 1])


def test_a_call_does_not_foresee_its_own_length() -> None:
    run = chain("a", "plan", "code", "review", "code")
    calls = [*run.calls]
    calls[1] = longer(calls[1], 8.0)
    one, other = of(run), of(replace(run, calls=tuple(calls)))
    assert one[0] == other[0]
    assert blind(one[1]) == blind(other[1])
    assert one[2].length != other[2].length


def test_a_call_knows_nothing_of_those_beside_it() -> None:
    one, other = of(fork("a", 100, 100, 100)), of(fork("a", 100, 3000, 100))
    assert one[0] == other[0]
    assert one[1] == other[1]
    assert blind(one[2]) == blind(other[2])
    assert one[3] == other[3]
    assert one[4] != other[4]


def test_runs_teach_nothing_of_each_other() -> None:
    first, second = chain("a", "plan", "code", "review"), chain("b", "plan", *("code",) * 9)
    strange = fork("c", 4000, 1, 4000)
    together = foreseen(second, strange, first)
    assert together == foreseen(first, second, strange)
    for run in (first, second, strange):
        assert together[run.source, run.run] == of(run)
