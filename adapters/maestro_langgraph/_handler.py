"""Follows the runs of one graph through LangChain's callbacks.

The handler is inline: it runs in the caller's own context, so the ContextVar that it sets before
a model call is what the HTTP client sees. It does no I/O and never raises.
"""

from __future__ import annotations

from asyncio import CancelledError
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import Any, Final
from uuid import UUID

from langgraph.callbacks import GraphCallbackHandler, GraphInterruptEvent
from langgraph.errors import GraphBubbleUp, GraphInterrupt, ParentCommand
from langgraph.types import Command

from maestro_agents.adapter import (
    CallContext,
    Caller,
    Events,
    Options,
    Settings,
    Tracker,
    add_finder,
    annotate_openai,
    control,
    current_caller,
    fail_open,
    settings,
)
from maestro_agents.protocol import START

from ._graph import GraphMap
from ._internals import (
    AGENT_NAME,
    NAMESPACE,
    NODE,
    THREAD,
    current_callback_run,
    follows_node,
    is_task,
    superstep_of,
)
from ._routing import Target, read_choice, read_command
from ._supersteps import Supersteps
from ._tasks import Frame, GraphRun, Run, Task

MAX_PAUSED: Final = 1024
MAX_OVER: Final = 4096
MAX_NAME: Final = 256

_frames: dict[UUID, Frame] = {}
"""Of all handlers: a wrapped graph inside another wrapped graph is followed by the outer one."""

_over: OrderedDict[UUID, None] = OrderedDict()
"""Callback runs that had not ended when their run did."""

_paused: OrderedDict[tuple[str, str | None], Run] = OrderedDict()
"""By workflow and conversation: an app may build its graph anew for each request."""


