"""What a call will take: output length, KV memory, time."""

from ._lengths import CLASS_DEFAULT, RoleMedians
from ._predictor import CallOutcome, CallShape, Prediction, Predictor
from ._rates import Rates
from ._recent import Recent

__all__ = [
    "CLASS_DEFAULT",
    "CallOutcome",
    "CallShape",
    "Prediction",
    "Predictor",
    "Rates",
    "Recent",
    "RoleMedians",
]
