"""Follows the runs of one graph through LangChain's callbacks.

The handler is inline: it runs in the caller's own context, so the ContextVar that it sets before
a model call is what the HTTP client sees. It does no I/O and never raises.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final
from uuid import UUID

from langgraph.callbacks import GraphCallbackHandler, GraphInterruptEvent
from langgraph.errors import GraphBubbleUp, ParentCommand
from langgraph.types import Command

from maestro_agents import _openai_hook
from maestro_agents._adapters import Options
from maestro_agents._context import CallContext, current_call
from maestro_agents._control import control
from maestro_agents._log import fail_open
from maestro_agents._settings import settings
from maestro_agents._tracker import Events, Tracker
from maestro_agents.protocol import START

from ._graph import GraphMap
from ._internals import AGENT_NAME, NAMESPACE, THREAD, follows_node, names_of, superstep_of
from ._routing import Target, read_choice, read_command
from ._supersteps import Supersteps
from ._tasks import Frame, Run, Task

MAX_PAUSED: Final = 1024

_frames: dict[UUID, Frame] = {}
"""Of all handlers: a wrapped graph inside another wrapped graph is followed by the outer one."""


class MaestroHandler(GraphCallbackHandler):
    """Tells a `Tracker` what happens in one graph, and the control plane what came of it."""

    run_inline = True
    raise_error = False

    def __init__(self, graph: GraphMap, options: Options) -> None:
        self.graph = graph
        self.options = options
        self._tracker = Tracker(graph.workflow, slo=options.slo, tenant=options.tenant)
        self._paused: OrderedDict[str, Run] = OrderedDict()

    @fail_open
    def on_chain_start(
        self,
        serialized: dict[str, Any] | None,
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        step = superstep_of(tags)
        above = _frames.get(parent_run_id) if parent_run_id else None
        if above is None:
            if step is None and settings().active:
                self._begin_run(run_id, inputs, metadata or {})
        elif above.owner is self:
            if step is None:
                self._begin_inner(run_id, above, tags)
            else:
                self._begin_task(run_id, above, step, metadata or {})

    @fail_open
    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self._end(run_id, outputs, None)

    @fail_open
    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self._end(run_id, None, error)

    @fail_open
    def on_chat_model_start(
        self,
        serialized: dict[str, Any],
        messages: list[list[Any]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        batch_size: int = 1,
        **kwargs: Any,
    ) -> None:
        frame = self._frame(parent_run_id)
        if frame is None or frame.task is None:
            return
        _openai_hook.install()
        task = frame.task
        call = self._tracker.call_started(frame.run.id, task.key, barrier=task.barrier())
        current_call.set(_of_run_only(call) if call and batch_size > 1 else call)
        self._enter(run_id, frame.run, task)

    @fail_open
    def on_llm_end(self, response: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self._end_call(run_id)

    @fail_open
    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self._end_call(run_id)

    @fail_open
    def on_tool_start(
        self,
        serialized: dict[str, Any] | None,
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        frame = self._frame(parent_run_id)
        if frame is None or frame.task is None:
            return
        self._enter(run_id, frame.run, frame.task)
        tool = (serialized or {}).get("name") or kwargs.get("name") or "tool"
        key = str(run_id)
        self._post(frame.run, self._tracker.tool_started(frame.run.id, frame.task.key, key, tool))

    @fail_open
    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self._end_tool(run_id)

    @fail_open
    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self._end_tool(run_id)

    @fail_open
    def on_interrupt(self, event: GraphInterruptEvent) -> None:
        frame = self._frame(event.run_id)
        if frame and frame.opened is frame.run and not frame.run.paused:
            frame.run.paused = True
            self._post(frame.run, self._tracker.run_paused(frame.run.id))

    def _begin_run(self, run_id: UUID, inputs: Any, metadata: Mapping[str, Any]) -> None:
        conversation = str(metadata[THREAD]) if metadata.get(THREAD) else None
        resumes = inputs is None or isinstance(inputs, Command)
        run = self._paused.pop(conversation, None) if conversation else None
        if run and not resumes:
            self._post(run, self._tracker.run_ended(run.id))
        if run and resumes and (events := self._tracker.run_resumed(run.id)):
            run.paused, run.steps = False, self._steps("")
            self._post(run, events)
        else:
            outside = names_of(metadata.get(NAMESPACE, ""))
            run = Run(str(run_id), conversation, outside, self._steps(""))
            self._post(run, self._tracker.run_started(run.id, conversation))
        self._enter(run_id, run, None).opened = run

    def _begin_inner(self, run_id: UUID, above: Frame, tags: Sequence[str] | None) -> None:
        frame = self._enter(run_id, above.run, above.task)
        if above.task and above.opened is above.task and follows_node(tags):
            above.task.followers.append(frame)

    def _begin_task(
        self, run_id: UUID, above: Frame, step: int, metadata: Mapping[str, Any]
    ) -> None:
        run, parent = above.run, above.task
        names = names_of(metadata.get(NAMESPACE, ""))
        if names[: len(run.outside)] == run.outside:
            names = names[len(run.outside) :]
        task = Task(
            key=str(run_id),
            names=names,
            step=step,
            parent=parent,
            steps=parent.inner if parent else run.steps,
            inner=self._steps("/".join(names)),
        )
        task.steps.begun(step, task.node)
        self._enter(run_id, run, task).opened = task
        if task.node != START and not self.graph.is_container(task.path):
            role = metadata.get(AGENT_NAME)
            events = self._tracker.stage_started(run.id, task.key, task.path, step=step, role=role)
            self._post(run, events)

    def _end(self, run_id: UUID, output: Any, error: BaseException | None) -> None:
        if (frame := self._leave(run_id)) is None:
            return
        frame.output = output
        if isinstance(frame.opened, Task):
            self._end_task(frame.run, frame.opened, output, error)
        elif isinstance(frame.opened, Run):
            self._end_run(frame.run, error)

    def _end_task(self, run: Run, task: Task, output: Any, error: BaseException | None) -> None:
        prefix, chosen = self._choice(run, task, output, error)
        if chosen is not None and prefix in self.graph.levels:
            node = task.names[prefix.count("/") + 1 if prefix else 0]
            self._tracker.routed(run.id, task.key, self.graph.successors(prefix, node, chosen))
        if prefix == task.prefix and (error is None or chosen is not None):
            task.steps.ended(task.step, task.node, chosen)
        self._post(run, self._tracker.stage_ended(run.id, task.key, failed=_failed(error)))

    def _choice(
        self, run: Run, task: Task, output: Any, error: BaseException | None
    ) -> tuple[str, tuple[Target, ...] | None]:
        """The level in which the task chose what follows, and its choice."""
        if isinstance(error, ParentCommand):
            command = error.args[0]
            if command.graph == Command.PARENT:
                level = task.names[:-2]
            else:
                level = names_of(str(command.graph))[len(run.outside) : -1]
            return "/".join(level), read_command(command)
        level_of_task = self.graph.levels.get(task.prefix)
        if error is not None or level_of_task is None:
            return task.prefix, None
        followers = [frame.output for frame in task.followers]
        return task.prefix, read_choice(level_of_task, task.node, followers, output)

    def _end_run(self, run: Run, error: BaseException | None) -> None:
        for run_id in tuple(run.frames):
            _frames.pop(run_id, None)
        run.frames.clear()
        if run.paused and run.conversation:
            self._paused[run.conversation] = run
            if len(self._paused) <= MAX_PAUSED:
                return
            _, run = self._paused.popitem(last=False)
        self._post(run, self._tracker.run_ended(run.id, failed=_failed(error)))

    def _end_call(self, run_id: UUID) -> None:
        if self._leave(run_id):
            current_call.set(None)

    def _end_tool(self, run_id: UUID) -> None:
        if frame := self._leave(run_id):
            self._post(frame.run, self._tracker.tool_ended(frame.run.id, str(run_id)))

    def _frame(self, run_id: UUID | None) -> Frame | None:
        """The frame of a callback run that this handler follows."""
        frame = _frames.get(run_id) if run_id else None
        return frame if frame and frame.owner is self else None

    def _enter(self, run_id: UUID, run: Run, task: Task | None) -> Frame:
        frame = _frames[run_id] = Frame(self, run, task)
        run.frames.add(run_id)
        return frame

    def _leave(self, run_id: UUID) -> Frame | None:
        if frame := self._frame(run_id):
            del _frames[run_id]
            frame.run.frames.discard(run_id)
        return frame

    def _steps(self, prefix: str) -> Supersteps:
        return Supersteps(self.graph.levels.get(prefix))

    def _post(self, run: Run, events: Events) -> None:
        if events:
            control.post(self.graph.workflow, run.id, events)


def _failed(error: BaseException | None) -> bool:
    """Routing, interrupts and a stream that nobody reads on are no failures."""
    return error is not None and not isinstance(error, GraphBubbleUp | GeneratorExit)


def _of_run_only(call: CallContext) -> CallContext:
    """For several prompts in one `generate`: all start before the first request is made, so it
    cannot be said which request is which call."""
    return replace(call, identity=call.identity.model_copy(update={"stage": None, "instance": 0}))
