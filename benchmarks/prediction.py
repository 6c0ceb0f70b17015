"""How well call lengths are predicted: nested validation on recorded runs, ablations, curves.

    make bench NAME=prediction ARGS="--traces FOLDER"              # hours; --quick: minutes
    make bench NAME=prediction ARGS="--traces FOLDER --only curve"

Every figure is on calls whose task (for `curve`: whose source) the model never saw. Results go to
docs/results/prediction; docs/prediction.md says what they mean. Drawing needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from statistics import fmean, pstdev
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

from maestro_agents.protocol import ConfigError
from maestro_backend.evaluation import (
    Predicted,
    Trained,
    intervals,
    joined,
    kendall_tau,
    kv_figures,
    load_trained,
    macro,
    mae,
    plain,
    predict,
    report,
    save_trained,
    shortened,
    train_rows,
)
from maestro_backend.predictor import Estimator, RunExamples, Tables, read_traces
from maestro_backend.predictor._boosters import RECIPES, Recipe, train_boosters
from maestro_backend.predictor._features import FEATURES
from maestro_backend.predictor._fit import fit_rows, tables_of
from maestro_backend.predictor._matrix import Rows, group_of, rows_of, training_rows

ROOT = Path(__file__).parents[1]
FOLDS = 4
FEW = 80
"""Sources with fewer calls are not in the macro means."""
UNSEEN = ("tradingagents", "whowhen_magentic", "tau1")
"""Left out together where an ablation is judged on apps that nobody knows."""
STEPS = (0, 1, 2, 5, 10, 20, 40)
JUDGED_CALLS = 1500
"""Of a source, on the learning curve: its last runs, so many calls of them."""
LEVELS = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


def _between(first: str, last: str) -> tuple[str, ...]:
    return FEATURES[FEATURES.index(first) : FEATURES.index(last) + 1]


def _named(*beginnings: str) -> tuple[str, ...]:
    return tuple(name for name in FEATURES if name.startswith(beginnings))


BLANKED: Mapping[str, tuple[str, ...]] = {
    "all": (),
    "no prompt size": (*_between("prompt_tokens", "code_share"), "own_by_prompt", "own_by_code"),
    "no tools, format, kind": _between("tools", "kind"),
    "no history of the run": (*_between("calls", "fresh"), "growth", "gap_s", *_named("index_")),
    "no same prompt": _named("same_"),
    "no model": (*_named("model_"), *_named("verbosity")),
    "no future": _named("future_"),
}
"""Groups of features whose columns are emptied."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run: `folds` of the four, boosters by `recipes`, results into `out`."""

    runs: Sequence[RunExamples]
    out: Path
    recipes: Mapping[str, Recipe]
    folds: int = FOLDS
    seeds: int = 5
    orders: int = 3
    threads: int = 1

    def split(self) -> Iterator[tuple[list[RunExamples], list[RunExamples]]]:
        """Runs to learn from and runs to judge, no task on both sides."""
        for fold in range(self.folds):
            kept = [run for run in self.runs if fold_of(run) != fold]
            yield kept, [run for run in self.runs if fold_of(run) == fold]


def fold_of(run: RunExamples) -> int:
    return crc32(group_of(run).encode()) % FOLDS


# --- all folds together: figures with intervals ------------------------------------------------


def summary(plan: Plan) -> dict[str, Any]:
    """What `maestro evaluate` says, out of fold, frozen and online; intervals over runs."""
    found: dict[str, Any] = {}
    for name, online in (("frozen", False), ("online", True)):
        predicted = out_of_fold(plan, online)
        found[name] = {
            **report(predicted, online=online),
            "intervals": intervals(predicted),
        }
    return found


_kept: dict[bool, Predicted] = {}


def out_of_fold(plan: Plan, online: bool) -> Predicted:
    """Each call of the folds as predicted by a model that never saw its task."""
    if not _kept:
        for at, (kept, judged) in enumerate(plan.split()):
            say(f"fold {at + 1} of {plan.folds}")
            rows = training_rows(kept)
            trained = as_loaded(train_rows(kept, rows, threads=plan.threads, recipes=plan.recipes))
            for way in (False, True):
                found = predict(trained, judged, online=way)
                _kept[way] = joined(_kept[way], found) if way in _kept else found
    return _kept[online]


