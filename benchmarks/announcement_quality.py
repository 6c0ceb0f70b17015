"""How right the announcements are: six multi-agent shapes on stub engines, scored call by call.

    make bench NAME=announcement_quality

Each app of `examples/` runs, as it is, against a real gateway. The first runs teach; of the others
everything that the backend believed before each call is held against what then happened. Losses
are nats per decision, lead times milliseconds (stub engines take no time: only their order counts).
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from maestro_agents._control import control
from maestro_agents.protocol import Edge, Stage, Workflow
from maestro_backend.config import Config
from maestro_backend.evaluation import JournalBook, Score, score, spread
from maestro_backend.gateway import Shell, serving
from maestro_backend.node import LocalNode
from maestro_backend.scheduler import WorkerState

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = "stub"
TRUTHS = {
    "debate": "pro>con con>moderator moderator?pro,judge judge>__end__",
    "map_reduce": "planner?writer,editor writer>collect collect?condenser,editor "
    "condenser>editor editor>__end__",
    "reflection": "writer>critic critic?writer,__end__",
    "iterative_refinement": "author>fact_checker fact_checker?simplifier,stylist "
    "simplifier>stylist stylist>judge judge?fact_checker,__end__",
    "parallel_experts": "moderator>economist,engineer,lawyer economist>synthesis "
    "engineer>synthesis lawyer>synthesis synthesis?arbiter,__end__ arbiter>__end__",
    "supervisor": "supervisor?researcher,analyst,sceptic,writer researcher?supervisor,writer "
    "analyst?supervisor,writer sceptic?supervisor,writer writer>__end__",
}
"""What may follow each stage, as a reader of the app sees it: `>` certainly, `?` one of these."""


def truth(shape: str) -> Workflow:
    """The graph of a shape, written down by hand: no adapter has a say in it."""
    edges = list(_edges(TRUTHS[shape]))
    names = dict.fromkeys(e.source for e in edges)
    return Workflow(name=shape, stages=tuple(Stage(path=n) for n in names), edges=tuple(edges))


def _edges(text: str) -> Iterator[Edge]:
    for part in text.split():
        source, sign, targets = part.partition("?" if "?" in part else ">")
        for target in targets.split(","):
            yield Edge(source=source, target=target, candidate=sign == "?")


@contextmanager
def app(shape: str, url: str, model: str) -> Iterator[ModuleType]:
    """The example as a module of its own, aimed at `url`."""
    before = {name: os.environ.get(name) for name in ("MAESTRO_BASE_URL", "MODEL")}
    os.environ |= {"MAESTRO_BASE_URL": url, "MODEL": model}
    spec = importlib.util.spec_from_file_location(f"example_{shape}", EXAMPLES / f"{shape}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}


def run_app(shape: str, url: str, model: str, numbers: range) -> None:
    """Run a shape once per number, one run after the other; replies depend on the number only."""
    with app(shape, url, model) as module:
        for number in numbers:
            module.graph.invoke({"question": f"What about question {number}?"})
            if not control.flush(10):
                raise SystemExit("the gateway takes no events")


async def measure(
    shell: Shell, url: str, shape: str, model: str, book: JournalBook, runs: int
) -> Score:
    """Teach a new book by `runs` runs of a shape, then score as many."""
    shell.book = book
    await asyncio.to_thread(run_app, shape, url, model, range(runs))
    book.journal.clear()
    await asyncio.to_thread(run_app, shape, url, model, range(runs, 2 * runs))
    return score(book.journal, truth(shape))


async def measure_all(shapes: list[str], runs: int) -> dict[str, Score]:
    with tempfile.TemporaryDirectory() as folder:
        models = {MODEL: {"source": "random:tiny-llama", "engine": "stub"}}
        config = Config.parse({"models": models, "state_dir": folder})
        async with (
            LocalNode(config) as node,
            serving(config, node, host="127.0.0.1", port=0) as served,
        ):
            shell, found = served.shell, {}
            while not any(w.state is WorkerState.READY for w in shell.scheduler.workers.values()):
                await asyncio.sleep(0.05)
            for shape in shapes:
                book = JournalBook(shell.predictor, {})
                found[shape] = await measure(shell, served.url, shape, MODEL, book, runs)
            return found


def row(found: Score) -> dict[str, Any]:
    leads = list(chain(*found.lead_s.values()))
    low, middle, high = spread(leads) if leads else (0.0, 0.0, 0.0)
    return {
        "calls": found.calls,
        "coverage": round(found.coverage, 4),
        "certain": found.promises,
        "never_made": found.broken,
        "loss": round(found.loss, 3),
        "uniform": round(found.uniform, 3),
        "calibration": round(found.calibration, 3),
        "lead_ms": [round(1000 * s, 1) for s in (low, middle, high)],
    }


def table(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    head = ("calls", "coverage", "certain", "never made", "loss", "uniform", "calibration")
    yield f"{'shape':22}" + "".join(f"{name:>12}" for name in head) + "   lead ms p10 / p50 / p90"
    for shape, values in rows.items():
        cells = list(values.values())
        lead = " / ".join(f"{ms:.1f}" for ms in cells.pop())
        yield f"{shape:22}" + "".join(f"{cell:>12}" for cell in cells) + f"   {lead}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Score the announcements of six shapes.")
    parser.add_argument("--runs", type=int, default=20, help="teaching runs, and as many scored")
    parser.add_argument("--json", action="store_true", help="also lead times by stage, as JSON")
    parser.add_argument("shapes", nargs="*", default=list(TRUTHS), metavar="SHAPE")
    options = parser.parse_args()
    scores = asyncio.run(measure_all(options.shapes, options.runs))
    rows = {shape: row(found) for shape, found in scores.items()}
    if options.json:
        for shape, found in scores.items():
            rows[shape]["stages"] = {
                stage: [round(1000 * s, 1) for s in found.lead_quantiles(stage)]
                for stage in found.lead_s
            }
            rows[shape]["faults"] = found.faults()
        print(json.dumps(rows, indent=2))
        return
    print("\n".join(table(rows)))
    for shape, found in scores.items():
        for fault in found.faults():
            print(f"{shape}: {fault}")


if __name__ == "__main__":
    main()
