"""Device profiles and models by name: those that are shipped, and those of a file."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from maestro_agents.protocol import ConfigError
from maestro_backend.config import Loader, describe
from maestro_backend.simulator import DeviceProfile, ModelGeometry

from ._room import USABLE_SHARE
from ._sections import CatalogueSection, ModelSection, ProfileSection, given

_PROFILE_FIELDS = {
    "capacity": "capacity_bytes",
    "step": "step_s",
    "allreduce": "allreduce_s",
    "residual": "residual_bytes",
    "start": "start_s",
    "wake": "wake_s",
    "limit": "limit_s",
}
_MODEL_FIELDS = {"weights": "weights_bytes"}

Kind = TypeVar("Kind", DeviceProfile, ModelGeometry)
Checked = TypeVar("Checked", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Catalogue:
    """By name. The `capacity_bytes` of a profile is the usable part of its memory."""

    profiles: Mapping[str, DeviceProfile] = field(default_factory=dict)
    models: Mapping[str, ModelGeometry] = field(default_factory=dict)

    def with_sections(
        self, profiles: Mapping[str, ProfileSection], models: Mapping[str, ModelSection]
    ) -> Catalogue:
        """These on top: a name that was there is replaced.

        Raises:
            ConfigError: a section leaves something out, or is like one that is not there.
        """
        found_profiles, found_models = dict(self.profiles), dict(self.models)
        for name, profile in profiles.items():
            found_profiles[name] = _resolved(
                DeviceProfile, f"profiles.{name}", profile, found_profiles, _PROFILE_FIELDS
            )
        for name, model in models.items():
            found_models[name] = _resolved(
                ModelGeometry, f"models.{name}", model, found_models, _MODEL_FIELDS
            )
        return Catalogue(found_profiles, found_models)


def _resolved(
    kind: type[Kind],
    where: str,
    section: ProfileSection | ModelSection,
    known: Mapping[str, Kind],
    keys: dict[str, str],
) -> Kind:
    values = {"name": where.partition(".")[2], **given(section, keys)}
    if "capacity_bytes" in values:
        values["capacity_bytes"] = int(values["capacity_bytes"] * USABLE_SHARE)
    if section.like is not None:
        return replace(chosen(known, section.like, f"{where}.like"), **values)
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.name not in values]
    if needed:
        spelled = {name: key for key, name in keys.items()}
        missing = ", ".join(spelled.get(name, name) for name in needed)
        raise ConfigError(f"{where}: give {missing} too, or like: the name of another one")
    return kind(**values)


def chosen(known: Mapping[str, Kind], name: str, where: str) -> Kind:
    """The one of that name.

    Raises:
        ConfigError: there is none; `where` it is asked for and the likely name are told.
    """
    if name in known:
        return known[name]
    raise ConfigError(f"{where}: there is no {name!r}{likely(name, known)}")


def likely(name: str, known: Iterable[str]) -> str:
    """A hint for who asked for a name that is not there."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else f" (known: {', '.join(names)})"


def read_section(kind: type[Checked], text: str, source: str, base: Path | None = None) -> Checked:
    """A YAML text as a section; relative paths in it start at `base`.

    Raises:
        ConfigError: it is not YAML, or something in it is wrong; `source` is named.
    """
    try:
        raw: Any = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {error}") from error
    try:
        return kind.model_validate(raw, context={"base": base or Path.cwd()})
    except ValidationError as error:
        wrong = "\n".join(f"{source}: {describe(each)}" for each in error.errors())
        raise ConfigError(wrong) from None


def read_text(path: Path) -> str:
    """Raises `ConfigError` where the file cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def with_file(catalogue: Catalogue, path: Path) -> Catalogue:
    """The profiles and models of a file on top."""
    section = read_section(CatalogueSection, read_text(path), str(path), path.absolute().parent)
    try:
        return catalogue.with_sections(section.profiles, section.models)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


@cache
def shipped() -> Catalogue:
    """What comes with Maestro (docs/simulator-profiles.md has the source of each figure)."""
    catalogue = Catalogue()
    for name in ("profiles.yaml", "models.yaml"):
        text = files(__package__).joinpath(name).read_text(encoding="utf-8")
        section = read_section(CatalogueSection, text, name)
        catalogue = catalogue.with_sections(section.profiles, section.models)
    return catalogue


def load_profile(name: str) -> DeviceProfile:
    """A shipped profile by name, such as `a100-80g`.

    Raises:
        ConfigError: there is none of that name.
    """
    return chosen(shipped().profiles, name, "profile")


def load_geometry(name: str | os.PathLike[str]) -> ModelGeometry:
    """A shipped model by name, or the one model of a YAML file with a section `models`.

    Raises:
        ConfigError: there is none, or the file has several.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        return chosen(shipped().models, os.fspath(name), "geometry")
    section = read_section(CatalogueSection, read_text(path), str(path), path.absolute().parent)
    if len(section.models) != 1:
        raise ConfigError(f"{path}: give one model under models:, there are {len(section.models)}")
    return with_file(shipped(), path).models[next(iter(section.models))]


def find_geometry(served: str) -> ModelGeometry | None:
    """The shipped model that is likely served under that name, as
    `meta-llama/Llama-3.1-8B-Instruct`."""
    plain = re.sub(r"-(instruct|chat|it)\b", "", served.rpartition("/")[2].lower())
    return shipped().models.get(plain)
