"""The configuration file: which models, on which devices, under which rules.

Every section is a frozen model. An unknown key is an error that names the likely one.
"""

from __future__ import annotations

import difflib
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from maestro_agents.protocol import ConfigError

_BINARY = ("KiB", "MiB", "GiB", "TiB")
_DECIMAL = ("kB", "MB", "GB", "TB")
_SIZE_UNITS = {
    "B": 1,
    **{unit: 1024 ** (power + 1) for power, unit in enumerate(_BINARY)},
    **{unit: 1000 ** (power + 1) for power, unit in enumerate(_DECIMAL)},
}
_TIME_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_LEAST_STORE = 1024**2
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")

SOURCE_SCHEMES = ("hub", "package", "random", "https", "http", "file")
"""`hub:org/name`, `package:name`, `random:tiny-llama`, `https://host/folder` (http too),
`file:///folder`; anything else is a local folder.
"""


def parse_size(value: object) -> object:
    """`"6GiB"` -> bytes; numbers pass as they are."""
    if not isinstance(value, str):
        return value
    return round(_quantity(value, _SIZE_UNITS, "a size such as 6GiB or 512MiB"))


def parse_duration(value: object) -> object:
    """`"20s"`, `"500ms"`, `"2m"`, `"1h"`, `"90d"` -> seconds; numbers pass as they are."""
    if not isinstance(value, str):
        return value
    return _quantity(value, _TIME_UNITS, "a duration such as 20s or 500ms")


def _quantity(text: str, units: Mapping[str, float], wanted: str) -> float:
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2] not in units:
        raise PydanticCustomError(
            "quantity",
            "{text} is not {wanted}",
            {
                "text": repr(text),
                "wanted": wanted,
            },
        )
    return float(match[1]) * units[match[2]]


def _from_base(path: Path, info: ValidationInfo) -> Path:
    return Path(os.path.normpath((info.context or {}).get("base", Path.cwd()) / path.expanduser()))


Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Seconds = Annotated[float, BeforeValidator(parse_duration), Field(gt=0)]
Positive = Annotated[int, Field(gt=0)]
LocalPath = Annotated[Path, AfterValidator(_from_base)]
"""`~` is expanded; a relative path starts at the config file's folder."""


class Loader(yaml.SafeLoader):
    """Safe YAML in which a key that stands twice is an error, not a silent loss of the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class Section(BaseModel):
    """A part of a YAML file that people write: an unknown key is an error that names a near one."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping):
            for key in raw:
                if key not in cls.model_fields:
                    raise _unknown_key(str(key), cls.model_fields)
        return raw


def _unknown_key(key: str, known: Mapping[str, object]) -> PydanticCustomError:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else f" (known: {', '.join(sorted(known))})"
    return PydanticCustomError("unknown_key", "unknown key{hint}", {"hint": hint, "key": key})


class ModelConfig(Section):
    """One model and how its engine is started. `kv_memory` is bytes per device.

    `tensor_parallel` above 1 is not supported yet: real engines refuse it.

    `source`: a folder (relative to the config file), `hub:org/name`, `package:name` (a GGUF inside
    a Python package), `random:tiny-llama`, or a folder elsewhere, which is fetched into the disk
    cache: `https://host/folder`, `http://...`, `file:///share/folder`. None of the optional fields
    means the engine's default. `engine_args` go to the engine's command line as they are.
    """

    source: Annotated[str, Field(min_length=1)]
    served_names: tuple[str, ...] = ()
    tensor_parallel: Positive = 1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tool_call_parser: str | None = "hermes"
    reasoning_parser: str | None = None
    max_model_len: Positive | None = None
    max_num_seqs: Positive | None = None
    kv_memory: Size | None = None
    engine: Literal["auto", "vllm", "vllm-cpu", "stub"] = "auto"
    engine_args: dict[str, Any] = {}
    elastic_kv: bool = True
    """Whether the KV limit of a GPU engine may move, where kvcached is installed. Off for a model
    that kvcached cannot serve (docs/gpu.md): its cache then has one size."""
    python: LocalPath | None = None
    """Interpreter of the engine's own environment, where it is not this one."""
    pin: bool = False
    """Keep the weights on the device whatever the forecast says."""

    @field_validator("source")
    @classmethod
    def _resolved(cls, source: str, info: ValidationInfo) -> str:
        scheme, colon, rest = source.partition(":")
        if not colon:
            return str(_from_base(Path(source), info))
        address = {"https": r"//[^/?#]+[^?#]*", "http": r"//[^/?#]+[^?#]*", "file": r"///.+"}
        if scheme not in SOURCE_SCHEMES or not re.fullmatch(address.get(scheme, ".+"), rest):
            raise PydanticCustomError(
                "source",
                "{source} is neither a folder nor one of hub:…, package:…, random:…,"
                " https://host/folder, file:///folder",
                {"source": repr(re.sub("//.*@", "//***@", source))},
            )
        return source


class NodeConfig(Section):
    """A host. `memory` is the budget of each device in bytes, `host_memory` that of weights put
    aside in host memory; None for a part of what is found there.

    No `devices` means: the GPUs, or the CPU where there are none. `disk_cache` holds fetched and
    converted models, up to `disk_cache_size` bytes (None: as far as the disk goes). After a crash
    of the node agent its workers live on for `lease` seconds, until another agent adopts them.
    """

    name: Annotated[str, Field(min_length=1, pattern=r"^[^/\s]+$")] = Field(
        default_factory=socket.gethostname
    )
    devices: tuple[str, ...] = ()
    memory: Size | None = None
    host_memory: Size | None = None
    disk_cache: LocalPath | None = None
    disk_cache_size: Size | None = None
    lease: Seconds = 600.0

    @field_validator("devices")
    @classmethod
    def _one_kind(cls, devices: tuple[str, ...]) -> tuple[str, ...]:
        once = len(set(devices)) == len(devices)
        gpus = all(re.fullmatch(r"cuda:\d+", device) for device in devices)
        if devices != ("cpu",) and not (once and gpus):
            raise PydanticCustomError("devices", "write [cpu], or each GPU once: [cuda:0, cuda:1]")
        return devices


