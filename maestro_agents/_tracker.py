"""What an adapter saw goes in; run events to send and the context of each call come out."""

from __future__ import annotations

import os
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import RLock
from typing import Final
from weakref import WeakSet

from ._context import CallContext
from .protocol import (
    END,
    MAX_CONTENT,
    Annotation,
    Announcement,
    Barrier,
    CallIdentity,
    RunEnded,
    RunEvent,
    RunPaused,
    RunResumed,
    RunStarted,
    Slo,
    StageEnded,
    StageStarted,
    Successor,
    ToolEnded,
    ToolsRequested,
    ToolStarted,
    Workflow,
)

MAX_RUNS: Final = 4096
"""Most runs remembered at once; beyond it the oldest is forgotten."""

MAX_ANNOTATIONS: Final = 256
"""Most annotations of one workflow that are kept ready."""

Events = tuple[RunEvent, ...]

_trackers: WeakSet[Tracker] = WeakSet()


@dataclass(slots=True)
class _Execution:
    """One instance of a stage, from its start to its end."""

    stage: str
    instance: int
    role: str | None
    routed: tuple[Successor, ...] | None = None


@dataclass(slots=True)
class _Run:
    conversation: str | None
    executions: dict[str, _Execution] = field(default_factory=dict)
    tools: dict[str, tuple[str, str, float]] = field(default_factory=dict)
    started: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)


