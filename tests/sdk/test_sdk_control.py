import logging
import os
import socket
import subprocess
import sys
import textwrap
from contextlib import suppress
from threading import Thread

import pytest
from sdk.recording_backend import RecordingBackend

from maestro_agents import _control, _link
from maestro_agents._control import ControlClient
from maestro_agents.protocol import (
    MAX_EVENTS,
    RunEnded,
    RunStarted,
    Stage,
    StageEnded,
    StageStarted,
    Workflow,
)

WORKFLOW = Workflow(name="team", stages=(Stage(path="plan"),))


def test_the_workflow_goes_once_and_first(backend: RecordingBackend) -> None:
    client = ControlClient()
    client.register(WORKFLOW)
    client.post(WORKFLOW, "r/1", [RunStarted(at=1, workflow=WORKFLOW.id)])
    client.post(WORKFLOW, "r/1", [RunEnded(at=2)])
    client.post(WORKFLOW, "r2", [RunStarted()])
    assert client.flush(5)
    assert [workflow for workflow, _ in backend.workflows] == [WORKFLOW.id]
    assert Workflow.model_validate(backend.workflows[0][1]) == WORKFLOW
    assert backend.types("r/1") == ["run_started", "run_ended"]
    assert backend.types("r2") == ["run_started"]


def test_the_workflow_goes_again_when_the_backend_forgot_it(backend: RecordingBackend) -> None:
    client = ControlClient()
    client.post(WORKFLOW, "r", [RunStarted()])
    assert client.flush(5)
    backend.forgets_workflows = True
    client.post(WORKFLOW, "r", [RunEnded()])
    assert client.flush(5)
    assert len(backend.workflows) == 2


def test_events_go_in_batches_in_order(backend: RecordingBackend) -> None:
    client = ControlClient()
    events = [StageStarted(stage="plan", instance=n) for n in range(2 * MAX_EVENTS + 1)]
    client.post(WORKFLOW, "r", events)
    assert client.flush(5)
    assert all(len(body["events"]) <= MAX_EVENTS for _, body in backend.posts)
    assert [e["instance"] for e in backend.events["r"]] == list(range(len(events)))
    assert len(backend.posts) < 10


