"""Training: what is learned from, what is installed, and the process that does it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from predictor import fake_learner
from predictor.examples import run_of
from predictor.fake_learner import FakeModel

from maestro_agents.protocol import BackendError
from maestro_backend.predictor import RunExamples
from maestro_backend.predictor.store import Store
from maestro_backend.predictor.training import (
    Due,
    Judgement,
    Manifest,
    Outcome,
    Retraining,
    TrainerProcess,
    Trouble,
    Version,
    Versions,
    decide,
    split,
    train,
)

NOW = 1_800_000_000.0
PATH = {"PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[1]), *sys.path))}


def judged(mae: float, median_error: float = 1.0) -> Judgement:
    return Judgement(mae, median_error, 0.9, 100)


def runs_of(tokens: int, count: int = 100) -> list[RunExamples]:
    return [run_of(f"r{number}", 5, tokens) for number in range(count)]


def install(versions: Versions, tokens: float) -> Version:
    return versions.add(FakeModel(tokens).save, Manifest(NOW, 1, {"p90_coverage": 0.9}))


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    return Versions(tmp_path / "models")


# --- what is learned from, and what is installed --------------------------------------------------


def test_the_newest_fifth_is_judged_on_and_not_learned_from() -> None:
    runs = [run_of(str(number), 1) for number in range(10)]
    older, newest = split(runs)
    assert ([run.run for run in newest], older) == (["8", "9"], runs[:8])


def test_a_task_is_never_on_both_sides() -> None:
    tasks = ["a", "b", "", "c", "", "a", "d", "e", "b", ""]
    runs = [run_of(str(number), 1, task=task) for number, task in enumerate(tasks)]
    older, newest = split(runs)
    assert [run.run for run in newest] == ["8", "9"]
    assert [run.run for run in older] == ["0", "2", "3", "4", "5", "6", "7"]


@pytest.mark.parametrize(
    ("new", "current", "fallback", "outcome"),
    [
        (judged(9), None, judged(10), Outcome.INSTALLED),
        (judged(9), judged(9), judged(10), Outcome.INSTALLED),
        (judged(9), judged(8), judged(10), Outcome.KEPT),
        (judged(10), None, judged(10), Outcome.KEPT),
        (judged(9, 2), None, judged(10, 1), Outcome.KEPT),
        (judged(10), judged(11), judged(10), Outcome.ROLLED_BACK),
        (judged(9), judged(11), judged(10), Outcome.INSTALLED),
        (judged(12), judged(10), judged(10), Outcome.KEPT),
    ],
)
def test_only_what_is_better_is_installed(
    new: Judgement, current: Judgement | None, fallback: Judgement, outcome: Outcome
) -> None:
    decided, why = decide(new, current, fallback)
    assert decided is outcome
    assert f"{new.mae:.1f} tokens a call" in why


def test_the_first_good_model_is_installed_with_what_it_was_judged_by(versions: Versions) -> None:
    training = train(runs_of(40), versions, fake_learner, clock=lambda: NOW)
    assert (training.outcome, training.version) == (Outcome.INSTALLED, "v000001")
    assert (training.runs, training.calls) == (100, 500)
    assert (training.new, training.current) == (Judgement(0, 0, 1, 100), None)
    current = versions.current()
    assert current is not None
    assert (current.manifest.calls, current.manifest.made_at) == (400, NOW)
    assert current.manifest.metrics["mae"] == 0
    assert current.manifest.metrics["fallback_mae"] == 60
    assert current.manifest.libraries["python"] == ".".join(map(str, sys.version_info[:3]))
    assert fake_learner.load_model(current.folder).tokens == 40


def test_a_worse_model_is_not_kept(versions: Versions) -> None:
    install(versions, 50)
    moved = [*runs_of(40, 80), *runs_of(55, 20)]
    training = train(moved, versions, fake_learner)
    assert (training.outcome, training.version) == (Outcome.KEPT, "v000001")
    assert [version.name for version in versions.all()] == ["v000001"]


def test_a_model_is_judged_as_it_will_be_read(
    versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LEARNER", "lossy")
    training = train(runs_of(40), versions, fake_learner)
    assert (training.outcome, training.version) == (Outcome.KEPT, "")
    assert training.new == Judgement(460, 460, 1, 100)


def test_a_model_worse_than_the_tables_is_rolled_back(versions: Versions) -> None:
    install(versions, 90)
    install(versions, 5)
    moved = [*runs_of(2, 80), *runs_of(95, 20)]
    training = train(moved, versions, fake_learner)
    assert (training.outcome, training.version) == (Outcome.ROLLED_BACK, "v000001")


def test_a_first_version_has_to_beat_the_base_model(versions: Versions) -> None:
    parts = {name: getattr(fake_learner, name) for name in ("fit", "load_model", "judge")}
    runs = [*runs_of(40, 80), *runs_of(45, 20)]
    for base, outcome in ((45.0, Outcome.KEPT), (500.0, Outcome.INSTALLED)):
        learner = SimpleNamespace(**parts, base_model=lambda base=base: FakeModel(base))
        training = train(runs, versions, learner)
        assert training.outcome is outcome
        assert training.current == fake_learner.judge(FakeModel(base), runs[80:], runs[:80])


def test_a_base_model_worse_than_the_tables_cannot_be_rolled_back(versions: Versions) -> None:
    parts = {name: getattr(fake_learner, name) for name in ("fit", "load_model", "judge")}
    learner = SimpleNamespace(**parts, base_model=lambda: FakeModel(500.0))
    training = train([*runs_of(2, 80), *runs_of(95, 20)], versions, learner)
    assert (training.outcome, training.version) == (Outcome.KEPT, "")


def test_a_current_model_that_cannot_be_loaded_does_not_stand_in_the_way(
    versions: Versions, caplog: pytest.LogCaptureFixture
) -> None:
    versions.add(lambda folder: None, Manifest(NOW, 1))
    training = train(runs_of(40), versions, fake_learner)
    assert (training.outcome, training.version) == (Outcome.INSTALLED, "v000002")
    assert "v000001 cannot be used" in caplog.text


def test_too_few_calls_teach_nothing(versions: Versions) -> None:
    training = train(runs_of(40, 20), versions, fake_learner)
    assert (training.outcome, training.version) == (Outcome.TOO_FEW, "")
    assert "100 calls of 20 runs" in training.detail


def test_a_judgement_of_nan_is_an_error(
    versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LEARNER", "nan")
    with pytest.raises(BackendError, match="off by nan tokens"):
        train(runs_of(40), versions, fake_learner)
    assert versions.all() == []


# --- when -----------------------------------------------------------------------------------------


def test_a_training_is_due_after_enough_calls_and_enough_rest() -> None:
    due = Due(every_calls=500, pause_s=600)
    assert due.waits_s(0) is None
    due.calls = 500
    assert (due.waits_s(0), due.reason()) == (0, "500 new calls")
    due.calls += 20  # while it was trained
    due.ended(100, 10, failed=False, calls=500)
    assert (due.calls, due.waits_s(100)) == (20, None)
    due.calls = 500
    assert (due.waits_s(100), due.waits_s(650), due.waits_s(701)) == (600, 50, 0)


def test_an_alarm_makes_it_due_sooner_but_leaves_the_rest() -> None:
    due = Due(pause_s=600, alarm="the median error has grown")
    assert (due.waits_s(0), due.reason()) == (0, "the median error has grown")
    due.ended(100, 10, failed=False, calls=0)
    assert (due.alarm, due.waits_s(100)) == ("", None)
    due.alarm = "again"
    assert due.waits_s(100) == 600


def test_long_trainings_rest_longer() -> None:
    due = Due(every_calls=1, pause_s=600, calls=2)
    due.ended(1000, 1000, failed=False, calls=1)
    assert due.waits_s(1000) == 9000


def test_failures_are_tried_again_less_and_less_often() -> None:
    due = Due(every_calls=1, pause_s=600, calls=1)
    waits = []
    for _ in range(8):
        due.ended(0, 1, failed=True, calls=1)
        waits.append(due.waits_s(0))
    assert waits == [600, 1200, 2400, 4800, 9600, 19200, 19200, 19200]
    due.ended(0, 1, failed=False, calls=1)
    assert due.failures == 0


# --- the process ----------------------------------------------------------------------------------


@pytest.fixture
def process(tmp_path: Path) -> TrainerProcess:
    """A trainer over a store of 500 calls of 40 tokens."""
    with Store(tmp_path / "calls.sqlite", clock=lambda: NOW) as store:
        for run in runs_of(40):
            for call in run.calls:
                store.add(call, None, "", NOW)
    return TrainerProcess(
        tmp_path / "calls.sqlite",
        tmp_path / "models",
        tmp_path / "logs" / "trainer.log",
        learner="predictor.fake_learner",
        environment=PATH,
    )


def failing(process: TrainerProcess, how: str) -> TrainerProcess:
    tells = str(process.log.parent.parent / "pids")
    return replace(process, environment={**PATH, "FAKE_LEARNER": how, "FAKE_LEARNER_TELLS": tells})


async def pids_told(process: TrainerProcess) -> list[int]:
    """Of a slow trainer and its child."""
    told = process.log.parent.parent / "pids"
    async with asyncio.timeout(20):
        while not (told.exists() and len(told.read_text().split()) == 2):
            await asyncio.sleep(0.01)
    return [int(pid) for pid in told.read_text().split()]


async def ended(pids: list[int]) -> bool:
    async with asyncio.timeout(10):
        while any(psutil.pid_exists(pid) and alive(pid) for pid in pids):
            await asyncio.sleep(0.01)
    return True


def alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


async def test_the_process_learns_and_installs(process: TrainerProcess, versions: Versions) -> None:
    training = await process.run()
    assert (training.outcome, training.version, training.calls) == (
        Outcome.INSTALLED,
        "v000001",
        500,
    )
    assert training.fallback == Judgement(60, 60, 1, 100)
    assert versions.current() is not None
    assert "a library that talks" in process.log.read_text()


async def test_it_gives_way_to_everything_else(process: TrainerProcess) -> None:
    slow = failing(process, "slow")
    task = asyncio.create_task(slow.run())
    [pid, child] = await pids_told(slow)
    try:
        assert psutil.Process(pid).nice() == 19
        assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"
        assert psutil.Process(pid).rlimit(psutil.RLIMIT_AS)[0] == slow.memory
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    assert await ended([pid, child]), "its whole group is gone"


async def test_a_training_that_takes_too_long_is_ended(process: TrainerProcess) -> None:
    slow = replace(failing(process, "slow"), limit_s=1.5)
    with pytest.raises(BackendError, match="more than 2 s"):
        await slow.run()
    assert await ended(await pids_told(slow))


async def test_a_training_that_fails_says_why(process: TrainerProcess, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"the trees would not grow .its log is .*trainer\.log"):
        await failing(process, "crash").run()
    with pytest.raises(BackendError, match="no calls are stored in"):
        await replace(process, store=tmp_path / "nowhere").run()
    assert not (tmp_path / "models").exists()


def test_it_dies_with_who_started_it(process: TrainerProcess) -> None:
    code = (
        "import asyncio, sys; from pathlib import Path\n"
        "from maestro_backend.predictor.training import TrainerProcess\n"
        "store, models, log, tells, path = sys.argv[1:]\n"
        "told = {'FAKE_LEARNER': 'slow', 'FAKE_LEARNER_TELLS': tells, 'PYTHONPATH': path}\n"
        "asyncio.run(TrainerProcess(Path(store), Path(models), Path(log),"
        " learner='predictor.fake_learner', environment=told).run())\n"
    )
    tells = process.log.parent.parent / "pids"
    files = (process.store, process.models, process.log, tells, PATH["PYTHONPATH"])
    gateway = subprocess.Popen(
        (sys.executable, "-c", code, *map(str, files)), env={**os.environ, **PATH}
    )
    with gateway:
        [pid, child] = asyncio.run(pids_told(process))
        gateway.kill()
    try:
        assert asyncio.run(ended([pid]))
    finally:
        psutil.Process(child).kill()  # only ours here: no library that learns starts any


# --- watching and training again ------------------------------------------------------------------


class Gateway:
    """What uses the versions: remembers which."""

    def __init__(self, refuses: str = "") -> None:
        self.used: list[str] = []
        self.changed = asyncio.Event()
        self._refuses = refuses

    async def use(self, version: Version | None) -> None:
        name = version.name if version else ""
        if name and name == self._refuses:
            raise ValueError("no such trees")
        self.used.append(name)
        self.changed.set()


@asynccontextmanager
async def running(retraining: Retraining) -> AsyncIterator[Retraining]:
    task = asyncio.create_task(retraining.run())
    try:
        yield retraining
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def soon(event: asyncio.Event) -> None:
    async with asyncio.timeout(20):
        await event.wait()


async def holds(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_enough_calls_bring_a_new_model(process: TrainerProcess, versions: Versions) -> None:
    gateway = Gateway()
    due = Due(every_calls=3, pause_s=0)
    async with running(Retraining(process, versions, gateway.use, due=due)) as retraining:
        for _ in range(3):
            retraining.call_ended("", 40, 100, 200, 100)
        await soon(gateway.changed)
        await holds(lambda: retraining.version == "v000001")
        assert retraining.last is not None
        assert retraining.last.outcome is Outcome.INSTALLED
        assert retraining.coverage is not None
    assert gateway.used == ["v000001"]


async def test_a_model_that_cannot_be_used_is_rolled_back(
    process: TrainerProcess, versions: Versions, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = Gateway(refuses="v000002")
    first = install(versions, 60)
    retraining = Retraining(
        process, versions, gateway.use, current=first, new_calls=9, due=Due(9, pause_s=0)
    )
    async with running(retraining):
        await soon(gateway.changed)
    assert gateway.used == ["v000001"]
    current = versions.current()
    assert current is not None
    assert current.name == retraining.version == "v000001"
    assert "v000002 cannot be used" in caplog.text


async def test_a_model_that_got_worse_than_the_tables_is_left(
    process: TrainerProcess, versions: Versions, caplog: pytest.LogCaptureFixture
) -> None:
    install(versions, 60)
    second = install(versions, 300)
    gateway = Gateway()
    retraining = Retraining(process, versions, gateway.use, current=second)
    async with running(retraining):
        for _ in range(300):
            retraining.call_ended("v000001", 40, 300, 500, 100)
        assert retraining.alarm is None, "calls that another version predicted do not count"
        for _ in range(200):
            retraining.call_ended("v000002", 40, 300, 500, 100)
        assert retraining.alarm is not None
        assert retraining.alarm.trouble is Trouble.WORSE
        await soon(gateway.changed)
        await holds(lambda: retraining.version == "v000001")
    assert gateway.used == ["v000001"]
    assert "off by 260 tokens a call" in caplog.text


async def test_a_failed_training_changes_nothing_and_is_told(
    process: TrainerProcess, versions: Versions, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = Gateway()
    due = Due(every_calls=1, pause_s=0)
    retraining = Retraining(failing(process, "crash"), versions, gateway.use, due=due)
    async with running(retraining):
        retraining.call_ended("", 40, 100, 200, 100)
        await holds(lambda: due.failures > 0)
    assert gateway.used == []
    assert retraining.last is not None
    assert retraining.last.outcome is Outcome.FAILED
    assert "the trees would not grow" in caplog.text


async def test_stopping_ends_a_training(process: TrainerProcess, versions: Versions) -> None:
    slow = failing(process, "slow")
    use: Callable[[Version | None], Awaitable[None]] = Gateway().use
    async with running(Retraining(slow, versions, use, new_calls=1, due=Due(1, pause_s=0))):
        pids = await pids_told(slow)
    assert await ended(pids)


async def test_a_gateway_that_has_just_started_does_not_train(
    process: TrainerProcess, versions: Versions
) -> None:
    due = Due(every_calls=1, pause_s=600)
    async with running(Retraining(process, versions, Gateway().use, new_calls=5, due=due)):
        await asyncio.sleep(0)
    assert not process.log.exists()
    assert due.not_before > 0


def test_the_result_is_one_line_of_json(process: TrainerProcess) -> None:
    options = ("--store", process.store, "--models", process.models, "--learner", process.learner)
    module = ("-m", "maestro_backend.predictor.training")
    done = subprocess.run(
        (sys.executable, *module, *map(str, options)),
        env={**os.environ, **PATH, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    [line] = done.stdout.splitlines()
    assert json.loads(line)["outcome"] == "installed"
    assert "a library that talks" in done.stderr
