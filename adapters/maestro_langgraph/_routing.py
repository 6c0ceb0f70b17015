"""Reads what a node chose: the labels and `Send`s of its branches, the `goto`s of its Commands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from langgraph.types import Command, Send

from ._levels import Branch, Level


@dataclass(frozen=True, slots=True)
class Target:
    """A node that was chosen. `sent`: by a `Send`, so this is one of several instances."""

    node: str
    sent: bool = False


def read_choice(
    level: Level, node: str, followers: Sequence[Any], output: Any
) -> tuple[Target, ...] | None:
    """The targets that `node` chose; None when it chose nothing, or not so that we can see it.

    Args:
        level: the graph that the node is in.
        node: its local name.
        followers: outputs of what ran after the node's function, in order; its branches are last.
        output: what the node returned.
    """
    chosen = [target for command in _commands(output) for target in _goto(command)]
    branches = level.branches.get(node, ())
    if branches:
        if len(followers) < len(branches) or not all(branch.observable for branch in branches):
            return None
        for branch, result in zip(branches, followers[-len(branches) :], strict=True):
            chosen += _picked(branch, result)
    return tuple(chosen) if chosen or branches else None


def read_command(command: Command[Any]) -> tuple[Target, ...]:
    """The targets of a Command."""
    return tuple(_goto(command))


def _commands(output: Any) -> Iterator[Command[Any]]:
    for item in output if isinstance(output, list | tuple) else (output,):
        if isinstance(item, Command) and item.graph is None:
            yield item


def _goto(command: Command[Any]) -> Iterator[Target]:
    goto: Any = command.goto
    for item in goto if isinstance(goto, list | tuple) else (goto,):
        yield Target(item.node, sent=True) if isinstance(item, Send) else Target(item)


def _picked(branch: Branch, result: Any) -> Iterable[Target]:
    for item in result if isinstance(result, list | tuple) else (result,):
        if isinstance(item, Send):
            yield Target(item.node, sent=True)
        elif branch.ends is None:
            yield Target(str(item))
        elif item in branch.ends:
            yield Target(branch.ends[item])
