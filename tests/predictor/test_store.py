"""The store: what goes in comes out, whatever happens to the process, the disk or the file."""

from __future__ import annotations

import logging
import os
import resource
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import fields, replace
from math import isnan
from pathlib import Path

import pytest
from predictor.examples import example, full_example, run_of

from maestro_agents.protocol import ConfigError
from maestro_backend.predictor import CallOutcome, CallShape, RunExamples
from maestro_backend.predictor.store import (
    COLUMNS,
    MIGRATIONS,
    Predicted,
    Store,
    StoreView,
    migrate,
)

PATH = {**os.environ, "PYTHONPATH": ":".join((str(Path(__file__).parents[1]), *sys.path))}
NOW = 1_800_000_000.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "calls.sqlite"


def put(store: Store, run: RunExamples, at: float = NOW) -> None:
    for call in run.calls:
        store.add(call, None, "", at)


def shapes(runs: list[RunExamples]) -> list[tuple[str, int]]:
    return [(run.run, len(run.calls)) for run in runs]


# --- what goes in comes out -----------------------------------------------------------------------


def test_every_field_of_a_call_comes_back(file: Path) -> None:
    first, second = example("r1", 0, task="task-7"), full_example("r1", 1)
    predicted = Predicted(70.5, 64.0, 200.0, 300.0, 500.0, 1234.0)
    with Store(file, clock=lambda: NOW) as store:
        store.add(first, None, "", NOW)
        store.add(second, predicted, "v000003", NOW + 1)
        [run] = store.runs()
        with StoreView(file) as view:
            plain, told = view.calls("r1")
    assert (run.source, run.run, run.calls[1]) == ("live", "r1", second)
    assert isnan(run.calls[0].started_s)
    assert isnan(run.calls[0].shape.gap_s)
    assert run.calls[0].outcome == first.outcome
    assert (run.calls[0].shape.max_tokens, run.calls[0].outcome.first_s) == (None, None)
    assert (told.predicted, told.version, told.at) == (predicted, "v000003", NOW + 1)
    assert (plain.predicted, plain.version) == (Predicted(), "")


def test_the_table_has_a_column_for_every_field(file: Path) -> None:
    Store(file).close()
    with closing(sqlite3.connect(file)) as connection:
        found = [row[1] for row in connection.execute("PRAGMA table_info(calls)")]
    assert found == ["run_id", *COLUMNS]
    names = len(fields(CallShape)) + len(fields(CallOutcome)) + len(fields(Predicted))
    assert len(COLUMNS) == names + 5


def test_runs_come_in_order_of_arrival_and_the_newest_on_demand(file: Path) -> None:
    with Store(file, clock=lambda: NOW) as store:
        put(store, run_of("a", 3), NOW - 30)
        put(store, run_of("b", 2), NOW - 20)
        put(store, run_of("c", 2), NOW - 10)
        assert shapes(store.runs()) == [("a", 3), ("b", 2), ("c", 2)]
        assert shapes(store.runs(since=NOW - 20)) == [("b", 2), ("c", 2)]
        assert shapes(store.runs(limit=5)) == [("b", 2), ("c", 2)]
        assert shapes(store.runs(limit=2)) == [("c", 2)]
        put(store, run_of("large", 9), NOW)
        assert shapes(store.runs(limit=5)) == [("b", 2), ("c", 2)]
        with StoreView(file) as view:
            assert (view.count(), view.count(since=NOW - 20)) == (16, 13)
            assert [call.example.run for call in view.newest(10)] == ["c", *["large"] * 9]


def test_calls_that_interleave_and_end_out_of_order_find_their_runs(file: Path) -> None:
    a, b = run_of("a", 3), run_of("b", 2)
    with Store(file, clock=lambda: NOW) as store:
        for call in (a.calls[1], b.calls[0], a.calls[0], b.calls[1], a.calls[2]):
            store.add(call, None, "", NOW)
        found = store.runs()
    assert shapes(found) == [("a", 3), ("b", 2)]
    assert [call.parents for call in found[0].calls] == [(), (0,), (1,)]


