"""What a cluster file and a catalogue may say: sections, their keys and units."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from maestro_backend.config import (
    LocalPath,
    Positive,
    Section,
    Size,
    parse_duration,
    parse_size,
)

_FLOPS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kMGTP])FLOPS\s*")
_PREFIXES = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_NAME = r"^[^/\s]+$"


def parse_rate(value: object) -> object:
    """`"24GB/s"` -> bytes per second; numbers pass as they are."""
    if not isinstance(value, str):
        return value
    size, slash, second = value.strip().rpartition("/")
    if not slash or second != "s":
        raise _no_quantity(value, "a rate such as 24GB/s")
    return parse_size(size)


def parse_flops(value: object) -> object:
    """`"312TFLOPS"` -> operations per second; numbers pass as they are."""
    if not isinstance(value, str):
        return value
    match = _FLOPS.fullmatch(value)
    if match is None:
        raise _no_quantity(value, "a rate such as 312TFLOPS")
    return float(match[1]) * _PREFIXES[match[2]]


def _no_quantity(text: str, wanted: str) -> PydanticCustomError:
    found = {"text": repr(text), "wanted": wanted}
    return PydanticCustomError("quantity", "{text} is not {wanted}", found)


Rate = Annotated[float, BeforeValidator(parse_rate), Field(gt=0)]
Flops = Annotated[float, BeforeValidator(parse_flops), Field(gt=0)]
Span = Annotated[float, BeforeValidator(parse_duration), Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, Field(min_length=1, pattern=_NAME)]


class ProfileSection(Section):
    """A device profile. What is not given is taken from the one named by `like`.

    `capacity` is all its memory, of which engines get the usable part.
    """

    like: str | None = None
    capacity: Size | None = None
    bandwidth: Rate | None = None
    flops: Flops | None = None
    memory_share: Share | None = None
    compute_share: Share | None = None
    step: Span | None = None
    to_device: Rate | None = None
    to_host: Rate | None = None
    allreduce: Span | None = None
    residual: Size | None = None
    start: Span | None = None
    wake: Span | None = None
    limit: Span | None = None


class ModelSection(Section):
    """A model's geometry. What is not given is taken from the one named by `like`."""

    like: str | None = None
    parameters: Positive | None = None
    weights: Size | None = None
    layers: Positive | None = None
    kv_heads: Positive | None = None
    head_dim: Positive | None = None
    kv_dtype_bytes: Positive | None = None
    max_model_len: Positive | None = None
    block_tokens: Positive | None = None
    tensor_parallel: Positive | None = None


class DeviceSection(Section):
    """`count` alike devices, or groups of `devices` each that a tensor-parallel model spans."""

    models: tuple[str, ...]
    static: str
    profile: str | None = None
    name: Name | None = None
    count: Positive = 1
    devices: Positive = 1


class NodeSection(Section):
    """`count` alike hosts. `profile` is that of devices that name none."""

    name: Name
    devices: tuple[DeviceSection, ...]
    host_memory: Size
    disk: Rate
    profile: str | None = None
    count: Positive = 1
    cluster: Name = "local"
    rtt: Span = 0.0


class CatalogueSection(Section):
    """A file of device profiles and models; `about` is for people."""

    about: str = ""
    profiles: dict[str, ProfileSection] = {}
    models: dict[str, ModelSection] = {}


class ClusterSection(CatalogueSection):
    """A cluster file. Its `profiles` and `models` come on top of `catalogues`, files beside it,
    and these on top of what Maestro ships. `kv` is the KV cache where it has one size."""

    name: Name
    nodes: tuple[NodeSection, ...]
    catalogues: tuple[LocalPath, ...] = ()
    kv: dict[str, Size] = {}
    max_num_seqs: Positive = 64
    max_batched_tokens: Positive = 8192


def given(section: Section, fields: dict[str, str]) -> dict[str, Any]:
    """What a section sets, under the names of a dataclass's fields where they differ."""
    values = section.model_dump(exclude_none=True, exclude={"like"})
    return {fields.get(key, key): value for key, value in values.items()}
