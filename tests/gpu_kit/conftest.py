"""The kit's package is no part of the wheel: it is found beside its scripts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "gpu"))
