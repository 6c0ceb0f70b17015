"""Runs drawn from templates: shares, order, times, and which of them count."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise

import pytest
from workloads.making import mix, template

from maestro_agents.protocol import ConfigError
from maestro_backend.simulator import SimRun
from maestro_backend.workloads import backlog, draw, read_arrivals, shares

CHATS = [template(f"chat {at}", 2 + at % 3, "chats") for at in range(7)]
CHAINS = [template(f"chain {at}", 10, "chains") for at in range(3)]
SINGLES = [template(f"single {at}", 1, "singles") for at in range(9)]
MIX = mix(sources={"chats": {"weight": 0.6}, "chains": {"weight": 0.2}})


def drawn(
    rate: float = 1.0, calls: int = 2000, seed: int = 1, name: str = "poisson"
) -> list[SimRun]:
    arrivals = read_arrivals(name)
    return list(draw([*CHATS, *CHAINS], MIX, arrivals, rate, calls, seed))


def test_sources_come_by_weight_and_single_calls_stay_few_known_or_not() -> None:
    found = shares([*CHATS, *CHAINS, *SINGLES], mix(sources={"chats": {"weight": 0.6}}))
    assert found["singles"] == pytest.approx(0.05)
    assert found["chats"] / found["chains"] == pytest.approx(0.6 / 0.05)
    assert sum(found.values()) == pytest.approx(1.0)
    assert shares(SINGLES, MIX) == {"singles": 1.0}
    allowed = mix(single_call_share=0.2)
    assert shares([*CHATS, *SINGLES], allowed)["singles"] == pytest.approx(0.2)


def test_the_draw_keeps_the_shares() -> None:
    count = Counter(run.template.source for run in drawn(calls=30_000))
    assert count["chats"] / count.total() == pytest.approx(0.75, abs=0.02)


def test_no_run_comes_again_before_all_of_its_source_have_come() -> None:
    names = [t.name for t in backlog([*CHATS, *CHAINS], MIX, 3000, 5) if t.source == "chats"]
    for at in range(0, len(names) - 7, 7):
        assert len({*names[at : at + 7]}) == 7


def test_the_same_seed_gives_the_same_runs_and_the_rate_only_their_times() -> None:
    slow, fast = drawn(rate=0.5), drawn(rate=2.0)
    assert slow == drawn(rate=0.5)
    assert [r.template.key for r in slow] == [r.template.key for r in fast]
    assert [r.at for r in slow] == pytest.approx([r.at * 4 for r in fast])
    assert [r.template.key for r in slow] != [r.template.key for r in drawn(seed=2)]
    closed = [t.key for t in backlog([*CHATS, *CHAINS], MIX, 2000, 1)]
    assert closed == [r.template.key for r in slow]


def test_names_are_unique_and_times_go_up_at_the_rate() -> None:
    runs = drawn(rate=0.25, name="gamma:8")
    assert [r.run for r in runs[:2]] == ["r000000", "r000001"]
    assert len({r.run for r in runs}) == len(runs)
    assert all(a.at <= b.at for a, b in pairwise(runs))
    assert runs[-1].at == pytest.approx(len(runs) / 0.25)


def test_both_ends_are_not_measured() -> None:
    begun, measured = 0, []
    for run in drawn(calls=5000):
        measured.append((run.measured, begun))
        begun += len(run.template.calls)
    assert 5000 <= begun < 5010
    assert all(m == (1000 <= at < 4000) for m, at in measured)


def test_runs_are_drawn_as_they_are_asked_for() -> None:
    arrivals = read_arrivals("poisson")
    first = list(islice(draw(CHATS, MIX, arrivals, 1.0, 200_000, 1), 3))
    assert [r.run for r in first] == ["r000000", "r000001", "r000002"]


def test_impossible_wishes_are_refused() -> None:
    arrivals = read_arrivals("constant")
    with pytest.raises(ConfigError, match="rate of runs"):
        draw(CHATS, MIX, arrivals, 0.0, 10, 1)
    with pytest.raises(ConfigError, match=r"below 0\.5"):
        draw(CHATS, MIX, arrivals, 1.0, 10, 1, 0.5)
    with pytest.raises(ConfigError, match="number of calls"):
        backlog(CHATS, MIX, 0, 1)
    with pytest.raises(ConfigError, match="no run to draw"):
        backlog([], MIX, 10, 1)
