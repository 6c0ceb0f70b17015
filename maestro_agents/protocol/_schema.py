"""The JSON Schema of the wire, generated into docs/ by `python -m maestro_agents.protocol`."""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import models_json_schema

from ._annotation import Annotation
from ._base import PROTOCOL_VERSION
from ._events import RunEvents
from ._headers import CallIdentity
from ._workflow import Workflow


def wire_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of every message a client sends."""
    roots = (Annotation, CallIdentity, RunEvents, Workflow)
    _, schema = models_json_schema(
        [(root, "validation") for root in roots],
        title=f"Maestro protocol, version {PROTOCOL_VERSION}",
    )
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def schema_text() -> str:
    """The schema as committed: sorted keys, two spaces, final newline."""
    return json.dumps(wire_schema(), indent=2, sort_keys=True) + "\n"