class Tracker:
    """The state of every run of one workflow. No I/O; safe to use from several threads.

    Runs, executions (one instance of a stage) and tools are known by keys that the adapter
    chooses. What is not known, such as a run that ended, gives no events and no context.
    """

    def __init__(
        self,
        workflow: Workflow,
        *,
        slo: Slo | None = None,
        tenant: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.workflow = workflow
        self._slo = slo
        self._tenant = tenant
        self._clock = clock
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._announced: dict[str, Announcement] = {}
        self._annotations: dict[tuple[object, ...], Annotation] = {}
        self._lock = RLock()
        _trackers.add(self)

    def run_started(self, run: str, conversation: str | None = None) -> Events:
        """A run begins; its first stage has not started yet."""
        with self._lock:
            self._runs[run] = _Run(conversation)
            while len(self._runs) > MAX_RUNS:
                self._runs.popitem(last=False)
        return (
            RunStarted(
                at=self._clock(),
                workflow=self.workflow.id,
                conversation=conversation,
                slo=self._slo,
                tenant=self._tenant,
            ),
        )

    def run_paused(self, run: str) -> Events:
        """A human was asked; what is in progress will start anew when the run resumes."""
        with self._lock:
            if (state := self._runs.get(run)) is None:
                return ()
            state.executions.clear()
            state.tools.clear()
        return (RunPaused(at=self._clock()),)

    def run_resumed(self, run: str) -> Events:
        """The human answered."""
        return (RunResumed(at=self._clock()),) if self._knows(run) else ()

    def run_ended(self, run: str, *, failed: bool = False) -> Events:
        """The run is over: its state is dropped."""
        with self._lock:
            known = self._runs.pop(run, None)
        return (RunEnded(at=self._clock(), failed=failed),) if known else ()

    def stage_started(
        self,
        run: str,
        execution: str,
        stage: str,
        *,
        step: int | None = None,
        attempt: int = 0,
        role: str | None = None,
    ) -> Events:
        """A stage begins. `role` is used only where the workflow does not know the stage."""
        with self._lock:
            if (state := self._runs.get(run)) is None:
                return ()
            instance = state.started[stage]
            state.started[stage] += 1
            state.executions[execution] = _Execution(stage, instance, self._role(stage, role))
        return (
            StageStarted(
                at=self._clock(), stage=stage, instance=instance, step=step, attempt=attempt
            ),
        )

    def routed(self, run: str, execution: str, chosen: Iterable[Successor]) -> None:
        """Routing is known: the stage's announcement narrows to what follows by it."""
        with self._lock:
            if found := self._execution(run, execution):
                found.routed = tuple(chosen)

    def stage_ended(self, run: str, execution: str, *, failed: bool = False) -> Events:
        """A stage ends."""
        with self._lock:
            state = self._runs.get(run)
            ended = state.executions.pop(execution, None) if state else None
        if ended is None:
            return ()
        return (
            StageEnded(
                at=self._clock(),
                stage=ended.stage,
                instance=ended.instance,
                failed=failed,
                next=ended.routed,
            ),
        )

    def tools_requested(self, call: CallIdentity, tools: tuple[str, ...]) -> Events:
        """The completion of `call` asked for tools."""
        if call.stage is None:
            return ()
        at = self._clock()
        return (ToolsRequested(at=at, stage=call.stage, instance=call.instance, tools=tools[:128]),)

    def tool_started(
        self, run: str, execution: str, key: str, tool: str, content: str | None = None
    ) -> Events:
        """A tool begins inside a stage; `key` tells apart tools that run side by side.

        `content` is its input, given only where content may be sent.
        """
        with self._lock:
            if (found := self._execution(run, execution)) is None:
                return ()
            now = self._clock()
            self._runs[run].tools[key] = (found.stage, tool, now)
        return (ToolStarted(at=now, stage=found.stage, tool=tool, input=_cut(content)),)

    def tool_ended(self, run: str, key: str, content: str | None = None) -> Events:
        """A tool ends, well or not. `content` is its output, as for `tool_started`."""
        with self._lock:
            state = self._runs.get(run)
            found = state.tools.pop(key, None) if state else None
        if found is None:
            return ()
        stage, tool, began = found
        now = self._clock()
        took_s = max(0.0, now - began)
        return (ToolEnded(at=now, stage=stage, tool=tool, duration_s=took_s, output=_cut(content)),)

    def call_started(
        self, run: str, execution: str, *, barrier: Barrier | None = None
    ) -> CallContext | None:
        """The next call of a stage: its identity and its annotation.

        Where the run is known and the execution is not (routing of a graph's start, say) it is a
        call of the run.
        """
        with self._lock:
            if (state := self._runs.get(run)) is None:
                return None
            if (found := state.executions.get(execution)) is None:
                return self._call_of_run(run, state)
            instance = state.calls[found.stage]
            state.calls[found.stage] += 1
            annotation = self._annotation(found, barrier)
        return CallContext(
            CallIdentity(
                run=run,
                workflow=self.workflow.id,
                stage=found.stage,
                instance=instance,
                conversation=state.conversation,
            ),
            annotation,
        )

    def _call_of_run(self, run: str, state: _Run) -> CallContext:
        identity = CallIdentity(run=run, workflow=self.workflow.id, conversation=state.conversation)
        return CallContext(identity, Annotation(slo=self._slo, tenant=self._tenant))

    def _annotation(self, execution: _Execution, barrier: Barrier | None) -> Annotation:
        """Until routing is known, calls of a stage say the same, in the same kind of superstep."""
        at = (barrier.step, barrier.width) if barrier else None
        key = (execution.stage, execution.role, at)
        if execution.routed is None and key in self._annotations:
            return self._annotations[key]
        announcement = self._announcement(execution).model_copy(update={"barrier": barrier})
        annotation = Annotation(
            role=execution.role, announcement=announcement, slo=self._slo, tenant=self._tenant
        )
        if execution.routed is None and len(self._annotations) < MAX_ANNOTATIONS:
            self._annotations[key] = annotation
        return annotation

    def _knows(self, run: str) -> bool:
        with self._lock:
            return run in self._runs

    def _execution(self, run: str, execution: str) -> _Execution | None:
        state = self._runs.get(run)
        return state.executions.get(execution) if state else None

    def _role(self, stage: str, role: str | None) -> str | None:
        known = self.workflow.stage_by_path.get(stage)
        return known.role if known else role or stage.rpartition("/")[2]

    def _announcement(self, execution: _Execution) -> Announcement:
        if execution.routed is not None:
            return Announcement(successors=execution.routed)
        if execution.stage not in self._announced:
            self._announced[execution.stage] = self._static(execution.stage)
        return self._announced[execution.stage]

    def _static(self, stage: str) -> Announcement:
        """What the graph says; a stage outside it goes on to what its nearest ancestor does."""
        path = stage
        while path and path not in self.workflow.stage_by_path:
            path = path.rpartition("/")[0]
        certain, candidates = self.workflow.successors(path)
        inside = path == stage
        return Announcement(
            successors=tuple(
                Successor(stage=target, certain=inside and target in certain)
                for target in (*certain, *candidates)
                if target != END
            ),
            open_ended=not inside or path in self.workflow.open_ended,
        )


def _cut(content: str | None) -> str | None:
    return content[:MAX_CONTENT] if content else None


def _unlock_in_child() -> None:
    """In a forked child: the thread that held a lock is not there to let it go."""
    for tracker in _trackers:
        tracker._lock = RLock()


os.register_at_fork(after_in_child=_unlock_in_child)
