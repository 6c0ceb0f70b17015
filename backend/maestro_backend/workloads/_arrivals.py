"""When runs start: recorded arrivals, or made-up ones."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Protocol

from maestro_agents.protocol import ConfigError

from ._client_rates import CLIENT_COLUMNS, ClientRates
from ._mooncake import read_mooncake

_SYNTHETIC = "poisson, constant, or gamma:CV such as gamma:4"


class Arrivals(Protocol):
    @property
    def name(self) -> str: ...

    def gaps(self, rate: float, seed: int) -> Iterator[float]:
        """Seconds between runs, without end; `rate` runs a second in the long run."""
        ...


@dataclass(frozen=True, slots=True)
class Renewal:
    """Independent gaps: gamma with this coefficient of variation (1: Poisson; 0: constant)."""

    name: str
    cv: float

    def gaps(self, rate: float, seed: int) -> Iterator[float]:
        dice = Random(f"arrivals/{seed}")
        mean = 1.0 / rate
        if self.cv == 0.0:
            while True:
                yield mean
        shape = 1.0 / self.cv**2
        while True:
            yield dice.gammavariate(shape, mean / shape)


@dataclass(frozen=True, slots=True)
class Replay:
    """Recorded gaps, stretched to the rate: from a place that the seed chooses, over and over."""

    name: str
    recorded: array[float]

    @classmethod
    def of(cls, name: str, times: Iterable[float]) -> Replay:
        """Of times in seconds, in any order. The last gap, back to the first, is the mean gap."""
        ordered = sorted(times)
        if len(ordered) < 2 or ordered[-1] <= ordered[0]:
            raise ConfigError(f"{name} has no two different arrival times: name another trace")
        gaps = array("d", (b - a for a, b in pairwise(ordered)))
        gaps.append(sum(gaps) / len(gaps))
        return cls(name, gaps)

    def gaps(self, rate: float, seed: int) -> Iterator[float]:
        recorded = self.recorded
        stretch = len(recorded) / (sum(recorded) * rate)
        at = Random(f"arrivals/{seed}").randrange(len(recorded))
        while True:
            yield recorded[at] * stretch
            at = (at + 1) % len(recorded)


def read_arrivals(spec: str | Path) -> Arrivals:
    """`poisson`, `constant`, `gamma:CV`; or a trace: parquet with times `t_s` in seconds, parquet
    with rates of clients by window (ServeGen), or agentic Mooncake `.jsonl`.

    Raises:
        ConfigError: it is none of these, or the trace cannot be read.
    """
    text = str(spec)
    kind, _, cv = text.partition(":")
    if text in ("poisson", "constant"):
        return Renewal(text, 1.0 if text == "poisson" else 0.0)
    if kind == "gamma":
        return Renewal(text, _cv(text, cv))
    path = Path(text)
    if not path.is_file():
        raise ConfigError(f"there are no arrivals {text!r}: give a trace file, or {_SYNTHETIC}")
    if path.suffix == ".jsonl":
        return Replay.of(path.stem, (run.at for run in read_mooncake(path)))
    return _table(path)


def _cv(text: str, cv: str) -> float:
    try:
        value = float(cv)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 100.0:
        raise ConfigError(f"arrivals {text!r}: write {_SYNTHETIC}")
    return value


def _table(path: Path) -> Arrivals:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConfigError(
            "reading arrivals needs pyarrow: pip install 'maestro-mas[train]'"
        ) from error
    try:
        columns = parquet.read_schema(path).names
        if "t_s" in columns:
            return Replay.of(
                path.stem, parquet.read_table(path, columns=["t_s"])["t_s"].to_pylist()
            )
        if {*CLIENT_COLUMNS} <= {*columns}:
            table = parquet.read_table(path, columns=list(CLIENT_COLUMNS))
            return ClientRates.of(path.stem, zip(*(c.to_pylist() for c in table), strict=True))
    except (ArrowException, OSError) as error:
        raise ConfigError(f"cannot read {path} as parquet: {error}") from error
    raise ConfigError(f"{path} has no column 't_s' (seconds): it is no trace of arrivals")
