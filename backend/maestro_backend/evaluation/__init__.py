"""Was the future announced, was a call's length predicted rightly? What a backend believed, against
what then happened."""

from ._accuracy import BASELINES, figures, kv_figures, macro, mae, plain, report
from ._call_table import write_calls
from ._futures import (
    ConditionalMedians,
    Forecaster,
    Foreseen,
    foresee,
    futures_summary,
)
from ._intervals import intervals
from ._journal import Arrived, Began, Believed, Entry, JournalBook, Stepped
from ._kendall import kendall_tau
from ._model_folder import Trained, check_target, cpus, shortened, train, train_rows
from ._model_folder import load as load_trained
from ._model_folder import save as save_trained
from ._prediction_time import prediction_ms
from ._predictions import Predicted, interleaved, joined, predict
from ._score import ChoiceScore, Score, score, spread

__all__ = [
    "BASELINES",
    "Arrived",
    "Began",
    "Believed",
    "ChoiceScore",
    "ConditionalMedians",
    "Entry",
    "Forecaster",
    "Foreseen",
    "JournalBook",
    "Predicted",
    "Score",
    "Stepped",
    "Trained",
    "check_target",
    "cpus",
    "figures",
    "foresee",
    "futures_summary",
    "interleaved",
    "intervals",
    "joined",
    "kendall_tau",
    "kv_figures",
    "load_trained",
    "macro",
    "mae",
    "plain",
    "predict",
    "prediction_ms",
    "report",
    "save_trained",
    "score",
    "shortened",
    "spread",
    "train",
    "train_rows",
    "write_calls",
]