def as_loaded(trained: Trained) -> Trained:
    """What is judged is what a folder holds: not all that was learned is written."""
    with TemporaryDirectory() as folder:
        save_trained(trained, Path(folder) / "model")
        return load_trained(Path(folder) / "model")


# --- reliability, roles -------------------------------------------------------------------------


def reliability(plan: Plan) -> dict[str, Any]:
    """Of each stated level, the share of calls at or below it: all calls, macro, by source."""
    found: dict[str, Any] = {}
    for name, online in (("frozen", False), ("online", True)):
        predicted = out_of_fold(plan, online)
        found[name] = {
            level: {
                "stated": stated,
                "micro": covered(level)(predicted),
                "macro": macro(predicted, covered(level)),
                "sources": {
                    source: covered(level)(part)
                    for source, part in predicted.by_source().items()
                    if len(part) >= FEW
                },
            }
            for level, stated in LEVELS.items()
        }
    draw_reliability(plan.out / "reliability.png", found)
    return found


def covered(level: str) -> Callable[[Predicted], float]:
    return lambda part: float((part.actual <= getattr(part, level)).mean())


def roles(plan: Plan) -> list[dict[str, Any]]:
    """MAE of the roles with most calls, ours and the role's median."""
    predicted = out_of_fold(plan, False)
    names = np.char.add(np.char.add(predicted.sources, " / "), predicted.roles)
    found: list[dict[str, Any]] = []
    for name in np.unique(names):
        part = predicted.part(names == name)
        if len(part) < FEW:
            continue
        found.append(
            {
                "role": str(name),
                "calls": len(part),
                "mae": mae(part.point, part.actual),
                "role_median": mae(part.baselines["role_median"], part.actual),
                "median_actual": float(np.median(part.actual)),
                **kv_figures(part),
            }
        )
    found.sort(key=lambda row: -row["calls"])
    draw_roles(plan.out / "roles.png", found[:24])
    return found


# --- ablations, seeds ---------------------------------------------------------------------------


def ablation(plan: Plan) -> dict[str, Any]:
    """MAE and tau of the median alone, without some of what it is made from. `known`: tasks left
    out, `unseen`: three sources left out and nothing learned of them."""
    found: dict[str, Any] = {}
    for where, splits in (("known", [*plan.split()]), ("unseen", [unseen_split(plan)])):
        parts: dict[str, list[Judged]] = {}
        for at, (kept, judged) in enumerate(splits):
            for name, rows, test in variants(kept, judged):
                say(f"{where} {at + 1} of {len(splits)}: {name}")
                parts.setdefault(name, []).append(judge_median(plan, rows, test))
        found[where] = {name: figures_of(judged_parts) for name, judged_parts in parts.items()}
    return found


def unseen_split(plan: Plan) -> tuple[list[RunExamples], list[RunExamples]]:
    away = [run for run in plan.runs if run.source in UNSEEN]
    known = [run for run in plan.runs if run.source not in UNSEEN]
    if not away or not known:
        raise ConfigError(f"the ablation needs runs of {', '.join(UNSEEN)}, and of others")
    return known, away


def variants(
    kept: Sequence[RunExamples], judged: Sequence[RunExamples]
) -> Iterator[tuple[str, Rows, Rows]]:
    """Rows to learn from and to judge, each time without something."""
    rows, test = training_rows(kept), rows_of(judged, tables_of(kept))
    for name, columns in BLANKED.items():
        yield name, blanked(rows, columns), blanked(test, columns)
    yield "no rows of unknown apps", rows.part(~rows.cold), test
    yield "all sources weigh alike by call", replace(rows, weights=np.ones(len(rows))), test
    yield "no tables (no app, stage, role)", rows_of(kept, Tables()), rows_of(judged, Tables())