class MaestroHandler(GraphCallbackHandler):
    """Tells a `Tracker` what happens in one graph, and the control plane what came of it."""

    run_inline = True
    raise_error = False
    ignore_llm = True  # the ends of model calls, and each token of them, cost time and tell nothing

    def __init__(self, graph: GraphMap, options: Options) -> None:
        self.graph = graph
        self.options = options
        self._tracker = Tracker(graph.workflow, slo=options.slo, tenant=options.tenant)
        add_finder(_caller_of_context)

    def __deepcopy__(self, memo: object) -> MaestroHandler:
        return self  # copies of a graph are followed together

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
            late = parent_run_id in _over  # a thread of a run that has failed goes on
            if step is None and not late and (backend := settings()).active:
                self._begin_run(run_id, inputs, metadata or {}, backend)
        elif above.owner is self:
            if step is not None:
                self._begin_task(run_id, above, step, metadata or {})
            elif above.task and is_task(metadata or {}, above.task.namespace):
                self._begin_called_task(run_id, above, above.task, metadata or {})
            else:
                self._begin_inner(run_id, above, tags, kwargs.get("name") or "")

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
        **kwargs: Any,
    ) -> None:
        frame = self._frame(parent_run_id)
        if frame and frame.task:
            annotate_openai()  # now it is imported for sure
            current_caller.set(partial(self._begin_one_call, frame.run, frame.task))

    def _begin_one_call(self, run: Run, task: Task) -> CallContext | None:
        """For the one request that follows: threads are used again, by others."""
        current_caller.set(None)
        return self.begin_call(run, task)

    def begin_call(self, run: Run, task: Task) -> CallContext | None:
        """The next call of the stage that `task` runs."""
        task.call = run.tracker.call_started(run.id, task.key, barrier=task.barrier())
        return task.call

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
        given = input_str if frame.run.backend.send_content else None
        key = str(run_id)
        self._post(
            frame.run,
            frame.run.tracker.tool_started(frame.run.id, frame.task.key, key, tool, given),
        )

    @fail_open
    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self._end_tool(run_id, output)

    @fail_open
    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        self._end_tool(run_id)

    @fail_open
    def on_interrupt(self, event: GraphInterruptEvent) -> None:
        frame = self._frame(event.run_id)
        if frame and frame.opened is frame.run and not frame.run.paused:
            self._pause(frame.run)

    def _begin_run(
        self, run_id: UUID, inputs: Any, metadata: Mapping[str, Any], backend: Settings
    ) -> None:
        annotate_openai()  # again: openai may have been imported since the graph was wrapped
        conversation = _conversation(metadata)
        resumes = inputs is None or isinstance(inputs, Command)
        run = _paused.pop((self.graph.workflow.id, conversation), None)
        if run and not resumes:
            self._post(run, run.tracker.run_ended(run.id))
        if run and resumes and (events := run.tracker.run_resumed(run.id)):
            run.paused, run.interrupted, run.backend = False, False, backend
            self._post(run, events)
        else:
            run = Run(str(run_id), conversation, backend, self._tracker)
            self._post(run, run.tracker.run_started(run.id, conversation))
        self._enter(run_id, run, None).opened = run

    def _begin_inner(
        self, run_id: UUID, above: Frame, tags: Sequence[str] | None, name: str
    ) -> None:
        frame = self._enter(run_id, above.run, above.task)
        frame.name = name
        if above.task and above.opened is above.task and follows_node(tags):
            above.task.followers.append(frame)

    def _begin_task(
        self, run_id: UUID, above: Frame, step: int, metadata: Mapping[str, Any]
    ) -> None:
        within = above.graph = above.graph or self._graph_run(above)
        namespace, node = metadata.get(NAMESPACE, ""), metadata.get(NODE, "")
        task = Task(str(run_id), node, namespace, step, within, above.task)
        if not within.failures[namespace]:  # tried again, it is the same task
            within.steps.begun(step, node)
        self._start(run_id, above.run, task, metadata)

    def _begin_called_task(
        self, run_id: UUID, above: Frame, host: Task, metadata: Mapping[str, Any]
    ) -> None:
        """A `@task` that a node or an entrypoint calls: it has no superstep of its own."""
        within = GraphRun(host.path, Supersteps(None))
        namespace, node = metadata.get(NAMESPACE, ""), metadata.get(NODE, "")
        task = Task(str(run_id), node, namespace, host.step, within, host)
        self._start(run_id, above.run, task, metadata)

    def _start(self, run_id: UUID, run: Run, task: Task, metadata: Mapping[str, Any]) -> None:
        self._enter(run_id, run, task).opened = task
        current_caller.set(None)  # what is left of a model's start outside is not for in here
        if task.node != START and not self.graph.is_container(task.path):
            events = run.tracker.stage_started(
                run.id,
                task.key,
                task.path,
                step=task.step,
                attempt=task.within.failures[task.namespace],
                role=metadata.get(AGENT_NAME),
            )
            self._post(run, events)

    def _graph_run(self, frame: Frame) -> GraphRun:
        """The graph whose first task begins directly below `frame`."""
        prefix = self.graph.prefix_of(frame.task.path, frame.name) if frame.task else ""
        return GraphRun(prefix, Supersteps(self.graph.levels.get(prefix)))

    def _end(self, run_id: UUID, output: Any, error: BaseException | None) -> None:
        if (frame := self._leave(run_id)) is None:
            return
        frame.output = output
        if isinstance(frame.opened, Task):
            self._end_task(frame.run, frame.opened, output, error)
        elif isinstance(frame.opened, Run):
            self._end_run(frame.run, error)

    def _end_task(self, run: Run, task: Task, output: Any, error: BaseException | None) -> None:
        router, chosen = self._choice(task, output, error)
        if router and chosen is not None and router.within.prefix in self.graph.levels:
            following = self.graph.successors(router.within.prefix, router.node, chosen)
            run.tracker.routed(run.id, task.key, following)
        failed = _failed(error)
        run.interrupted = run.interrupted or isinstance(error, GraphInterrupt)
        self._tell_tools(run, task, output)
        if failed:
            task.within.failures[task.namespace] += 1
        elif router is task and (error is None or chosen is not None):
            task.within.steps.ended(task.step, task.node, chosen)
        self._post(run, run.tracker.stage_ended(run.id, task.key, failed=failed))

    @fail_open
    def _tell_tools(self, run: Run, task: Task, output: Any) -> None:
        if task.call and (tools := _tools_requested(output)):
            self._post(run, run.tracker.tools_requested(task.call.identity, tools))

    def _choice(
        self, task: Task, output: Any, error: BaseException | None
    ) -> tuple[Task | None, tuple[Target, ...] | None]:
        """The task whose successors were chosen, this one or one around it, and the choice."""
        if isinstance(error, ParentCommand):
            command = error.args[0]
            return _addressee(task, command.graph), read_command(command)
        level = self.graph.levels.get(task.within.prefix)
        if error is not None or level is None:
            return task, None
        followers = [frame.output for frame in task.followers]
        return task, read_choice(level, task.node, followers, output)

    def _end_run(self, run: Run, error: BaseException | None) -> None:
        for run_id in tuple(run.frames):
            _frames.pop(run_id, None)
            _over[run_id] = None
            if len(_over) > MAX_OVER:
                _over.popitem(last=False)
        run.frames.clear()
        if run.interrupted and isinstance(error, GeneratorExit) and not run.paused:
            self._pause(run)  # whoever streams stops reading at the interrupt
        if run.paused and run.conversation:
            _paused[run.tracker.workflow.id, run.conversation] = run
            if len(_paused) <= MAX_PAUSED:
                return
            _, run = _paused.popitem(last=False)
        self._post(run, run.tracker.run_ended(run.id, failed=_failed(error)))

    def _pause(self, run: Run) -> None:
        run.paused = True
        self._post(run, run.tracker.run_paused(run.id))

    def _end_tool(self, run_id: UUID, output: Any = None) -> None:
        if frame := self._leave(run_id):
            sent = frame.run.backend.send_content and output is not None
            content = str(getattr(output, "content", output)) if sent else None
            events = frame.run.tracker.tool_ended(frame.run.id, str(run_id), content)
            self._post(frame.run, events)

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

    def _post(self, run: Run, events: Events) -> None:
        if events:
            control.post(self.graph.workflow, run.id, events, run.backend)


