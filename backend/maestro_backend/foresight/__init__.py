"""What could be known of each call of recorded runs, computed before they are simulated."""

from ._ahead import ServiceS
from ._foresee import foresee
from ._overlap import overlap

__all__ = ["ServiceS", "foresee", "overlap"]
