import logging
import os
import socket
import subprocess
import sys
import textwrap

import pytest
from sdk.recording_backend import RecordingBackend

from maestro_agents import _control
from maestro_agents._control import ControlClient
from maestro_agents.protocol import MAX_EVENTS, RunEnded, RunStarted, Stage, StageStarted, Workflow

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
            assert client.flush(5)
    assert len(caplog.records) == 1
    assert client.dropped == 3


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
