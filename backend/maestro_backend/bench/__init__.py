"""`maestro bench`: what the node level does on this machine, measured on real engines."""

from ._colocation import Plan, Scene, bench_colocation
from ._command import add_arguments, run_bench
from ._engines import PROMPTS, Caller, forget_pages, keep_logs, say, spread, worker_of
from ._kv import Load
from ._workload import RecordedRun

__all__ = [
    "PROMPTS",
    "Caller",
    "Load",
    "Plan",
    "RecordedRun",
    "Scene",
    "add_arguments",
    "bench_colocation",
    "forget_pages",
    "keep_logs",
    "run_bench",
    "say",
    "spread",
    "worker_of",
]
