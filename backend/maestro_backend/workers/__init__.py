"""Workers: one engine process per model, its supervision, and the model sources.

The names are loaded when they are first used: vLLM imports this package for our plugin in every
process of every vLLM in the environment, and needs nothing else of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._account import Account, DoesNotFitError, Learned
    from ._address import MAX_ADDRESS_BYTES, file_name, socket_path
    from ._engine import ENGINES, Engine, Launch, Memory, ServedModel, choose_engine
    from ._process import end_stray
    from ._record import WorkerRecord, read_records
    from ._restart import Backoff
    from ._sources import Checkpoint, cache_dir, fetch, known_checkpoint
    from ._telling import telling_line
    from ._worker import Worker

__all__ = [
    "ENGINES",
    "MAX_ADDRESS_BYTES",
    "Account",
    "Backoff",
    "Checkpoint",
    "DoesNotFitError",
    "Engine",
    "Launch",
    "Learned",
    "Memory",
    "ServedModel",
    "Worker",
    "WorkerRecord",
    "cache_dir",
    "choose_engine",
    "end_stray",
    "fetch",
    "file_name",
    "known_checkpoint",
    "read_records",
    "socket_path",
    "telling_line",
]

_MODULES = (
    "_account",
    "_address",
    "_engine",
    "_process",
    "_record",
    "_restart",
    "_sources",
    "_telling",
    "_worker",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in (import_module(f".{module}", __name__) for module in _MODULES):
            if name in vars(module):
                return vars(module)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
