"""The trainer: `python -m maestro_backend.predictor.training --store FILE --models FOLDER`.

Reads the store, writes model versions, and says how it went in one line of JSON on stdout. It gives
way to whatever else runs, and is the first to go when memory is short.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import resource
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import cast

from maestro_agents.protocol import MaestroError
from maestro_backend._tied import tie_to_parent
from maestro_backend.predictor.store import StoreView

from ._training import LEARNER, Learner, train
from ._versions import Versions

_NICENESS = 19


def main() -> int:
    """Train once. 0: the line on stdout says how it went; 2: one line on stderr names the fix."""
    parser = argparse.ArgumentParser(prog="maestro-trainer", description=__doc__)
    parser.add_argument("--store", required=True, type=Path, help="the calls; only read")
    parser.add_argument("--models", required=True, type=Path, help="folder of model versions")
    parser.add_argument("--learner", default=LEARNER, help="module with fit, load_model, judge")
    parser.add_argument("--calls", type=int, help="learn from so many of the newest at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=int, metavar="BYTES", help="bound of address space")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    answer = _keep_stdout()
    try:
        tie_to_parent(signal.SIGKILL)
        _give_way(options.memory)
        with StoreView(options.store) as view:
            runs = view.runs(limit=options.calls)
        learner = cast(Learner, importlib.import_module(options.learner))
        training = train(
            runs, Versions(options.models), learner, seed=options.seed, threads=options.threads
        )
    except MaestroError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    with os.fdopen(answer, "w", encoding="utf-8") as out:
        out.write(json.dumps(asdict(training)) + "\n")
    return 0


def _keep_stdout() -> int:
    """The real stdout, for the answer alone: whatever libraries print there goes to stderr."""
    answer = os.dup(1)
    os.dup2(2, 1)
    return answer


def _give_way(memory: int | None) -> None:
    os.nice(_NICENESS)
    with suppress(OSError):  # not on every system
        Path("/proc/self/oom_score_adj").write_text("1000")
    if memory is not None:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


if __name__ == "__main__":
    sys.exit(main())
