"""Our vLLM plugin (entry point group `vllm.general_plugins`).

vLLM loads it into every process of every vLLM in the environment, so it does nothing at all unless
`MAESTRO_WORKER` says that this vLLM is a worker of ours. Only the standard library is imported.
"""

import os

from ._process import hide_mismatched_packages, join_worker

__all__ = ["hide_mismatched_packages", "register"]


def register() -> None:
    """Make this process part of a Maestro worker; a no-op in anybody else's vLLM."""
    if "MAESTRO_WORKER" in os.environ:
        join_worker()
