"""`maestro train` and `maestro evaluate`: their arguments and their output."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from maestro_agents.protocol import ConfigError


def add_train(parser: argparse.ArgumentParser) -> None:
    """What `maestro train` takes."""
    _add_traces(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model's folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: all CPUs of this process")
    parser.add_argument("--rounds", type=int, help="at most so many boosting rounds: a quick trial")
    parser.set_defaults(run=run_train)


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """What `maestro evaluate` takes."""
    _add_traces(parser)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a trained model")
    parser.add_argument(
        "--online", action="store_true", help="learn from each run at its end, as when serving"
    )
    parser.add_argument("--dump", type=Path, metavar="FILE", help="write each call as parquet")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(run=run_evaluate)


def _add_traces(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--traces",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="parquet files of recorded agent calls, or folders of them",
    )


def run_train(options: argparse.Namespace) -> int:
    """Train on recorded runs and write the model's folder."""
    from maestro_backend.evaluation import check_target, cpus, save_trained, shortened, train
    from maestro_backend.predictor import read_traces

    for name in ("threads", "rounds"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1")
    started = time.monotonic()
    check_target(options.out)
    recipes = {} if options.rounds is None else {"recipes": shortened(options.rounds)}
    runs = read_traces(_once(options.traces))
    threads = options.threads or cpus()
    trained = train(runs, seed=options.seed, threads=threads, say=_say, **recipes)
    save_trained(trained, options.out)
    calls, sources = sum(len(run.calls) for run in runs), len({run.source for run in runs})
    seconds = time.monotonic() - started
    _out(
        f"{options.out}: {calls} calls of {len(runs)} runs, {sources} sources, "
        f"seed {options.seed}, {seconds:.0f} s"
    )
    return 0


def run_evaluate(options: argparse.Namespace) -> int:
    """Hold a trained model against recorded runs; figures on stdout."""
    from maestro_backend.evaluation import (
        load_trained,
        predict,
        prediction_ms,
        report,
        write_calls,
    )
    from maestro_backend.predictor import read_traces

    if options.dump is not None and not options.dump.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {options.dump.parent} to write {options.dump} in")
    trained = load_trained(options.model)
    traces = _once(options.traces)
    runs = read_traces(traces)
    if not runs:
        raise ConfigError(f"there are no calls in {', '.join(map(str, traces))}")
    _say(f"predicting {sum(len(run.calls) for run in runs)} calls of {len(runs)} runs")
    predicted = predict(trained, runs, online=options.online)
    found = {
        **report(predicted, online=options.online),
        "prediction_ms": prediction_ms(trained.model, runs),
    }
    if options.dump is not None:
        write_calls(predicted, options.dump, traces)
    if options.json:
        _out(json.dumps(found, allow_nan=False))
    else:
        for line in table(found):
            _out(line)
    return 0


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """The figures of `maestro evaluate` for people."""
    yield (
        f"{'source':<18} {'calls':>7} {'MAE':>7} {'rel.':>6} {'tau':>6} "
        f"{'p90':>6} {'p95':>6} {'p99':>6} {'saved':>7} {'under':>6}"
    )
    for name, part in {**found["by_source"], "all calls": found}.items():
        error = part["mae"]["micro"] if isinstance(part["mae"], Mapping) else part["mae"]
        levels = " ".join(_number(part["coverage"][level], 6, 3) for level in ("p90", "p95", "p99"))
        kv = part["kv"]
        yield (
            f"{name:<18} {part['n']:>7} {_number(error, 7, 1)} "
            f"{_number(part['median_ape'], 6, 2)} {_number(part['kendall_tau'], 6, 2)} {levels} "
            f"{_number(kv['p99_output_saving'], 7, 3)} {_number(kv['p99_under_reservation'], 6, 3)}"
        )
    yield ""
    yield f"{'MAE, tokens':<18} {'macro':>8} {'micro':>8}"
    for name, both in {"this model": found["mae"], **found["baselines"]}.items():
        yield f"{name:<18} {_number(both['macro'], 8, 1)} {_number(both['micro'], 8, 1)}"
    yield ""
    for name in ("branch", "t_rem", "prediction_ms"):
        parts = (f"{part} {_number(value, 0, 3)}" for part, value in found[name].items())
        yield f"{name}: {', '.join(parts)}"
    yield f"Kendall tau, macro: {_number(found['kendall_tau_macro'], 0, 3)}"


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def _once(paths: list[Path]) -> list[Path]:
    """The files, each once however often it is named; what is none is left to `read_traces`."""
    files = [file for path in paths for file in (sorted(path.glob("*.parquet")) or [path])]
    return list({file.resolve(): file for file in files}.values())


def _say(line: str) -> None:
    sys.stderr.write(f"maestro: {line}\n")
    sys.stderr.flush()


def _out(line: str) -> None:
    sys.stdout.write(line + "\n")
