"""The demo: start everything, run the app, show what happened, stop everything."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from maestro_agents.protocol import BackendError, ConfigError
from maestro_backend._tied import tied_environment
from maestro_backend.config import Config
from maestro_backend.defaults import BIG, SMALL, default_config, default_engine
from maestro_backend.gateway import Serving, Shell, serving
from maestro_backend.node import LocalNode
from maestro_backend.scheduler import WorkerState
from maestro_backend.workflows import Run

from ._lines import CALL_HEADER, Lines
from ._summary import as_json, lead_times, timeline

_LINE_S = 0.05
"""Time for the last line of one part to come out before the next part."""

_RUN_END_S = 3.0
"""The app's last events may arrive so long after it has ended."""


async def run_demo(
    question: str, engine: str | None, stop: asyncio.Event, *, json_line: bool
) -> int:
    """Run the research team on `question`. Returns the exit status.

    Raises:
        ConfigError, BackendError: something could not be set up; the message names the mend.
    """
    chosen = engine or default_engine()
    say = _to_stderr if json_line else _to_stdout
    if engine is None and chosen == "stub":
        say("No vLLM is installed here (its wheels are for Linux x86_64): using the stub engine.")
    demo = Demo(question, chosen, say)
    work = asyncio.create_task(demo.run())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not work.done():
        say("stopping everything ...")
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        say("stopped")
        return 130
    result = await work
    if json_line:
        _to_stdout(json.dumps(result))
    return 0 if result["failed"] == 0 else 1


class Demo:
    """One demo run. `say` takes each line."""

    def __init__(self, question: str, engine: str, say: Callable[[str], None]) -> None:
        self._question = question
        self._engine = engine
        self._say = say

    async def run(self) -> dict[str, Any]:
        """Everything, from engines to summary. Whatever happens, all processes end with it."""
        config = default_config(self._engine)
        recording = config.state_dir / "demo.jsonl"
        # A state folder of its own: a server that is running keeps its workers.
        config = config.model_copy(update={"state_dir": config.state_dir / "demo"})
        app = find_app()
        self._say(f"Starting {' and '.join(config.models)} on {self._engine_name(config)} ...")
        async with (
            LocalNode(config) as node,
            serving(config, node, host="127.0.0.1", port=0, recording=recording) as served,
        ):
            lines = Lines(served.shell.now())
            async with self._telling(served.shell, lines):
                await self._until_ready(served.shell)
                await asyncio.sleep(_LINE_S)
                self._say(f"\nQuestion: {self._question}\n\n{CALL_HEADER}")
                answer = await self._run_app(app, served)
                run = await self._ended_run(served.shell)
            result = self._summary(served.shell, run, answer)
            self._say("\nStopping the engines ...")
        self._say("Stopped. Where to look next:")
        me = sys.argv[0] if Path(sys.argv[0]).name == "maestro" else "maestro"
        for what, where in (
            ("the app, with its one line of Maestro", app),
            ("serve the same two models to your own app", f"{me} serve"),
            ("decide every call again, from the recording", f"{me} replay {recording}"),
            ("what the engines said", config.state_dir / "logs"),
        ):
            self._say(f"  {what:<44} {where}")
        return result

    def _engine_name(self, config: Config) -> str:
        names = {"stub": "the stub engine", "auto": "real vLLM", "vllm-cpu": "real vLLM (CPU)"}
        return names.get(self._engine, self._engine)

    @asynccontextmanager
    async def _telling(self, shell: Shell, lines: Lines) -> AsyncIterator[None]:
        """Print changes while the block runs."""

        with shell.feed.listening() as changes:
            task = asyncio.create_task(self._tell(shell, lines, changes))
            try:
                yield
            finally:
                await asyncio.sleep(_LINE_S)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _tell(
        self, shell: Shell, lines: Lines, changes: AsyncIterator[dict[str, Any]]
    ) -> None:
        async for change in changes:
            line = None
            if change["type"] == "worker":
                line = lines.worker(change, shell.now())
            elif change["type"] == "call":
                line = lines.call(change, shell.now())
            if line:
                self._say(line)

    async def _until_ready(self, shell: Shell) -> None:
        """Wait for both models.

        Raises:
            BackendError: one could not be started.
        """
        while True:
            workers = {w.model: w for w in shell.scheduler.workers.values()}
            for model in (BIG, SMALL):
                failure = shell.scheduler.residencies.failures.of_model(model, shell.now())
                if failure:
                    raise BackendError(f"{model} did not start: {failure.detail}")
            if workers and all(w.state is WorkerState.READY for w in workers.values()):
                return
            await asyncio.sleep(0.05)

    async def _run_app(self, app: Path, served: Serving) -> str:
        """The example as a user runs it: its own process, told only where the server is."""
        environment = {
            **tied_environment(),
            "MAESTRO_BASE_URL": served.url,
            "RESEARCH_MODEL": BIG,
            "CRITIC_MODEL": SMALL,
        }
        tied = (sys.executable, "-m", "maestro_backend._tied")
        process = await asyncio.create_subprocess_exec(
            *tied,
            sys.executable,
            str(app),
            self._question,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            output, _ = await process.communicate()
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if process.returncode != 0:
            raise BackendError(f"{app} ended with status {process.returncode}")
        return output.decode(errors="replace").strip()

    async def _ended_run(self, shell: Shell) -> Run:
        """The app's run, when its end has been announced, or after three seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_RUN_END_S):
                while not any(run.ended for run in shell.book.runs.values()):
                    await asyncio.sleep(0.02)
        if not shell.book.runs:
            raise BackendError("the app made no call through Maestro: is MAESTRO_ENABLED off?")
        return next(reversed(shell.book.runs.values()))

    def _summary(self, shell: Shell, run: Run, answer: str) -> dict[str, Any]:
        calls = shell.records.of_run(run.run)
        result = as_json(run, calls, answer, self._engine)
        lead = result["lead_time_s"]
        self._say(f"\nAnswer:\n{answer}\n\nTimeline of {run.workflow}:")
        for row in timeline(calls):
            self._say("  " + row)
        self._say("\nLead time (known before its call arrived):")
        for row in lead_times(calls):
            self._say("  " + row)
        self._say(
            f"\n{result['calls']} calls, {result['failed']} failed, "
            f"{result['output_tokens']} tokens in {result['makespan_s']:.1f} s; "
            f"{lead['foreseen']} of {result['calls']} calls announced ahead; "
            f"{result['announced_never_made']} announced and never made (a branch not taken)"
        )
        return result


def find_app() -> Path:
    """The example app: inside the installed package, or in the source tree.

    Raises:
        ConfigError: neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for root in (package, package.parents[1]):
        app = root / "examples" / "research_team" / "app.py"
        if app.is_file():
            return app
    raise ConfigError("examples/research_team/app.py is missing: reinstall maestro-mas")


def _to_stdout(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
