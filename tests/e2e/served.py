"""`maestro serve` as its own process, as a user runs it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from maestro_backend.workers import WorkerRecord, read_records

MAESTRO = (sys.executable, "-m", "maestro_backend._tied", sys.executable, "-m", "maestro_backend")


@dataclass
class Command:
    """A running `maestro`; `lines` is what it has said on stderr so far."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    said: threading.Condition = field(default_factory=threading.Condition)

    def read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self.said:
                self.lines.append(line.rstrip("\n"))
                self.said.notify_all()

    def wait_for(self, text: str, timeout_s: float = 30.0) -> str:
        """The first line that contains `text`."""
        with self.said:
            found = self.said.wait_for(lambda: any(text in x for x in self.lines), timeout_s)
            assert found, f"never said {text!r}; said {self.lines}"
            return next(line for line in self.lines if text in line)

    @property
    def url(self) -> str:
        return self.wait_for("listening on ").split("listening on ")[1].split()[0]

    def family(self) -> list[psutil.Process]:
        """Every process below it."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, signum: int = signal.SIGTERM) -> int:
        self.process.send_signal(signum)
        return self.process.wait(30)


@contextmanager
def maestro(*arguments: str, state: Path, stdout: int = subprocess.DEVNULL) -> Iterator[Command]:
    """Run `maestro ARGUMENTS`; whatever happens, it and its children are gone afterwards.

    Workers that have outlived a server of the same `state` are ended only by `end_workers`.
    """
    environment = {**os.environ, "XDG_STATE_HOME": str(state)}
    process = subprocess.Popen(
        (*MAESTRO, *arguments),
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    command = Command(process)
    reader = threading.Thread(target=command.read)
    reader.start()
    try:
        yield command
    finally:
        strays = command.family() if process.poll() is None else []
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for stray in strays:
            if stray.is_running():
                stray.kill()
        reader.join()
        assert process.stderr is not None
        process.stderr.close()
        if process.stdout is not None:
            process.stdout.close()


def records(state: Path) -> list[WorkerRecord]:
    """The recorded workers of servers whose state is under `state`."""
    folders = state.rglob("workers")
    return [record for folder in folders for record in read_records(folder).values()]


@contextmanager
def end_workers(state: Path) -> Iterator[None]:
    """Workers that have outlived their server are gone afterwards."""
    try:
        yield
    finally:
        processes = [psutil.Process(record.pid) for record in records(state) if record.lives()]
        for process in processes:
            process.kill()
        psutil.wait_procs(processes)
        for note in state.rglob("runtime_folder"):
            shutil.rmtree(note.read_text(), ignore_errors=True)


def chat(url: str, model: str, timeout_s: float = 60.0, **fields: object) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], **fields}
    return httpx.post(f"{url}/chat/completions", json=body, timeout=timeout_s)


def all_gone(processes: list[psutil.Process], timeout_s: float = 15.0) -> bool:
    _, alive = psutil.wait_procs(processes, timeout_s)
    return not alive
