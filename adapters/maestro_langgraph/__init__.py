"""LangGraph under Maestro: `workflow(graph)`, `@agent` and `ChatMaestro`."""

from typing import TYPE_CHECKING, Any

from maestro_agents import agent, workflow

from ._adapter import adapter

if TYPE_CHECKING:
    from ._chat_model import ChatMaestro

__all__ = ["ChatMaestro", "adapter", "agent", "workflow"]


def __getattr__(name: str) -> Any:
    # langchain-openai takes seconds to import; only those who use ChatMaestro should wait.
    if name != "ChatMaestro":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from ._chat_model import ChatMaestro
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'ChatMaestro needs {error.name}: pip install "maestro-mas[langgraph]"'
        ) from error
    return ChatMaestro
