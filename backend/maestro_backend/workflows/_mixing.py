"""How much to believe each of several predictions: learned from how well each of them did."""

from __future__ import annotations

from math import log2
from typing import Any

import numpy as np
import numpy.typing as npt

Weights = npt.NDArray[np.float64]

EVIDENCE = 8
"""Amounts of evidence that are told apart: none, 1, 2-3, 4-7 ... 64 and more (ours)."""
_START = (0.0, 2.0)
"""Before it is learned: of what has any evidence, the most general prediction weighs as much as
what has none, the most exact one e^2 times that (ours; on recorded runs)."""


def evidence(count: float) -> int:
    """The class of an amount of evidence, 0 to 7."""
    return 0 if count < 1 else min(EVIDENCE - 1, 1 + int(log2(count)))


class Mixer:
    """Weights of a linear mixture of distributions, from general to exact.

    A softmax of one number for each (prediction, class of evidence), learned by gradient steps on
    the mixture's log-loss.

    The rule is exponentiated gradient (Kivinen and Warmuth, 1997); to take the weights from the
    amount of evidence is ours.
    """

    def __init__(self, predictions: int, rate: float) -> None:
        self._rate = rate
        self._logits = np.zeros((predictions, EVIDENCE))
        self._logits[:, 1:] = np.linspace(*_START, predictions)[:, np.newaxis]
        self._index = np.arange(predictions)

    def weights(self, classes: list[int]) -> Weights:
        """One weight per prediction; their sum is 1."""
        logits = self._logits[self._index, classes]
        powers = np.exp(logits - logits.max())
        weights: Weights = powers / powers.sum()
        return weights

    def learn(self, classes: list[int], weights: Weights, chances: Weights) -> None:
        """What came true had these `chances` by the predictions, which weighed `weights`."""
        mixed = float(weights @ chances)
        self._logits[self._index, classes] += self._rate * weights * (chances / mixed - 1.0)

    def state(self) -> list[list[float]]:
        """As plain JSON."""
        rows: list[list[float]] = self._logits.tolist()
        return rows

    def restore(self, state: Any) -> None:
        """What `state` gave; another shape is of another version, and is left out."""
        logits = np.array(state, dtype=float)
        if logits.shape == self._logits.shape and np.isfinite(logits).all():
            self._logits = logits
