"""Which class, weight, tenant and models each source gets, and the deadlines of the classes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from math import log
from pathlib import Path
from typing import Annotated, Any, Self
from zlib import crc32

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from maestro_agents.protocol import ConfigError
from maestro_backend.config import Loader, Seconds, Section, Size, describe
from maestro_backend.simulator import ModelGeometry


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Share = Annotated[float, Field(gt=0, le=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]
"""One model, or several, of which each run gets one for good."""


class SourceMix(Section):
    """`weight`: share of the runs, relative to the other sources that are there.

    `models`: by role, else by kind of role; what is not named falls back to the mix's `kinds`.
    """

    slo: Annotated[str, Field(min_length=1)] = "standard"
    weight: Share = 0.05
    tenant: Annotated[str, Field(min_length=1)] = "default"
    models: dict[str, Names] = {}


class Mix(Section):
    """A whole mix file. Sources that it does not name are as `default` says.

    `models`: bytes of weights of the models that it speaks of, to find the nearest on a cluster
    that has others. `max_pause_s`, `max_gap_s`: people and tools take no longer, `max_calls`: a run
    is replayed no further, since a session of hours has no steady state. `single_call_share`: at
    most this share of the runs are of sources whose runs are a single call. `deadlines`: name ->
    class -> seconds.
    """

    models: Annotated[dict[str, Size], Field(min_length=1)]
    kinds: dict[str, Names] = {}
    default: SourceMix = SourceMix()
    sources: dict[str, SourceMix] = {}
    deadlines: dict[str, dict[str, Seconds]] = {}
    max_pause_s: Seconds = 60.0
    max_gap_s: Seconds = 60.0
    max_calls: Annotated[int, Field(ge=1)] = 100
    single_call_share: Share = 0.05

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        entries = {"default": self.default, **self.sources}
        maps = {"kinds": self.kinds, **{name: entry.models for name, entry in entries.items()}}
        for where, named in maps.items():
            for model in (model for models in named.values() for model in models):
                if model not in self.models:
                    raise _unknown(where, "model", model, self.models)
        for name, classes in self.deadlines.items():
            for where, entry in entries.items():
                if entry.slo not in classes:
                    raise _unknown(where, f"class in deadlines.{name}", entry.slo, classes)
        return self

    def of(self, source: str) -> SourceMix:
        return self.sources.get(source, self.default)

    def model_of(self, source: str, run: str, role: str, kind: str) -> str:
        """By role, by kind, by the mix's kinds; else any, the same one for the role at all times.

        Where there are several, a hash of the run's name chooses, the same on every machine.
        """
        own = self.of(source).models
        names = own.get(role) or own.get(kind) or self.kinds.get(kind)
        if names is None:
            return _chosen(tuple(sorted(self.models)), f"{source}/{role}")
        return names[0] if len(names) == 1 else _chosen(names, f"{source}/{run}/{role}")

    def onto(self, models: Mapping[str, ModelGeometry]) -> dict[str, str]:
        """This mix's models -> a cluster's: the same name, else the nearest in bytes of weights."""
        if not models:
            raise ConfigError("the cluster has no models")
        return {
            name: name
            if name in models
            else min(models, key=lambda m: (abs(log(models[m].weights_bytes / size)), m))
            for name, size in self.models.items()
        }


def load_mix(name: str | Path) -> Mix:
    """A mix that comes with the package (`paper`), or a YAML file.

    Raises:
        ConfigError: there is none, it is not YAML, or something in it is wrong.
    """
    try:
        text = _text(str(name))
        return Mix.model_validate(yaml.load(text, Loader))
    except yaml.YAMLError as error:
        raise ConfigError(f"the mix {name} is not YAML: {error}") from error
    except ValidationError as error:
        lines = "\n".join(describe(e) for e in error.errors())
        raise ConfigError(f"the mix {name}: {lines}") from None


def _text(name: str) -> str:
    ours = resources.files(__package__) / "mixes"
    known = sorted(entry.name.removesuffix(".yaml") for entry in ours.iterdir())
    if name in known:
        return (ours / f"{name}.yaml").read_text(encoding="utf-8")
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"there is no mix {name!r}: give a YAML file, or one of {', '.join(known)} ({error})"
        ) from error


def _unknown(where: str, what: str, name: str, known: Mapping[str, Any]) -> PydanticCustomError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
    return PydanticCustomError(
        "unknown_name",
        "{where}: there is no {what} {name}; {hint}",
        {"where": where, "what": what, "name": name, "hint": hint},
    )


def _chosen(names: tuple[str, ...], key: str) -> str:
    return names[crc32(key.encode()) % len(names)]