def test_where_a_call_is_missing_the_others_close_up(file: Path) -> None:
    with Store(file, clock=lambda: NOW) as store:
        store.add(example("r", 1), None, "", NOW)
        store.add(example("r", 3, parents=(0, 1)), None, "", NOW)
        store.add(example("r", 4, parents=(3,)), None, "", NOW)
        [run] = store.runs()
    assert [call.index for call in run.calls] == [0, 1, 2]
    assert [call.parents for call in run.calls] == [(), (0,), (1,)]


def test_a_run_that_is_counted_anew_is_another_run(file: Path) -> None:
    with Store(file, clock=lambda: NOW) as store:
        put(store, run_of("r", 2))
        put(store, run_of("r", 3))
    with Store(file, clock=lambda: NOW) as store:
        put(store, run_of("r", 1))
        assert shapes(store.runs()) == [("r", 2), ("r", 3), ("r", 1)]


def test_calls_without_a_run_are_runs_of_their_own(file: Path) -> None:
    with Store(file, clock=lambda: NOW) as store:
        store.add(example("", 0), None, "", NOW)
        store.add(example("", 1), None, "", NOW)
        assert shapes(store.runs()) == [("", 1), ("", 1)]


def test_whatever_a_client_sent_can_be_stored(file: Path) -> None:
    shape = CallShape("m", role="\ud800 and \0", stage="s" * 9999, max_tokens=10**30)
    strange = replace(
        example("r\udfff"), shape=shape, outcome=CallOutcome(1, 2, total_s=float("nan"))
    )
    with Store(file, clock=lambda: NOW) as store:
        store.add(strange, Predicted(point=float("nan"), p90=float("inf")), "", NOW)
        put(store, run_of("next", 1))
        found, _ = store.runs()
        assert store.failure == ""
    [call] = found.calls
    assert call.shape.role == "? and \0"
    assert (len(call.shape.stage), call.outcome.total_s) == (500, 0.0)


def test_learned_state_is_kept_by_name(file: Path) -> None:
    with Store(file) as store:
        assert store.state("tables") is None
        store.put_state("tables", {"stage": [1, 2.5]})
        store.put_state("tables", {"stage": [3]})
        store.put_state("offsets", [0.1])
        assert store.state("tables") == {"stage": [3]}
    with Store(file) as again, StoreView(file) as view:
        assert again.state("offsets") == view.state("offsets") == [0.1]


# --- what is private, and who may write -----------------------------------------------------------


def test_nobody_else_can_read_it(file: Path) -> None:
    with Store(file) as store:
        put(store, run_of("a", 1))
        store.flush()
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in file.parent.iterdir()}
    assert set(modes) >= {"calls.sqlite", "calls.sqlite-wal"}
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_second_writer_is_refused_and_the_next_is_welcome(file: Path) -> None:
    with (
        Store(file),
        pytest.raises(ConfigError, match=r"another server stores calls in .*set another state_dir"),
    ):
        Store(file)
    Store(file).close()


