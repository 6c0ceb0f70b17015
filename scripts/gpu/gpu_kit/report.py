"""What the steps found: JSON lines as they go, one file of all results, and a table to read."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Results:
    """The file of all results, whole at any time. `told` maps a step's name to what it found;
    what an earlier run of the same engine and installation has found of other steps stays."""

    def __init__(self, path: Path, engine: str, installed: dict[str, Any]) -> None:
        self.path = path
        self.told: dict[str, dict[str, Any]] = {}
        self._before: dict[str, dict[str, Any]] = {}
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if (found["engine"], found["installed"]) == (engine, installed):
                self._before = found["steps"]
        self._head = {
            "installed": installed,
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "engine": engine,
            "python": platform.python_version(),
        }

    @property
    def failed(self) -> list[str]:
        """The steps that did not end well, or where a check does not hold."""
        return [name for name, told in self.told.items() if _is_bad(told)]

    def status_of(self, name: str) -> str:
        """How a step of this run ended; "" where it did not run."""
        return str(self.told.get(name, {}).get("status", ""))

    def skipped(self, name: str, reason: str) -> None:
        """It was not run."""
        self._put(name, {"status": "skipped", "reason": reason})

    def going_on(self, name: str, lines: list[Line]) -> None:
        """What it has found so far."""
        self._put(name, {"status": "running", **_sorted(lines)})

    def ended(self, name: str, status: str, seconds: float, lines: list[Line], log: str) -> None:
        """`status` is `done`, `failed` or `cut off`; of the last two the end of the log is kept."""
        told = {"status": status, "seconds": round(seconds, 1), **_sorted(lines)}
        self._put(name, told if status == "done" else {**told, "log": log})

    def _put(self, name: str, told: dict[str, Any]) -> None:
        self.told[name] = told
        new = self.path.with_suffix(".new")
        steps = {**self._before, **self.told}
        new.write_text(json.dumps({**self._head, "steps": steps}, indent=1) + "\n")
        new.replace(self.path)


def read(lines: Path) -> list[Line]:
    """The whole lines of a step's file; the last may be half written."""
    if not lines.is_file():
        return []
    whole = lines.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def _sorted(lines: list[Line]) -> dict[str, Any]:
    checks = [line for line in lines if "holds" in line]
    notes = [line["note"] for line in lines if "note" in line]
    figures = {line["figure"]: line["value"] for line in lines if "figure" in line}
    return {"figures": figures, "checks": checks, "notes": notes}


def _is_bad(told: dict[str, Any]) -> bool:
    broken = any(not check["holds"] for check in told.get("checks", ()))
    return told["status"] in ("failed", "cut off") or broken


def step_text(told: dict[str, Any]) -> str:
    """One step's figures and checks, a line each."""
    lines = [f"   {told['status']} in {told['seconds']} s"]
    lines += [f"   {name} = {_short(value)}" for name, value in told["figures"].items()]
    lines += [f"   {_mark(c)} {c['check']}: {c['told']}" for c in told["checks"]]
    lines += [f"   note: {note}" for note in told["notes"]]
    lines += [f"   | {line}" for line in told.get("log", "").splitlines()]
    return "\n".join(lines)


def table(steps: dict[str, dict[str, Any]]) -> str:
    """A line for each step, and the checks that do not hold."""
    lines = ["", f"{'step':<14}{'status':<10}{'seconds':>8}  checks"]
    for name, told in steps.items():
        checks = told.get("checks", ())
        holding = f"{sum(c['holds'] for c in checks)} of {len(checks)}" if checks else "-"
        extra = told.get("reason", "")
        lines.append(
            f"{name:<14}{told['status']:<10}{told.get('seconds', 0):>8}  {holding} {extra}"
        )
        lines += [f"  NOT: {c['check']}: {c['told']}" for c in checks if not c["holds"]]
    return "\n".join(lines)


def _mark(check: Line) -> str:
    return "ok " if check["holds"] else "NOT"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
