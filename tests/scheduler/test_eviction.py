"""What leaves a device: the rule's properties, and how near it comes to the optimum."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.eviction import (
    ERRORS,
    TARGET,
    Case,
    Known,
    Use,
    alike,
    belady,
    cost,
    cyclic,
    early,
    lru,
    optimum,
    recovered,
    unlike,
    zipf,
)
from maestro_backend.scheduler._eviction import (
    MARGIN,
    Resident,
    Rhythm,
    choose,
    next_use_s,
    worth,
    worthwhile,
)

NOW, HORIZON_S = 1000.0, 60.0

moments = st.floats(0.0, 500.0).map(lambda ahead: NOW + ahead)
rhythms = st.builds(
    Rhythm, st.floats(0.0, NOW), st.one_of(st.none(), st.floats(0.1, NOW, allow_subnormal=False))
)
anybody = st.builds(
    Resident,
    st.just(""),
    st.integers(1, 100),
    st.floats(0.1, 100.0),
    rhythms,
    st.lists(moments, max_size=3).map(tuple),
)


def named(residents: Collection[Resident]) -> list[Resident]:
    return [replace(one, worker=f"w{at:02}") for at, one in enumerate(residents)]


crowds = st.lists(anybody, max_size=8).map(named)


def resident(
    worker: str, *expected: float, size: int = 10, back_s: float = 5.0, idle_s: float = 10.0
) -> Resident:
    ahead = tuple(NOW + at for at in expected)
    return Resident(worker, size, back_s, Rhythm(NOW - idle_s), ahead)


def leaving(residents: Collection[Resident], wanted: int) -> list[str] | None:
    found = choose(residents, wanted, NOW, HORIZON_S)
    return None if found is None else sorted(one.worker for one in found)


# --- properties -----------------------------------------------------------------------------------


@given(crowds, st.integers(0, 500))
def test_those_chosen_were_passed_and_free_enough_or_none_can(
    crowd: list[Resident], wanted: int
) -> None:
    found = choose(crowd, wanted, NOW, HORIZON_S)
    if found is None:
        assert sum(one.size for one in crowd) < wanted
        return
    assert all(one in crowd for one in found) and len({one.worker for one in found}) == len(found)
    assert sum(one.size for one in found) >= wanted
    assert all(sum(one.size for one in found if one != left) < wanted for left in found)


@given(crowds, st.integers(0, 500), st.randoms(use_true_random=False))
def test_the_order_in_which_they_come_says_nothing(
    crowd: list[Resident], wanted: int, dice: Random
) -> None:
    shuffled = dice.sample(crowd, len(crowd))
    assert leaving(shuffled, wanted) == leaving(crowd, wanted)


@given(crowds, st.integers(1, 500))
def test_no_other_set_is_worth_less(crowd: list[Resident], wanted: int) -> None:
    found = choose(crowd, wanted, NOW, HORIZON_S)
    if found is not None:
        sets = (s for count in range(len(crowd) + 1) for s in combinations(crowd, count))
        enough = (s for s in sets if sum(one.size for one in s) >= wanted)
        assert value(found) == pytest.approx(min(map(value, enough)))


def value(residents: Collection[Resident]) -> float:
    return sum(worth(one, NOW, HORIZON_S) for one in residents)


@given(crowds, anybody, moments, st.floats(1.0, 500.0), st.integers(1, 500))
def test_who_is_needed_sooner_does_not_leave_before_who_is_needed_later(
    crowd: list[Resident], one: Resident, at: float, later_s: float, wanted: int
) -> None:
    sooner = replace(one, worker="a sooner", expected=(at,))
    later = replace(one, worker="later", expected=(at + later_s,))
    found = leaving([*crowd, sooner, later], wanted) or []
    assert sooner.worker not in found or later.worker in found


@given(anybody, st.lists(st.floats(0.0, 100.0), min_size=3, max_size=3))
def test_a_sooner_forecast_never_makes_the_next_use_later(
    one: Resident, sooner_s: list[float]
) -> None:
    moved = tuple(at - s for at, s in zip(one.expected, sooner_s, strict=False))
    before = next_use_s(one, NOW, HORIZON_S)
    assert next_use_s(replace(one, expected=moved), NOW, HORIZON_S) <= before * (1 + 1e-9)


def test_of_forty_the_search_ends_and_frees_enough() -> None:
    crowd = [resident(f"w{at:02}", size=10) for at in range(40)]
    for wanted in (5, 155, 395):
        found = choose(crowd, wanted, NOW, HORIZON_S)
        assert found is not None and len(found) == -(-wanted // 10)


# --- the rule, case by case -----------------------------------------------------------------------


def test_alike_in_all_else_the_farthest_next_use_leaves() -> None:
    assert leaving([resident("a", 5.0), resident("b", 50.0), resident("c", 20.0)], 10) == ["b"]


def test_what_nobody_expects_leaves_before_what_is_expected() -> None:
    assert leaving([resident("a", 20.0, idle_s=90.0), resident("b", idle_s=1.0)], 10) == ["b"]


def test_what_more_runs_expect_stays() -> None:
    assert leaving([resident("a", 20.0), resident("b", 20.0, 20.0, 20.0)], 10) == ["a"]


def test_without_forecasts_and_habits_the_least_recently_used_leaves() -> None:
    crowd = [resident("a", idle_s=20.0), resident("b", idle_s=40.0), resident("c", idle_s=30.0)]
    found = choose(crowd, 20, NOW, 0.0)
    assert found is not None and sorted(one.worker for one in found) == ["b", "c"]


def test_without_forecasts_what_is_used_often_stays() -> None:
    often, seldom = Rhythm(NOW - 9.0, 5.0), Rhythm(NOW - 3.0, 300.0)
    crowd = [replace(resident("often"), rhythm=often), replace(resident("seldom"), rhythm=seldom)]
    assert leaving(crowd, 10) == ["seldom"]


def test_what_was_used_often_but_is_no_more_leaves() -> None:
    over, slow = Rhythm(NOW - 200.0, 1.0), Rhythm(NOW - 3.0, 30.0)
    crowd = [replace(resident("over"), rhythm=over), replace(resident("slow"), rhythm=slow)]
    assert leaving(crowd, 10) == ["over"]


def test_gaps_between_uses_are_learned_newer_ones_more() -> None:
    rhythm = Rhythm(0.0)
    assert rhythm.next_s(7.0) == 7.0
    for at in range(10, 310, 10):
        rhythm = rhythm.used(float(at))
    assert rhythm.next_s(301.0) == pytest.approx(10.0, rel=0.15)
    for at in range(400, 2400, 100):
        rhythm = rhythm.used(float(at))
    assert rhythm.next_s(2301.0) == pytest.approx(100.0, rel=0.15)


def test_what_is_slow_to_come_back_stays() -> None:
    assert leaving([resident("a", 20.0, back_s=40.0), resident("b", 20.0, back_s=2.0)], 10) == ["b"]


def test_several_small_ones_against_a_big_one() -> None:
    small = [resident(f"s{at}", 30.0, size=10, back_s=2.0) for at in range(3)]
    dear, cheap = resident("big", 30.0, size=30, back_s=9.0), resident("big", 30.0, size=30)
    assert leaving([*small, dear], 30) == ["s0", "s1", "s2"]
    assert leaving([*small, cheap], 30) == ["big"]
    assert leaving([*small, cheap], 15) == ["s0", "s1"]
    assert leaving([*small, cheap], 31) == ["big", "s0"]


def test_a_model_comes_early_only_for_what_is_needed_much_later() -> None:
    coming, same, far = resident("x", 10.0), resident("a", 11.0), resident("b", 200.0)

    def comes(*leave: Resident) -> bool:
        return worthwhile(coming, leave, NOW, HORIZON_S)

    assert comes() and comes(far)
    assert not comes(same) and not comes(far, same)


@given(anybody, anybody)
def test_what_has_just_made_room_is_not_fetched_back(one: Resident, other: Resident) -> None:
    assert MARGIN > 1.0
    swapped = worthwhile(one, [other], NOW, HORIZON_S)
    assert not (swapped and worthwhile(other, [one], NOW, HORIZON_S))


# --- against the optimum --------------------------------------------------------------------------

NAMES = "abcd"
short_sequences = st.lists(st.sampled_from(NAMES), min_size=1, max_size=9)


def uses(names: Collection[str]) -> list[Use]:
    return [Use(2.0 * at, name, 0.0) for at, name in enumerate(names)]


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=60), st.integers(1, 5))
def test_where_all_are_alike_the_optimum_is_beladys(names: list[str], places: int) -> None:
    case = alike(uses(names), "abcdef", places)
    assert optimum(case) == cost(case, belady(case)) <= cost(case, lru(case))


@given(
    short_sequences,
    st.lists(st.integers(1, 6), min_size=4, max_size=4),
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
)
def test_the_optimum_is_the_least_of_all_ways(
    names: list[str], sizes: list[int], load_s: list[int]
) -> None:
    loads = dict(zip(NAMES, map(float, load_s), strict=True))
    case = Case(dict(zip(NAMES, sizes, strict=True)), loads, 8, uses(names))
    assert optimum(case) == pytest.approx(every_way(case, 0, frozenset()))


def every_way(case: Case, index: int, here: frozenset[str]) -> float:
    """The least cost from a use on, by trying all that could leave."""
    if index == len(case.uses):
        return 0.0
    model = case.uses[index].model
    if model in here:
        return every_way(case, index + 1, here)
    stay = (frozenset(s) for n in range(len(here) + 1) for s in combinations(sorted(here), n))
    room = case.capacity - case.sizes[model]
    fits = (s | {model} for s in stay if sum(case.sizes[m] for m in s) <= room)
    return case.load_s[model] + min(every_way(case, index + 1, s) for s in fits)


def cases() -> dict[str, list[Case]]:
    names = [f"m{at:02}" for at in range(10)]
    seeds = [Random(f"test/{seed}") for seed in range(10)]
    drawn = [zipf(10, dice)[:500] for dice in seeds]
    return {
        "zipf, alike": [alike(one, names, 4) for one in drawn],
        "zipf, sized": [unlike(*pair) for pair in zip(drawn, [names] * 10, seeds, strict=True)],
        "cyclic, alike": [alike(cyclic(10)[:500], names, 4)],
    }


@pytest.mark.parametrize("kind", cases())
def test_most_of_what_the_optimum_gains_is_gained(kind: str) -> None:
    played = cases()[kind]
    bounds = [(cost(case, lru(case)), optimum(case)) for case in played]
    for horizon in ("30", "120"):
        for error in ERRORS:
            assert recovered(played, bounds, f"{horizon}/{error}") >= TARGET
    assert recovered(played, bounds, "none") > 0.0


def test_perfect_forecasts_of_all_that_comes_are_nearly_as_good_as_the_optimum() -> None:
    [case, *_] = cases()["zipf, alike"]
    known = Known(case, [(use.model, 1.0) for use in case.uses], 1e9)
    least = cost(case, belady(case))
    assert least <= cost(case, known.leave) <= 1.02 * least


def test_what_comes_early_is_waited_for_less() -> None:
    shares = early(cases()["zipf, sized"], 0.0)
    assert shares["waiting"] < 1.0 and shares["loads"] < 1.1
