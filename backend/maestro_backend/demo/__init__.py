"""`maestro demo`: the research team on real models, from nothing to an answer."""

from ._demo import run_demo

__all__ = ["run_demo"]
