"""`maestro bench`: what the node level does on this machine, measured on real engines."""

from ._command import add_arguments, run_bench

__all__ = ["add_arguments", "run_bench"]
