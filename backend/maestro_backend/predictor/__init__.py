"""What a call will take: output length, KV memory, time; and what is left of its run."""

from ._call import UNKNOWN, CallOutcome, CallShape, Example, RunExamples
from ._estimator import Estimate, Estimator
from ._explain import Explanation, Reason, explain
from ._features import FEATURES
from ._fit import fit
from ._model import Model, base_model, load_model
from ._predictor import LIVE, LiveCall, Prediction, Predictor, clipped
from ._rates import Rates
from ._recent import Recent
from ._replay import remaining
from ._survival import refreshed
from ._tables import CLASS_DEFAULT, Tables, app_of
from ._traces import read_traces

__all__ = [
    "CLASS_DEFAULT",
    "FEATURES",
    "LIVE",
    "UNKNOWN",
    "CallOutcome",
    "CallShape",
    "Estimate",
    "Estimator",
    "Example",
    "Explanation",
    "LiveCall",
    "Model",
    "Prediction",
    "Predictor",
    "Rates",
    "Reason",
    "Recent",
    "RunExamples",
    "Tables",
    "app_of",
    "base_model",
    "clipped",
    "explain",
    "fit",
    "load_model",
    "read_traces",
    "refreshed",
    "remaining",
]
