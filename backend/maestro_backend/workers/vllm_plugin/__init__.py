"""Our vLLM plugin (entry point group `vllm.general_plugins`).

vLLM loads it into every process of every vLLM in the environment, so it does nothing at all unless
`MAESTRO_WORKER` says that this vLLM is a worker of ours. Only the standard library is imported
until then.
"""

import os

from ._kvcached import kvcached_environment, kvcached_refusal
from ._process import hide_mismatched_packages, join_worker

__all__ = [
    "hide_mismatched_packages",
    "join",
    "kvcached_environment",
    "kvcached_refusal",
    "register",
]


def join() -> None:
    """Make this process part of a Maestro worker; a no-op in anybody else's vLLM."""
    if "MAESTRO_WORKER" in os.environ:
        join_worker()


def register() -> None:
    """What vLLM loads: `join`, and our methods on its engine core."""
    join()
    if "MAESTRO_WORKER" in os.environ:
        from ._core import install
        from ._sleep import register_sleep_backend

        install()
        register_sleep_backend()