def test_readers_in_other_processes_read_while_it_is_written(file: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from maestro_backend.predictor.store import StoreView\n"
        "view = StoreView(Path(sys.argv[1]))\n"
        "for line in sys.stdin: print(view.count(), flush=True)\n"
    )
    with Store(file, clock=lambda: NOW) as store:
        reader = subprocess.Popen(
            (sys.executable, "-c", code, str(file)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=PATH,
        )
        with reader:
            assert reader.stdin is not None
            assert reader.stdout is not None
            for number in (1, 2):
                put(store, run_of(f"r{number}", 300))
                assert store.flush()
                print("?", file=reader.stdin, flush=True)
                assert reader.stdout.readline() == f"{300 * number}\n"
    with StoreView(file) as view:
        assert view.count() == 600, "also after a clean end, without a log beside the file"


def test_nothing_stored_yet_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no calls are stored in .*nowhere.*maestro serve"):
        StoreView(tmp_path / "nowhere")


# --- bounds ---------------------------------------------------------------------------------------


def test_old_runs_are_deleted_whole(file: Path) -> None:
    with Store(file, max_age_s=100, clock=lambda: NOW) as store:
        put(store, run_of("old", 3), NOW - 101)
        old = run_of("lives on", 2)
        store.add(old.calls[0], None, "", NOW - 101)
        store.add(old.calls[1], None, "", NOW - 1)
    with Store(file, max_age_s=100, clock=lambda: NOW) as store:
        put(store, run_of("new", 1))
        assert shapes(store.runs()) == [("lives on", 2), ("new", 1)]


def test_the_file_stays_within_its_size_and_the_oldest_runs_go_first(file: Path) -> None:
    bound = 1024**2
    with Store(file, max_bytes=bound, clock=lambda: NOW) as store:
        for number in range(1500):
            put(store, run_of(f"r{number}", 8), NOW + number)
            if number % 100 == 99:
                assert store.flush()
        found = store.runs()
        assert (store.dropped, store.failure) == (0, "")
    assert bound / 2 < file.stat().st_size <= bound
    assert 1000 < sum(len(run.calls) for run in found) < 12_000
    kept = [int(run.run[1:]) for run in found]
    assert kept == list(range(1500 - len(kept), 1500))
    assert {len(run.calls) for run in found} == {8}, "whole runs"


def test_a_run_that_was_deleted_while_it_ran_goes_on_as_another(file: Path) -> None:
    now = [NOW]
    run = run_of("slow", 2)
    with Store(file, max_age_s=100, clock=lambda: now[0]) as store:
        store.add(run.calls[0], None, "", NOW)
        assert store.flush()
        now[0] += 10_000  # the next look is due, and the run too old
        put(store, run_of("next", 1), now[0])
        assert store.flush()
        store.add(run.calls[1], None, "", now[0])
        found = store.runs()
    assert shapes(found) == [("next", 1), ("slow", 1)]
    assert found[1].calls[0].parents == ()


def test_more_than_it_can_take_is_dropped_and_told_once(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Store(file, clock=lambda: NOW) as store, closing(sqlite3.connect(file)) as other:
        other.execute("BEGIN IMMEDIATE")  # somebody holds the file
        store.add(example("first"), None, "", NOW)
        began = time.monotonic()
        for number in range(25_000):
            store.add(example(f"r{number}"), None, "", NOW)
        assert time.monotonic() - began < 2, "adding never waits"
        assert not store.flush(timeout_s=0.1)
        other.rollback()
        assert store.flush()
        assert store.dropped > 0
        assert store.written + store.dropped == 25_001
        with StoreView(file) as view:
            assert view.count() == store.written
    assert len([r for r in caplog.records if "faster" in r.message]) == 1


# --- what can go wrong ----------------------------------------------------------------------------

WRITE_UNTIL_KILLED = """
import sys
from pathlib import Path
from predictor.examples import run_of
from maestro_backend.predictor.store import Store

store = Store(Path(sys.argv[1]))
number = 0
while True:
    for call in run_of(f"r{number}", 5).calls:
        store.add(call, None, "", 1_800_000_000.0 + number)
    number += 1
    if number % 40 == 0:
        assert store.flush()
        print(store.written, flush=True)
"""


def test_what_was_flushed_survives_kill_9(file: Path) -> None:
    for _ in range(3):
        writer = subprocess.Popen(
            (sys.executable, "-c", WRITE_UNTIL_KILLED, str(file)),
            stdout=subprocess.PIPE,
            text=True,
            env=PATH,
        )
        with writer:
            assert writer.stdout is not None
            before = 0
            if file.exists():
                with StoreView(file) as view:
                    before = view.count()
            for _ in range(4):
                flushed = int(writer.stdout.readline())
            writer.kill()
        with Store(file, max_age_s=1e12) as store:
            runs = store.runs()
            with closing(sqlite3.connect(file)) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert sum(len(run.calls) for run in runs) >= before + flushed
        assert all(len(run.calls) == 5 for run in runs[:-3])
    assert [path.name for path in file.parent.iterdir() if "corrupt" in path.name] == []


FILL_THE_DISK = f"""
import resource, sys
from pathlib import Path
from predictor.examples import run_of
from maestro_backend.predictor.store import Store

store = Store(Path(sys.argv[1]))
for call in run_of("a", 5).calls:
    store.add(call, None, "", {NOW})
assert store.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
for number in range(2000):
    store.add(run_of(f"r{{number}}", 1).calls[0], None, "", {NOW})
assert not store.flush()
store.add(run_of("late", 1).calls[0], None, "", {NOW})
store.put_state("late", 1)
assert not store.flush()
assert store.failure and store.dropped >= 2001 - (store.written - 5), (store.dropped, store.written)
store.close()
print(store.written)
"""


def test_a_full_disk_ends_storing_not_serving(file: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run(
        (sys.executable, "-c", FILL_THE_DISK, str(file)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=PATH,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ends here") == 1, done.stderr
    with Store(file) as store:
        assert sum(len(run.calls) for run in store.runs()) == int(done.stdout)


def test_a_damaged_file_is_moved_aside_and_a_fresh_one_begun(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Store(file, clock=lambda: NOW) as store:
        put(store, run_of("a", 2000))
    data = bytearray(file.read_bytes())
    data[4096 * 2 :] = b"\xa5" * (len(data) - 4096 * 2)
    file.write_bytes(data)
    (file.parent / "calls.sqlite-wal").write_bytes(b"left by a crash")
    with Store(file, clock=lambda: NOW) as store:
        put(store, run_of("b", 2))
        assert shapes(store.runs()) == [("b", 2)]
    [aside] = file.parent.glob("calls.sqlite.corrupt-*Z")
    assert aside.read_bytes() == bytes(data), "nothing is lost"
    assert [r.levelno for r in caplog.records if aside.name in r.message] == [logging.ERROR]


def test_a_file_that_is_cut_off_is_damaged(file: Path) -> None:
    with Store(file, clock=lambda: NOW) as store:
        put(store, run_of("a", 500))
    file.write_bytes(file.read_bytes()[:50])
    with Store(file, clock=lambda: NOW) as store:
        assert store.runs() == []
    assert len(list(file.parent.glob("calls.sqlite.corrupt-*Z"))) == 1


def test_damage_that_shows_later_costs_no_call(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Store(file, clock=lambda: NOW) as store:
        for number in range(400):
            put(store, run_of(f"r{number}", 5))
    data = bytearray(file.read_bytes())
    for page in range(3, len(data) // 4096):  # all but the schema and the inner pages
        data[4096 * page : 4096 * page + 100] = b"\xa5" * 100
    file.write_bytes(data)
    with Store(file, clock=lambda: NOW) as store:
        put(store, run_of("new", 3))
        assert shapes(store.runs())[-1] == ("new", 3)
        assert (store.dropped, store.failure) == (0, "")
    assert len(list(file.parent.glob("calls.sqlite.corrupt-*Z"))) == 1
    assert sum("damaged" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize("opened", [Store, StoreView])
def test_a_file_that_is_not_ours_is_left_alone(file: Path, opened: type) -> None:
    file.parent.mkdir()
    file.write_text("dear diary, ...")
    with pytest.raises(ConfigError, match=r"calls\.sqlite is no database: move it away"):
        opened(file)
    assert file.read_text() == "dear diary, ..."
    file.unlink()
    with closing(sqlite3.connect(file)) as other:
        other.execute("CREATE TABLE recipes (name TEXT)")
    with pytest.raises(ConfigError, match="database of another program: move it away"):
        opened(file)


@pytest.mark.parametrize("opened", [Store, StoreView])
def test_a_newer_file_is_refused_with_the_fix(file: Path, opened: type) -> None:
    Store(file).close()
    with closing(sqlite3.connect(file)) as other:
        other.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match=r"newer Maestro \(version 99.*update maestro-mas"):
        opened(file)


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match=r"cannot store calls in .*predictor\.store off"):
        Store(tmp_path / "taken" / "calls.sqlite")
    (tmp_path / "calls.sqlite").mkdir()
    with pytest.raises(ConfigError, match=r"cannot store calls in .*predictor\.store off"):
        Store(tmp_path / "calls.sqlite")


def test_a_migration_happens_wholly_or_not_at_all(file: Path) -> None:
    with Store(file, clock=lambda: NOW) as store:
        put(store, run_of("a", 2))
    more = ("ALTER TABLE calls ADD COLUMN mood TEXT",)
    broken = ("CREATE TABLE half (way)", "this is no SQL")
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        with pytest.raises(sqlite3.OperationalError):
            migrate(connection, (*MIGRATIONS, more, broken))
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        migrate(connection, (*MIGRATIONS, more))
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS) + 1,)
        assert connection.execute("SELECT count(mood), count(*) FROM calls").fetchone() == (0, 2)
        migrate(connection, (*MIGRATIONS, more))
