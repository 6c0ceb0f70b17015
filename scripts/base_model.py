"""Train the model that ships in the package, from a folder of recorded agent calls.

Numbers only: no text of any prompt is read. Sources whose repository has no licence file are left
out. The result and its notices go to backend/maestro_backend/predictor/base.

    .venv/bin/python scripts/base_model.py TRACES
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from maestro_backend.predictor import Model, RunExamples, fit, read_traces
from maestro_backend.predictor._boosters import RECIPES

BASE = Path(__file__).parents[1] / "backend" / "maestro_backend" / "predictor" / "base"

UNLICENSED = frozenset({"agentsim"})

SOURCES = {
    "aaaj": ("iiMUMY/agent-as-a-judge", "8a1bcdd4a679", "MIT"),
    "chatdev_agile": ("OTOYO1020/ChatDev_Intermediate", "c74d8c8db6c6", "Apache-2.0"),
    "lmcache_magentic": ("LMCache/lmcache-agent-trace", "16a14adaad43", "Apache-2.0"),
    "lmcache_miniswe": ("LMCache/lmcache-agent-trace", "16a14adaad43", "Apache-2.0"),
    "parrot_metagpt": ("microsoft/ParrotServe", "2e1825ee2bc3", "MIT"),
    "tau1": ("sierra-research/tau-bench", "59a200c6d575", "MIT"),
    "tau2": ("sierra-research/tau2-bench", "a2c024725189", "MIT"),
    "tradingagents": ("zjh08177/TradingAgents", "f21982dc0461", "Apache-2.0"),
    "weka_claude_code": ("callanjfox/kv-cache-tester", "94f6046dfd9c", "Apache-2.0"),
    "whowhen_captain": ("ag2ai/Agents_Failure_Attribution", "f4d2b6da464a", "MIT"),
    "whowhen_magentic": ("ag2ai/Agents_Failure_Attribution", "f4d2b6da464a", "MIT"),
}
"""Where the counts come from: repository, commit, licence."""

SMALL = {
    name: replace(recipe, leaves=min(recipe.leaves, 63), rounds=min(recipe.rounds, 250), rate=0.06)
    for name, recipe in RECIPES.items()
}
"""A shipped model is a start, and small: what runs here takes over soon."""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write(__doc__ or "")
        return 2
    runs = [run for run in read_traces([Path(arguments[0])]) if run.source not in UNLICENSED]
    if strangers := sorted({run.source for run in runs} - SOURCES.keys()):
        sys.stderr.write(f"base_model: no notice for {strangers[0]}: add it to SOURCES\n")
        return 2
    model = fit(runs, recipes=SMALL)
    shutil.rmtree(BASE, ignore_errors=True)
    model.save(BASE)
    (BASE / "NOTICE.md").write_text(_notice(model, runs), encoding="utf-8")
    size = sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file())
    sys.stdout.write(json.dumps({"bytes": size, **model.about}) + "\n")
    return 0


def _notice(model: Model, runs: list[RunExamples]) -> str:
    lines = [
        "# The base model",
        "",
        "Made by `scripts/base_model.py`. It holds trees and histograms of token counts, with the",
        "names of the applications, stages, roles and models that they were counted by; no text of",
        "any prompt or reply. The counts were taken from these public records:",
        "",
        "| source | repository | commit | licence | calls |",
        "|---|---|---|---|---|",
    ]
    for source, (repository, commit, licence) in SOURCES.items():
        calls = sum(len(run.calls) for run in runs if run.source == source)
        lines.append(f"| {source} | {repository} | {commit} | {licence} | {calls} |")
    lines += ["", "ChatDev's task texts (SRDD, CC BY-NC 4.0) were not read.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
