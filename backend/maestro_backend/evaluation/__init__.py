"""Was the future announced rightly? What a backend believed, against what then happened."""

from ._journal import Arrived, Began, Believed, Entry, JournalBook, Stepped
from ._score import ChoiceScore, Score, score, spread

__all__ = [
    "Arrived",
    "Began",
    "Believed",
    "ChoiceScore",
    "Entry",
    "JournalBook",
    "Score",
    "Stepped",
    "score",
    "spread",
]