def blanked(rows: Rows, columns: Sequence[str]) -> Rows:
    x = rows.x.copy()
    x[:, [FEATURES.index(name) for name in columns]] = np.nan
    return replace(rows, x=x)


@dataclass(frozen=True, slots=True)
class Judged:
    """Rows that were judged, and the median that was predicted of each."""

    rows: Rows
    predicted: npt.NDArray[np.float64]


def judge_median(plan: Plan, rows: Rows, test: Rows, seed: int = 0) -> Judged:
    recipe = {"p50": plan.recipes["p50"]}
    boosters = train_boosters(rows, FEATURES, recipe, seed=seed, threads=plan.threads)
    logs = boosters.predict(test.x, ("p50",))[:, 0]
    return Judged(test, 2.0**logs - 1.0)


def figures_of(parts: Sequence[Judged]) -> dict[str, float]:
    predicted = np.concatenate([part.predicted for part in parts])
    actual = np.concatenate([part.rows.tokens for part in parts])
    sources = np.concatenate([part.rows.sources for part in parts])
    errors, taus = [], []
    for source in np.unique(sources):
        mine = sources == source
        if mine.sum() >= FEW:
            errors.append(mae(predicted[mine], actual[mine]))
            taus.append(kendall_tau(predicted[mine].tolist(), actual[mine].tolist()))
    return {
        "mae_macro": fmean(errors or [nan]),
        "mae_micro": mae(predicted, actual),
        "tau_macro": fmean(taus or [nan]),
        "tau_micro": kendall_tau(predicted.tolist(), actual.tolist()),
    }


def seeds(plan: Plan) -> dict[str, Any]:
    """The median alone, with other folds of the tables and another start of the learner."""
    found = []
    for seed in range(plan.seeds):
        parts = []
        for kept, judged in plan.split():
            say(f"seed {seed + 1} of {plan.seeds}")
            test = rows_of(judged, tables_of(kept))
            parts.append(judge_median(plan, training_rows(kept, seed), test, seed))
        found.append(figures_of(parts))
    spread = {
        name: {"mean": fmean(row[name] for row in found), "sd": pstdev(row[name] for row in found)}
        for name in found[0]
    }
    return {"seeds": found, "spread": spread}


# --- the learning curve of an unknown app -------------------------------------------------------


def curve(plan: Plan) -> dict[str, Any]:
    """Each source in turn is unknown; after k of its runs, how well are its last runs predicted?"""
    found: dict[str, Any] = {}
    for source in sorted({run.source for run in plan.runs}):
        mine = [run for run in plan.runs if run.source == source]
        if len(mine) < 4:
            continue
        say(f"without {source}")
        others = [run for run in plan.runs if run.source != source]
        if not others:
            raise ConfigError("the learning curve needs runs of two sources at least")
        rows = training_rows(others)
        model = fit_rows(rows, tables_of(others), 0, plan.threads, plan.recipes)
        found[source] = curve_of(Trained(model), mine, plan.orders)
    draw_curve(plan.out / "curve.png", found)
    return found


def curve_of(trained: Trained, runs: Sequence[RunExamples], orders: int) -> list[dict[str, Any]]:
    """Means over orders of arrival; judged are always the same runs."""
    shuffled = random.Random(0).sample(runs, len(runs))
    judged: list[RunExamples] = []
    while len(judged) < len(runs) / 2 and sum(len(r.calls) for r in judged) < JUDGED_CALLS:
        judged.append(shuffled.pop())
    steps = [k for k in STEPS if k <= len(shuffled)]
    table: dict[int, list[dict[str, float]]] = {k: [] for k in steps}
    for order in range(orders):
        estimator, arriving = Estimator(trained.model), [*shuffled]
        random.Random(order).shuffle(arriving)
        learned = 0
        for k in steps:
            for run in arriving[learned:k]:
                estimator.follow(run)
            learned = k
            part = predict(trained, judged, estimator=estimator)
            table[k].append(
                {
                    "mae": mae(part.point, part.actual),
                    "role_median": mae(part.baselines["role_median"], part.actual),
                    "p90_coverage": covered("p90")(part),
                    "p99_under": kv_figures(part)["p99_under_reservation"],
                }
            )
    return [
        {"runs": k, "calls": sum(len(r.calls) for r in judged)}
        | {name: fmean(row[name] for row in rows) for name in rows[0]}
        for k, rows in table.items()
    ]


