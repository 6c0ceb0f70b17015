"""Arrivals: their rate, their burstiness, and what they are read from."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from statistics import fmean, pstdev

import pytest
from workloads.making import parquet

from maestro_agents.protocol import ConfigError
from maestro_backend.workloads import Arrivals, read_arrivals
from maestro_backend.workloads._client_rates import ClientRates

SHARED = Path(__file__).parents[3] / "shared" / "data" / "arrivals"


def some(arrivals: Arrivals, count: int, rate: float = 2.0, seed: int = 1) -> list[float]:
    return list(islice(arrivals.gaps(rate, seed), count))


def cv(gaps: list[float]) -> float:
    return pstdev(gaps) / fmean(gaps)


@pytest.mark.parametrize(
    ("name", "spread"), [("poisson", 1.0), ("constant", 0.0), ("gamma:4", 4.0), ("gamma:0.5", 0.5)]
)
def test_made_up_arrivals_have_the_rate_and_spread_of_their_name(name: str, spread: float) -> None:
    gaps = some(read_arrivals(name), 50_000)
    assert 1 / fmean(gaps) == pytest.approx(2.0, rel=0.05)
    assert cv(gaps) == pytest.approx(spread, rel=0.06, abs=1e-9)
    assert gaps[:9] == some(read_arrivals(name), 9)
    assert name == "constant" or gaps[:9] != some(read_arrivals(name), 9, seed=2)


def test_recorded_gaps_keep_their_order_and_come_round_again(tmp_path: Path) -> None:
    path = parquet(tmp_path / "times.parquet", [{"t_s": t} for t in (10.0, 0.0, 1.0, 4.0)])
    gaps = some(read_arrivals(path), 8, rate=0.3)
    assert gaps[:4] == pytest.approx(gaps[4:])
    assert sum(gaps[:4]) == pytest.approx(4 / 0.3)
    recorded = [1.0, 3.0, 6.0, 10.0 / 3]
    turned = [pytest.approx(recorded[at:] + recorded[:at]) for at in range(4)]
    assert gaps[:4] in turned
    starts = {some(read_arrivals(path), 1, rate=0.3, seed=seed)[0] for seed in range(20)}
    assert len(starts) == 4


def test_clients_with_windows_give_the_rates_of_the_windows(tmp_path: Path) -> None:
    rows = [
        {"model": "m", "client": 0, "window_s": 0, "rate_rps": 3.0, "cv": 1.0},
        {"model": "m", "client": 0, "window_s": 1200, "rate_rps": 1.0, "cv": 4.0},
        {"model": "m", "client": 1, "window_s": 0, "rate_rps": 2.0, "cv": 0.1},
    ]
    arrivals = read_arrivals(parquet(tmp_path / "clients.parquet", rows))
    times, now = [], 0.0
    for gap in some(arrivals, 40_000, rate=1.0):
        now += gap
        times.append(now)
    assert len(times) / now == pytest.approx(1.0, rel=0.1)
    for start in (0, 600, 1200):  # the seed chose one of the three windows
        by_window = [0, 0, 0]
        for at in times:
            by_window[int((at + start) // 600) % 3] += 1
        if by_window[1] == 0:
            break
    assert by_window[1] == 0
    assert by_window[0] / by_window[2] == pytest.approx(5.0, rel=0.2)


def test_a_client_of_one_rare_window_is_no_long_wait(tmp_path: Path) -> None:
    rows = [
        {"model": "m", "client": 0, "window_s": 600_000, "rate_rps": 1e-9, "cv": 1.0},
        {"model": "m", "client": 1, "window_s": 0, "rate_rps": 1e3, "cv": 1.0},
    ]
    arrivals = read_arrivals(parquet(tmp_path / "clients.parquet", rows))
    assert len(some(arrivals, 100)) == 100


def test_bursty_clients_begin_as_they_go_on() -> None:
    """Forty clients that are silent nearly always: no more of them come at first than later."""
    bursty = ClientRates("made up", ({0: (1.0, 8.0)},) * 40, 1)
    first = []
    for seed in range(60):
        at, came = 0.0, 0
        for gap in bursty.gaps(40.0, seed):
            at += gap
            if at > 5.0:
                break
            came += 1
        first.append(came)
    assert fmean(first) == pytest.approx(40.0 * 5.0, rel=0.3)


@pytest.mark.parametrize("wrong", ["gamma", "gamma:x", "gamma:-1", "gamma:nan", "posson"])
def test_names_that_are_none_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="poisson, constant, or gamma:CV"):
        read_arrivals(wrong)


def test_tables_without_times_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no column 't_s'"):
        read_arrivals(parquet(tmp_path / "no.parquet", [{"x": 1.0}]))
    with pytest.raises(ConfigError, match="no two different"):
        read_arrivals(parquet(tmp_path / "one.parquet", [{"t_s": 1.0}, {"t_s": 1.0}]))
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match="as parquet"):
        read_arrivals(tmp_path / "text.parquet")


@pytest.mark.parametrize(
    ("name", "least", "most"), [("azure2023_code", 8.0, 16.0), ("azure2023_conv", 0.9, 1.3)]
)
def test_recorded_arrivals_keep_their_burstiness(name: str, least: float, most: float) -> None:
    pytest.importorskip("pyarrow", reason="arrivals are parquet files")
    if not (SHARED / f"{name}.parquet").is_file():
        pytest.skip("there are no recorded arrivals beside the repository")
    gaps = some(read_arrivals(SHARED / f"{name}.parquet"), 20_000)
    assert least < cv(gaps) < most
