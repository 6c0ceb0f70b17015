"""`maestro simulate`: its arguments and its output."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maestro_agents.protocol import ConfigError

if TYPE_CHECKING:
    from maestro_backend.study import Named, Plan, Scene

_DEFAULTS = "all systems that are ranked, and oracle"


def add_simulate(parser: argparse.ArgumentParser) -> None:
    """What `maestro simulate` takes."""
    _add_inputs(parser)
    _add_cells(parser)
    _add_outputs(parser)
    parser.set_defaults(run=run_simulate)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--workflows",
        nargs="+",
        default=[],
        metavar="PATH",
        help="recorded runs to replay: parquet files or folders of them, agentic Mooncake .jsonl, "
        "or synthetic:NAME; nothing is learned from them in advance",
    )
    add(
        "--history",
        nargs="+",
        default=[],
        metavar="PATH",
        help="past runs that predictors may learn from",
    )
    add(
        "--arrivals",
        default="poisson",
        metavar="PATH",
        help="a trace of arrivals, or poisson (default), constant, gamma:CV",
    )
    add("--cluster", default="paper", metavar="NAME|FILE", help="default: paper")
    add("--mix", default="paper", metavar="NAME|FILE", help="weights, classes, models: paper")
    add("--model", type=Path, metavar="DIR", help="a trained model; default: the one that ships")


def _add_cells(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--policies", metavar="A,B", help=f"default: {_DEFAULTS}; see --list-policies")
    add(
        "--saturation",
        type=float,
        metavar="RUNS_S",
        help="load 1.0 in runs/s, where it is known; default: it is simulated",
    )
    add("--load", default="0.8,1.0,1.2", metavar="L,L", help="1.0: fcfs saturates")
    add(
        "--deadline",
        action="append",
        metavar="KIND",
        help="proportional:FACTOR or fixed:NAME; may be repeated (default: proportional:2.5)",
    )
    add("--seeds", type=int, default=5, metavar="N", help="each draws its own runs (5)")
    add("--calls", type=int, default=20_000, metavar="MAX", help="calls in each cell (20,000)")
    add("--jobs", type=int, metavar="N", help="simulations at once; default: all CPUs")


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--json", metavar="FILE", help="all figures; - prints them")
    add("--dump", type=Path, metavar="FILE", help="one row per run and cell, as parquet")
    add("--table", type=Path, metavar="FILE", help="the summary as Markdown")
    add("--plots", type=Path, metavar="DIR", help="pictures (PNG)")
    add("--export-mooncake", type=Path, metavar="FILE", help="the runs of the first cell, as JSONL")
    add("--list-policies", action="store_true", help="say what each policy stands for, and stop")


def run_simulate(options: argparse.Namespace) -> int:
    """Simulate all cells and write what was asked for."""
    if options.list_policies:
        return _list_policies()
    _check_outputs(options)
    if not options.workflows:
        raise ConfigError("name the runs to replay: --workflows PATH, or synthetic:mixed")
    from maestro_backend.study import draw_plots, make_scene, markdown, progress, read, run_study

    named, plan = _named(options), _plan(options)
    scene = make_scene(named, read(named), plan, _say)
    _say(f"load 1.0 is {scene.saturation:.4g} runs/s; {len(list(plan.jobs()))} simulations")
    if options.export_mooncake is not None:
        _export(plan, scene, options.export_mooncake)
    found, drawn = run_study(
        plan,
        scene,
        jobs=_jobs(options),
        dump=options.dump,
        pictures=options.plots is not None,
        step=progress(plan).step,
    )
    found = {"command": _command(options, plan), **found}
    table = markdown(found["summary"])
    if options.table is not None:
        _write(options.table, table)
    _print(options.json, found, table)
    if options.plots is not None:
        options.plots.mkdir(exist_ok=True)
        draw_plots(options.plots, found, drawn)
    return 0


def _print(target: str | None, found: dict[str, Any], table: str) -> None:
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    if target is not None:
        _write(Path(target), text)
    sys.stdout.write(table)


def _list_policies() -> int:
    from maestro_backend.simulator import SYSTEMS

    width = max(map(len, SYSTEMS))
    for name, system in SYSTEMS.items():
        bound = "" if system.ranked else " [a bound: not ranked]"
        sys.stdout.write(f"{name:<{width}}  {system.about}{bound}\n")
    return 0


# --- what was asked for -------------------------------------------------------------------------


def _named(options: argparse.Namespace) -> Named:
    from maestro_backend.study import Named

    return Named(
        tuple(options.workflows),
        tuple(options.history),
        options.arrivals,
        options.cluster,
        options.mix,
        options.model,
        options.saturation,
    )


def _plan(options: argparse.Namespace) -> Plan:
    from maestro_backend.simulator import SYSTEMS, system
    from maestro_backend.study import Plan

    for name in ("seeds", "calls"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.saturation is not None and not 0.0 < options.saturation < inf:
        raise ConfigError(f"--saturation must be above 0, got {options.saturation:g}")
    if options.policies is None:
        ranked = tuple(one for one in SYSTEMS.values() if one.ranked)
        systems = (*ranked, SYSTEMS["oracle"])
    else:
        systems = tuple(system(name) for name in _parts("--policies", options.policies))
    return Plan(
        systems,
        _loads(options.load),
        tuple(dict.fromkeys(options.deadline or ("proportional:2.5",))),
        options.seeds,
        options.calls,
    )


def _loads(text: str) -> tuple[float, ...]:
    return tuple(dict.fromkeys(_load(part) for part in _parts("--load", text)))


def _load(text: str) -> float:
    try:
        load = float(text)
    except ValueError:
        load = 0.0
    if not 0.0 < load < inf:
        raise ConfigError(f"--load takes numbers above 0, such as 0.8,1.2; got {text!r}")
    return load


def _parts(option: str, text: str) -> list[str]:
    """Each once, however often it is named."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise ConfigError(f"{option} names nothing")
    return parts