COLOURS = 10
"""Matplotlib's own cycle: beyond it, another line style."""

# --- drawing ------------------------------------------------------------------------------------


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """A figure with one pair of axes.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def draw_reliability(path: Path, found: Mapping[str, Any]) -> None:
    figure, axes = canvas(6, 4.5)
    axes.plot((0.45, 1), (0.45, 1), color="grey", linewidth=1)
    for (name, levels), colour in zip(found.items(), ("tab:blue", "tab:orange"), strict=False):
        stated = [level["stated"] for level in levels.values()]
        axes.plot(stated, [v["macro"] for v in levels.values()], "o-", color=colour, label=name)
        for level in levels.values():
            shares = [*level["sources"].values()]
            places = [level["stated"]] * len(shares)
            axes.plot(places, shares, ".", color=colour, alpha=0.4)
    axes.set(xlabel="stated level", ylabel="share of calls at or below")
    axes.set_title("Reliability: macro mean, and each source")
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_roles(path: Path, found: Sequence[Mapping[str, Any]]) -> None:
    figure, axes = canvas(8, 1.5 + 0.3 * len(found))
    places = np.arange(len(found))
    axes.barh(places - 0.2, [row["role_median"] for row in found], 0.4, label="role median")
    axes.barh(places + 0.2, [row["mae"] for row in found], 0.4, label="this model")
    axes.set_yticks(places, [f"{row['role']} ({row['calls']})" for row in found])
    axes.invert_yaxis()
    axes.set(xlabel="mean absolute error, output tokens", title="Error by role (calls)")
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_curve(path: Path, found: Mapping[str, Any]) -> None:
    figure, axes = canvas(7.5, 4.5)
    for at, (source, rows) in enumerate(sorted(found.items())):
        first = rows[0]["mae"]
        style = "o-" if at < COLOURS else "s--"
        axes.plot([r["runs"] for r in rows], [r["mae"] / first for r in rows], style, label=source)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks(STEPS, [str(k) for k in STEPS])
    axes.set(
        xlabel="runs seen of an unknown app", ylabel="MAE, relative to none seen", ylim=(0, None)
    )
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


# --- the command --------------------------------------------------------------------------------

PARTS: Mapping[str, Callable[[Plan], Any]] = {
    "summary": summary,
    "reliability": reliability,
    "roles": roles,
    "seeds": seeds,
    "ablation": ablation,
    "curve": curve,
}

_started = time.monotonic()


def say(line: str) -> None:
    print(f"{time.monotonic() - _started:6.0f} s  {line}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--traces", type=Path, nargs="+", required=True, metavar="PATH")
    parser.add_argument("--only", choices=tuple(PARTS), action="append", help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="one fold, two seeds, 40 rounds")
    parser.add_argument("--rounds", type=int, help="at most so many boosting rounds")
    parser.add_argument("--folds", type=int, choices=range(1, FOLDS + 1), default=FOLDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "prediction")
    options = parser.parse_args()
    try:
        canvas(1, 1)
        rounds = options.rounds or (40 if options.quick else None)
        plan = Plan(
            read_traces(options.traces),
            options.out,
            RECIPES if rounds is None else shortened(rounds),
            folds=1 if options.quick else options.folds,
            seeds=2 if options.quick else 5,
            orders=1 if options.quick else 3,
            threads=options.threads,
        )
        options.out.mkdir(parents=True, exist_ok=True)
        for name in options.only or PARTS:
            found = PARTS[name](plan)
            text = json.dumps(plain(found), indent=1, allow_nan=False)
            (options.out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
            say(f"{options.out / name}.json")
    except ConfigError as error:
        print(f"prediction: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
