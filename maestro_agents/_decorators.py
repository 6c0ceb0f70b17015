"""`agent` and `workflow`: the two words an app needs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass
from functools import wraps
from inspect import iscoroutinefunction, isroutine
from typing import Any, Final, TypeVar, cast, overload

from pydantic import ValidationError

from . import _openai_hook
from ._adapters import Adapter, Options, find_adapter, unsupported
from ._log import warn_once
from ._settings import settings
from .protocol import ConfigError, MaestroError, Slo

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_MISSING: Final[Any] = object()

AGENT_ATTRIBUTE: Final = "__maestro_agent__"


@dataclass(frozen=True, slots=True)
class Agent:
    """What `@agent` says about a function."""

    role: str
    model: str | None = None


def agent(role: str, *, model: str | None = None) -> Callable[[F], F]:
    """Say which role a node's function plays, and which model it calls where that is fixed.

    The decorator only marks the function: the very same object comes back.

    Raises:
        ConfigError: `role` or `model` is no word.
    """
    if not _is_name(role) or not (model is None or _is_name(model)):
        raise ConfigError('@agent needs words: @agent(role="planner")')

    def mark(function: F) -> F:
        setattr(function, AGENT_ATTRIBUTE, Agent(role, model))
        return function

    return mark


def agent_of(function: object) -> Agent | None:
    """What `@agent` said about `function`, or None."""
    found = getattr(function, AGENT_ATTRIBUTE, None)
    return found if isinstance(found, Agent) else None


@overload
def workflow(
    obj: T,
    *,
    name: str | None = None,
    slo: str = "standard",
    deadline: float | None = None,
    roles: Mapping[str, str] | None = None,
    tenant: str | None = None,
) -> T: ...


@overload
def workflow(
    *,
    name: str | None = None,
    slo: str = "standard",
    deadline: float | None = None,
    roles: Mapping[str, str] | None = None,
    tenant: str | None = None,
) -> Callable[[T], T]: ...


def workflow(
    obj: Any = _MISSING,
    *,
    name: str | None = None,
    slo: str = "standard",
    deadline: float | None = None,
    roles: Mapping[str, str] | None = None,
    tenant: str | None = None,
) -> Any:
    """Let Maestro follow the runs of a graph, or of every graph that a factory returns.

        graph = workflow(builder.compile(), slo="interactive", deadline=20)

        @workflow(slo="batch")
        def make_graph(): ...

    Args:
        obj: a compiled graph, or a function (plain or async) that returns one, or a context
            manager that yields one.
        name: the workflow's name; by default the graph's own, else the factory's.
        slo: the service-level class: `interactive`, `standard`, `batch` or the operator's own; one
            that the operator does not know counts as `standard`.
        deadline: seconds from a run's start to its end; never tighter than its class's.
        roles: role by stage path or node name; wins over `@agent`.
        tenant: on whose account the runs go.

    Returns:
        A copy of the same type. Calls are annotated only on their way to MAESTRO_BASE_URL; while
        that is unset, the graph behaves exactly as before.

    Raises:
        ConfigError: an argument or a MAESTRO_ variable is wrong; the message names the fix.
        UnsupportedError: no installed adapter can read `obj`; the message names the extra.
    """
    settings()
    options = read_options(name, slo, deadline, roles, tenant)
    if obj is _MISSING:
        return lambda decorated: _wrap(decorated, options)
    return _wrap(obj, options)


def _wrap(obj: Any, options: Options, default_name: str | None = None) -> Any:
    if adapter := find_adapter(obj):
        _openai_hook.install()
        return _followed(adapter, obj, options, default_name)
    if isroutine(obj) and default_name is None:
        return _wrap_factory(obj, options)
    if isinstance(obj, AbstractAsyncContextManager) and default_name:
        return _entered_async(obj, options, default_name)
    if isinstance(obj, AbstractContextManager) and default_name:
        return _entered(obj, options, default_name)
    raise unsupported(obj)


def _followed(adapter: Adapter, obj: Any, options: Options, default_name: str | None) -> Any:
    try:
        return adapter.wrap(obj, options, default_name)
    except MaestroError:
        raise
    except Exception:
        kind = type(obj).__qualname__
        warn_once(f"wrap:{kind}", "a %s cannot be read: it is not followed", kind, exc_info=True)
        return obj


@contextmanager
def _entered(
    graphs: AbstractContextManager[Any], options: Options, default_name: str
) -> Iterator[Any]:
    with graphs as graph:
        yield _wrap(graph, options, default_name)


@asynccontextmanager
async def _entered_async(
    graphs: AbstractAsyncContextManager[Any], options: Options, default_name: str
) -> AsyncIterator[Any]:
    async with graphs as graph:
        yield _wrap(graph, options, default_name)


def _wrap_factory(factory: Callable[..., Any], options: Options) -> Callable[..., Any]:
    default_name = factory.__name__.strip("<>")

    if iscoroutinefunction(factory):

        @wraps(factory)
        async def make_async(*args: Any, **kwargs: Any) -> Any:
            return _wrap(await factory(*args, **kwargs), options, default_name)

        return make_async

    @wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        return _wrap(factory(*args, **kwargs), options, default_name)

    return make


def read_options(
    name: str | None,
    slo: str,
    deadline: float | None,
    roles: Mapping[str, str] | None,
    tenant: str | None,
) -> Options:
    """The arguments of `workflow()`, checked as far as that goes without a graph.

    Raises:
        ConfigError: one is wrong; the message names the fix.
    """
    for what, value in (("name", name), ("tenant", tenant)):
        if value is not None and not _is_name(value):
            raise ConfigError(f"{what}={value!r}: use a word of 1 to 256 characters")
    given = {} if roles is None else roles
    if not isinstance(given, Mapping) or not all(map(_is_name, (*given, *given.values()))):
        raise ConfigError(
            f'roles={roles!r}: say who plays what, as in roles={{"review": "critic"}}'
        )
    return Options(name, read_slo(slo, deadline), dict(given), tenant)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 256


def read_slo(name: str, deadline: float | None) -> Slo:
    """The service level that a user asked for.

    Raises:
        ConfigError: it is none; the message names the fix.
    """
    try:
        return Slo(**cast(Any, {"class": name, "deadline_s": deadline}))
    except ValidationError as error:
        raise ConfigError(
            f"slo={name!r}, deadline={deadline!r}: slo is a class name such as 'interactive', "
            "deadline is a number of seconds between 0 and a week"
        ) from error
