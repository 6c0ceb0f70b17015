"""Names, sizes and public surfaces."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (
    ROOT / "maestro_agents",
    ROOT / "adapters" / "maestro_langgraph",
    ROOT / "backend" / "maestro_backend",
)
FOLDERS = ("maestro_agents", "adapters", "backend", "tests", "examples", "benchmarks", "scripts")
MAX_LINES = 500
VAGUE = frozenset({"common", "helper", "helpers", "manager", "managers", "misc", "util", "utils"})
# A path into someone's machine, or the address of a package registry.
LOCAL = re.compile(
    r"(?<![\w.:/~-])/(?:home|root|mnt|work|workspace|Users)/\w"
    r"|pypi\.org|pythonhosted\.|registry\.npmjs|[/](?:artifactory|nexus)/"
)


def files(*suffixes: str) -> Iterator[Path]:
    """The repository's own files; caches and build products are not."""
    for folder in (*FOLDERS, "docs", ".ci"):
        for path in sorted((ROOT / folder).rglob("*")):
            built = "__pycache__" in path.parts
            if path.is_file() and not built and path.suffix in (suffixes or {path.suffix}):
                yield path
    if not suffixes:
        yield from (path for path in sorted(ROOT.glob("*")) if path.is_file())


INITS = [path for package in PACKAGES for path in sorted(package.rglob("__init__.py"))]


def public_kind(name: str) -> tuple[int, str]:
    """Constants first, then classes, then the rest: the order that ruff keeps, too."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("init", INITS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_packages_public_names_are_sorted_and_complete(init: Path) -> None:
    tree = ast.parse(init.read_text(encoding="utf-8"))
    imported: set[str] = set()
    defined: set[str] = set()
    listed: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            names = {alias.asname or alias.name for alias in node.names}
            imported |= names if node.level else set()
            defined |= names
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            defined |= names
            if names == {"__all__"} and node.value is not None:
                listed = ast.literal_eval(node.value)
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in imported}
    public = {name for name in imported - used if not name.startswith("_")}
    assert listed == sorted(listed, key=public_kind)
    assert public - set(listed) == set()
    if "__getattr__" not in defined:
        assert set(listed) - imported - defined == set()


def test_modules_stay_small() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files(".py")}
    assert {str(p.relative_to(ROOT)): n for p, n in lines.items() if n > MAX_LINES} == {}


def test_every_package_is_typed() -> None:
    assert [str(p) for p in PACKAGES if not (p / "py.typed").is_file()] == []


def test_no_file_has_a_vague_name() -> None:
    parts = {part for path in files() for part in path.relative_to(ROOT).parts}
    assert [part for part in sorted(parts) if VAGUE & set(re.split(r"[._-]", part.lower()))] == []


def test_the_repository_names_no_machine_and_no_registry() -> None:
    found = []
    for path in files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {hit.group()}" for hit in LOCAL.finditer(text)]
    assert found == []
