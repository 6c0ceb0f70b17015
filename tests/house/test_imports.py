"""Who may import whom. The arrows point one way: adapters and backend to the protocol."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {
    "maestro_agents": ROOT,
    "maestro_langgraph": ROOT / "adapters",
    "maestro_backend": ROOT / "backend",
}
# Whatever waits, tells the time, rolls dice, or touches a file, a process or the network.
IMPURE = frozenset(
    """
    _thread aiofiles aiohttp anyio argparse asyncio concurrent contextvars ctypes datetime fcntl
    fileinput glob http httpcore httptools httpx importlib io logging mmap multiprocessing openai
    os pathlib pickle prometheus_client psutil pty queue random requests resource sched secrets
    select selectors shelve shutil signal socket socketserver sqlite3 ssl starlette subprocess sys
    tempfile termios threading time trio urllib.request uuid uvicorn uvloop vllm yaml
    """.split()  # noqa: SIM905  a list literal would be a page long
)
IMPURE_CALLS = frozenset({"breakpoint", "eval", "exec", "input", "open", "print", "__import__"})
PURE_PACKAGES = ("maestro_backend.scheduler", "maestro_backend.simulator")
OPTIONAL = (
    "httpx",
    "langchain_core",
    "langgraph",
    "openai",
    "starlette",
    "torch",
    "uvicorn",
    "vllm",
)


@dataclass(frozen=True)
class Import:
    """One imported name: `target` is a module, or a module and a name in it."""

    source: str
    target: str
    line: int
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def module_files(package: str) -> Iterator[tuple[str, Path]]:
    top = package.partition(".")[0]
    base = SOURCES[top]
    for path in sorted((base / package.replace(".", "/")).rglob("*.py")):
        parts = path.relative_to(base).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


@cache
def module_path(module: str) -> Path | None:
    base = SOURCES.get(module.partition(".")[0])
    if base is None:
        return None
    stem = base / module.replace(".", "/")
    files = (stem / "__init__.py", stem.with_suffix(".py"))
    return next((path for path in files if path.is_file()), None)


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    path = module_path(module)
    assert path is not None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {id(node) for block in ast.walk(tree) if _is_typing(block) for node in _body(block)}
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(tree):
        for target in _targets(node, package):
            found.append(Import(module, target, getattr(node, "lineno", 0), id(node) in guarded))
    return tuple(found)


def _is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _body(block: ast.AST) -> Iterator[ast.AST]:
    assert isinstance(block, ast.If)
    for statement in block.body:
        yield from ast.walk(statement)


def _targets(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    origin = node.module or ""
    if node.level:
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        origin = ".".join([*above, origin] if origin else above)
    return [f"{origin}.{alias.name}" for alias in node.names]


def is_in(target: str, *packages: str) -> bool:
    return any(target == package or target.startswith(f"{package}.") for package in packages)


def is_ours(target: str) -> bool:
    return is_in(target, *SOURCES)


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("maestro_agents.protocol", ("maestro_agents.protocol",)),
        ("maestro_agents", ("maestro_agents",)),
        ("maestro_langgraph", ("maestro_agents", "maestro_langgraph")),
        (
            "maestro_backend",
            ("maestro_agents.protocol", "maestro_agents.testing", "maestro_backend"),
        ),
    ],
)
def test_a_package_imports_only_what_is_below_it(package: str, allowed: tuple[str, ...]) -> None:
    modules = [module for module, _ in module_files(package)]
    assert modules, f"no modules in {package}"
    wrong = [
        str(found)
        for module in modules
        for found in imports_of(module)
        if is_ours(found.target) and not is_in(found.target, *allowed)
    ]
    assert wrong == []


def test_an_adapter_imports_nothing_private_of_the_sdk() -> None:
    wrong = [
        str(found)
        for module, _ in module_files("maestro_langgraph")
        for found in imports_of(module)
        if is_in(found.target, "maestro_agents")
        and any(part.startswith("_") for part in found.target.split("."))
    ]
    assert wrong == []


def reached(module: str, via: tuple[str, ...] = ()) -> Iterator[tuple[Import, tuple[str, ...]]]:
    """Every import of a module and of the modules of ours that it imports, with the way there."""
    seen: set[str] = set()
    pending = [(module, via)]
    while pending:
        name, way = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        for found in imports_of(name):
            if found.typing_only:
                continue
            yield found, way
            # `from package import name` names either a module or something inside one.
            owner = found.target if module_path(found.target) else found.target.rpartition(".")[0]
            if module_path(owner):
                pending.append((owner, (*way, name)))


@pytest.mark.parametrize("package", PURE_PACKAGES)
def test_the_core_reaches_no_io_clock_or_chance(package: str) -> None:
    wrong = {
        f"{found} (via {' -> '.join(way)})" if way else str(found)
        for module, _ in module_files(package)
        for found, way in reached(module)
        if is_in(found.target, *IMPURE)
    }
    assert sorted(wrong) == []


@pytest.mark.parametrize("package", PURE_PACKAGES)
def test_the_core_calls_no_impure_builtin(package: str) -> None:
    wrong = [
        f"{module}:{node.lineno} calls {node.func.id}()"
        for module, path in module_files(package)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in IMPURE_CALLS
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ["maestro_agents", "maestro_agents.protocol"])
def test_the_sdk_needs_only_pydantic(package: str) -> None:
    code = f"import sys, {package}; print(*sorted(set({OPTIONAL}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_the_rules_see_what_they_forbid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "maestro_backend"
    (package / "scheduler").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "clock.py").write_text("import time\n")
    (package / "scheduler" / "__init__.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from random import Random\n"
        "def late():\n    from ..clock import now\n"
    )
    monkeypatch.setitem(SOURCES, "maestro_backend", tmp_path)
    for cached in (module_path, imports_of):
        cached.cache_clear()
    try:
        found = [str(f) for f, _ in reached("maestro_backend.scheduler") if is_in(f.target, "time")]
        seen = [f.target for f, _ in reached("maestro_backend.scheduler")]
    finally:
        for cached in (module_path, imports_of):
            cached.cache_clear()
    assert found == ["maestro_backend.clock:1 imports time"]
    assert "random.Random" not in seen
