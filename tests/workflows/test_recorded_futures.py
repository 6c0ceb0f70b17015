"""On recorded runs of real apps: better than the paper's median, a uniform guess and last-seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from maestro_backend.evaluation import foresee, futures_summary
from maestro_backend.predictor import RunExamples, read_traces

TRACES = Path(__file__).parents[3] / "shared" / "data"


def runs(source: str, most: int) -> list[RunExamples]:
    pytest.importorskip("pyarrow", reason="reading recorded runs needs pyarrow")
    path = TRACES / f"{source}.parquet"  # this folder alone: what lies below is not for tests
    if not path.is_file():
        pytest.skip(f"there are no recorded runs of {source} beside the repository")
    return read_traces([path])[:most]


@pytest.mark.parametrize("source", ["tau1", "whowhen_magentic"])
def test_the_rest_of_recorded_runs_is_foreseen(source: str) -> None:
    found = runs(source, 60)
    tasks = sorted({run.task for run in found})
    later = {task for at, task in enumerate(tasks) if at % 4 == 0}
    summary = futures_summary(
        foresee([r for r in found if r.task not in later], [r for r in found if r.task in later])
    )
    branch, rest = summary["branch"]["micro"], summary["t_rem"]["micro"]
    assert branch["log_loss"] < 0.6 * branch["uniform_log_loss"]
    assert branch["log_loss"] < 0.6 * branch["last_seen_log_loss"]
    assert rest["mae_tokens"] < 1.05 * rest["paper_mae_tokens"]
