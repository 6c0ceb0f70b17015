"""One logger, and the rule that our own errors are logged once and never reach user code."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from .protocol import ConfigError

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("maestro_agents")

_seen: set[str] = set()


def warn_once(key: str, message: str, *args: object, exc_info: bool = False) -> None:
    """Log a warning the first time `key` comes up in this process, then stay silent."""
    if key not in _seen:
        _seen.add(key)
        logger.warning(message, *args, exc_info=exc_info)


def tell_once(key: str, message: str, *args: object) -> None:
    """Like `warn_once`, for what is no fault but may surprise: level INFO."""
    if key not in _seen:
        _seen.add(key)
        logger.info(message, *args)


def fail_open(function: Callable[P, R]) -> Callable[P, R | None]:
    """Make `function` return None instead of raising; each function's first error is logged.

    A wrong setting is one line for all of them.
    """
    name = f"{function.__module__}.{function.__qualname__}"

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return function(*args, **kwargs)
        except ConfigError as error:
            warn_once(str(error), "%s; the app goes on without it", error)
            return None
        except Exception:
            warn_once(name, "%s failed; the app goes on without it", name, exc_info=True)
            return None

    return guarded
