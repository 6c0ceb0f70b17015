"""Models over time: versions on the disk, training in a process of its own, watching for drift."""

from ._drift import Alarm, Drift, Trouble
from ._retraining import Due, Retraining
from ._trainer import TrainerProcess
from ._training import Judgement, Outcome, Training, decide, split, train
from ._versions import Manifest, Version, Versions

__all__ = [
    "Alarm",
    "Drift",
    "Due",
    "Judgement",
    "Manifest",
    "Outcome",
    "Retraining",
    "TrainerProcess",
    "Training",
    "Trouble",
    "Version",
    "Versions",
    "decide",
    "split",
    "train",
]