def _failed(error: BaseException | None) -> bool:
    """Routing, interrupts, and whoever stops reading or waiting, are no failures."""
    stopped = GraphBubbleUp | GeneratorExit | CancelledError
    return error is not None and not isinstance(error, stopped)


def _conversation(metadata: Mapping[str, Any]) -> str | None:
    """The thread, by a name that fits the wire."""
    thread = str(metadata.get(THREAD) or "")
    if len(thread) > MAX_NAME:
        thread = sha256(thread.encode(errors="replace")).hexdigest()
    return thread or None


def _addressee(task: Task, graph: str | None) -> Task | None:
    """The task that a Command which left `task` makes route: this one, or one around it."""
    if graph == Command.PARENT:
        return task.parent
    found: Task | None = task
    while found and found.namespace != graph:
        found = found.parent
    return found


def _tools_requested(output: Any) -> tuple[str, ...]:
    """The tools that a message at the end of a node's output asks for."""
    if isinstance(output, Command):
        output = output.update
    for value in output.values() if isinstance(output, Mapping) else (output,):
        last = value[-1] if isinstance(value, list) and value else value
        if calls := getattr(last, "tool_calls", None):
            return tuple(
                call["name"] if isinstance(call, Mapping) else call.function.name for call in calls
            )
    return ()


def _caller_of_context() -> Caller | None:
    """Of whoever calls a model by hand inside a node."""
    run_id, _ = current_callback_run()
    frame = _frames.get(run_id) if run_id else None
    if frame is None or frame.task is None or not isinstance(frame.owner, MaestroHandler):
        return None
    return partial(frame.owner.begin_call, frame.run, frame.task)
