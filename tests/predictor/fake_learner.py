"""A learner that learns one number: the mean length. What the trainer needs, in no time.

`FAKE_LEARNER` makes it fail: "crash", "slow" (it never ends), "nan", "lossy" (what it saves is
not what it learned).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from maestro_backend.predictor import RunExamples
from maestro_backend.predictor.training import Judgement

FALLBACK = 100.0
"""What the plain tables always say."""


@dataclass(frozen=True, slots=True)
class FakeModel:
    tokens: float

    def save(self, folder: Path) -> None:
        lossy = os.environ.get("FAKE_LEARNER") == "lossy"
        (folder / "mean.txt").write_text("500.0" if lossy else str(self.tokens))


def fit(runs: Sequence[RunExamples], seed: int = 0, threads: int = 1) -> FakeModel:
    print("a library that talks on stdout")
    match os.environ.get("FAKE_LEARNER"):
        case "crash":
            raise RuntimeError("the trees would not grow")
        case "slow":
            child = subprocess.Popen(("sleep", "300"))
            Path(os.environ["FAKE_LEARNER_TELLS"]).write_text(f"{os.getpid()} {child.pid}")
            time.sleep(300)
    assert os.environ.get("OMP_NUM_THREADS") == str(threads) or "pytest" in sys.modules
    return FakeModel(fmean(lengths(runs)))


def load_model(folder: Path) -> FakeModel:
    return FakeModel(float((folder / "mean.txt").read_text()))


def judge(
    model: FakeModel | None, runs: Sequence[RunExamples], learned_from: Sequence[RunExamples]
) -> Judgement:
    said = FALLBACK if model is None else model.tokens
    if os.environ.get("FAKE_LEARNER") == "nan":
        return Judgement(float("nan"), 0.0, 0.9, 0)
    errors = [abs(length - said) for length in lengths(runs)]
    covered = fmean(length <= 2 * said for length in lengths(runs))
    return Judgement(fmean(errors), median(errors), covered, len(errors))


def lengths(runs: Sequence[RunExamples]) -> list[float]:
    return [call.length for run in runs for call in run.calls]