def test_the_key_goes_with_it(backend: RecordingBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAESTRO_API_KEY", "secret")
    client = ControlClient()
    client.post(WORKFLOW, "r", [RunStarted()])
    assert client.flush(5)
    assert backend.headers[0]["authorization"] == "Bearer secret"


@pytest.mark.parametrize("change", [{"MAESTRO_ENABLED": "false"}, {"MAESTRO_BASE_URL": ""}])
def test_nothing_goes_while_inactive(
    backend: RecordingBackend, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    client = ControlClient()
    client.register(WORKFLOW)
    client.post(WORKFLOW, "r", [RunStarted()])
    assert client.flush(5)
    assert backend.workflows == [] and backend.posts == []


def test_a_dead_backend_is_logged_once_and_has_no_effect(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MAESTRO_BASE_URL", "http://127.0.0.1:9/v1")
    client = ControlClient()
    with caplog.at_level(logging.WARNING, "maestro_agents"):
        for _ in range(3):
            client.post(WORKFLOW, "r", [RunStarted()])
            assert not client.flush(5)
    assert len(caplog.records) == 1


def test_a_wrong_setting_is_logged_not_raised(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MAESTRO_BASE_URL", "nonsense")
    with caplog.at_level(logging.WARNING, "maestro_agents"):
        ControlClient().post(WORKFLOW, "r", [RunStarted()])
    assert "MAESTRO_BASE_URL" in caplog.text


def test_a_refused_workflow_does_not_hold_back_events(
    backend: RecordingBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.status = 400
    client = ControlClient()
    client.register(WORKFLOW)
    assert client.flush(5)
    backend.status = 200
    client.post(WORKFLOW, "r", [RunStarted()])
    assert client.flush(5)
    assert backend.types("r") == ["run_started"]
    assert "refused" in caplog.text


def test_a_full_queue_drops_the_oldest(
    backend: RecordingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_control, "MAX_QUEUED", 2)
    client = ControlClient()
    client.post(WORKFLOW, "r", [StageStarted(stage="plan", instance=n) for n in range(5)])
    assert client.flush(5)
    assert [e["instance"] for e in backend.events["r"]] == [3, 4]
    assert client.dropped == 3


def run_python(code: str, base_url: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={
            "MAESTRO_BASE_URL": base_url,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PATH": os.environ["PATH"],
        },
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    ).stdout


PROGRAM = """
    from maestro_agents._control import control
    from maestro_agents.protocol import RunEnded, Stage, Workflow
    workflow = Workflow(name="team", stages=(Stage(path="plan"),))
"""


def test_the_last_events_arrive_at_exit(backend: RecordingBackend) -> None:
    run_python(f"{PROGRAM}\n    control.post(workflow, 'r', [RunEnded()])", backend.base_url)
    assert backend.types("r") == ["run_ended"]


def test_exit_waits_a_second_at_most_for_a_backend_that_hangs() -> None:
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen()
        # What is registered first runs last: it sees how long the flush took.
        code = f"""
    import atexit, time
    began = []
    atexit.register(lambda: print(time.monotonic() - began[0]))
    {PROGRAM}
    control.post(workflow, "r", [RunEnded()])
    began.append(time.monotonic())
    """
        waited = float(run_python(code, f"http://127.0.0.1:{hole.getsockname()[1]}/v1"))
    assert 0.5 < waited < 1.9


def test_a_forked_child_sends_its_own(backend: RecordingBackend) -> None:
    code = f"""{PROGRAM}
    import os
    control.post(workflow, "parent", [RunEnded()])
    assert control.flush(5)
    if (child := os.fork()) == 0:
        control.post(workflow, "child", [RunEnded()])
        os._exit(0 if control.flush(5) else 1)
    assert os.waitpid(child, 0)[1] == 0
    control.post(workflow, "parent", [RunEnded()])
    assert control.flush(5)
    """
    run_python(code, backend.base_url)
    assert backend.types("child") == ["run_ended"]
    assert backend.types("parent") == ["run_ended", "run_ended"]


def test_exit_does_not_wait_for_a_backend_that_is_away() -> None:
    code = f"""{PROGRAM}
    import time
    control.post(workflow, "r", [RunEnded()])
    began = time.monotonic()
    print(control.flush(60), time.monotonic() - began < 30)
    """
    assert run_python(code, "http://127.0.0.1:9/v1").split() == ["False", "True"]


# -- a backend that is away for a while ----------------------------------------------------------


def test_what_happens_in_an_outage_arrives_after_it_in_order(
    backend: RecordingBackend, caplog: pytest.LogCaptureFixture
) -> None:
    client = ControlClient()
    client.post(WORKFLOW, "r", [RunStarted()])
    assert client.flush(5)
    backend.__exit__()
    client.post(WORKFLOW, "r", [StageStarted(stage="plan")])
    client.post(WORKFLOW, "r", [StageEnded(stage="plan")])
    assert not client.flush(5)
    client.post(WORKFLOW, "r", [RunEnded()])
    assert not client.flush(5)
    with RecordingBackend(port=backend.port) as again:
        assert client.flush(5)
        assert [workflow for workflow, _ in again.workflows] == [WORKFLOW.id]
        assert again.types("r") == ["stage_started", "stage_ended", "run_ended"]
    assert client.dropped == 0
    assert caplog.text.count("takes no events") == 1


def test_it_is_tried_again_without_being_asked(backend: RecordingBackend) -> None:
    backend.__exit__()
    client = ControlClient()
    client.post(WORKFLOW, "r", [RunStarted()])
    assert not client.flush(5)
    with RecordingBackend(port=backend.port) as again:
        assert again.told.wait(30)
        assert again.types("r") == ["run_started"]


def test_a_flush_tries_at_once(backend: RecordingBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_control, "BACK_OFF_S", (1000.0, 1000.0))
    backend.fault = "drop"
    client = ControlClient()
    client.post(WORKFLOW, "r", [RunStarted()])
    assert not client.flush(5)
    backend.fault = None
    assert client.flush(30)


def test_each_outage_is_one_line(
    backend: RecordingBackend, caplog: pytest.LogCaptureFixture
) -> None:
    client = ControlClient()
    for outage in (1, 2):
        backend.fault = "drop"
        for _ in range(3):
            client.post(WORKFLOW, "r", [RunStarted()])
            assert not client.flush(5)
        assert caplog.text.count("takes no events") == outage
        backend.fault = None
        assert client.flush(5)


def test_an_outage_keeps_the_latest_events(
    backend: RecordingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_control, "MAX_QUEUED", 2)
    backend.fault = "drop"
    client = ControlClient()
    for n in range(5):
        client.post(WORKFLOW, "r", [StageStarted(stage="plan", instance=n)])
        assert not client.flush(5)
    backend.fault = None
    assert client.flush(5)
    assert [e["instance"] for e in backend.events["r"]] == [3, 4]
    assert client.dropped == 3


def test_an_outage_ends_for_events_that_grew_old(
    backend: RecordingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.fault = "drop"
    client = ControlClient()
    client.post(WORKFLOW, "r", [RunStarted()])
    assert not client.flush(5)
    monkeypatch.setattr(_control, "MAX_AGE_S", 0.0)
    assert client.flush(5)
    assert client.dropped == 1


def test_a_reply_that_never_comes_is_not_waited_for_twice(
    backend: RecordingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_link, "TIMEOUT_S", 0.1)
    client = ControlClient()
    client.register(WORKFLOW)
    assert client.flush(5)
    backend.fault = "hang"
    client.post(WORKFLOW, "r", [RunStarted()])
    assert client.flush(5), "it may have been taken: nothing is left to send"
    assert client.dropped == 1
    backend.fault = None
    client.post(WORKFLOW, "r", [RunEnded()])
    assert client.flush(5)
    assert backend.types("r") == ["run_ended"]


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_backend_that_refuses_events_is_one_line(
    backend: RecordingBackend, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    backend.status = status
    client = ControlClient()
    for _ in range(3):
        client.post(WORKFLOW, "r", [RunStarted()])
        assert client.flush(5)
    assert [r.getMessage().split("(")[1] for r in caplog.records if r.levelname == "WARNING"] == [
        f"HTTP {status}); calls go on"
    ]
    assert client.dropped == 3


def test_a_backend_behind_a_proxy_may_be_away_too(backend: RecordingBackend) -> None:
    backend.status = 503
    client = ControlClient()
    client.post(WORKFLOW, "r", [RunStarted()])
    assert not client.flush(5)
    backend.status = 200
    assert client.flush(5)
    assert backend.types("r") == ["run_started"]


def test_an_idle_connection_that_was_closed_is_no_outage(
    backend: RecordingBackend, caplog: pytest.LogCaptureFixture
) -> None:
    client = ControlClient()
    client.post(WORKFLOW, "r", [RunStarted()])
    assert client.flush(5)
    backend.hang_up()
    client.post(WORKFLOW, "r", [RunEnded()])
    assert client.flush(5)
    assert backend.types("r") == ["run_started", "run_ended"]
    assert len(backend.workflows) == 2, "whoever answers now may be another one"
    assert not caplog.records


def test_the_events_of_a_short_run_go_in_one_post(
    backend: RecordingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_control, "LINGER_S", 1.0)
    client = ControlClient()
    for event in (RunStarted(), StageStarted(stage="plan"), StageEnded(stage="plan"), RunEnded()):
        client.post(WORKFLOW, "r", [event])
    assert client.flush(10)
    assert len(backend.posts) == 1 and len(backend.events["r"]) == 4


# -- what a reply may look like ------------------------------------------------------------------


def answer(server: socket.socket, reply: bytes, requests: list[bytes]) -> None:
    """Answer every request on `server` with `reply`, in two pieces; then close the connection."""
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection, connection.makefile("rb") as lines:
            head = list(iter(lines.readline, b"\r\n"))
            lines.read(int(next(h for h in head if h.lower().startswith(b"content-length:"))[15:]))
            requests.append(head[0])
            with suppress(OSError):  # whoever has read enough hangs up
                connection.sendall(reply[:20])
                connection.sendall(reply[20:])


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.0 204 No Content\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + 200_000 * b" ",
    ],
    ids=["close", "chunked", "old", "large"],
)
def test_any_http_reply_will_do(
    reply: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = Thread(target=answer, args=(server, reply, requests))
        thread.start()
        monkeypatch.setenv("MAESTRO_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}/v1")
        client = ControlClient()
        for _ in range(3):
            client.post(WORKFLOW, "r", [RunStarted()])
            assert client.flush(5)
        server.shutdown(socket.SHUT_RDWR)
    thread.join()
    assert [line.split()[0] for line in requests] == [b"PUT", b"POST", b"POST", b"POST"]
    assert client.dropped == 0 and not caplog.records
