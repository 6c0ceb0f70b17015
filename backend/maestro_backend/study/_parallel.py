"""The same work on many items, in a few forked processes."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Generator, Sequence
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any, TypeVar

from maestro_agents.protocol import MaestroError
from maestro_backend._tied import tie_to_parent

T = TypeVar("T")
R = TypeVar("R")

_Work = Callable[[Any], Any]


class CellError(MaestroError):
    """A simulation failed; the message names the cell."""


def in_processes(work: Callable[[T], R], items: Sequence[T], jobs: int) -> Generator[R, None, None]:
    """`work(item)` of all items in their order, in at most `jobs` processes.

    Items and what their work needs are inherited, not sent; results are.

    Raises:
        CellError: an item's work failed, or its process died.
    """
    done: dict[int, R] = {}
    waiting = iter(range(len(items)))
    gc.collect()
    gc.freeze()  # or a child's first collection would copy everything that it inherits
    children = [_Child(work, items) for _ in range(min(jobs, len(items)))]
    try:
        for child in children:
            child.take(next(waiting))
        for at in range(len(items)):
            while at not in done:
                for child in _ready(children):
                    done[child.at] = child.result()
                    child.take(next(waiting, None))
            yield done.pop(at)
    finally:
        gc.unfreeze()
        for child in children:
            child.end()


def _ready(children: Sequence[_Child]) -> list[_Child]:
    """Those that have something to say; waits until one has."""
    busy = [child for child in children if child.at >= 0]
    ready = connection.wait([child.pipe for child in busy])
    return [child for child in busy if child.pipe in ready]


class _Child:
    """One process. `at` is the item that it works on, -1 if none."""

    def __init__(self, work: _Work, items: Sequence[Any]) -> None:
        fork = get_context("fork")
        self.pipe, theirs = fork.Pipe()
        self.at = -1
        self._items = items
        self._process: ForkProcess = fork.Process(
            target=_serve, args=(work, items, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    def take(self, at: int | None) -> None:
        self.at = -1 if at is None else at
        if at is not None:
            self.pipe.send(at)

    def result(self) -> Any:
        try:
            found, problem = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode or 0
            ended = f"was killed (signal {-code})" if code < 0 else f"ended with status {code}"
            found, problem = None, f"its process {ended}"
        if problem is not None:
            raise CellError(f"the simulation of {self._items[self.at]} failed: {problem}")
        return found

    def end(self) -> None:
        self._process.terminate()
        self._process.join()
        self.pipe.close()


def _serve(work: _Work, items: Sequence[Any], pipe: Connection) -> None:
    """Items by number, until nobody asks any more."""
    tie_to_parent()
    try:
        while True:
            pipe.send(_answer(work, items[pipe.recv()]))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        return


def _answer(work: _Work, item: Any) -> tuple[Any, str | None]:
    """The result, or what went wrong in one line."""
    try:
        return work(item), None
    except MaestroError as error:
        return None, str(error)
    except Exception as error:
        sys.stderr.write(traceback.format_exc())
        return None, f"{type(error).__name__}: {error}"