class SloConfig(Section):
    """A service level: the deadline of a run in seconds, None for none."""

    deadline: Seconds | None = None


class TenantConfig(Section):
    """A tenant's share: twice the `weight` is twice the service under contention.

    The policy `maestro` shares; the others serve every tenant alike.
    """

    weight: Annotated[float, Field(gt=0)] = 1.0


class PredictorConfig(Section):
    """What is kept of finished calls, counts and names only, and whether it is learned from.

    `store_size` in bytes (1 MiB or more) and `store_age` in seconds bound the file of calls; the
    oldest runs go first. `retrain` needs the store.
    """

    store: bool = True
    store_size: Size = 256 * 1024**2
    store_age: Seconds = 90 * 86_400.0
    retrain: bool = True

    @field_validator("store_size")
    @classmethod
    def _has_room(cls, size: int) -> int:
        if size < _LEAST_STORE:
            raise PydanticCustomError("store_size", "give it 1MiB or more, or turn store off")
        return size


class ListenConfig(Section):
    """Where the gateway listens."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000


def default_state_dir() -> Path:
    """`$XDG_STATE_HOME/maestro`, or `~/.local/state/maestro`."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "maestro"


_SLO: dict[str, SloConfig] = {
    "interactive": SloConfig(deadline=20.0),
    "standard": SloConfig(deadline=120.0),
    "batch": SloConfig(),
}


class Config(Section):
    """The whole file. Given `slo` classes and tenants add to the defaults or replace them."""

    models: Annotated[dict[str, ModelConfig], Field(min_length=1)]
    nodes: tuple[NodeConfig, ...] = Field(default_factory=lambda: (NodeConfig(),))
    slo: dict[str, SloConfig] = _SLO
    tenants: dict[str, TenantConfig] = {"default": TenantConfig()}
    policy: Literal["maestro", "fcfs", "edf", "sjf", "las", "plas", "atlas", "kairos"] = "maestro"
    predictor: PredictorConfig = PredictorConfig()
    state_dir: LocalPath = Field(default_factory=default_state_dir)
    listen: ListenConfig = ListenConfig()

    @field_validator("slo", "tenants")
    @classmethod
    def _with_defaults(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        assert info.field_name is not None
        return {**cls.model_fields[info.field_name].default, **given}

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        owners: dict[str, str] = {}
        for model, settings in self.models.items():
            for name in {model, *settings.served_names}:
                if owners.setdefault(name, model) != model:
                    raise PydanticCustomError(
                        "served_name",
                        "models {first} and {second} are both served as {name}",
                        {"first": owners[name], "second": model, "name": repr(name)},
                    )
        return self

    @field_validator("nodes")
    @classmethod
    def _one_node(cls, nodes: tuple[NodeConfig, ...]) -> tuple[NodeConfig, ...]:
        if not nodes:
            raise PydanticCustomError("nodes", "describe one node, or leave nodes out")
        if len(nodes) > 1:
            raise PydanticCustomError(
                "nodes", "several nodes arrive with the cluster step; keep one"
            )
        return nodes

    def unused(self) -> tuple[str, ...]:
        """One line for each setting that is given and does nothing."""
        lines = [
            f"tenants.{name}.weight does nothing: only the policy maestro shares by weight"
            for name, tenant in self.tenants.items()
            if tenant.weight != 1 and self.policy != "maestro"
        ]
        predictor = self.predictor
        if predictor.retrain and "retrain" in predictor.model_fields_set and not predictor.store:
            lines.append("predictor.retrain does nothing without predictor.store")
        return tuple(lines)

    @classmethod
    def parse(cls, raw: object, base: Path | None = None) -> Config:
        """Check `raw` (what a YAML file holds); relative folders are taken from `base`.

        Raises:
            ConfigError: one line for each thing that is wrong, with its path.
        """
        try:
            return cls.model_validate(raw, context={"base": base or Path.cwd()})
        except ValidationError as error:
            raise ConfigError("\n".join(describe(e) for e in error.errors())) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Config:
        """Read a YAML file.

        Raises:
            ConfigError: it is missing, not YAML, or something in it is wrong.
        """
        file = Path(path)
        try:
            raw = yaml.load(file.read_text(encoding="utf-8"), Loader)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the config file {file}: {error}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{file} is not YAML: {error}") from error
        try:
            return cls.parse(raw, base=file.absolute().parent)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None

    def node(self, name: str | None = None) -> NodeConfig:
        """The node called `name`, or the first one.

        Raises:
            ConfigError: there is none of that name.
        """
        for node in self.nodes:
            if name in (None, node.name):
                return node
        known = ", ".join(node.name for node in self.nodes)
        raise ConfigError(f"no node is called {name!r} (nodes: {known})")


def describe(error: Any) -> str:
    """One of pydantic's errors in a line: where it is and what is wrong."""
    path = [str(part) for part in error["loc"]]
    if error["type"] == "unknown_key":
        path.append(error["ctx"]["key"])
    message = "must be a section with keys" if error["type"] == "model_type" else error["msg"]
    return f"{'.'.join(path) or 'config'}: {message}"