def _jobs(options: argparse.Namespace) -> int:
    from maestro_backend.evaluation import cpus

    return cpus() if options.jobs is None else int(options.jobs)


def _command(options: argparse.Namespace, plan: Plan) -> str:
    """What gives the same results again, wherever they are written."""
    parts = ["maestro", "simulate", "--workflows", *options.workflows]
    if options.history:
        parts += ["--history", *options.history]
    parts += ["--arrivals", options.arrivals, "--cluster", options.cluster, "--mix", options.mix]
    if options.model is not None:
        parts += ["--model", str(options.model)]
    if options.saturation is not None:
        parts += ["--saturation", f"{options.saturation!r}"]
    parts += ["--policies", ",".join(one.name for one in plan.systems)]
    parts += ["--load", ",".join(f"{load:g}" for load in plan.loads)]
    for deadline in plan.deadlines:
        parts += ["--deadline", deadline]
    return shlex.join([*parts, "--seeds", str(plan.seeds), "--calls", str(plan.calls)])


# --- where it goes ------------------------------------------------------------------------------


def _check_outputs(options: argparse.Namespace) -> None:
    """Before anything is simulated: nobody waits an hour for a folder that is not there."""
    if options.jobs is not None and options.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {options.jobs}")
    json_file = None if options.json in (None, "-") else Path(options.json)
    for file in (json_file, options.dump, options.table, options.export_mooncake):
        if file is not None and file.is_dir():
            raise ConfigError(f"{file} is a folder: name a file to write")
    for path in (json_file, options.dump, options.table, options.plots, options.export_mooncake):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"there is no folder {path.parent} to write {path} in")
    if options.dump is not None and find_spec("pyarrow") is None:
        raise ConfigError("--dump needs pyarrow: pip install 'maestro-mas[train]'")
    if options.plots is not None:
        from maestro_backend.study import check_drawing

        check_drawing()
        if options.plots.exists() and not options.plots.is_dir():
            raise ConfigError(f"{options.plots} is a file: --plots names a folder")


def _export(plan: Plan, scene: Scene, path: Path) -> None:
    from maestro_backend.study import runs_of
    from maestro_backend.workloads import export_mooncake

    export_mooncake(path, runs_of(next(plan.jobs()), plan, scene))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error


def _say(line: str) -> None:
    sys.stderr.write(f"maestro: {line}\n")
    sys.stderr.flush()
